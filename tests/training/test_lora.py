"""LoRA by peft: no effect at first, only LoRA is trained, same masks, dropout of inputs, exact merge, peft's file format."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from torch import nn

import rana_fx
from rana_fx.errors import CheckpointError, InvalidOption, LoraBeside, MissingPackage, NoPlan, NothingToTrain, UnknownTarget
from rana_fx.runtime.attachment import attached
from rana_fx.training import add_lora, load_lora, lora_config, merge_lora, save_lora, train, trainable, trained_plan
from tests.support.architectures import build, ids, output
from tests.support.gates import per_neuron
from tests.support.trained import SETTINGS, adapted, compiled, gradients, relative, texts

# peft 0.21 uses a deprecated name of transformers 5.23
PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def moved(model, std=0.05):
    """Set both LoRA matrices of every layer to nonzero values, as after training."""
    with torch.no_grad():
        for parameter in attached(model).factors.lowrank.parameters():
            parameter.normal_(0, std)


def run(forward, batch):
    with torch.no_grad():
        return output(forward(**batch)).clone()


def names(added):
    return {name.removeprefix("rana_fx.lowrank.adapters.").partition(".lora_")[0] for name in added}


def test_it_starts_as_the_plan_and_trains_alone():
    model, batch = adapted(depth=1, dtype=torch.float64)
    forward = compiled(model)
    before, dense = run(forward, batch), run(model, batch)
    added = add_lora(model)
    assert {"rana_fx.a0_router", "rana_fx.a0_weight", "model.layers.0.self_attn.o_proj", "lm_head"} <= names(added)
    assert not any("q_proj" in name for name in names(added))  # factors replace it
    shapes = {tuple(p.shape) for name, p in added.items() if "o_proj" in name}
    assert shapes == {(64, 32), (32, 64)}
    torch.testing.assert_close(run(forward, batch), before, rtol=0, atol=0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(added)
    _, got = gradients(model, forward, batch)
    assert set(got) == set(added)
    moved(model)
    assert relative(run(forward, batch), before) > 1e-4
    torch.testing.assert_close(run(model, batch), dense, rtol=0, atol=0)  # eager: the dense model, unchanged


class Reader(nn.Module):
    """The weight of its head has another use, which is no matmul."""

    def __init__(self):
        super().__init__()
        self.model, _ = build("plain", 1)

    def forward(self, input_ids):
        return self.model(input_ids) + self.model.head.weight.sum(0).mean() + self.model.blocks[0].down.weight[:, :5].sum()


def reader():
    model = Reader().double()
    batch = ids()
    rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.7, recipe="paper", progress=False)
    return model, batch


CASES = {
    "ranks": lambda: adapted(depth=1, dtype=torch.float64),
    "inputs": lambda: adapted("wina", depth=1, dtype=torch.float64),
    "gates": lambda: adapted("cats", depth=1, dtype=torch.float64),
    "cuts": lambda: per_neuron(depth=1, dtype=torch.float64)[:2],
    "tied": lambda: adapted("teal", depth=1, dtype=torch.float64, name="gemma"),  # one matrix as embedding and as head
    "transposed": lambda: adapted("teal", depth=1, dtype=torch.float64, name="gpt2"),  # stored (in, out)
    "other reads": reader,
}


@pytest.mark.parametrize("case", CASES)
def test_merging_is_exact(case):
    """Masks have the same inputs before and after: in fp64 only the order of sums differs, and fp32 norms hide that."""
    model, batch = CASES[case]()
    model.eval()
    forward = compiled(model)
    old = attached(model).plan
    add_lora(model, LoraConfig(r=4, lora_alpha=8, use_rslora=True, lora_dropout=0.5))
    moved(model)
    expected = run(forward, batch)
    plan = trained_plan(model)
    assert plan.digest() != old.digest() and not any("lowrank" in name for name, _ in model.named_parameters())
    assert relative(run(forward, batch), expected) < 1e-9


def test_a_linear_compiled_apart_reads_its_part_of_the_sum():
    """q, k and v share an adapter: compiled alone, each uses columns of its factor and of the LoRA term."""
    model, _ = adapted(depth=1, dtype=torch.float64)
    model.eval()
    linear, x = model.model.layers[0].self_attn.k_proj, {"input": torch.randn(3, 32, dtype=torch.float64)}
    forward = compiled(linear)
    before = run(forward, x)
    add_lora(model, lora_config(rank=4, dropout=0.5))
    moved(model)
    expected = run(forward, x)
    assert relative(expected, before) > 1e-3
    merge_lora(model)
    assert relative(run(forward, x), expected) < 1e-9


def test_gradients_are_those_of_the_matrix():
    """d/d B of f(W + s B A) is s G A^T, with G the gradient of W, with and without a mask."""
    model, batch = adapted(depth=1, dtype=torch.float64)
    trainable(model, what="all")
    forward = compiled(model)
    _, matrices = gradients(model, forward, batch)
    add_lora(model, LoraConfig(r=3, lora_alpha=6, target_modules=["rana_fx.a0_router", "a0_weight", "o_proj", "*.down_proj"]))
    _, got = gradients(model, forward, batch)
    layers = {addition.name: addition for addition in attached(model).factors.lowrank.additions()}
    assert len(got) == 2 * (2 + 1 + 1) and layers["rana_fx.a0_weight"].transposed
    for name, addition in layers.items():
        matrix = matrices[name if name.startswith("rana_fx") else f"{name}.weight"]
        expected = 6 / 3 * (matrix.t() if addition.transposed else matrix) @ addition.a.detach().t()
        assert relative(got[f"rana_fx.lowrank.adapters.{name}.lora_B.default.weight"], expected) < 1e-9, name


def test_dropout_is_on_the_input_and_in_training_alone():
    model, batch = adapted("dense", depth=1, dtype=torch.float64, name="plain")
    model.eval()
    forward = compiled(model)
    before = run(forward, batch)
    add_lora(model, LoraConfig(r=32, lora_alpha=32, lora_dropout=0.25, target_modules=["head"]))
    moved(model)
    head = next(attached(model).factors.lowrank.additions())
    back = torch.linalg.pinv(head.value())  # the input of the head, from the LoRA term of its output

    def read(result):
        return (result.detach() - before) @ back.t()

    x = read(run(forward, batch))
    assert relative(read(output(forward(**batch))), x) < 1e-6  # no dropout in evaluation mode with gradients
    model.train()
    assert relative(read(run(forward, batch)), x) < 1e-6  # without gradients there is nothing to train
    ratio = read(output(forward(**batch))) / x
    dropped = ratio.abs() < 1e-3
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1 / 0.75), rtol=1e-3, atol=0)
    share = float(dropped.double().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / ratio.numel()) ** 0.5
    torch.manual_seed(5)
    first = output(forward(**batch)).detach()
    assert not torch.equal(first, output(forward(**batch)))
    torch.manual_seed(5)
    torch.testing.assert_close(output(forward(**batch)), first, rtol=0, atol=0)


def test_in_16_bits_it_is_trained_in_fp32():
    model, batch = adapted(dtype=torch.bfloat16, depth=1)
    added = add_lora(model, seed=1)
    assert {parameter.dtype for parameter in added.values()} == {torch.float32}
    forward = compiled(model)
    logits = output(forward(**batch, use_cache=False))
    assert logits.dtype == torch.bfloat16
    _, got = gradients(model, forward, batch)
    assert {grad.dtype for grad in got.values()} == {torch.float32} and set(got) == set(added)


def test_autocast_multiplies_in_bf16():
    model, batch = adapted(depth=1, name="llama")
    add_lora(model, lora_config(rank=4, dropout=0.0))
    moved(model)
    forward = compiled(model)
    _, expected = gradients(model, forward, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert output(forward(**batch, use_cache=False)).dtype == torch.bfloat16
        _, got = gradients(model, forward, batch)
    assert got.keys() == expected.keys() and all(grad.dtype == torch.float32 for grad in got.values())
    # a bf16 matmul has an error of 2^-9 of its size, and some masks differ
    errors = sorted(relative(grad, expected[name]) for name, grad in got.items())
    assert errors[len(errors) // 2] < 0.1


def test_it_survives_a_copy_of_the_model():
    model, batch = adapted(depth=1, name="plain")
    add_lora(model, lora_config(rank=2))
    moved(model, 0.1)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(run(compiled(twin), batch), run(compiled(model), batch))
    merge_lora(twin)
    assert attached(model).factors.lowrank is not None
    torch.testing.assert_close(run(compiled(twin), batch), run(compiled(model), batch), rtol=1e-4, atol=1e-5)


def test_two_models_in_one_graph_keep_their_own():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.ModuleList(adapted("dense", depth=1, name="plain")[0] for _ in range(2))

        def forward(self, input_ids):
            return torch.stack([model(input_ids) for model in self.both])

    pair, batch = Pair(), ids()
    for std, model in zip((0.05, 0.2), pair.both, strict=True):
        add_lora(model, lora_config(rank=2))
        moved(model, std)
    pair.eval()
    expected = torch.stack([run(compiled(model), batch) for model in pair.both])
    torch.testing.assert_close(run(compiled(pair), batch), expected)


def test_it_is_saved_as_peft_does(tmp_path):
    model, batch = adapted(depth=1)
    with pytest.raises(NothingToTrain, match="it has no LoRA; call add_lora|call add_lora"):
        save_lora(model, tmp_path)
    add_lora(model, LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj", "*_router"], layers_to_transform=[0]))
    moved(model)
    expected = run(compiled(model), batch)
    save_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 3 and "model.layers.0.self_attn.o_proj" in config["target_modules"]
    other, _ = adapted(depth=1)
    added = load_lora(other, tmp_path)
    assert all(parameter.requires_grad for parameter in added.values())
    torch.testing.assert_close(run(compiled(other), batch), expected, rtol=0, atol=0)
    another, _ = adapted("teal", depth=1)
    with pytest.raises(CheckpointError, match="its LoRA belongs to plan .*attach that plan"):
        load_lora(another, tmp_path)
    with pytest.raises(CheckpointError, match="it holds no LoRA"):
        load_lora(another, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("targets", "more", "expected"),
    [
        (["o_proj"], {}, {"model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}),
        (["o_proj"], {"layers_to_transform": [1]}, {"model.layers.1.self_attn.o_proj"}),
        (r".*layers\.0.*|rana_fx\.a[01]_router", {"exclude_modules": ["down_proj"]},
         {"model.layers.0.self_attn.o_proj", "rana_fx.a0_router", "rana_fx.a1_router"}),
        (["*a0_*", "lm_head"], {}, {"rana_fx.a0_router", "rana_fx.a0_weight", "lm_head"}),
    ],
)  # fmt: skip
def test_targets_are_found_as_peft_finds_them(targets, more, expected):
    model, _ = adapted()
    config = LoraConfig(r=2, target_modules=targets, **more)
    assert names(add_lora(model, config)) == expected
    assert set(config.target_modules) == set(targets)  # the caller's config is unchanged
    merge_lora(model)
    everything = names(add_lora(model, LoraConfig(r=2, target_modules="all-linear")))
    merge_lora(model)
    assert everything == names(add_lora(model)) > expected


@PEFT
def test_an_adapter_of_pefts_own_beside_a_linear_that_stayed_dense():
    model, batch = adapted(depth=1, name="llama")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    forward = compiled(wrapped)
    dense = run(compiled(wrapped.base_model.model), batch)
    _, got = gradients(wrapped, forward, batch)
    assert len(got) == 2 and all("o_proj.lora_" in name for name in got)
    done = train(compiled(wrapped), texts(4), settings=SETTINGS, progress=False)
    assert len(done.losses) == 2
    with pytest.raises(InvalidOption, match=r"model='PeftModel'.* what merge_and_unload\(\) returns"):
        trained_plan(wrapped)
    expected = run(forward, batch)
    assert relative(expected, dense) > 1e-4
    merged = wrapped.merge_and_unload()
    plan = trained_plan(merged)
    rana_fx.attach(merged, plan)
    assert relative(run(compiled(merged), batch), expected) < 1e-3  # merged in fp32; masks depend on its rounding


@PEFT
def test_an_adapter_of_pefts_own_beside_a_mask_is_refused():
    for target in ("q_proj", "down_proj"):  # replaced; masked by its input
        model, batch = adapted(depth=1)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=[target]))
        with pytest.raises(Exception, match="which the plan masks or replaces") as caught:
            run(compiled(wrapped), batch)
        error = caught.value.inner_exception
        assert isinstance(error, LoraBeside) and target in error.facts["site"] and "lora_" in error.facts["weight"]
        assert "use rana_fx.training.add_lora" in str(error)


def test_invalid_calls_raise(monkeypatch):
    plain, _ = build("plain_llama", 1)
    with pytest.raises(NoPlan):
        add_lora(plain)
    model, _ = adapted(depth=1)
    with pytest.raises(UnknownTarget, match=r"LoRA target 'q_proj' matches no matrix .*a0_router.*rana_fx\.\*"):
        add_lora(model, LoraConfig(target_modules=["o_proj", "q_proj"]))
    with pytest.raises(UnknownTarget, match=r"'.\*q_proj' matches no matrix"):
        add_lora(model, LoraConfig(target_modules=".*q_proj"))
    with pytest.raises(NothingToTrain, match="exclude_modules"):
        add_lora(model, LoraConfig(target_modules=["o_proj"], exclude_modules=["o_proj"]))
    for more, message in (
        ({"use_dora": True}, "use_dora=True is not valid: expected its default: that is more than a low-rank addition"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not valid: expected one of True, False, 'gaussian'"),
        ({"r": 0}, "r=0 is not valid: expected a positive number"),
    ):
        with pytest.raises(InvalidOption, match=message):
            add_lora(model, LoraConfig(**more))
    with pytest.raises(InvalidOption, match="config='dict' is not valid: expected a peft.LoraConfig"):
        add_lora(model, {"r": 4})
    with pytest.raises(InvalidOption, match=r"dropout=1.5 .* a probability in \[0, 1\)"):
        lora_config(dropout=1.5)
    add_lora(model)
    with pytest.raises(InvalidOption, match="merge_lora"):
        add_lora(model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackage, match=r"LoRA needs the package peft.*pip install 'rana-fx\[train\]'"):
        add_lora(model)


def test_quantised_factors_get_none():
    model, batch = build("plain", 1)
    rana_fx.adapt(model, [batch, *(ids() for _ in range(4))], budget=0.3, metric="bytes", recipe="rana", progress=False)
    added = names(add_lora(model, lora_config(rank=2)))
    factors = attached(model).factors
    floating = {f"rana_fx.{name}" for name, _ in factors.named_parameters(recurse=False)}
    assert any(not buffer.is_floating_point() for buffer in factors.buffers())
    assert all(name in floating for name in added if name.startswith("rana_fx."))
