"""Old names of modules that moved, for one release: importing one issues a warning with the new name.

In: an import of an old name, for example in a third-party recipe or a pickled model. Out: a module whose attributes are those
of the new one. Names that changed as well are listed in ``RENAMED``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

_T = TypeVar("_T")

# old module -> new module, both below rana_fx
MOVED = {
    "demo": "commands.demo_run",
    "adapters": "adapter",
    "aliases": "graph.functionalize",
    "attachment": "runtime.attachment",
    "calibrate": "calibration.calibrate",
    "checkpointed": "graph.checkpoint_regions",
    "decompose": "recipes.paper.line_search",
    "einsums": "graph.einsums",
    "evaluate": "evaluation.perplexity",
    "generation": "evaluation.generate",
    "groups": "graph.roles",
    "guards": "graph.guards",
    "histogram": "calibration.score_histogram",
    "kernels.config": "kernels.triton.config",
    "kernels.finish": "kernels.triton.splitk",
    "kernels.gather": "kernels.triton.compaction",
    "kernels.masked_gemv": "kernels.triton.masked_gemv",
    "kernels.masked_gemv_cpp": "kernels.cpp.masked_gemv",
    "kernels.masked_parts": "kernels.triton.masked_gemv_concat",
    "kernels.masked_rows": "kernels.triton.masked_rows",
    "kernels.masked_rows_cpp": "kernels.cpp.masked_rows",
    "kernels.packed": "kernels.triton.masked_gemv_packed",
    "kernels.quantize": "formats",
    "kernels.router": "kernels.triton.router",
    "kernels.router_cpp": "kernels.cpp.router",
    "kernels.template_cpp": "kernels.cpp.template",
    "kernels.tune": "kernels.autotune",
    "layout": "calibration.layout",
    "lowrank": "runtime.lora_state",
    "measure": "evaluation.measure",
    "option": "runtime.plan_option",
    "passes.add_lowrank": "passes.rewrite_lora",
    "passes.beside": "passes.check_foreign_lora",
    "passes.freed": "passes.check_freed",
    "passes.fuse": "passes.fuse_norm",
    "passes.fuse_parts": "passes.fuse_same_input",
    "planfile": "plan_io",
    "prefill": "runtime.prefill",
    "prepare": "graph.normalize",
    "recipes.allocate": "recipes.rana.allocate",
    "recipes.build": "recipes.rana.builders",
    "recipes.cut": "recipes.rana.mlp_candidate",
    "recipes.cuttable": "recipes.rana.eligible_mlps",
    "recipes.gated": "recipes.rana.mlp_gated",
    "recipes.geometry": "recipes.rana.loss_metric",
    "recipes.interplay": "recipes.rana.joint_drop",
    "recipes.menu": "recipes.rana.candidates",
    "recipes.menus": "recipes.rana.make_candidates",
    "recipes.point": "recipes.rana.operating_point",
    "recipes.race": "recipes.paper.split_search",
    "recipes.rounding": "recipes.rana.gptq",
    "recipes.search": "recipes.rana.refine",
    "recipes.storage": "recipes.rana.quantization",
    "recipes.tails": "calibration.score_histogram",
    "recipes.trial": "recipes.simulate",
    "rehearse": "calibration.holdout",
    "relayout": "runtime.column_major",
    "release": "dense_memory",
    "running": "calibration.batches",
    "sensitivity": "calibration.sensitivity",
    "sites": "graph.linears",
    "stats": "calibration.samples",
    "text": "evaluation.text",
    "training.accelerated": "integrations.accelerate",
    "unfuse": "graph.decompose_fused",
    "weights": "graph.operands",
}

# old attribute -> new attribute, in full
RENAMED = {
    "decompose.Basis": "recipes.basis.Basis",
    "decompose.Choice": "recipes.basis.RankThreshold",
    "decompose.importance_profile": "recipes.importance.importance_profile",
    "decompose.neuron_threshold": "recipes.importance.neuron_threshold",
    "decompose.output_basis": "recipes.basis.output_basis",
    "decompose.second_moment": "recipes.basis.second_moment",
    "recipes.allocate.Choice": "recipes.rana.decision.Choice",
    "recipes.build.settled": "recipes.rana.builders.for_plan",
    "recipes.cut.Acted": "recipes.rana.mlp_candidate.AdaptedRows",
    "recipes.cut.Cut": "recipes.rana.mlp_candidate.MlpCandidate",
    "recipes.cut.Rows": "recipes.rana.mlp_candidate.MlpRows",
    "recipes.cuttable.Cuttable": "recipes.rana.eligible_mlps.EligibleMlp",
    "recipes.cuttable.cuttables": "recipes.rana.eligible_mlps.eligible_mlps",
    "recipes.gated.GatedCut": "recipes.rana.mlp_gated.GatedMlp",
    "recipes.geometry.Geometry": "recipes.rana.loss_metric.LossMetric",
    "recipes.geometry.LossBasis": "recipes.basis.Basis",
    "recipes.geometry.geometry": "recipes.rana.loss_metric.loss_metric",
    "recipes.interplay.Interplay": "recipes.rana.joint_drop.JointDropCorrection",
    "recipes.menu.Menu": "recipes.rana.candidates.UnitCandidates",
    "recipes.menu.OF_BASIS": "recipes.rana.operating_point.BASIS_KINDS",
    "recipes.menu.Part": "recipes.rana.candidates.UnitSite",
    "recipes.menus.ROWS": "recipes.rana.unit_rows.ROWS",
    "recipes.menus.average": "recipes.rana.make_candidates.typical_scale",
    "recipes.menus.has_basis": "recipes.rana.units.has_basis",
    "recipes.menus.menus_of": "recipes.rana.make_candidates.make_decisions",
    "recipes.menus.shape_of_unit": "recipes.rana.units.shape_of_unit",
    "recipes.point.CUTS": "recipes.rana.operating_point.JOINT_KINDS",
    "recipes.point.Point": "recipes.rana.operating_point.OperatingPoint",
    "recipes.point.Unit": "recipes.rana.units.Unit",
    "recipes.race.Candidate": "recipes.paper.split_search.SplitCandidate",
    "recipes.race.race": "recipes.paper.split_search.successive_elimination",
    "recipes.rounding.rounded": "recipes.rana.gptq.quantize",
    "recipes.search.ALLOCATIONS": "recipes.rana.options.ALLOCATIONS",
    "recipes.search.search": "recipes.rana.refine.refine",
    "recipes.storage.KINDS": "recipes.rana.operating_point.KINDS",
    "recipes.storage.Storage": "recipes.rana.quantization.UnitFormat",
    "recipes.storage.in_fewer_bits": "recipes.rana.quantization.quantized_formats",
    "recipes.storage.own": "recipes.rana.quantization.unquantized",
    "calibrate.Observer": "calibration.probe.Probe",
    "groups.Block": "graph.mlp_blocks.TracedMlp",
    "groups.Fact": "graph.roles.Occurrence",
    "groups.Reading": "graph.roles.TracedGraph",
    "groups.descendants_of_weights": "graph.roles.nodes_of_weights",
    "groups.met_is_not_stream": "graph.roles.router_precedes_residual",
    "recipes.tails.Tails": "calibration.score_histogram.Survival",
    "rehearse.Keeper": "calibration.holdout.Tee",
    "rehearse.Rehearsal": "calibration.holdout.Holdout",
    "rehearse.Stage": "calibration.instrumented.InstrumentedModel",
    "rehearse.Step": "calibration.instrumented.Step",
    "rehearse.halves": "calibration.batches.halves",
    "sites.operands_of": "graph.matmuls.operands_of",
    "weights.INDEXING": "graph.ops.INDEXING",
    "weights.TRANSPOSES": "graph.ops.TRANSPOSES",
    "running.bare": "modules.unwrap",
    "running.device_of": "modules.device_of",
    "running.names_of": "modules.names_of",
    "running.quantised_modules": "modules.quantised_modules",
    "running.weights_of": "modules.weights_of",
}


class _Alias(ModuleType):
    """The module of an old name; looks up every attribute in the new module."""

    def __getattr__(self, name: str) -> object:
        old = self.__name__.removeprefix("rana_fx.")
        if name.startswith("__"):
            raise AttributeError(name)
        module, _, attribute = RENAMED.get(f"{old}.{name}", f"{MOVED[old]}.{name}").rpartition(".")
        found = importlib.import_module(f"rana_fx.{module}")
        if not hasattr(found, attribute):
            raise AttributeError(f"rana_fx.{old}.{name} is gone: rana_fx.{old} is rana_fx.{MOVED[old]} now, which has no {name}")
        return getattr(found, attribute)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on sys.meta_path, so that it is called only for names that no other finder resolves."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.removeprefix("rana_fx.") not in MOVED or not fullname.startswith("rana_fx."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.removeprefix("rana_fx.")]
        text = f"{module.__name__} moved to rana_fx.{new}; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)


def install() -> None:
    """Register the finder of old names, once per process."""
    if not any(type(finder).__name__ == _Finder.__name__ and type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def methods(owner: type, **functions: Callable[..., Any]) -> None:
    """Functions that were methods of ``owner`` by these names stay methods, with a warning, for one release."""
    for name, function in functions.items():
        setattr(owner, name, _method(owner, name, function))


def _method(owner: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: object, *args: object, **options: object) -> Any:
        now = f"{function.__module__}.{function.__name__}({owner.__name__.lower()}, ...)"
        text = f"{owner.__name__}.{name} is {now}; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return function(self, *args, **options)

    return call


def options(**renamed: str) -> Callable[[type[_T]], type[_T]]:
    """Decorates a dataclass, whose fields may be given, and read, by their old names, with a warning, for one release."""

    def decorate(owner: type[_T]) -> type[_T]:
        init = owner.__init__

        def __init__(self: _T, **given: object) -> None:
            for old in given.keys() & renamed.keys():
                _warn_renamed(type(self), old, renamed[old])
                given[renamed[old]] = given.pop(old)
            init(self, **given)

        owner.__init__ = __init__  # type: ignore[assignment]
        for old, new in renamed.items():
            setattr(owner, old, property(_reader(owner, old, new)))
        return owner

    return decorate


def _reader(owner: type, old: str, new: str) -> Callable[[object], Any]:
    def read(self: object) -> Any:
        _warn_renamed(owner, old, new)
        return getattr(self, new)

    return read


def _warn_renamed(owner: type, old: str, new: str) -> None:
    text = f"{owner.__name__}: {old} is {new} now; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
