"""LoRA on disk, in peft's layout: adapter_config.json and adapter_model.safetensors.

In: a model with LoRA, or a folder. Out: both files, replaced atomically, or the model with LoRA. The header of the safetensors
file has the digest of the plan, and checksums of the matrices and of the options that determine their meaning. Files of earlier
versions, without checksums, are read with all other checks. A load that fails leaves the model unchanged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from rana_fx.atomic import read_regular, write_bytes
from rana_fx.errors import CheckpointError, CheckpointWriteError
from rana_fx.modules import unwrap
from rana_fx.runtime.lora_state import ADAPTER, LowRank
from rana_fx.switching import switching
from rana_fx.training.checksum import checksum
from rana_fx.training.lora import SUPPORTED, low_rank, lowrank_of, peft_library, put_on
from rana_fx.training.parameters import attachment_to_train

if TYPE_CHECKING:
    from peft import LoraConfig

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in files written by peft


def save_lora(model: nn.Module, folder: str | Path) -> None:
    """Write the LoRA matrices in peft's format: adapter_config.json, and adapter_model.safetensors with the digest of the plan.

    Raises:
        NoPlan, NothingToTrain: the model has no LoRA. CheckpointWriteError: a file cannot be written; the folder is unchanged.
    """
    found = attachment_to_train(model)
    module = lowrank_of(model)
    config: Any = module.adapters.peft_config[ADAPTER]  # type: ignore[index]
    tensors = {name: value.detach().cpu().contiguous() for name, value in _state(module).items()}
    metadata = {"format": "pt", "plan": found.plan.digest(), "matrices": _digest(tensors)}
    path = folder = Path(folder)
    try:
        with switching(folder) as new:
            path = folder / _CONFIG
            config.save_pretrained(str(new))
            metadata["options"] = _options(json.loads((new / _CONFIG).read_bytes()))
            path = folder / _WEIGHTS
            write_bytes(new / _WEIGHTS, safetensors.torch.save(tensors, metadata=metadata))
            path = folder  # both of them
    except OSError as error:
        kept = "The LoRA that was there before is unchanged" if (folder / _WEIGHTS).is_file() else "No LoRA was left there"
        raise CheckpointWriteError(path=path, reason=error.strerror or str(error), kept=kept) from error


def load_lora(model: nn.Module, folder: str | Path) -> dict[str, nn.Parameter]:
    """``add_lora`` with the options and matrices that ``save_lora`` wrote; returns the trained Parameters by name.

    Raises:
        CheckpointError: the files are missing, incomplete or damaged, or belong to another plan. Also what ``add_lora`` raises.
    """
    folder, model = Path(folder), unwrap(model)
    found = attachment_to_train(model)
    config, options = _read_config(folder)
    state, metadata = _read_weights(folder)
    plan, digest = metadata.get("plan"), found.plan.digest()
    if plan != digest:
        reason = f"its LoRA belongs to plan {str(plan)[:12]}, attached is {digest[:12]}"
        raise CheckpointError(path=folder, reason=reason, todo="attach that plan")
    for name, got in (("matrices", _digest(state)), ("options", options)):
        if metadata.get(name, got) != got:
            raise _damaged(folder, f"the {name} of its LoRA do not match their checksum: they were changed after they were saved")
    config.inference_mode = False
    module = low_rank(model, config)
    state = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    _check(folder, state, _state(module))
    peft_library().set_peft_model_state_dict(module.adapters, state, adapter_name=ADAPTER)
    return put_on(model, module)


def _state(module: LowRank) -> dict[str, Tensor]:
    """Matrices by peft's names."""
    peft = peft_library()
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(module.adapters, adapter_name=ADAPTER, save_embedding_layers=False)
    return found


def _read_config(folder: Path) -> tuple[LoraConfig, str]:
    """(the options, digest of those that determine the matrices). Raises CheckpointError."""
    library = peft_library()
    try:
        facts = json.loads(read_regular(folder / _CONFIG))
        if not isinstance(facts, dict) or facts.get("peft_type") != "LORA":
            raise ValueError(f"{_CONFIG} is not one of LoRA")
        config: LoraConfig = library.LoraConfig.from_peft_type(**facts)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _none(folder, error) from error
    return config, _options(facts)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises CheckpointError."""
    try:
        content = read_regular(folder / _WEIGHTS)
        state = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        return state, json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise _none(folder, error) from error


def _check(folder: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless names, shapes and dtypes are those that the options select and all values are finite."""
    odd = sorted(state.keys() ^ expected.keys())
    if odd:
        raise _damaged(folder, f"it lacks matrices, or has others than its targets have: {', '.join(odd[:4])}")
    for name, like in expected.items():
        got, right = (f"{tuple(value.shape)} {value.dtype}" for value in (state[name], like))
        if got != right:
            raise _damaged(folder, f"{name} is {got}, expected {right}")
        if not bool(state[name].isfinite().all()):
            raise _damaged(folder, f"{name} has values that are not finite")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return checksum({name: tensors[name] for name in sorted(tensors)})


def _options(facts: Mapping[str, Any]) -> str:
    """Digest of the options that determine the matrices and their meaning; independent of the order of targets."""
    found = {name: facts.get(name) for name in sorted(SUPPORTED)}
    found = {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _none(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(path=folder, reason=f"it holds no LoRA ({error})", todo="save one there with save_lora")


def _damaged(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(path=folder, reason=reason, todo="save it again with save_lora")
