"""Planned linears that run dense because no graph has them with the plan's weight: other tensors in their places, layers that
were replaced, parts that Dynamo keeps out of graphs. A warning, an error under ``strict``."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import rana_fx
from rana_fx import RanaWarning
from tests.support.adapted import relative
from tests.support.gated_blocks import FFN, WIDTH, X, compiled, planned_model

pytestmark = pytest.mark.usefixtures("graphs_as_rewritten")


@pytest.fixture
def model():
    return planned_model()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_tensors_in_the_place_of_parameters_are_said(model, scale):
    """functional_call with other tensors; FSDP swaps Parameters for plain tensors, too."""
    tensors = {name: scale * parameter.detach() for name, parameter in model.named_parameters()}
    functional = torch.compile(lambda given, x: torch.func.functional_call(model, given, (x,)), backend=rana_fx.backend)
    with pytest.warns(RanaWarning, match=r"and 1 more.*a tensor in the place of the model's Parameter"):
        got = functional(tensors, X)
    torch.testing.assert_close(got, torch.func.functional_call(model, tensors, (X,)))


IN_PLACE = r"a tensor in the place of the model's Parameter"


@pytest.mark.parametrize("given", ["attached", "option"])
@pytest.mark.parametrize("how", ["compiled inside", "compiled outside"])
def test_a_tensor_in_the_place_of_one_parameter_is_said(model, how, given):
    options = {"plan": rana_fx.detach(model)} if given == "option" else {}
    name = "blocks.0.down.weight"
    tensors = {name: model.blocks[0].down.weight.detach()}
    if how == "compiled inside":
        call, tensors = torch.func.functional_call, {f"_orig_mod.{name}": tensors[name]}
        run = functools.partial(call, compiled(model, **options))
    else:
        call = torch.func.functional_call
        run = torch.compile(lambda tensors, args: call(model, tensors, args), backend=rana_fx.backend, options=options)
    with pytest.warns(RanaWarning, match=rf"^(blocks\.0\.down|L_tensors_blocks_0_down_weight_): .*{IN_PLACE}") as seen:
        got = run(tensors, (X,))
    assert len(seen) == 1
    assert relative(got, model(X)) > 1e-3  # the other one has its adapter


def _plain(layer):
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = weight


def _buffer(layer):
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight)


def _normed(layer):
    nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize("given", ["attached", "option"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("change", [_plain, _buffer, _normed])
def test_a_weight_that_is_no_parameter_any_more_is_said(model, change, count, given):
    options = {"plan": rana_fx.detach(model)} if given == "option" else {}
    for block in model.blocks[:count]:
        change(block.down)
    dense = model(X)
    reason = "(its weight is (no longer a Parameter of the model|computed in the forward pass)|its matrix is a buffer)"
    with pytest.warns(RanaWarning, match=rf"blocks\.0\.down{' .and 1 more.' if count == 2 else ''}: .*{reason}") as seen:
        got = compiled(model, **options)(X)
    assert len(seen) == 1
    assert torch.allclose(got, dense, atol=1e-6) == (count == 2)
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=reason):
        compiled(model, strict=True, **options)(X)


class Own(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(1.5 * layer.weight), layer.bias

    def forward(self, x):
        return F.linear(x, self.matrix, self.bias)


def test_a_layer_with_a_weight_of_its_own_is_said_in_parts_of_the_model(model):
    plan = rana_fx.detach(model)
    block = model.blocks[1]
    compiled(block, plan=plan)(X)
    block.down = Own(block.down)
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.1\.down: .*its weight is no longer a Parameter of the model"):
        compiled(model, plan=plan, strict=True)(X)
    torch.compiler.reset()
    compiled(model.head, plan=plan)(X)  # is not concerned


def test_wrapped_layers_and_parts_without_planned_weights_are_none_of_these(model):
    """A layer that holds the plan's weight under another name, as LoRA does."""

    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return self.base_layer(x)

    plan = rana_fx.detach(model)
    expected = compiled(model, plan=plan, strict=True)(X)
    torch.compiler.reset()
    for block in model.blocks:
        block.down = Wrapper(block.down)
        block.forward = lambda x, forward=block.forward: torch._dynamo.graph_break() or forward(x)
    torch.testing.assert_close(compiled(model, plan=plan, strict=True)(X), expected)


@pytest.mark.parametrize("given", ["attached", "option"])
def test_a_buffer_of_the_shape_of_a_planned_weight_is_none_of_these(model, given):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.register_buffer("matrix", torch.randn(WIDTH, FFN))

        def forward(self, x):
            x = F.linear(x.repeat(1, 1, 3)[..., :FFN], self.matrix)
            torch._dynamo.graph_break()
            return self.inner(x)

    options = {"plan": rana_fx.detach(model)} if given == "option" else {}
    compiled(Fixed(), strict=True, **options)(X)


def test_the_models_own_parameters_may_be_passed_to_it(model):
    own = dict(model.named_parameters())
    got = torch.compile(lambda given, x: torch.func.functional_call(model, given, (x,)), backend=rana_fx.backend)(own, X)
    torch.testing.assert_close(got, compiled(model)(X))


def test_a_part_that_was_disabled_later_is_said(model):
    block = model.blocks[1]
    block.forward = torch.compiler.disable(block.forward)
    with pytest.warns(RanaWarning, match=r"blocks\.1\..*under torch\.compiler\.disable"):
        compiled(model)(X)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.1\..*under torch\.compiler\.disable"):
        compiled(model, strict=True)(X)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_linear_behind_a_backward_hook_is_said(model, hook):
    getattr(model.blocks[1].down, hook)(lambda *_: None)
    with pytest.warns(RanaWarning, match=r"^blocks\.1\.down: .*a backward hook") as seen:
        compiled(model)(X)
    assert len(seen) == 1
    torch.compiler.reset()
    with pytest.raises(BackendCompilerFailed, match=r"blocks\.1\.down: .*a backward hook"):
        compiled(model, strict=True)(X)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_forward_hook"])
def test_hooks_on_a_block_leave_its_linears_adapted(model, hook):
    expected = compiled(model, strict=True)(X)
    torch.compiler.reset()
    getattr(model.blocks[1], hook)(lambda *_: None)
    torch.testing.assert_close(compiled(model, strict=True)(X), expected)
