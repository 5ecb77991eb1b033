"""Run the model on calibration batches and keep what adaptation needs.

In: a model and batches (any pytree the model accepts). Out: a ``Calibration``: the model's ``Layout`` and, for every group of
sites, a uniform sample of the tensor it reads. A ``Probe`` runs the model: each traced graph is read once, and before the first
linear of a group its input is added to the group's reservoir. Memory does not grow with the number of tokens. Padding is not
sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from rana_fx.calibration.batches import check_batches, failing_part, real_rows
from rana_fx.calibration.layout import Group, Layout, merge, observed_together
from rana_fx.calibration.probe import Probe, call_before, probing
from rana_fx.calibration.samples import CAPACITY, Keep, Reservoir
from rana_fx.dense_memory import is_freed
from rana_fx.errors import NoBatches, NoLinears, NonFinite, TraceFailed, WeightAbsent, WeightsFreed
from rana_fx.graph.guards import guard_weights
from rana_fx.graph.linears import Scan, Skip, find_linears
from rana_fx.graph.normalize import prepare
from rana_fx.graph.roles import Occurrence, TracedGraph, read_graph
from rana_fx.modules import absent_weight, names_of, quantised_modules, unwrap, wrapped_weights

_MOST_SEEN = 4096  # tokens of the first batch whose rows are kept before ``wanted`` has been called
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


@dataclass(frozen=True, eq=False)
class Calibration:
    """What calibration text shows of a model.

    Attributes:
        layout: sites, groups and MLP blocks of the model.
        samples: names of a group's sites (``Layout.sites_of_group``) -> rows of the tensor that they read.
        tokens: seen, padding not counted.
    """

    layout: Layout
    samples: dict[tuple[str, ...], Reservoir]
    tokens: int


class _Sampler:
    """Reads every traced graph once and samples the tensors that groups of linears read."""

    def __init__(self, model: nn.Module, *, capacity: int, seed: int) -> None:
        self.probe = Probe(model, self._instrument)
        self._names = names_of(model)
        self._capacity, self._seed = capacity, seed
        self.graphs: list[TracedGraph] = []  # until the layout is settled
        self.nodes = 0  # of all graphs
        self.samples: dict[tuple[str, ...], Reservoir] = {}  # by the sites of a group
        self.layout_only = False  # keep no rows
        self._unsettled: dict[frozenset[str], Reservoir] = {}  # by the sites that read a tensor, until the layout is settled
        self._wanted: dict[Group, Keep] | None = None  # None: not settled yet, keep all

    def settle(self, wanted: Mapping[Group, Keep]) -> None:
        """From now on sample only these; what was sampled so far counts."""
        self._wanted, self.layout_only = dict(wanted), False
        for group, keep in self._wanted.items():
            for key in sorted(group.seen_with & self._unsettled.keys(), key=sorted):
                if len(group.seen_with) == 1 and keep == Keep(self._capacity):
                    self.samples[group.sites] = self._unsettled[key]
                else:
                    self._sample(group, keep).add(self._unsettled[key].rows())
        self._unsettled = {}
        self.graphs = []

    def _instrument(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        prepare(graph_module, example_inputs)
        scan = find_linears(graph_module, example_inputs, self._names)
        _check_weights(scan)
        traced = read_graph(scan, _values(graph_module.graph, example_inputs))
        self.nodes += len(graph_module.graph.nodes)
        if self._wanted is None:
            self.graphs.append(traced)
        guard_weights([linear.weight_node for linear in scan.linears], attachment=False)
        readers: dict[Any, list[Occurrence]] = {}
        for occurrence in traced.occurrences:
            readers.setdefault(occurrence.linear.source, []).append(occurrence)
        for source, names in observed_together(traced.occurrences).items():
            inputs = (name for reader in readers[source] for name in reader.inputs)
            decoder = any(word in name for name in inputs for word in _DECODER_INPUTS)
            first = readers[source][0].linear
            call_before(first.node, self._observe, names, decoder, first.x)

    def _observe(self, names: tuple[str, ...], decoder: bool, x: Tensor) -> None:
        key = frozenset(names)
        known = self._unsettled.get(key)
        if known is not None and known.features not in (None, x.shape[-1]):
            return  # a weight used transposed as well; the layout leaves it out
        groups = [(group, keep) for group, keep in (self._wanted or {}).items() if key in group.seen_with]
        if self._wanted is not None and not groups:
            return
        rows = real_rows(x, self.probe.masks.get("decoder_" if decoder else ""))
        finite = torch.isfinite(rows)
        if not finite.all():
            count = int((~finite).sum())
            raise NonFinite(site=names[0], count=count, what="input activations", shape=tuple(x.shape))
        if self._wanted is None and not self.layout_only:
            self._unsettled.setdefault(key, Reservoir(self._capacity, seed=self._seed)).add(rows)
        for group, keep in groups:
            self._sample(group, keep).add(rows)

    @property
    def wants_rows(self) -> bool:
        """Whether any group is sampled, once settled."""
        return bool(self._wanted)

    def _sample(self, group: Group, keep: Keep) -> Reservoir:
        if group.sites not in self.samples:
            self.samples[group.sites] = keep.start(seed=self._seed)
        return self.samples[group.sites]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    wanted: Callable[[Layout], Collection[tuple[str, ...]]],
    capacity: int = CAPACITY,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Layout of the model, samples per group and the number of tokens seen.

    Args:
        wanted: given the layout (after the first batch), the groups (by their site names) whose inputs to sample; a
            mapping says what to ``Keep`` of each. A large first batch runs twice: the first time, the groups are not known.
        capacity: rows kept per group where ``wanted`` is no mapping.

    Raises:
        NoBatches, NoLinears, NonFinite, TraceFailed, WeightsFreed, WeightAbsent, InvalidOption: ``batches`` is one batch.
    """
    model = unwrap(model)
    absent = absent_weight(model)
    if absent is not None:
        raise WeightAbsent(model=type(model).__name__, site=absent)
    sampler = _Sampler(model, capacity=capacity, seed=seed)
    layout: Layout | None = None
    tokens = 0
    with probing(model), torch.no_grad():
        for index, batch in enumerate(tqdm(check_batches(batches), desc="calibrate", unit="batch", disable=not progress)):
            batch = sampler.probe.load(batch)
            count = sampler.probe.tokens(batch)
            tokens += count
            sampler.layout_only = layout is None and count > _MOST_SEEN
            _run(model, sampler.probe, batch, index)
            if layout is None:
                layout = _settle(model, sampler)
                again = sampler.layout_only
                sampler.settle(_keeps(layout, wanted(layout), Keep(capacity)))
                if again and sampler.wants_rows:
                    _run(model, sampler.probe, batch, index)
    if layout is None:
        raise NoBatches(hint=f"forward of {type(model).__name__}")
    return Calibration(layout, sampler.samples, tokens)


def _values(graph: fx.Graph, example_inputs: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """The real tensors behind a graph's placeholders."""
    pairs = zip((node for node in graph.nodes if node.op == "placeholder"), example_inputs, strict=False)
    fake = torch._subclasses.FakeTensor
    return {node: value.detach() for node, value in pairs if isinstance(value, Tensor) and not isinstance(value, fake)}


def _run(model: nn.Module, probe: Probe, batch: Any, index: int) -> None:
    """Raises NonFinite, WeightsFreed, TraceFailed."""
    try:
        probe.run(batch)
    except Exception as error:
        ours = _cause(error, (NonFinite, WeightsFreed))
        if ours is not None:
            raise ours from None
        part, reason = failing_part(model, error)
        raise TraceFailed(model=type(model).__name__, batch=index, part=part, reason=reason) from error


def _keeps(layout: Layout, wanted: Collection[tuple[str, ...]], default: Keep) -> dict[Group, Keep]:
    given = wanted if isinstance(wanted, Mapping) else {}
    return {group: given.get(group.sites, default) for group in layout.groups if group.sites in wanted}


def _settle(model: nn.Module, sampler: _Sampler) -> Layout:
    layout = merge(sampler.graphs)
    known = {*layout.sites, *(skip.site for skip in layout.skips)}
    hidden = wrapped_weights(model) | quantised_modules(model)
    unseen = (Skip(name, reason) for name, reason in hidden.items() if name not in known)
    layout = replace(layout, skips=(*layout.skips, *unseen))
    if not any(site.counted for site in layout.sites.values()):
        raise NoLinears(
            model=type(model).__name__,
            graphs=layout.graphs,
            nodes=sampler.nodes,
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
