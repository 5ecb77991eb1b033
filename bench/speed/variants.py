"""The variants that ``bench.decode`` compares: the dense model (eager and compiled), plans, and rivals with quantised weights.

In: names from the command line. Out: ``Variant`` objects, and for each a context with the model that is that variant: with a plan
attached and its thresholds set, or a quantised copy. Rivals are the last variants, in the order given.

    eager                       the model's own forward
    reduce-overhead             torch.compile with that mode: Inductor and CUDA graphs
    max-autotune                torch.compile with that mode, which also measures kernel configs
    dense+attention             reduce-overhead, with the attention of decoded tokens that rana uses (``bench.speed.dense``)
    rana                        rana_fx.backend with --mode; one variant per saved plan, or per random plan (config and budget)
    int8, fp8, int4, gemlite    the rivals of ``bench.speed.rivals``: quantised linears, then reduce-overhead
    llama.cpp:TYPE              the model in a GGUF file of that type, decoded by llama.cpp (``bench.speed.llama_variant``)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rana_fx
from bench.speed.dense import attention_alone
from bench.speed.llama_engine import TYPES
from bench.speed.llama_variant import FAMILY
from bench.speed.random_plan import PlanConfig, RecordingMeter, attach_unchecked, live_plan, random_plan, set_thresholds
from bench.speed.rivals import RIVALS, quantised
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

ATTENTION = "dense+attention"
DENSE = {"eager": None, "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune", ATTENTION: "reduce-overhead"}
NAMES = (*DENSE, "rana")
_OF_LLAMA_CPP = {f"{FAMILY}:{name}" for name in TYPES}
_CHECK_STEPS = 4
CHECK_CONTEXT = 16
_RECORDED_VALUES = 2**16  # values of the residual stream over all recorded steps, at most


@dataclass(frozen=True)
class Variant:
    """``kind``: dense, rana, llama.cpp or the name of a rival. ``mode``: of torch.compile, None for eager and for llama.cpp."""

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
        """The function that is timed; each shape is compiled separately. No module changes meanwhile: guards on modules are
        left out of all variants.
        """
        forward: Callable[..., Any] = model.forward
        if self.mode is None:
            return forward
        backends: dict[str, Any] = {"rana": rana_fx.backend, ATTENTION: attention_alone}
        backend = backends.get("rana" if self.kind == "rana" else self.name, "inductor")
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        if backend == "inductor":
            options |= torch._inductor.list_mode_options(self.mode)
        else:
            options |= {"mode": self.mode} | ({"prefill": self.prefill} if self.kind == "rana" else {})
        return torch.compile(forward, backend=backend, options=options, dynamic=False, fullgraph=True)


def variants(
    names: str, budgets: list[float], plans: list[Path], *, mode: str, configs: Sequence[PlanConfig], prefill: str
) -> list[Variant]:
    """Variants by name: dense ones first, since ratios need their times; rivals last. Raises InvalidOption."""
    given = _names(names)
    for name in given:
        if name not in NAMES and name not in RIVALS and name not in _OF_LLAMA_CPP:
            known = ", ".join([*NAMES, *RIVALS, f"{FAMILY}:TYPE"])
            raise InvalidOption(name="--variants", got=name, expected=f"some of {known}; types are {', '.join(TYPES)}")
    found = [Variant(name, "dense", mode_of_it) for name, mode_of_it in DENSE.items() if name in given]
    if "rana" in given:
        found += [Variant("rana", "rana", mode, load_plan(path).budget, saved=path, prefill=prefill) for path in plans]
        for config in configs:
            name = "rana" if config.label == "rank" else f"rana {config.label}"
            found += [Variant(name, "rana", mode, budget, config=config, prefill=prefill) for budget in budgets]
    found += [Variant(name, name, "reduce-overhead") for name in given if name in RIVALS]
    return found + [Variant(name, FAMILY, None) for name in given if name in _OF_LLAMA_CPP]


def _names(names: str) -> list[str]:
    """The names between commas. After ``llama.cpp:TYPE`` further types are given by their own name."""
    found: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        continues = name in TYPES and found and found[-1] in _OF_LLAMA_CPP
        found.append(f"{FAMILY}:{name}" if continues else name)
    return found


@dataclass(eq=False)
class Prepared:
    """The model that is a variant, and its plan. ``measured``: densities in steps after thresholds were set.

    ``quantised``: ids of the weights of the dense model that are quantised in this one.
    """

    model: PreTrainedModel
    quantised: frozenset[int] = frozenset()
    plan: Plan | None = None
    measured: Measurement | None = None


@contextmanager
def on_model(variant: Variant, model: PreTrainedModel, layout: Layout, *, seed: int) -> Iterator[Prepared]:
    """Inside, ``Prepared.model`` is the variant: the model itself, or a quantised copy. On exit the model is restored, the copy
    is freed and compiled code is discarded.

    Raises:
        ImportError: a rival without its package.
    """
    with ExitStack() as restored:
        restored.callback(torch.compiler.reset)
        if variant.kind in RIVALS:
            changed, weights = restored.enter_context(quantised(model, RIVALS[variant.kind]))
            yield Prepared(changed, weights)
            return
        restored.callback(detach, model)
        yield Prepared(model, plan=_attached_plan(variant, model, layout, seed=seed))


def _attached_plan(variant: Variant, model: PreTrainedModel, layout: Layout, *, seed: int) -> Plan | None:
    """The plan of the variant, attached to the model."""
    if variant.saved is not None:
        attach(model, load_plan(variant.saved))
        found = attached(model)
        assert found is not None
        return live_plan(found.plan, found.factors)
    if variant.budget is not None:
        return attach_unchecked(model, random_plan(model, layout, variant.budget, config=variant.config, seed=seed))
    return None


def reference(
    variant: Variant, prepared: Prepared, decoder: Decoder, *, watched: Sequence[int] = (CHECK_CONTEXT,), seed: int = 0
) -> tuple[Script, Expected]:
    """Tokens, and the reference logits that the variant must reproduce. Sets thresholds of random plans at the first call.

    Args:
        watched: context lengths to set thresholds after. With random weights attention averages over the context, so inputs of
            the output projection are smaller after a longer context.
    """
    model, plan = prepared.model, prepared.plan
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
