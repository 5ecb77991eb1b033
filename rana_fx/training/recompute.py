"""Gradient checkpointing of a model of transformers, in one graph.

In: a model. Out: the same model, which recomputes activations layer by layer in the backward pass: less memory, more time. Its
checkpointed regions are rewritten like the rest of the graph (rana_fx/graph/checkpoint_regions.py).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rana_fx.errors import InvalidOption
from rana_fx.modules import unwrap


def checkpoint_gradients(model: nn.Module) -> None:
    """Enable gradient checkpointing, before or after the trained Parameters are selected.

    Raises:
        InvalidOption: not a model of transformers.
    """
    network: Any = unwrap(model)
    if hasattr(network, "activation_checkpointing_enable"):  # its name from transformers 5.23 on
        network.activation_checkpointing_enable()
    elif hasattr(network, "gradient_checkpointing_enable"):
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        expected = "a model of transformers; call torch.utils.checkpoint.checkpoint in another's forward"
        raise InvalidOption(name="model", got=type(network).__name__, expected=expected)
    # a hook that makes frozen embeddings require gradients, for reentrant checkpointing; it causes a graph break
    if getattr(network, "_require_grads_hooks", None):
        network.disable_input_require_grads()
