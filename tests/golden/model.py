"""The model of the golden files; its weights are in ``weights.safetensors`` beside it, drawn once by numpy.

Linears are written in many forms: ``nn.Linear``, ``x @ W.T``, ``einsum``, ``x @ W`` and ``addmm`` with W stored (in, out), one
weight that holds gate and up. Nothing here may change: the names and digests of the weights are in the golden plans.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parent
WIDTH, FFN, VOCAB, HEADS = 8, 136, 24, 2  # FFN: more than one group of 128 columns


class Block(nn.Module):
    """``product`` is a separate method so that the fp64 reference of adapters can replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, name)(x)

    def attention(self, h: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.product(name, h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv")
        return self.product("o", F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Fused(Block):
    """Attention with Parameters instead of linear modules; gate and up are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in "qkv")  # v: (in, out)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate_up, self.down = nn.Linear(WIDTH, 2 * FFN, bias=False), nn.Linear(FFN, WIDTH)

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "q":
            return x @ self.q.T
        if name == "k":
            return torch.einsum("bti,oi->bto", x, self.k)
        return torch.matmul(x, self.v) if name == "v" else super().product(name, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        gate, up = self.product("gate_up", self.norm2(x)).chunk(2, dim=-1)
        return x + self.product("down", F.silu(gate) * up)


class Gated(Block):
    """Separate linears for gate and up; the linears of attention have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")
        self.gate, self.up = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        h = self.norm2(x)
        return x + self.product("down", F.silu(self.product("gate", h)) * self.product("up", h))


class Plain(Block):
    """An MLP without a gate, whose first weight is stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.zeros(WIDTH, FFN)), nn.Parameter(torch.zeros(FFN))
        self.down = nn.Linear(FFN, WIDTH)

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "up":
            return torch.addmm(self.up_bias, x.reshape(-1, WIDTH), self.up).view(*x.shape[:-1], FFN)
        return super().product(name, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.product("down", F.gelu(self.product("up", self.norm2(self.norm(x)))))


class Output(NamedTuple):
    logits: torch.Tensor


class Golden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Fused(), Gated(), Plain()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor) -> Output:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return Output(self.head(self.norm(x)))


def drawn(seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights: normal, scaled so that every matmul has outputs of about one. Gains of norms differ from one."""
    generator = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name, parameter in Golden().state_dict().items():
        values = torch.from_numpy(generator.standard_normal(tuple(parameter.shape), dtype=np.float32))
        if parameter.dim() == 1:
            weights[name] = 0.2 * values + float("norm" in name and name.endswith("weight"))
        else:
            weights[name] = values if name == "embed.weight" else values / (2 * np.sqrt(FFN if "down" in name else WIDTH / 4))
    return weights


def load(dtype: torch.dtype = torch.float32) -> Golden:
    """The model, in evaluation mode. A cast rounds to nearest: the same bits everywhere."""
    model = Golden()
    model.load_state_dict(safetensors.torch.load_file(FOLDER / "weights.safetensors"))
    return model.to(dtype).eval()


def ids(rows: int = 2, tokens: int = 6, *, step: int = 5) -> dict[str, torch.Tensor]:
    """Fixed tokens, different ones for every ``step``."""
    return {"input_ids": (torch.arange(rows * tokens).view(rows, tokens) * step + step // 2) % VOCAB}
