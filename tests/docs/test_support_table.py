"""The page on what is supported is what is recorded of the tests that exist now. None of them is run for it."""

from __future__ import annotations

import json

import pytest

from tests import support_table
from tests.support_table import NOT_RUN, PAGE, ROOT, SECTIONS, page, recorded


@pytest.fixture(scope="module")
def tests_of_now(request):
    """All tests of the files that the page is about, collected without running them."""
    files = dict.fromkeys(ROOT / "tests" / section.file for section in SECTIONS)
    return [item.nodeid for file in files for item in pytest.Module.from_parent(request.session, path=file).collect()]


def test_the_page_is_what_is_recorded(tests_of_now):
    assert PAGE.read_text() == page(tests_of_now), "run make support-table"


def test_every_test_of_the_page_has_a_result_of_this_kind_of_machine(tests_of_now):
    assert set(recorded("cpu")[1]) <= set(tests_of_now), "tests that are gone: run make support-table"
    tables = page(tests_of_now).partition("## Modes of PyTorch on a GPU")[0]
    # the GPU's versions stand above the tables
    assert f"| {NOT_RUN} |" not in tables, "tests without a result: run make support-table"


def test_a_new_test_and_a_failure_are_seen(tests_of_now, tmp_path, monkeypatch):
    new = "tests/integration/test_architectures.py::test_counts_of_two_layers_and_full_rank_equals_dense[new]"
    assert f"| new | {NOT_RUN} |" in page([*tests_of_now, new])
    (tmp_path / "support-cpu.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ({"torch": "2"}, {"test": new, "outcome": "failed"}))
    )
    monkeypatch.setattr(support_table, "RESULTS", tmp_path)
    assert "| new | **fails** |" in page([new]) and "- CPU: torch 2\n- GPU: not run here" in page([new])
