"""A small Llama of plain modules, with the names, shapes and operations of Hugging Face's.

Dynamo traces it in a third of the time, since there is no configuration, cache or mask factory around it. For tests whose subject
is the package; what transformers adds (generation, caches, saving, trainers) is tested with its own models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

EPS, THETA = 1e-6, 10000.0


@dataclass(frozen=True)
class Sizes:
    """``shared``: heads of keys and values. ``bias``: of all linears but the head."""

    vocab: int
    width: int
    inner: int
    heads: int = 4
    shared: int = 2
    bias: bool = False
    activation: Callable[[], nn.Module] = nn.SiLU

    @property
    def head(self) -> int:
        return self.width // self.heads


class Output(NamedTuple):
    logits: torch.Tensor


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * wide.to(x.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head, self.attention_dropout = sizes.head, 0.0
        inner, shared = sizes.heads * sizes.head, sizes.shared * sizes.head
        self.q_proj = nn.Linear(sizes.width, inner, bias=sizes.bias)
        self.k_proj = nn.Linear(sizes.width, shared, bias=sizes.bias)
        self.v_proj = nn.Linear(sizes.width, shared, bias=sizes.bias)
        self.o_proj = nn.Linear(inner, sizes.width, bias=sizes.bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.head)
        q = rotated(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = rotated(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.width, sizes.inner, bias=sizes.bias)
        self.up_proj = nn.Linear(sizes.width, sizes.inner, bias=sizes.bias)
        self.down_proj = nn.Linear(sizes.inner, sizes.width, bias=sizes.bias)
        self.act_fn = sizes.activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(sizes), MLP(sizes)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(sizes.width), RMSNorm(sizes.width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, depth: int, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.width)
        self.layers = nn.ModuleList([DecoderLayer(sizes) for _ in range(depth)])
        self.norm = RMSNorm(sizes.width)
        self.register_buffer("inv_freq", THETA ** (-torch.arange(0, sizes.head, 2).float() / sizes.head), persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device).float(), self.inv_freq.float()).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        mask = None if attention_mask is None else self.mask(attention_mask, x)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)

    def mask(self, attention_mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Added to scores: finite, so that tokens in front of the first real one attend to something."""
        tokens = torch.arange(x.shape[1], device=x.device)
        seen = (tokens[:, None] >= tokens) & attention_mask.bool()[:, None, None]
        return torch.zeros((), dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)


class PlainLlama(nn.Module):
    """A causal language model."""

    def __init__(self, depth: int, sizes: Sizes) -> None:
        super().__init__()
        self.model = Decoder(depth, sizes)
        self.lm_head = nn.Linear(sizes.width, sizes.vocab, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, use_cache: bool = False) -> Output:
        assert not use_cache  # there is none; tests of several models switch it off
        return Output(self.lm_head(self.model(input_ids, attention_mask)))


def plain_of(model: Any, *, layers: int | None = None) -> PlainLlama:
    """A Llama of Hugging Face, or so many of its first layers, as plain modules with the same weights."""
    config, state = model.config, model.state_dict()
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (EPS, THETA)
    sizes = Sizes(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
    )
    made = PlainLlama(layers or config.num_hidden_layers, sizes).to(model.dtype).eval()
    made.load_state_dict({name: state[name] for name in made.state_dict()})
    return made
