"""The measurements of ``bench.decode`` for one model: every variant at every batch size is verified and timed.

In: a model, its layout, variants and a ``Protocol``. Out: rows (ms per token, tokens/s, GB/s, GB), each appended to a file at
once. For each variant and batch size: logits of the reference, compilation, comparison of logits, timed sequences, a prefill,
kernel times. A failure gives a row with its reason. Variants of llama.cpp are timed alike, by the calls of its own decoder.
"""

from __future__ import annotations

import functools
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.common.models import layers_of
from bench.common.record import append
from bench.speed.decoding import Decoder, Forward, peak_bytes, percentiles, reset_peak
from bench.speed.gguf_source import read_bytes
from bench.speed.kernel_times import kernel_times, show_kernels
from bench.speed.llama_variant import FAMILY, EngineDecoder, Files, opened
from bench.speed.losses import DENSE, WINDOW, Text
from bench.speed.rivals import RIVALS
from bench.speed.variants import ATTENTION, CHECK_CONTEXT, Prepared, Variant, on_model, reference
from bench.speed.verify import bound, check_logits
from rana_fx.calibration.layout import Layout
from rana_fx.plan import Plan
from rana_fx.step_time import step_time

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_CALLS = 3  # compile and warm up, capture, replay
_PROFILED_STEPS = 8
_PREFILLS = 3


@dataclass(frozen=True)
class Protocol:
    """What is decoded. ``lengths``: of contexts. ``seconds``: time limit of the run, None: no limit."""

    lengths: list[int]
    new_tokens: int
    prefill: int
    batches: list[int]
    seed: int
    seconds: float | None
    profile: bool

    def watched(self) -> list[int]:
        """Four context lengths (quantiles), half of the new tokens included: thresholds are set after these."""
        ordered = sorted(self.lengths)
        return [ordered[(2 * i + 1) * len(ordered) // 8] + self.new_tokens // 2 for i in range(4)]


@dataclass(eq=False)
class Run:
    """State of one run. ``bandwidth``: of a copy, bytes per second. ``rows`` are also written to ``out`` at once.

    ``files``: for variants of llama.cpp. ``text``: what the loss of each variant is measured on.
    """

    model: PreTrainedModel
    layout: Layout
    protocol: Protocol
    common: dict[str, Any]
    out: Path
    bandwidth: float
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    decoders: dict[int, Decoder] = field(default_factory=dict)
    files: Files | None = None
    text: Text | None = None

    def add(self, kind: str, **facts: Any) -> dict[str, Any]:
        """Write a row and return it."""
        row = {"kind": kind, **facts}
        append(self.out, self.common | row | {"elapsed_seconds": time.perf_counter() - self.began})
        self.rows.append(row)
        return row

    def seconds_left(self) -> float:
        """Seconds left of the run."""
        return float("inf") if self.protocol.seconds is None else self.protocol.seconds - (time.perf_counter() - self.began)

    def decoder(self, batch: int) -> Decoder:
        """The decoder of that batch size; only the last one is kept."""
        if batch not in self.decoders:
            self.decoders.clear()  # one cache at a time
            # thresholds are set over up to 64 steps from the middle of a decoding
            room = max(*self.protocol.lengths, self.protocol.prefill, 16) + max(self.protocol.new_tokens, 128)
            self.decoders[batch] = Decoder(self.model, batch=batch, room=-(-room // 64) * 64, seed=self.protocol.seed)
        return self.decoders[batch]

    def weight_bytes(self, variant: Variant, prepared: Prepared) -> float:
        """Weight bytes of linears that a step of one sequence reads, from the measured densities."""
        sites = self.layout.sites.values()
        dense = sum(site.flops * site.weight.element_size() for site in sites)
        if variant.kind in RIVALS:
            small = sum(site.flops * site.weight.element_size() for site in sites if id(site.weight) in prepared.quantised)
            fewer = sum(site.flops for site in sites if id(site.weight) in prepared.quantised)
            return dense - small + fewer * RIVALS[variant.kind].bytes_per_weight
        if prepared.plan is None or prepared.measured is None:
            return dense
        return dense - prepared.plan.dense_cost.bytes * (1 - prepared.measured.budget_bytes)


def compare(run: Run, chosen: list[Variant]) -> None:
    """Measure every variant at every batch size. A failure gives a row with its reason, and the next variant follows."""
    batches = len(run.protocol.batches)
    for done, variant in enumerate(chosen):
        facts = {"variant": variant.label, "variant_kind": variant.kind, "mode": variant.mode, "budget": variant.budget}
        # several plans may have one budget
        facts |= {} if variant.saved is None else {"plan": variant.saved.name}
        try:
            _all_batches(run, variant, facts, jobs=(len(chosen) - done) * batches)
        except Exception as error:  # compilers raise many kinds of errors, and the other variants should still run
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            run.add("skipped", **facts, reason=reason)
            print(f"{variant.label}: {reason}", flush=True)
        _clean()


def _all_batches(run: Run, variant: Variant, facts: dict[str, Any], *, jobs: int) -> None:
    """Measure a variant at every batch size. Nothing of it is referenced afterwards: a rival's copy of the model is freed.

    Args:
        jobs: measurements left in the run, which share the time left.
    """
    with on_model(variant, run.model, run.layout, seed=run.protocol.seed) as prepared:
        for done, batch in enumerate(run.protocol.batches):
            share = run.seconds_left() / (jobs - done)
            if share <= 0:
                run.add("skipped", **facts, batch=batch, reason="no time left")
            else:
                measure = _one_by_engine if variant.kind == FAMILY else _one
                measure(run, variant, prepared, batch, time.perf_counter() + share, facts)
            torch.compiler.reset()


def _one(run: Run, variant: Variant, prepared: Prepared, batch: int, deadline: float, facts: dict[str, Any]) -> None:
    """Measure one variant at one batch size, until about ``deadline``: verify, warm up, decode, prefill, profile."""
    decoder, seed = run.decoder(batch), run.protocol.seed
    reset_peak(decoder.device)
    began = time.perf_counter()
    script, expected = reference(variant, prepared, decoder, watched=run.protocol.watched(), seed=seed)
    seconds = {"prepare_seconds": time.perf_counter() - began}
    # before compiled code frees weights; thresholds of random plans are set by now
    facts = facts | _loss(run, variant, prepared)
    forward = variant.compiled(prepared.model)
    began = time.perf_counter()
    decoder.decode(forward, CHECK_CONTEXT, _WARM_CALLS)
    seconds["compile_seconds"] = time.perf_counter() - began
    # an error on recompilation: the verified code is the timed code, and no compilation is timed
    with torch._dynamo.config.patch(error_on_recompile=True):
        limit = bound(run.model.dtype, layers_of(run.model), max(site.in_features for site in run.layout.sites.values()))
        check = check_logits(lambda: decoder.logits(forward, script), prepared.plan, expected, limit=limit, seed=seed)
        facts = facts | {"batch": batch, "gate": check.facts()}
        if not check.passed:
            run.add(
                "skipped", **facts, reason="wrong result: its logits differ from those of its reference by more than the bound"
            )
            return
        # a batch reads the union of the rows that its masks keep, which is not measured
        read = run.weight_bytes(variant, prepared) if batch == 1 or prepared.plan is None else None
        facts |= {"predicted_ms": _predicted_ms(run, variant, prepared) if batch == 1 else None}
        p50 = _decode(run, facts | _plan_facts(prepared) | seconds, decoder, forward, deadline, read)
    if run.protocol.profile:
        token = decoder.read(decoder.tokens(CHECK_CONTEXT))
        decode = functools.partial(decoder.steps, forward, token, CHECK_CONTEXT, _PROFILED_STEPS)
        kernels = kernel_times(decode, steps=_PROFILED_STEPS, device=decoder.device)
        run.add("kernels", variant=variant.label, batch=batch, step_ms=p50, kernels=kernels)
        show_kernels(f"{variant.label}, batch {batch}", kernels, p50)
    # another shape needs another compilation
    _prefill(run, facts, decoder, forward, late=time.perf_counter() + seconds["compile_seconds"] > deadline)


def _one_by_engine(run: Run, variant: Variant, prepared: Prepared, batch: int, deadline: float, facts: dict[str, Any]) -> None:
    """The same for a variant of llama.cpp: its file is made, read and decoded; it decodes one sequence, on a CPU."""
    facts = facts | {"batch": batch}
    if batch != 1 or run.model.device.type != "cpu" or run.files is None:
        run.add("skipped", **facts, reason="llama.cpp is measured on a CPU, one sequence at a time")
        return
    began = time.perf_counter()
    path = run.files.make(variant.name.removeprefix(f"{FAMILY}:"), run.decoder(1))
    made = time.perf_counter()
    room = max(run.decoder(1).room, WINDOW if run.text else 0)
    with opened(path, run.decoder(1), room=room) as decoder:
        decoder.decode(None, CHECK_CONTEXT, _WARM_CALLS)
        facts |= {
            "gate": None,
            "predicted_ms": None,
            "conversion": run.files.conversion,
            "llama_cpp_python": decoder.engine.version,
            "prepare_seconds": made - began,
            "compile_seconds": time.perf_counter() - made,
            "loss": None if run.text is None else run.text.loss(variant.label, decoder.all_logits),
        }
        _decode(run, facts, decoder, None, deadline, read_bytes(path))
        _prefill(run, facts, decoder, None, late=time.perf_counter() > deadline)


def _loss(run: Run, variant: Variant, prepared: Prepared) -> dict[str, Any]:
    """The loss of a variant on the run's text; dense variants are one model."""
    if run.text is None:
        return {}
    name = variant.label if variant.saved is None else f"{variant.label} {variant.saved}"
    name = DENSE if variant.kind == "dense" else name
    return {"loss": run.text.loss(name, prepared.model, adapted=prepared.plan is not None)}


def _decode(
    run: Run,
    facts: dict[str, Any],
    decoder: Decoder | EngineDecoder,
    forward: Forward | None,
    deadline: float,
    read: float | None,
) -> float:
    """Decode and write the row. Returns ms a step, p50. ``read``: bytes of weights that a step reads."""
    timed = _timed(run.protocol, decoder, forward, deadline)
    p50, batch = timed["ms_per_token"]["p50"], decoder.batch
    timed |= {
        "weight_gb_per_s": None if read is None else read / p50 / 1e6,
        "dense_ratio": dense_ratio(run.rows, batch, p50),
        "peak_gb": peak_bytes(decoder.device) / 1e9,
    }
    run.add("decode", **facts, **timed)
    print(f"{facts['variant']}, batch {batch}: {timed['tokens_per_s']:.1f} tokens/s, {p50:.3f} ms a step", flush=True)
    return float(p50)


def _timed(protocol: Protocol, decoder: Decoder | EngineDecoder, forward: Forward | None, deadline: float) -> dict[str, Any]:
    """Decode after each context until ``deadline``, at least after one."""
    steps: list[float] = []
    used: list[int] = []
    spent = 0.0
    for context in protocol.lengths:
        if used and time.perf_counter() + spent / len(used) > deadline:
            break
        times, seconds = decoder.decode(forward, context, protocol.new_tokens)
        steps += times
        spent += seconds
        used.append(context)
    return {
        "sequences": len(used),
        "contexts": used,
        "cache": decoder.room,
        "tokens_per_s": decoder.batch * len(steps) / spent,
        "ms_per_token": percentiles(steps),
    }


def _predicted_ms(run: Run, variant: Variant, prepared: Prepared) -> float | None:
    """What the kernels' cost model expects of a step; it knows plans, and dense linears beside the attention of plans."""
    if variant.kind != "rana" and variant.name != ATTENTION:
        return None
    step = step_time(run.layout, prepared.plan, run.model.device)
    return None if step is None else step.ms


def _plan_facts(prepared: Prepared) -> dict[str, Any]:
    if prepared.plan is None or prepared.measured is None:
        return {}
    plan, measured = prepared.plan, prepared.measured
    roles = {record.name: record.role for record in plan.sites}
    kinds: dict[str, list[tuple[float, float, int]]] = {}
    for adapter in plan.adapters:
        entry = (measured.density[adapter.name], adapter.density, adapter.ranks)
        kinds.setdefault(f"{adapter.kind} of {roles[adapter.sites[0]]}", []).append(entry)
    adapters = {
        name: {"density": _mean(0, found), "expected": _mean(1, found), "ranks": _mean(2, found), "count": len(found)}
        for name, found in kinds.items()
    }
    return {
        "expected_budget": {unit: plan.expected_budget(unit) for unit in ("flops", "bytes")},
        "measured_budget": {"flops": measured.budget_flops, "bytes": measured.budget_bytes},
        "measured_tokens": measured.tokens,
        "scope": plan.scope,
        "adapters": adapters,
        "router_bits": _bits(plan, "router"),
        "factor_bits": _bits(plan, "weight"),
    }


def _mean(index: int, found: list[tuple[float, float, int]]) -> float:
    return sum(entry[index] for entry in found) / len(found)


def _bits(plan: Plan, key: str) -> list[int]:
    """Bits of all matrices of that name that the plan stores."""
    return sorted({adapter.bits()[key] for adapter in plan.adapters if key in adapter.bits()})


def dense_ratio(rows: list[dict[str, Any]], batch: int, ms: float) -> float | None:
    """Time of the fastest dense variant among the rows over ``ms``; None if there is no dense row."""
    dense = [
        row["ms_per_token"]["p50"]
        for row in rows
        if row["kind"] == "decode" and row["variant_kind"] == "dense" and row["batch"] == batch
    ]
    return min(dense) / ms if dense else None


def _prefill(run: Run, facts: dict[str, Any], decoder: Decoder | EngineDecoder, forward: Forward | None, *, late: bool) -> None:
    """A row with the median time of a compiled prefill, ms, and the seconds of its first calls, if the protocol has one."""
    length, named = run.protocol.prefill, {"variant": facts["variant"], "batch": decoder.batch}
    if not length:
        return
    if late:
        run.add("skipped", **named, reason="no time left for a prefill")
        return
    tokens, times = decoder.tokens(length), []
    for _ in range(_WARM_CALLS + _PREFILLS):
        decoder.synchronize()
        began = time.perf_counter()
        decoder.read(tokens, forward)
        decoder.synchronize()
        times.append(time.perf_counter() - began)
    ms = 1000 * percentiles(times[_WARM_CALLS:])["p50"]
    run.add("prefill", **named, prefill_tokens=length, prefill_ms=ms, prefill_compile_seconds=sum(times[:_WARM_CALLS]))


def _clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
