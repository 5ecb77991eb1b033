"""Names of graph inputs.

In: a placeholder or attribute of a Dynamo graph. Out: the dotted name of its weight in the model, the text of Dynamo's source, or
what a dotted name stands for.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

from rana_fx.graph.real_values import source_of


def source_text(node: fx.Node) -> str:
    """The text of Dynamo's source of a graph input, or ""."""
    source = source_of(node)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)


def source_name(node: fx.Node) -> str:
    """Dotted name of a graph input without ``.weight``, by Dynamo's source (relative to the compiled callable) or its target."""
    text = source_text(node)
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    return site_name(".".join(parts) or str(node.target))


def site_name(parameter_name: str) -> str:
    """The name of a site: that of its weight without a final ``.weight``, such as ``model.layers.0.mlp.up_proj``."""
    return parameter_name.removesuffix(".weight")


def attribute_at(module: nn.Module | None, name: object) -> Any:
    """The attribute of a dotted name, such as the target of a ``get_attr`` node; None where there is none."""
    found: Any = module
    for part in str(name).split("."):
        found = getattr(found, part, None)
    return found
