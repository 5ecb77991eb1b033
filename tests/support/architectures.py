"""Tiny random models of many architectures, with the expected counts as functions of the depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

from rana_fx.calibration.layout import Layout
from tests.support.plain_llama import Output, PlainLlama, Sizes

WIDTH, FFN, VOCAB = 32, 48, 96


@dataclass(frozen=True)
class Counts:
    """Per model: linears, groups (linears over one tensor), MLP blocks, attention stacks, skipped weights."""

    sites: int
    groups: int
    blocks: int
    stacks: int
    skips: int = 0


def counts_of(layout: Layout) -> Counts:
    return Counts(len(layout.sites), len(layout.groups), len(layout.blocks), len(layout.stacks()), len(layout.skips))


@dataclass(frozen=True)
class Architecture:
    build: Callable[[int], nn.Module]
    inputs: Callable[[], Any]
    expected: Callable[[int], Counts]


class PlainBlock(nn.Module):
    """A block in plain PyTorch: matmul with a transposed weight, einsum, an (in, out) weight, chunked gate_up."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.k = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.v = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate_up = nn.Linear(WIDTH, 2 * FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q = h @ self.q.T
        k = torch.einsum("bti,oi->bto", h, self.k)
        v = torch.matmul(h, self.v)
        split = [t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v)]
        a = nn.functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class Plain(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([PlainBlock() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def ids(tokens: int = 12) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCAB - 3, (2, tokens))}


def _lm(kind: str, config: str, **extra: Any) -> Callable[[int], nn.Module]:
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def build(depth: int) -> nn.Module:
        settings = {key: (depth if value == "depth" else value) for key, value in extra.items()}
        return getattr(hf, kind)(getattr(hf, config)(**common, **settings))

    return build


_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": "depth",
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_LLAMA, "num_key_value_heads": 2}
_HEADS = {**_GQA, "head_dim": 8}
_GPT = {"n_embd": WIDTH, "n_layer": "depth", "n_head": 4, "n_positions": 64}


def _gated(n: int) -> Counts:  # q k v | o | gate up | down, head
    return Counts(7 * n + 1, 4 * n + 1, n, n)


def _fused(n: int) -> Counts:  # qkv | o | up (or gate_up) | down, head
    return Counts(4 * n + 1, 4 * n + 1, n, n)


def _encoder(n: int) -> Counts:  # qkv | o | up | down
    return Counts(4 * n, 4 * n, n, n)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_lm("LlamaForCausalLM", "LlamaConfig", **_GQA), ids, _gated),
    "mistral": Architecture(_lm("MistralForCausalLM", "MistralConfig", **_GQA), ids, _gated),
    "qwen2": Architecture(_lm("Qwen2ForCausalLM", "Qwen2Config", **_GQA), ids, _gated),
    "qwen3": Architecture(_lm("Qwen3ForCausalLM", "Qwen3Config", **_HEADS), ids, _gated),
    "gemma": Architecture(_lm("GemmaForCausalLM", "GemmaConfig", **_HEADS), ids, _gated),
    "gemma2": Architecture(_lm("Gemma2ForCausalLM", "Gemma2Config", **_HEADS), ids, _gated),
    "gpt_neox": Architecture(_lm("GPTNeoXForCausalLM", "GPTNeoXConfig", **_LLAMA), ids, _fused),
    "gpt2": Architecture(_lm("GPT2LMHeadModel", "GPT2Config", **_GPT), ids, _fused),
    "opt": Architecture(
        _lm(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=WIDTH,
            ffn_dim=FFN,
            num_hidden_layers="depth",
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=WIDTH,
        ),
        ids,
        lambda n: Counts(6 * n + 1, 4 * n + 1, n, n),
    ),
    # attention and MLP in parallel read one norm: q k v up | o | down
    "phi": Architecture(_lm("PhiForCausalLM", "PhiConfig", **_LLAMA), ids, lambda n: Counts(6 * n + 1, 3 * n + 1, n, n)),
    "phi3": Architecture(_lm("Phi3ForCausalLM", "Phi3Config", **_LLAMA), ids, _fused),
    "bloom": Architecture(_lm("BloomForCausalLM", "BloomConfig", hidden_size=WIDTH, n_layer="depth", n_head=4), ids, _fused),
    "falcon": Architecture(
        _lm("FalconForCausalLM", "FalconConfig", hidden_size=WIDTH, num_hidden_layers="depth", num_attention_heads=4),
        ids,
        lambda n: Counts(4 * n + 1, 3 * n + 1, n, n),
    ),
    "gptj": Architecture(
        _lm("GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=4), ids, lambda n: Counts(6 * n + 1, 3 * n + 1, n, n)
    ),
    "bert": Architecture(_lm("BertForMaskedLM", "BertConfig", **_LLAMA), ids, lambda n: Counts(6 * n + 2, 4 * n + 2, n, n)),
    # the convolution that embeds patches is skipped
    "vit": Architecture(
        lambda depth: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=WIDTH,
                intermediate_size=FFN,
                num_hidden_layers=depth,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
                num_labels=5,
            )
        ),
        lambda: {"pixel_values": torch.randn(3, 3, 16, 16)},
        lambda n: Counts(6 * n + 1, 4 * n + 1, n, n, 1),
    ),
    # the keys and values of every decoder layer read one tensor: the encoder's output
    "t5": Architecture(
        lambda depth: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=VOCAB, d_model=WIDTH, d_ff=FFN, d_kv=8, num_layers=depth, num_heads=4)
        ),
        lambda: {**ids(), "decoder_input_ids": torch.randint(3, VOCAB - 3, (2, 7))},
        lambda n: Counts(16 * n + 1, 4 * n + 6 * n + 2, 2 * n, 4 * n),
    ),
    # router, q k v, o; two expert weights per layer are skipped
    "mixtral": Architecture(
        _lm("MixtralForCausalLM", "MixtralConfig", **_GQA, num_local_experts=4),
        ids,
        lambda n: Counts(5 * n + 1, 3 * n + 1, 0, n, 2 * n),
    ),
    "qwen2_moe": Architecture(
        _lm(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **_GQA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        ),
        ids,
        lambda n: Counts(9 * n + 1, 4 * n + 1, n, n, 2 * n),
    ),
    "nn_encoder": Architecture(
        lambda depth: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, FFN, batch_first=True), depth),
        lambda: (torch.randn(2, 12, WIDTH),),
        _encoder,
    ),
    # what most tests of the package use
    "plain_llama": Architecture(lambda depth: PlainLlama(depth, Sizes(VOCAB, WIDTH, FFN)), ids, _gated),
    "plain_biased": Architecture(
        lambda depth: PlainLlama(depth, Sizes(VOCAB, WIDTH, FFN, bias=True, activation=nn.GELU)), ids, _gated
    ),
    "plain": Architecture(Plain, ids, lambda n: Counts(6 * n + 1, 4 * n + 1, n, n)),
}


def build(name: str, depth: int = 2) -> tuple[nn.Module, Any]:
    """A model, with weights large enough to affect the output, and a batch."""
    return make(ARCHITECTURES[name], depth)


def make(architecture: Architecture, depth: int = 2) -> tuple[nn.Module, Any]:
    """``build`` for any architecture."""
    torch.manual_seed(0)
    model = architecture.build(depth).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.15)
    return model, architecture.inputs()


def output(result: Any) -> torch.Tensor:
    """Logits of a model's output, or the tensor itself."""
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, Output):
        return result.logits
    return next(result[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in result)
