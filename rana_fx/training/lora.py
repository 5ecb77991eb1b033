"""LoRA on factors and on linears that stayed dense, as an addition to the matrix: W + alpha / r * up @ down.

In: a model with a plan attached. Out: the model with two small Parameters beside each matrix, whose product the backend adds
where a graph reads the matrix (passes/add_lowrank.py), so that masks see what they see after merging: additions beside a masked
product, as ``peft`` makes them, could not be merged. Merging adds them for good.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import torch
from torch import nn

from rana_fx.attachment import MODULE, attached, renew
from rana_fx.errors import InvalidOption, NothingToTrain, UnknownTarget
from rana_fx.lowrank import LowRank
from rana_fx.running import bare, weights_of
from rana_fx.training.parameters import attachment_to_train, only, replaced
from rana_fx.weights import base_name


def add_lora(
    model: nn.Module, *, rank: int = 64, alpha: float = 16.0, targets: Sequence[str] | None = None, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Train low-rank additions to matrices and freeze everything else; returns the new Parameters by name, for an optimizer.

    The model then has them only compiled: called eagerly it is the dense model it was.

    Args:
        rank: at most so many; matrices with a smaller side get that.
        alpha: the addition is alpha / rank * up @ down; up starts at zero.
        targets: names of Parameters, with wildcards ("*.o_proj.weight", "rana_fx.*_router", "lm_head.weight"). Default: every
            floating matrix of the plan, and the weight of every other linear that it knows, output heads included.

    Raises:
        NoPlan, NothingToTrain, InvalidOption, UnknownTarget: matches no matrix that the adapted model multiplies by.
    """
    model = bare(model)
    found = attachment_to_train(model)
    if rank < 1:
        raise InvalidOption(name="rank", got=rank, expected="a positive number")
    if isinstance(targets, str):
        raise InvalidOption(name="targets", got=targets, expected="a list of names")
    if found.factors.lowrank is not None:
        raise InvalidOption(name="rank", got=rank, expected="a model without LoRA: merge_lora(model) first")
    possible = _possible(model)
    chosen = possible if targets is None else {}
    for pattern in targets or ():
        matched = {name: matrix for name, matrix in possible.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            raise UnknownTarget(target=pattern, model=type(model).__name__, names=", ".join(list(possible)[:8]) or "none")
        chosen |= matched
    if not chosen:
        reason = "no matrix that it multiplies by is floating"
        raise NothingToTrain(model=type(model).__name__, what="lora", reason=reason, todo="adapt it with factors in 16 bits")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        module = LowRank(alpha)
        for name, matrix in chosen.items():
            out, width = matrix.shape
            ranks = min(rank, out, width)
            down = (torch.rand(ranks, width, generator=generator) * 2 - 1) / math.sqrt(width)
            module.add(name, matrix, up=torch.zeros(out, ranks, device=matrix.device), down=down.to(matrix.device))
        found.factors.lowrank = module
    added = {f"{MODULE}.lowrank.{name}": parameter for name, parameter in module.named_parameters()}
    only(model, added)
    return added


def merge_lora(model: nn.Module) -> None:
    """Add what LoRA trained to the matrices, rounded once to their dtype, and take it off; nothing where there is none."""
    model = bare(model)
    found = attached(model)
    if found is None or found.factors.lowrank is None:
        return
    with torch.no_grad():
        for matrix, addition in found.factors.lowrank.additions():
            matrix.copy_((matrix.double() + addition).to(matrix.dtype))
    found.factors.lowrank = None
    renew(model)


def _possible(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating matrices that the adapted model multiplies by, by name; tied ones once."""
    found = attachment_to_train(model)
    named = {f"{MODULE}.{name}": factor for name, factor in found.factors.named_parameters(recurse=False) if factor.dim() == 2}
    weights, gone = weights_of(model), replaced(found.plan)
    read = {id(weights[name]) for name in {base_name(record.name) for record in found.plan.sites} - gone}
    for name, weight in model.named_parameters():
        if id(weight) in read and weight.dim() == 2 and weight.is_floating_point():
            named[name] = weight
    return named
