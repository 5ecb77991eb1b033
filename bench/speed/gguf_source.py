"""The GGUF file of a model in memory, for llama.cpp: all of its weights as they are, and no tokenizer.

In: a model of transformers (Llama, Gemma, GPT-NeoX). Out: a file whose matrices have the dtype of the model and whose vectors are
fp32, as llama.cpp wants them: nothing is rounded. Both engines are fed token ids, so the file says that it has no vocabulary.

Values are stored as llama.cpp multiplies by them, which differs from transformers in three places: rows of queries and keys of a
Llama are in the order of its rotary embedding (neighbours, not halves), norms of Gemma include their 1, and queries, keys and
values of GPT-NeoX are not interleaved by head.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rana_fx.errors import InvalidOption, MissingPackage

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def package() -> Any:
    """The module ``gguf``. Raises MissingPackage."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingPackage(what="a GGUF file", package="gguf", extra="llama") from error


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write the model's weights and hyperparameters.

    Raises:
        MissingPackage: without the package gguf.
        InvalidOption: an architecture or a rotary embedding that this does not write.
    """
    gguf, config = package(), model.config
    change = _CHANGES.get(config.model_type)
    rope = config.rope_parameters if change is not None else {}
    if change is None or rope.get("rope_type", "default") != "default":
        raise InvalidOption(
            name="--variants llama.cpp",
            got=f"a model of type {config.model_type}",
            expected=f"one of {', '.join(_CHANGES)} with a plain rotary embedding, or the checkpoint's own file (--gguf)",
        )
    architecture = gguf.MODEL_ARCH[config.model_type.replace("_", "").upper()]
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    _write_facts(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    # tied weights are listed once
    found = dict(model.named_parameters())
    for name, parameter in found.items():
        stored, raw = _stored(torch.empty_like(parameter, device="meta"), gguf)
        size = stored.numel() * stored.element_size()
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if named is None:
            raise ValueError(f"{name} has no name in GGUF")
        dtype = torch.empty(0, dtype=stored.dtype).numpy().dtype
        writer.add_tensor_info(named, tuple(stored.shape), dtype, size, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parameter in found.items():  # one at a time: a second copy of all would not fit for a large model
        stored, _ = _stored(change(name, parameter.detach(), config).contiguous(), gguf)
        writer.write_tensor_data(stored.numpy())
    writer.close()


def read_bytes(path: Path) -> int:
    """Bytes of the matrices in a file that each token multiplies by: all but an embedding that is not the output head, too."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in package().GGUFReader(path).tensors if len(tensor.shape) == 2}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def _write_facts(writer: Any, config: PretrainedConfig) -> None:
    """Hyperparameters, by the names of GGUF."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gpt_neox":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_parallel_residual(config.use_parallel_residual)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _stored(tensor: Tensor, gguf: Any) -> tuple[Tensor, Any]:
    """The tensor as it is written, and its type where numpy has none: bf16 is written as bytes."""
    if tensor.dim() == 1:
        return tensor.float(), None
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint8), gguf.GGMLQuantizationType.BF16
    return tensor, None


def _llama(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _gemma(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _gpt_neox(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    if "query_key_value" not in name:
        return tensor
    return tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)


_CHANGES: dict[str, Callable[[str, Tensor, Any], Tensor]] = {"llama": _llama, "gemma": _gemma, "gpt_neox": _gpt_neox}
