"""What a storage format is, the matrices stored in one, and the registry by which every other module finds them.

A format is recognised by the dtype of its values: the operations (``rana::masked_gemv`` ...) and the files of a plan carry the
values and the scale of a matrix and nothing else. So each dtype belongs to one format at most. A further format is one class
and one call of ``register_format``, also from outside of this package; formats that no kernel reads are computed by
``rana_fx.kernels.reference``, which dequantizes.
"""

from __future__ import annotations

import abc
import inspect
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from rana_fx.errors import BadOperand, InvalidOption, NonFinite

Span = tuple[int, int]  # start and stop
Registered = TypeVar("Registered", bound="Format")


class Format(abc.ABC):
    """How the numbers of a matrix are stored. An instance holds no data: methods take the ``Matrix``.

    Attributes:
        name: unique among registered formats.
        dtypes: of the values; no other registered format has one of them.
        expects: what ``BadOperand`` names: "torch.int8 (8 bits)".
        plain: whether values are the numbers themselves in a floating dtype: they are then trained, follow the model's dtype
            and are multiplied as they are. Anything else is never trained or cast.
        multiple: what the number of columns must be a multiple of to be packed.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    expects: str
    plain: bool = False
    multiple: int = 1

    @abc.abstractmethod
    def bits(self, dtype: torch.dtype) -> int:
        """Bits per number, scales not counted, given the dtype of the values."""

    @abc.abstractmethod
    def check(self, matrix: Matrix) -> None:
        """Raises BadOperand where the scale does not belong to the values, which have two dimensions."""

    @abc.abstractmethod
    def pack(self, weight: Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Matrix:
        """Round a floating matrix (rows, columns). Raises BadOperand, NonFinite."""

    @abc.abstractmethod
    def dequantize(self, matrix: Matrix, dtype: torch.dtype) -> Tensor:
        """The numbers that are stored, (rows, columns): exact up to rounding to ``dtype``."""

    @abc.abstractmethod
    def error_bound(self, matrix: Matrix) -> Tensor:
        """(rows, columns) fp32: how far a packed number may be from the one that ``pack`` was given."""

    def columns(self, stored: Any) -> Any:
        """Columns of a matrix whose values have ``stored`` columns, a number or a symbolic size."""
        return stored

    def unit(self, matrix: Matrix) -> int:  # noqa: ARG002
        """Columns between two places where a kernel can begin a part: whole words and whole groups of a scale."""
        return 1

    def divisible(self, matrix: Matrix, start: int, stop: int) -> bool:  # noqa: ARG002
        """Whether columns ``start`` to ``stop`` are a stored matrix themselves."""
        return True

    def spans(self, matrix: Matrix, start: int, stop: int) -> tuple[Span, Span | None]:  # noqa: ARG002
        """Of divisible columns: (columns of the values, columns of the scale; None: the scale as it is)."""
        return (start, stop), None


@dataclass(frozen=True, eq=False)
class Matrix:
    """A stored matrix. ``Matrix.of(values, scale)`` finds the format; ``Format.pack`` makes one from a weight.

    Attributes:
        values: two dimensions, a dtype of the format.
        scale: the scales that the format needs, rows first; None where it needs none.

    Raises:
        BadOperand: values and scale do not belong together.
    """

    values: Tensor
    scale: Tensor | None
    format: Format

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise BadOperand(name="weight", got=_shape(self.values), expected="two dimensions", todo="Pass one matrix.")
        self.format.check(self)

    @classmethod
    def of(cls, values: Tensor, scale: Tensor | None = None) -> Matrix:
        """The matrix that tensors from a plan or of an operation store. Raises BadOperand."""
        return cls(values, scale, format_of(values))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix, which values may hold several columns of in a number."""
        return self.values.shape[0], self.format.columns(self.values.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def bits(self) -> int:
        """Bits per number, scales not counted."""
        return self.format.bits(self.values.dtype)

    @property
    def bytes_per_row(self) -> float:
        """Bytes read with a row: its values and its share of the scale."""
        parts = [self.values] if self.scale is None else [self.values, self.scale]
        return sum(part.numel() * part.element_size() for part in parts) / self.values.shape[0]

    @property
    def flops_per_row(self) -> float:
        """Multiply-adds of a row."""
        return float(self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that are stored, (rows, columns)."""
        return self.format.dequantize(self, dtype)

    def narrow(self, dim: int, start: int, length: int) -> Matrix:
        """Some rows (``dim`` 0) or columns (1), as views. Raises BadOperand where the columns are not stored by themselves."""
        if dim == 0:
            scale = None if self.scale is None else self.scale.narrow(0, start, length)
            return replace(self, values=self.values.narrow(0, start, length), scale=scale)
        stop = start + length
        if not self.format.divisible(self, start, stop):
            expected = f"whole units of {self.format.unit(self)} columns ({self.format.name})"
            raise BadOperand(
                name="columns", got=f"{start} to {stop}", expected=expected, todo="Dequantize the matrix, then slice it."
            )
        own, scales = self.format.spans(self, start, stop)
        scale = self.scale
        if scale is not None and scales is not None:
            scale = scale.narrow(1, scales[0], scales[1] - scales[0])
        return replace(self, values=self.values.narrow(1, own[0], own[1] - own[0]), scale=scale)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Matrix:
        """In another dtype, which changes plain values alone, and on another device."""
        wanted = dtype if self.format.plain and dtype is not None else self.values.dtype
        scale = None if self.scale is None else self.scale.to(device=device)
        return replace(self, values=self.values.to(device=device, dtype=wanted), scale=scale)


_FORMATS: dict[str, Format] = {}


def register_format(format: Registered) -> Registered:
    """Register a format for adapters, plans and operations; returns it.

    Raises:
        InvalidOption: its name or a dtype of its values belongs to another format.
    """
    if format.name in _FORMATS:
        raise InvalidOption(name="format", got=format.name, expected="a name that no registered format has")
    for other in _FORMATS.values():
        for dtype in format.dtypes:
            if dtype in other.dtypes:
                expected = f"a dtype that no registered format has (this one belongs to {other.name})"
                raise InvalidOption(name="dtypes", got=str(dtype), expected=expected)
    _FORMATS[format.name] = format
    return format


def registered() -> tuple[Format, ...]:
    """All formats, in the order of their registration."""
    return tuple(_FORMATS.values())


def format_of(values: Tensor | torch.dtype) -> Format:
    """The format of values, or of their dtype. Raises BadOperand for a dtype that belongs to no registered format."""
    dtype = values.dtype if isinstance(values, Tensor) else values
    found = _found(dtype)
    if found is None:
        *most, last = (format.expects for format in _FORMATS.values())
        expected = f"{', '.join(most)} or {last}"
        todo = "Pack it with rana_fx.formats.pack, or register its format with rana_fx.formats.register_format."
        raise BadOperand(name="weight", got=str(dtype), expected=expected, todo=todo)
    return found


def is_plain(values: Tensor | torch.dtype) -> bool:
    """Whether values are numbers of a floating dtype with at least 16 bits. (float8 is not: it needs a scale, so a format.)"""
    found = _found(values.dtype if isinstance(values, Tensor) else values)
    return found is not None and found.plain


def sources() -> tuple[str, ...]:
    """Files in which registered formats are defined, for keys of compiled code."""
    found = {inspect.getsourcefile(type(format)) for format in _FORMATS.values()}
    return tuple(sorted(path for path in found if path is not None))


def floating_matrix(weight: Tensor) -> None:
    """Check the weight that is passed to ``pack``. Raises BadOperand, NonFinite."""
    if not weight.is_floating_point() or weight.dim() != 2:
        got = f"{_shape(weight)} {weight.dtype}"
        raise BadOperand(name="weight", got=got, expected="a floating matrix", todo="Pass the weight before packing.")
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise NonFinite(site="formats.pack", count=bad, what="weight", shape=_shape(weight))


def round_to_steps(weight: Tensor, limit: int, group: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to the nearest multiple of a step for each row and group of columns, the largest number being ``limit`` steps.

    Returns:
        (multiples in [-limit, limit], fp32, (rows, columns); steps in ``scale_dtype``, (rows, groups)). Rounding takes place
        against the step as it is stored.
    """
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).reshape(rows, -1, group)
    scale_RG = (padded.abs().amax(-1) / limit).to(scale_dtype)
    # an all-zero group, or one whose step vanishes in scale_dtype, is stored as zeros
    step = torch.where(scale_RG > 0, scale_RG, 1).float().unsqueeze(-1)
    return (padded / step).round().clamp(-limit, limit).reshape(rows, -1)[:, :columns], scale_RG


def half_a_step(steps: Tensor, limit: int, scale_dtype: torch.dtype) -> Tensor:
    """Error bound of ``round_to_steps``, given its steps broadcast in fp32.

    A number is at most half a step from its multiple, or is clipped where rounding to ``scale_dtype`` made the step smaller, by
    at most half an eps: the largest number, ``limit`` steps, is then off by as much of itself. Divisions and products in fp32
    round ``limit`` steps twice; a step that vanishes in ``scale_dtype`` loses numbers below the smallest normal number.
    """
    half = torch.finfo(scale_dtype).eps / 2
    share = max(0.5, limit * half / (1 - half)) + 2 * limit * torch.finfo(torch.float32).eps
    return steps.abs() * share + torch.finfo(torch.float32).tiny


def _found(dtype: torch.dtype) -> Format | None:
    return next((format for format in _FORMATS.values() if dtype in format.dtypes), None)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
