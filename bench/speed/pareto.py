"""Loss against measured time: plans of several budgets and metrics of one model, and rivals, on this device; rows and a figure.

    python -m bench.pareto MODEL --data calibration.txt --text held-out.txt --out rows.jsonl --figure pareto.png
    python -m bench.pareto MODEL --data calibration.txt --text held-out.txt --out rows.jsonl --dtype bfloat16 \\
        --metrics bytes --scope all --budgets 0.4,0.28,0.2 --rivals dense+attention,llama.cpp:Q8_0,Q4_0 --plans plans

In: a checkpoint, text to calibrate on and text to measure losses on, which are not the same. Out: the rows of ``bench.decode``,
each with the loss on that text (``loss``: mean, increase over dense and KL divergence with 95 % intervals), and a figure with a
panel for the increase of the loss and one for the divergence, over ms of a decoded token. A lower and farther left point is
better; the budget is beside each plan. Plans are made once with one calibration for each metric; with --plans they are kept,
and those that are there are used again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import rana_fx
from bench.common.figure import save_figure
from bench.common.models import SHAPES, build
from bench.common.record import head, start
from bench.speed.decode import table
from bench.speed.decoding import contexts, copy_bandwidth
from bench.speed.latency import Protocol, Run, compare
from bench.speed.llama_variant import gguf_files
from bench.speed.losses import read_text
from bench.speed.random_plan import layout_of
from bench.speed.variants import ATTENTION, variants
from rana_fx.cost import METRICS, SCOPES
from rana_fx.errors import InvalidOption, UnknownChoice
from rana_fx.evaluation.perplexity import known_device
from rana_fx.evaluation.text import load_texts, token_batches
from rana_fx.plan import load_plan
from rana_fx.runtime.attachment import detach

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]
COMPILED = "reduce-overhead"  # the dense model that plans are compared with
_PANELS = {"delta": "increase of the loss, nats a token", "kl": "KL divergence from dense, nats a token"}


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint.")],
    data: Annotated[Path, typer.Option(help="Text to calibrate on.")],
    text: Annotated[Path, typer.Option(help="Other text, on which losses are measured.")],
    out: Annotated[Path, typer.Option(help="JSONL file; overwritten.")],
    figure: Annotated[Path | None, typer.Option(help="PNG to write.")] = None,
    plans: Annotated[Path | None, typer.Option(help="Folder for the plans; default: they are not kept.")] = None,
    budgets: Annotated[str, typer.Option(help="Budgets, by commas.")] = "0.8,0.65,0.5,0.4",
    metrics: Annotated[str, typer.Option(help="Metrics of the budgets, by commas: flops, bytes.")] = "flops,bytes",
    scope: Annotated[str, typer.Option(help="Linears that budgets count: blocks, or all (output head too).")] = "blocks",
    recipe: Annotated[str, typer.Option(help="Recipe of the plans.")] = "rana",
    rivals: Annotated[str, typer.Option(help="Other variants of bench.decode, by commas.")] = ATTENTION,
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 32_000,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the text, in windows of 512: at least eight.")] = 8192,
    sequences: Annotated[int, typer.Option(help="Number of contexts to decode after.")] = 3,
    longest: Annotated[int, typer.Option(help="Longest context, in tokens.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each context.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32; auto: float32 on a CPU, else bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu; default: a GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of plans, contexts and tokens.")] = 0,
) -> None:
    """Loss against measured time of MODEL's plans and of rivals."""
    chosen = [name.strip() for name in metrics.split(",")]
    for kind, name, valid in (*(("metric", metric, METRICS) for metric in chosen), ("scope", scope, SCOPES)):
        if name not in valid:
            raise UnknownChoice(kind=kind, got=name, valid=", ".join(valid))
    if model in SHAPES:
        raise InvalidOption(name="MODEL", got=model, expected="a checkpoint: a shape has random weights, and no loss to speak of")
    if data.resolve() == text.resolve():
        raise InvalidOption(name="--text", got=str(text), expected="other text than --data: losses on it would be too low")
    place = known_device(device)
    dtype = dtype if dtype != "auto" else "float32" if place.type == "cpu" else "bfloat16"
    asked = [float(value) for value in budgets.split(",")]
    read = read_text(model, text, text_tokens)
    network = build(model, device=place, dtype=dtype, seed=seed)
    common = head("pareto") | {"model": Path(model).name, "dtype": dtype, "seed": seed, "recipe": recipe, "scope": scope}
    common |= {"text": text.name, "data": data.name, "tokens": tokens, "new_tokens": new_tokens, "prefill_mode": "masked"}
    with ExitStack() as stack:
        folder = plans or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        batches = token_batches(load_texts(data), _tokenizer(model), tokens=tokens)
        saved = {metric: _plans(network, batches, folder, metric, asked, recipe, scope, seed) for metric in chosen}
        paths = [path for metric in chosen for path in saved[metric]]
        tried = variants(
            ",".join(filter(None, (COMPILED, "rana", rivals))), [], paths, mode="reduce-overhead", configs=(), prefill="masked"
        )
        start(out)
        files = stack.enter_context(gguf_files(network, given=None))
        stack.enter_context(torch.no_grad())
        protocol = Protocol(contexts(sequences, longest, seed), new_tokens, 0, [1], seed, None, False)
        run = Run(network, layout_of(network, scope), protocol, common, out, copy_bandwidth(place), files=files, text=read)
        compare(run, tried)
    table(run)
    found = points(run.rows)
    if figure is not None and found:
        plot(found, figure, f"{common['model']}, {dtype}, one token at a time, {common['device']}")
        typer.echo(figure)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _plans(
    network: PreTrainedModel, batches: Sequence[Any], folder: Path, metric: str, budgets: list[float], recipe: str, scope: str,
    seed: int,
) -> list[Path]:  # fmt: skip
    """Folders of the plans of one metric; those that are not there are made, with one calibration."""
    paths = {budget: folder / f"{metric}-{budget:g}" for budget in budgets}
    missing = [budget for budget, path in paths.items() if not path.exists()]
    if missing:
        made = rana_fx.adapt(network, batches, budgets=missing, metric=metric, recipe=recipe, scope=scope, seed=seed)
        detach(network)
        for plan in made:
            plan.save(paths[plan.budget])
    for path in paths.values():
        plan = load_plan(path)
        if (plan.metric, plan.recipe) != (metric, recipe):
            expected = f"a plan of recipe {recipe} and metric {metric}, this is of {plan.recipe} and {plan.metric}"
            raise InvalidOption(name="--plans", got=str(path), expected=expected)
    return list(paths.values())


def points(rows: Sequence[Row]) -> list[Row]:
    """One for each variant with a time and a loss: series (the metric of a plan, or the variant's name), label, ms, delta, kl."""
    found = []
    for row in rows:
        if row["kind"] != "decode" or row.get("loss") is None:
            continue
        plan = row.get("plan")
        zero = (0.0, 0.0, 0.0) if row["variant_kind"] == "dense" else None
        found.append({
            "series": row["variant"] if plan is None else plan.rpartition("-")[0],
            "label": row["variant"] if plan is None else plan.rpartition("-")[2],
            "ours": plan is not None,
            "ms": row["ms_per_token"]["p50"],
            **{name: row["loss"].get(name) or zero for name in _PANELS},
        })  # fmt: skip
    return found


def plot(found: Sequence[Row], out: Path, title: str) -> None:
    """A panel for each of ``delta`` and ``kl`` over ms of a token. What has neither an interval nor zero is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(_PANELS), figsize=(12, 4.6), layout="constrained")
    for axis, (name, what) in zip(axes, _PANELS.items(), strict=True):
        drawn = [point for point in found if point[name] is not None]
        for series in dict.fromkeys(point["series"] for point in drawn):
            group = sorted((point for point in drawn if point["series"] == series), key=lambda point: point["ms"])
            means = [point[name][0] for point in group]
            errors = [[mean - point[name][1] for mean, point in zip(means, group, strict=True)],
                      [point[name][2] - mean for mean, point in zip(means, group, strict=True)]]  # fmt: skip
            ours = group[0]["ours"]
            label = f"plans, budget in {series}" if ours else series
            style: dict[str, Any] = {"marker": "o", "linestyle": "-"} if ours else {"marker": "s", "linestyle": "none"}
            axis.errorbar([point["ms"] for point in group], means, yerr=errors, capsize=2, label=label, **style)
            for point, mean in zip(group, means, strict=True):
                if ours:
                    axis.annotate(
                        point["label"], (point["ms"], mean), xytext=(5, 5), textcoords="offset points", fontsize="small"
                    )
        axis.set(xlabel="ms a decoded token", ylabel=what)
        axis.grid(True, alpha=0.25)
    axes[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, out)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
