"""What an error at the output of a linear does to the model's output: second moments of gradients there.

In: an instrumented model and some batches. Out: for every unit (sites stacked over one input) the mean of g g^T over tokens,
g the gradient of a random projection of the model's output. For logits the projection is the log-likelihood of a label drawn
from the model's own distribution, so that half of e^T (E g g^T) e is, to second order, the KL divergence that an error e causes:
no labels are needed. Any other output is projected on normal noise, scaled by the output's own size. A unit with more outputs
than inputs has its moment in the coordinates of its input, where errors of anything made of W lie: (W^T g)(W^T g)^T. Where the
backward pass runs out of memory it is repeated on smaller batches; where it fails, or reaches some linears only, ``missing``
holds the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from rana_fx.calibration.batches import halves
from rana_fx.calibration.instrumented import InstrumentedModel
from rana_fx.calibration.layout import Layout
from rana_fx.progress import Progress

Unit = tuple[str, ...]

_PAIRS = 512  # tokens of a batch
_ROWS, _VALUES = 2048, 2**26  # rows of logits, and values, turned to probabilities at a time


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """``moments``: per unit. ``columns``: per site the mean square of W^T g, (in,): what dropping a unit of each input costs.

    Per site outside of the blocks ``outputs``: the mean square of g, (out,): what an error of each output costs; and ``pairs``: x
    and W^T g of some other tokens, (tokens, in) each.
    ``missing``: why there are none for some units, or for any; empty where there are all.
    """

    moments: dict[Unit, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    missing: str = ""


def sensitivities(
    model: InstrumentedModel,
    layout: Layout,
    units: Sequence[Unit],
    batches: Iterable[Any],
    *,
    held: Iterable[Any] = (),
    seed: int = 0,
    steps: Progress | None = None,
) -> Sensitivity:
    """Mean gradient moments over the real tokens of ``batches``; ``pairs`` of ``held``. A site may be in several units.

    ``steps``: told of each batch.
    """
    steps = steps or Progress()
    collector = _Collector(model, layout, units)
    generator: torch.Generator | None = None
    waiting, reached = [(batch, False) for batch in batches][::-1], False
    if any(layout.sites[name].outside_blocks for unit in units for name in unit):
        waiting = [*((batch, True) for batch in held), *waiting]
    done = 0
    while waiting:
        steps.expect(done + len(waiting))  # batches may be halved on the way
        batch, is_held = waiting.pop()
        try:
            with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
                # Dynamo looks whether tensors that cross a graph break have gradients
                warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                output = model.run(batch, collector.step)
                generator = generator or torch.Generator(_device(output)).manual_seed(seed)
                loss = _projected(output, model, generator)
                if loss is not None and loss.requires_grad and collector.leaves:
                    torch.autograd.grad(loss, collector.leaves, allow_unused=True)
                    reached = True
            collector.settle(held=is_held)
            done += 1
            steps.advance()
            continue
        except torch.OutOfMemoryError:
            smaller = halves(batch)
            reason = "out of memory, on a batch that cannot be made smaller"
        except Exception as error:  # of the model's own code and its operations: whatever it is, there are no gradients
            smaller, (reason, *_) = [], [*str(error).strip().splitlines(), type(error).__name__]
        # outside of the handlers, which hold the frames of what failed, and their tensors
        output = loss = None
        collector.drop()
        if not smaller:
            return Sensitivity(missing=f"the backward pass failed: {reason}")
        waiting += [(part, is_held) for part in smaller[::-1]]
    if not reached:
        return Sensitivity(missing="its output does not depend on its linears by differentiable operations")
    return collector.result()


class _Collector:
    """Takes gradients of one batch after the other at the linears' outputs."""

    def __init__(self, model: InstrumentedModel, layout: Layout, units: Sequence[Unit]) -> None:
        self._model, self._layout = model, layout
        self._units_of: dict[str, list[Unit]] = {}
        for unit in units:
            for name in unit:
                self._units_of.setdefault(name, []).append(unit)
        self._outs = {unit: [layout.sites[name].out_features for name in unit] for unit in units}
        self._moments: dict[Unit, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._tokens: dict[Unit, int] = {}
        self.leaves: list[Tensor] = []
        self._uses: dict[str, int] = {}
        # of the batch that runs: they count once its backward pass is done
        self._rows: dict[tuple[Unit, int], Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._output_squares: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._new_pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """For ``InstrumentedModel.run``."""
        if not y.requires_grad:
            self.leaves.append(y.detach().requires_grad_())
            y = self.leaves[-1] * 1  # what follows may write into it
        if name in self._units_of:
            use = self._uses[name] = self._uses.get(name, -1) + 1
            if use == 0 and self._layout.sites[name].outside_blocks:
                self._inputs[name] = self._model.real(x)
            y.register_hook(partial(self._take, name, use))
        return y

    def _take(self, name: str, use: int, gradient: Tensor) -> None:
        site = self._layout.sites[name]
        rows = self._model.real(gradient)
        inner = rows @ site.view.to(rows.dtype)
        _add(self._squares, name, inner.float().square().sum(0))
        if site.outside_blocks:
            if use == 0:
                # .clone(): a view would keep all rows
                step = -(-len(inner) // _PAIRS)
                self._new_pairs[name] = self._inputs.pop(name)[::step].clone(), inner[::step].clone()
            # of a vocabulary, piece by piece
            for part in rows.split(rows_at_once(rows.shape[1])):
                _add(self._output_squares, name, part.float().square().sum(0))
        for unit in self._units_of[name]:
            if sum(self._outs[unit]) > site.in_features:
                # in place: no two units may add to one tensor
                held = self._rows.setdefault((unit, use), torch.zeros_like(inner))
                held += inner
                continue
            held = self._rows.setdefault((unit, use), rows.new_zeros(len(rows), sum(self._outs[unit])))
            start = sum(self._outs[unit][: unit.index(name)])
            held[:, start : start + rows.shape[1]] += rows

    def settle(self, *, held: bool) -> None:
        """After the backward pass of a batch."""
        if held:
            for name, pair in self._new_pairs.items():
                self._pairs.setdefault(name, []).append(pair)
            self.drop()
            return
        for name, squares in self._squares.items():
            _add(self._columns, name, squares)
        for name, squares in self._output_squares.items():
            _add(self._outputs, name, squares)
        for unit, use in list(self._rows):
            rows = self._rows.pop((unit, use))
            _add(self._moments, unit, rows.float().t() @ rows.float())
            self._tokens[unit] = self._tokens.get(unit, 0) + len(rows)
        self.drop()

    def drop(self) -> None:
        """Release what is held of the batch that ran."""
        self._rows, self._squares, self._output_squares, self._uses, self.leaves = {}, {}, {}, {}, []
        self._inputs, self._new_pairs = {}, {}

    def result(self) -> Sensitivity:
        lost = {}
        for unit in self._outs:
            moment = self._moments.get(unit)
            if moment is None or float(moment.diagonal().sum()) == 0:
                lost[unit] = "no gradient reached"
            elif not torch.isfinite(moment).all():
                lost[unit] = "gradients were not finite at"
            else:
                self._moments[unit] = moment.div_(self._tokens[unit])
        for unit in lost:
            self._moments.pop(unit, None)
        columns, outputs = (
            {name: sums[name] / self._tokens[unit] for unit in self._moments for name in unit if name in sums}
            for sums in (self._columns, self._outputs)
        )
        pairs = {
            name: (torch.cat([x for x, _ in found]), torch.cat([g for _, g in found])) for name, found in self._pairs.items()
        }
        missing = ""
        if lost:
            (unit, why), count = next(iter(lost.items())), len(self._outs)
            missing = f"{why} {unit[0]} ({len(lost)} of {count} groups of linears are without)"
        return Sensitivity(self._moments, columns, outputs, pairs, missing)


def _add(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
    """In place, where there is something already."""
    sums[key] = sums[key].add_(value) if key in sums else value


def rows_at_once(classes: int) -> int:
    """Rows of logits that are in memory as probabilities at a time: fewer where the vocabulary is large."""
    return max(1, min(_ROWS, _VALUES // classes))


def logits_of(output: Any) -> Tensor | None:
    """Scores over classes in the last dimension, (..., C), where the output has such."""
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() <= 3 and found.shape[-1] > 1 else None


def floating(output: Any) -> list[Tensor]:
    """Floating tensors of an output, its caches left out."""
    if isinstance(output, dict):
        output = {key: value for key, value in output.items() if "past" not in str(key) and "cache" not in str(key)}
    elif hasattr(output, "__dict__") and not isinstance(output, (Tensor, tuple, list)):
        output = {key: value for key, value in vars(output).items() if "past" not in key and "cache" not in key}
    tree: Any = dict(output) if isinstance(output, dict) else output
    leaves = optree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 1]


def compared(output: Any) -> Any:
    """The parts of an output that ``divergence`` reads; caches are left out."""
    logits = logits_of(output)
    return tuple(floating(output)) if logits is None else {"logits": logits}


def real_outputs(values: Tensor, model: InstrumentedModel) -> Tensor:
    """Rows of an output, (rows, features), padding left out where it has a row per token."""
    return values.reshape(1, -1) if values.dim() == 1 else model.real(values)


def _projected(output: Any, model: InstrumentedModel, generator: torch.Generator) -> Tensor | None:
    logits = logits_of(output)
    if logits is not None:
        rows = rows_of(logits, model)
        total = rows.new_zeros((), dtype=torch.float32)
        for chunk in rows.split(rows_at_once(rows.shape[1])):
            wide = chunk.float()
            with torch.no_grad():
                drawn = torch.multinomial(wide.softmax(-1), 1, generator=generator).squeeze(-1)
            total = total + torch.nn.functional.cross_entropy(wide, drawn, reduction="sum")
        return total
    projected: Tensor | None = None
    for tensor in floating(output):
        if tensor.requires_grad:
            noise = torch.empty_like(tensor, requires_grad=False).normal_(generator=generator)
            scale = tensor.detach().float().square().mean().sqrt().clamp_min(1e-12) * tensor.shape[-1] ** 0.5
            part = (tensor * noise).float().sum() / scale
            projected = part if projected is None else projected + part
    return projected


def rows_of(values: Tensor, model: InstrumentedModel) -> Tensor:
    """As ``real_outputs``, with gradients."""
    mask = model.mask(values)
    rows = values.reshape(-1, values.shape[-1])
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]


def _device(output: Any) -> torch.device:
    found = floating(output)
    return found[0].device if found else torch.device("cpu")


def divergence(output: Any, dense: Any, model: InstrumentedModel) -> tuple[float, int]:
    """(sum, rows): KL divergence from the dense model's logits, or relative squared error of its other outputs."""
    logits, expected = logits_of(output), logits_of(dense)
    if logits is not None and expected is not None:
        total, count = 0.0, 0
        most = rows_at_once(logits.shape[-1])
        pairs = zip(real_outputs(logits, model).split(most), real_outputs(expected, model).split(most), strict=True)
        for rows, reference in pairs:
            log_q, log_p = rows.float().log_softmax(-1), reference.float().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            count += len(rows)
        return total, count
    total, count = 0.0, 0
    for tensor, reference in zip(floating(output), floating(dense), strict=True):
        rows, wanted = real_outputs(tensor, model).double(), real_outputs(reference, model).double()
        size = float(wanted.square().mean(0).sum()) or 1.0
        total += float((rows - wanted).square().sum()) / size
        count += len(rows)
    return total, max(1, count)
