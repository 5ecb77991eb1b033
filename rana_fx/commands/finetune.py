"""``rana-fx finetune``: a model, its plan and a text in; the trained model and its plan out."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rana_fx.choices import METHODS
from rana_fx.commands import checks
from rana_fx.commands import options as o
from rana_fx.commands.memory import memory_hints
from rana_fx.commands.record import data_batches, facts_of, write_json
from rana_fx.commands.screen import Screen

if TYPE_CHECKING:
    from torch import Tensor

    from rana_fx.training import Settings, Training


def command(
    model: o.Model,
    plan: Annotated[Path, typer.Option(help="Folder that `rana-fx adapt` wrote.", callback=checks.needed_plan)],
    data: o.Data,
    out: Annotated[Path, typer.Option(callback=checks.folder, help="Folder for the trained model, its plan and checkpoints.")],
    tokens: Annotated[int, typer.Option(min=1, max=o.MOST, help="Number of tokens to train on, each once.")],
    method: Annotated[
        str,
        typer.Option(
            help="lora: low-rank additions; factors: the plan's matrices; full: everything.",
            callback=checks.choice("method", METHODS),
        ),
    ] = "lora",
    lr: Annotated[str, typer.Option(help="Highest learning rate, or auto: try several on a fifth of the tokens.")] = "auto",
    held_out: Annotated[
        int, typer.Option(min=1, max=o.MOST, help="Tokens of the text to evaluate on, never trained on.")
    ] = 16_384,
    decay: Annotated[str, typer.Option(help="After the warm-up: cosine or linear, to zero.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Fraction of the steps over which the rate rises.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's decoupled weight decay.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of all gradients together.")] = 1.0,
    accumulate: Annotated[int, typer.Option(min=1, max=o.MOST, help="Batches per step.")] = 1,
    distill: Annotated[float, typer.Option(help="Weight in [0, 1] of the KL to the dense model, against cross-entropy.")] = 0.0,
    rank: Annotated[int, typer.Option(min=1, max=o.MOST, help="Rank of LoRA.")] = 64,
    alpha: Annotated[float, typer.Option(help="LoRA adds alpha / rank times its product.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Dropout on what LoRA's matrices read.")] = 0.05,
    target: Annotated[
        list[str] | None, typer.Option(help="LoRA on these linears or factors (ends of names, wildcards; repeatable).")
    ] = None,
    thresholds: Annotated[bool, typer.Option(help="Re-estimate thresholds after training, to keep the budget.")] = False,
    autocast: Annotated[str | None, typer.Option(help="bfloat16: run products in it, train in --dtype.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, more time.")] = False,
    evaluate_every: Annotated[int, typer.Option(min=0, max=o.MOST, help="Steps between evaluations; 0: before and after.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=0, max=o.MOST, help="Steps between checkpoints; 0: none.")] = 100,
    resume: Annotated[bool, typer.Option(help="Resume from the checkpoint in --out; same result as without the break.")] = False,
    context: o.Context = 512,
    batch_size: o.BatchSize = 8,
    column: o.Column = "text",
    split: o.Split = None,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = None,
    json: o.Json = None,
    config: o.Config = None,
    quiet: o.Quiet = False,
) -> None:
    """Train MODEL with its plan applied, and write the trained model and its plan."""
    from rana_fx.training import Settings

    given = {name: value for name, value in locals().items() if name in _OPTIONS}
    rate = _rate(lr)
    settings = Settings(
        rate=rate or 1.0, decay=decay, warmup=warmup, weight_decay=weight_decay, clip=clip, accumulate=accumulate,
        distill=distill, autocast=autocast, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    _Finetuning(given, settings, rate).run()


@dataclass(eq=False)
class _Finetuning:
    """One run of the command. ``given``: its arguments and options by name; ``rate``: None to search for one."""

    given: dict[str, Any]
    settings: Settings
    rate: float | None
    rates: dict[float, float] = field(default_factory=dict)  # tried -> held-out loss

    def run(self) -> None:
        """Raises what loading, training and saving raise."""
        import torch

        from rana_fx.commands.loading import load
        from rana_fx.evaluation.perplexity import evaluate, evaluate_adapted
        from rana_fx.runtime.attachment import detach
        from rana_fx.training import merge_lora, rethreshold, trained_plan
        from rana_fx.training.saved_pair import save_pair
        from rana_fx.training.thresholds import SAMPLE_TOKENS

        given, out = self.given, self.given["out"]
        torch.manual_seed(self.settings.seed)
        network, tokenizer, old = load(given["model"], given["plan"], dtype=given["dtype"], device=given["device"])
        assert old is not None
        batches, held_out = self._batches(network, tokenizer)
        shown = not given["quiet"]
        dense, (before, _) = evaluate(network, held_out, progress=shown), evaluate_adapted(network, held_out, progress=shown)
        self._choose(network)
        started = time.perf_counter()
        done = self._train(network, batches, held_out)
        seconds = time.perf_counter() - started
        merge_lora(network)
        if given["thresholds"]:
            rethreshold(network, batches[: -(-SAMPLE_TOKENS // (given["context"] * given["batch_size"]))])
        new = trained_plan(network)
        after, measured = evaluate_adapted(network, held_out, progress=shown)
        detach(network)
        save_pair(out, network, tokenizer, new)
        options = {key: value for key, value in given.items() if key not in _NOT_RECORDED}
        record = facts_of("finetune", seed=self.settings.seed, **options | {"device": str(network.device)})
        record |= {
            "model": str(out / "model"), "plan": str(out / "plan"), "digest": new.digest(), "trained_from": old.digest(),
            "rate": self.rate, "rates": {f"{key:g}": loss for key, loss in self.rates.items()}, "steps": len(done.losses),
            "tokens": done.tokens, "held_out_tokens": after.tokens,
            "loss": {"dense": dense.mean_loss, "before": before.mean_loss, "after": after.mean_loss}, "losses": done.losses,
            "evaluations": done.evaluations,
            "budget": {
                "asked": new.budget, "metric": new.metric,
                "measured": {"flops": measured.budget_flops, "bytes": measured.budget_bytes},
            },
            "seconds": seconds,
        }  # fmt: skip
        _show(Screen(given["quiet"]), given["model"], record, done.seconds)
        write_json(given["json"], record)

    def _batches(self, network: Any, tokenizer: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """(to train on, held out). Raises InvalidOption, TooLittleText."""
        from rana_fx.errors import InvalidOption, TooLittleText

        given, accumulate = self.given, self.settings.accumulate
        batch = given["context"] * given["batch_size"]
        steps = given["tokens"] // (batch * accumulate)
        if not steps:
            expected = f"at least {batch * accumulate}, one step of {accumulate} x {given['batch_size']} x {given['context']}"
            raise InvalidOption(name="--tokens", got=given["tokens"], expected=expected)
        training, testing = steps * accumulate, -(-given["held_out"] // batch)
        expected_tokens = (training + testing) * batch
        text = {key: given[key] for key in ("column", "split", "context", "batch_size")}
        batches = data_batches(network, tokenizer, given["data"], tokens=expected_tokens, shuffle=self.settings.seed, **text)
        got = sum(int(batch["attention_mask"].sum()) for batch in batches)
        if got < expected_tokens:
            facts: dict[str, Any] = {"trained": training * batch, "held_out": testing * batch, "batch": batch}
            raise TooLittleText(source=given["data"], got=got, expected=expected_tokens, **facts)
        return _shuffled(batches[:training], self.settings.seed), batches[training:]

    def _choose(self, network: Any) -> None:
        """Decide which Parameters are trained."""
        from rana_fx.training import checkpoint_gradients, lora_config
        from rana_fx.training.methods import choose

        given, config = self.given, None
        if given["method"] == "lora":
            lora = {key: given[key] for key in ("rank", "alpha", "dropout")}
            config = lora_config(targets=given["target"] or None, **lora)
        choose(network, given["method"], config=config, seed=self.settings.seed)
        if given["gradient_checkpointing"]:
            checkpoint_gradients(network)

    def _train(self, network: Any, batches: Sequence[dict[str, Tensor]], held_out: Sequence[dict[str, Tensor]]) -> Training:
        """Raises OutOfMemory, LossNotFinite, CheckpointError; typer.Exit where it was interrupted."""
        from rana_fx.training import best_rate, train
        from rana_fx.training.checkpoint import rate_of

        given = self.given
        limits = {key: given[key] for key in ("out", "batch_size", "context", "method", "distill")}
        with memory_hints(device=network.device, checkpointing=given["gradient_checkpointing"], **limits):
            if self.rate is None and given["resume"]:
                self.rate = rate_of(given["out"])
            elif self.rate is None:
                self.rate, self.rates = best_rate(
                    network, batches, settings=self.settings, held_out=held_out, progress=not given["quiet"]
                )
            settings = replace(self.settings, rate=self.rate)
            where = {"folder": given["out"], "resume": given["resume"], "progress": not given["quiet"]}
            return train(network, batches, settings=settings, held_out=held_out, **where)


_LEGEND = (
    "loss: nats a token of text that is not trained on. budget: cost of a token over the",
    "dense linears'. The plan fits the model beside it alone, not the one it was made of.",
)
# arguments and options of the command, in order; those that its record has under another key or omits
_OPTIONS = tuple(inspect.signature(command).parameters)
_NOT_RECORDED = ("seed", "json", "config", "quiet", "evaluate_every", "checkpoint_every")


def _show(screen: Screen, model: str, record: dict[str, Any], seconds: float) -> None:
    screen.facts(f"fine-tuned {model}", _rows(record, seconds))
    screen.lines(_LEGEND)
    trained = f"{record['model']} --plan {record['plan']}"
    screen.next_steps(
        (f"rana-fx compare {trained} --data TEXT", "its quality and speed on other text"),
        (f"rana-fx generate {trained} --prompt TEXT", "run it"),
    )


def _rows(record: dict[str, Any], seconds: float) -> list[tuple[str, object]]:
    loss, budget = record["loss"], record["budget"]
    return [
        ("held-out loss, dense", loss["dense"]),
        ("held-out loss, adapted", loss["before"]),
        ("held-out loss, fine-tuned", loss["after"]),
        ("target budget", f"{budget['asked']:g} of the dense {budget['metric']}"),
        ("measured budget, flops", budget["measured"]["flops"]),
        ("measured budget, bytes", budget["measured"]["bytes"]),
        *((f"held-out loss at learning rate {key}", value) for key, value in record["rates"].items()),
        ("learning rate", f"{record['rate']:g}"),
        ("steps", record["steps"]),
        ("tokens", record["tokens"]),
        ("tokens/s", record["tokens"] / max(seconds, 1e-9)),
        ("digest", record["digest"][:12]),
        ("written to", Path(record["model"]).parent),
    ]


def _rate(lr: str) -> float | None:
    """None for auto. Raises InvalidOption."""
    from rana_fx.errors import InvalidOption

    try:
        rate = None if lr == "auto" else float(lr)
    except ValueError:
        rate = -1.0
    if rate is not None and not 0 < rate < float("inf"):
        raise InvalidOption(name="--lr", got=lr, expected="a positive number or auto")
    return rate


def _shuffled(batches: list[dict[str, Tensor]], seed: int) -> list[dict[str, Tensor]]:
    """The same sequences in random order: neighbouring sequences of one document would make the steps' gradients correlated."""
    import torch

    order = torch.randperm(sum(len(batch["input_ids"]) for batch in batches), generator=torch.Generator().manual_seed(seed))
    rows = {key: torch.cat([batch[key] for batch in batches])[order] for key in batches[0]}
    parts = {key: value.split(len(batches[0]["input_ids"])) for key, value in rows.items()}
    return [{key: value[index] for key, value in parts.items()} for index in range(len(batches))]
