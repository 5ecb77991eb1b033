"""What a graph input is called: by its weight's name in the model, or by where Dynamo found it."""

from __future__ import annotations

import re

from torch import fx

from rana_fx.graph.real_values import source_of


def source_text(node: fx.Node) -> str:
    """Dynamo's source of a graph input as it writes it, or ""."""
    source = source_of(node)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)


def source_name(node: fx.Node) -> str:
    """Dotted name of a graph input, from Dynamo's source (relative to the compiled callable) or the attribute."""
    text = source_text(node)
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    return site_name(".".join(parts) or str(node.target))


def site_name(parameter_name: str) -> str:
    """A site is called after its weight, without a final ``.weight``: ``model.layers.0.mlp.up_proj``."""
    return parameter_name.removesuffix(".weight")
