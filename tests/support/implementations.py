"""The implementations that tests of an operation run over, each on the devices that it is for."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st

from rana_fx.kernels import registry
from rana_fx.kernels.ops import arguments_of, implementation
from rana_fx.kernels.problem import operand_of_tensor, problem_of
from rana_fx.kernels.triton.config import Config
from tests.support.inductor import calls, each
from tests.support.products import kernels_run_on

DEVICES = {"reference": ["cpu"], "cpp": ["cpu"], "triton": ["cpu", "cuda"]}
# cases of one example of a property; those of "cpp" are one graph
AT_ONCE = {"reference": 25, "cpp": 6, "triton": 12}
# the first example has the simplest cases only; one that fails is not shrunk, which would compile hundreds of graphs
FEW = settings(max_examples=max(2, settings.default.max_examples // 12), phases=(Phase.explicit, Phase.reuse, Phase.generate))

GEMV_CONFIGS = st.builds(
    Config,
    splits=st.sampled_from([1, 2, 5]),
    block_n=st.sampled_from([64, 128]),
    block_m=st.sampled_from([1, 4, 16]),
    warps=st.sampled_from([1, 4]),
    stages=st.sampled_from([1, 2]),
    early=st.sampled_from([0, 1, 8]),
)


def implementations(*names):
    """Parametrises a test by ``who`` and ``device``; it skips where Triton's kernels cannot run."""
    pairs = [
        pytest.param(name, device, marks=[pytest.mark.gpu] if device == "cuda" else [], id=f"{name}-{device}")
        for name in names
        for device in DEVICES[name]
    ]
    return pytest.mark.parametrize(("who", "device"), pairs, indirect=["device"])


EVERY = implementations("reference", "cpp", "triton")
EAGER = implementations("reference", "triton")


def kernels(name, device):
    """A module of Triton kernels by name; skips where they cannot run on the device."""
    kernels_run_on(device)
    return importlib.import_module(f"rana_fx.kernels.triton.{name}")


def computed(who, op, operands, marker, device):
    """Results of an operation for each of these tuples of operands, which are on the device.

    Each has to be accepted, since the reference computes what is not; through Inductor ("cpp") each of them has to be a kernel
    with the marker in its source.
    """
    if who == "cpp":
        results, code = each(op, operands)
        assert calls(code, marker) == len(operands)
        return results
    if who == "triton":
        kernels_run_on(device)
    name = op._schema.name.removeprefix("rana::")
    for given in operands:
        problem = problem_of(name, arguments_of(name, given, {}), operand_of_tensor, compiled=False)
        assert registry.choose(problem, name=who).name == who
    with implementation(who):
        return [op(*given) for given in operands]


def runs_again(case, cases, device):
    """Whether this one of the cases is run twice, whose results have to be equal to the bit: each on a GPU; of the interpreter,
    which has one order, the last."""
    return device.type == "cuda" or case is cases[-1]
