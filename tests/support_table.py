"""docs/reference/support.md, from recorded results of the tests that it is about.

    python -m tests.support_table --run    # run these tests on this machine, record their outcomes, write the page
    python -m tests.support_table          # write the page from what is recorded

A record is bench/results/support-DEVICE.jsonl: versions in the first line, then a line for each test that ran. A cell of the
page is a test on a device: it is never typed. tests/docs/test_support_table.py has the page and the tests that exist agree.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reference/support.md"
RESULTS = ROOT / "bench/results"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOT_RUN, MARKS = "not run here", {"passed": "yes", "failed": "**fails**"}


@dataclass(frozen=True)
class Section:
    """A table: a row for each value that the first group of ``ids`` has, a column for each device and value of the second.

    ``file``: of the tests, below tests/. ``ids``: matches their names, parameters included, from the beginning to the end.
    """

    title: str
    text: str
    row: str
    file: str
    ids: str
    devices: tuple[str, ...] = ("cpu",)


SECTIONS = (
    Section(
        "Architectures",
        "A random model of two layers: the linears, groups, MLP blocks and attention stacks that are found are those of the "
        "architecture, and a plan that keeps every rank computes what the dense model does. Models of transformers and of "
        "plain PyTorch; what is never adapted (experts in one tensor, convolutions) is dense in both. An "
        "architecture that is not listed is not refused: "
        "[what to look at](../how-to/architecture-not-covered.md).",
        "architecture",
        "integration/test_architectures.py",
        r"test_counts_of_two_layers_and_full_rank_equals_dense\[(.*)\]",
    ),
    Section(
        "Storages",
        "What an adapter stores is the model's weight within half a step of the format, in a Llama and in a GPT-2, whose weights "
        "are transposed. A number is the bits of the router, the factors or the weight; none is the model's dtype.",
        "storage",
        "integration/test_storage.py",
        r"test_what_is_stored_is_the_weight_within_half_a_step\[(.*)-(\w+)\]",
    ),
    Section(
        "Recipes",
        "The model compiled by Inductor computes what its plan says. Recipe `rana` and kept rows have tests of their own.",
        "recipe",
        "integration/test_backend.py",
        r"test_compiled_equals_reference\[(.*)\]",
    ),
    Section(
        "Generation",
        "`generate` of the compiled model, and of the model compiled in place, give the same tokens, which are not those of "
        "the dense model.",
        "cache",
        "runtime/test_compiled_methods.py",
        r"test_generate\[(.*)\]",
    ),
    Section(
        "Option prefill",
        "A compiled model takes calls of no token, one and forty, with each value of the option.",
        "value",
        "integration/test_sizes.py",
        r"test_no_token_in_every_mode\[(.*)\]",
    ),
    Section(
        "Modes of PyTorch on a GPU",
        "The first calls of a compiled model, in each mode and with weights in so many bits; kernels as they are chosen, and "
        "kernels for every adapter.",
        "mode and bits",
        "integration/test_gpu_modes.py",
        r"test_first_calls\[(.*)-(\w+)\]",
        ("cuda",),
    ),
)


def recorded(device: str) -> tuple[dict[str, str], dict[str, str]]:
    """(versions, outcome by test) of a device; both empty where nothing is recorded."""
    path = RESULTS / f"support-{device}.jsonl"
    if not path.exists():
        return {}, {}
    first, *rows = map(json.loads, path.read_text().splitlines())
    return first, {row["test"]: row["outcome"] for row in rows}


def page(tests: Iterable[str]) -> str:
    """The page for these tests, as pytest names them, and what is recorded of them."""
    found = {device: recorded(device) for device in DEVICES}
    known = list(tests)
    lines = [
        "# What is supported",
        "",
        "Written by `make support-table` from results of the tests that are named below; cells say what a test did on a device,",
        f'"{NOT_RUN}" that no result of it is recorded.',
        "",
    ]
    for device, (versions, _) in found.items():
        facts = ", ".join(f"{name} {value}" for name, value in versions.items())
        lines.append(f"- {DEVICES[device]}: {facts or NOT_RUN}")
    for section in SECTIONS:
        lines += ["", f"## {section.title}", "", *textwrap.wrap(section.text, 120), "", *_table(section, known, found), ""]
        lines.append(f"From `tests/{section.file}`.")
    return "\n".join(lines) + "\n"


def _table(section: Section, tests: list[str], found: dict[str, tuple[dict[str, str], dict[str, str]]]) -> list[str]:
    cells: dict[str, dict[str, str]] = {}
    for test in tests:
        match = re.fullmatch(rf"tests/{re.escape(section.file)}::{section.ids}", test)
        if not match:
            continue
        row, *rest = match.groups()
        for device in section.devices:
            column = " ".join([*rest, DEVICES[device]])
            cells.setdefault(row, {})[column] = MARKS.get(found[device][1].get(test, ""), NOT_RUN)
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    rows = [f"| {name} | " + " | ".join(row.get(column, "-") for column in columns) + " |" for name, row in cells.items()]
    return [f"| {section.row} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *rows]


class Recorder:
    """A plugin of pytest: all tests that are collected, and the outcomes of those that ran (not of those that were skipped)."""

    def __init__(self) -> None:
        self.tests: list[str] = []
        self.outcomes: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or (report.when == "call" and report.passed):
            self.outcomes[report.nodeid] = "failed" if report.failed else self.outcomes.get(report.nodeid, report.outcome)


def run(*options: str) -> Recorder:
    """The tests of all sections, or those that the device can run."""
    names = [f"{section.file}::{section.ids.partition(chr(92))[0]}" for section in SECTIONS]
    recorder = Recorder()
    pytest.main(
        ["-q", "--assert=plain", "-p", "no:cacheprovider", *options, *(f"{ROOT}/tests/{name}" for name in names)],
        plugins=[recorder],
    )
    return recorder


def record(outcomes: dict[str, str]) -> None:
    """Write what ran on this machine's best device."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    first = {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }
    rows = [first, *({"test": test, "outcome": outcome} for test, outcome in outcomes.items())]
    (RESULTS / f"support-{device}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    if sys.argv[1:] == ["--run"]:
        done = run()
        record(done.outcomes)
    else:
        done = run("--collect-only")
    PAGE.write_text(page(sorted(done.tests, key=done.tests.index)))


if __name__ == "__main__":
    main()
