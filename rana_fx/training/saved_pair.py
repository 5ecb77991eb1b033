"""Save a trained model and its plan into one folder atomically: both are new, or both are unchanged.

In: a folder, a model of transformers, its tokenizer and the plan that belongs to its weights. Out: FOLDER/model and FOLDER/plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rana_fx.errors import PlanWriteError
from rana_fx.plan import Plan
from rana_fx.switching import names_of, switching

# removed with the old pair: weights in files that a loader may prefer to the new ones, and tensors of older plans
_STALE = names_of(("model/*.safetensors", "model/*.index.json", "model/pytorch_model*.bin", "plan/plan-*.safetensors"))


def save_pair(folder: Path, model: Any, tokenizer: Any, plan: Plan) -> None:
    """Write FOLDER/model and FOLDER/plan. Raises PlanWriteError; an older pair is then unchanged."""
    try:
        with switching(folder, stale=_STALE) as new:
            plan.save(new / "plan")
            model.save_pretrained(new / "model")
            tokenizer.save_pretrained(new / "model")
    except PlanWriteError as error:
        raise PlanWriteError(path=folder, reason=error.facts["reason"]) from error
    except Exception as error:  # safetensors and the tokenizer may raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PlanWriteError(path=folder, reason=reason) from error
