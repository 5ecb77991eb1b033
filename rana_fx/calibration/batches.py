"""Run a model on batches as callers give them.

In: a batch: any pytree. Out: the batch on the model's device, its parts, which rows are padding, how many tokens it has, and
contexts in which a model is observed: evaluation mode, nothing else compiled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor, nn

from rana_fx.errors import InvalidOption
from rana_fx.plan import tensor_bytes

_VARIANTS = 64  # of one function, at least, that are compiled while a model is observed


def check_batches(batches: object, *, name: str = "batches") -> Iterable[Any]:
    """Raises InvalidOption for one batch where many are expected: iterating it would yield its keys or its rows.

    ``name``: of the argument.
    """
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        expected = "an iterable of batches, such as a list, a DataLoader or a datasets.Dataset; put a single batch in a list"
        raise InvalidOption(name=name, got=type(batches).__name__, expected=expected)
    return batches


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a pytree; in a mapping, arrays and lists of numbers become tensors, and one row a batch of one."""
    if isinstance(batch, Mapping):
        batch = {key: _tensor_of(value) for key, value in batch.items()}
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 1:  # a row of a datasets.Dataset in torch or numpy format
            batch = {
                key: value[None] if isinstance(value, Tensor) and value.dim() == 1 else value for key, value in batch.items()
            }
    return _map(lambda tensor: tensor.to(device), batch)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Over all tensors, also in dataclasses and in mappings that optree takes for leaves (ModelOutput, BatchEncoding)."""

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            return function(item)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            moved = {field.name: _map(function, getattr(item, field.name)) for field in dataclasses.fields(item) if field.init}
            return dataclasses.replace(item, **moved)
        return {key: _map(function, inner) for key, inner in item.items()} if isinstance(item, Mapping) else item

    return optree.tree_map(leaf, value)


def _named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(key or field it stands under, tensor) of a nested batch."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named_tensors(inner, str(key))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _named_tensors(getattr(value, field.name), field.name)
    elif isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", [name] * len(value))
        for field, inner in zip(fields, value, strict=True):
            yield from _named_tensors(inner, field)


def _tensor_of(value: object) -> object:
    if isinstance(value, Tensor) or value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    if hasattr(value, "__array__") or (isinstance(value, list) and _numeric(value)):
        tensor = torch.as_tensor(value)
        # a row of a datasets.Dataset holds one sequence as a flat list: a batch of one
        return tensor[None] if tensor.dim() == 1 and isinstance(value, list) else tensor
    return value


def _numeric(value: object) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, (int, float))


def call(model: Callable[..., Any], batch: Any) -> Any:
    """``model(**batch)``, ``model(*batch)`` or ``model(batch)``, by the batch's type."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def failing_part(model: nn.Module, error: BaseException) -> tuple[str, str]:
    """(the innermost module or line of the model's code where a call failed, what went wrong there)."""
    names = {id(module): name for name, module in model.named_modules()}
    part = type(model).__name__
    root: BaseException = error
    while True:
        for frame, _ in traceback.walk_tb(root.__traceback__):
            # a module that ran; while Dynamo traces, the model's own frames are on the error instead
            part = names.get(id(frame.f_locals.get("self"))) or part
        stack = getattr(root, "real_stack", None)
        if stack:
            part = f"{Path(stack[-1].filename).name}:{stack[-1].lineno}, in {stack[-1].name}: `{(stack[-1].line or '').strip()}`"
        if root.__cause__ is None:
            break
        root = root.__cause__
    lines = [line.strip() for line in str(root).split("\n") if line.strip()] or ["no message"]
    # Dynamo explains in a second line what its first one means
    text = next((line for line in lines if line.startswith("Explanation: ")), lines[0])
    return part, f"{type(root).__name__}: {text.removeprefix('Explanation: ')}".rstrip(".")


def digest_of(batch: Any) -> str:
    """SHA-256 of the names and values of a batch's tensors."""
    state = hashlib.sha256()
    for name, value in _named_tensors(to_device(batch, torch.device("cpu"))):
        state.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
        state.update(tensor_bytes(value))
    return state.hexdigest()


def leading(batch: Any) -> int | None:
    """The first dimension that all tensors of a batch share, if they do."""
    sizes = {value.shape[0] if value.dim() else None for _, value in _named_tensors(batch)}
    return next(iter(sizes)) if len(sizes) == 1 else None


def part_of(batch: Any, start: int, stop: int) -> Any:
    """Of every tensor of a batch, these entries of its first dimension."""
    return _map(lambda tensor: tensor[start:stop], batch)


def halves(batch: Any) -> list[Any]:
    """A batch in two; empty where its tensors share no first dimension, or there is one text in it."""
    texts = leading(batch)
    if texts is None or texts < 2:
        return []
    middle = texts // 2
    return [part_of(batch, 0, middle), part_of(batch, middle, texts)]


# ---- padding


def padding_masks(batch: Any) -> dict[str, Tensor]:
    """Masks of real tokens, (B, T): "" for the (encoder's) input, "decoder_" for the decoder's, by the names in the batch."""
    masks: dict[str, Tensor] = {}
    for name, value in _named_tensors(batch):
        if value.dim() != 2:
            continue
        prefix = "decoder_" if name.startswith(("decoder_", "tgt_")) else ""
        if name.endswith("attention_mask"):
            masks[prefix] = value != 0
        elif name.endswith("padding_mask"):  # torch.nn.Transformer: True marks padding
            masks[prefix] = ~value if value.dtype == torch.bool else value == 0
    return masks


def mask_of(x: Tensor, masks: Mapping[str, Tensor]) -> Tensor | None:
    """Of a batch's masks the one of as many tokens as an activation has rows."""
    return next((mask for mask in masks.values() if mask.numel() == x.numel() // x.shape[-1]), None)


def real_rows(x: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Rows of an activation (B, T, features), (T, B, features) or (B * T, features) that are not padding."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask_BT is None or mask_BT.numel() != len(rows):
        return rows
    if x.dim() == 3 and x.shape[:2] != mask_BT.shape:
        if x.shape[:2] != mask_BT.t().shape:
            return rows
        mask_BT = mask_BT.t()
    return rows[mask_BT.reshape(-1).to(rows.device)]


def count_tokens(batch: Any, masks: dict[str, Tensor]) -> int:
    """Tokens of a batch that are not padding: by its masks, else by its ids, else by the first tensor of two dimensions."""
    if masks:
        return sum(int(mask.sum()) for mask in masks.values())
    tensors = [value for _, value in _named_tensors(batch) if value.dim() >= 2]
    ids = [value.numel() for name, value in _named_tensors(batch) if name.endswith("input_ids")]
    return sum(ids) or next((value.shape[0] * value.shape[1] for value in tensors), 1)


# ---- contexts


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Only our own backend compiles inside, all that runs, and its compiled code is dropped at the end."""
    import torch._dynamo

    # above the recompile limit Dynamo makes no graph: many forms of batches compile a function anew, and so does every module
    # where hooks on all of them (accelerate) make their forwards one function
    config, needed = torch._dynamo.config, max(_VARIANTS, 2 * sum(1 for _ in model.modules()))
    limits = {name: max(getattr(config, name), needed) for name in ("recompile_limit", "accumulated_recompile_limit")}

    # module.compile() and module.forward = torch.compile(module.forward): a call would run code of another backend, past ours
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl is not None]
    forwards = [(module, module.__dict__["forward"]) for module in model.modules() if "forward" in module.__dict__]
    torch._dynamo.reset()
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        for module, forward in forwards:
            if not getattr(forward, "_torchdynamo_disable", False):  # torch.compiler.disable: it stays out of graphs
                module.forward = getattr(forward, "_torchdynamo_orig_callable", forward)
        with config.patch(**limits):
            yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        for module, forward in forwards:
            module.forward = forward
        torch._dynamo.reset()
