"""The stages of ``bench.reproduce`` that do not train, and the model, calibration, texts and plans that all stages share.

In: a ``Setup`` and a ``ResultStore``. Out: rows of the stages quality, mlp, tasks and latency, each added when it is complete;
rows that the store has are not computed again. Model, calibration and plans are made when a row first needs them; plans are saved
in a folder, so that a later run, also of the stage latency alone, does not calibrate again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.common.calibrated import Calibrated, batches_of, calibrate_once
from bench.common.documents import Text, read_text
from bench.common.result_store import ResultStore, key_of
from bench.quality.methods import Planned
from bench.quality.mlp_error import RECIPES_OF_BLOCKS, errors, held_out_samples
from bench.quality.quality import evaluation_facts, loss_facts
from bench.quality.rank_need import rank_needs
from bench.speed import decode
from rana_fx.errors import BudgetUnreachable, TooFewTokens
from rana_fx.evaluation.perplexity import Quality, evaluate, load_model
from rana_fx.plan import Plan, load_plan
from rana_fx.plan_io import HEADER

UNREACHABLE = (BudgetUnreachable, TooFewTokens)


@dataclass(frozen=True)
class Setup:
    """Settings of plans and of their evaluation. ``texts``: held-out texts; errors of MLP outputs use the first one."""

    model: str
    calib: str
    texts: tuple[str, ...]
    recipes: tuple[str, ...]
    budgets: tuple[float, ...]
    metric: str = "flops"
    tokens: int = 32_000
    eval_tokens: int = 65_536
    mlp_tokens: int = 4_096
    context: int = 512
    dtype: str = "float32"
    seed: int = 0

    def of_plan(self, recipe: str, budget: float) -> dict[str, Any]:
        """Settings that a plan depends on; files by name, so that rows hold no machine paths."""
        return {
            "model": Path(self.model).name,
            "calibration": Path(self.calib).name,
            "calibration_tokens": self.tokens,
            "context": self.context,
            "dtype": self.dtype,
            "metric": self.metric,
            "seed": self.seed,
            "recipe": recipe,
            "budget": budget,
        }

    def of_text(self, recipe: str, budget: float, text: str) -> dict[str, Any]:
        """Settings that the loss of a plan on a text depends on."""
        return self.of_plan(recipe, budget) | {"eval_tokens": self.eval_tokens, "text": text}

    def points(self) -> Iterator[tuple[str, float]]:
        """(recipe, budget) of every plan."""
        for budget in self.budgets:
            for recipe in self.recipes:
                yield recipe, budget


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness and their options."""

    names: tuple[str, ...]
    shots: int | None
    limit: int | None
    include: Path | None
    batch_size: int
    compile: bool


@dataclass(frozen=True)
class DecodeOptions:
    """Options of ``bench.speed.decode``."""

    variants: str
    mode: str
    sequences: int
    longest: int
    new_tokens: int
    seconds: float | None


class Study:
    """Runs the stages for one model. ``work``: folder for plans and trained models."""

    def __init__(self, setup: Setup, store: ResultStore, work: Path) -> None:
        self.setup, self.store, self.work = setup, store, work
        self.progress = sys.stderr.isatty()
        self._dense: dict[str, Quality] = {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_model(self.setup.model, dtype=self.setup.dtype)

    @property
    def network(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def calibrated(self) -> Calibrated:
        setup = self.setup
        batches = batches_of(setup.calib, self.tokenizer, tokens=setup.tokens, context=setup.context)
        return calibrate_once(self.network, batches, seed=setup.seed, progress=self.progress)

    @cached_property
    def texts(self) -> dict[str, Text]:
        setup = self.setup
        return {
            Path(source).name: read_text(source, self.tokenizer, tokens=setup.eval_tokens, context=setup.context)
            for source in setup.texts
        }

    def folder(self, what: str, recipe: str, budget: float, **more: Any) -> Path:
        """Folder of a plan or a trained model; its name has a digest of all settings."""
        settings = self.setup.of_plan(recipe, budget) | {"commit": self.store.common["commit"]} | more
        return self.work / f"{what}-{recipe}-{budget:g}-{key_of(what, settings)[:8]}"

    def plan(self, recipe: str, budget: float) -> tuple[Plan, float]:
        """(plan, seconds to solve). A saved plan is loaded on the CPU, with 0 seconds. Raises BudgetUnreachable, TooFewTokens."""
        folder = self.folder("plan", recipe, budget)
        if (folder / HEADER).is_file():  # written last: a save that was killed leaves a folder without it
            return load_plan(folder), 0.0
        calibrated, began = self.calibrated, time.perf_counter()
        plan = calibrated.plan(budget=budget, metric=self.setup.metric, recipe=recipe, progress=self.progress)
        seconds = time.perf_counter() - began
        plan.save(folder)
        return plan, seconds

    def release_model(self) -> None:
        """Free the memory of the model and its calibration."""
        for name in ("_loaded", "calibrated"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def add(self, stage: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        """Store a row and print a line about it."""
        row = self.store.add(stage, settings, facts)
        shown = ("stage", "recipe", "budget", "text", "state", "perplexity", "error", "unreachable", "failed")
        print(" ".join(f"{key}={row[key]}" for key in shown if key in row), flush=True)

    def quality(self) -> None:
        """Stage quality: loss of every plan on every text, with the keys of ``bench.quality``."""
        names = [Path(source).name for source in self.setup.texts]
        for recipe, budget in [("dense", 1.0), *self.setup.points()]:
            settings = {name: self.setup.of_text(recipe, budget, name) for name in names}
            missing = [name for name in names if not self.store.has("quality", settings[name])]
            if not missing:
                continue
            try:
                plan, seconds = self.plan(recipe, budget)
            except UNREACHABLE as error:
                for name in missing:
                    self.add("quality", settings[name], {"unreachable": str(error)})
                continue
            for name in missing:
                dense = self._dense_quality(name)
                facts: dict[str, Any] = {"measured": {"flops": 1.0, "bytes": 1.0}, **loss_facts(dense, dense)}
                if recipe != "dense":
                    facts = evaluation_facts(self.network, Planned(plan), self.texts[name], dense, progress=self.progress)
                self.add("quality", settings[name], facts | {"solve_seconds": seconds})

    def _dense_quality(self, name: str) -> Quality:
        if name not in self._dense:
            self._dense[name] = evaluate(self.network, self.texts[name].batches, progress=self.progress)
        return self._dense[name]

    def mlp(self) -> None:
        """Stage mlp: errors of MLP outputs and components needed (``bench.mlp_error``); one row holds all blocks."""
        setup = self.setup
        held_out = {"text": Path(setup.texts[0]).name, "mlp_tokens": setup.mlp_tokens}
        chosen = {*setup.recipes, "neuron_ideal"} | ({"rana_alone"} if "rana" in setup.recipes else set())
        names = [name for name in RECIPES_OF_BLOCKS if name in chosen]
        points = [(name, budget) for budget in setup.budgets for name in names]
        missing = [point for point in points if not self.store.has("mlp", setup.of_plan(*point) | held_out)]
        ranks = setup.of_plan("dense", 1.0) | held_out
        if not missing and self.store.has("ranks", ranks):
            return
        batches = batches_of(setup.texts[0], self.tokenizer, tokens=setup.mlp_tokens, context=setup.context)
        held, _ = held_out_samples(self.network, self.calibrated, batches, metric=setup.metric, progress=self.progress)
        with torch.no_grad():
            if not self.store.has("ranks", ranks):
                self.add("ranks", ranks, {"needs": rank_needs(self.calibrated, held)})
            for budget in setup.budgets:
                here = [name for name, other in missing if other == budget]
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in here}
                for row in errors(self.network, self.calibrated, held, here, [budget]):
                    found[row["recipe"]].append(row)
                for name, rows in found.items():
                    self.add("mlp", setup.of_plan(name, budget) | held_out, _over_blocks(rows))

    def tasks(self, task_options: TaskOptions, tuned: dict[tuple[str, float], Path]) -> None:
        """Stage tasks: scores of the dense model and of every plan, untrained and, where there is one, trained."""
        from rana_fx.integrations.lm_eval_harness import language_model, run_tasks

        how = {"tasks": list(task_options.names), "shots": task_options.shots, "limit": task_options.limit}
        for recipe, budget in [("dense", 1.0), *self.setup.points()]:
            for state, folder in (("untrained", None), ("trained", tuned.get((recipe, budget)))):
                settings = self.setup.of_plan(recipe, budget) | how | {"state": state}
                settings |= {} if folder is None else {"trained": folder.name}
                if (state == "trained" and folder is None) or self.store.has("tasks", settings):
                    continue
                if folder is not None and not (folder / "plan" / HEADER).is_file():
                    missing = f"tasks of the trained {recipe} {budget:g} left out: {folder} not found"
                    print(f"{missing}; run finetune with the same --work first")
                    continue
                try:
                    plan: Any = folder / "plan" if folder is not None else self.plan(recipe, budget)[0]
                except UNREACHABLE as error:
                    self.add("tasks", settings, {"unreachable": str(error)})
                    continue
                source = self.setup.model if folder is None else str(folder / "model")
                options = {"batch_size": task_options.batch_size, "dtype": self.setup.dtype, "compile": task_options.compile}
                model = language_model(source, plan=None if recipe == "dense" else plan, **options)
                began = time.perf_counter()
                scores = run_tasks(
                    model,
                    task_options.names,
                    shots=task_options.shots,
                    limit=task_options.limit,
                    include=task_options.include,
                    seed=self.setup.seed,
                )
                self.add("tasks", settings, {"scores": scores, "seconds": time.perf_counter() - began})
                torch.compiler.reset()

    def latency(self, decoding: DecodeOptions) -> None:
        """Stage latency: rows of ``bench.decode`` for the dense model and every plan, in one process."""
        setup, how = self.setup, {"device": self.store.common["device"], **vars(decoding)}
        settings = setup.of_plan(",".join(setup.recipes), 1.0) | {"budgets": list(setup.budgets)} | how
        if self.store.has("latency", settings):
            return
        folders: dict[str, tuple[str, float]] = {}
        for point in setup.points():
            try:
                self.plan(*point)
            except UNREACHABLE:
                continue
            folders[str(self.folder("plan", *point))] = point
        self.release_model()
        out = self.work / "decode.jsonl"
        decode.main(
            setup.model, out=out, names=decoding.variants, budgets="", plan=[Path(name) for name in folders], mode=decoding.mode,
            sequences=decoding.sequences, longest=decoding.longest, new_tokens=decoding.new_tokens, prefill=0,
            seconds=decoding.seconds, dtype=setup.dtype, seed=setup.seed,
        )  # fmt: skip
        rows = decode_rows(out)
        self.add("latency", settings, {"rows": rows, "points": {Path(name).name: point for name, point in folders.items()}})


def decode_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of ``bench.decode`` without the fields that they share with rows of the study."""
    shared = ("command_line", "commit", "dirty", "versions", "bench", "model", "cores", "threads")
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in shared} for row in found]


def _over_blocks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    why = next((row["unreachable"] for row in rows if "unreachable" in row), None)
    if why is not None or not rows:
        return {"unreachable": why or "no MLP was found"}
    values = [row["error"] for row in rows]
    spent = [row["measured"] for row in rows]
    blocks = [{key: row[key] for key in ("site", "error", "measured")} for row in rows]
    return {"error": sum(values) / len(values), "measured": sum(spent) / len(spent), "blocks": blocks}
