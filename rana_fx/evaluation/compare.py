"""A model and its plan side by side on this device: what the plan costs in quality, and what it gains in speed.

In: a causal language model of transformers with a plan attached, and documents. Out: a ``Comparison``: quality over documents,
with intervals; times of compiled decoding of one sequence; memory; and what decides whether anything is gained. The dense model
is compiled by Inductor in the same mode. rana_fx/evaluation/verdict.py has it as text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rana_fx._backend import backend
from rana_fx.calibration.calibrate import CALIBRATE, calibrate
from rana_fx.curve import Interval
from rana_fx.errors import InvalidOption, NoBatches, NoPlan
from rana_fx.evaluation.decoding import ROUNDS, Times, decoding_times
from rana_fx.modules import unwrap
from rana_fx.plan import Plan
from rana_fx.progress import Callback, following
from rana_fx.recipes.held_out_quality import Measured, held_out_quality
from rana_fx.runtime.attachment import attached
from rana_fx.runtime.prefill import memory_of, tokens_masked
from rana_fx.step_time import step_time

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = 64  # tokens, at most: the beginning of the first document
_SHARES = {CALIBRATE: 0.1, "quality": 0.3, "speed": 0.6}


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        perplexity: exp(mean loss of a next token); None: the model's logits are not those of next tokens.
        ms_per_token, first_token_ms: medians, compiled, one sequence. compile_s: the extra time of the first call of each shape.
        memory_bytes: weights, buffers and factors. read_bytes: of the linears' weights, expected, that a decoded token reads.
    """

    perplexity: float | None
    ms_per_token: float
    first_token_ms: float
    compile_s: float
    memory_bytes: int
    read_bytes: float


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` measured. JSON-able by ``to_dict``.

    Attributes:
        kl, agreement, perplexity: divergence (nats per token), share of tokens with the same most probable next one, increase of
            the perplexity in points; means with 95 % intervals over documents, None where there are fewer than 8.
        speedup: dense over adapted time of a token: median over rounds, and the lowest and highest round.
        adapters: their number. unmasked: those for which no masked kernel is used for one token here, but a dense matmul.
        expected_ms: on a GPU (dense, adapted), what the cost model of the kernels expects of a token (rana_fx/step_time.py).
        slower: on a GPU, adapters that are expected to take longer than the linears that they replace.
    """

    model: str
    plan: str
    recipe: str
    budget: float
    metric: str
    device: str
    dtype: str
    mode: str
    documents: int
    tokens: int
    prompt_tokens: int
    new_tokens: int
    dense: Side
    adapted: Side
    kl: Interval | None
    agreement: Interval | None
    perplexity: Interval | None
    speedup: Interval
    adapters: int
    unmasked: int
    expected_ms: tuple[float, float] | None = None
    slower: tuple[str, ...] = ()

    @property
    def faster(self) -> bool | None:
        """Whether the adapted model was faster in every round; None: in some."""
        return True if self.speedup.low > 1 else False if self.speedup.high < 1 else None

    def to_dict(self) -> dict[str, Any]:
        """All facts."""
        return asdict(self) | {"faster": self.faster, "rounds": ROUNDS}


def compare(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    new_tokens: int = 32,
    independent: bool = True,
    progress: bool | Callback = True,
) -> Comparison:
    """Measure a model with a plan attached against itself without it.

    Args:
        model: a causal language model of transformers. It is not changed.
        batches: documents, one in each row of ``input_ids`` (B, T), with ``attention_mask`` (B, T); the adapted model must not
            have been calibrated on them.
        new_tokens: decoded and timed in each of three rounds, after a prompt: the beginning of the first document.
        independent: False where rows are parts of fewer documents: then there are no intervals.
        progress: as ``rana_fx.adapt`` takes it.

    Raises:
        NoPlan: none is attached. NoBatches. InvalidOption: the model is none of transformers, ``new_tokens`` is not positive or
        does not fit into the model's context. What calibration raises where the model cannot be traced.

    Example:
        >>> rana_fx.attach(model, "plan")
        >>> found = compare(model, batches)
        >>> found.speedup.mean, found.kl, found.faster
    """
    model = cast("PreTrainedModel", unwrap(model))
    plan, prompt_1T = _checked(model, batches, new_tokens)
    with following(progress, title="compare", shares=_SHARES) as steps:
        layout = calibrate(model, batches[:1], progress=steps).layout
        with steps.stage("quality"), held_out_quality(model, layout, batches) as quality:
            measured = quality.measure(plan.adapters)
        if not independent:
            measured = replace(measured, kl=None, loss=None, perplexity=None, agreement=None)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        with steps.stage("speed"):
            steps.expect(2 * (ROUNDS + 1))
            times = decoding_times(model, prompt_1T, _compiled(model, mode), new_tokens=new_tokens, advance=steps.advance)
    weights = {name: site.weight for name, site in layout.sites.items()}
    masked = [tokens_masked(plan, one, weights[one.sites[0]]) > 0 for one in plan.adapters if one.sites[0] in weights]
    step = step_time(layout, plan, model.device)
    return Comparison(
        model=type(model).__name__,
        plan=plan.digest()[:12],
        recipe=plan.recipe,
        budget=plan.budget,
        metric=plan.metric,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        mode=mode,
        documents=measured.documents,
        tokens=measured.tokens,
        prompt_tokens=prompt_1T.shape[1],
        new_tokens=new_tokens,
        dense=_side(model, plan, measured, times["dense"], adapted=False),
        adapted=_side(model, plan, measured, times["adapted"], adapted=True),
        kl=measured.kl,
        agreement=measured.agreement,
        perplexity=measured.perplexity,
        speedup=_ratio(times["dense"].medians_ms, times["adapted"].medians_ms),
        adapters=len(plan.adapters),
        unmasked=masked.count(False),
        expected_ms=None if step is None else (step.dense_ms, step.ms),
        slower=() if step is None else step.slower,
    )


def _checked(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], new_tokens: int) -> tuple[Plan, Tensor]:
    """(the plan, the prompt (1, T)), before anything is run."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InvalidOption(name="model", got=type(model).__name__, expected="a causal language model of transformers")
    present = attached(model)
    if present is None:
        raise NoPlan(site=next(name for name, _ in model.named_parameters()))
    if not batches:
        raise NoBatches(hint="input_ids (B, T) with attention_mask")
    ids_T = batches[0]["input_ids"][0]
    mask_BT = batches[0].get("attention_mask")
    prompt_1T = (ids_T if mask_BT is None else ids_T[mask_BT[0].bool()])[None, :PROMPT]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if new_tokens < 1 or (limit is not None and prompt_1T.shape[1] + new_tokens > limit):
        most = "" if limit is None else f", at most {limit - prompt_1T.shape[1]}: the model's context is {limit}"
        raise InvalidOption(name="new_tokens", got=new_tokens, expected=f"a positive number{most}")
    return present.plan, prompt_1T


def _compiled(model: PreTrainedModel, mode: str) -> dict[str, Any]:
    """Both models, compiled in one mode, each shape separately."""
    forward = type(model).forward.__get__(model)
    return {
        "dense": torch.compile(forward, backend="inductor", mode=mode, dynamic=False),
        "adapted": torch.compile(forward, backend=backend, options={"mode": mode}, dynamic=False),
    }


def _side(model: PreTrainedModel, plan: Plan, measured: Measured, times: Times, *, adapted: bool) -> Side:
    loss = measured.adapted_loss if adapted else measured.dense_loss
    tensors = {id(value): value for value in (*model.parameters(), *model.buffers())}.values()
    memory = sum(value.numel() * value.element_size() for value in tensors)
    read = sum(site.cost("bytes") for site in plan.sites if site.role != "constant")
    if adapted:
        memory += memory_of(plan).factors
        read -= plan.dense_cost.bytes * (1 - plan.expected_budget("bytes"))
    return Side(
        perplexity=None if loss is None else math.exp(loss) if loss < 700 else math.inf,
        ms_per_token=statistics.median(times.medians_ms),
        first_token_ms=statistics.median(times.first_ms),
        compile_s=times.compile_s,
        memory_bytes=memory,
        read_bytes=read,
    )


def _ratio(dense: Sequence[float], adapted: Sequence[float]) -> Interval:
    """Of medians by round."""
    found = [one / other for one, other in zip(dense, adapted, strict=True)]
    return Interval(statistics.median(found), min(found), max(found))
