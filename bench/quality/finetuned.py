"""Stage ``finetune`` of ``bench.reproduce``: every plan and the dense model trained on the same batches.

In: a study and training options. Out: one row per plan with its mean loss (nats) before and after training on every held-out
text, after training also per document, so that the increase over the trained dense model can be resampled later; the trained
model and its plan in a folder. The dense model is trained with a plan that adapts nothing, on the same batches in the same order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rana_fx
from bench.common.result_store import key_of
from bench.quality.divergence import by_document
from bench.quality.study import UNREACHABLE, Study
from bench.quality.training_text import TrainingText, training_text
from rana_fx._backend import rewritten
from rana_fx.atomic import write_bytes
from rana_fx.errors import InvalidOption, LossNotFinite
from rana_fx.evaluation.measure import measuring
from rana_fx.evaluation.perplexity import load_model
from rana_fx.training import Settings, best_rate, lora_config, merge_lora, rethreshold, train, trained_plan
from rana_fx.training.checkpoint import NAME
from rana_fx.training.methods import METHODS, choose
from rana_fx.training.saved_pair import save_pair
from rana_fx.training.thresholds import SAMPLE_TOKENS


@dataclass(frozen=True)
class Tuning:
    """Options. ``rate``: None searches ``rates`` on a ``fraction`` of the tokens. ``thresholds``: re-estimate after training."""

    text: str
    tokens: int
    held_out: int
    method: str
    rate: float | None
    rates: tuple[float, ...]
    fraction: float
    batch_size: int
    autocast: str | None
    thresholds: bool
    rank: int
    distill: float
    compile: bool
    checkpoint_every: int

    def settings(self) -> dict[str, Any]:
        """Settings that change the result, for rows and their keys."""
        facts = dict(vars(self)) | {"text_trained": Path(self.text).name, "rates": list(self.rates)}
        return {key: facts[key] for key in facts if key not in ("text", "checkpoint_every")}

    def training(self, rate: float, seed: int) -> Settings:
        """Settings of ``rana_fx.training.train`` at a learning rate."""
        return Settings(
            rate=rate, distill=self.distill, autocast=self.autocast, checkpoint_every=self.checkpoint_every, seed=seed
        )


def finetune(study: Study, tuning: Tuning) -> None:
    """Train every plan that has no row yet, the dense model first. Raises InvalidOption."""
    if tuning.method not in METHODS:
        raise InvalidOption(name="--method", got=tuning.method, expected="one of " + ", ".join(METHODS))
    points = [("dense", 1.0), *study.setup.points()]
    missing = [point for point in points if not study.store.has("finetune", _settings(study, tuning, point))]
    reached = []
    for point in missing:
        try:
            study.plan(*point)
        except UNREACHABLE as error:
            study.add("finetune", _settings(study, tuning, point), {"unreachable": str(error)})
        else:
            reached.append(point)
    if not reached:
        return
    texts, setup = study.texts, study.setup
    text = training_text(
        tuning.text, study.tokenizer, tokens=tuning.tokens, held_out=tuning.held_out, context=setup.context,
        batch_size=tuning.batch_size, seed=setup.seed,
    )  # fmt: skip
    study.release_model()
    for point in reached:
        # load the plan again, so that the device holds no other plan
        facts = _tuned(study, tuning, point, study.plan(*point)[0], text, texts)
        study.add(
            "finetune",
            _settings(study, tuning, point),
            facts | {"passes": text.passes, "trained_as": _reference_key(study, tuning)},
        )
        torch.compiler.reset()


def folders(study: Study, tuning: Tuning) -> dict[tuple[str, float], Path]:
    """Folder of the trained model of each point, whether it exists or not."""
    points = [("dense", 1.0), *study.setup.points()]
    return {point: study.folder("tuned", *point, **tuning.settings()) for point in points}


def _settings(study: Study, tuning: Tuning, point: tuple[str, float]) -> dict[str, Any]:
    setup = study.setup
    names = [Path(source).name for source in setup.texts]
    return setup.of_plan(*point) | tuning.settings() | {"texts": names, "eval_tokens": setup.eval_tokens}


def _reference_key(study: Study, tuning: Tuning) -> str:
    """Digest of the settings that a plan and its dense reference must share."""
    settings = _settings(study, tuning, ("", 0.0))
    return key_of("finetune", {name: value for name, value in settings.items() if name not in ("recipe", "budget", "metric")})


def _tuned(
    study: Study, tuning: Tuning, point: tuple[str, float], plan: rana_fx.Plan, text: TrainingText, texts: dict[str, Any]
) -> dict[str, Any]:
    setup, folder = study.setup, folders(study, tuning)[point]
    network, tokenizer = load_model(setup.model, dtype=setup.dtype)
    rana_fx.attach(network, plan)
    before = {name: _known(study, point, name) or _losses(network, found) for name, found in texts.items()}
    config = lora_config(rank=tuning.rank) if tuning.method == "lora" else None
    choose(network, tuning.method, config=config, seed=setup.seed)
    # without compilation the rewritten graph runs eagerly
    network.compile(backend=rana_fx.backend if tuning.compile else rewritten)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    resume, began = (folder / NAME).is_file(), time.perf_counter()
    try:
        rate, tried = _rate(study, tuning, network, text, folder)
        searched = time.perf_counter()
        how = {"settings": tuning.training(rate, setup.seed), "folder": folder, "resume": resume}
        done = train(network, text.batches, progress=study.progress, **how)
    except LossNotFinite as error:
        return {"failed": str(error)}
    step = done.seconds_per_step()
    facts = {
        "rate": rate, "tried": tried, "steps": len(done.losses), "tokens_trained": done.tokens, "resumed": resume,
        "search_seconds": searched - began, "train_seconds": time.perf_counter() - searched,
        "tokens_per_s": None if step is None else setup.context * tuning.batch_size / step,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "losses": _thinned(done.losses),
    }  # fmt: skip
    merge_lora(network)
    if tuning.thresholds and point[0] != "dense":
        rethreshold(network, text.batches[: -(-SAMPLE_TOKENS // (setup.context * tuning.batch_size))])
    new = trained_plan(network)
    after = {name: _losses(network, found) for name, found in texts.items()}
    rana_fx.detach(network)
    save_pair(folder, network, tokenizer, new)
    (folder / NAME).unlink(missing_ok=True)  # larger than the model
    return facts | {
        "digest": new.digest()[:12],
        "results": {name: {"before": before[name], "after": after[name]} for name in texts},
    }


def _rate(study: Study, tuning: Tuning, network: Any, text: TrainingText, folder: Path) -> tuple[float, dict[str, float]]:
    """(learning rate, loss of each rate tried); the search is done once, also if the training is resumed."""
    if tuning.rate is not None:
        return tuning.rate, {}
    kept = folder / "rates.json"
    if not kept.is_file():
        settings = tuning.training(1.0, study.setup.seed)
        how = {"held_out": text.held_out, "rates": tuning.rates, "fraction": tuning.fraction, "progress": study.progress}
        rate, tried = best_rate(network, text.batches, settings=settings, **how)
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, json.dumps([rate, {f"{key:g}": loss for key, loss in tried.items()}]).encode())
    rate, losses = json.loads(kept.read_text(encoding="utf-8"))
    return rate, losses


def _known(study: Study, point: tuple[str, float], text: str) -> dict[str, Any] | None:
    """Loss and measured budget from a row of the stage quality, if there is one: that saves tracing the model."""
    row = study.store.get("quality", study.setup.of_text(*point, text))
    return None if row is None or "mean_loss" not in row else {"mean_loss": row["mean_loss"], "measured": row["measured"]}


def _losses(network: Any, text: Any) -> dict[str, Any]:
    """Mean loss of the adapted model, its sums per document, and the measured budget."""
    with measuring(network) as meter:
        sums, counts = by_document(meter, text, device=network.device)
        found = meter.result()
    measured = {"flops": found.budget_flops, "bytes": found.budget_bytes}
    mean = float(sums.sum() / counts.sum())
    return {"mean_loss": mean, "measured": measured, "sums": sums.tolist(), "counts": counts.tolist()}


def _thinned(losses: Sequence[float], points: int = 50) -> list[float]:
    """Means over at most about ``points`` equal parts."""
    size = max(1, len(losses) // points)
    return [sum(losses[i : i + size]) / len(losses[i : i + size]) for i in range(0, len(losses), size)]
