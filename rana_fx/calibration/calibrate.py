"""Run the model on calibration batches and keep what adaptation needs.

In: a model and batches (any pytree the model accepts). Out: a ``Calibration``: the model's ``Layout`` and, for every group of
sites, a uniform sample of the tensor it reads. A ``Probe`` runs the model: each traced graph is read once, and before the first
linear of a group its input is added to the group's reservoir. Memory does not grow with the number of tokens. Padding is not
sampled. The layout grows with every batch that makes the model run what earlier ones did not (an image, an expert's first token).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_fx.calibration.batches import check_batches, failing_part, real_rows
from rana_fx.calibration.forward_passes import ForwardPasses
from rana_fx.calibration.holdout import Tee
from rana_fx.calibration.layout import OUTSIDE_OF_GRAPHS, Group, Layout, merge, observed_together
from rana_fx.calibration.probe import Probe, call_before, probing
from rana_fx.calibration.samples import CAPACITY, Keep, Reservoir
from rana_fx.calibration.unread import UnreadMatrices
from rana_fx.dense_memory import is_freed
from rana_fx.errors import CompilationDisabled, NoBatches, NoLinears, NonFinite, TraceFailed, WeightAbsent, WeightsFreed
from rana_fx.graph.guards import guard_weights
from rana_fx.graph.linears import Scan, Skip, find_linears
from rana_fx.graph.normalize import prepare
from rana_fx.graph.operands import base_name
from rana_fx.graph.roles import Occurrence, read_graph
from rana_fx.graph.transforms import outside, unbatched
from rana_fx.modules import absent_weight, names_of, quantised_modules, unwrap, weights_of, wrapped_weights
from rana_fx.progress import Progress, following

CALIBRATE = "calibrate"  # the name of this stage
_MOST_SEEN = 4096  # tokens of a batch whose rows are kept before ``wanted`` has been called for what it runs first
_FOREIGN = "its weight is no Parameter of the model: a variable, of a module in a plain list, or gathered while the model runs"
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
        self._held = weights_of(model).keys()
        self._capacity, self._seed = capacity, seed
        self.passes = ForwardPasses()
        self.unread = UnreadMatrices(model)
        self.nodes = 0  # of all graphs
        self.samples: dict[tuple[str, ...], Reservoir] = {}  # by the sites of a group
        self.layout_only = False  # keep no rows of what is new
        self.left_out: frozenset[frozenset[str]] = frozenset()  # sets of sites whose input is not sampled in this run
        self.known: frozenset[frozenset[str]] = frozenset()  # sets of sites that read a tensor, in the current layout
        self._unsettled: dict[frozenset[str], Reservoir] = {}  # of sets that are not known yet
        self._together: set[frozenset[str]] = set()  # all sets of sites that read a tensor
        self._wanted: dict[Group, Keep] = {}

    def settle(self, wanted: Mapping[Group, Keep]) -> None:
        """Sample only these groups from now on; rows that were already sampled of their sites are kept."""
        before = {name: sample for sites, sample in self.samples.items() for name in sites}
        self._wanted, self.samples = dict(wanted), {}
        for group, keep in self._wanted.items():
            if group.sites[0] in before:
                # groups only ever divide: all sites of this one were in one group
                self.samples[group.sites] = keep.continued(before[group.sites[0]], seed=self._seed)
            for key in sorted(group.seen_with & self._unsettled.keys(), key=sorted):
                if len(group.seen_with) == 1 and keep == Keep(self._capacity):
                    self.samples[group.sites] = self._unsettled[key]
                else:
                    self._sample(group, keep).add(self._unsettled[key].rows())
        self._unsettled, self.known = {}, frozenset(self._together)

    def _instrument(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        prepare(graph_module, example_inputs)
        scan = find_linears(graph_module, example_inputs, self._names)
        _check_weights(scan)
        self._leave_foreign(scan)
        traced = read_graph(scan, _values(graph_module.graph, example_inputs))
        self.nodes += len(graph_module.graph.nodes)
        self.unread.read |= {id(value) for value in (*example_inputs, *scan.weights.values())}
        guard_weights([linear.weight_node for linear in scan.linears], attachment=False)
        readers: dict[Any, list[Occurrence]] = {}
        for occurrence in traced.occurrences:
            readers.setdefault(occurrence.linear.source, []).append(occurrence)
        for source, names in observed_together(traced.occurrences).items():
            self._together.add(frozenset(names))
            inputs = (name for reader in readers[source] for name in reader.inputs)
            decoder = any(word in name for name in inputs for word in _DECODER_INPUTS)
            first = readers[source][0].linear
            call_before(first.node, self._observe, names, decoder, first.x)
        start = next(node for node in graph_module.graph.nodes if node.op != "placeholder")
        call_before(start, self.passes.ran, self.passes.add(traced))

    def _leave_foreign(self, scan: Scan) -> None:
        """A weight that the model does not hold as a Parameter of a module: no plan is attached to it."""
        foreign = [linear for linear in scan.linears if base_name(linear.name) not in self._held]
        scan.linears = [linear for linear in scan.linears if linear not in foreign]
        scan.skips += [Skip(linear.name, _FOREIGN) for linear in foreign]

    def _observe(self, names: tuple[str, ...], decoder: bool, x: Tensor) -> None:
        with outside(x):
            self._take(names, decoder, unbatched(x))

    def _take(self, names: tuple[str, ...], decoder: bool, x: Tensor) -> None:
        key = frozenset(names)
        if key in self.left_out:
            _check_input(names[0], x, real_rows(x, self.probe.masks.get("decoder_" if decoder else "")))
            return
        new = key not in self.known
        groups = [(group, keep) for group, keep in self._wanted.items() if key in group.seen_with]
        if not new and not groups:
            return
        held = [self._unsettled.get(key), *(self.samples.get(group.sites) for group, _ in groups)]
        if any(sample is not None and sample.features not in (None, x.shape[-1]) for sample in held):
            return  # a weight used transposed as well; the layout leaves it out
        rows = real_rows(x, self.probe.masks.get("decoder_" if decoder else ""))
        _check_input(names[0], x, rows)
        if new and not self.layout_only:
            self._unsettled.setdefault(key, Reservoir(self._capacity, seed=self._seed)).add(rows)
        for group, keep in groups:
            self._sample(group, keep).add(rows)

    def wants(self, sets: Collection[frozenset[str]]) -> bool:
        """Whether any group that reads a tensor as one of these sets of sites is sampled."""
        return any(not group.seen_with.isdisjoint(sets) for group in self._wanted)

    def _sample(self, group: Group, keep: Keep) -> Reservoir:
        if group.sites not in self.samples:
            self.samples[group.sites] = keep.start(seed=self._seed)
        return self.samples[group.sites]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    wanted: Callable[[Layout], Collection[tuple[str, ...]]] = lambda _: (),
    capacity: int = CAPACITY,
    scope: str = "blocks",
    seed: int = 0,
    progress: bool | Progress = True,
) -> Calibration:
    """Layout of the model, samples per group and the number of tokens seen.

    Args:
        batches: of a ``Tee``, held-out batches are sampled only for linears that no other batch runs.
        wanted: given the layout, the groups (by their site names) whose inputs to sample, none by default; a mapping has what to
            ``Keep`` of each. Called after the first batch with linears, and again whenever a batch runs linears that no earlier
            one did. Such a batch runs twice where it is large, since its groups are not known in the first run.
        capacity: rows kept per group where ``wanted`` is no mapping. scope: which linears the budget counts (``cost.SCOPES``).
        progress: True: a bar on stderr; or the ``Progress`` of the work that this is a stage of.

    Raises:
        NoBatches, NoLinears, NonFinite, TraceFailed, WeightsFreed, WeightAbsent, CompilationDisabled.
        InvalidOption: ``batches`` is one batch.
    """
    model = unwrap(model)
    absent = absent_weight(model)
    if absent is not None:
        raise WeightAbsent(model=type(model).__name__, site=absent)
    calibrating = _Calibrating(model, _Sampler(model, capacity=capacity, seed=seed), wanted, Keep(capacity), scope)
    tee = batches if isinstance(batches, Tee) else None
    index, tokens = -1, 0
    shown = following(progress, title="calibrate", shares={CALIBRATE: 1.0})
    with shown as steps, steps.stage(CALIBRATE), probing(model), torch.no_grad():
        for index, batch in enumerate(steps.each(check_batches(batches))):
            count, ran = calibrating.take(batch, index)
            tokens += count
            if tee is not None:
                tee.ran(ran)
        if tee is not None:
            tokens += calibrating.take_held_out(tee, index + 1, steps)
    if index < 0:
        raise NoBatches(hint=f"forward of {type(model).__name__}")
    return Calibration(calibrating.result(), calibrating.sampler.samples, tokens)


class _Calibrating:
    """A model that runs batches one by one, and the layout merged from all of them."""

    def __init__(
        self,
        model: nn.Module,
        sampler: _Sampler,
        wanted: Callable[[Layout], Collection[tuple[str, ...]]],
        keep: Keep,
        scope: str,
    ) -> None:
        self._model, self.sampler, self._wanted, self._keep, self._scope = model, sampler, wanted, keep, scope
        self._layout = Layout({}, (), (), (), 0)

    def take(self, batch: Any, index: int, *, held_out: bool = False) -> tuple[int, frozenset[str]]:
        """Run a batch; returns its tokens, padding not counted, and the names of the linears that it ran.

        held_out: sample only what no batch ran before it.
        """
        sampler, known = self.sampler, self.sampler.known
        batch = sampler.probe.load(batch)
        count = sampler.probe.tokens(batch)
        sampler.layout_only = count > _MOST_SEEN
        new, ran = self._run(batch, index, left_out=known if held_out else frozenset())
        if new:
            self._layout = merge(sampler.passes.kinds(), self._scope)
            if any(site.counted for site in self._layout.sites.values()):
                sampler.settle(_keeps(self._layout, self._wanted(self._layout), self._keep))
                if sampler.layout_only and sampler.wants(sampler.known - known):
                    self._run(batch, index, left_out=known)
            sampler.unread.run_eagerly(batch)
        return count, ran

    def take_held_out(self, tee: Tee, index: int, steps: Progress) -> int:
        """Run the held-out batches of a tee, and sample them where batches are mixed; returns the number of sampled tokens."""
        counted = 0
        sampled: list[tuple[Any, int, frozenset[frozenset[str]]]] = []
        for batch in tee.held_out():
            known = self.sampler.known
            count, ran = self.take(batch, index, held_out=True)
            tee.ran(ran)
            steps.advance()
            sampled.append((batch, count, self.sampler.known - known))
        for batch, count, new in sampled if tee.mixed else ():
            self._run(batch, index, left_out=new)
            counted += count
        return counted

    def _run(self, batch: Any, index: int, *, left_out: frozenset[frozenset[str]]) -> tuple[bool, frozenset[str]]:
        """(whether it is a new kind of forward pass, names of the linears). Raises NonFinite, WeightsFreed, TraceFailed."""
        self.sampler.left_out = left_out
        self.sampler.passes.begin()
        _run(self._model, self.sampler.probe, batch, index)
        return self.sampler.passes.end()

    def result(self) -> Layout:
        """The layout, with the matrices that no graph read. Raises NoLinears."""
        return _complete(self._model, self._layout, self.sampler)


def _values(graph: fx.Graph, example_inputs: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """The real tensors behind a graph's placeholders."""
    pairs = zip((node for node in graph.nodes if node.op == "placeholder"), example_inputs, strict=False)
    fake = torch._subclasses.FakeTensor
    return {node: value.detach() for node, value in pairs if isinstance(value, Tensor) and not isinstance(value, fake)}


def _run(model: nn.Module, probe: Probe, batch: Any, index: int) -> None:
    """Raises CompilationDisabled, NonFinite, WeightsFreed, TraceFailed."""
    try:
        probe.run(batch)
    except Exception as error:
        ours = _cause(error, (CompilationDisabled, NonFinite, WeightsFreed))
        if ours is not None:
            raise ours from None
        part, reason = failing_part(model, error)
        raise TraceFailed(model=type(model).__name__, batch=index, part=part, reason=reason) from error


def _keeps(layout: Layout, wanted: Collection[tuple[str, ...]], default: Keep) -> dict[Group, Keep]:
    given = wanted if isinstance(wanted, Mapping) else {}
    return {group: given.get(group.sites, default) for group in layout.groups if group.sites in wanted}


def _complete(model: nn.Module, layout: Layout, sampler: _Sampler) -> Layout:
    known = {*layout.sites, *(skip.site for skip in layout.skips)}
    hidden = wrapped_weights(model) | quantised_modules(model)
    quantised = [Skip(name, reason) for name, reason in hidden.items() if name not in known]
    skips, unread = (*layout.skips, *quantised), sampler.unread.result()
    if not any(site.counted for site in layout.sites.values()):
        outside = [f"{found.linears}: {OUTSIDE_OF_GRAPHS}" for found in unread if found.eager]
        raise NoLinears(
            model=type(model).__name__,
            graphs=layout.graphs,
            nodes=sampler.nodes,
            skipped="; ".join([f"{skip.site}: {skip.reason}" for skip in skips[:5]] + outside[:5]) or "none",
        )
    return replace(layout, skips=skips, unread=unread)


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


def _check_input(site: str, x: Tensor, rows: Tensor) -> None:
    """``rows``: of x, those that are not padding. Raises NonFinite."""
    finite = torch.isfinite(rows)
    if not finite.all():
        raise NonFinite(site=site, count=int((~finite).sum()), what="input activations", shape=tuple(x.shape))


def _cause(error: BaseException | None, kind: tuple[type[BaseException], ...]) -> BaseException | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None
