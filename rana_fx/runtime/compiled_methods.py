"""Methods of a compiled model run the compiled model: ``torch.compile(model, backend="rana").generate(...)``.

``torch.compile(model)`` is a module that wraps the model. It compiles calls; every other method is looked up in the model and
calls the model uncompiled. With Inductor that only costs time. With this backend the dense model would run instead of the adapted
one.

In: torch.compile's wrapper (``OptimizedModule``) of a model compiled by this backend. Out: methods looked up through the wrapper,
in which the model's calls of itself are compiled, as after ``model.compile(...)``. The methods of the model itself, other
backends and calls of the wrapper are unchanged.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_ATTRIBUTE = "_compiled_call_impl"  # called by a module instead of its forward, where it is set


def install(is_ours: Callable[[Any], bool]) -> None:
    """Patch the look-up of methods in ``OptimizedModule``, once a process. ``is_ours``: whether a backend is this one."""
    wrapper: Any = torch._dynamo.OptimizedModule
    original = wrapper.__getattr__
    if getattr(original, "rana_fx", False):
        return

    @functools.wraps(original)
    def look_up(self: Any, name: str) -> Any:
        if name == "_orig_mod" or torch.compiler.is_compiling():  # first: Dynamo traces this, as it traces the original
            return original(self, name)
        found = original(self, name)
        if not isinstance(found, types.MethodType):
            return found
        model = self._modules.get("_orig_mod")
        if found.__self__ is not model or hasattr(nn.Module, name) or not is_ours(_backend_of(self)):
            return found
        return types.MethodType(_compiled(found.__func__, self), model)

    look_up.rana_fx = True  # type: ignore[attr-defined]
    wrapper.__getattr__ = look_up


def _backend_of(wrapper: Any) -> Any:
    """The backend that a wrapper of torch.compile was compiled with; None where it is not known."""
    return getattr(wrapper.__dict__.get("dynamo_ctx"), "callback", None)


def _compiled(function: Callable[..., Any], wrapper: Any) -> Callable[..., Any]:
    """A method of the model during which the model's calls of itself are compiled; for a generator, during each of its steps."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(model: nn.Module, *args: Any, **kwargs: Any) -> Generator[Any, None, Any]:
            made = function(model, *args, **kwargs)
            while True:
                with _compiling(model, wrapper):
                    try:
                        item = next(made)
                    except StopIteration as end:
                        return end.value
                yield item

        return steps

    @functools.wraps(function)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _compiling(model, wrapper):
            return function(model, *args, **kwargs)

    return run


class _Calls:
    """The call implementation of a model while threads run compiled methods: compiled in these threads, eager in all others."""

    def __init__(self, model: nn.Module, wrapper: Any) -> None:
        self._eager = model._call_impl
        self._compiled = wrapper.dynamo_ctx(model._call_impl)
        self.threads: list[int] = []  # one entry for each running method

    # on a GPU, transformers compiles the model's __call__ by Inductor during generate: Dynamo must not trace into this
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if threading.get_ident() in self.threads else self._eager)(*args, **kwargs)


@contextmanager
def _compiling(model: nn.Module, wrapper: Any) -> Iterator[None]:
    with _lock:
        found = model.__dict__.get(_ATTRIBUTE)
        calls = _Calls(model, wrapper) if found is None else found if isinstance(found, _Calls) else None
        if calls is not None:  # None: compiled already, by model.compile()
            setattr(model, _ATTRIBUTE, calls)
            calls.threads.append(threading.get_ident())
    try:
        yield
    finally:
        if calls is not None:
            with _lock:
                calls.threads.remove(threading.get_ident())
                if not calls.threads and model.__dict__.get(_ATTRIBUTE) is calls:
                    delattr(model, _ATTRIBUTE)
