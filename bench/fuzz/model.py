"""The Transformer that a ``Spec`` describes, in plain PyTorch.

In: a spec. Out: a module over token ids (sequences, tokens). The attributes ``Lin.replacement`` and ``Mlp.gate_mask``, None
unless the oracle sets them, replace the computation of a linear and mask a gate. The rest is code as models contain it: other
forms of a linear, writes between readers, casts, caches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.fuzz.spec import Spec

VOCAB = 40
CONTEXT = 64  # tokens of a static cache
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64, torch.float64: torch.float64}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
Cache = list[tuple[Tensor, Tensor]]


class Lin(nn.Module):
    """A linear in one of the spec's forms; the weight of "by_inputs" is (in, out)."""

    def __init__(self, spec: Spec, width: int, out: int) -> None:
        super().__init__()
        self.form = spec.form
        weight = torch.randn(out, width) * (1.5 / width**0.5)
        self.weight = nn.Parameter(weight.t().contiguous() if spec.form == "by_inputs" else weight)
        self.bias = nn.Parameter(torch.randn(out) / 3) if spec.bias else None
        self.replacement: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.replacement is not None:
            return self.replacement(x)
        return self.dense(x)

    def dense(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        if self.form in ("linear", "by_inputs") or (self.form == "addmm" and b is None):
            y = F.linear(x, w, b) if self.form != "by_inputs" else x @ w
            return y + b if self.form == "by_inputs" and b is not None else y
        if self.form == "addmm":
            assert b is not None
            return torch.addmm(b, x.reshape(-1, x.shape[-1]), w.t()).view(*x.shape[:-1], w.shape[0])
        if self.form == "matmul":
            y = torch.matmul(x, w.mT)
        elif self.form == "tensordot":
            y = torch.tensordot(x, w, dims=([x.dim() - 1], [1]))
        else:
            y = torch.einsum("...i,oi->...o", x, w)
        return y if b is None else y + b

    def matrix(self) -> Tensor:
        """The weight as (out, in)."""
        return self.weight.t() if self.form == "by_inputs" else self.weight


class Rms(nn.Module):
    """Root-mean-square norm over the last dimension, with a weight (width,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(width) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def _norm(spec: Spec) -> nn.Module:
    return {"layer": nn.LayerNorm, "rms": Rms}.get(spec.norm, lambda _: nn.Identity())(spec.width)


def _write(spec: Spec, y: Tensor) -> Tensor:
    """Write into ``y``, which other linears have read, in the way that the spec names."""
    if spec.write == "in_place":
        y.mul_(1.5)
    elif spec.write == "out":
        torch.mul(y, -1.5, out=y)
    elif spec.write == "slice":
        y[..., : y.shape[-1] // 2] = 0.5 * y[..., y.shape[-1] - y.shape[-1] // 2 :].clone()
    elif spec.write == "view":
        y.view(-1, y.shape[-1])[:, 0].add_(1.0)
    elif spec.write == "copy":
        y.copy_(y * 0.7)
    elif spec.write == "foreach":
        torch._foreach_mul_([y], 0.6)
    return y


class Attention(nn.Module):
    """Self-attention over (sequences, tokens, width); returns the output, and the keys and values with those of the cache."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.size = spec, spec.width // spec.heads
        keys = 1 if spec.attention == "shared_keys" else spec.heads
        self.keys = keys
        sizes = (spec.width, keys * self.size, keys * self.size)
        if spec.attention == "packed":
            self.qkv = Lin(spec, spec.width, sum(sizes))
        else:
            self.q, self.k, self.v = (Lin(spec, spec.width, size) for size in sizes)
        self.o = Lin(spec, spec.width, spec.width)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None, start: Tensor | None) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        if self.spec.attention == "packed":
            q, k, v = self.qkv(x).split([self.spec.width, self.keys * self.size, self.keys * self.size], -1)
        elif self.spec.write in ("none", "hidden"):
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            x = x.clone()
            q = self.q(x)
            x = _write(self.spec, x)
            k, v = self.k(x), self.v(x)
        q, k, v = (part.view(batch, tokens, -1, self.size).transpose(1, 2) for part in (q, k, v))
        mask = None
        if cache is not None and start is not None:
            positions = start + torch.arange(tokens, device=x.device)
            if self.spec.cache == "static":
                k, v = cache[0].index_copy_(2, positions, k), cache[1].index_copy_(2, positions, v)
            else:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            mask = torch.arange(k.shape[2], device=x.device) <= positions[:, None]
        kept = (k, v)
        k, v = (part.expand(-1, self.spec.heads, -1, -1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(y.transpose(1, 2).reshape(batch, tokens, self.spec.width)), *kept


class Mlp(nn.Module):
    """A plain, gated or packed (gate and up in one weight) MLP, (..., width) to (..., width)."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.act = spec, ACTIVATIONS[spec.activation]
        if spec.mlp == "packed":
            self.gate_up = Lin(spec, spec.width, 2 * spec.ffn)
        else:
            self.up = Lin(spec, spec.width, spec.ffn)
            self.gate = Lin(spec, spec.width, spec.ffn) if spec.mlp == "gated" else None
        self.down = Lin(spec, spec.ffn, spec.width)
        self.gate_mask: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.mlp == "packed":
            gate, up = self.gate_up(x).chunk(2, -1)
        else:
            gate, up = (None if self.gate is None else self.gate(x)), self.up(x)
        a = self.act(up if gate is None else gate)
        if self.spec.cast == "gate":
            a = a.to(WIDER[a.dtype]).to(a.dtype)
        if self.gate_mask is not None:
            a = self.gate_mask(a)
        h = a if gate is None else a * up
        if self.spec.dropout == "hidden":
            h = F.dropout(h, 0.3, False)
        elif self.spec.dropout == "training":
            h = F.dropout(h, 0.0, True)
        if self.spec.cast == "hidden":
            h = h.to(WIDER[h.dtype]).to(h.dtype)
        if self.spec.write == "hidden":
            h.mul_(1.25)
        if self.spec.branch == "break_in_mlp":
            torch._dynamo.graph_break()
        return self.down(h)


class Block(nn.Module):
    """A layer: attention and MLP with their norms and residuals, with the branch, cast and hook of the spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.attention = None if spec.attention == "none" else Attention(spec)
        self.mlp = Mlp(spec)
        self.norm, self.norm2 = _norm(spec), _norm(spec)
        if spec.branch == "hook":
            self.mlp.down.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None, start: Tensor | None) -> tuple[Tensor, ...]:
        y = self.norm(x)
        if self.spec.cast == "input":
            y = y.to(WIDER[y.dtype]).to(y.dtype)
        kept: tuple[Tensor, ...] = ()
        read = y
        if self.attention is not None:
            out, *rest = self.attention(y, cache, start)
            kept = tuple(rest)
            x = x + (F.dropout(out, 0.3, False) if self.spec.dropout == "residual" else out)
        if not self.spec.parallel:
            read = self.norm2(x)
        return x + self._mlp(read), *kept

    def _mlp(self, x: Tensor) -> Tensor:
        if self.spec.branch == "checkpoint":
            return torch.utils.checkpoint.checkpoint(self.mlp, x, use_reentrant=False)
        if self.spec.branch == "python" and x.shape[1] == 2:
            return self.mlp(x * 0.5)
        if self.spec.branch == "cond":
            return torch.cond(x[0, 0].abs().sum() > 1e-3, self.mlp, lambda x: x * 0.5, (x,))
        return self.mlp(x)


class Transformer(nn.Module):
    """Token ids (sequences, tokens) to logits (sequences, tokens, VOCAB), and the cache of each layer."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(VOCAB, spec.width)
        blocks = [Block(spec) for _ in range(1 if spec.shared else spec.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(spec.width, VOCAB, bias=False)
        if spec.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, cache: Cache | None = None, start: Tensor | None = None) -> tuple[Tensor, Cache]:
        x, kept = self.embed(ids), []
        for layer in range(self.spec.layers):
            block = self.blocks[layer % len(self.blocks)]
            x, *rest = block(x, None if cache is None else cache[layer], start)
            if len(rest) == 2:
                kept.append((rest[0], rest[1]))
            if self.spec.branch == "break":
                torch._dynamo.graph_break()
        return self.head(x), kept


def build(spec: Spec) -> Transformer:
    """The model with weights drawn from the spec's seed, in the spec's dtype, in evaluation mode."""
    torch.manual_seed(spec.seed)
    return Transformer(spec).to(getattr(torch, spec.dtype)).eval()


def empty_cache(spec: Spec, sequences: int, like: Tensor) -> Cache:
    """An empty cache, (sequences, heads, tokens, features): "static" has room for ``CONTEXT`` tokens, "growing" for none."""
    keys = 1 if spec.attention == "shared_keys" else spec.heads
    shape = (sequences, keys, CONTEXT if spec.cache == "static" else 0, spec.width // spec.heads)
    return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(spec.layers)]
