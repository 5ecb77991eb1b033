"""The variants that ``bench.decode`` compares: the dense model (eager and compiled), int8 weights, and plans.

In: names from the command line. Out: ``Variant`` objects, and for each a context in which the model is that variant: with a plan
attached and its thresholds set, or with weights in 8 bits. int8 replaces the weights permanently, so it is the last variant.

    eager               the model's own forward
    reduce-overhead     torch.compile with that mode: Inductor and CUDA graphs
    max-autotune        torch.compile with that mode, which also measures kernel configs
    int8                int8 weight-only of torchao, then reduce-overhead
    rana                rana_fx.backend with --mode; one variant per saved plan, or per random plan (config and budget)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rana_fx
from bench.speed.random_plan import PlanConfig, RecordingMeter, attach_unchecked, live_plan, random_plan, set_thresholds
from bench.speed.verify import Expected, record_expected
from rana_fx.calibration.batches import evaluating, observing
from rana_fx.calibration.layout import Layout
from rana_fx.errors import InvalidOption
from rana_fx.evaluation.measure import Measurement
from rana_fx.kernels.ops import implementation
from rana_fx.plan import Plan, load_plan
from rana_fx.runtime.attachment import attach, attached, detach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bench.speed.decoding import Decoder, Script

NAMES = ("eager", "reduce-overhead", "max-autotune", "int8", "rana")
_CHECK_STEPS = 4
CHECK_CONTEXT = 16
_RECORDED_VALUES = 2**16  # values of the residual stream over all recorded steps, at most


@dataclass(frozen=True)
class Variant:
    """``kind``: dense, int8 or rana. ``mode``: of torch.compile, None for eager."""

    name: str
    kind: str
    mode: str | None
    budget: float | None = None
    saved: Path | None = None
    config: PlanConfig = field(default_factory=PlanConfig)
    prefill: str = "masked"

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.budget:g}"

    def compiled(self, model: PreTrainedModel) -> Callable[..., Any]:
        """The function that is timed; each shape is compiled separately."""
        forward: Callable[..., Any] = model.forward
        if self.mode is None:
            return forward
        if self.kind == "rana":
            options: Any = {"mode": self.mode, "prefill": self.prefill}
            return torch.compile(forward, backend=rana_fx.backend, options=options, dynamic=False, fullgraph=True)
        return torch.compile(forward, mode=self.mode, dynamic=False, fullgraph=True)


def variants(
    names: str, budgets: list[float], plans: list[Path], *, mode: str, configs: Sequence[PlanConfig], prefill: str
) -> list[Variant]:
    """Variants by name: dense ones first, since ratios need their times; int8 last. Raises InvalidOption."""
    given = [name.strip() for name in names.split(",")]
    for name in given:
        if name not in NAMES:
            raise InvalidOption(name="--variants", got=name, expected="some of " + ", ".join(NAMES))
    found = [Variant(name, "dense", None if name == "eager" else name) for name in NAMES[:3] if name in given]
    if "rana" in given:
        found += [Variant("rana", "rana", mode, load_plan(path).budget, saved=path, prefill=prefill) for path in plans]
        for config in configs:
            name = "rana" if config.label == "rank" else f"rana {config.label}"
            found += [Variant(name, "rana", mode, budget, config=config, prefill=prefill) for budget in budgets]
    return found + [Variant("int8", "int8", "reduce-overhead") for name in given if name == "int8"]


@dataclass(eq=False)
class Prepared:
    """The plan attached for a variant. ``measured``: densities in steps after thresholds were set."""

    plan: Plan | None = None
    measured: Measurement | None = None


@contextmanager
def on_model(variant: Variant, model: PreTrainedModel, layout: Layout, *, seed: int) -> Iterator[Prepared]:
    """Inside, the model is the variant; on exit it is restored (except int8) and compiled code is discarded.

    Raises:
        ImportError: int8 without torchao.
    """
    prepared = Prepared()
    if variant.kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    elif variant.saved is not None:
        attach(model, load_plan(variant.saved))
        found = attached(model)
        assert found is not None
        prepared.plan = live_plan(found.plan, found.factors)
    elif variant.budget is not None:
        prepared.plan = attach_unchecked(model, random_plan(model, layout, variant.budget, config=variant.config, seed=seed))
    try:
        yield prepared
    finally:
        detach(model)
        torch.compiler.reset()


def reference(
    variant: Variant, prepared: Prepared, decoder: Decoder, *, watched: Sequence[int] = (CHECK_CONTEXT,), seed: int = 0
) -> tuple[Script, Expected]:
    """Tokens, and the reference logits that the variant must reproduce. Sets thresholds of random plans at the first call.

    Args:
        watched: context lengths to set thresholds after. With random weights attention averages over the context, so inputs of
            the output projection are smaller after a longer context.
    """
    model, plan = decoder.model, prepared.plan
    script = decoder.script(CHECK_CONTEXT, _CHECK_STEPS)
    if plan is None:
        return script, record_expected(lambda: decoder.logits(model.forward, script), model, None, dtype=model.dtype)
    with implementation("reference"), evaluating(model), observing(model):
        meter = RecordingMeter(model, plan)
        if prepared.measured is None:
            width = model.config.get_text_config().hidden_size
            steps = max(2, min(64, _RECORDED_VALUES // width // decoder.batch) // len(watched))
            setting, measuring = ([decoder.script(length, steps) for length in watched] for _ in range(2))
            if variant.saved is None:
                set_thresholds(meter, plan, lambda: [decoder.logits(meter, script) for script in setting])
            for other in measuring:
                decoder.logits(meter, other)
            prepared.measured = meter.result()
        # compiled code leaves adapters out for batches above their token limit
        checked = meter if variant.prefill in ("masked", "factors") else RecordingMeter(model, plan, prefill=variant.prefill)
        return script, record_expected(lambda: decoder.logits(checked, script), model, plan, dtype=model.dtype, seed=seed)
