"""The report of ``bench.reproduce``: tables in Markdown and a figure, from the rows of one model.

In: a JSONL file. Out: two files beside it, ``.md`` and ``.png`` (bench/quality/report_plot.py). Of several rows of one point the
last one is used. Tables copy values of the rows; only differences, ratios and intervals are computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.result_store import Row, latest, whole_rows
from bench.quality.divergence import interval
from bench.quality.report_plot import plot, reference
from rana_fx.atomic import write_bytes
from rana_fx.commands.record import cell

_SETTINGS = (
    "calibration", "calibration_tokens", "context", "dtype", "metric", "seed", "eval_tokens", "mlp_tokens", "text_trained",
    "tokens", "method", "distill", "autocast", "batch_size", "thresholds", "rank", "compile", "passes", "shots", "limit",
)  # fmt: skip


def write_report(path: Path) -> Path:
    """Write both files; returns the path of the Markdown."""
    rows = whole_rows(path)
    figure, report = path.with_suffix(".png"), path.with_suffix(".md")
    drawn = plot(rows, figure)
    write_bytes(report, markdown(rows, figure.name if drawn else None, path.name).encode())
    return report


def markdown(rows: Sequence[Row], figure: str | None, source: str) -> str:
    """The report as Markdown. ``figure``: its file name; ``source``: file name of the rows."""
    stages: dict[str, list[Row]] = {}
    for row in rows:
        stages.setdefault(row["stage"], []).append(row)
    names = ", ".join(dict.fromkeys(row["model"] for row in rows)) or "no rows yet"
    parts = [f"# {names}: loss and speed of adapted models, before and after fine-tuning", f"Rows: `{source}`."]
    parts += [f"![curves]({figure})"] if figure is not None else []
    sections = (
        ("quality", "Loss before training", _quality),
        ("finetune", "Loss after training", _finetune),
        ("tasks", "Downstream tasks", _tasks),
        ("mlp", "Errors of MLP outputs", _mlp),
        ("ranks", "Components that an input needs", _ranks),
        ("latency", "Decoding", _latency),
    )
    for stage, title, section in sections:
        if stage in stages:
            parts += [f"## {title}", *section(stages[stage]), *_reasons(stages[stage]), _provenance(stages[stage])]
    if rows:
        parts += ["## Commands", "    " + "\n    ".join(dict.fromkeys(row["command_line"] for row in rows))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _quality(rows: list[Row]) -> Iterable[str]:
    lines = []
    for row in _ordered(latest(rows, "text", "recipe", "budget").values()):
        low, high = row.get("interval", (None, None))
        spent = row.get("measured", {}).get(row["metric"])
        values = (row.get(key) for key in ("mean_loss", "perplexity", "delta"))
        lines.append(
            (
                row["text"],
                row["recipe"],
                row["budget"],
                _value_or_status(row, spent),
                *values,
                low,
                high,
                row.get("kl"),
                row.get("agreement"),
            )
        )
    yield _table(
        ("text", "recipe", "budget", "measured", "mean loss", "perplexity", "increase", "2.5 %", "97.5 %", "KL", "same token"),
        lines,
    )


def _finetune(rows: list[Row]) -> Iterable[str]:
    lines, runs = [], []
    for row in _ordered(latest(rows, "recipe", "budget").values()):
        point, base = (row["recipe"], row["budget"]), reference(rows, row)
        if "results" not in row:
            lines.append(("-", *point, _value_or_status(row, None), *[None] * 7))
            continue
        for text, result in row["results"].items():
            compared = base is not None and row["recipe"] != "dense"
            comparison = increase_left(result, base["results"][text]) if base is not None and compared else (None,) * 5
            losses = (result["after"]["measured"][row["metric"]], result["before"]["mean_loss"], result["after"]["mean_loss"])
            lines.append((text, *point, *losses, *comparison))
        speed = (
            row["tokens_per_s"],
            _ratio(row["tokens_per_s"], base["tokens_per_s"]) if base is not None and _same_machine(row, base) else None,
            row["peak_gb"],
            None if base is None else _ratio(row["peak_gb"], base["peak_gb"]),
        )
        runs.append((*point, f"{row['rate']:g}", row["tokens_trained"], *speed, _tried(row)))
    yield (
        "Increase before: over the dense model. Increase left: over the dense model trained on the same batches, with its 95 % "
        "interval over documents. Left: their ratio. Tokens/s are compared only between equal devices and numbers of threads."
    )
    names = ("text", "recipe", "budget", "measured", "loss before", "loss after")
    yield _table((*names, "increase before", "increase left", "2.5 %", "97.5 %", "left"), lines)
    columns = ("recipe", "budget", "rate", "tokens", "tokens/s", "of dense", "peak GB", "of dense", "losses of rates tried")
    yield _table(columns, runs)


def _same_machine(row: Row, base: Row) -> bool:
    """Whether both were timed with the same device and number of threads."""
    return all(row.get(name) == base.get(name) for name in ("device", "threads"))


def increase_left(result: dict[str, Any], dense: dict[str, Any]) -> tuple[float | None, ...]:
    """(increase before, increase left, low and high end of its interval, increase left over increase before)."""
    increase = result["before"]["mean_loss"] - dense["before"]["mean_loss"]
    remains = result["after"]["mean_loss"] - dense["after"]["mean_loss"]
    ours, theirs = (torch.tensor(found["after"]["sums"], dtype=torch.float64) for found in (result, dense))
    low, high = interval(ours - theirs, torch.tensor(result["after"]["counts"], dtype=torch.float64))
    return increase, remains, low, high, remains / increase if increase > 0 else None


def _tasks(rows: list[Row]) -> Iterable[str]:
    lines = []
    for row in _ordered(latest(rows, "recipe", "budget", "state").values()):
        if "scores" not in row:
            lines.append((row["recipe"], row["budget"], row["state"], "-", _value_or_status(row, None), None, None))
            continue
        for task, scores in row["scores"].items():
            for metric, value in scores.items():
                if not metric.endswith("_stderr"):
                    error = scores.get(f"{metric}_stderr")
                    lines.append((row["recipe"], row["budget"], row["state"], task, metric, value, error))
    yield _table(("recipe", "budget", "", "task", "metric", "score", "standard error"), lines)


def _mlp(rows: list[Row]) -> Iterable[str]:
    lines = [
        (row["recipe"], row["budget"], _value_or_status(row, row.get("measured")), row.get("error"), *_extremes(row))
        for row in _ordered(latest(rows, "recipe", "budget").values())
    ]
    yield "Relative squared error of one MLP's output, the rest dense, on held-out text: mean, minimum, maximum over blocks."
    yield _table(("recipe", "budget of the MLP", "measured", "mean", "min", "max"), lines)


def _extremes(row: Row) -> tuple[float | None, float | None]:
    values = [block["error"] for block in row.get("blocks", [])]
    return (min(values), max(values)) if values else (None, None)


def _ranks(rows: list[Row]) -> Iterable[str]:
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for need in rows[-1]["needs"]:
        groups.setdefault((need["role"], need["basis"], need["energy"]), []).append(need)
    kept = ("mean", "q10", "q50", "q90")
    yield "Fraction of components that hold a share of a token's energy, mean over linears (the paper's Figs. 2a, 2b)."
    lines = [(*key, *(sum(need[name] for need in found) / len(found) for name in kept)) for key, found in groups.items()]
    yield _table(("linears", "basis", "share", *kept), lines)


def _latency(rows: list[Row]) -> Iterable[str]:
    lines = []
    for row in rows[-1]["rows"]:
        point = rows[-1]["points"].get(row.get("plan"))
        name = row.get("variant") if point is None else f"{point[0]} {point[1]:g}"
        if row["kind"] == "decode":
            times = (row["tokens_per_s"], row["ms_per_token"]["p50"], row.get("dense_ratio"))
            lines.append((name, row["batch"], *times, row["compile_seconds"], row["peak_gb"]))
        elif row["kind"] == "skipped":
            yield f"{name} was not timed: {row['reason']}"
    yield _table(("variant", "batch", "tokens/s", "ms per token", "x dense", "compile s", "peak GB"), lines)


def _tried(row: Row) -> str:
    return ", ".join(
        f"{rate}: {loss:.4f}" if isinstance(loss, float) else f"{rate}: {loss}" for rate, loss in row.get("tried", {}).items()
    )


def _value_or_status(row: Row, value: Any) -> Any:
    return "unreachable" if "unreachable" in row else "failed" if "failed" in row else value


def _reasons(rows: list[Row]) -> Iterable[str]:
    """Reasons why points of a section have no numbers, each once."""
    found = dict.fromkeys(
        (row["recipe"], row.get("unreachable") or row["failed"]) for row in rows if {"unreachable", "failed"} & row.keys()
    )
    return [f"{recipe}: {reason}" for recipe, reason in found]


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def _ordered(rows: Iterable[Row]) -> list[Row]:
    """Rows by text, then by decreasing budget."""
    return sorted(rows, key=lambda row: (row.get("text", ""), -row["budget"], row["recipe"], row.get("state", "") == "trained"))


def _provenance(rows: list[Row]) -> str:
    """Settings, commits and machines of a section's rows."""
    facts = [f"{name} {_values(rows, name)}" for name in _SETTINGS if any(row.get(name) is not None for row in rows)]
    commits = dict.fromkeys(f"{row['commit'][:7]}{' (changed)' if row['dirty'] else ''}" for row in rows)
    torches = dict.fromkeys(row["versions"]["torch"] for row in rows)
    return f"Commit {', '.join(commits)}; {_values(rows, 'device')}; torch {', '.join(torches)}; {'; '.join(facts)}."


def _values(rows: list[Row], name: str) -> str:
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell(value).replace("|", "\\|") for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
