"""Methods of a compiled model run the compiled model: ``torch.compile(model, backend="rana").generate(...)``.

``torch.compile(model)`` is a module around the model. It compiles calls; every other method is looked up in the model, which then
calls itself or a part (an encoder), uncompiled. That costs a model compiled by Inductor only time. An adapted model would
silently be the dense one.

In: torch.compile's wrapper (``OptimizedModule``) around a model, compiled by our backend. Out: methods got through it in which
the model's calls of itself are compiled, as after ``model.compile(...)``, and so are its calls of parts with matrices. The
model's own methods stay as they are, and nothing changes for other backends. Calls of the wrapper take the way they always took.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo import trace_rules
from torch._dynamo.external_utils import wrap_inline

_lock = threading.Lock()
_made: weakref.WeakKeyDictionary[nn.Module, dict[nn.Module, _Calls]] = weakref.WeakKeyDictionary()  # wrapper -> by module
_ATTRIBUTE = "_compiled_call_impl"  # what a module calls instead of its forward, if it has one


def install(is_ours: Callable[[Any], bool]) -> None:
    """Look methods up in this way from now on. ``is_ours``: whether a backend that torch.compile was given is ours."""
    wrapper: Any = torch._dynamo.OptimizedModule
    original = wrapper.__getattr__
    if getattr(original, "rana_fx", False):
        return

    @functools.wraps(original)
    def look_up(self: Any, name: str) -> Any:
        if torch.compiler.is_dynamo_compiling():  # a compiled module in another: Dynamo cannot enter ``original``
            inner = self._modules["_orig_mod"]
            return inner if name == "_orig_mod" else getattr(inner, name)
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
    """The backend behind a wrapper of torch.compile."""
    return getattr(wrapper.__dict__.get("dynamo_ctx"), "callback", None)


def _compiled(function: Callable[..., Any], wrapper: Any) -> Callable[..., Any]:
    """A method of the model, during which its calls of itself are compiled; a generator's, whenever it runs."""
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
    """What a model calls itself by while some threads run its methods: compiled in these, as it was in others."""

    def __init__(self, module: nn.Module, wrapper: Any) -> None:
        self._module, self._eager = module, module._call_impl
        self._context = wrapper.dynamo_ctx
        self.threads: list[int] = []  # once for each method that runs

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        call: Callable[..., Any] = self._eager
        if trace_rules.check(self._module.forward):
            call = wrap_inline(call)  # of nn.Linear and others, whose own code Dynamo starts no graph in
        compiled: Callable[..., Any] = self._context(call)
        return compiled

    # transformers compiles a model's __call__ by Inductor while it generates, on a GPU: that must not see what is behind this
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._compiled if threading.get_ident() in self.threads else self._eager)(*args, **kwargs)


class _CallsOfPart(_Calls):
    """The same of a part of the model, which is inlined where the part is called in code that is being compiled."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._eager if torch.compiler.is_dynamo_compiling() else super().__call__)(*args, **kwargs)


@contextmanager
def _compiling(model: nn.Module, wrapper: Any) -> Iterator[None]:
    with _lock:
        running = [(model, _calls_of(model, wrapper, _Calls))]
        running += [(part, _calls_of(part, wrapper, _CallsOfPart)) for part in _parts(model)]
        for module, calls in running:
            if calls is not None:  # after module.compile() it is compiled anyway
                setattr(module, _ATTRIBUTE, calls)
                calls.threads.append(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            for module, calls in running:
                if calls is not None:
                    calls.threads.remove(threading.get_ident())
                    if not calls.threads and module.__dict__.get(_ATTRIBUTE) is calls:
                        delattr(module, _ATTRIBUTE)


def _calls_of(module: nn.Module, wrapper: Any, kind: type[_Calls]) -> _Calls | None:
    """What it calls itself by already, or from now on; None if it was compiled in place."""
    found = module.__dict__.get(_ATTRIBUTE)
    if found is not None:
        return found if isinstance(found, _Calls) else None
    made = _made.setdefault(wrapper, {})
    if module not in made:  # where Dynamo reads it, compiled code is guarded on it: the same one every time
        made[module] = kind(module, wrapper)
    return made[module]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Parts with matrices that a method of the model may call by themselves: an encoder, a block, a linear.

    Not those whose class has a ``__call__`` of its own, which calls ``nn.Module``'s while it is being compiled: their parts take
    their place. What torch.compile wraps is compiled already.
    """
    for part in module.children():
        if isinstance(part, torch._dynamo.OptimizedModule) or not any(weight.dim() > 1 for weight in part.parameters()):
            continue
        if type(part).__call__ is nn.Module.__call__ and not isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Embedding)):
            yield part
        yield from _parts(part)
