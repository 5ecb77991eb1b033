"""The environment of every test: its own caches, fixed seeds, NaN in uninitialised memory, one device fixture.

Uninitialised tensors are filled with NaN, so that an output element that is never written fails the comparison. Compiler caches
are in a new folder per run, shared by the workers of that run: no stale kernel of an earlier run is used, and no graph is
compiled twice. Without a GPU, Triton kernels run under Triton's interpreter. The slowest files start first, so that the workers
end at about the same time.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# read when torch, triton or a tokenizer is first imported, hence before the imports below
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _get_current_dispatch_mode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

TESTS = Path(__file__).parent

# derandomised, for the same examples in CI; more examples with --hypothesis-profile=search
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    # pytest gives a handler to every logger that does not propagate; torch would format a trace of each compilation for it
    logging.getLogger("torch.__trace").propagate = True
    if hasattr(config, "workerinput"):
        return  # a worker inherits the folder of the run
    folder = tempfile.mkdtemp(prefix="rana-fx-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
    os.environ["TRITON_CACHE_DIR"] = str(Path(folder, "triton"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


# the slowest files on two cores, slowest first (docs/reference/testing.md has times); all others follow in order of collection
LONGEST = (
    "docs/test_examples.py",
    "docs/test_snippets.py",
    "integration/test_backend.py",
    "integration/test_storage.py",
    "bench/test_decode.py",
    "kernels/test_masked_gemv.py",
    "integration/test_architectures.py",
    "kernels/test_integer_products.py",
    "integration/test_sizes.py",
    "runtime/test_prefill.py",
    "kernels/test_tensor_cores.py",
    "kernels/test_router_tensor_cores.py",
    "kernels/test_attention.py",
    "passes/test_rewrite_attention.py",
    "recipes/test_scope.py",
    "graph/test_coverage.py",
    "runtime/test_compiled_methods.py",
    "recipes/test_budget.py",
    "kernels/test_router.py",
    "kernels/test_masked_gemv_fused.py",
    "training/test_lora.py",
    "bench/test_fuzz.py",
    "kernels/test_sm90.py",
    "integrations/test_lm_eval_harness.py",
    "integration/test_exact_compiled.py",
    "kernels/test_masked_rows.py",
    "unit/test_golden.py",
    "bench/test_reproduce.py",
    "integrations/test_trainers.py",
    "graph/test_aliasing.py",
    "integration/test_cats_compiled.py",
    "calibration/test_batches.py",
    "cli/test_cli.py",
    "packaging/test_packaging.py",
    "passes/test_rewrite_adapter.py",
    "kernels/test_not_finite.py",
    "passes/test_exact_rows.py",
    "bench/test_adapt_scale.py",
)


def _rank(item: pytest.Item) -> int:
    name = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Exempt modules from garbage collection, which Dynamo's many objects would trigger often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that the test runs on; tests take their device from here only."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Set seeds and reset given warnings before each test, reset the compiler after it: Dynamo silently falls back to eager
    mode once it has compiled a function for too many models, and the next test would then not test compiled code."""
    from rana_fx import notices

    torch.manual_seed(0)
    np.random.seed(0)
    notices.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs_as_rewritten(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Replace Inductor only: options, plans, rewrites, guards and freed weights are real, and each rewritten graph runs eagerly,
    without compile time. Returns the graphs in order. Lowerings by Inductor have their own tests (docs/reference/testing.md)."""
    seen: list[torch.fx.GraphModule] = []

    def compile_fx(gm: torch.fx.GraphModule, example_inputs: object, **_: object) -> Callable[..., object]:
        seen.append(gm)
        return gm.forward

    monkeypatch.setattr(importlib.import_module("torch._inductor.compile_fx"), "compile_fx", compile_fx)
    return seen


@pytest.fixture(scope="session", autouse=True)
def _compiler_options() -> Iterator[None]:
    """More compilations than Dynamo's limit are an error; the thresholds above are when garbage is collected."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, run_gc_after_compile=False):
        yield


@pytest.fixture(scope="session", autouse=True)
def _guards_are_not_timed() -> Iterator[None]:
    """Dynamo measures how long the guards of each graph take, behind a flush of the CPU's caches, and writes it to a log: an
    eighth of the time of a trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_library_for_a_graph() -> Iterator[None]:
    """Tests of processes of their own (tests/packaging, the second process of test_backend.py) compile as users do."""
    from tests.support.one_library import one_library

    with one_library():
        yield


@pytest.fixture(scope="session", autouse=True)
def _interpreter_is_set_up_once_a_launch() -> Iterator[None]:
    """Triton's interpreter replaces the functions of its language at the start of a launch, and searches its modules for them
    again at each call of a function of the kernel, in vain: a third of the time of a launch."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    # older versions keep what they replace elsewhere
    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None:
        yield
        return
    replace, done = interpreter._patch_lang, set()

    def replace_once(fn: Callable[..., object]) -> object:
        module = id(fn.__globals__)
        if module in done:
            return scope()
        done.add(module)
        replaced = replace(fn)
        restore = replaced.restore

        def restored() -> None:
            done.clear()
            restore()

        replaced.restore = restored
        return replaced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        out = allocate(*args, **kwargs)
        # not while tracing or compiling, where the fill would become part of the graph
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return out
        if out.is_meta or not (out.is_floating_point() or out.is_complex()):
            return out
        with torch.no_grad():
            return out.fill_(float("nan"))

    return empty


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    # torch caches at the first call which functions a device context applies to: cache the original functions
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
