"""LoRA on factors and on linears that stayed dense, by ``peft``.

In: a model with a plan attached, and a ``peft.LoraConfig``. Out: the model with peft's two matrices in parallel to each targeted
matrix, created, initialised, named and saved by peft; the backend multiplies by them where a graph multiplies by the matrix,
behind the same mask (passes/rewrite_lora.py), so that merging changes nothing but rounding. Merging adds the product of the two
to the matrix and removes them.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rana_fx.errors import InvalidOption, MissingPackage, NothingToTrain, UnknownTarget
from rana_fx.formats import is_plain
from rana_fx.graph.operands import base_name
from rana_fx.modules import device_of, unwrap
from rana_fx.runtime.attachment import MODULE, Attachment, attached, invalidate_guards
from rana_fx.runtime.lora_state import ADAPTER, LowRank, Matrix
from rana_fx.runtime.replaced_weights import replaced_weights
from rana_fx.training.parameters import attachment_to_train, train_only, weights_to_train

if TYPE_CHECKING:
    from peft import LoraConfig

# the paper's settings
RANK, ALPHA, DROPOUT = 64, 16, 0.05
# supported options: choice of matrices, rank, scaling and initialisation; others change what is computed
SUPPORTED = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights",
}  # fmt: skip
_METADATA = {"task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
_INITIAL = (True, False, "gaussian")  # the others change the matrix, or need data


def add_lora(model: nn.Module, config: LoraConfig | None = None, *, seed: int = 0) -> dict[str, nn.Parameter]:
    """Train low-rank additions to matrices and freeze everything else; returns the new Parameters by name, for an optimizer.

    Only the compiled model includes the additions: in eager mode it is the dense model, as before.

    Args:
        config: peft's. ``target_modules`` are names, or their ends, as peft takes them, of linears and of the plan's factors:
            "o_proj", "lm_head", "rana_fx.a0_router"; here also with wildcards: "*_router". None or "all-linear": every floating
            matrix of the plan, and the weight of every other linear in it, output heads included. Default: r=64, lora_alpha=16,
            lora_dropout=0.05, as in the paper.
        seed: of the initial matrices.

    Raises:
        NoPlan, NothingToTrain, MissingPackage.
        InvalidOption: an option of peft that is more than a low-rank addition, or a model that has LoRA already.
        UnknownTarget: a target matches no matrix that the adapted model multiplies by.
    """
    model = unwrap(model)
    module = low_rank(model, lora_config() if config is None else config, seed)
    return put_on(model, module)


def low_rank(model: nn.Module, config: LoraConfig, seed: int = 0) -> LowRank:
    """The module that ``add_lora`` adds; the model is not changed. Raises what ``add_lora`` raises."""
    peft = peft_library()
    found = attachment_to_train(model)
    config, chosen = resolved(model, config)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.inference_mode(False), torch.random.fork_rng():
            torch.manual_seed(seed)
            matrices = {name: Matrix(matrix, transposed=transposed) for name, (matrix, transposed) in chosen.items()}
            module = LowRank(matrices, config.lora_dropout, device_of(model))
            peft.inject_adapter_in_model(config, module.adapters, adapter_name=ADAPTER)
            # matrices of a model in 16 bits are trained in fp32
            peft.tuners.tuners_utils.cast_adapter_dtype(module.adapters, ADAPTER)
            for matrix in matrices.values():
                matrix.unregister()
    finally:
        for parameter, was in trained:  # peft freezes what it wraps
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)
    assert found.factors.lowrank is None
    return module


def resolved(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, dict[str, tuple[nn.Parameter, bool]]]:
    """(a config that targets matrices by their names, those by name with whether they are (in, out)).

    Raises what ``add_lora`` raises.
    """
    found = attachment_to_train(model)
    config = copy.deepcopy(config)
    _check(peft_library(), config)
    if found.factors.lowrank is not None:
        raise InvalidOption(name="model", got=type(model).__name__, expected="one without LoRA: merge_lora(model) first")
    chosen = _chosen(model, found, config)
    largest = max(RANK, *(max(matrix.shape) for matrix, _ in chosen.values()))
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if rank > largest:
            raise InvalidOption(name="r", got=rank, expected=f"at most {largest}, the largest side of the matrices")
    config.target_modules = list(chosen)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # already applied in _chosen
    return config, chosen


def put_on(model: nn.Module, module: LowRank) -> dict[str, nn.Parameter]:
    """Add the module to the model and train only its Parameters; returns them by name."""
    module.train(model.training)
    attachment_to_train(model).factors.lowrank = module
    added = {f"{MODULE}.lowrank.{name}": parameter for name, parameter in module.named_parameters()}
    train_only(model, added)
    return added


def lora_config(
    *, rank: int = RANK, alpha: float = ALPHA, dropout: float = DROPOUT, targets: list[str] | None = None
) -> LoraConfig:
    """The default config of ``add_lora``, or that with other values. Raises MissingPackage, InvalidOption."""
    peft = peft_library()
    if not 0 <= dropout < 1:
        raise InvalidOption(name="dropout", got=dropout, expected="a probability in [0, 1)")
    config: LoraConfig = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    return config


def merge_lora(model: nn.Module) -> None:
    """Add LoRA's products to their matrices, rounded once to the matrix's dtype, and remove LoRA; a no-op without LoRA."""
    model = unwrap(model)
    found = attached(model)
    if found is None or found.factors.lowrank is None:
        return
    with torch.no_grad():
        for addition in found.factors.lowrank.additions():
            addition.matrix.copy_((addition.matrix.double() + addition.value()).to(addition.matrix.dtype))
    found.factors.lowrank = None
    invalidate_guards(model)


def peft_library() -> Any:
    """The module ``peft``. Raises MissingPackage."""
    try:
        import peft
    except ImportError as error:
        raise MissingPackage(what="LoRA", package="peft", extra="train") from error
    return peft


def lowrank_of(model: nn.Module) -> LowRank:
    """The additions on a model. Raises NoPlan, NothingToTrain."""
    found = attachment_to_train(model)
    if found.factors.lowrank is None:
        raise NothingToTrain(model=type(unwrap(model)).__name__, what="lora", reason="it has no LoRA", todo="call add_lora")
    return found.factors.lowrank


def _check(peft: Any, config: Any) -> None:
    if not isinstance(config, peft.LoraConfig):
        raise InvalidOption(name="config", got=type(config).__name__, expected="a peft.LoraConfig")
    plain = peft.LoraConfig()
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name not in SUPPORTED | _METADATA and value != getattr(plain, option.name):
            expected = "its default: that is more than a low-rank addition to a matrix, and could not be merged into a plan"
            raise InvalidOption(name=option.name, got=value, expected=expected)
    if config.init_lora_weights not in _INITIAL:
        expected = "one of " + ", ".join(map(repr, _INITIAL))
        raise InvalidOption(name="init_lora_weights", got=config.init_lora_weights, expected=expected)
    ranks, scales = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for name, value in [("r", config.r), *(("rank_pattern", rank) for rank in ranks.values())]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InvalidOption(name=name, got=value, expected="a positive number")
    for name, value in [("lora_alpha", config.lora_alpha), *(("alpha_pattern", alpha) for alpha in scales.values())]:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidOption(name=name, got=value, expected="a finite number")
    if not isinstance(config.lora_dropout, int | float) or not 0 <= config.lora_dropout < 1:
        raise InvalidOption(name="lora_dropout", got=config.lora_dropout, expected="a probability in [0, 1)")


def _chosen(model: nn.Module, found: Attachment, config: Any) -> dict[str, tuple[nn.Parameter, bool]]:
    """The matrices that a config targets, by name. Raises UnknownTarget, NothingToTrain."""
    from peft.tuners.tuners_utils import check_target_module_exists

    possible = _possible(model, found)
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        targets = list(possible)
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        config.target_modules = _expanded(target, possible) if isinstance(targets, list | set) else target
        if not any(check_target_module_exists(_without_exclusions(config), name) for name in possible):
            raise UnknownTarget(target=target, model=type(model).__name__, names=", ".join(list(possible)[:8]) or "none")
    if not isinstance(targets, str):
        targets = [name for target in targets for name in _expanded(target, possible)]
    config.target_modules = targets
    chosen = {name: entry for name, entry in possible.items() if targets and check_target_module_exists(config, name)}
    if not chosen:
        reason = "exclude_modules and layers exclude all targets" if possible else "no matrix that it multiplies by is floating"
        raise NothingToTrain(model=type(model).__name__, what="lora", reason=reason, todo="target others, or factors in 16 bits")
    return chosen


def _expanded(target: str, possible: dict[str, Any]) -> list[str]:
    """The names that a target with wildcards matches, since peft has no wildcards; another target as it is."""
    return [name for name in possible if fnmatch.fnmatchcase(name, target)] if "*" in target else [target]


def _without_exclusions(config: Any) -> Any:
    """The config without the options that exclude matrices from its targets."""
    bare_config = copy.copy(config)
    bare_config.exclude_modules = bare_config.layers_to_transform = None
    return bare_config


def _possible(model: nn.Module, found: Attachment) -> dict[str, tuple[nn.Parameter, bool]]:
    """(matrix, is it (in, out)?) of each floating matrix that the adapted model multiplies by, by name; tied ones once."""
    named: dict[str, tuple[nn.Parameter, bool]] = {}
    for index, adapter in enumerate(found.plan.adapters):
        for key, transposed in (("router", adapter.router_tau is not None), ("weight", True)):
            factor = found.tensor(index, key)
            if isinstance(factor, nn.Parameter):
                named[f"{MODULE}.a{index}_{key}"] = factor, transposed
    weights, replaced = weights_to_train(model, found), replaced_weights(found.plan)
    # of tied weights the last name: that of the head, not of the embedding
    names = {id(weight): name for name, weight in weights.items()}
    for record in found.plan.sites:
        weight = weights[base_name(record.name)]
        live = base_name(record.name) not in replaced and weight.dim() == 2 and is_plain(weight)
        if live:
            named.setdefault(names[id(weight)], (weight, record.transposed))
    return named
