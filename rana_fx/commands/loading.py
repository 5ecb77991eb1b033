"""A model with its plan, as several commands load them: the plan first, the model in the plan's dtype.

In: MODEL, --plan, --dtype and --device. Out: the model with the plan attached, its tokenizer and the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rana_fx.choices import DTYPES
from rana_fx.errors import InvalidOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rana_fx.plan import Plan


def load(
    model: str, plan: Path | None, *, dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Plan | None]:
    """``dtype`` "auto" is the plan's, where there is one.

    Raises:
        InvalidOption: another dtype than the plan's, before the model is loaded. PlanFileError, PlanVersion, ModelError,
        PlanMismatch.
    """
    from rana_fx.evaluation import perplexity
    from rana_fx.plan import load_plan
    from rana_fx.runtime.attachment import attach

    loaded = None if plan is None else load_plan(plan)
    network, tokenizer = perplexity.load_model(model, dtype=dtype_for(loaded, dtype), device=device)
    if loaded is not None:
        attach(network, loaded)
    return network, tokenizer, loaded


def dtype_for(plan: Plan | None, dtype: str) -> str:
    """The dtype to load a model in. Raises InvalidOption where it is not the plan's."""
    if plan is None or plan.dtype not in DTYPES:
        return dtype
    if dtype not in ("auto", plan.dtype):
        raise InvalidOption(name="--dtype", got=dtype, expected=f"{plan.dtype}, in which the plan was made, or auto")
    return plan.dtype
