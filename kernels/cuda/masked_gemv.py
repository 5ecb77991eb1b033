"""Launches masked_gemv.cu: the masked GEMV of a weight in 4, 8 or 16 bits on tensor cores, in one launch.

Error: relative RMSE <= 4 * eps(dtype of v) * sqrt(log2 K + 1); fixed_point.cuh and products_floats.cuh say what is rounded. In 16
bits that are sums in fp32 and the result. Weights that are not finite count as in a dense product of the masked input where some
token of the launch keeps their rank, and nowhere else.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rana_fx.errors import BadOperand
from rana_fx.formats import bits_of, gated_unit, group_of, shape_of
from rana_fx.kernels.cuda import driver, nvrtc
from rana_fx.kernels.cuda.config import ALONE_BYTES, Config, columns_of, default_config
from rana_fx.kernels.gemv import ACTIVATION_CODES, check_operands
from rana_fx.kernels.triton.compaction import sm_count_of
from rana_fx.kernels.triton.config import MAX_TOKENS, TOKENS_AT_ONCE

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# in this order; primitives.cuh comes before them, or what defines its names elsewhere
FILES = (
    *("layout.cuh", "fixed_point.cuh", "listing.cuh", "rows.cuh"),
    *("products_floats.cuh", "products_integers.cuh", "masked_gemv.cu"),
)
_ALIGNMENT = 16  # bytes of a copy
_POINTERS = ("w", "scale", "v", "tau", "bias", "residual", "gain", "y")
_WEIGHT_STRIDES = ("w_row", "scale_row")
_STRIDES = ("v_token", "v_rank", "tau_rank", "bias_column", "residual_token", "residual_column", "gain_rank", "y_token")


@dataclass(frozen=True, eq=False)
class Norm:
    """v / sqrt(mean v^2 + eps) * (gain + offset), rounded once. gain: (K,), or None for ones."""

    gain: Tensor | None
    eps: float
    offset: float = 0.0


class Arguments(ctypes.Structure):
    """The struct of that name in layout.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in ("K", "N", "half")),
        *((name, ctypes.c_uint) for name in _WEIGHT_STRIDES),
        *((name, ctypes.c_longlong) for name in _STRIDES),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
    )


@functools.cache
def _parts_of(count: int) -> type[ctypes.Structure]:
    """The struct Parts of layout.cuh, for so many weights."""
    fields = (("of", Arguments * count), ("ends", ctypes.c_int * count))
    return type("Parts", (ctypes.Structure,), {"_fields_": fields})


def joined(arguments: Sequence[Arguments], ends: Sequence[int]) -> ctypes.Structure:
    """The kernel's parameter. ends: clusters of each weight, and of all before it."""
    count = len(arguments)
    return _parts_of(count)((Arguments * count)(*arguments), (ctypes.c_int * count)(*ends))


def refusal(v: Tensor, tau: Tensor, weight: Tensor, scale: Tensor | None, activation: str | None = None) -> str | None:
    """Why the kernel cannot multiply these, or None. May be called with fake tensors."""
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"multiplies bfloat16 and float16 activations, these are {v.dtype}"
    if weight.dtype != v.dtype and (weight.dtype not in (torch.int8, torch.uint8) or scale is None):
        return f"multiplies weights in 8 and 4 bits and in {v.dtype}, as the activations, this is {weight.dtype}"
    tokens = v.numel() // max(v.shape[-1], 1)
    if not 1 <= tokens <= MAX_TOKENS:
        return f"{tokens} tokens, it takes 1 to {MAX_TOKENS}"
    columns = shape_of(weight, scale)[1]
    size = weight.element_size()
    apart, *places = weight.stride(0) * size, weight.storage_offset() * size, weight.shape[1] * size
    if weight.stride(1) != 1 or any(place % _ALIGNMENT for place in (apart, *places)):
        return f"copies {_ALIGNMENT} bytes at once, of which rows of {columns} columns, {apart} bytes apart, are not made"
    if weight.dtype == torch.uint8 and scale is not None and (scale.stride(1) != 1 or scale_unit(weight, scale, activation) < 4):
        return f"copies scales by 4 bytes or more: rows of {scale.shape[1]} in {scale.dtype} do not begin at such"
    read = [tau.dtype, *([] if scale is None else [scale.dtype])]
    if not DTYPE_CODES.keys() >= set(read):
        return f"reads thresholds and scales in {', '.join(map(str, DTYPE_CODES))}, these are {' and '.join(map(str, read))}"
    return None


@dataclass(frozen=True, eq=False)
class Launch:
    """A checked launch. constants: that masked_gemv.cu is compiled with. y: its result, not yet computed, (T, N) or (T, N / 2).

    kept: what the arguments point to.
    """

    constants: tuple[tuple[str, int], ...]
    arguments: ctypes.Structure
    blocks: int
    y: Tensor
    kept: tuple[Tensor | None, ...]

    def __call__(self, *, early: bool) -> Tensor:
        """y, once the current stream of its device has come to the launch. Raises KernelNotCompiled."""
        _kernel(self.constants, early, self.y.device.index)(self.blocks, self.arguments)
        return self.y


def masked_gemv(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, *,
    residual: Tensor | None = None, activation: str | None = None, norm: Norm | None = None, config: Config | None = None,
    early: bool = False,
) -> Tensor:  # fmt: skip
    """The masked GEMV in v's dtype, in one launch.

    Args:
        v: (..., K) bf16 or fp16, T <= 16 rows in all. tau: (K,). weight, scale: as rana_fx.formats stores them, K rows.
        bias: (N,). residual: (..., N), added in fp32, last; not together with an activation.
        activation: "silu", "gelu_tanh", "gelu" or "relu": the result is act(first half) * second half of the N columns, in fp32
            until it is rounded once. A half is whole groups and multiples of 16 bytes then.
        norm: v is normalised first; at most 4 tokens.
        config: the default one if None.
        early: thresholds are read before the previous kernel of the stream ends; nothing but v and the residual may be written
            by it.

    Returns:
        (..., N), or (..., N / 2) with an activation.

    Raises:
        BadOperand, UnknownChoice, KernelNotCompiled.
    """
    if config is None:
        tokens, columns = v.numel() // max(v.shape[-1], 1), shape_of(weight, scale)[1]
        config = default_config(v.shape[-1], columns, tokens, bits=bits_of(weight), gated=activation is not None)
    with torch.cuda.device_of(v):
        launch = prepared(v, tau, weight, bias, scale, residual=residual, activation=activation, norm=norm, config=config)
        y = launch(early=bool(early))
    return y.reshape(*v.shape[:-1], y.shape[1])


def prepared(
    v: Tensor, tau: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *,
    residual: Tensor | None, activation: str | None, config: Config, norm: Norm | None = None,
) -> Launch:  # fmt: skip
    """The launch of ``masked_gemv``. Raises BadOperand, UnknownChoice."""
    reason = refusal(v, tau, weight, scale, activation)
    if reason is not None:
        todo = "Use the Triton kernel."
        raise BadOperand(name="weight", got="not for this kernel", expected=f"another: it {reason}", todo=todo)
    bits, columns = bits_of(weight), shape_of(weight, scale)[1]
    unit = math.lcm(_ALIGNMENT * 8 // bits, gated_unit(weight, scale) // 2)
    if activation in ACTIVATION_CODES and columns % (2 * unit):
        todo, expected = "Apply the activation apart.", f"two halves that are multiples of {unit}"
        raise BadOperand(name="weight", got=f"{columns} columns", expected=expected, todo=todo)
    rows, columns = check_operands(v, tau, weight, bias, scale, residual, activation)
    if norm is not None:
        norm = _checked(norm, rows, v.shape[-1])
    outputs = columns // 2 if activation else columns
    # memory that is shared with a file begins anywhere
    weight = weight.clone() if weight.data_ptr() % _ALIGNMENT else weight
    scale = scale.clone() if scale is not None and scale.data_ptr() % _ALIGNMENT else scale
    flat, added = v.reshape(rows, -1), None if residual is None else residual.reshape(rows, -1)
    y = torch.empty((rows, outputs), dtype=v.dtype, device=v.device)
    kept = (flat, tau, weight, scale, bias, added, None if norm is None else norm.gain)
    blocks = config.blocks(outputs, bits, gated=activation is not None)
    constants = constants_of(*kept[:6], activation, config, norm=norm, alone=config.alone(blocks, sm_count_of(v)))
    return Launch(constants, joined([arguments_of(*kept[:6], y, norm)], [blocks // config.splits]), blocks, y, kept)


def _checked(norm: Norm, tokens: int, ranks: int) -> Norm:
    """A norm with a gain in a dtype that the kernel reads. Raises BadOperand."""
    if tokens > TOKENS_AT_ONCE:
        expected = f"1 to {TOKENS_AT_ONCE}, of which each block reads all values"
        raise BadOperand(name="v", got=f"{tokens} tokens", expected=expected, todo="Apply the norm apart.")
    gain = norm.gain
    if gain is not None and tuple(gain.shape) != (ranks,):
        raise BadOperand(name="gain", got=str(tuple(gain.shape)), expected=f"({ranks},)", todo="One per rank.")
    return norm if gain is None or gain.dtype in DTYPE_CODES else dataclasses.replace(norm, gain=gain.float())


def constants_of(
    v: Tensor, tau: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    activation: str | None, config: Config, *, norm: Norm | None = None, alone: bool = False, weights: int = 1,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    """The constants that masked_gemv.cu is compiled with. v (T, K). alone: a multiprocessor for each block. weights: of a launch,
    alike but for their columns.
    """
    tokens, ranks, bits = *v.shape, bits_of(weight)
    group, unit = columns_of(bits), 4
    if bits == 4 and scale is not None:
        group, unit = group_of(weight, scale), scale_unit(weight, scale, activation)
    scale_bytes = 0 if scale is None else scale.element_size()
    constants = {
        "BITS": bits,
        "WEIGHTS": weights,
        "TOKENS": tokens,
        "GROUP": group,
        "SEGMENTS": config.segments,
        "WARPS": config.warps,
        "SPLITS": config.splits,
        "STAGES": config.stages,
        "LISTED": config.listed(ranks),
        "INTEGERS": int(config.integers(ranks, tokens, bits, group, scale_bytes)),
        "VALUE": DTYPE_CODES[v.dtype],
        "SCALE": -1 if scale is None else DTYPE_CODES[scale.dtype],
        "THRESHOLD": DTYPE_CODES[tau.dtype],
        "BIAS": -1 if bias is None else DTYPE_CODES[bias.dtype],
        "RESIDUAL": -1 if residual is None else DTYPE_CODES[residual.dtype],
        "ACTIVATION": ACTIVATION_CODES[activation] if activation else 0,
        "NORM": int(norm is not None),
        "GAIN": -1 if norm is None or norm.gain is None else DTYPE_CODES[norm.gain.dtype],
        "WIDE": int(norm is not None and _wide(v)),
        "SCALE_UNIT": unit,
        "SHARED_BYTES": max(config.shared_bytes(ranks, tokens, bits, group, scale_bytes), ALONE_BYTES if alone else 0),
    }
    return tuple(constants.items())


def _wide(v: Tensor) -> bool:
    """Whether eight neighbours of a token, from a multiple of eight on, are 16 aligned bytes."""
    return v.stride(1) == 1 and not any(place % _ALIGNMENT for place in (v.data_ptr(), v.stride(0) * v.element_size()))


def scale_unit(weight: Tensor, scale: Tensor, activation: str | None) -> int:
    """Bytes of the scales of a rank in 4 bits that can be copied at once, at most those of a segment: 16, 8, 4 or less."""
    size, group = scale.element_size(), group_of(weight, scale)
    starts = [columns_of(4) // group * size, scale.stride(0) * size, scale.storage_offset() * size]
    starts += [shape_of(weight, scale)[1] // 2 // group * size] if activation else []
    return math.gcd(16, *starts)


def arguments_of(
    v: Tensor, tau: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, y: Tensor,
    norm: Norm | None = None,
) -> Arguments:  # fmt: skip
    """The kernel's arguments for one weight. v (T, K), residual and y (T, N)."""
    columns = shape_of(weight, scale)[1]
    norm = norm or Norm(None, 0.0, 0.0)
    tensors = (weight, scale, v, tau, bias, residual, norm.gain, y)
    strides = (
        *(weight.stride(0) * weight.element_size(), 0 if scale is None else scale.stride(0), *v.stride(), tau.stride(0)),
        *(0 if bias is None else bias.stride(0), *((0, 0) if residual is None else residual.stride())),
        *(0 if norm.gain is None else norm.gain.stride(0), y.stride(0)),
    )
    half = y.shape[1]
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return Arguments(*pointers, v.shape[1], columns, half, *strides, norm.eps, norm.offset)


@functools.cache
def source() -> str:
    """The kernel's text, with the instructions of a GPU in front."""
    return "".join((Path(__file__).parent / name).read_text() for name in ("primitives.cuh", *FILES))


@functools.lru_cache(maxsize=4096)
def _kernel(constants: tuple[tuple[str, int], ...], early: bool, device: int) -> driver.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    given = dict(constants) | {"EARLY": int(early)}
    code = nvrtc.compiled(source(), given, f"sm_{major}{minor}a")
    threads = 32 * given["SEGMENTS"] * given["WARPS"]
    return driver.load(code, "masked_gemv", threads=threads, shared_bytes=given["SHARED_BYTES"], early=early)


def load_smallest(device: torch.device) -> None:
    """Compile and load a launch of 16 ranks. Raises KernelNotCompiled."""
    with torch.cuda.device(device):
        v, weight, scale = torch.zeros(1, 16), torch.zeros(16, 128, dtype=torch.int8), torch.zeros(16)
        constants = constants_of(v.bfloat16(), scale, weight, scale, None, None, None, Config(1, 1, 1, 2))
        _kernel(constants, False, torch.cuda.current_device())
