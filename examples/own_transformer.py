"""A Transformer of one's own, in plain PyTorch: no config, no names that anything knows. Linears are found in its graph.

    python examples/own_transformer.py

It is trained on the bytes of the embedded texts, adapted, compiled, and compared with itself without the plan.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import rana_fx
from rana_fx.evaluation.text import load_texts

DATA = Path(rana_fx.__file__).parent / "data"


class Block(nn.Module):
    """Attention and MLP. A matmul with a matrix of one's own is a linear like any other."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Parameter(torch.randn(width, 4 * width) * 0.02)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(gelu(self.between(x) @ self.wide))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the next byte, in nats. ids: (B, T); the model returns (B, T, 256)."""
    return cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main(steps: int = 300, budget: float = 0.6) -> None:
    """Train for STEPS, adapt to BUDGET."""
    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(load_texts(DATA / "calib.jsonl.xz")).encode()))
    rows = text[: len(text) // 128 * 128].view(-1, 128)
    train, calibrate, test = rows[:-128], rows[-128:-64], rows[-64:]

    model = nn.Sequential(nn.Embedding(256, 128), Block(), Block(), nn.Linear(128, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss_of(model, train[torch.randint(len(train), (16,))]).backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    # a batch is what the model is called with: here a tensor
    plan = rana_fx.adapt(model, calibrate.split(16), budget=budget)
    print(plan)
    fast = torch.compile(model, backend=rana_fx.backend)
    with torch.no_grad():
        print(f"loss of the next byte, nats: dense {loss_of(model, test):.3f}, adapted {loss_of(fast, test):.3f}")


if __name__ == "__main__":
    typer.run(main)
