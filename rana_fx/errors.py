"""Every exception this package raises, with its message.

A user mistake raises one of these, never an ``AssertionError``. Each message states where (site or file), what was got, what was
expected and what to do; the named facts stay on the exception as ``error.facts``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class RanaError(Exception):
    """Base class. ``facts`` holds the values that the message is formatted with."""

    message: ClassVar[str] = "{reason}"

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        super().__init__(self.message.format(**facts))

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only construction: the default pickling of exceptions would call cls(message)
        return (_rebuild, (type(self), self.facts))


def nearest(got: object, valid: Iterable[str]) -> str | None:
    """The name among the valid ones that was probably meant; None where none is like it."""
    return next(iter(difflib.get_close_matches(str(got), list(valid), n=1)), None)


def one_of(got: object, valid: Iterable[str]) -> str:
    """What ``InvalidOption`` expects where there are few names: "one of static, dynamic (did you mean static?)"."""
    names = list(valid)
    near = nearest(got, names)
    return f"one of {', '.join(names)}" + (f" (did you mean {near}?)" if near else "")


class RanaWarning(UserWarning):
    """What is right, but not what the plan promises: a linear that runs dense, a plan that is not used. Once for each cause."""


def _rebuild(cls: type[RanaError], facts: dict[str, object]) -> RanaError:
    return cls(**facts)


# ---- arguments


class BudgetOutOfRange(RanaError, ValueError):
    message = (
        "budget={budget!r} is outside (0, 1]. It is the expected cost per token of the linear layers inside the "
        "blocks as a fraction of the dense cost: pass a number such as 0.58."
    )

    def __init__(self, **facts: object) -> None:
        super().__init__(**facts)
        budget = facts["budget"]
        if isinstance(budget, (int, float)) and not isinstance(budget, bool) and 1 < budget <= 100:  # meant as percent
            self.args = (f"{self.args[0]} Did you mean {budget / 100:g}?",)


class BudgetUnreachable(RanaError, ValueError):
    message = (
        "budget={budget:.3f} cannot be reached with recipe={recipe!r} on this model: the lowest reachable budget is "
        "{lowest:.3f} ({why}). Pass at least {lowest:.3f}, or use another recipe (rana_fx recipes: {recipes})."
    )


class BudgetOrTarget(RanaError, ValueError):
    message = (
        "got {got} together: expected at most one of budget, budgets, max_kl, max_loss and max_ppl_increase. A target "
        "is searched for by itself: pass the one that matters, and no budget."
    )


class TargetNotPositive(RanaError, ValueError):
    message = (
        "{name}={got!r} is not a positive number. A plan differs from the dense model, and the bound includes the uncertainty of "
        "measuring it: pass a number such as {example}, or budget=1 for the dense model."
    )


class TargetUnreachable(RanaError, ValueError):
    message = (
        "{name}={limit:g} is reached by no plan of recipe={recipe!r} on this model: the best of {count} budgets that were tried "
        "is {budget:.3f}, which promises {best:.4g} ({mean:.4g} measured on {documents} held-out documents, the rest is the 95 % "
        "interval). Pass at least {best:.4g}, more held-out documents, or another recipe."
    )


class TargetNotMeasurable(RanaError, ValueError):
    message = (
        "{name} cannot be measured on {model}: {reason}. Expected logits over classes for max_kl, and logits (B, T, classes) for "
        "input_ids (B, T) for max_loss and max_ppl_increase; pass a budget instead."
    )


class TooFewHeldOut(RanaError, ValueError):
    message = (
        "{got} held-out documents are too few for a confidence interval of {name}: at least {needed} are needed. Every fourth "
        "batch is withheld, and each of its rows is a document: pass more batches, or held_out=batches of other text."
    )


class NothingToSkip(RanaError, ValueError):
    message = (
        "recipe={recipe!r} finds too few exact zeros in what {count} linears read. Most have, by role: {found}; masks save time "
        "from a share of {least:g} on. Exact zeros come from ReLU, squared ReLU and thresholded gates, not from SiLU and GELU: "
        "use recipe='rana', which skips small inputs at a small, measured loss."
    )


class UnknownChoice(RanaError, ValueError):
    message = "{kind}={got!r} is not known. Pick one of: {valid}."

    def __init__(self, **facts: object) -> None:
        super().__init__(**facts)
        near = nearest(facts["got"], str(facts["valid"]).split(", "))
        if near is not None:
            self.args = (f"{self.args[0]} Did you mean {near!r}?",)


class UnknownRecipe(UnknownChoice):
    pass


class UnknownMetric(UnknownChoice):
    pass


class InvalidOption(RanaError, ValueError):
    message = "option {name}={got!r} is not valid: expected {expected}."


class NoSuchLinear(RanaError, ValueError):
    message = (
        "{option}={pattern!r} matches no linear of {model}: {near} Expected a pattern (*, ?, [abc]) of names of weights or of "
        "modules around them; rana_fx.explain(model, batch) lists them."
    )


# ---- calibration


class NoBatches(RanaError, ValueError):
    message = "no batch was given: `batches` yielded nothing. Pass at least one batch that the model accepts ({hint})."


class TooLittleToRefine(RanaError, ValueError):
    message = (
        "the text is too little to refine a plan on: got {got} rows, expected at least {needed}. One in four is held out of the "
        "training, and {held} are needed to tell a gain from chance. Pass more batches, or shorter rows."
    )


class TooFewTokens(RanaError, ValueError):
    message = (
        "{site}: {got} calibration tokens are too few for a layer of {rank} ranks. At least {needed} tokens "
        "(padding not counted) are needed; pass more or longer batches."
    )


class NonFinite(RanaError, ValueError):
    message = (
        "{site}: {count} NaN or Inf values in its {what} ({shape}). Calibration needs finite values: "
        "check the checkpoint, the dtype (fp16 overflows at 65504) and the batches."
    )


class NoLinears(RanaError, ValueError):
    message = (
        "no linear layer was found in {model}: {graphs} traced graph(s), {nodes} operations, none multiplies by a "
        "2-D floating-point Parameter inside a block. Skipped: {skipped}. rana_fx.explain(model, batch) lists what was seen."
    )


class TraceFailed(RanaError, RuntimeError):
    message = (
        "{model} could not be traced by torch.compile while running batch {batch}: {part}: {reason}. "
        "The model must run in eager mode on this batch and under torch.compile(model); fix that first "
        "(TORCH_LOGS=graph_breaks shows where tracing stops)."
    )


class CompilationDisabled(RanaError, RuntimeError):
    message = (
        "torch.compile is switched off: {reason}. Calibration, explain and measuring read the graphs that it traces, and it "
        "applies the plan: expected it to be on. {todo}."
    )


class WeightAbsent(RanaError, RuntimeError):
    message = (
        "{model}: its weight {site} is on the meta device, without data: it was not loaded, or is offloaded until the model runs "
        "(accelerate, device_map). Expected all weights in memory; load the model without offloading, or onto more devices, and "
        "take accelerate's hooks off (accelerate.hooks.remove_hook_from_submodules)."
    )


class FactorsCalled(RanaError, RuntimeError):
    message = (
        "{model}: the factors of its plan were called as if they were a layer: the model calls all of its parts in turn "
        "(self.children()), and attaching a plan adds a part, rana_fx. Expected a model that calls its parts by name, or an "
        "nn.Sequential. Put the model into a module of its own (self.inner = model), and adapt that."
    )


class AlreadyAdapted(RanaError, RuntimeError):
    message = (
        "{model} already has a plan attached (recipe={recipe!r}, budget={budget}, digest {digest}). "
        "Call rana_fx.detach(model) first, or rana_fx.attach(model, other_plan) to replace it."
    )


# ---- plans


class NoPlan(RanaError, RuntimeError):
    message = (
        "the model being compiled has no plan attached (its linear {site} has none). Call "
        "rana_fx.adapt(model, batches) or rana_fx.attach(model, rana_fx.load_plan(path)) before the first call, "
        'or compile with backend="inductor" for the dense model.'
    )


class NotApplied(RanaError, RuntimeError):
    message = "{site}: the plan is not applied here: {reason}. The output is right, without the saving. {todo}"


class PlanMismatch(RanaError, ValueError):
    message = (
        "the plan does not fit {model}: {site}: got {got}, expected {expected}. A plan is valid only for the weights "
        "it was made for; load the matching checkpoint or run rana_fx.adapt again."
    )


class WeightsFreed(RanaError, RuntimeError):
    message = (
        "{site}: its dense weight was freed. The model was compiled with prefill='factors', which frees the weights that factors "
        "replace; expected a model with all of its weights: load its checkpoint again to {what}."
    )


class PlanVersion(RanaError, ValueError):
    message = "{path}: plan format {got} was written by another rana_fx; this one reads format {expected}. {todo}"


class PlanFileError(RanaError, ValueError):
    message = (
        "{path} is not a readable plan: {reason}. Expected a folder written by Plan.save (plan.json and plan-*.safetensors)."
    )


class PlanWriteError(RanaError, OSError):
    message = (
        "the plan could not be written to {path}: {reason}. Nothing at that path was changed; free space or pick another path."
    )


# ---- fine-tuning


class NothingToTrain(RanaError, ValueError):
    message = "nothing of {model} would be trained with what={what!r}: {reason}. Expected floating-point tensors; {todo}."


class UnknownTarget(RanaError, ValueError):
    message = (
        "LoRA target {target!r} matches no matrix that the adapted {model} multiplies by. Expected names of linears or factors, "
        "or their ends; some are: {names}. Weights that factors replace are not read: target the factors (rana_fx.*)."
    )


class LoraBeside(RanaError, RuntimeError):
    message = (
        "{site}: a LoRA module (its weight {weight}) was added in parallel to this linear, which the plan masks or replaces: it "
        "would bypass the mask, and could not be merged. Expected peft's own wrappers only on linears that stayed dense; use "
        "rana_fx.training.add_lora(model, peft.LoraConfig(...)) for the others."
    )


class MissingPackage(RanaError, RuntimeError):
    message = "{what} needs the package {package}, which is not installed. Install it: pip install 'rana-fx[{extra}]'."


class OutOfMemory(RanaError, RuntimeError):
    message = (
        "out of memory on {device}: {reason}. Expected batches of {batch_size} x {context} tokens to fit while training: {todo}."
    )


class LossNotFinite(RanaError, RuntimeError):
    message = (
        "step {step}: the {what} is {got}, expected a finite number. Parameters are those after step {last}; {kept}. "
        "Lower the learning rate (now {rate:g}), train in float32 or bfloat16, or inspect the text of that step."
    )


class TooLittleText(RanaError, ValueError):
    message = (
        "{source}: got {got} tokens, expected {expected} ({trained} to train on and {held_out} held out), in whole batches of "
        "{batch}. Lower the number of tokens or pass more text: a text is not repeated."
    )


class CheckpointError(RanaError, ValueError):
    message = "{path} cannot be resumed from: {reason}. Expected a checkpoint of the same plan, settings and text; {todo}."


class CheckpointWriteError(CheckpointError, OSError):
    message = "{path} could not be written: {reason}. {kept}; free space or pick another folder."


# ---- kernels


class BadOperand(RanaError, ValueError):
    message = "operand {name} is {got}: expected {expected}. {todo}"


class KernelNotCompiled(RanaError, RuntimeError):
    message = (
        "{kernel} could not be compiled or loaded: {reason}. Expected the NVRTC library of PyTorch's CUDA version and a driver "
        "that is no older: reinstall PyTorch's CUDA wheels, or update the driver."
    )


# ---- data and models


class ColumnMissing(RanaError, ValueError):
    message = "{source}: no text column {column!r}; it has {columns}. Name the right one with column=... (--column)."


class DatasetError(RanaError, ValueError):
    message = (
        "{source} cannot be read as a dataset: {reason}. Expected a local .txt, .json, .jsonl, .parquet file "
        "(.xz or .gz allowed), a folder of them, or the name of a dataset on the Hugging Face hub."
    )


class ModelError(RanaError, ValueError):
    message = "{source} cannot be loaded as a model: {reason}. Expected a local folder or a name on the Hugging Face hub."
