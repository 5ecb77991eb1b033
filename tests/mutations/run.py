"""Apply mutations one at a time and run the tests that have to fail: ``python -m tests.mutations.run [NAME ...]``.

In: names of mutations (all if none). Out: a table, with --out also JSON; exit code 1 if one survived or could not be tried.
Each file is replaced in one step and always restored, also on Ctrl-C; a file with uncommitted changes is refused. Tests run in a
process of their own. ``--unchanged`` runs the same tests without any mutation: all must pass, otherwise "killed" has no meaning.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutations.mutation import Mutation
from tests.mutations.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
KILLED, SURVIVED, UNTRIED = "killed", "survived", "not applicable"
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.mutations.without_shrinking")
_PRELOADED = ("pytest", "torch._dynamo", "torch._inductor.compile_fx", "transformers", "peft", "safetensors.torch")
_REWRITTEN = "ignore::pytest.PytestAssertRewriteWarning"  # the plugin was imported before pytest could rewrite its asserts
_FAILED, _NOTHING_FAILED = 1, 0  # exit codes of pytest; others mean that no test ran


class NotApplicableError(Exception):
    """A mutation that cannot be tried; the message says why."""


@dataclass(frozen=True)
class Result:
    """``by``: the test that failed, or the reason why there is no result. ``seconds``: of the tests."""

    name: str
    result: str
    by: str
    seconds: float


def located(mutation: Mutation) -> str:
    """The source text of the mutation's file. Raises NotApplicableError."""
    path = ROOT / mutation.file
    if not path.is_file():
        raise NotApplicableError(f"mutation {mutation.name} no longer applies: there is no {mutation.file}")
    text = path.read_text()
    count = text.count(mutation.old)
    if count != 1 or mutation.old == mutation.new:
        raise NotApplicableError(
            f"mutation {mutation.name} no longer applies: {count} times in {mutation.file}, not once: {mutation.old!r}"
        )
    return text


def replace(path: Path, text: str, times_ns: tuple[int, int] | None = None) -> None:
    """Replace a file atomically with the same mode; its modification time is now, or ``times_ns``."""
    beside = path.with_name(f".{path.name}.mutation")
    try:
        beside.write_text(text)
        beside.chmod(path.stat().st_mode)
        if times_ns is not None:
            os.utime(beside, ns=times_ns)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def applied(mutation: Mutation) -> Iterator[None]:
    """The mutated file inside, the original one afterwards. Raises NotApplicableError."""
    path, text = ROOT / mutation.file, located(mutation)
    if subprocess.run(("git", "diff", "--quiet", "HEAD", "--", mutation.file), cwd=ROOT, check=False).returncode:
        raise NotApplicableError(f"{mutation.file} has uncommitted changes: commit or stash them first")
    status = path.stat()
    try:
        replace(path, text.replace(mutation.old, mutation.new))
        yield
    finally:
        # Python detects stale bytecode by the modification time of the source
        replace(path, text, (status.st_atime_ns, status.st_mtime_ns))


def pytest(arguments: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """(exit code, output) of a fresh process; None where it took too long."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "500"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        (*_PYTEST, *arguments), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output


def preload() -> None:
    """Import what all tests import of other packages, under the environment that tests/conftest.py sets."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.dont_write_bytecode = True
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in _PRELOADED:
        importlib.import_module(name)
    assert not any(name.partition(".")[0] == "rana_fx" for name in sys.modules)


def forked(arguments: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Like ``pytest``, in a fork of this process, which has imported all other packages."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if not child:
            os.setsid()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = 3
            try:
                os.chdir(ROOT)
                os.environ["COLUMNS"] = "500"
                code = int(importlib.import_module("pytest").main([*_PYTEST[3:], "-W", _REWRITTEN, *arguments]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code, until = None, time.monotonic() + timeout
        try:
            while code is None and time.monotonic() < until:
                done, status = os.waitpid(child, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if done else None
                time.sleep(0.0 if done else 0.05)
        finally:
            if code is None:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
        file.seek(0)
        return code, file.read().decode(errors="replace")


def tried(mutation: Mutation, timeout: float, run: Callable[[Sequence[str], float], tuple[int | None, str]] = pytest) -> Result:
    """Apply, test, restore. ``run``: ``pytest`` or ``forked``."""
    started = time.perf_counter()
    try:
        with applied(mutation):
            code, output = run(["-x", *shlex.split(mutation.tests)], timeout)
    except NotApplicableError as error:
        return Result(mutation.name, UNTRIED, str(error), 0.0)
    seconds = round(time.perf_counter() - started, 1)
    failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+\.py.*?)(?: - .*)?$", output, re.MULTILINE)
    if code == _FAILED and failed is not None:
        return Result(mutation.name, KILLED, failed.group(1), seconds)
    if code == _NOTHING_FAILED:
        return Result(mutation.name, SURVIVED, mutation.tests, seconds)
    last = (output.strip() or "no output").splitlines()[-1]
    why = f"no result in {timeout:g} s" if code is None else f"pytest ended with {code}: {last}"
    return Result(mutation.name, UNTRIED, why, seconds)


def chosen(names: Sequence[str]) -> list[Mutation]:
    """Mutations by name, in their own order; all if no name is given. Raises SystemExit for an unknown name."""
    known = {mutation.name for mutation in MUTATIONS}
    assert len(known) == len(MUTATIONS), "two mutations have one name"
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown mutation {unknown[0]}: see --list")
    return [mutation for mutation in MUTATIONS if not names or mutation.name in names]


def check(mutations: Sequence[Mutation]) -> int:
    """Whether every text is found exactly once; prints those that are not."""
    bad = 0
    for mutation in mutations:
        try:
            located(mutation)
        except NotApplicableError as error:
            bad += 1
            print(error)
    print(f"{len(mutations) - bad} of {len(mutations)} mutations apply")
    return 1 if bad else 0


def unchanged(mutations: Sequence[Mutation], timeout: float) -> int:
    """Whether the tests of all mutations pass on the code as it is; prints the output of those that do not."""
    tests: list[list[str]] = []
    together: dict[str, None] = {}
    for mutation in mutations:
        arguments = shlex.split(mutation.tests)
        # -k applies to all tests of a process
        if "-k" in arguments:
            tests += [arguments] if arguments not in tests else []
        else:
            together |= dict.fromkeys(arguments)
    failures = 0
    for arguments in [*tests, list(together)]:
        code, output = pytest(arguments, timeout * (len(mutations) if arguments not in tests else 1))
        failures += code != _NOTHING_FAILED
        print(f"{'passed' if code == _NOTHING_FAILED else 'FAILED'}: {shlex.join(arguments)}", flush=True)
        if code != _NOTHING_FAILED:
            print(output)
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.run", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to try; default: all")
    parser.add_argument("--list", action="store_true", help="list them and end")
    parser.add_argument("--check", action="store_true", help="only check that each text is found exactly once")
    parser.add_argument("--unchanged", action="store_true", help="only run their tests on the code as it is")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the results there")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for the tests of one mutation (600)")
    parser.add_argument("--fork", action="store_true", help="import other packages once, and fork for the tests of each mutation")
    given = parser.parse_args(argv)
    mutations = chosen(given.names)
    if given.list:
        for mutation in mutations:
            print(f"{mutation.name:36} {mutation.file}: {mutation.wrong}")
        return 0
    if given.check:
        return check(mutations)
    if given.unchanged:
        return unchanged(mutations, given.timeout)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are restored
    if given.fork:
        preload()
    results = []
    for mutation in mutations:
        found = tried(mutation, given.timeout, forked if given.fork else pytest)
        results.append(found)
        print(f"{found.result:15} {found.seconds:7.1f} s  {found.name:36} {found.by}", flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    killed = sum(found.result == KILLED for found in results)
    print(f"{killed} of {len(results)} mutations killed")
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
