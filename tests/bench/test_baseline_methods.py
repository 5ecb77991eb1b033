"""The baselines of bench.quality: stored values and cost of roundings; the emulated SliceGPT equals a sliced model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from bench.common.calibrated import calibrate_once
from bench.quality.methods import MethodBuilder, Planned, Rounded, swapped
from bench.quality.quantised import Rounder, rounded, rounding_of
from bench.quality.slicegpt import Sliced, _kept, sliced, stream_of
from rana_fx.calibration.calibrate import calibrate
from rana_fx.errors import BudgetUnreachable, InvalidOption

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def model(kind="Llama", **extra):
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **extra})
    if kind == "Gemma":
        config.num_key_value_heads, config.head_dim = 1, 8
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # gains and biases that affect the output
            parameter.normal_(1.0 if parameter.dim() == 1 and "weight" in name else 0.0, 0.3)
    return made


def batches(count=9, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(64, (4, 32), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "use_cache": False} for i in (i.to(device) for i in ids)]


# ---- roundings


def test_names_of_roundings():
    assert rounding_of("rana") is None and rounding_of("int9") is None and rounding_of("int4-g") is None
    found = rounding_of("gptq3-g128-asym")
    assert (found.bits, found.group, found.symmetric, found.optimal) == (3, 128, False, True)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("int8", 8 / 16 + 16 / 256 / 16),
        ("int4-g64", 4 / 16 + 16 / 64 / 16),
        ("gptq3-g128", 3 / 16 + 16 / 128 / 16),
        ("int4-g64-asym", 4 / 16 + (16 + 4) / 64 / 16),
    ],
)
def test_bytes_count_scales_and_zero_points(name, share):
    assert rounding_of(name).bytes_of(10, 256) == pytest.approx(share * 2 * 10 * 256)


def test_a_group_cut_short_has_a_scale_as_well():
    assert rounding_of("int4-g64").bytes_of(1, 65) == 65 / 2 + 2 * 2


@given(
    out=st.integers(1, 5),
    width=st.integers(1, 150),
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 64, 128]),
    asym=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rounding_to_nearest_stays_within_half_a_step(out, width, bits, group, asym, seed):
    name = f"int{bits}" + (f"-g{group}" if group else "") + ("-asym" if asym else "")
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) + 0.3
    found = rounded(weight, rounding_of(name), None)
    length = group or width
    for start in range(0, width, length):
        part, got = weight[:, start : start + length], found[:, start : start + length]
        if asym:
            step = (part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)) / (2**bits - 1)
            reach = 1.0  # the zero point is rounded, which may clip another half step
        else:
            step, reach = part.abs().amax(1) / (2 ** (bits - 1) - 1), 0.5
        # the scale is stored in bfloat16: up to 2^-8 of the range is clipped, and steps are as much longer
        slack = reach * step * (1 + 2**-8) + part.abs().amax(1) * 2**-8
        assert ((part - got).abs().amax(1) <= slack + 1e-6).all()
        assert all(len(row.unique()) <= 2**bits for row in got)


def test_weights_on_the_grid_are_kept():
    weight = torch.randint(-7, 8, (6, 128)).float() * 0.5
    weight[:, ::64] = 3.5
    for name in ("int4-g64", "gptq4-g64"):
        torch.testing.assert_close(rounded(weight, rounding_of(name), torch.eye(128)), weight, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", ["", "-asym"])
def test_gptq_loses_less_than_nearest_on_its_inputs(suffix):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(192, 192, generator=generator) * torch.logspace(0, -2, 192)
    x = torch.randn(2000, 192, generator=generator) @ mix
    weight = torch.randn(64, 192, generator=generator)
    moment = x.double().t() @ x.double()

    def loss(name):
        return float(
            (x @ (rounded(weight, rounding_of(name + suffix), moment if "gptq" in name else None) - weight).t()).square().sum()
        )

    assert loss("gptq3-g64") < 0.5 * loss("int3-g64")


def test_only_counted_weights_are_rounded_and_they_are_restored(device):
    dense, batch = model("GPTNeoX").to(device), batches(1, device)[0]
    calibrated = calibrate_once(dense, batches())
    builder = MethodBuilder(dense, calibrated, batches(), metric="bytes", progress=False)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    expected = dense(**batch).logits
    plan = builder.at_budget("teal", 0.5)
    assert isinstance(plan, Planned)
    with plan.on(dense):  # changes the storage of weights
        pass
    method = builder.rounded(rounding_of("gptq2-g64"))
    assert isinstance(method, Rounded)
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    inside = {f"{site.name}.weight" for site in calibrated.layout.sites.values() if site.counted}
    assert {names[id(parameter)] for parameter in method.weights} == inside and len(inside) == 8
    with method.on(dense) as running:
        moved = running.adapted(**batch).logits
        assert float((moved - expected.detach()).abs().max()) > 0.01
        torch.testing.assert_close(running.dense(**batch).logits, expected, rtol=0, atol=0)
        assert running.measured() == {"flops": 1.0, "bytes": method.bytes}
    with swapped(method.weights):
        for parameter, value in method.weights.items():
            site = calibrated.layout.sites[names[id(parameter)].removesuffix(".weight")]
            assert parameter.data_ptr() == value.data_ptr()
            # 2 bits, symmetric: three numbers, and one scale per group of 64
            assert all(len(row.unique()) <= 3 * -(-len(row) // 64) - (len(row) > 64) for row in value)
            assert value.shape == (site.out_features, site.in_features)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_a_transposed_weight_is_rounded_along_its_inputs():
    weight = torch.nn.Parameter(torch.randn(32, 8))  # Conv1D: (in, out)
    site = SimpleNamespace(name="c", weight=weight, view=weight.detach().t(), out_features=8, in_features=32, uses=1, group=0)
    problem = SimpleNamespace(layout=SimpleNamespace(sites={"c": site}), counted=lambda: ("c",), bytes=lambda _: 32 * 8 * 4.0)
    rounder = Rounder(problem)
    (found,) = rounder.weights(rounding_of("int4")).values()
    torch.testing.assert_close(found.t(), rounded(weight.detach().t(), rounding_of("int4"), None))
    assert rounder.bytes_kept(rounding_of("int4")) == (4 / 32 + 16 / 32 / 32)
    site.view = site.view.contiguous()
    with pytest.raises(InvalidOption, match="c reads a copy"):
        Rounder(problem).weights(rounding_of("int4"))


# ---- SliceGPT


def layout_of(dense):
    return calibrate(dense, batches(1), progress=False).layout


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "GPTNeoX"])
def test_all_dimensions_are_the_dense_model(kind, device):
    dense, batch = model(kind).to(device), batches(1, device)[0]
    stream = stream_of(dense)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q.to(device)
    expected = dense(**batch).logits
    with Sliced(stream, (basis,) * len(stream.points), 1.0).acting():
        got = dense(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    torch.testing.assert_close(dense(**batch).logits, expected, rtol=0, atol=0)


def test_projecting_is_slicing(device):
    """Against a Llama with sliced matrices, as in the paper."""
    dense, batch = model().to(device), batches(1, device)[0]
    found = sliced(dense, layout_of(dense), budget=0.7, batches=batches(3))
    with torch.no_grad(), found.acting():
        got = dense(**batch).logits
    small, q = copy.deepcopy(dense), found.directions
    spent, blocks = 0, small.model.layers
    shortcuts = [q[i].t() @ q[i + 1] for i in range(3)] + [q[3].t()]

    def slice_(linear, left=None, right=None):
        nonlocal spent
        weight = linear.weight.data if right is None else linear.weight.data @ right
        linear.weight.data = weight if left is None else left.t() @ weight
        spent += linear.weight.numel()

    def norm(x, eps):
        return x * (x.square().sum(-1, keepdim=True) / 32 + eps).rsqrt()

    for i, block in enumerate(blocks):
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            slice_(linear, right=block.input_layernorm.weight.data[:, None] * q[2 * i])
        slice_(block.self_attn.o_proj, left=q[2 * i + 1])
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            slice_(linear, right=block.post_attention_layernorm.weight.data[:, None] * q[2 * i + 1])
        slice_(block.mlp.down_proj, left=q[2 * i + 2] if i == 0 else None)
    spent += sum(shortcut.numel() for shortcut in shortcuts)
    with torch.no_grad():
        eps = small.config.rms_norm_eps
        x = small.model.embed_tokens(batch["input_ids"])
        places = small.model.rotary_emb(x, position_ids=torch.arange(32, device=device)[None])
        x = x @ q[0]
        for i, block in enumerate(blocks):
            attended, _ = block.self_attn(norm(x, eps), position_embeddings=places, attention_mask=None)
            x = x @ shortcuts[2 * i] + attended
            x = x @ shortcuts[2 * i + 1] + block.mlp(norm(x, eps))
        expected = small.lm_head(small.model.norm(x))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))
    whole = sum(site.flops for site in layout_of(dense).sites.values() if site.counted)
    assert found.cost == pytest.approx(spent / whole) and 0.6 < found.cost <= 0.7


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_a_stream_of_few_directions_survives_slicing(kind):
    # embeddings and outputs of blocks in a subspace of 8 dimensions (and, for LayerNorm, any mean)
    dense = model(kind)
    basis = torch.linalg.qr(torch.randn(32, 8)).Q
    project = basis @ basis.t()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if (
                any(word in name for word in ("embed", "o_proj", "down_proj", "attention.dense", "4h_to_h"))
                and "embed_out" not in name
            ):
                side = parameter if "embed" in name or parameter.dim() == 1 else parameter.t()
                side.copy_(side @ project)
    batch = batches(1)[0]
    expected = dense(**batch).logits
    kept = _kept(dense, layout_of(dense), stream_of(dense), 0.6)[0]
    assert 9 <= kept < 32
    with sliced(dense, layout_of(dense), budget=0.6, batches=batches(3)).acting():
        got = dense(**batch).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.detach().abs().max()))


def test_a_parallel_block_has_one_point_and_one_shortcut():
    dense = model("GPTNeoX")
    stream, layout = stream_of(dense), layout_of(dense)
    assert len(stream.points) == 2 and stream.centred
    kept, cost = _kept(dense, layout, stream, 0.8)
    # reads: qkv 96, up 80; writes: o 32, down 80 inputs, in the last block to all 32 dimensions
    spent = kept * 2 * (96 + 80) + (kept + 32) * (32 + 80) + kept * kept + kept * 32
    assert cost == pytest.approx(spent / (2 * (96 + 80 + 32 + 80) * 32)) and cost <= 0.8
    sequential = stream_of(model("GPTNeoX", use_parallel_residual=False))
    assert len(sequential.points) == 4


def test_what_cannot_be_sliced_is_refused():
    with pytest.raises(InvalidOption, match="slicegpt for a model of type 'opt'.*gpt_neox"):
        stream_of(transformers.OPTForCausalLM(transformers.OPTConfig(**SHAPE, ffn_dim=80)))
    dense = model()
    with pytest.raises(BudgetUnreachable, match="slicegpt"):
        sliced(dense, layout_of(dense), budget=0.05, batches=batches(1))
