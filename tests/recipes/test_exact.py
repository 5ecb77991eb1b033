"""Recipe ``exact``: rows that exact zeros multiply are skipped, and nothing else changes, on any text."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import rana_fx
from rana_fx.calibration.batches import call
from rana_fx.errors import InvalidOption, NothingToSkip
from rana_fx.kernels.reference import kept, masked_gemv
from rana_fx.recipes import Exact
from tests.support.adapted import relative
from tests.support.architectures import FFN, VOCAB, WIDTH, build, output
from tests.support.by_hand import outputs_by_hand
from tests.support.inductor import GEMV, ROWS, calls

LEAST_KEPT = 2.0**-63  # the smallest magnitude whose square is no less than the threshold


def squared_relu(mlp, x):
    return mlp.up(x).relu().square()


def relu_gate(mlp, x):
    return F.relu(mlp.gate(x)) * mlp.up(x)


def halves(mlp, x):
    """Gate and up are halves of one linear."""
    gate, up = mlp.both(x).chunk(2, dim=-1)
    return F.relu(gate) * up


def cutoff(mlp, x):
    """As in Gemma 3n: gates above the mean by some deviations, less that."""
    gate = mlp.gate(x)
    return F.gelu(F.relu(gate - gate.mean(-1, keepdim=True) - 1.2 * gate.std(-1, keepdim=True))) * mlp.up(x)


def largest(mlp, x):
    gate = mlp.gate(x)
    threshold = gate.topk(5, dim=-1).values[..., -1:]
    return torch.where(gate >= threshold, gate, 0.0) * mlp.up(x)


def silu_gate(mlp, x):
    return F.silu(mlp.gate(x)) * mlp.up(x)


class Mlp(nn.Module):
    def __init__(self, hidden, bias):
        super().__init__()
        widths = {squared_relu: {"up": FFN}, halves: {"both": 2 * FFN}}.get(hidden, {"gate": FFN, "up": FFN})
        for name, width in widths.items():
            setattr(self, name, nn.Linear(WIDTH, width, bias=bias))
        self.down, self.hidden = nn.Linear(FFN, WIDTH, bias=bias), hidden

    def forward(self, x):
        return self.down(self.hidden(self, x))


class Blocks(nn.Module):
    def __init__(self, hidden, depth=2, *, bias=True, before=None):
        super().__init__()
        self.mlps = nn.ModuleList(Mlp(hidden, bias) for _ in range(depth))
        self.before = before or nn.Identity()

    def forward(self, x):
        for mlp in self.mlps:
            x = x + mlp(self.before(x))
        return x


class Kept(nn.Module):
    """Zero but for inputs above one."""

    def forward(self, x):
        return F.relu(x - 1)


class Residual(nn.Module):
    """Linears outside of any MLP."""

    def __init__(self, first=WIDTH):
        super().__init__()
        self.linear, self.other = nn.Linear(first, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.other(self.linear(F.relu(x)))


def text(count=3, *, scale=1.0, shift=0.0, seed=1, dtype=torch.float64):
    """Batches of rows; those of a model in fp64 differ from the dense model's by rounding in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(2, 40, WIDTH, generator=generator) + shift).to(dtype) for _ in range(count)]


def unlike():
    """Rows unlike those of ``text()``: much larger, mostly negative, mostly positive, tiny."""
    ways = ((50.0, 0.0), (1.0, -4.0), (1.0, 4.0), (1e-3, 0.0))
    return [batch for scale, shift in ways for batch in text(1, scale=scale, shift=shift, seed=2)]


def adapt(model, given_batches, **options):
    return rana_fx.adapt(model, given_batches, **{"recipe": "exact", "progress": False} | options)


def dense_outputs(model, inputs):
    with torch.no_grad(), rana_fx.disabled():
        return [output(call(model, batch)) for batch in inputs]


def compiled_outputs(model, inputs):
    fast = torch.compile(model, backend=rana_fx.backend, dynamic=False)
    with torch.no_grad():
        return [output(call(fast, batch)) for batch in inputs]


def kinds_of(plan):
    return [adapter.kind for adapter in plan.adapters]


def check_equal(model, inputs, *, rounding, activation=F.relu):
    """The reference, and the model that the compiler records, compute what the dense model does."""
    dense = dense_outputs(model, inputs)
    for way in (outputs_by_hand(model, *inputs, activation=activation), compiled_outputs(model, inputs)):
        for got, expected in zip(way, dense, strict=True):
            assert bool(expected.isfinite().all()) and relative(got, expected) <= rounding


# sums of some dozen terms in fp64, through two layers; a value dropped wrongly changes the output by 1e-3
FP64 = 1e-13
# ... in a model whose norms compute in fp32: a rounding that goes the other way there
NORMS_IN_FP32 = 1e-6


@pytest.mark.usefixtures("graphs_as_rewritten")
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    ("hidden", "kind"),
    [(squared_relu, "neuron"), (relu_gate, "gated"), (halves, "neuron"), (cutoff, "neuron"), (largest, "neuron")],
)
def test_the_output_is_the_dense_one_on_tokens_unlike_the_calibration_text(hidden, kind, depth):
    model = Blocks(hidden, depth).double().eval()
    plan = adapt(model, text())
    assert kinds_of(plan) == [kind] * depth
    check_equal(model, [*text(1, seed=3), *unlike()], rounding=FP64)


@pytest.mark.usefixtures("graphs_as_rewritten")
@pytest.mark.parametrize(("name", "depth", "downs", "rounding"), [("opt", 2, 1, FP64), ("t5", 1, 2, NORMS_IN_FP32)])
def test_models_with_relu(name, depth, downs, rounding):
    model, _ = build(name, depth)
    model = model.double()

    def tokens(low, high, count):
        drawn = [torch.randint(low, high, (2, 12)) for _ in range(count)]
        more = [{"decoder_input_ids": torch.randint(low, high, (2, 7))} if name == "t5" else {} for _ in range(count)]
        return [{"input_ids": ids, **extra} for ids, extra in zip(drawn, more, strict=True)]

    plan = adapt(model, tokens(3, VOCAB // 2, 4))
    assert kinds_of(plan) == ["neuron"] * downs * depth
    assert all(site.endswith(("fc2", "wo")) for adapter in plan.adapters for site in adapter.sites)
    check_equal(model, tokens(VOCAB // 2, VOCAB - 3, 1), rounding=rounding)


@pytest.mark.parametrize("hidden", [squared_relu, relu_gate])
def test_compiled_for_a_cpu(hidden):
    depth, token = 2, text(1, seed=4, dtype=torch.float32)[0][:1, :1]
    model = Blocks(hidden, depth).eval()
    adapt(model, text(dtype=torch.float32))
    from torch._inductor.utils import run_and_get_code

    fast = torch.compile(model, backend=rana_fx.backend)
    with torch.no_grad():
        got, (code, *_) = run_and_get_code(fast, token)
        others = [token * 40, token - 3]
        outputs = [got, *map(fast, others)]
    assert (calls(code, GEMV), calls(code, ROWS)) == (depth, depth if hidden is relu_gate else 0)
    # two sums in fp32 of at most FFN + 1 terms, in each of two or three linears of each block
    rounding = depth * 3 * 2 * math.sqrt(FFN + 1) * torch.finfo(torch.float32).eps
    for ours, dense in zip(outputs, dense_outputs(model, [token, *others]), strict=True):
        assert relative(ours, dense) <= rounding


# ---- what is kept, and what it costs


@pytest.mark.parametrize("metric", ["flops", "bytes"])
def test_what_is_kept_is_what_is_not_zero(metric):
    model = Blocks(squared_relu).double().eval()
    inputs = text()
    found = []
    handles = [mlp.down.register_forward_pre_hook(lambda _, args: found.append(args[0])) for mlp in model.mlps]
    dense_outputs(model, inputs)
    for handle in handles:
        handle.remove()
    plan = adapt(model, inputs, metric=metric)
    for index, adapter in enumerate(plan.adapters):
        hidden = torch.cat([rows.reshape(-1, FFN) for rows in found[index::2]])
        assert adapter.kept == pytest.approx(float((hidden != 0).sum()) / len(hidden), rel=1e-12)
    dense = 2 * 2 * WIDTH * FFN
    spent = dense - sum((FFN - adapter.kept) * WIDTH for adapter in plan.adapters)
    # the budget is what was reached, whatever was asked for
    assert plan.budget == plan.expected_budget("flops") == plan.expected_budget("bytes") == pytest.approx(spent / dense)
    assert plan.notes() == ("only exact zeros are skipped, whatever the budget",)


def test_a_gate_skips_rows_of_up_and_of_down():
    model = Blocks(relu_gate, 1).double().eval()
    inputs = text()
    plan = adapt(model, inputs, budget=0.3)
    (adapter,) = plan.adapters
    gates = torch.cat([model.mlps[0].gate(batch).reshape(-1, FFN) for batch in inputs])
    share = float((gates > 0).double().mean())
    assert (adapter.kind, adapter.also, adapter.gate) == ("gated", ("mlps.0.up",), "mlps.0.gate")
    assert adapter.density == pytest.approx(share, rel=1e-12)
    assert plan.expected_budget() == pytest.approx((1 + 2 * share) / 3)
    assert [skip.site for skip in plan.left] == ["mlps.0.gate"]


def test_masks_of_inputs_where_they_cost_less_than_skipped_neurons():
    """A gate half of which is zero, behind inputs that mostly are."""
    model = Blocks(relu_gate, 1, before=Kept()).double().eval()
    plan = adapt(model, text())
    assert {adapter.name: adapter.kind for adapter in plan.adapters} == dict.fromkeys(
        ("mlps.0.gate", "mlps.0.up", "mlps.0.down"), "neuron"
    )
    check_equal(model, unlike(), rounding=FP64)


def test_linears_outside_of_mlps():
    model = Residual().double().eval()
    plan = adapt(model, text())
    assert [adapter.sites for adapter in plan.adapters] == [("linear",)]
    assert {skip.site: skip.reason for skip in plan.left} == {"other": "no exact zeros in its input"}
    check_equal(model, unlike(), rounding=FP64)


@pytest.mark.parametrize(
    ("zeros", "least", "reason"),
    [
        (0.0, 0.0, "no exact zeros in its input"),
        (0.05, 0.1, "5.0% of its input is exactly zero: too little to save time"),
        (0.05, 0.01, None),
        (1.0, 0.1, "its input is zero throughout the calibration text: it stays dense"),
    ],
)
def test_few_zeros_are_left_and_zeros_throughout_say_nothing(zeros, least, reason):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.masked, self.relu = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, mask):
            return x + self.masked(x * mask) + self.relu(F.relu(x))

    mask = torch.ones(2 * 40 * WIDTH, dtype=torch.float64)
    mask[torch.randperm(len(mask))[: round(zeros * len(mask))]] = 0
    plan = adapt(Masked().double(), [(batch, mask.view(2, 40, WIDTH)) for batch in text()], recipe=Exact(least=least))
    assert {skip.site: skip.reason for skip in plan.left} == ({} if reason is None else {"masked": reason})
    assert plan.recipe == ("exact" if least == 0.1 else f"exact(least={least!r})")


# ---- what users meet


def test_without_zeros_the_error_names_what_was_found():
    with pytest.raises(NothingToSkip, match=r"6 linears read.*down 0\.0% \(mlps\..\.down\).*share of 0\.1 on.*recipe='rana'"):
        adapt(Blocks(silu_gate).double(), text())


def test_linears_that_are_left_need_no_budget():
    """One of four layers cannot reach the default budget, which this recipe does not need."""
    model = Blocks(squared_relu, 4).double().eval()
    plan = adapt(model, text(), only="mlps.3")
    assert [adapter.name for adapter in plan.adapters] == ["mlps.3.down"]
    assert 0.8 < plan.budget == plan.expected_budget() < 1


def test_a_plan_is_saved_and_loaded(tmp_path):
    model = Blocks(relu_gate).double().eval()
    plan = adapt(model, text())
    plan.save(tmp_path)
    assert rana_fx.load_plan(tmp_path).digest() == plan.digest()


@pytest.mark.parametrize("least", [-0.1, 1, 1.5, math.nan, True, "0.1", None])
def test_least_is_a_share(least):
    with pytest.raises(InvalidOption, match="a share of zeros in"):
        Exact(least=least)


# ---- numbers near zero


@functools.cache
def thresholds():
    """Those of the adapter of a model, (FFN,)."""
    with torch.random.fork_rng():
        return adapt(Blocks(squared_relu, 1).double(), text()).adapters[0].tau


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_numbers_below_two_to_the_minus_63_are_dropped(dtype, flush):
    tau = thresholds()[:1]
    assert tau.dtype == torch.float32
    kept_ones = [LEAST_KEPT, 1e-18, 1.0, 6e4, math.inf, math.nan]
    # smallest normal numbers of fp16, and subnormal ones
    kept_ones = [2.0**-24, 2.0**-14, *kept_ones[2:]] if dtype == torch.float16 else kept_ones
    dropped = [0.0, -0.0] if dtype == torch.float16 else [0.0, -0.0, 0.99 * LEAST_KEPT, 1e-30]
    was = torch.set_flush_denormal(flush)  # as GPUs may
    try:
        for values, expected in ((kept_ones, True), (dropped, False)):
            v = torch.tensor([sign * value for value in values for sign in (1, -1)], dtype=dtype)
            assert kept(v, tau).tolist() == [expected] * len(v)
    finally:
        torch.set_flush_denormal(False)
    assert was


@given(exponent=st.floats(-90, -50), spread=st.floats(0, 20), seed=st.integers(0, 2**31))
def test_what_numbers_near_zero_change_is_below_the_bound(exponent, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(exponent + spread * torch.rand(4, FFN, generator=generator, dtype=torch.float64))
    v = size * torch.randn(4, FFN, generator=generator, dtype=torch.float64).sign()
    weight = torch.randn(FFN, WIDTH, generator=generator, dtype=torch.float64)
    error = (masked_gemv(v, thresholds(), weight) - v @ weight).abs()
    rounding = FFN * torch.finfo(torch.float64).eps * (v.abs() @ weight.abs())
    assert bool((error <= LEAST_KEPT * weight.abs().sum(0) + rounding).all())


# ---- recipe rana


class Language(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.blocks, self.head = Blocks(hidden), nn.Linear(WIDTH, 10)

    def forward(self, x):
        return {"logits": self.head(self.blocks(x))}


@pytest.mark.parametrize("hidden", [squared_relu, relu_gate])
def test_recipe_rana_drops_zeros_alone_where_they_are_enough_for_the_budget(hidden):
    model = Language(hidden).eval()
    inputs = text(9, dtype=torch.float32)
    exact = adapt(model, inputs)
    rana_fx.detach(model)
    plan = adapt(model, inputs, recipe="rana", budget=exact.budget + 0.05)
    assert sorted(adapter.name for adapter in plan.adapters) == sorted(adapter.name for adapter in exact.adapters)
    assert plan.expected_budget() == pytest.approx(exact.budget, abs=0.01)
    # its thresholds are small numbers, but no input is between them and zero
    for got, dense in zip(outputs_by_hand(model, *inputs, activation=F.relu), dense_outputs(model, inputs), strict=True):
        assert relative(got, dense) < 1e-6


@pytest.mark.parametrize("asked", [{"budgets": [0.3, 0.5]}, {"max_kl": 0.02}])
def test_it_has_one_plan(asked):
    with pytest.raises(InvalidOption, match="'exact' is not valid: expected a recipe that takes a budget"):
        rana_fx.adapt(torch.nn.Linear(2, 2), [torch.zeros(1, 2)], recipe="exact", **asked)
