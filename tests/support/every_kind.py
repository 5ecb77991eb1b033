"""Every kind of adapter in one model, compiled in a mode and called with several numbers of tokens. A program for a process of
its own, so that its first call is the first call of the process; it prints a line of JSON.

    python -m tests.support.every_kind DEVICE MODE BITS WAY

BITS: of the matrices that plans store, 16 for the model's dtype. WAY: "chosen", by the cost model, or "kernels", as if a kernel
were always faster. Masks are fixed (thresholds zero or infinite): none depends on rounding, and results differ by rounding alone.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.adapter import Adapter
from rana_fx.kernels import autotune, cost
from rana_fx.kernels.ops import implementation
from tests.support.storages import sites_of, stored

WIDTH, FFN = 256, 512
TOKENS = (1, 2, 4, 16)
KINDS = ("rank", "static", "hybrid", "neuron", "apart", "stored", "gated", "exact")
WITHOUT_MATRICES = ("gated", "exact", "apart")  # of the model's own weights, or for floating factors
SHARE = 4  # one of so many is kept


class Block(nn.Module):
    """What passes fuse: a norm in front of routers, three linears of one input, residuals, a gate."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x):
        y = self.first(x)
        x = x + self.o(torch.tanh(self.q(y)) * torch.sigmoid(self.k(y)) + self.v(y))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        self.blocks = nn.ModuleDict({kind: Block() for kind in kinds})

    def forward(self, x):
        for block in self.blocks.values():
            x = block(x)
        return x


def kinds_of(bits):
    return [kind for kind in KINDS if bits == 16 or kind not in WITHOUT_MATRICES]


def mask(count):
    """Every SHARE-th is always kept, the others never."""
    return torch.where(torch.arange(count) % SHARE == 0, 0.0, torch.inf)


def adapters_of(kind, block, records, sites, bits):
    """The adapters of a block."""

    def named(*names):
        return tuple(f"{block}.{name}" for name in names)

    def common(names, also=()):
        dense = {f"dense_{metric}": sum(records[name].cost(metric) for name in (*names, *also)) for metric in ("flops", "bytes")}
        return {"name": "+".join(names), "sites": names, "also": also} | dense

    def matrix(names):
        return torch.cat([sites[name].matrix() for name in names]).double()

    def bias(names):
        return torch.cat([sites[name].bias.detach() for name in names])

    def factors(names, **more):
        u, s, vh = torch.linalg.svd(matrix(names), full_matrices=False)
        ranks = len(s) // 2
        router = (s[:ranks, None] * vh[:ranks]).float()
        fields = {"tau": torch.zeros(ranks) if kind == "static" else mask(ranks)}
        if kind == "hybrid":
            router = router.t()
            fields |= {"router_tau": mask(len(router)), "router_kept": len(router) / SHARE}
        fields["router"], fields["router_scale"] = stored(router, bits)
        fields["weight"], fields["weight_scale"] = stored(u[:, :ranks].t().float(), bits)
        kept = ranks if kind == "static" else ranks / SHARE
        made = "static" if kind == "static" else "rank"
        return Adapter(kind=made, ranks=ranks, kept=kept, bias=bias(names), **common(names), **fields | more)

    def inputs(names, *, own=True, kept=True):
        weight, scale = stored(matrix(names).t().float(), bits) if own else (None, None)
        width = sites[names[0]].in_features
        tau = mask(width) if kept else torch.zeros(width)
        return Adapter(
            kind="neuron" if kept else "stored", ranks=width, kept=width / SHARE if kept else width, tau=tau, weight=weight,
            weight_scale=scale, bias=bias(names) if own else None, **common(names),
        )  # fmt: skip

    attention, up, out = named("q", "k", "v"), named("gate", "up"), (named("o"), named("down"))
    if kind in ("rank", "static", "hybrid"):
        return [factors(attention), factors(up), *(inputs(names) for names in out)]
    if kind == "neuron":
        return [inputs(attention), inputs(up), *(inputs(names) for names in out)]
    if kind == "apart":
        return [inputs((name,), own=False) for names in (attention, up, *out) for name in names]
    if kind == "stored":
        return [inputs(names, kept=False) for names in (attention, up, *out)]
    if kind == "gated":
        more = common(named("down"), also=named("up"))
        return [Adapter(kind="gated", ranks=FFN, kept=FFN / SHARE, tau=mask(FFN), gate=f"{block}.gate", **more)]
    (name,) = names = named("up")
    ranks = torch.where(mask(FFN) == 0, -torch.inf, torch.inf)
    return [factors(names, exact_tau=ranks, exact_kept=FFN / SHARE), *(inputs(names, own=False) for names in out)]


def made(bits):
    """(model, plan), on the CPU."""
    torch.manual_seed(0)
    model = Model(kinds_of(bits)).eval()
    batches = [(torch.randn(64, WIDTH),) for _ in range(4)]
    plan = rana_fx.adapt(model, batches, budget=1.0, recipe="dense", progress=False)
    rana_fx.detach(model)
    records, sites = {record.name: record for record in plan.sites}, sites_of(model, batches[0])
    with torch.no_grad():
        adapters = [
            adapter.costed() for kind in kinds_of(bits) for adapter in adapters_of(kind, f"blocks.{kind}", records, sites, bits)
        ]
    return model, replace(plan, adapters=tuple(adapters), skips=())


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def quickly_tuned():
    """Autotuning measures two configs of a kernel, a few times: which one is chosen is no subject here, and all that are offered
    would compile for a quarter of an hour. Inductor's own templates are left out for the same reason."""
    real = autotune.fastest
    autotune.fastest = lambda key, choices, measure, **more: real(key, choices[:2], measure, **more)
    autotune.copies_of = lambda _: 2
    torch._inductor.config.max_autotune_gemm_backends = "ATEN"


def main(device, mode, bits, way):
    """Two rounds over all numbers of tokens, three calls each: warm-up, capture, replay. Then the reference."""
    chosen = set()
    log = logging.getLogger("rana_fx.passes.lower")
    log.setLevel(logging.DEBUG)
    log.addFilter(lambda record: chosen.add(record.getMessage().split(";")[0]) or False)
    if mode == "max-autotune":
        quickly_tuned()
    if way == "kernels":
        cost.masked_us = cost.rows_us = lambda *_, **__: 0.0
    model, plan = made(int(bits))
    rana_fx.attach(model.to(device), plan)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(tokens, WIDTH, generator=generator).to(device) for _ in range(2) for tokens in TOKENS for _ in range(3)]
    fast, results = torch.compile(model, backend=rana_fx.backend, mode=mode, dynamic=False), []
    with torch.no_grad():
        for x in given:
            torch.compiler.cudagraph_mark_step_begin()
            results.append(fast(x).clone())
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        torch.compiler.reset()
        with implementation("reference"):
            slow = torch.compile(model, backend=rewritten, dynamic=False)
            errors = [relative(got, slow(x)) for x, got in zip(given, results, strict=True)]
    print(json.dumps({"errors": errors, "skips": skips, "chosen": sorted(chosen)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
