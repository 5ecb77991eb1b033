"""A trained model and its plan in one folder: both are new, or both are as they were.

In: a folder, a model of transformers, its tokenizer and the plan that belongs to its weights. Out: FOLDER/model and FOLDER/plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rana_fx.errors import PlanWriteError
from rana_fx.plan import Plan
from rana_fx.switching import names_of, switching

# weights that a loader would prefer to new ones in files of other names, and tensors of older plans
_STALE = names_of(("model/*.safetensors", "model/*.index.json", "model/pytorch_model*.bin", "plan/plan-*.safetensors"))


def save_pair(folder: Path, model: Any, tokenizer: Any, plan: Plan) -> None:
    """Raises PlanWriteError; an older pair is then still there."""
    try:
        with switching(folder, stale=_STALE) as new:
            plan.save(new / "plan")
            model.save_pretrained(new / "model")
            tokenizer.save_pretrained(new / "model")
    except PlanWriteError as error:
        raise PlanWriteError(path=folder, reason=error.facts["reason"]) from error
    except Exception as error:  # whatever safetensors and the tokenizer raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PlanWriteError(path=folder, reason=reason) from error
