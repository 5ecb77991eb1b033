"""Defaults of Inductor's options for graphs that decode, and kernels that may not start early."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from rana_fx.kernels.ops import masked_gemv, router
from rana_fx.runtime.inductor_options import inductor_options, launches_wait, with_defaults

DEFAULTS = {"combo_kernels": True, "triton.enable_pdl": True}


def graph_of(op, shape: tuple[int, ...], device: str = "cuda:0") -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(op, (graph.placeholder("x"), graph.placeholder("w"))))
    with torch._subclasses.FakeTensorMode():
        y = torch.empty(shape, device=device)
    next(node for node in graph.nodes if node.op == "call_function").meta["example_value"] = y
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(("tokens", "decodes"), [((1, 1), True), ((2, 8), True), ((1, 17), False), ((3, 8), False)])
@pytest.mark.parametrize("op", [masked_gemv, router])
def test_few_tokens_on_a_gpu_have_the_defaults(op, tokens, decodes):
    with torch.no_grad():
        assert with_defaults({}, graph_of(op, (*tokens, 24))) == (DEFAULTS if decodes else {})


def test_others_have_none():
    with torch.no_grad():
        assert with_defaults({}, graph_of(masked_gemv, (1, 24), "cpu")) == {}
        assert with_defaults({}, graph_of(torch.ops.aten.mm.default, (1, 24))) == {}
        assert with_defaults({"cpp_wrapper": True}, graph_of(router, (1, 24))) == {"cpp_wrapper": True}
    assert with_defaults({}, graph_of(router, (1, 24))) == {}, "with gradients"


def test_what_is_given_stays():
    with torch.no_grad():
        given = inductor_options({"combo_kernels": False, "mode": "reduce-overhead"}, None)
        assert with_defaults(given, graph_of(router, (1, 24))) == given | {"triton.enable_pdl": True}


def test_kernels_that_do_not_wait_do_not_start_early():
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    written = []
    wrapper = object.__new__(PythonWrapperCodegen)
    wrapper.writeline = written.append
    body = "triton_meta={'launch_pdl': True}, %s"
    with launches_wait():
        wrapper.define_kernel("fill", body % "tl.store(p, 0)")
        wrapper.define_kernel("copy", body % "tl.extra.cuda.gdc_wait()")
    wrapper.define_kernel("other", body % "tl.store(p, 0)")
    assert [line.kernel_body.count("'launch_pdl': True") for line in written] == [0, 1, 1]
