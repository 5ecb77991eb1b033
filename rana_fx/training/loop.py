"""The training loop: AdamW over batches in order, evaluated, checkpointed and resumed.

In: an adapted model, compiled or not, batches of equal shape and settings. Out: the trained model and the history of the run.
"""

from __future__ import annotations

import copy
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rana_fx._backend import backend
from rana_fx.calibration.batches import call, evaluating, to_device
from rana_fx.errors import LossNotFinite, NoBatches, NothingToTrain
from rana_fx.evaluation.perplexity import evaluate
from rana_fx.modules import device_of, unwrap
from rana_fx.plan import tensor_bytes
from rana_fx.runtime.attachment import MODULE, Attachment, detach
from rana_fx.training import checkpoint, checkpoint_check
from rana_fx.training.parameters import attachment_to_train
from rana_fx.training.settings import Settings


@dataclass
class Training:
    """History of a training run: number of tokens, the loss (nats per token) and the seconds of each step, and (step, mean loss
    on the held-out text) of each evaluation. ``seconds``: evaluations and checkpoints included.
    """

    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    def seconds_per_step(self) -> float | None:
        """Median over all steps except the first two, which compile; None where there are no others."""
        return statistics.median(self.step_seconds[2:]) if len(self.step_seconds) > 2 else None


def train(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    *,
    settings: Settings,
    held_out: Sequence[dict[str, Tensor]] = (),
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Training:
    """Train the Parameters that ``trainable`` or ``add_lora`` chose, on every batch once, in order.

    Args:
        model: a causal language model with a plan attached; compiled as the caller likes, or here by ``rana_fx.backend``.
        batches: as ``rana_fx.evaluation.text.token_batches`` returns them; a remainder that does not fill a step is not used.
        held_out: evaluated before, after, and every ``settings.evaluate_every`` steps.
        folder: for checkpoints. resume: continue from the checkpoint in it; the result is that of a run without the break.

    Raises:
        NoPlan, NoBatches, NothingToTrain, LossNotFinite, CheckpointError.
    """
    loop = _Loop(model, batches, settings, held_out, folder)
    if resume:
        loop.resume()
    total = sum(batch["input_ids"].numel() for batch in batches[: loop.steps * settings.accumulate])
    bar = tqdm(total=total, initial=loop.done.tokens, desc="finetune", unit="tok", unit_scale=True, disable=not progress)
    with bar, _training(loop.model):
        loop.run(bar)
    return loop.done


class _Loop:
    """One training run: the model, its trained Parameters, the optimizer, and the history so far."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[dict[str, Tensor]],
        settings: Settings,
        held_out: Sequence[dict[str, Tensor]],
        folder: Path | None,
    ) -> None:
        """Raises NoPlan, NoBatches, NothingToTrain."""
        self.model = unwrap(model)
        self.settings, self.batches, self.held_out, self.folder = settings, batches, held_out, folder
        attachment = attachment_to_train(self.model)
        self.trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.steps = len(batches) // settings.accumulate
        if not self.steps:
            raise NoBatches(hint=f"{settings.accumulate} of token_batches, for one step")
        if not self.trained:
            reason, todo = "all Parameters are frozen", "call rana_fx.training.trainable or add_lora"
            raise NothingToTrain(model=type(self.model).__name__, what=None, reason=reason, todo=todo)
        plain = model is self.model and model._compiled_call_impl is None
        self.forward: Any = torch.compile(model, backend=backend) if plain else model
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=settings.rate, weight_decay=settings.weight_decay)
        self.fingerprint = _fingerprint(attachment, batches, self.trained, settings)
        self.teacher = _teacher(self.model, self.trained) if settings.distill else None
        self.done = Training()
        torch.manual_seed(settings.seed)

    def resume(self) -> None:
        """Continue from the checkpoint in the folder. Raises CheckpointError."""
        assert self.folder is not None, "resume needs the folder"
        state = checkpoint.read(self.folder, self.fingerprint)
        checkpoint_check.check(self.folder / checkpoint.NAME, state, self.trained, self.optimizer, self.steps)
        _restore(state, self.trained, self.optimizer, self.done)

    def run(self, bar: tqdm) -> None:
        """Run all remaining steps, with their evaluations and checkpoints. Raises LossNotFinite, CheckpointError."""
        settings, done, started, before = self.settings, self.done, time.perf_counter(), self.done.seconds
        first = len(done.losses)
        if self.held_out and not first:
            done.evaluations.append((0, self._evaluate()))
        for step in range(first, self.steps):
            begun, rate = time.perf_counter(), settings.rate_at(step, self.steps)
            part = self.batches[step * settings.accumulate : (step + 1) * settings.accumulate]
            loss = self._step(step, part, rate)
            tokens = sum(batch["input_ids"].numel() for batch in part)
            done.losses.append(loss)
            done.tokens += tokens
            done.step_seconds.append(time.perf_counter() - begun)
            done.seconds = before + time.perf_counter() - started
            bar.update(tokens)
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2g}")
            if self.held_out and self._due(step, settings.evaluate_every):
                done.evaluations.append((step + 1, self._evaluate()))
            if self.folder is not None and settings.checkpoint_every and self._due(step, settings.checkpoint_every):
                checkpoint.write(self.folder, _state(self.fingerprint, self.trained, self.optimizer, done))

    def _step(self, step: int, part: Sequence[dict[str, Tensor]], rate: float) -> float:
        """One optimizer step; returns its loss. Raises LossNotFinite, without changing the Parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = device_of(self.model)
        loss = _accumulate(self.forward, self.teacher, [to_device(batch, device) for batch in part], self.settings)
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.settings.clip))
        for what, value in (("loss", loss), ("norm of the gradients", norm)):
            if not abs(value) < float("inf"):
                self.optimizer.zero_grad()
                written = _last_checkpoint(self.folder, self.done, self.settings)
                raise LossNotFinite(step=step + 1, what=what, got=value, last=step, kept=written, rate=rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _due(self, step: int, every: int) -> bool:
        """Whether an action of every ``every`` steps, and of the last step, follows this step. 0: of the last step only."""
        return step + 1 == self.steps or (every > 0 and (step + 1) % every == 0)

    def _evaluate(self) -> float:
        return evaluate(self.forward, self.held_out, progress=False).mean_loss


def _fingerprint(
    attachment: Attachment, batches: Sequence[dict[str, Tensor]], trained: dict[str, nn.Parameter], settings: Settings
) -> dict[str, str]:
    """The facts that must equal those of a checkpoint to resume from it."""
    found = {"plan": attachment.plan.digest(), "text": _digest(batches), "trained Parameters": _names(trained)}
    if attachment.factors.lowrank is not None:
        found["LoRA"] = attachment.factors.lowrank.extra_repr()
    return found | {f"setting {key}": str(value) for key, value in asdict(settings).items()}


def _accumulate(
    forward: Callable[..., Any], teacher: Callable[..., Any] | None, batches: list[dict[str, Tensor]], settings: Settings
) -> float:
    """Backward pass of the mean loss over all targets of the batches of a step; returns that loss, in nats per token."""
    masks = [_targets(batch) for batch in batches]
    targets = sum(int(mask.sum()) for mask in masks)
    if not targets:
        raise NoBatches(hint="with two tokens in a row that are not padding")
    total = 0.0
    for batch, mask_BT in zip(batches, masks, strict=True):
        with torch.autocast(mask_BT.device.type, settings.cast, enabled=settings.cast is not None):
            logits = call(forward, batch).logits
        rows = logits[:, :-1][mask_BT].float()
        loss = nn.functional.cross_entropy(rows, batch["input_ids"][:, 1:][mask_BT], reduction="sum")
        if teacher is not None:
            expected = call(teacher, batch).logits[:, :-1][mask_BT].float().log_softmax(-1)
            divergence = nn.functional.kl_div(rows.log_softmax(-1), expected, reduction="sum", log_target=True)
            loss = (1 - settings.distill) * loss + settings.distill * divergence
        loss = loss / targets
        loss.backward()
        total += float(loss.detach())
    return total


def _targets(batch: dict[str, Tensor]) -> Tensor:
    """Mask (B, T - 1) of the predictions that count: neither the target nor the token it is predicted from is padding."""
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0
    return real[:, 1:] & real[:, :-1]


def _teacher(model: nn.Module, chosen: dict[str, nn.Parameter]) -> Callable[..., Any]:
    """The dense model's eager forward: of the module itself where only factors are trained, else of a copy made now."""
    dense = model
    if any(not name.startswith(f"{MODULE}.") for name in chosen):
        dense = copy.deepcopy(model)
        detach(dense)

    def forward(**batch: Tensor) -> Any:
        # force_eager: the module itself may have been compiled in place
        with torch.no_grad(), evaluating(dense), torch.compiler.set_stance("force_eager"):
            return dense(**batch)

    return forward


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode without a cache of keys and values inside; restores modes and config at the end."""
    modes = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    try:
        model.train()
        if cached:
            config.use_cache = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if cached:
            config.use_cache = cached


def _digest(batches: Sequence[dict[str, Tensor]]) -> str:
    state = hashlib.sha256()
    for batch in batches:
        state.update(tensor_bytes(batch["input_ids"]))
    return state.hexdigest()[:16]


def _names(chosen: dict[str, nn.Parameter]) -> str:
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(chosen.items())}
    return f"{len(shapes)}, {hashlib.sha256(str(shapes).encode()).hexdigest()[:16]}"


def _last_checkpoint(folder: Path | None, done: Training, settings: Settings) -> str:
    every = settings.checkpoint_every
    if folder is None or not every or len(done.losses) < every:
        return "no checkpoint was written yet"
    return f"the checkpoint of step {len(done.losses) // every * every} is in {folder}"


def _state(
    fingerprint: dict[str, str], chosen: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, done: Training
) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "fingerprint": fingerprint,
        "parameters": {name: parameter.detach() for name, parameter in chosen.items()},
        "optimizer": optimizer.state_dict(),
        "rng": [torch.get_rng_state(), *cuda],
        "done": asdict(done),
    }


def _restore(state: dict[str, Any], chosen: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, done: Training) -> None:
    """Restore Parameters, optimizer, random state and history from a checkpoint."""
    with torch.no_grad():
        for name, parameter in chosen.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"][0])
    if len(state["rng"]) > 1:
        torch.cuda.set_rng_state_all(state["rng"][1:])
    done.tokens, done.losses, done.seconds = state["done"]["tokens"], state["done"]["losses"], state["done"]["seconds"]
    done.evaluations = [(step, loss) for step, loss in state["done"]["evaluations"]]
    done.step_seconds = state["done"]["step_seconds"]
