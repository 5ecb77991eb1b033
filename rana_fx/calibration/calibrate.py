"""Run the model on calibration batches and keep what adaptation needs.

In: a model and batches (any pytree the model accepts). Out: the model's ``Layout`` and, for every group of sites, a
uniform sample of the tensor it reads. The model runs under ``torch.compile`` with an observing backend: each traced
graph is read once, a call that hands the group's input to its reservoir is put before the first linear of the group,
and the graph then runs eagerly. Memory does not grow with the number of tokens. Padding is not sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from rana_fx.calibration.batches import (
    call,
    check_batches,
    count_tokens,
    evaluating,
    failing_part,
    observing,
    padding_masks,
    real_rows,
    to_device,
)
from rana_fx.calibration.layout import Group, Layout, merge, observed_together
from rana_fx.calibration.samples import CAPACITY, Keep, Reservoir
from rana_fx.dense_memory import is_freed
from rana_fx.errors import NoBatches, NoLinears, NonFinite, TraceFailed, WeightsFreed
from rana_fx.graph.guards import guard_weights
from rana_fx.graph.linears import Scan, Skip, find_linears
from rana_fx.graph.normalize import prepare
from rana_fx.graph.roles import Fact, Reading, read_graph
from rana_fx.modules import device_of, names_of, quantised_modules, unwrap

_MOST_SEEN = 4096  # tokens of the first batch whose rows are kept before it is known which are wanted
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


class Observer:
    """The observing backend. Collects readings, and rows per group of weights."""

    def __init__(self, names: Mapping[int, str], *, capacity: int, seed: int) -> None:
        self.names = names
        self.capacity, self.seed = capacity, seed
        self.readings: list[Reading] = []
        self.seen: dict[frozenset[str], Reservoir] = {}  # by the sites that read a tensor, until the layout is settled
        self.wanted: dict[Group, Keep] | None = None  # None: not settled yet, keep all
        self.looking = False  # only at the layout: keep nothing
        self.samples: dict[tuple[str, ...], Reservoir] = {}  # by the sites of a group
        self.masks: dict[str, Tensor] = {}
        self.operations = 0

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[object], **_: object) -> Callable[..., Any]:
        prepare(graph_module, example_inputs)
        scan = find_linears(graph_module, example_inputs, self.names)
        for node, value in zip((n for n in graph_module.graph.nodes if n.op == "placeholder"), example_inputs, strict=False):
            if isinstance(value, Tensor) and not isinstance(value, torch._subclasses.FakeTensor):
                node.meta["rana_real"] = value.detach()
        _check_weights(scan)
        reading = read_graph(scan)
        self.operations += len(graph_module.graph.nodes)
        if self.wanted is None:
            self.readings.append(reading)
        guard_weights([linear.weight_node for linear in scan.linears], attachment=False)
        by_source: dict[Any, list[Fact]] = {}
        for fact in reading.facts:
            by_source.setdefault(fact.linear.source, []).append(fact)
        for source, names in observed_together(reading.facts).items():
            facts = by_source[source]
            decoder = any(word in name for fact in facts for name in fact.inputs for word in _DECODER_INPUTS)
            first = facts[0].linear
            with graph_module.graph.inserting_before(first.node):
                graph_module.graph.call_function(self._observe, (names, decoder, first.x))
        graph_module.recompile()
        return graph_module.forward

    def settle(self, wanted: Mapping[Group, Keep]) -> None:
        """From now on sample only these; what was seen so far counts."""
        self.wanted, self.looking = dict(wanted), False
        for group, keep in self.wanted.items():
            for key in sorted(group.seen_with & self.seen.keys(), key=sorted):
                if len(group.seen_with) == 1 and keep == Keep(self.capacity):
                    self.samples[group.sites] = self.seen[key]
                else:
                    self._sample(group, keep).add(self.seen[key].rows())
        self.seen = {}
        self.readings = []

    def _sample(self, group: Group, keep: Keep) -> Reservoir:
        if group.sites not in self.samples:
            self.samples[group.sites] = keep.start(seed=self.seed)
        return self.samples[group.sites]

    def _observe(self, names: tuple[str, ...], decoder: bool, x: Tensor) -> None:
        key = frozenset(names)
        known = self.seen.get(key)
        if known is not None and known.features not in (None, x.shape[-1]):
            return  # a weight used transposed as well; the layout leaves it out
        groups = [(group, keep) for group, keep in (self.wanted or {}).items() if key in group.seen_with]
        if self.wanted is not None and not groups:
            return
        rows = real_rows(x, self.masks.get("decoder_" if decoder else ""))
        finite = torch.isfinite(rows)
        if not finite.all():
            count = int((~finite).sum())
            raise NonFinite(site=names[0], count=count, what="input activations", shape=tuple(x.shape))
        if self.wanted is None and not self.looking:
            self.seen.setdefault(key, Reservoir(self.capacity, seed=self.seed)).add(rows)
        for group, keep in groups:
            self._sample(group, keep).add(rows)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    wanted: Callable[[Layout], Collection[tuple[str, ...]]],
    capacity: int = CAPACITY,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Layout, dict[tuple[str, ...], Reservoir], int]:
    """Layout of the model, samples per group and the number of tokens seen.

    Args:
        wanted: given the layout (after the first batch), the groups (by their site names) whose inputs to sample; a mapping says
            what to ``Keep`` of each. A large first batch runs twice, since what it is wanted for is not known the first time.
        capacity: rows kept per group where nothing else is said.

    Raises:
        NoBatches, NoLinears, NonFinite, TraceFailed, WeightsFreed, InvalidOption: ``batches`` is one batch.
    """
    model = unwrap(model)
    observer = Observer(names_of(model), capacity=capacity, seed=seed)
    layout: Layout | None = None
    tokens = 0
    with evaluating(model), observing(model), torch.no_grad():
        compiled = torch.compile(model, backend=observer)
        for index, batch in enumerate(tqdm(check_batches(batches), desc="calibrate", unit="batch", disable=not progress)):
            batch = to_device(batch, device_of(model))
            observer.masks = padding_masks(batch)
            count = count_tokens(batch, observer.masks)
            tokens += count
            observer.looking = layout is None and count > _MOST_SEEN
            _run(model, compiled, batch, index)
            if layout is None:
                layout = _settle(model, observer)
                again = observer.looking
                observer.settle(_keeps(layout, wanted(layout), Keep(capacity)))
                if again and observer.wanted:
                    _run(model, compiled, batch, index)
    if layout is None:
        raise NoBatches(hint=f"forward of {type(model).__name__}")
    return layout, observer.samples, tokens


def _run(model: nn.Module, compiled: Callable[..., Any], batch: Any, index: int) -> None:
    """Raises NonFinite, WeightsFreed, TraceFailed."""
    try:
        call(compiled, batch)
    except Exception as error:
        ours = _cause(error, (NonFinite, WeightsFreed))
        if ours is not None:
            raise ours from None
        part, reason = failing_part(model, error)
        raise TraceFailed(model=type(model).__name__, batch=index, part=part, reason=reason) from error


def _keeps(layout: Layout, wanted: Collection[tuple[str, ...]], default: Keep) -> dict[Group, Keep]:
    said = wanted if isinstance(wanted, Mapping) else {}
    return {group: said.get(group.sites, default) for group in layout.groups if group.sites in wanted}


def _settle(model: nn.Module, observer: Observer) -> Layout:
    layout = merge(observer.readings)
    known = {*layout.sites, *(skip.site for skip in layout.skips)}
    unseen = (Skip(name, reason) for name, reason in quantised_modules(model).items() if name not in known)
    layout = replace(layout, skips=(*layout.skips, *unseen))
    if not any(site.counted for site in layout.sites.values()):
        raise NoLinears(
            model=type(model).__name__,
            graphs=layout.graphs,
            nodes=observer.operations,
            skipped="; ".join(f"{skip.site}: {skip.reason}" for skip in layout.skips[:5]) or "none",
        )
    return layout


def _check_weights(scan: Scan) -> None:
    """Before anything runs: a NaN in a weight would show up in later activations, far from where it is."""
    for linear in scan.linears:
        if is_freed(linear.weight):
            raise WeightsFreed(site=linear.name, what="run the dense model")
        for what, parameter in (("weight", linear.weight), ("bias", linear.bias)):
            if parameter is None:
                continue
            bad = ~torch.isfinite(parameter.detach())
            if bad.any():
                raise NonFinite(site=linear.name, count=int(bad.sum()), what=what, shape=tuple(parameter.shape))


def _cause(error: BaseException | None, kind: tuple[type[BaseException], ...]) -> BaseException | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None
