"""Factors on a CPU lie in one range of memory that may have huge pages, and are otherwise ordinary tensors."""

from __future__ import annotations

import copy
import io
import mmap

import pytest
import torch

import rana_fx
from rana_fx.runtime import huge_pages
from rana_fx.runtime.huge_pages import HUGE, LINE, in_huge_pages
from tests.support.adapted import adapted

needs_advice = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages on request")


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(-128, 128, (999, 1001), dtype=torch.int8, generator=generator),
        "scales": torch.randn(333, 5, generator=generator).to(torch.bfloat16),
        "none": torch.empty(0, 7),
        "floats": torch.randn(700, 700, generator=generator),
    }


@needs_advice
def test_copies_lie_side_by_side_in_storages_of_their_own() -> None:
    given = _tensors()
    copies = in_huge_pages(given)
    assert list(copies) == ["bytes", "scales", "floats"]  # an empty tensor has no memory
    starts = [tensor.data_ptr() for tensor in copies.values()]
    assert starts[0] % HUGE == 0 and not any(start % LINE for start in starts)
    assert starts == sorted(starts) and starts[-1] - starts[0] < given["bytes"].nbytes + given["scales"].nbytes + 2 * LINE
    for name, tensor in copies.items():
        torch.testing.assert_close(tensor, given[name], rtol=0, atol=0)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.data_ptr() != given[name].data_ptr()


@needs_advice
def test_memory_outlives_the_other_tensors_and_is_saved_alone() -> None:
    given = _tensors()
    kept = in_huge_pages(given)["floats"]
    file = io.BytesIO()
    torch.save(kept, file)
    assert file.tell() < kept.nbytes + 10_000
    file.seek(0)
    for other in (kept, copy.deepcopy(kept), torch.load(file)):
        torch.testing.assert_close(other, given["floats"], rtol=0, atol=0)


@needs_advice
def test_advice_covers_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []

    class Recorded(mmap.mmap):
        def madvise(self, *args: int) -> None:
            advised.append((len(self), *args))
            super().madvise(*args)

    monkeypatch.setattr(mmap, "mmap", Recorded)
    given = _tensors()
    in_huge_pages(given)
    (size, advice), total = advised[0], sum(tensor.nbytes for tensor in given.values())
    assert len(advised) == 1 and advice == mmap.MADV_HUGEPAGE and total + HUGE <= size < total + HUGE + 4 * LINE


def test_small_tensors_and_systems_without_huge_pages_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_huge_pages({"small": torch.ones(HUGE // 4 - LINE)}) == {}
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert in_huge_pages(_tensors()) == {}


@needs_advice
def test_a_kernel_that_refuses_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refused)
    assert in_huge_pages(_tensors()) == {}


@needs_advice
def test_factors_of_an_attached_plan_are_such_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, plan = adapted()
    rana_fx.detach(model)
    monkeypatch.setattr(huge_pages, "HUGE", 4096)
    rana_fx.attach(model, plan)
    given = {f"a{index}_{key}": value for index, one in enumerate(plan.adapters) for key, value in one.tensors().items()}
    found = {name: value for name, value in model.rana_fx.state_dict().items() if value.numel()}
    starts = sorted(tensor.data_ptr() for tensor in found.values())
    total = sum(-(-tensor.nbytes // LINE) * LINE for tensor in found.values())
    assert starts[0] % 4096 == 0 and not any(start % LINE for start in starts) and starts[-1] - starts[0] < total
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, given[name].data, rtol=0, atol=0)
        assert tensor.data_ptr() != given[name].data_ptr()
