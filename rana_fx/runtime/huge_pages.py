"""Tensors on a CPU whose memory the kernel may back with huge pages.

In: tensors. Out: copies on a CPU that lie one behind the other in one range of anonymous memory, each with a storage of its own,
for which ``madvise(MADV_HUGEPAGE)`` was called before the first write.
Why: a decoded token reads every kept row of every factor once. With pages of 4 KiB that is an address to translate for each few
rows, in a virtual machine by two tables, and matrices of one or two MB are too small for huge pages of their own. Linux gives
huge pages in its modes "always" and "madvise" (/sys/kernel/mm/transparent_hugepage/enabled); elsewhere nothing changes.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name")

HUGE = 1 << 21  # bytes of a huge page, which starts at a multiple of them
LINE = 64  # bytes of a cache line, in which every copy starts


def in_huge_pages(tensors: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    """Copies of the contiguous ones, by the same names; shapes and dtypes stay, ``requires_grad`` does not.

    Empty where the system has no ``MADV_HUGEPAGE``, or where all of them are smaller than a huge page.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_contiguous()}
    sizes = {name: -(-tensor.nbytes // LINE) * LINE for name, tensor in tensors.items()}
    if advice is None or sum(sizes.values()) < HUGE:
        return {}
    pages = mmap.mmap(-1, sum(sizes.values()) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(advice)
    except OSError:  # a kernel that was built without huge pages
        return {}
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % HUGE
    copies: dict[Name, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            # it holds a reference to the whole range
            flat = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            copies[name] = flat.view(tensor.shape).copy_(tensor)
        start += sizes[name]
    return copies
