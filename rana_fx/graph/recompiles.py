"""Compiled variants of a model beyond Dynamo's recompile limit.

Dynamo compiles a function at most ``torch._dynamo.config.recompile_limit`` times (8) for one module, and runs it eagerly from
then on, with a warning. For a dense model that only costs time. An adapted model would return other results: those of the dense
model, or NaN where its weights are freed. Dynamo does not count variants that were compiled for another object. Each compilation
by this backend therefore marks the earlier variants as such. The limit that remains is ``accumulated_recompile_limit`` (256).

In: the compilation in progress, and a predicate that identifies variants of this backend. Out: earlier variants marked, and
warnings of many variants and of the last one that Dynamo compiles.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch._guards import CompileContext

from rana_fx.graph.real_values import translator as frame_being_compiled
from rana_fx.notices import warn_once

_MARK = "rana_fx: not counted"  # no local variable has such a name
_LIMIT = "torch._dynamo.config.recompile_limit"
_LAST = "torch._dynamo.config.accumulated_recompile_limit"


class _Owner:
    """The object that marked variants are recorded as compiled for."""


_owner = _Owner()


def keep_compiling(is_ours: Callable[[Any], bool]) -> None:
    """Mark the variants of the frame being compiled, unless ``fail_on_recompile_limit_hit`` is set.

    Args:
        is_ours: whether the backend recorded with a variant is this one.
    """
    config = torch._dynamo.config
    frame = frame_being_compiled()
    if frame is None or config.fail_on_recompile_limit_hit:
        return
    variants = 1 + sum(_is_variant(entry, frame, is_ours) for entry in _entries(frame.f_code))
    for code in {frame.f_code, *_codes()}:
        for entry in _entries(code):
            if _made_by_us(entry, is_ours) or _is_invalid(entry):
                entry.guard_manager.id_matched_objs[_MARK] = weakref.ref(_owner)
    name = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_code.co_firstlineno})"
    if variants > config.recompile_limit:
        warn_once(
            f"{_LIMIT}: {name}",
            f"{name} is compiled for the {variants}th time, which is more than {_LIMIT} ({config.recompile_limit}). Dynamo would "
            "run it eagerly from now on, without the plan; it is compiled nevertheless. TORCH_LOGS=recompiles says why; "
            "dynamic=True or torch._dynamo.mark_dynamic save compilations for many sizes.",
        )
    number = getattr(CompileContext.current_compile_id(), "frame_compile_id", None) or 0
    if max(number, len(_entries(frame.f_code))) + 1 >= config.accumulated_recompile_limit:
        warn_once(
            f"{_LAST}: {name}",
            f"{name} was compiled {number + 1} times. This is the last: Dynamo runs it eagerly where it would have to compile it "
            f"again, which is without the plan (NaN where its weights were freed). Raise {_LAST} "
            f"({config.accumulated_recompile_limit}), or call torch.compiler.reset() from time to time.",
        )


def forget_invalid() -> None:
    """Reset Dynamo's cache of functions without a valid variant, as after a plan was detached.

    Invalid variants hold their code and their weights in memory, and count towards ``accumulated_recompile_limit``.
    """
    if frame_being_compiled() is not None:
        return
    for code in _codes():
        entries = _entries(code)
        if entries and all(map(_is_invalid, entries)):
            torch._C._dynamo.eval_frame.reset_code(code)


def _entries(code: CodeType) -> list[Any]:
    return list(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))


def _codes() -> Iterator[CodeType]:
    """The code objects of all functions that Dynamo has processed."""
    from torch._dynamo.convert_frame import input_codes

    found = (reference() for reference in getattr(input_codes, "seen", ()))
    return (code for code in found if code is not None)


def _is_variant(entry: Any, frame: Any, is_ours: Callable[[Any], bool]) -> bool:
    """Whether a variant is valid and was compiled by this backend for the module being compiled, marked or not."""
    if not _made_by_us(entry, is_ours) or _is_invalid(entry):
        return False
    matched = entry.guard_manager.id_matched_objs.items()
    objects = [(frame.f_locals.get(name), reference()) for name, reference in matched if name != _MARK]
    return all(one is other or other is None for one, other in objects)


def _made_by_us(entry: Any, is_ours: Callable[[Any], bool]) -> bool:
    backend = getattr(entry, "backend", None)  # not recorded by every version of torch
    return backend is None or is_ours(backend)


def _is_invalid(entry: Any) -> bool:
    """Whether an object that a variant is guarded on was freed."""
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    return isinstance(entry.guard_manager, DeletedGuardManagerWrapper)
