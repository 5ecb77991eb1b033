"""The verifier reports graphs with wrong metadata, and accepts unusual graphs that are correct."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.nn import functional as F

from rana_fx.kernels.ops import masked_gemv, masked_gemv_add
from rana_fx.passes import aliasing
from rana_fx.passes.verify import Verifier

MODE = FakeTensorMode()


def fake(*shape, dtype=torch.float32, device="cpu", strides=None):
    with MODE:
        made = torch.empty(shape, dtype=dtype, device=device)
        return made if strides is None else made.as_strided(shape, strides)


class Built:
    """x (2, 4) and w (4, 4) in, y = linear(x, w) out; and a verifier made from the graph."""

    def __init__(self, *, past_autograd=False, key=None, before=None):
        self.key = key or ("val" if past_autograd else "example_value")
        self.graph = fx.Graph()
        self.x, self.w = (self.graph.placeholder(name) for name in "xw")
        self.x.meta[self.key], self.w.meta[self.key] = fake(2, 4), fake(4, 4)
        self.y = self.call(F.linear, self.x, self.w, value=fake(2, 4))
        self.results = [self.y] if before is None else before(self)
        self.output = self.graph.output(tuple(self.results))
        self.module = fx.GraphModule({}, self.graph)
        self.verifier = Verifier(self.module, past_autograd=past_autograd)

    def call(self, target, *args, value, **kwargs):
        outputs = self.graph.find_nodes(op="output")
        with self.graph.inserting_before(outputs[0]) if outputs else contextlib.nullcontext():
            node = self.graph.call_function(target, args, kwargs)
        if value is not None:
            node.meta[self.key] = value
        return node

    def put(self, node, place=0):
        """Make ``node`` the output of the graph."""
        self.results[place] = node
        self.output.args = (tuple(self.results),)


def test_a_true_value_is_accepted():
    for past_autograd in (False, True):
        built = Built(past_autograd=past_autograd)
        assert not built.verifier.changed()
        built.put(built.call(torch.relu, built.y, value=fake(2, 4)))
        assert built.verifier.changed()
        built.verifier.verify()
        assert not built.verifier.changed()


WRONG = {
    "shape": (dict(value=fake(4, 2)), r"relu.* fake value of shape \(4, 2\), and yields \(2, 4\)"),
    "one dimension more": (dict(value=fake(1, 2, 4)), r"fake value of shape \(1, 2, 4\), and yields \(2, 4\)"),
    "dtype": (dict(value=fake(2, 4, dtype=torch.bfloat16)), r"torch.bfloat16 on cpu, and yields torch.float32 on cpu"),
    "device": (dict(value=fake(2, 4, device="meta")), r"torch.float32 on meta, and yields torch.float32 on cpu"),
    "none": (dict(value=None), r"relu.* no fake value, and yields \(2, 4\) of torch.float32"),
    "no tensor": (dict(value=(fake(2, 4),)), r"no fake value, and yields \(2, 4\)"),
}


@pytest.mark.parametrize("past_autograd", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_found(name, past_autograd):
    more, message = WRONG[name]
    built = Built(past_autograd=past_autograd)
    built.put(built.call(torch.relu, built.y, **more))
    with pytest.raises(AssertionError, match=message):
        built.verifier.verify()


def test_strides_matter_past_autograd():
    for past_autograd in (False, True):
        built = Built(past_autograd=past_autograd)
        built.put(built.call(torch.relu, built.y, value=fake(2, 4, strides=(1, 2))))
        if past_autograd:
            with pytest.raises(AssertionError, match=r"strides \(1, 2\), and yields \(4, 1\)"):
                built.verifier.verify()
        else:
            built.verifier.verify()


def test_strides_of_single_elements_do_not():
    built = Built(past_autograd=True)
    row = built.call(torch.ops.aten.mean.dim, built.y, [0], True, value=fake(1, 4, strides=(77, 1)))
    built.put(row)
    built.verifier.verify()


def test_inductors_graph_keeps_its_values_as_val():
    built = Built(past_autograd=True)
    node = built.call(torch.relu, built.y, value=None)
    node.meta["example_value"] = fake(2, 4)
    built.put(node)
    with pytest.raises(AssertionError, match="no fake value"):
        built.verifier.verify()


def test_items_of_several_values():
    built = Built()
    halves = built.call(torch.chunk, built.y, 2, -1, value=(fake(2, 2), fake(2, 2)))
    halves.meta["example_value"] = tuple(built.y.meta["example_value"].chunk(2, -1))
    built.put(halves)
    built.verifier.verify()
    wrong = built.call(torch.chunk, built.y, 2, -1, value=(built.y.meta["example_value"].chunk(4, -1)[0],) * 2)
    built.put(wrong)
    with pytest.raises(AssertionError, match=r"shape \(2, 1\), and yields \(2, 2\)"):
        built.verifier.verify()


def test_a_changed_input_makes_an_old_value_wrong():
    built = Built(before=lambda b: [b.call(torch.relu, b.y, value=fake(2, 4))])
    built.results[0].args = (built.w,)
    with pytest.raises(AssertionError, match=r"relu.*shape \(2, 4\), and yields \(4, 4\)"):
        built.verifier.verify()


def test_a_replaced_value_is_looked_at():
    built = Built()
    built.y.meta["example_value"] = fake(2, 5)
    with pytest.raises(AssertionError, match=r"linear.*shape \(2, 5\)"):
        built.verifier.verify()


def test_what_no_pass_touched_is_not_run():
    """Values of nodes that no pass changed are trusted, and running all nodes takes time."""
    built = Built(before=lambda b: [b.call(torch.relu, b.y, value=fake(9, 9))])
    built.put(built.call(torch.neg, built.y, value=fake(2, 4)))
    built.verifier.verify()


def test_what_does_not_run_is_found():
    built = Built()
    built.put(built.call(F.linear, built.w, built.x.graph.call_function(torch.zeros, ((3, 3),)), value=fake(4, 3)))
    with pytest.raises((AssertionError, RuntimeError)):
        built.verifier.verify()
    built = Built()
    built.put(built.call(torch.mm, built.x, built.x, value=fake(2, 4)))
    with pytest.raises(AssertionError, match="mm: does not run on the fake values of its inputs"):
        built.verifier.verify()


def test_an_operation_without_inputs_needs_a_value_too():
    built = Built()
    built.put(built.call(torch.zeros, (2, 4), value=None))
    with pytest.raises(AssertionError, match="zeros: has no fake value"):
        built.verifier.verify()


def test_unknown_operations():
    library = torch.library.Library("rana", "FRAGMENT")
    library.define("unheard_of(Tensor x) -> Tensor")
    try:
        built = Built(past_autograd=True)
        built.put(built.call(torch.ops.rana.unheard_of.default, built.y, value=fake(2, 4)))
        with pytest.raises(AssertionError, match=r"unknown operation rana.unheard_of"):
            built.verifier.verify()
    finally:
        library._destroy()


def test_fused_operations_come_past_autograd():
    for past_autograd in (False, True):
        built = Built(past_autograd=past_autograd)
        tau = built.call(torch.ops.aten.sum.dim_IntList, built.x, [0], value=fake(4))
        args = (built.x, tau, built.w, None, None, 0.5, built.y)
        built.put(built.call(masked_gemv_add, *args, value=fake(2, 4)))
        if past_autograd:
            built.verifier.verify()
        else:
            with pytest.raises(AssertionError, match="masked_gemv_add.* has no backward pass"):
                built.verifier.verify()
    built = Built()
    tau = built.call(torch.sum, built.x, 0, value=fake(4))
    built.put(built.call(masked_gemv, built.x, tau, built.w, value=fake(2, 4)))
    built.verifier.verify()


def test_ill_formed_graphs():
    built = Built()
    node = built.call(torch.relu, built.y, value=fake(2, 4))
    built.put(node)
    built.y.append(node)
    built.verifier.verify()
    built.x.prepend(node)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        built.verifier.verify()


def test_an_attribute_has_the_value_it_has():
    built = Built()
    built.module.register_buffer("rana_tau", torch.zeros(3))
    with built.graph.inserting_before(built.y):
        node = built.graph.get_attr("rana_tau")
    node.meta["example_value"] = fake(3)
    built.verifier.verify()
    node.meta["example_value"] = fake(4)
    with pytest.raises(AssertionError, match=r"shape \(4,\), and yields \(3,\)"):
        built.verifier.verify()


class TestMemory:
    """A pass must not make an output share memory with an input or another output."""

    def test_an_input_is_returned(self):
        built = Built()
        built.put(built.x)
        with pytest.raises(AssertionError, match="output 0 shares memory with x, and did not before"):
            built.verifier.verify()

    def test_two_outputs_are_one(self):
        built = Built(before=lambda b: [b.y, b.call(torch.relu, b.y, value=fake(2, 4))])
        built.put(built.y, 1)
        with pytest.raises(AssertionError, match="output 1 shares memory with output 0"):
            built.verifier.verify()

    def test_a_view_of_an_input_is_returned(self):
        built = Built()
        built.put(built.call(torch.ops.aten.view.default, built.x, [8], value=built.x.meta["example_value"].view(8)))
        with pytest.raises(AssertionError, match="output 0 shares memory with x"):
            built.verifier.verify()

    def test_a_new_view_that_claims_memory_of_its_own(self):
        built = Built()
        built.put(built.call(torch.ops.aten.view.default, built.x, [8], value=fake(8)))
        with pytest.raises(AssertionError, match="its fake value does not lie in the memory of x"):
            built.verifier.verify()

    def test_a_new_tensor_that_claims_to_be_a_view(self):
        built = Built()
        built.put(built.call(torch.relu, built.y, value=built.y.meta["example_value"].view(2, 4)))
        with pytest.raises(AssertionError, match="its fake value lies in the memory of linear"):
            built.verifier.verify()

    @pytest.mark.parametrize(("rows", "start", "shared"), [(1, 2, False), (1, 1, True), (2, 2, True)])
    def test_columns_of_one_tensor(self, rows, start, shared):
        """Of one row they are apart; of several rows the columns of one lie between those of the other."""

        def columns(built):
            value = fake(rows, 4)
            y = built.call(torch.relu, built.x, value=value)
            return [y, built.call(torch.abs, built.x, value=fake(rows, 2)), built.call(torch.abs, built.x, value=fake(rows, 2))]

        built = Built(before=columns)
        y = built.results[0]
        value = y.meta["example_value"]
        built.put(built.call(torch.clone, y, value=fake(rows, 4)), 0)
        for place, first in ((1, 0), (2, start)):
            built.put(built.call(torch.narrow, y, -1, first, 2, value=value.narrow(-1, first, 2)), place)
        if shared:
            with pytest.raises(AssertionError, match="output 2 shares memory with output 1"):
                built.verifier.verify()
        else:
            built.verifier.verify()

    def test_an_old_view_of_what_is_now_an_input(self):
        def viewed(built):
            return [built.call(torch.ops.aten.view.default, built.y, [8], value=built.y.meta["example_value"].view(8))]

        built = Built(before=viewed)
        built.results[0].args = (built.x, [8])
        with pytest.raises(AssertionError, match="output 0 shares memory with x"):
            built.verifier.verify()

    def test_an_old_view_of_a_new_tensor(self):
        """Replacing the base of a view, as every rewrite of a linear does, adds no aliasing of outputs."""

        def viewed(built):
            return [built.call(torch.ops.aten.view.default, built.y, [8], value=built.y.meta["example_value"].view(8))]

        built = Built(before=viewed)
        with built.graph.inserting_before(built.results[0]):
            node = built.graph.call_function(torch.mm, (built.x, built.w))
        node.meta["example_value"] = fake(2, 4)
        built.y.replace_all_uses_with(node)
        built.graph.erase_node(built.y)
        built.verifier.verify()

    def test_what_was_shared_before_may_be(self):
        built = Built(before=lambda b: [b.x, b.x])
        built.call(torch.relu, built.y, value=fake(2, 4))
        built.verifier.verify()


def test_writes_run_on_copies():
    built = Built()
    value = built.y.meta["example_value"]
    version = value._version
    with built.graph.inserting_before(built.output):
        node = built.graph.call_method("mul_", (built.y, 2))
    node.meta["example_value"] = value
    built.put(node)
    built.verifier.verify()
    assert value._version == version
    node.meta["example_value"] = fake(4, 2)
    with pytest.raises(AssertionError, match="mul_"):
        built.verifier.verify()


@pytest.mark.parametrize("place", ["inside", "behind"])
def test_autocast_of_the_graph_holds(place):
    built = Built()
    enter = built.call(_enter_autocast, "cpu", torch.bfloat16, True, None, value=None)
    if place == "behind":
        built.call(_exit_autocast, enter, value=None)
    right, wrong = (torch.bfloat16, torch.float32) if place == "inside" else (torch.float32, torch.bfloat16)
    node = built.call(F.linear, built.x, built.w, value=fake(2, 4, dtype=right))
    if place == "inside":
        built.call(_exit_autocast, enter, value=None)
    built.put(node)
    built.verifier.verify()
    node.meta["example_value"] = fake(2, 4, dtype=wrong)
    with pytest.raises(AssertionError, match=f"{wrong} on cpu, and yields {right}"):
        built.verifier.verify()


def test_varying_sizes():
    """Verification neither specialises a symbolic number of tokens nor adds a guard."""
    checked = []

    def backend(gm, _):
        verifier = Verifier(gm)
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and "linear" in str(node.target):
                value = node.meta["example_value"]
                with gm.graph.inserting_after(node):
                    new = gm.graph.call_function(torch.relu, (node,))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
                new.meta["example_value"] = value.new_empty(value.shape)
                verifier.verify()
                new.meta["example_value"] = value.new_empty((value.shape[0] + 1, value.shape[1]))
                with pytest.raises(AssertionError, match="fake value of shape"):
                    verifier.verify()
                new.meta["example_value"] = value.new_empty(value.shape)
                checked.append(value.shape[0])
        gm.recompile()
        return gm.forward

    layer = torch.nn.Linear(4, 4)
    compiled = torch.compile(layer, backend=backend, dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(5, 4))
        compiled(torch.randn(9, 4))
    assert len(checked) == 1 and isinstance(checked[0], torch.SymInt)


def test_a_graph_without_fake_values_needs_none():
    module = fx.symbolic_trace(torch.nn.Linear(4, 4))
    verifier = Verifier(module)
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        node = module.graph.call_function(torch.relu, (output.args[0],))
    output.args = (node,)
    assert verifier.changed()
    verifier.verify()


def test_only_tensors_of_one_memory_are_compared(monkeypatch):
    graph, value = fx.Graph(), fake(2, 4)
    given = [graph.placeholder(f"x{index}") for index in range(6)]
    made = [graph.call_function(torch.relu, (node,)) for node in given]
    made += [graph.call_function(torch.t, (node,)) for node in given[:2]]
    for node in (*given, *made):
        node.meta["example_value"] = fake(2, 4)
    with MODE:
        for source, node in zip(given, made[6:], strict=False):
            node.meta["example_value"] = source.meta["example_value"].t()
    made += [graph.call_function(torch.clone, (node,)) for node in given[:2]]
    with MODE:
        made[-1].meta["example_value"], made[-2].meta["example_value"] = value[:1], value[1:]
    graph.output(tuple(made))
    compared, overlap = [], aliasing._overlap
    monkeypatch.setattr(aliasing, "_overlap", lambda one, other: compared.append(one) or overlap(one, other))
    assert aliasing.Aliases().pairs(graph) == {("output 6", "x0"), ("output 7", "x1")}
    assert len(compared) == 3  # two views, and two rows of one tensor
