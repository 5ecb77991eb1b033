"""Samples of the rows that pass one point of the model, in constant memory.

In: batches of rows, as they come. Out: at most ``capacity`` of them, each equally likely to be kept, in the input's
dtype. The paper decomposes on 32,000 tokens drawn from 256,000 (its section 5); a reservoir draws the same sample in
one pass without holding the rest. Where even that is too much, a ``Summary`` keeps few rows and the second moment of others.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

CAPACITY = 32_000
_AT_FIRST = 2048  # rows allocated on an accelerator, where memory that is not written counts as well


@dataclass(frozen=True)
class Keep:
    """What a recipe needs of one tensor: rows, on the host where ``host``; with ``moment`` also the second moment of others."""

    capacity: int = CAPACITY
    host: bool = False
    moment: bool = False

    def start(self, *, seed: int) -> Reservoir:
        """An empty reservoir that keeps so much."""
        made = Summary if self.moment else Reservoir
        return made(self.capacity, seed=seed, host=self.host)

    def continued(self, sample: Reservoir, *, seed: int) -> Reservoir:
        """A sample of this capacity that starts with the rows of another one, which is not changed."""
        if isinstance(sample, Summary) == self.moment and (sample.capacity, sample.host) == (self.capacity, self.host):
            return sample.copy()
        made = self.start(seed=seed)
        made.add(sample.rows())
        return made


class Reservoir:
    """Keeps the ``capacity`` rows with the smallest random priorities (uniform sampling without replacement).

    Two reservoirs with one seed that see the same number of rows keep the same tokens.
    """

    def __init__(self, capacity: int = CAPACITY, *, seed: int = 0, host: bool = False) -> None:
        self.capacity = capacity
        self.host = host
        self.seen = 0  # rows
        self._generator = torch.Generator().manual_seed(seed)
        self._priorities = torch.empty(0, device="cpu")
        self._rows: Tensor | None = None

    @property
    def features(self) -> int | None:
        """Width of the rows, once there are some."""
        return None if self._rows is None else self._rows.shape[1]

    def add(self, rows_TI: Tensor) -> None:
        """Take a batch of rows, shape (tokens, features)."""
        count, features = rows_TI.shape
        priorities = torch.rand(count, generator=self._generator, dtype=torch.float64, device="cpu")
        filled = min(self.seen, self.capacity)
        kept = self._allocate(rows_TI, min(filled + count, self.capacity))
        room = min(count, self.capacity - filled)
        kept[filled : filled + room] = rows_TI[:room]
        self._priorities[filled : filled + room] = priorities[:room]
        self.seen += count
        if room < count:
            self._replace(rows_TI[room:], priorities[room:])

    def _allocate(self, like_TI: Tensor, needed: int) -> Tensor:
        """The sample's rows, with room for so many."""
        if self._rows is None:
            self._priorities = torch.empty(self.capacity, dtype=torch.float64, device="cpu")
        elif len(self._rows) >= needed:
            return self._rows
        device = torch.device("cpu") if self.host else like_TI.device
        # on the host pages are touched only when written, so a short calibration does not use the full capacity
        room = self.capacity if device.type == "cpu" else min(self.capacity, max(_AT_FIRST, 2 * needed))
        grown = torch.empty(room, like_TI.shape[1], dtype=like_TI.dtype, device=device)
        if self._rows is not None:
            grown[: len(self._rows)] = self._rows
        self._rows = grown
        return grown

    def _replace(self, rows_TI: Tensor, priorities: Tensor) -> None:
        """The buffer is full: newcomers with smaller priorities replace those with the largest."""
        assert self._rows is not None
        kept = torch.cat([self._priorities, priorities]).topk(self.capacity, largest=False).indices
        incoming = kept[kept >= self.capacity] - self.capacity
        leaving = torch.ones(self.capacity, dtype=torch.bool, device="cpu")
        leaving[kept[kept < self.capacity]] = False
        slots = leaving.nonzero().flatten()
        self._rows[slots.to(self._rows.device)] = rows_TI[incoming.to(rows_TI.device)].to(self._rows.device)
        self._priorities[slots] = priorities[incoming]

    def copy(self) -> Reservoir:
        """The same sample, to which other rows may be added."""
        made = copy.copy(self)
        made._generator = torch.Generator()
        made._generator.set_state(self._generator.get_state())
        made._priorities = self._priorities.clone()
        made._rows = None if self._rows is None else self._rows.clone()
        return made

    def release(self) -> None:
        """Free the memory of the rows; the reservoir holds none from now on."""
        self._rows, self._priorities = None, torch.empty(0, device="cpu")

    def rows(self) -> Tensor:
        """The sample, (min(seen, capacity), features)."""
        if self._rows is None:
            return torch.empty(0, 0, device="cpu")
        return self._rows[: min(self.seen, self.capacity)]


class Summary(Reservoir):
    """A sample of an eighth of the rows, and the second moment of the others: a basis of the moment is judged on the sample.

    The eighth moves from batch to batch, so that it holds every position of a text.
    """

    def __init__(self, capacity: int, *, seed: int = 0, host: bool = False) -> None:
        super().__init__(capacity, seed=seed, host=host)
        self.moment: Tensor | None = None  # sum of x x^T, fp32
        self.summed = 0  # rows in it
        self._turn = 0

    def copy(self) -> Reservoir:
        made = super().copy()
        assert isinstance(made, Summary)
        made.moment = None if self.moment is None else self.moment.clone()
        return made

    def release(self) -> None:
        super().release()
        self.moment = None

    def add(self, rows_TI: Tensor) -> None:
        start, stop = (len(rows_TI) * (self._turn % 8 + step) // 8 for step in (0, 1))
        self._turn += 1
        super().add(rows_TI[start:stop])
        if self.moment is None:
            width = rows_TI.shape[1]
            self.moment = torch.zeros(width, width, dtype=torch.float32, device=rows_TI.device)
        for part in (rows_TI[:start], rows_TI[stop:]):
            wide = part.float()
            self.moment.addmm_(wide.t(), wide)
            self.summed += len(part)
