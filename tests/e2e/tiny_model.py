"""A model of tiny blocks on disk, with the embedded tokenizer, and the embedded text: what a bench reads from folders."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import torch
import transformers


def saved_tiny(folder: Path, *, layers: int) -> tuple[Path, Path]:
    """(the model's folder, the text's file)."""
    data = Path(str(resources.files("rana_fx"))) / "data"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data / "tiny-llama-prose-5m" / name, folder / "model")
    return folder / "model", data / "eval.jsonl.xz"
