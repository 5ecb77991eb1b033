"""Checksum of saved values, independent of the file format.

In: tensors, numbers and strings in dictionaries and lists. Out: a SHA-256 over types, order, names, dtypes, shapes and bytes.
"""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor

from rana_fx.plan import tensor_bytes


def checksum(value: Any) -> str:
    """The SHA-256 in hex digits. Raises TypeError for values of other types than those listed above."""
    state = hashlib.sha256()
    _add(state, value)
    return state.hexdigest()


def _add(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        state.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        state.update(tensor_bytes(value))
    elif isinstance(value, dict):
        state.update(f"dict {len(value)} ".encode())
        for key, inner in value.items():
            _add(state, key)
            _add(state, inner)
    elif isinstance(value, list | tuple):
        state.update(f"{type(value).__name__} {len(value)} ".encode())
        for inner in value:
            _add(state, inner)
    elif value is None or isinstance(value, str | bool | int | float):
        text = repr(value).encode("utf-8", "surrogatepass")
        state.update(f"{type(value).__name__} {len(text)} ".encode() + text)
    else:
        raise TypeError(f"a {type(value).__name__} has no checksum")
