"""Make golden files: files and results of one version, which every later version must read and reproduce.

    python -m tests.golden.make

It only adds missing files. Existing files are never made again: they are results of the version that ``expected.json`` names, and
a file made by the current version would only be compared with the current version.

weights.safetensors   the model's weights (tests/golden/model.py), in fp16, which fp32 holds exactly
plans/NAME/           plans as ``Plan.save`` writes them: every kind of adapter and storage (``PLANS``), and two made by recipes
outputs.safetensors   logits on fixed tokens: of the dense model in each dtype, of each plan, of LoRA and of merged LoRA
expected.json         digests of plans and weights, formats, expected costs, merged digests, names of Parameters
lora/                 LoRA on the plan "rank", as ``save_lora`` writes it
checkpoint/           a training of that LoRA interrupted after 2 of 4 steps, and the losses of all steps
explain.json          rows and totals of ``rana_fx.explain``, without prose
interface.json        public names and their arguments, options of the command line, and the keys and types of each JSON file that
                      the command line writes (tests/golden/interface.py)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import rana_fx
from rana_fx.adapter import Adapter
from rana_fx.formats import pack
from rana_fx.plan import weight_digest
from tests.golden import check, interface
from tests.golden.by_hand import Hand, bias_of, matrix_of
from tests.golden.model import FOLDER, drawn, ids, load

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
RANKS = 4


@dataclass(frozen=True)
class Spec:
    """One adapter. ``bits``: of router and weight, 32: floating, in the model's dtype. ``own``: False for the model's weight."""

    sites: str
    kind: str = "rank"
    bits: tuple[int, int] = (32, 32)
    group: int = 64
    scale: torch.dtype = FP32
    hybrid: bool = False
    shift: bool = False
    exact: bool = False
    bias: bool = False  # a bias of its own, also where the linears have none
    own: bool = True
    each: bool = True  # gated: a threshold per neuron
    error: float | None = None


INT8, INT4 = (8, 8), (4, 4)
MIXED = (
    Spec("0.q 0.k 0.v"), Spec("0.gate_up", "static"), Spec("0.down", "neuron", own=False), Spec("1.q 1.k 1.v", hybrid=True),
    Spec("1.o", "neuron", shift=True), Spec("1.down", "gated", own=False, bias=True), Spec("2.down", "stored", INT4, 128),
)  # fmt: skip
EXACT = (
    Spec("2.up", exact=True),
    Spec("0.q 0.k 0.v"),
    Spec("1.q 1.k 1.v"),
    Spec("1.gate", hybrid=True, exact=True, bias=True),
    Spec("0.down", "neuron", own=False),
)
NEURONS = ("0.q", "0.k", "0.v", "0.o", "0.gate_up", "1.up", "1.down", "2.up")
PLANS: dict[str, tuple[torch.dtype, tuple[Spec, ...]]] = {
    "rank": (FP32, (Spec("0.q 0.k 0.v", error=0.125), Spec("0.gate_up"), Spec("0.down"), Spec("1.q 1.k 1.v"),
                    Spec("1.gate 1.up", bias=True), Spec("1.down"), Spec("2.up"), Spec("2.down", bias=True))),
    "rank-stored": (FP32, (Spec("0.q 0.k 0.v", bits=(8, 32)), Spec("0.gate_up", bits=INT8), Spec("0.down", bits=(4, 32)),
                           Spec("1.gate 1.up", bits=INT4), Spec("1.down", bits=(4, 8), group=128),
                           Spec("2.up", bits=INT4, group=128, scale=BF16), Spec("1.o", bits=INT8, scale=BF16))),
    "static": (FP32, (Spec("0.q 0.k 0.v", "static"), Spec("0.down", "static", INT8), Spec("1.gate 1.up", "static", INT4),
                      Spec("2.up", "static"))),
    "shift": (FP32, (Spec("0.q 0.k 0.v", shift=True), Spec("0.down", "neuron", own=False, shift=True),
                     Spec("1.q 1.k 1.v", "neuron", shift=True), Spec("1.gate 1.up", hybrid=True, shift=True),
                     Spec("2.down", "neuron", INT8, shift=True))),
    "neuron": (FP32, (*(Spec(site, "neuron", own=False) for site in NEURONS), Spec("2.down", "neuron", own=False, bias=True))),
    "neuron-stored": (FP32, (Spec("0.q 0.k 0.v", "neuron"), Spec("0.gate_up", "neuron", INT8), Spec("0.down", "neuron", INT4),
                             Spec("1.gate 1.up", "neuron", INT4), Spec("2.up", "neuron", INT4, 128, BF16))),
    "gated": (FP32, (Spec("1.down", "gated", own=False, each=False),)),
    "gated-each": (FP32, (Spec("1.gate"), Spec("1.down", "gated", own=False, bias=True))),
    "stored": (FP32, (Spec("0.q 0.k 0.v", "stored", INT8), Spec("0.gate_up", "stored", INT4),
                      Spec("1.gate 1.up", "stored", INT4, 128), Spec("1.down", "stored", INT8, scale=BF16),
                      Spec("2.up", "stored", INT4, 128, BF16))),
    "hybrid": (FP32, (Spec("0.q 0.k 0.v", hybrid=True), Spec("0.gate_up", hybrid=True), Spec("0.down", hybrid=True),
                      Spec("2.up", "static", hybrid=True))),
    "hybrid-stored": (FP32, (Spec("0.q 0.k 0.v", bits=(8, 32), hybrid=True), Spec("0.gate_up", bits=INT8, hybrid=True),
                             Spec("0.down", bits=INT4, hybrid=True), Spec("1.gate 1.up", bits=INT4, group=128, hybrid=True))),
    "bf16": (BF16, MIXED),
    "fp16": (FP16, MIXED),
    "exact": (FP32, EXACT),
    "exact-stored": (FP32, (Spec("2.up", bits=INT8, exact=True), Spec("1.gate", "static", exact=True, bias=True),
                            Spec("1.up", bits=INT4, hybrid=True, exact=True, bias=True),
                            Spec("0.gate_up", bits=INT4, group=128))),
    "exact-bf16": (BF16, EXACT),
    "exact-fp16": (FP16, EXACT),
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "recipe-rana": {"recipe": "rana", "budget": 0.4, "metric": "bytes"},
    "recipe-cats": {"recipe": "cats", "budget": 0.6},
}


def stored(matrix: torch.Tensor, bits: int, spec: Spec, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    matrix = matrix.contiguous()
    return (matrix.to(dtype), None) if bits == 32 else pack(matrix.float(), bits, spec.group, spec.scale)


def adapter_of(spec: Spec, plan: rana_fx.Plan, dtype: torch.dtype) -> Adapter:
    """An adapter with preliminary thresholds."""
    model = load(dtype).double()
    sites = tuple(f"blocks.{site}" for site in spec.sites.split())
    records = [record for record in plan.sites if record.name in sites]
    matrix = torch.cat([matrix_of(model, site) for site in sites])
    fields: dict[str, Any] = {}
    ranks, weight, noise = matrix.shape[1], matrix.t(), np.random.Generator(np.random.PCG64(len(spec.sites)))
    if spec.kind in ("rank", "static"):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        ranks, weight, router = RANKS, u[:, :RANKS].t(), s[:RANKS, None] * vh[:RANKS]
        fields["router"], fields["router_scale"] = stored(router.t() if spec.hybrid else router, spec.bits[0], spec, dtype)
    if spec.hybrid:
        fields |= {"router_tau": torch.zeros(matrix.shape[1]), "router_kept": float(matrix.shape[1])}
    if spec.own:
        fields["weight"], fields["weight_scale"] = stored(weight, spec.bits[1], spec, dtype)
    given = [bias_of(model, site) for site in sites]
    if spec.bias or spec.shift or (spec.own and any(bias is not None for bias in given)):
        zeros = [torch.zeros(len(matrix_of(model, site)), dtype=torch.float64) for site in sites]
        bias = torch.cat([zero if bias is None else bias for zero, bias in zip(zeros, given, strict=True)])
        if spec.bias:
            bias = bias + 0.1 * torch.from_numpy(noise.standard_normal(len(bias)))
        if spec.shift:
            fields["shift"] = torch.from_numpy(0.3 * noise.standard_normal(ranks)).to(dtype)
            bias = bias + fields["shift"].double() @ weight
        fields["bias"] = bias.to(dtype)
    if spec.exact:
        fields |= {"exact_tau": torch.zeros(len(matrix)), "exact_kept": 0.0}
    if spec.kind == "gated":
        fields |= {"gate": "blocks.1.gate", "also": ("blocks.1.up",)}
        records += [record for record in plan.sites if record.name == "blocks.1.up"]
    dense = {f"dense_{metric}": sum(record.cost(metric) for record in records) for metric in ("flops", "bytes")}
    half = {} if spec.own else {"flops": dense["dense_flops"] / 2, "bytes": dense["dense_bytes"] / 2}
    tau = torch.zeros(ranks if spec.kind != "gated" or spec.each else 1)
    name = "+".join(sites)
    made = Adapter(name, spec.kind, sites, ranks, float(ranks), tau, error=spec.error, **fields, **dense, **half)  # type: ignore[arg-type]
    return made.costed() if spec.own else made


def plan_of(name: str) -> rana_fx.Plan:
    """One of ``PLANS`` or ``RECIPES``."""
    dtype, specs = PLANS.get(name, (FP32, ()))
    model = load(dtype)
    if name in RECIPES:
        batches = [ids(rows=4, step=step) for step in (1, 5, 7, 11, 13, 17, 19, 23)]
        return rana_fx.adapt(model, batches, progress=False, **RECIPES[name])
    plan = rana_fx.adapt(model, [ids()], budget=0.75, recipe="dense", progress=False)
    hand = Hand({(made := adapter_of(spec, plan, dtype)).sites[0]: made for spec in specs}, dtype, settle=True)
    hand.run()
    skips = tuple(skip for skip in plan.skips if skip.site == "head")
    return replace(plan, recipe="rana", adapters=tuple(hand.adapters.values()), skips=skips)


def make_plans(expected: dict[str, Any], outputs: dict[str, torch.Tensor]) -> None:
    for name in (*PLANS, *RECIPES):
        folder = FOLDER / "plans" / name
        if folder.exists():
            continue
        plan = plan_of(name)
        dtype = getattr(torch, plan.sites[0].dtype)
        hand = Hand({adapter.sites[0]: adapter for adapter in plan.adapters}, dtype)
        right = hand.run()
        model = load(dtype)
        rana_fx.attach(model, plan)
        got = check.logits(model)
        dense = check.logits(load(dtype))
        limit = check.tolerance(dtype)
        error, change = check.distance(got, right), check.distance(got, dense)
        # masks do not depend on rounding, outputs equal the fp64 reference, and the plan changes the model
        print(f"{name:15} margin {hand.margin:.1e} of {hand.near:.1e}, error {error:.1e} of {limit:.1e}, change {change:.1e}")
        assert hand.margin > hand.near and error < limit < change / 4, name
        plan.save(folder)
        outputs[f"plan {name}"] = got
        header = json.loads((folder / "plan.json").read_text())
        costs = {metric: plan.expected_budget(metric) for metric in ("flops", "bytes")}
        expected["plans"][name] = {"digest": plan.digest(), "format": header["format"], "expected": costs}


def make_lora(expected: dict[str, Any], outputs: dict[str, torch.Tensor]) -> None:
    from rana_fx.training import add_lora, save_lora, trained_plan

    if (FOLDER / "lora").exists():
        return
    model = check.adapted("rank")
    added = add_lora(model, check.lora_config())
    generator = np.random.Generator(np.random.PCG64(1))
    with torch.no_grad():
        for parameter in added.values():
            parameter.copy_(torch.from_numpy(generator.integers(-4, 5, tuple(parameter.shape)) / 32))
    save_lora(model, FOLDER / "lora")
    outputs["lora"] = check.logits(model)
    assert check.distance(outputs["lora"], outputs["plan rank"]) > 100 * check.tolerance(FP32)
    plan = trained_plan(model)
    outputs["lora merged"] = check.logits(model)
    weights = {name: weight_digest(parameter) for name, parameter in sorted(model.named_parameters()) if "rana_fx" not in name}
    expected["lora"] = {"parameters": sorted(added), "merged": plan.digest(), "weights": weights}


def make_checkpoint(expected: dict[str, Any]) -> None:
    folder = FOLDER / "checkpoint"
    if folder.exists():
        return
    whole = check.trained(None)
    check.trained(folder, stop=2)
    with tempfile.TemporaryDirectory() as other:
        shutil.copytree(folder, other, dirs_exist_ok=True)  # resuming writes there
        assert check.trained(Path(other), resume=True) == whole
    expected["training"] = {"losses": whole}


def make_explain(target: Path) -> None:
    found = {"dense": check.explained(load())} | {name: check.explained(check.adapted(name)) for name in check.EXPLAINED}
    target.write_text(json.dumps(found) + "\n")


def once(path: Path, make: Callable[[Path], object]) -> None:
    if not path.exists():
        make(path)


def half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half() for name, value in weights.items()}


def main() -> None:
    torch.set_num_threads(1)
    once(FOLDER / "weights.safetensors", lambda path: safetensors.torch.save_file(half(drawn()), path))
    path = FOLDER / "expected.json"
    expected = json.loads(path.read_text()) if path.exists() else {"version": rana_fx.__version__, "plans": {}}
    outputs = safetensors.torch.load_file(FOLDER / "outputs.safetensors") if path.exists() else {}
    for dtype in (FP32, FP16, BF16):
        outputs.setdefault(f"dense {dtype}", check.logits(load(dtype)))
    expected.setdefault("weights", {name: weight_digest(value) for name, value in check.weights_to_digest().items()})
    make_plans(expected, outputs)
    make_lora(expected, outputs)
    make_checkpoint(expected)
    safetensors.torch.save_file(
        {name: value.float().contiguous() for name, value in outputs.items()}, FOLDER / "outputs.safetensors"
    )
    path.write_text(json.dumps(expected, indent=1) + "\n")
    once(FOLDER / "explain.json", make_explain)
    once(FOLDER / "interface.json", interface.write)


if __name__ == "__main__":
    main()
