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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rana_fx.errors import CheckpointError, InvalidOption, MissingPackage, NothingToTrain, UnknownTarget
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
_SUPPORTED = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights",
}  # fmt: skip
_METADATA = {"task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
_INITIAL = (True, False, "gaussian")  # the others change the matrix, or need data
_WEIGHTS = "adapter_model.safetensors"


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
    peft = _peft()
    model = unwrap(model)
    found = attachment_to_train(model)
    config = lora_config() if config is None else copy.deepcopy(config)
    _check(peft, config)
    if found.factors.lowrank is not None:
        raise InvalidOption(name="model", got=type(model).__name__, expected="one without LoRA: merge_lora(model) first")
    chosen = _chosen(model, found, config)
    config.target_modules = list(chosen)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # already applied in _chosen
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(seed)
        matrices = {name: Matrix(matrix, transposed=transposed) for name, (matrix, transposed) in chosen.items()}
        module = LowRank(matrices, config.lora_dropout, device_of(model))
        peft.inject_adapter_in_model(config, module.adapters, adapter_name=ADAPTER)
        # matrices of a model in 16 bits are trained in fp32
        peft.tuners.tuners_utils.cast_adapter_dtype(module.adapters, ADAPTER)
        for matrix in matrices.values():
            matrix.unregister()
    module.train(model.training)
    found.factors.lowrank = module
    added = {f"{MODULE}.lowrank.{name}": parameter for name, parameter in module.named_parameters()}
    train_only(model, added)
    return added


def lora_config(
    *, rank: int = RANK, alpha: float = ALPHA, dropout: float = DROPOUT, targets: list[str] | None = None
) -> LoraConfig:
    """The default config of ``add_lora``, or that with other values. Raises MissingPackage, InvalidOption."""
    peft = _peft()
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


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Write LoRA in the format of peft, adapter_config.json and adapter_model.safetensors, with the plan's digest as metadata.

    Raises:
        NoPlan, NothingToTrain: there is no LoRA on the model.
    """
    from safetensors.torch import save_file

    peft = _peft()
    found = attachment_to_train(model)
    module = _lowrank(model, found)
    state = peft.get_peft_model_state_dict(module.adapters, adapter_name=ADAPTER, save_embedding_layers=False)
    folder = Path(folder)
    module.adapters.peft_config[ADAPTER].save_pretrained(str(folder))  # type: ignore[index, union-attr]
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt", "plan": found.plan.digest()})


def load_lora(model: nn.Module, folder: str | Path) -> dict[str, nn.Parameter]:
    """``add_lora`` with the matrices that ``save_lora`` wrote.

    Raises:
        CheckpointError: the folder holds no LoRA, or one that was trained with another plan.
        What ``add_lora`` raises.
    """
    from safetensors import SafetensorError, safe_open

    peft, folder = _peft(), Path(folder)
    found = attachment_to_train(model)
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            plan = (file.metadata() or {}).get("plan")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(path=folder, reason=f"it holds no LoRA ({error})", todo="save one there with save_lora") from error
    digest = found.plan.digest()
    if plan != digest:
        reason = f"its LoRA belongs to plan {str(plan)[:12]}, attached is {digest[:12]}"
        raise CheckpointError(path=folder, reason=reason, todo="attach that plan")
    config.inference_mode = False
    added = add_lora(model, config)
    peft.set_peft_model_state_dict(_lowrank(model, found).adapters, state, adapter_name=ADAPTER)
    return added


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingPackage(what="LoRA", package="peft", extra="train") from error
    return peft


def _lowrank(model: nn.Module, found: Attachment) -> LowRank:
    if found.factors.lowrank is None:
        raise NothingToTrain(model=type(unwrap(model)).__name__, what="lora", reason="it has no LoRA", todo="call add_lora")
    return found.factors.lowrank


def _check(peft: Any, config: Any) -> None:
    if not isinstance(config, peft.LoraConfig):
        raise InvalidOption(name="config", got=type(config).__name__, expected="a peft.LoraConfig")
    plain = peft.LoraConfig()
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.name not in _SUPPORTED | _METADATA and value != getattr(plain, option.name):
            expected = "its default: that is more than a low-rank addition to a matrix, and could not be merged into a plan"
            raise InvalidOption(name=option.name, got=value, expected=expected)
    if config.init_lora_weights not in _INITIAL:
        expected = "one of " + ", ".join(map(repr, _INITIAL))
        raise InvalidOption(name="init_lora_weights", got=config.init_lora_weights, expected=expected)
    if config.r < 1:
        raise InvalidOption(name="r", got=config.r, expected="a positive number")


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
