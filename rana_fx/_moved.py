"""Old names of modules that moved, for one release: importing one warns and says where its content is now.

In: an import of an old name, as a third party's recipe or a pickled model makes it. Out: a module whose attributes are those
of the new one. Names that changed as well are listed in ``RENAMED``.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# old module -> new module, both below rana_fx
MOVED = {
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
    "recipes.exact": "recipes.rana.mlp_exact",
    "recipes.gated": "recipes.rana.mlp_gated",
    "recipes.geometry": "recipes.rana.loss_metric",
    "recipes.interplay": "recipes.rana.joint_drop",
    "recipes.menu": "recipes.rana.candidates",
    "recipes.menus": "recipes.rana.make_candidates",
    "recipes.point": "recipes.rana.operating_point",
    "recipes.race": "recipes.paper.split_search",
    "recipes.replay": "recipes.rana.replay",
    "recipes.rounding": "recipes.rana.gptq",
    "recipes.search": "recipes.rana.refine",
    "recipes.storage": "recipes.rana.quantization",
    "recipes.tails": "recipes.rana.tails",
    "recipes.trial": "recipes.simulate",
    "rehearse": "calibration.probe",
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
    "running.bare": "modules.unwrap",
    "running.weights_of": "modules.weights_of",
    "running.names_of": "modules.names_of",
    "running.quantised_modules": "modules.quantised_modules",
    "running.device_of": "modules.device_of",
}


class _Alias(ModuleType):
    """Stands at an old name; looks every attribute up where it is now."""

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
    """Last on sys.meta_path: asked only for names that no file has."""

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
    """Find old names, once a process."""
    if not any(type(finder).__name__ == _Finder.__name__ and type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
