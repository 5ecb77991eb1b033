"""Architectures beside the first table: other forms of attention and MLP, other storage and use of weights.

Only the layout and the exactness of a full-rank plan are tested on these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from tests.support.architectures import _GQA, _HEADS, _LLAMA, FFN, VOCAB, WIDTH, Architecture, Counts, _lm, ids


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 6)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, heads, width) each; heads flattened in the result."""
    moved = [t.transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*moved, is_causal=True).transpose(1, 2).flatten(2)


def heads(t: torch.Tensor) -> torch.Tensor:
    return t.unflatten(-1, (4, -1))


class Block(nn.Module):
    """Attention with a fused qkv, and an MLP to be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(attend(*(heads(t) for t in self.qkv(self.norm(x)).chunk(3, -1))))

    def mlp(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(h)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm2(x))


class HeadEinsums(Block):
    """Einsums with heads as dimensions of weights, either operand order, and several summed dimensions."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv, self.o
        self.q, self.k, self.v = matrix(4, WIDTH, 8), matrix(4, 8, WIDTH), matrix(WIDTH, 4, 8)
        self.o = matrix(4, 8, WIDTH)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k = torch.einsum("bti,hid->bthd", h, self.q), torch.einsum("hdi,bti->bthd", self.k, h)
        v = torch.einsum("bti,ihd->bhtd", h, self.v)
        a = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1) @ v
        return torch.einsum("bhtd,hdi->bti", a, self.o)


class Packed(Block):
    """All weights of a block are rows of one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv, self.o, self.up, self.down
        self.w, self.b = matrix(4 * WIDTH + 2 * FFN, WIDTH), matrix(FFN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, o, up, down = self.w.split([WIDTH] * 4 + [FFN] * 2)
        h = self.norm(x)
        x = x + F.linear(attend(*(heads(F.linear(h, w)) for w in (q, k, v))), o)
        return x + F.gelu(F.linear(self.norm2(x), up, self.b)) @ down


class InPlace(Block):
    """The MLP overwrites its hidden rows, and two linears read one tensor before and after a write."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        h = self.up(self.norm2(x))
        h.relu_()
        h *= h
        x += self.down(h)
        n = self.norm2(x)
        rows = n.flatten(0, 1)
        first = self.before(rows)
        n.mul_(2)
        return x + (first + self.after(rows)).view_as(x)


class FusedIn(Block):
    """One linear makes q, k, v and the MLP's hidden rows; the MLP is parallel to attention."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv, self.up
        self.into = nn.Linear(WIDTH, 3 * WIDTH + FFN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *qkv, hidden = self.into(self.norm(x)).split([WIDTH] * 3 + [FFN], -1)
        return x + self.o(attend(*map(heads, qkv))) + self.down(F.gelu(hidden))


class Chained(Block):
    """Consecutive linears (a low-rank bypass), and an attention gate that reads the input of q, k, v."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = matrix(4, WIDTH), matrix(WIDTH, 4), nn.Linear(WIDTH, WIDTH)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        mixed = attend(*(heads(t) for t in self.qkv(h).chunk(3, -1))) * self.gate(h).sigmoid()
        return self.o(mixed) + mixed @ self.a.T @ self.b.T


class Unusual(Block):
    """Weights that cannot be adapted: computed, cast, also used transposed, multiplied from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, FFN))
        self.cast = nn.Parameter(torch.randn(WIDTH, WIDTH).bfloat16())
        self.tied, self.left = matrix(FFN, WIDTH), matrix(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        x = x + torch.relu(F.linear(self.norm2(x), self.tied)) @ self.tied
        return x + self.left @ F.linear(x, self.cast.to(x.dtype))


class SharedKeys(Block):
    """Keys of tokens and of a table of positions use one weight; post-norm order."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.positions = matrix(12, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads(layer(x)) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) + torch.einsum("bthd,shd->bhts", q, heads(self.k(self.positions)))
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
        x = self.norm(x + self.o(mixed))
        return self.norm2(x + self.mlp(x))


class Language(nn.Module):
    """Embedding, blocks of one kind, head."""

    def __init__(self, block: Callable[[], nn.Module], depth: int) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.blocks = nn.ModuleList([block() for _ in range(depth)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class CrossWidths(nn.Module):
    """nn.MultiheadAttention with keys and values of another width."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(WIDTH, 4, kdim=20, vdim=24, batch_first=True) for _ in range(depth)])

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, keys, values, need_weights=False)[0]
        return x


def _plain(block: type[nn.Module], expected: Callable[[int], Counts]) -> Architecture:
    return Architecture(lambda depth: Language(block, depth), ids, expected)


_SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_layers": "depth",
    "decoder_layers": "depth",
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
}
_TOWER = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_attention_heads": 4}


def _clip(depth: int) -> nn.Module:
    text = {"vocab_size": VOCAB, "max_position_embeddings": 64, "eos_token_id": 2, **_TOWER, "num_hidden_layers": depth}
    vision = {"image_size": 16, "patch_size": 4, **_TOWER, "num_hidden_layers": depth}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


FURTHER: dict[str, Architecture] = {
    # attention and a gated MLP in parallel, one norm
    "cohere2": Architecture(
        _lm("Cohere2ForCausalLM", "Cohere2Config", **_GQA), ids, lambda n: Counts(7 * n + 1, 3 * n + 1, n, n)
    ),
    # an activation with learned Parameters and buffers of its own
    "apertus": Architecture(
        _lm("ApertusForCausalLM", "ApertusConfig", **_GQA), ids, lambda n: Counts(6 * n + 1, 4 * n + 1, n, n)
    ),
    # gate and up of one linear, taken apart by a reshape
    "moshi": Architecture(
        _lm("MoshiForCausalLM", "MoshiConfig", **{**_GQA, "ffn_dim": 2 * FFN}), ids, lambda n: Counts(6 * n + 1, 4 * n + 1, n, n)
    ),
    # queries and keys through low ranks: q_a kv_a | q_b | kv_b | o; kv_a also holds the keys' rotary part
    "minicpm3": Architecture(
        _lm(
            "MiniCPM3ForCausalLM",
            "MiniCPM3Config",
            **_LLAMA,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        ids,
        lambda n: Counts(8 * n + 1, 6 * n + 1, n, 3 * n),
    ),
    "gpt_oss": Architecture(
        _lm("GptOssForCausalLM", "GptOssConfig", **_HEADS, num_local_experts=4, num_experts_per_tok=2),
        ids,
        lambda n: Counts(5 * n + 1, 3 * n + 1, 0, n, 2 * n),
    ),
    # one layer used n times; the embedding's projection, the head's two
    "albert": Architecture(
        _lm("AlbertForMaskedLM", "AlbertConfig", **_LLAMA, embedding_size=16), ids, lambda n: Counts(9, 7, 1, 1)
    ),
    # keys and queries are also applied to a table of relative positions
    "deberta_v2": Architecture(
        _lm(
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **_LLAMA,
            relative_attention=True,
            pos_att_type="c2p|p2c",
            position_buckets=8,
            share_att_key=True,
        ),
        ids,
        lambda n: Counts(6 * n + 2, 4 * n + 2, n, n),
    ),
    # q, k, v, o with heads as dimensions of the weights; r reads positions
    "xlnet": Architecture(
        _lm("XLNetLMHeadModel", "XLNetConfig", d_model=WIDTH, n_layer="depth", n_head=4, d_inner=FFN),
        ids,
        lambda n: Counts(7 * n + 1, 4 * n + 2, n, n),
    ),
    "bart": Architecture(
        _lm("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ, max_position_embeddings=64),
        lambda: {**ids(), "decoder_input_ids": torch.randint(3, VOCAB - 3, (2, 7))},
        lambda n: Counts(16 * n + 1, 10 * n + 2, 2 * n, 3 * n + n),
    ),
    # two towers, each with a projection into the space they share; one embeds patches by a convolution, which is skipped
    "clip": Architecture(
        _clip,
        lambda: {**ids(), "pixel_values": torch.randn(2, 3, 16, 16)},
        lambda n: Counts(12 * n + 2, 8 * n + 2, 2 * n, 2 * n, 1),
    ),
    # q and kv of cross-attention are parts of one weight; the kv of all layers read one memory
    "nn_transformer": Architecture(
        lambda depth: nn.Transformer(WIDTH, 4, depth, depth, FFN, batch_first=True),
        lambda: (torch.randn(2, 12, WIDTH), torch.randn(2, 7, WIDTH)),
        lambda n: Counts(12 * n, 10 * n + 1, 2 * n, 4 * n),
    ),
    "cross_widths": Architecture(
        CrossWidths,
        lambda: (torch.randn(2, 12, WIDTH), torch.randn(2, 7, 20), torch.randn(2, 7, 24)),
        lambda n: Counts(4 * n, 2 * n + 2, 0, 3 * n),
    ),
    "head_einsums": _plain(HeadEinsums, lambda n: Counts(6 * n + 1, 4 * n + 1, n, n)),
    "packed": _plain(Packed, lambda n: Counts(6 * n + 1, 4 * n + 1, n, n)),
    "in_place": _plain(InPlace, lambda n: Counts(6 * n + 1, 6 * n + 1, n, n)),
    "fused_in": _plain(FusedIn, lambda n: Counts(3 * n + 1, 3 * n + 1, 0, n)),
    "chained": _plain(Chained, lambda n: Counts(7 * n + 1, 5 * n + 1, n, n)),
    "unusual": _plain(Unusual, lambda n: Counts(3 * n + 1, 3 * n + 1, 0, n, 4 * n)),
    "shared_keys": _plain(SharedKeys, lambda n: Counts(6 * n + 1, 4 * n + 1, n, n)),
}
