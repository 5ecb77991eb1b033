"""One model under study: what the stages of ``bench.quality.reproduce`` share, and those stages that do not train.

In: a ``Setup`` and a ledger. Out: rows of the stages quality, mlp, tasks and latency, each added when it is complete; what the
ledger has already is passed over. Model, calibration and plans are made when a row first needs them; plans are kept in a folder,
so that a run that goes on, or one that only times, does not calibrate again.
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
from bench.common.result_store import Ledger, key_of
from bench.quality.methods import Planned
from bench.quality.mlp_error import RECIPES_OF_BLOCKS, errors, held_rows
from bench.quality.quality import against, evaluated
from bench.quality.rank_need import needs
from bench.speed import decode
from rana_fx.errors import BudgetUnreachable, TooFewTokens
from rana_fx.evaluation.perplexity import Quality, evaluate, load_model
from rana_fx.plan import Plan, load_plan

UNREACHABLE = (BudgetUnreachable, TooFewTokens)


@dataclass(frozen=True)
class Setup:
    """What decides a plan and how it is judged. ``texts``: held out; the first one also for outputs of MLPs."""

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
        """Settings that a plan depends on; files by name, as rows say what was measured and not where it lay."""
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
class Asked:
    """Tasks of lm-evaluation-harness, and how they are asked."""

    names: tuple[str, ...]
    shots: int | None
    limit: int | None
    include: Path | None
    batch_size: int
    compile: bool


@dataclass(frozen=True)
class Timing:
    """What ``bench.speed.decode`` is asked for."""

    variants: str
    mode: str
    sequences: int
    longest: int
    new_tokens: int
    seconds: float | None


class Study:
    """``work``: folder for plans and trained models."""

    def __init__(self, setup: Setup, ledger: Ledger, work: Path) -> None:
        self.setup, self.ledger, self.work = setup, ledger, work
        self.progress = sys.stderr.isatty()
        self._dense: dict[str, Quality] = {}

    # ---- made once

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
        """Of a plan or a trained model, by all that it depends on."""
        settings = self.setup.of_plan(recipe, budget) | {"commit": self.ledger.common["commit"]} | more
        return self.work / f"{what}-{recipe}-{budget:g}-{key_of(what, settings)[:8]}"

    def plan(self, recipe: str, budget: float) -> tuple[Plan, float]:
        """(plan, seconds it took to solve; 0 where it was there, and then on the CPU). Raises what a recipe raises."""
        folder = self.folder("plan", recipe, budget)
        if folder.is_dir():
            return load_plan(folder), 0.0
        calibrated, began = self.calibrated, time.perf_counter()
        plan = calibrated.plan(budget=budget, metric=self.setup.metric, recipe=recipe, progress=self.progress)
        seconds = time.perf_counter() - began
        plan.save(folder)
        return plan, seconds

    def forget_model(self) -> None:
        """Make room for one that is trained."""
        for name in ("_loaded", "calibrated"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def add(self, stage: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
        row = self.ledger.add(stage, settings, facts)
        shown = ("stage", "recipe", "budget", "text", "state", "perplexity", "error", "unreachable", "failed")
        print(" ".join(f"{key}={row[key]}" for key in shown if key in row), flush=True)

    # ---- stages

    def quality(self) -> None:
        """Loss of every plan on every text, as ``bench.quality`` has it."""
        names = [Path(source).name for source in self.setup.texts]
        for recipe, budget in [("dense", 1.0), *self.setup.points()]:
            settings = {name: self.setup.of_text(recipe, budget, name) for name in names}
            missing = [name for name in names if not self.ledger.has("quality", settings[name])]
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
                facts: dict[str, Any] = {"measured": {"flops": 1.0, "bytes": 1.0}, **against(dense, dense)}
                if recipe != "dense":
                    facts = evaluated(self.network, Planned(plan), self.texts[name], dense, progress=self.progress)
                self.add("quality", settings[name], facts | {"solve_seconds": seconds})

    def _dense_quality(self, name: str) -> Quality:
        if name not in self._dense:
            self._dense[name] = evaluate(self.network, self.texts[name].batches, progress=self.progress)
        return self._dense[name]

    def mlp(self) -> None:
        """Errors of MLP outputs and components needed, as ``bench.quality.mlp_error`` has them; one row holds all blocks."""
        setup = self.setup
        judged = {"text": Path(setup.texts[0]).name, "mlp_tokens": setup.mlp_tokens}
        chosen = {*setup.recipes, "neuron_ideal"} | ({"rana_alone"} if "rana" in setup.recipes else set())
        names = [name for name in RECIPES_OF_BLOCKS if name in chosen]
        points = [(name, budget) for budget in setup.budgets for name in names]
        missing = [point for point in points if not self.ledger.has("mlp", setup.of_plan(*point) | judged)]
        ranks = setup.of_plan("dense", 1.0) | judged
        if not missing and self.ledger.has("ranks", ranks):
            return
        batches = batches_of(setup.texts[0], self.tokenizer, tokens=setup.mlp_tokens, context=setup.context)
        held, _ = held_rows(self.network, self.calibrated, batches, metric=setup.metric, progress=self.progress)
        with torch.no_grad():
            if not self.ledger.has("ranks", ranks):
                self.add("ranks", ranks, {"needs": needs(self.calibrated, held)})
            for budget in setup.budgets:
                here = [name for name, other in missing if other == budget]
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in here}
                for row in errors(self.network, self.calibrated, held, here, [budget]):
                    found[row["recipe"]].append(row)
                for name, rows in found.items():
                    self.add("mlp", setup.of_plan(name, budget) | judged, _over_blocks(rows))

    def tasks(self, asked: Asked, tuned: dict[tuple[str, float], Path]) -> None:
        """Scores of the dense model and of every plan, and of those of them that were trained."""
        from rana_fx.integrations.lm_eval_harness import language_model, run_tasks

        how = {"tasks": list(asked.names), "shots": asked.shots, "limit": asked.limit}
        for recipe, budget in [("dense", 1.0), *self.setup.points()]:
            for state, folder in (("untrained", None), ("trained", tuned.get((recipe, budget)))):
                settings = self.setup.of_plan(recipe, budget) | how | {"state": state}
                settings |= {} if folder is None else {"trained": folder.name}
                if (state == "trained" and folder is None) or self.ledger.has("tasks", settings):
                    continue
                if folder is not None and not (folder / "plan").is_dir():
                    print(
                        f"no tasks of the trained {recipe} {budget:g}: there is no {folder}; finetune first, with the same --work"
                    )
                    continue
                try:
                    plan: Any = folder / "plan" if folder is not None else self.plan(recipe, budget)[0]
                except UNREACHABLE as error:
                    self.add("tasks", settings, {"unreachable": str(error)})
                    continue
                source = self.setup.model if folder is None else str(folder / "model")
                options = {"batch_size": asked.batch_size, "dtype": self.setup.dtype, "compile": asked.compile}
                model = language_model(source, plan=None if recipe == "dense" else plan, **options)
                began = time.perf_counter()
                scores = run_tasks(
                    model, asked.names, shots=asked.shots, limit=asked.limit, include=asked.include, seed=self.setup.seed
                )
                self.add("tasks", settings, {"scores": scores, "seconds": time.perf_counter() - began})
                torch.compiler.reset()

    def latency(self, timing: Timing) -> None:
        """Rows of ``bench.speed.decode`` for the dense model and every plan, in one process."""
        setup, how = self.setup, {"device": self.ledger.common["device"], **vars(timing)}
        settings = setup.of_plan(",".join(setup.recipes), 1.0) | {"budgets": list(setup.budgets)} | how
        if self.ledger.has("latency", settings):
            return
        folders: dict[str, tuple[str, float]] = {}
        for point in setup.points():
            try:
                self.plan(*point)
            except UNREACHABLE:
                continue
            folders[str(self.folder("plan", *point))] = point
        self.forget_model()
        out = self.work / "decode.jsonl"
        decode.main(
            setup.model, out=out, names=timing.variants, budgets="", plan=[Path(name) for name in folders], mode=timing.mode,
            sequences=timing.sequences, longest=timing.longest, new_tokens=timing.new_tokens, prefill=0, seconds=timing.seconds,
            dtype=setup.dtype, seed=setup.seed,
        )  # fmt: skip
        rows = decode_rows(out)
        self.add("latency", settings, {"rows": rows, "points": {Path(name).name: point for name, point in folders.items()}})


def decode_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of ``bench.speed.decode`` without what all of them share with the study's."""
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
