"""Causal language models by shape: published configurations with random weights, created on the target device.

In: a name of ``SHAPES``, a local folder or a hub name. Out: a model in evaluation mode, all weights with ``requires_grad=False``.
Latency depends on shapes and dtypes only, so a latency bench needs no checkpoint. Weights have variance 1 / in_features: every
linear preserves the scale of its input, and activations stay finite at any depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rana_fx.evaluation.perplexity import load_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def _llama(**given: Any) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False} | given)


def _gemma(**given: Any) -> PretrainedConfig:
    from transformers import GemmaConfig

    return GemmaConfig(**{"max_position_embeddings": 8192, "tie_word_embeddings": True} | given)


def _neox(**given: Any) -> PretrainedConfig:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**{"max_position_embeddings": 2048, "use_parallel_residual": True, "tie_word_embeddings": False} | given)


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-2-7b": lambda: _llama(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    ),
    "llama-3-8b": lambda: _llama(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
    ),
    "gemma-2b": lambda: _gemma(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1,
        head_dim=256, vocab_size=256000,
    ),
    "pythia-1.4b": lambda: _neox(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16, vocab_size=50304
    ),
    # TinyLlama's shape: a CPU decodes one token in about a quarter of a second
    "llama-1b": lambda: _llama(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048,
    ),
    "tiny": lambda: _llama(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=256,
    ),
}  # fmt: skip


def build(source: str, *, device: torch.device, dtype: str, seed: int = 0) -> PreTrainedModel:
    """A model of a known shape with random weights, or the checkpoint that ``source`` names.

    Args:
        dtype: "bfloat16", "float16" or "float32".

    Raises:
        ModelError: ``source`` is neither a shape nor a checkpoint.
    """
    if source not in SHAPES:
        model, _ = load_model(source, dtype=dtype, device=str(device))
        return model.requires_grad_(False)
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            SHAPES[source](), dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    made.eval().requires_grad_(False)
    fill(made, seed=seed)
    return made


def fill(model: nn.Module, *, seed: int) -> None:
    """In place: normal weights of variance 1 / in_features in linears and embeddings, zero biases; norms are unchanged."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            generator = torch.Generator(module.weight.device).manual_seed(seed)
            seed += 1
            with torch.no_grad():
                module.weight.normal_(0, module.weight.shape[1] ** -0.5, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()


def layers_of(model: PreTrainedModel) -> int:
    """Number of transformer blocks."""
    return int(model.config.get_text_config().num_hidden_layers)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Size of the vocabulary."""
    return int(model.config.get_text_config().vocab_size)
