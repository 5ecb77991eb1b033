"""Every way to write a tensor leads to the right version of it: programs of reads and writes, rewritten, against the same ones
run eagerly, each linear of an adapted weight replaced by its adapter."""

from __future__ import annotations

import contextlib
import textwrap

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import rana_fx
from rana_fx._backend import rewritten
from rana_fx.calibration.calibrate import calibrate

WIDTH, ROWS = 8, 4

# v: what is written, s: another tensor or the same, n: a number of its own
WRITES = (
    "{v}.mul_(-1.5)",
    "{v}.add_({s}[0].clone())",
    "{v} -= 0.2",
    "F.relu({v}, inplace=True)",
    "torch.mul({v}, -1.5, out={v})",
    "torch.add({v}, {s}[0].clone(), alpha=2, out={v})",
    "torch.sort({v} * -1.0, -1, out=({v}, torch.empty({v}.shape, dtype=torch.int64)))",
    "torch.matmul({v} * 0.5, w2.t(), out={v})",
    "{v}[0] = 2.0 * {s}[0].clone()",
    "{v}[:, 2:5] = 0.5",
    "{v}[{v} > 0] = -0.25",
    "{v}.copy_({s}[0].clone().expand_as({v}))",
    "{v}.copy_(torch.relu({v}) - 0.3)",
    "{v}.view(-1).mul_(1.5)",
    "{v}.t().sub_(0.1)",
    "{v}.unbind(0)[1].add_(1.0)",
    "{v}.detach().mul_(0.5)",
    "{v}.data.mul_(0.5)",
    "{v}.chunk(2, -1)[1].zero_()",
    "{v}.masked_fill_({v} < 0, 0.1)",
    "{v}.index_fill_(0, torch.tensor([1]), 0.7)",
    "torch._foreach_mul_([{v}, {s}], 0.9)",
    "torch._foreach_add_([{v}], 0.3)",
    "torch.ops.rana_fx_tests.scale_rows({s}, {v})",
    "torch.ops.aten.mul_.Tensor({v}, {s}[0].clone())",
    "torch.ops.aten.neg.out({v}, out={v})",
    "{v}.set_({v} * 1.5)",
)
VIEWS = (
    "{v}[:]",
    "{v}.view(-1, 8)",
    "{v}[1:3]",
    "{v}[None].flatten(0, 1)",
    "{v}.clone()",
    "{v} * 1.0",
    "{v}.to(torch.float32)",
    "{v}.t().t()",
)
READS = (
    "F.linear({v}, {w})",
    "F.linear({v}[1:], {w})",
    "F.linear({v}.clone(), {w})",
    "F.linear({v}.unsqueeze(0), {w})",
    "{v} @ {w}.t()",
)


@torch.library.custom_op("rana_fx_tests::scale_rows", mutates_args=("target",))
def scale_rows(by: torch.Tensor, target: torch.Tensor) -> None:
    target.mul_(by[:1].tanh() + 1.5)


class Attention(nn.Module):
    """q and k share a router: their linears read one tensor."""

    def __init__(self):
        super().__init__()
        self.w0, self.w1, self.w2 = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 2) for _ in range(3))

    def forward(self, x):
        q, k = F.linear(x, self.w0), F.linear(x, self.w1)
        return x + F.linear(F.scaled_dot_product_attention(q, k, x), self.w2)


@pytest.fixture(scope="module")
def planned():
    """(weights by name, what computes each linear): a plan of low ranks, without thresholds, so that rounding decides nothing."""
    torch.manual_seed(1)
    model = Attention().eval()
    batches = [torch.randn(2, 16, WIDTH) for _ in range(4)]
    plan = rana_fx.adapt(model, batches, budget=0.7, recipe="static", progress=False)
    assert [adapter.sites for adapter in plan.adapters] == [("w0", "w1"), ("w2",)]
    return {name: getattr(model, name) for name in ("w0", "w1", "w2")}, {
        name: _adapter(plan, name) for name in ("w0", "w1", "w2")
    }


def _adapter(plan, name):
    made = plan.adapter_of(name)
    assert made.kind == "static" and made.bias is None and made.shift is None
    start = made.sites.index(name) * WIDTH
    matrix = made.weight.double()[:, start : start + WIDTH].t() @ made.router.double()
    return lambda x: (x.double() @ matrix.t()).to(x.dtype)


class Oracle(TorchFunctionMode):
    """Computes linears of adapted weights by their adapters, and keeps what they read."""

    def __init__(self, weights, adapters):
        super().__init__()
        self._names, self._adapters = {weight.data_ptr(): name for name, weight in weights.items()}, adapters
        self.read = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        products = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        name = self._names.get(args[1].data_ptr()) if func in products else None
        if name is None:
            return func(*args, **kwargs)
        self.read.append((name, args[0].detach().clone()))
        result = self._adapters[name](args[0])
        return kwargs["out"].copy_(result) if "out" in kwargs else result


@st.composite
def programs(draw):
    """Source of a function of x and of three weights: views, writes and reads in any order."""
    tensors, lines = ["a"], ["a = x * 1.0"]
    results = []
    for number in range(draw(st.integers(4, 12))):
        v, s = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        kind = draw(st.sampled_from(("view", "write", "write", "read", "read", "read")))
        if kind == "view" and len(tensors) < 5:
            lines.append(f"t{number} = {draw(st.sampled_from(VIEWS)).format(v=v)}")
            tensors.append(f"t{number}")
        elif kind == "write":
            lines.append(draw(st.sampled_from(WRITES)).format(v=v, s=s))
        else:
            lines.append(f"y{number} = {draw(st.sampled_from(READS)).format(v=v, w=draw(st.sampled_from(('w0', 'w1', 'w2'))))}")
            lines.append(f"y{number} = y{number}.flatten(0, -2)")
            results.append(f"y{number}")
            if draw(st.booleans()):
                tensors.append(f"y{number}")
    return "\n".join([*lines, f"return [{', '.join((*results, *tensors))}]"])


def function(program):
    space = {"torch": torch, "F": F}
    exec(f"def f(x, w0, w1, w2):\n{textwrap.indent(program, '    ')}", space)
    return space["f"]


X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))


def runs(program):
    """Whether it reads no row that is not there and views nothing that has other strides."""
    with torch.no_grad(), contextlib.suppress(RuntimeError, IndexError):
        function(program)(X, *torch.ones(3, WIDTH, WIDTH))
        return True
    return False


def check(drawn, planned):
    """Every program starts from a tensor of its own, so that all of them are one graph without being related."""
    weights, adapters = planned
    functions = [function(program) for program in drawn]
    with torch.no_grad():
        with Oracle(weights, adapters):
            expected = [one(X, **weights) for one in functions]
        torch.compiler.reset()
        found = torch.compile(lambda x: [one(x, **weights) for one in functions], backend=rewritten)(X)
    for program, got, right in zip(drawn, found, expected, strict=True):
        for one, other in zip(got, right, strict=True):
            # of a chain of a dozen products of factors, in fp32
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, program=program: f"{program}\n{text}")


@pytest.mark.slow
@hypothesis.settings(max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(drawn=st.lists(programs().filter(runs), min_size=4, max_size=4))
def test_rewritten_programs_read_what_eager_ones_read(drawn, planned):
    check(drawn, planned)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_two_readers(write, planned):
    """q, a write through v, k: without a new version, both would come of one router."""
    drawn = []
    for v in ("a", "a[:]", "a.view(-1, 8)"):
        lines = [
            "a = x * 1.0",
            f"v = {v}",
            "s = x + 1.0",
            "q = F.linear(a, w0)",
            write.format(v="v", s="s"),
            "k = F.linear(a, w1)",
        ]
        drawn.append("\n".join([*lines, "return [q, k, a]"]))
    check(drawn, planned)


def test_a_copy_has_the_version_that_was_copied(planned):
    """Copies are rows of what they are made of: before a write through a view, after it, and written themselves."""
    lines = ["a = x * 1.0", "b = a.clone()", "q = F.linear(a, w0)", "a[0] = 2.0", "c = a.clone()", "k = F.linear(c, w1)"]
    lines += ["p = F.linear(b, w1)", "b[1] = 3.0", "r = F.linear(b, w0)", "u = F.linear(b, w1)"]
    check(["\n".join([*lines, "return [q, k, p, r, u]"])], planned)


def test_a_copy_after_a_write_shares_no_router_with_what_was_read_before(planned):
    """Calibration groups linears that read one tensor: a copy is that tensor as long as neither was written."""
    weights, _ = planned

    class Program(nn.Module):
        def __init__(self, lines):
            super().__init__()
            self.w0, self.w1, self.w2 = (nn.Parameter(weights[name].detach().clone()) for name in ("w0", "w1", "w2"))
            self.run = function("\n".join([*lines, "return x + F.scaled_dot_product_attention(q, k, a)"]))

        def forward(self, x):
            return self.run(x, self.w0, self.w1, self.w2)

    def groups(write):
        lines = ["a = x * 1.0", "q = F.linear(a, w0)", *write, "c = a.clone()", "k = F.linear(c, w1)"]
        found = calibrate(Program(lines), [torch.randn(ROWS, WIDTH)], wanted=lambda layout: set(), progress=False)
        return {group.sites for group in found.layout.groups}

    assert groups([]) == {("w0", "w1")}
    assert groups(["a[0] = 2.0"]) == {("w0",), ("w1",)}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_sampled_is_what_was_read(write, planned):
    """Calibration samples a tensor at the time of its readers."""
    weights, _ = planned
    lines = ["a = x * 1.0", "s = x + 1.0", "v = a.view(-1, 8)", "q = F.linear(a, w0)", write.format(v="v", s="s")]
    program = "\n".join([*lines, "return x + F.scaled_dot_product_attention(q, F.linear(a, w1), a)"])

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.w0, self.w1, self.w2 = (nn.Parameter(weights[name].detach().clone()) for name in ("w0", "w1", "w2"))

        def forward(self, x):
            return run(x, self.w0, self.w1, self.w2)

    run = function(program)
    model, x = Program(), torch.randn(ROWS, WIDTH)
    own = dict(model.named_parameters())
    oracle = Oracle(own, {name: lambda y, weight=weight: y @ weight.t() for name, weight in own.items()})
    with torch.no_grad(), oracle:
        function(program)(x, **own)
    found = calibrate(model, [x], wanted=lambda layout: {group.sites for group in layout.groups}, progress=False)
    rows = {name: sample.rows() for names, sample in found.samples.items() for name in names}
    read = dict(oracle.read)
    assert ("w0", "w1") not in found.samples
    for name in ("w0", "w1"):
        torch.testing.assert_close(rows[name], read[name])
