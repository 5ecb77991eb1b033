"""The paper's evaluation of one model: recipes at several budgets, before and after fine-tuning, in one report.

In: a model, a calibration text, held-out texts and a training text. Out: a JSONL file of rows (losses in nats, budgets as
fractions of dense, times in seconds or tokens/s), and beside it a report of all its rows (Markdown and PNG). Stages:

    quality    loss of every plan on the held-out texts (bench/quality/quality.py)
    mlp        errors of MLP outputs, and components that an input needs: the paper's Figs. 2a, 2b (bench/quality/mlp_error.py)
    finetune   every plan trained on --train, and the dense model on the same tokens (bench/quality/finetuned.py)
    tasks      downstream tasks before fine-tuning and, where a trained model is in --work, after it (docs/how-to/tasks.md)
    latency    tokens per second of the dense model and of every plan (bench/speed/decode.py)
    report     only the report

A run that was interrupted, or that had only some stages or budgets, is continued by a run with the same --out: a row of the same
settings and commit is not computed again. The report shows all rows of the file, also of other recipes and budgets.

    python -m bench.reproduce MODEL --calib calib.jsonl.xz --text valid.jsonl.xz --train train.jsonl.xz --out rows/NAME.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.common.record import head
from bench.common.result_store import ResultStore
from bench.quality.finetuned import Tuning, finetune, folders
from bench.quality.report import write_report
from bench.quality.study import DecodeOptions, Setup, Study, TaskOptions
from rana_fx.plan import METRICS
from rana_fx.recipes import RECIPES
from rana_fx.training.methods import METHODS

STAGES = ("quality", "mlp", "finetune", "tasks", "latency", "report")


def main(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")],
    calib: Annotated[str, typer.Option(help="Calibration text.")],
    text: Annotated[list[str], typer.Option(help="Held-out text; may be given several times.")],
    out: Annotated[Path, typer.Option(help="JSONL file; rows are added. The report is written beside it, as .md and .png.")],
    train: Annotated[str | None, typer.Option(help="Text to fine-tune on; needed for finetune.")] = None,
    stages: Annotated[
        str, typer.Option(help="Some of quality, mlp, finetune, tasks, latency, by commas; report.")
    ] = "quality,mlp",
    recipes: Annotated[str, typer.Option(help="Recipes, by commas, beside the dense model.")] = "cats,teal,paper,rana",
    budgets: Annotated[str, typer.Option(help="Budgets, by commas.")] = "0.7,0.58,0.5,0.4",
    metric: Annotated[str, typer.Option(help="What the budgets count: flops or bytes.")] = "flops",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_000,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of each held-out text.")] = 65_536,
    mlp_tokens: Annotated[int, typer.Option(help="Held-out tokens for errors of MLP outputs.")] = 4_096,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of samples, of the order of training data and of LoRA.")] = 0,
    train_tokens: Annotated[int, typer.Option(help="Tokens to train on; a shorter text is repeated.")] = 31_000_000,
    method: Annotated[str, typer.Option(help="lora, factors or full.")] = "full",
    rate: Annotated[str, typer.Option(help="Peak learning rate, or auto: the best of --rates.")] = "auto",
    rates: Annotated[str, typer.Option(help="Rates that auto tries, by commas.")] = "1e-4,3e-4,1e-3",
    search: Annotated[float, typer.Option(help="Fraction of the tokens that each rate is tried on.")] = 0.2,
    held_out: Annotated[int, typer.Option(help="Tokens of --train held out to compare rates.")] = 16_384,
    train_batch: Annotated[int, typer.Option(help="Sequences per step.")] = 32,
    autocast: Annotated[str, typer.Option(help="none, bfloat16, or auto: bfloat16 for float32 on a GPU.")] = "auto",
    rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 64,
    distill: Annotated[float, typer.Option(help="Weight of the KL to the dense model in the training loss.")] = 0.0,
    thresholds: Annotated[bool, typer.Option(help="Re-estimate thresholds after training, to keep the budget.")] = True,
    compile: Annotated[bool, typer.Option(help="Compile training and task evaluation; otherwise graphs run eagerly.")] = True,
    tasks: Annotated[str, typer.Option(help="Tasks of lm_eval, by commas; paper: the six of the paper.")] = "paper",
    shots: Annotated[int | None, typer.Option(help="Few-shot examples before a question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Largest number of documents of each task.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
    variants: Annotated[str, typer.Option(help="Variants of bench.decode.")] = "eager,reduce-overhead,rana",
    mode: Annotated[str, typer.Option(help="Mode of torch.compile for timed plans.")] = "reduce-overhead",
    sequences: Annotated[int, typer.Option(help="Number of contexts to decode after.")] = 100,
    longest: Annotated[int, typer.Option(help="Longest context, in tokens.")] = 1000,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after each context.")] = 492,
    seconds: Annotated[float | None, typer.Option(help="Time limit of the stage latency.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for plans and trained models. Default: out/ and the name of --out.")
    ] = None,
    any_commit: Annotated[bool, typer.Option(help="Also use rows of other commits and of changed trees.")] = False,
) -> None:
    """The paper's evaluation of MODEL."""
    wanted = _some(stages, STAGES, "stages")
    setup = Setup(
        model, calib, tuple(text), _some(recipes, RECIPES, "recipes", left_out="dense"), tuple(map(float, budgets.split(","))),
        metric, tokens, eval_tokens, mlp_tokens, context, dtype, seed,
    )  # fmt: skip
    for name, got, valid in (("metric", metric, METRICS), ("method", method, METHODS)):
        if got not in valid:
            raise typer.BadParameter(f"unknown {name} {got!r}: pick of {', '.join(valid)}")
    if "finetune" in wanted and train is None:
        raise typer.BadParameter("--stages finetune needs --train, a text to train on")
    automatic = "bfloat16" if torch.cuda.is_available() and dtype == "float32" else "none"
    cast = automatic if autocast == "auto" else autocast
    study = Study(setup, ResultStore(out, head("reproduce"), any_commit=any_commit), work or Path("out", out.stem))
    tuning = Tuning(
        train or "", train_tokens, held_out, method, None if rate == "auto" else float(rate), tuple(map(float, rates.split(","))),
        search, train_batch, None if cast == "none" else cast, thresholds, rank, distill, compile, checkpoint_every=200,
    )  # fmt: skip
    task_options = TaskOptions(tuple(tasks.split(",")), shots, limit, include, batch_size=train_batch, compile=compile)
    jobs = {
        "quality": study.quality,
        "mlp": study.mlp,
        "finetune": lambda: finetune(study, tuning),
        "tasks": lambda: study.tasks(task_options, folders(study, tuning)),
        "latency": lambda: study.latency(DecodeOptions(variants, mode, sequences, longest, new_tokens, seconds)),
        "report": lambda: None,
    }
    for name in wanted:
        jobs[name]()
        # after each stage, in case the next one is interrupted
        print(write_report(out), flush=True)


def _some(given: str, valid: Iterable[str], what: str, *, left_out: str | None = None) -> tuple[str, ...]:
    """Names separated by commas. Raises BadParameter."""
    known = [name for name in valid if name != left_out]
    names = [name for name in given.split(",") if name and name != left_out]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise typer.BadParameter(f"unknown {what} {unknown}: pick of {', '.join(known)}")
    return tuple(names)


if __name__ == "__main__":
    typer.run(main)
