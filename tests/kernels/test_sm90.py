"""Kernels compiled for sm_90 without a GPU: they compile, load weights 16 bytes at a time, and a traced launch stays in a graph
for Inductor."""

from __future__ import annotations

import json

import pytest

from tests.support.uninterpreted import run

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(compiled code of each variant, calls of a traced function), from one process."""
    lines = run("tests/support/compiled.py", str(tmp_path_factory.mktemp("pasted"))).splitlines()
    *variants, traced = map(json.loads, lines)
    return {row["name"]: row for row in variants}, traced["targets"]


def test_every_variant_reads_weights_by_sixteen_bytes(found):
    variants, _ = found
    assert len(variants) == 26
    assert [name for name, row in variants.items() if not row["wide_loads"]] == []


def test_a_traced_launch_stays_in_the_graph(found):
    _, targets = found
    assert targets.count("triton_kernel_wrapper_mutation") == 2
