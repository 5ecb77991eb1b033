"""A model of tiny blocks on disk with the embedded tokenizer, and the embedded text, as input files of benches."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import torch
import transformers

# a task of lm_eval on rows {{start, ends, label}} of a file
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


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
