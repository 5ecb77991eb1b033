"""SliceGPT (Ashkboos et al., ICLR 2024, arXiv 2401.15024): the residual stream in fewer dimensions, for some architectures.

In: a model, its layout, a budget and calibration batches. Out: a ``Sliced``: k principal directions Q for every point of the
residual stream that a norm reads; with these the model computes exactly the outputs of the sliced model. A sliced model stores
the stream as Q^T x, so its matrices have k inputs or outputs instead of D, and the residual to the next point is multiplied by
Q^T Q' (k x k). Here the stream keeps its D dimensions and is projected at each point, x -> Q Q^T x, with the same result: norms
divide by the length over the old D, and LayerNorm's mean is subtracted from the stream first.

As published: directions of the norms' outputs before their gains, each with all earlier points sliced; one point before
attention and one before the MLP, or one for both where they are parallel; embeddings are sliced, the input of the head is not.
The budget counts the linears of the layout and the products with Q^T Q'. k is any number (the authors round to multiples of 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rana_fx.calibration.batches import to_device
from rana_fx.calibration.layout import Layout
from rana_fx.errors import BudgetUnreachable, InvalidOption
from rana_fx.modules import device_of

_ATTENTION = {"llama": "self_attn", "gemma": "self_attn", "gpt_neox": "attention"}
_READS, _WRITES = ("attention_in", "up"), ("attention_out", "down")


@dataclass(frozen=True, eq=False)
class Stream:
    """The points where the stream is sliced.

    ``points``: in order, (module, flag): True if the stream is the module's first input; False if it is the block's first input
    plus the module's output.
    """

    width: int
    points: tuple[tuple[nn.Module, bool], ...]
    last: tuple[nn.Module, ...]  # modules whose linears write the input of the head
    centred: bool


def stream_of(model: nn.Module) -> Stream:
    """The points of a model. Raises InvalidOption for architectures that are not known here."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in _ATTENTION:
        known = ", ".join(sorted(_ATTENTION))
        raise InvalidOption(name="--recipes", got=f"slicegpt for a model of type {kind!r}", expected=f"one of type {known}")
    base: Any = model.get_submodule(model.base_model_prefix)  # type: ignore[arg-type]
    parallel = bool(getattr(config, "use_parallel_residual", False))
    points: list[tuple[nn.Module, bool]] = []
    for block in base.layers:
        points.append((block, True))
        if not parallel:
            points.append((getattr(block, _ATTENTION[kind]), False))
    end = base.layers[-1]
    return Stream(config.hidden_size, tuple(points), (end,) if parallel else (end.mlp,), kind == "gpt_neox")


@dataclass(frozen=True, eq=False)
class Sliced:
    """``directions``: per point, (D, k). ``cost``: of everything that the budget counts, over dense."""

    stream: Stream
    directions: tuple[Tensor, ...]
    cost: float

    @contextmanager
    def acting(self, watch: Callable[[Tensor], None] | None = None) -> Iterator[None]:
        """Inside, the model is sliced at all points with directions; ``watch`` is called with the stream at the next point."""
        inputs: dict[str, Tensor] = {}
        handles = []
        for index, (module, reads) in enumerate(self.stream.points[: len(self.directions) + (watch is not None)]):
            directions = self.directions[index] if index < len(self.directions) else None

            def at(x: Tensor, directions: Tensor | None = directions) -> Tensor:
                if directions is not None:
                    return self._projected(x, directions)
                assert watch is not None
                watch(_centred(x) if self.stream.centred else x)
                return x

            def before(_: nn.Module, args: tuple[Any, ...], at: Callable[[Tensor], Tensor] = at) -> tuple[Any, ...]:
                inputs["block"] = at(args[0])
                return inputs["block"], *args[1:]

            def after(_: nn.Module, __: Any, output: Any, at: Callable[[Tensor], Tensor] = at) -> Any:
                # the block adds its first input to this
                added, *rest = output
                return at(inputs["block"] + added) - inputs["block"], *rest

            handles.append(module.register_forward_pre_hook(before) if reads else module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _projected(self, x: Tensor, directions: Tensor) -> Tensor:
        wide = _centred(x) if self.stream.centred else x.float()
        # the sliced model stores the projection in its dtype
        held = (wide @ directions).to(x.dtype)
        return (held.float() @ directions.t()).to(x.dtype)


def sliced(model: nn.Module, layout: Layout, *, budget: float, batches: Iterable[Any]) -> Sliced:
    """Slice a model to a budget. Raises BudgetUnreachable, InvalidOption."""
    stream = stream_of(model)
    kept, cost = _kept(model, layout, stream, budget)
    found = Sliced(stream, (), cost)
    held = [to_device(batch, device_of(model)) for batch in batches]
    for _ in stream.points:
        moment = _moment(model, found, held)
        directions = torch.linalg.eigh(moment).eigenvectors[:, -kept:].flip(1)
        found = Sliced(stream, (*found.directions, directions.float().contiguous()), cost)
    return found


class _Reached(Exception):
    """Ends a forward pass once the point is reached."""


def _moment(model: nn.Module, found: Sliced, batches: Iterable[Any]) -> Tensor:
    """Sum of x x^T of the normalised stream at the first point without directions, (D, D), fp64."""
    width = found.stream.width
    total = torch.zeros(width, width, dtype=torch.float64, device=device_of(model))
    for batch in batches:

        def watch(x: Tensor, mask: Tensor = batch["attention_mask"]) -> None:
            rows = x.float()[mask.bool()]
            rows = rows / rows.square().mean(1, keepdim=True).add(1e-12).sqrt()
            total.add_((rows.t() @ rows).double())
            raise _Reached

        with torch.no_grad(), found.acting(watch):
            try:
                model(**batch)
            except _Reached:
                continue
            raise AssertionError("the model ran without reaching the point")
    return total


def _kept(model: nn.Module, layout: Layout, stream: Stream, budget: float) -> tuple[int, float]:
    """(k, cost over dense): the largest number of dimensions within the budget."""
    prefixes = {id(module): name for name, module in model.named_modules()}
    ends = tuple(f"{prefixes[id(module)]}." for module in stream.last)
    dense = each = fixed = 0.0
    for site in layout.sites.values():
        if not site.counted:
            continue
        reads = site.role in _READS and site.in_features == stream.width
        writes = site.role in _WRITES and site.out_features == stream.width
        if not reads and not writes:
            shape = f"{site.name} ({site.role}, {site.out_features}x{site.in_features})"
            raise InvalidOption(
                name="--recipes", got=f"slicegpt and {shape}", expected="linears that read or write the residual stream"
            )
        dense += site.flops
        whole = writes and site.name.startswith(ends)
        if whole:
            fixed += site.flops
        else:
            each += site.flops / stream.width
    shortcuts = len(stream.points) - 1
    # the last residual is multiplied back to D dimensions
    each += stream.width

    def cost(kept: int) -> float:
        return (fixed + kept * each + shortcuts * kept * kept) / dense

    most = max((kept for kept in range(1, stream.width + 1) if cost(kept) <= budget), default=0)
    if most == 0:
        raise BudgetUnreachable(
            budget=budget, recipe="slicegpt", lowest=min(1.0, cost(1) + 0.01),
            why="the input of the head keeps all its dimensions", recipes="static, teal and wina adapt every layer",
        )  # fmt: skip
    return most, cost(most)


def _centred(x: Tensor) -> Tensor:
    wide = x.float()
    return wide - wide.mean(-1, keepdim=True)
