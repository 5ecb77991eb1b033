"""Recover quality by training an adapted model (docs/how-to/finetune.md).

In: a model with a plan attached. Out: the same model with trained factors and weights, and a plan that contains these factors.
"""

from rana_fx.integrations.accelerate import register_with_accelerate
from rana_fx.training.export import trained_plan
from rana_fx.training.loop import Training, train
from rana_fx.training.lora import add_lora, lora_config, merge_lora
from rana_fx.training.lora_files import load_lora, save_lora
from rana_fx.training.parameters import trainable
from rana_fx.training.rates import best_rate
from rana_fx.training.recompute import checkpoint_gradients
from rana_fx.training.settings import Settings
from rana_fx.training.thresholds import rethreshold

__all__ = [
    "Settings",
    "Training",
    "add_lora",
    "best_rate",
    "checkpoint_gradients",
    "load_lora",
    "lora_config",
    "merge_lora",
    "register_with_accelerate",
    "rethreshold",
    "save_lora",
    "train",
    "trainable",
    "trained_plan",
]
