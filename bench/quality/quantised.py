"""A baseline in bytes: the linears of the budget quantised to few bits, all weights kept.

In: the layout of a calibrated model and a name. Out: the dequantised weights in the model's dtype, and their stored bytes, scales
included, over the dense bytes. Names are

    int4-g64         round to nearest, a scale (bfloat16) per output and group of 64 inputs; int8: one per output
    gptq4-g128       rounded column by column with error feedback into the remaining columns (GPTQ, arXiv 2210.17323)
    ...-asym         the same with a zero point per group, of as many bits as a weight: 2^bits levels; symmetric: 2^bits - 1

GPTQ has the best options of its authors' code: columns in order of input energy (``--act-order``), grids of groups fixed
beforehand (``--static-groups``), and for each grid the clipping ratio of least squared error (``--mse``). Second moments are the
dense model's on the calibration sample; the authors use those of the model quantised so far.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rana_fx.calibration.layout import Site
from rana_fx.errors import InvalidOption
from rana_fx.recipes.basis import second_moment
from rana_fx.recipes.problem import Problem

_NAME = re.compile(r"(int|gptq)([2-8])(?:-g(\d+))?(-asym)?")
_SCALE_BITS = 16
_DAMP = 0.01  # of the mean input energy, as in GPTQ
_CLIPS = tuple(1 - step / 40 for step in range(21))
_BLOCK = 128


@dataclass(frozen=True)
class Rounding:
    """``group``: number of inputs that share a scale, None: all inputs. ``optimal``: GPTQ, else rounding to nearest."""

    name: str
    bits: int
    group: int | None
    symmetric: bool
    optimal: bool

    def bytes_of(self, out: int, width: int) -> float:
        """Bytes of a matrix (out, width), scales and zero points included."""
        groups = -(-width // (self.group or width))
        beside = _SCALE_BITS + (0 if self.symmetric else self.bits)
        return out * (width * self.bits + groups * beside) / 8


def rounding_of(name: str) -> Rounding | None:
    """The rounding of that name; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    method, bits, group, asymmetric = found.groups()
    return Rounding(name, int(bits), int(group) if group else None, asymmetric is None, method == "gptq")


@dataclass(frozen=True)
class _Place:
    """Position of a linear's matrix in its Parameter, and the strides of the Parameter."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    stored: tuple[int, ...]


class Rounder:
    """Quantises the linears of a problem. Made before a plan is attached, which may change storage and make views stale."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._sites = [problem.layout.sites[name] for name in problem.counted()]
        self._places = {site.name: _place(site) for site in self._sites}
        self._moments: dict[int, Tensor] = {}  # by group

    def bytes_kept(self, rounding: Rounding) -> float:
        """Bytes of the quantised linears over their dense bytes in the model's dtype."""
        kept = sum(site.uses * rounding.bytes_of(site.out_features, site.in_features) for site in self._sites)
        return kept / self._problem.bytes(self._problem.counted())

    def weights(self, rounding: Rounding) -> dict[nn.Parameter, Tensor]:
        """New values of each Parameter that holds a linear of the budget; other parts of the Parameter are unchanged.

        Raises InvalidOption.
        """
        replaced: dict[nn.Parameter, Tensor] = {}
        for site in self._sites:
            place, weight = self._places[site.name], site.weight.detach()
            if place is None:
                expected = f"linears that read their Parameter in place; {site.name} reads a copy: leave roundings out"
                raise InvalidOption(name="--recipes", got=rounding.name, expected=expected)
            if site.weight not in replaced:
                held = torch.empty_strided(weight.shape, place.stored, dtype=weight.dtype, device=weight.device)
                replaced[site.weight] = held.copy_(weight)
            target = torch.as_strided(replaced[site.weight], place.shape, place.stride, place.offset)
            moment = self._moment(site) if rounding.optimal else None
            target.copy_(rounded(target, rounding, moment))
        return replaced

    def _moment(self, site: Site) -> Tensor:
        if site.group not in self._moments:
            self._moments[site.group] = second_moment(self._problem.rows(site.name))
        return self._moments[site.group]


def _place(site: Site) -> _Place | None:
    weight, view = site.weight.detach(), site.view
    if view.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return None
    return _Place(tuple(view.shape), view.stride(), view.storage_offset() - weight.storage_offset(), weight.stride())


@dataclass(frozen=True, eq=False)
class _Grid:
    """w = (q - zero) * step with q in low..high; ``step`` and ``zero`` (out, groups)."""

    step: Tensor
    zero: Tensor
    low: int
    high: int

    def nearest(self, values_OW: Tensor, group: Tensor | int) -> Tensor:
        """The nearest representable values. ``group``: index for each column, or one for all columns."""
        step, zero = self.step[:, group], self.zero[:, group]
        if isinstance(group, int):
            step, zero = step.unsqueeze(1), zero.unsqueeze(1)
        safe = torch.where(step > 0, step, 1)
        return ((values_OW / safe + zero).round_().clamp_(self.low, self.high) - zero) * step


def rounded(weight_OI: Tensor, rounding: Rounding, moment_II: Tensor | None) -> Tensor:
    """The dequantised weight, fp32. ``moment_II``: sum of x x^T, for GPTQ."""
    weight = weight_OI.float()
    out, width = weight.shape
    length = rounding.group or width
    grid = _grid(torch.nn.functional.pad(weight, (0, -width % length)).view(out, -1, length), rounding, pad=-width % length)
    group_I = torch.arange(width, device=weight.device) // length
    if moment_II is None:
        return grid.nearest(weight, group_I)
    return _compensated(weight, grid, group_I, moment_II.to(weight.device))


def _grid(parts_OGL: Tensor, rounding: Rounding, *, pad: int) -> _Grid:
    if pad:
        # padding must not widen the range of the last group
        parts_OGL = parts_OGL.clone()
        parts_OGL[:, -1, -pad:] = parts_OGL[:, -1, :1]
    highest, lowest = parts_OGL.amax(-1), parts_OGL.amin(-1)
    levels = 2**rounding.bits - 1
    low, high = (-(levels // 2), levels // 2) if rounding.symmetric else (0, levels)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for clip in _CLIPS if rounding.optimal else (1.0,):
        if rounding.symmetric:
            step, zero = _stored(clip * torch.maximum(highest, -lowest) / high), torch.zeros_like(highest)
        else:
            # zero is a level
            top, bottom = clip * highest.clamp_min(0), clip * lowest.clamp_max(0)
            step = _stored((top - bottom) / levels)
            zero = (-bottom / torch.where(step > 0, step, 1)).round_().clamp_(0, levels)
        flat = _Grid(step.reshape(-1, 1), zero.reshape(-1, 1), low, high)
        error = (flat.nearest(parts_OGL.flatten(0, 1), 0) - parts_OGL.flatten(0, 1)).square().sum(-1).view(step.shape)
        if best is None:
            best = error, step, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, step, zero), best, strict=True))
    assert best is not None
    return _Grid(best[1], best[2], low, high)


def _stored(step: Tensor) -> Tensor:
    return step.to(torch.bfloat16).float()


def _compensated(weight_OI: Tensor, grid: _Grid, group_I: Tensor, moment_II: Tensor) -> Tensor:
    """GPTQ rounding, the inputs with most energy first."""
    order = moment_II.diagonal().argsort(descending=True)
    work = weight_OI[:, order].clone()
    upper = _inverse_factor(moment_II[order][:, order]).float()
    groups = group_I[order].tolist()
    found = torch.zeros_like(work)
    for start in range(0, len(groups), _BLOCK):
        stop = min(start + _BLOCK, len(groups))
        errors = torch.zeros_like(work[:, start:stop])
        for column in range(start, stop):
            found[:, column : column + 1] = grid.nearest(work[:, column : column + 1], groups[column])
            error = (work[:, column] - found[:, column]) / upper[column, column]
            work[:, column + 1 : stop] -= error.unsqueeze(1) * upper[column, column + 1 : stop]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return found[:, order.argsort()]


def _inverse_factor(moment_II: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped moment's inverse, fp64."""
    moment = moment_II.double()
    damp = (_DAMP * moment.diagonal().mean()).clamp_min(1e-30)
    moment = moment + damp * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    return factor
