"""Attention of decoded tokens by the Triton kernel: its numerics under the interpreter and on a GPU, and its configs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rana_fx.kernels.attention import decode_attention_reference
from rana_fx.kernels.triton.config import COUNTERS, Launch
from rana_fx.kernels.triton.decode_attention import AttentionConfig, decode_attention, default_config
from tests.support.attention import MASKS, mask_of

pytest.importorskip("triton")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EACH_DEVICE = pytest.mark.parametrize("device", DEVICES, indirect=True)


def operands(batch, heads, repeats, tokens, keys, width, out_width, dtype, device, seed=0):
    """Gaussian queries in memory (B, T, H, D), as a projection gives them, keys and values in a larger cache."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    q = randn(batch, tokens, heads * repeats, width).transpose(1, 2)
    k, v = randn(batch, heads, keys + 3, width)[:, :, 1 : keys + 1], randn(batch, keys, heads, out_width).transpose(1, 2)
    return q, k, v


def masked(kind, batch, heads, tokens, keys, dtype, device):
    mask = mask_of(kind, (batch, heads, tokens, keys), dtype, torch.Generator().manual_seed(0))
    return None if mask is None else mask.to(device)


def check(y, q, k, v, mask, scale):
    """Against fp64. Weights of v are rounded to its dtype: relative errors of eps, each of a term of y; of fp32 sums, eps of fp32
    and the root of their number; y is rounded once.
    """
    assert y.dtype == q.dtype and y.shape == (*q.shape[:3], v.shape[3]) and y.transpose(1, 2).is_contiguous()
    wide = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    exact = decode_attention_reference(q.double(), k.double(), v.double(), wide, scale)
    terms = decode_attention_reference(q.double(), k.double(), v.double().abs(), wide, scale)
    eps, single = torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps
    # a score is a sum of D products in fp32: its error times the weight's derivative, which is the weight
    scores = scale * (q.double().abs() @ k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1).mT).amax(
        -1, keepdim=True
    )
    bound = (eps + single * (math.sqrt(k.shape[2]) + 2 * math.sqrt(q.shape[3]) * scores + 8)) * terms + eps * exact.abs() + 1e-30
    assert bool(((y.double() - exact).abs() <= bound).all()), float(((y.double() - exact).abs() / bound).max())


@EACH_DEVICE
@settings(max_examples=10)
@given(data=st.data())
def test_matches_fp64(device, data):
    gpu = device.type == "cuda"
    # Triton interprets a matmul of bfloat16 as one of its bits
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, *([torch.bfloat16] if gpu else [])]))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    repeats, tokens = data.draw(st.sampled_from([1, 1, 2, 3, 8])), data.draw(st.sampled_from([1, 1, 2, 5, 16]))
    keys, width = data.draw(st.sampled_from([1, 31, 64, 130])), data.draw(st.sampled_from([1, 16, 24, 64, 80, 256]))
    out_width = data.draw(st.sampled_from([width, 16, 5]))
    q, k, v = operands(batch, heads, repeats, tokens, keys, width, out_width, dtype, device)
    kind = data.draw(st.sampled_from(MASKS))
    mask = masked(kind, batch, heads * repeats, tokens, keys, dtype, device)
    rows = repeats * tokens
    config = data.draw(st.sampled_from([None, AttentionConfig(1 if rows == 1 else 16, 16, 4, 2)]))
    y = decode_attention(q, k, v, mask, scale=0.3, config=config)
    check(y, q, k, v, mask, 0.3)
    assert torch.equal(y, decode_attention(q, k, v, mask, scale=0.3, config=config))
    if gpu:
        assert torch.equal(y, decode_attention(q, k, v, mask, scale=0.3, config=config, how=Launch(pdl=True)))


@EACH_DEVICE
def test_one_row_in_bfloat16(device):
    q, k, v = operands(2, 3, 1, 1, 130, 64, 64, torch.bfloat16, device)
    mask = masked("prefix", 2, 3, 1, 130, torch.bfloat16, device)
    check(decode_attention(q, k, v, mask, scale=0.125), q, k, v, mask, 0.125)


@EACH_DEVICE
def test_masked_keys_and_values_are_not_read(device):
    q, k, v = operands(1, 2, 1, 1, 200, 32, 32, torch.float32, device)
    mask = (torch.arange(200, device=device) % 3 == 0).expand(1, 1, 1, 200)
    y = decode_attention(q, k, v, mask, scale=0.2)
    k, v = (torch.where(mask[0, 0, 0, :, None], x, torch.nan) for x in (k, v))
    assert torch.equal(y, decode_attention(q, k, v, mask, scale=0.2))


@pytest.mark.filterwarnings("ignore:invalid value")
@EACH_DEVICE
def test_what_is_not_finite_is_in_the_result(device):
    q, k, v = operands(1, 1, 1, 1, 70, 16, 16, torch.float32, device)
    v[0, 0, 40, 3] = torch.nan
    y = decode_attention(q, k, v, scale=0.25)
    assert y.isnan().nonzero()[:, 3].tolist() == [3]
    k[0, 0, 7] = torch.inf
    assert bool(decode_attention(q, k, v, scale=0.25).isnan().all())


@EACH_DEVICE
def test_a_launch_leaves_its_counters_zero(device):
    q, k, v = operands(2, 2, 2, 3, 300, 16, 16, torch.float32, device)
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    y = decode_attention(q, k, v, scale=1.0, counters=counters, config=AttentionConfig(16, 32, 8, 2))
    check(y, q, k, v, None, 1.0)
    assert not counters.any()


@given(st.integers(1, 64), st.integers(1, 5000), st.sampled_from([16, 128, 256]), st.integers(1, 6000))
def test_default_configs_can_be_launched(rows, keys, width, heads):
    config = default_config(rows, keys, width, heads)
    assert config.block_m == 1 if rows == 1 else config.block_m in (16, 32)
    programs = heads * -(-rows // config.block_m)
    assert config.splits == 1 or (programs <= COUNTERS and config.splits <= -(-keys // config.block_s))
