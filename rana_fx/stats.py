"""A uniform sample of the rows that pass one point of the model, in constant memory.

In: batches of rows, as they come. Out: at most ``capacity`` of them, each equally likely to be kept, in the input's
dtype. The paper decomposes on 32,000 tokens drawn from 256,000 (its section 5); a reservoir draws the same sample in
one pass without holding the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

CAPACITY = 32_000


class Reservoir:
    """Keeps the ``capacity`` rows with the smallest random priorities (uniform sampling without replacement).

    Two reservoirs with one seed that see the same number of rows keep the same tokens.
    """

    def __init__(self, capacity: int = CAPACITY, *, seed: int = 0) -> None:
        self.capacity = capacity
        self.seen = 0  # rows
        self._generator = torch.Generator().manual_seed(seed)
        self._priorities = torch.empty(0)
        self._rows: Tensor | None = None

    @property
    def features(self) -> int | None:
        """Width of the rows, once there are some."""
        return None if self._rows is None else self._rows.shape[1]

    def add(self, rows_TI: Tensor) -> None:
        """Take a batch of rows, shape (tokens, features)."""
        count, features = rows_TI.shape
        priorities = torch.rand(count, generator=self._generator, dtype=torch.float64)
        if self._rows is None:
            # pages are touched only when written, so a short calibration does not pay for the full capacity
            self._rows = torch.empty(self.capacity, features, dtype=rows_TI.dtype, device=rows_TI.device)
            self._priorities = torch.empty(self.capacity, dtype=torch.float64)
        filled = min(self.seen, self.capacity)
        room = min(count, self.capacity - filled)
        self._rows[filled : filled + room] = rows_TI[:room]
        self._priorities[filled : filled + room] = priorities[:room]
        self.seen += count
        if room < count:
            self._replace(rows_TI[room:], priorities[room:])

    def _replace(self, rows_TI: Tensor, priorities: Tensor) -> None:
        """The buffer is full: newcomers with smaller priorities take the places of the largest."""
        assert self._rows is not None
        kept = torch.cat([self._priorities, priorities]).topk(self.capacity, largest=False).indices
        incoming = kept[kept >= self.capacity] - self.capacity
        leaving = torch.ones(self.capacity, dtype=torch.bool)
        leaving[kept[kept < self.capacity]] = False
        slots = leaving.nonzero().flatten()
        self._rows[slots.to(self._rows.device)] = rows_TI[incoming.to(rows_TI.device)]
        self._priorities[slots] = priorities[incoming]

    def rows(self) -> Tensor:
        """The sample, (min(seen, capacity), features)."""
        if self._rows is None:
            return torch.empty(0, 0)
        return self._rows[: min(self.seen, self.capacity)]
