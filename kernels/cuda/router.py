"""Launches router.cu: z = x @ w^T of a few tokens on tensor cores, optionally of x after its root-mean-square norm.

Error: relative RMSE <= 4 * eps(dtype of x) * sqrt(log2 D + 1); router.cu says what is rounded.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rana_fx.errors import BadOperand, InvalidOption
from rana_fx.formats import bits_of, group_of, shape_of
from rana_fx.kernels.cuda import driver, nvrtc
from rana_fx.kernels.cuda.router_config import MOST_PAIRED, RouterConfig, default_config, unit_of
from rana_fx.kernels.triton.compaction import sm_count_of
from rana_fx.kernels.triton.config import MAX_TOKENS, cdiv

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# in this order; primitives.cuh comes before them, or what defines its names elsewhere
FILES = ("router_layout.cuh", "router_values.cuh", "router_numbers.cuh", "router.cu")
_ALIGNMENT = 16  # bytes of which rows are multiples
_POINTERS = ("w", "scale", "x", "gain", "z")
_STRIDES = ("w_row", "scale_row", "scale_group", "x_token", "x_column", "gain_column", "z_token")


class Arguments(ctypes.Structure):
    """The struct of that name in router_layout.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in _STRIDES),
        ("R", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
    )


@dataclass(frozen=True, eq=False)
class Launch:
    """A checked launch. constants: that router.cu is compiled with. z: its result, not yet computed, (T, R).

    kept: what the arguments point to.
    """

    constants: tuple[tuple[str, int], ...]
    arguments: Arguments
    blocks: int
    z: Tensor
    kept: tuple[Tensor | None, ...]


def refusal(x: Tensor, weight: Tensor, scale: Tensor | None) -> str | None:
    """Why the kernel cannot multiply these, or None. May be called with fake tensors."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies bfloat16 and float16 activations, these are {x.dtype}"
    if weight.dtype not in (torch.int8, torch.uint8, x.dtype):
        return f"multiplies weights in 8 and 4 bits and in the activations' dtype, this is {weight.dtype}"
    tokens = x.numel() // max(x.shape[-1], 1)
    if not 1 <= tokens <= MAX_TOKENS:
        return f"{tokens} tokens, it takes 1 to {MAX_TOKENS}"
    columns, size = shape_of(weight, scale)[1], weight.element_size()
    places = weight.stride(0) * size, weight.storage_offset() * size, weight.shape[1] * size
    if weight.stride(1) != 1 or not columns or any(place % _ALIGNMENT for place in places):
        apart = weight.stride(0) * size
        return f"reads {_ALIGNMENT} bytes at once, of which rows of {columns} columns, {apart} bytes apart, are not made"
    return None


def router(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, *, gain: Tensor | None = None, eps: float | None = None,
    offset: float = 0.0, config: RouterConfig | None = None, early: bool = False,
) -> Tensor:  # fmt: skip
    """z, (..., R) in x's dtype, in one launch.

    Args:
        x: (..., D) bf16 or fp16, T <= 16 rows in all. weight, scale: (R, D) as rana_fx.formats stores it.
        eps: where given, x is normalised first, x / sqrt(mean x^2 + EPS) * (gain + offset), rounded once at most.
        gain: (D,), with ``eps``; None for ones.
        config: the default one if None.
        early: the weight, its scales and the gain are read before the previous kernel of the stream ends; it may write x alone.

    Raises:
        BadOperand, InvalidOption, KernelNotCompiled.
    """
    with torch.cuda.device_of(x):
        if config is None:
            tokens = x.numel() // max(x.shape[-1], 1)
            config = default_config(*shape_of(weight, scale), tokens, bits=bits_of(weight), sm_count=sm_count_of(x))
        launch = prepared(x, weight, scale, gain=gain, eps=eps, offset=offset, config=config)
        _kernel(launch.constants, bool(early), x.device.index)(launch.blocks, launch.arguments)
    return launch.z.reshape(*x.shape[:-1], launch.z.shape[1])


def prepared(
    x: Tensor, weight: Tensor, scale: Tensor | None, *, gain: Tensor | None, eps: float | None, offset: float,
    config: RouterConfig,
) -> Launch:  # fmt: skip
    """The launch of ``router``. Raises BadOperand, InvalidOption."""
    reason = refusal(x, weight, scale)
    if reason is not None:
        todo = "Use the Triton kernel."
        raise BadOperand(name="weight", got="not for this kernel", expected=f"another: it {reason}", todo=todo)
    ranks, columns = shape_of(weight, scale)
    if x.shape[-1] != columns:
        expected = f"(..., {columns})"
        raise BadOperand(name="x", got=str(tuple(x.shape)), expected=expected, todo="Its last size is weight's last.")
    if gain is not None and (tuple(gain.shape) != (columns,) or eps is None):
        raise BadOperand(name="gain", got=str(tuple(gain.shape)), expected=f"({columns},)", todo="One per input, and an eps.")
    tokens = x.numel() // columns
    if config.rows == 8 and tokens > MOST_PAIRED:
        raise InvalidOption(name="rows", got=8, expected=f"16, 32 or 64 for {tokens} tokens")
    if weight.data_ptr() % _ALIGNMENT:
        weight = weight.clone()  # memory that is shared with a file begins anywhere
    scale, gain = (one if one is None or one.dtype in DTYPE_CODES else one.float() for one in (scale, gain))
    flat = x.reshape(tokens, columns)
    z = torch.empty((tokens, ranks), dtype=x.dtype, device=x.device)
    kept = (flat, weight, scale, gain)
    constants = constants_of(*kept, norm=eps is not None, config=config)
    return Launch(constants, _arguments_of(*kept, z, eps or 0.0, offset), config.blocks(ranks), z, kept)


def constants_of(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, *, norm: bool, config: RouterConfig
) -> tuple[tuple[str, int], ...]:
    """The constants that router.cu is compiled with. x (T, D)."""
    tokens, columns, bits = *x.shape, bits_of(weight)
    group = group_of(weight, scale) if bits == 4 and scale is not None else columns
    wide = x.stride(1) == 1 and not any(place % _ALIGNMENT for place in (x.data_ptr(), x.stride(0) * x.element_size()))
    constants = {
        "BITS": bits,
        "TOKENS": tokens,
        "COLUMNS": columns,
        "GROUP": group,
        "ROWS": config.rows,
        "WARPS": config.warps,
        "SPLITS": config.splits,
        "HELD": config.held,
        "VALUE": DTYPE_CODES[x.dtype],
        "SCALE": 0 if scale is None else DTYPE_CODES[scale.dtype],
        "SCALE_UNIT": _scale_unit(scale, columns, group, config) if bits == 4 and scale is not None else 4,
        "NORM": int(norm),
        "GAIN": -1 if gain is None else DTYPE_CODES[gain.dtype],
        "WIDE": int(wide),
        "SHARED_BYTES": config.shared_bytes(
            columns,
            tokens,
            bits,
            group,
            scale_bytes=0 if scale is None else scale.element_size(),
            gain=gain is not None,
            norm=norm,
        ),
    }
    return tuple(constants.items())


def _scale_unit(scale: Tensor, columns: int, group: int, config: RouterConfig) -> int:
    """Bytes of a row of 4-bit scales that a block can copy at once: 2, 4, 8 or 16."""
    size = scale.element_size()
    if scale.stride(1) != 1:
        return size
    part = cdiv(cdiv(columns, unit_of(4, group)), config.splits) if config.splits > 1 else 0
    return max(math.gcd(16, scale.stride(0) * size, scale.data_ptr(), part * size), size)


def _arguments_of(
    x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, z: Tensor, eps: float, offset: float
) -> Arguments:
    """The kernel's argument. x (T, D), z (T, R)."""
    tensors = (weight, scale, x, gain, z)
    strides = (
        weight.stride(0) * weight.element_size(),
        *((0, 0) if scale is None else (scale.stride(0), scale.stride(1) if scale.dim() == 2 else 0)),
        *(*x.stride(), 0 if gain is None else gain.stride(0), z.stride(0)),
    )
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return Arguments(*pointers, *strides, z.shape[1], eps, offset)


@functools.cache
def source() -> str:
    """The kernel's text, with the instructions of a GPU in front."""
    return "".join((Path(__file__).parent / name).read_text() for name in ("primitives.cuh", *FILES))


@functools.lru_cache(maxsize=4096)
def _kernel(constants: tuple[tuple[str, int], ...], early: bool, device: int) -> driver.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    given = dict(constants) | {"EARLY": int(early)}
    code = nvrtc.compiled(source(), given, f"sm_{major}{minor}a", name="router.cu")
    return driver.load(code, "router", threads=32 * given["WARPS"], shared_bytes=given["SHARED_BYTES"], early=early)


def load_smallest(device: torch.device) -> None:
    """Compile and load a launch of 8 rows. Raises KernelNotCompiled."""
    with torch.cuda.device(device):
        x, weight = torch.zeros(1, 16).bfloat16(), torch.zeros(8, 16, dtype=torch.int8)
        constants = constants_of(x, weight, torch.zeros(8), None, norm=False, config=RouterConfig(8, 1, 1))
        _kernel(constants, False, torch.cuda.current_device())
