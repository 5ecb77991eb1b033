"""Compile a function through Inductor with the package's lowerings, and return the generated code."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from rana_fx.kernels.cpp import template as template_cpp
from rana_fx.passes import lower

GEMV, ROUTER, ROWS = "// rana_masked_gemv", "// rana_router", "// rana_masked_rows"
FALLBACK = "torch.ops.rana"
_UNINITIALISED = "new float[count]"


def compiled(function, *args, **settings):
    """(result, code)."""
    lower.register()
    torch.compiler.reset()
    got, (code, *_) = run_and_get_code(torch.compile(function, **settings), *args)
    return got, code


def each(function, operands, **settings):
    """(results, code) of a function for each of these tuples of operands, compiled as one graph: one compile for all kernels."""
    return compiled(*_as_one(function, operands), **settings)


def repeated(function, lists):
    """(results, code) of ``each`` for several lists of operands of the same shapes, which are compiled once."""
    lower.register()
    torch.compiler.reset()
    together, *flat = _as_one(function, lists[0])
    run = torch.compile(together)
    first, (code, *_) = run_and_get_code(run, *flat)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return [first, *(run(*_as_one(function, operands)[1:]) for operands in lists[1:])], code


def _as_one(function, operands):
    """(a function that returns the results for all operands, its arguments)."""
    spans, flat = [], []
    for given in operands:
        spans.append(slice(len(flat), len(flat) + len(given)))
        flat += given

    def all_of_them(*args):
        return tuple(function(*args[span]) for span in spans)

    return all_of_them, *flat


def check_threads_change_no_bit(function, operands, marker):
    """Each result has the same bits with one thread, three and the default, in each of two runs; each kernel uses its threads.
    Returns the results."""
    results = []
    together, *flat = _as_one(function, operands)
    lower.register()
    for threads in (1, 3):
        torch.compiler.reset()
        run = torch.compile(together)
        with torch._inductor.config.patch({"cpp.threads": threads}):
            got, (code, *_) = run_and_get_code(run, *flat)
            results += [got, run(*flat)]
        found = re.findall(r"\bnum_threads\((\d+)\)", code)
        assert calls(code, marker) == len(operands) <= len(found) and set(found) == {str(threads)}
    results.append(each(function, operands)[0])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    return results[0]


@contextlib.contextmanager
def poisoned():
    """Inside, memory that templates and Inductor's wrapper allocate is filled with NaN, and kernels are recompiled."""
    allocate = torch._C._dynamo.guards._empty_strided_cpu

    def empty(*args):
        made = allocate(*args)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    source = template_cpp._SOURCE
    assert source.count(f"std::unique_ptr<float[]>({_UNINITIALISED})") == 1
    filled = "std::fill_n(new float[count], count, NAN) - count"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_cpp, "_SOURCE", source.replace(_UNINITIALISED, filled))
        patch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", empty)
        with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
            yield


def calls(code, marker):
    """Number of calls of kernels whose source has the marker; equal kernels are generated once."""
    pieces = re.split(r"^(\w+) = async_compile\.cpp_pybinding\(", code, flags=re.M)
    names = [name for name, source in zip(pieces[1::2], pieces[2::2], strict=True) if marker in source.partition("''')")[0]]
    return sum(len(re.findall(rf"^\s+{name}\(", code, re.M)) for name in names)
