"""One adapter: what replaces one linear, or several stacked over one input.

Every kind is the same computation, y = c + sum over kept k of v_k Wt[k, :], kept where v_k^2 >= tau_k:

    rank     v = B x, tau = t (one value), Wt = A^T         static   the same with tau = 0 and fewer ranks
    neuron   v = x, tau_k = t^2 / |W_:,k|^2, Wt = W^T       gated    v = h, where act(gate)_k^2 >= tau_k (CATS)
    stored   v = x, tau = 0, Wt = W^T in fewer bits: every input is kept, weights are only stored in less memory

A neuron adapter multiplies by the model's own weight, or by a Wt of its own, which may be in fewer bits and stack several sites.
Matrices are in any registered storage format, with scales beside them (``rana_fx.formats``). A router may itself be masked
by its input (hybrid): it is then stored input-major, so that a dropped input skips one contiguous row, and

    z = masked_gemv(x, router_tau, router, None, router_scale, router_density)

With ``shift``, v = z - shift (or x - shift) is masked and multiplied, and c includes the product with the shift, W mu.

A rank or static adapter of one linear may have exact outputs. In front of an activation that is near zero for negative inputs
(GELU, SiLU, ReLU) only large outputs matter: those are computed again from the model's own W and b, reading only their rows of W,

    y_j = (W x + b)_j   where y_j >= exact_tau_j
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rana_fx.cost import Cost, Kept
from rana_fx.errors import BadOperand
from rana_fx.formats import Matrix, is_plain

Kind = Literal["rank", "static", "neuron", "gated", "stored"]

MATRICES = ("router", "weight")
TENSORS = ("tau", "router", "router_scale", "router_tau", "weight", "weight_scale", "bias", "shift", "exact_tau")


@dataclass(frozen=True, eq=False)
class Mask:
    """Thresholds, fp32, and the expected number of masked values per token that reach theirs.

    Compared with the thresholds: v^2 (ranks), x^2 (a router's inputs) or y (exact outputs).
    """

    threshold: Tensor
    expected: float


@dataclass(frozen=True, eq=False, repr=False)
class Adapter:
    """Adapter of ``sites`` (stacked in this order).

    Invariants, checked at construction: a router needs a weight; "rank" and "static" have a router, the others have none;
    "stored" has a weight, "gated" has neither weight nor shift; quantised matrices have scales, no other tensor does;
    ``router_tau`` and ``router_kept`` come together; a shift needs a bias, which includes the product with the shift;
    ``exact_tau`` and ``exact_kept`` come together, too, and only where a "rank" or "static" adapter has one site and no shift.

    Args:
        ranks: rows of Wt: ranks of a router, inputs where there is none.
        router: B, (ranks, in), or (in, ranks) with ``router_tau``; None when v = x.
        weight: Wt, (ranks, out), or None for the model's own W^T.
        tau: thresholds on v^2, fp32, (ranks,). For ``gated``: on act(gate)^2, (ranks,) or one for all, (1,).
        bias: c, (out,), or None. Replaces the linears' own biases where the adapter has a weight or this is given.
        kept: expected number of kept ranks per token, over the calibration tokens.
        flops: expected multiply-adds per token, router included. dense_flops: of the layers replaced.
        bytes: expected weight bytes read per token, scales included. dense_bytes: of the layers replaced.
        error: relative squared output error over the calibration tokens, where it was measured.
        also: a further site whose cost the adapter changes (``gated``: the up projection whose rows are skipped).
        router_scale, weight_scale: of a router or weight whose format has a scale, as ``formats.pack`` gives them.
        router_tau: thresholds on x^2, fp32, (in,), in front of the router. router_kept: expected number of inputs it keeps.
        shift: (ranks,), subtracted from v before the mask, in the model's dtype.
        exact_tau: thresholds on y, c included, fp32, (out,): an output that reaches its threshold is the model's own. Infinity:
            never, minus infinity: always. exact_kept: expected number of such outputs per token.
    """

    name: str
    kind: Kind
    sites: tuple[str, ...]
    ranks: int
    kept: float
    tau: Tensor
    router: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    flops: float = 0.0
    dense_flops: float = 0.0
    bytes: float = 0.0
    dense_bytes: float = 0.0
    error: float | None = None
    gate: str | None = None
    also: tuple[str, ...] = ()
    router_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    router_tau: Tensor | None = None
    router_kept: float | None = None
    shift: Tensor | None = None
    exact_tau: Tensor | None = None
    exact_kept: float | None = None

    def __post_init__(self) -> None:
        assert self.sites and self.ranks > 0 and 0 <= self.kept <= self.ranks, self.name
        assert (self.router is not None) == (self.kind in ("rank", "static")), f"{self.name}: a {self.kind} adapter's router"
        assert self.router is None or self.weight is not None, f"{self.name}: a router needs a weight"
        assert self.weight is not None or self.kind != "stored", f"{self.name}: a stored adapter has a weight"
        plain = self.weight is None and self.shift is None
        assert plain or self.kind != "gated", f"{self.name}: a gated adapter multiplies by the model's own weight"
        assert self.shift is None or self.bias is not None, f"{self.name}: a shift needs a bias"
        assert (self.router_tau is None) == (self.router_kept is None), f"{self.name}: router_tau and router_kept come together"
        assert self.router_tau is None or self.router is not None, f"{self.name}: router_tau without a router"
        alike = self.kind == "gated" and tuple(self.tau.shape) == (1,)
        _check_vector(self, "tau", 1 if alike else self.ranks, torch.float32)
        weight, router = self.matrix("weight"), self.matrix("router")
        if weight is not None:
            rows, columns = weight.shape
            _check(self, "weight", str((rows, columns)), rows == self.ranks, f"{self.ranks} rows, one per rank")
            _check_vector(self, "bias", columns)
        else:
            if self.bias is not None:
                _check_vector(self, "bias", self.bias.numel())
            _check(self, "weight_scale", "a scale", self.weight_scale is None, "None: there is no weight")
        if router is not None:
            shape = router.shape
            ranks = shape[0 if self.router_tau is None else 1]
            where = "rows" if self.router_tau is None else "columns, input-major since router_tau masks inputs"
            _check(self, "router", str(shape), ranks == self.ranks, f"{self.ranks} {where}")
            _check_vector(self, "router_tau", shape[0], torch.float32)
            assert self.router_kept is None or 0 <= self.router_kept <= shape[0], f"{self.name}: router_kept"
        else:
            _check(self, "router_scale", "a scale", self.router_scale is None, "None: there is no router")
        _check_vector(self, "shift", self.ranks)
        self._check_exact()

    def _check_exact(self) -> None:
        assert (self.exact_tau is None) == (self.exact_kept is None), f"{self.name}: exact_tau and exact_kept come together"
        if self.exact_kept is None:
            return
        assert self.kind in ("rank", "static"), f"{self.name}: a {self.kind} adapter has no outputs to make exact"
        assert len(self.sites) == 1, f"{self.name}: exact outputs are those of one linear"
        assert self.shift is None, f"{self.name}: exact outputs beside a shift"
        assert self.out is not None
        _check_vector(self, "exact_tau", self.out, torch.float32)
        assert 0 <= self.exact_kept <= self.out, f"{self.name}: exact_kept"

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {self.kind}, {self.kept:.1f} of {self.ranks} kept)"

    def matrix(self, key: str) -> Matrix | None:
        """The stored matrix "router" or "weight", if any. Raises BadOperand, which names the adapter and the tensor."""
        values = getattr(self, key)
        if values is None:
            return None
        try:
            return Matrix.of(values, getattr(self, f"{key}_scale"))
        except BadOperand as error:
            name = f"{key}_scale" if error.facts["name"] == "scale" else key
            raise BadOperand(**error.facts | {"name": f"{self.name}: {name}"}) from None

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices of the adapter, by "router" and "weight"."""
        found = {key: self.matrix(key) for key in MATRICES}
        return {key: matrix for key, matrix in found.items() if matrix is not None}

    @property
    def mask(self) -> Mask:
        """The mask of ranks: v^2 >= threshold. ``gated``: act(gate)^2 >= threshold."""
        return Mask(self.tau, self.kept)

    @property
    def router_mask(self) -> Mask | None:
        """The mask of the inputs that a router reads: x^2 >= threshold."""
        return None if self.router_tau is None or self.router_kept is None else Mask(self.router_tau, self.router_kept)

    @property
    def exact_mask(self) -> Mask | None:
        """The mask of the outputs that are computed from the model's own weight: y >= threshold."""
        return None if self.exact_tau is None or self.exact_kept is None else Mask(self.exact_tau, self.exact_kept)

    @property
    def expected(self) -> Kept:
        """Expected kept values per token; None for a mask that the adapter does not have."""
        return Kept(self.kept, self.router_kept, self.exact_kept)

    def with_kept(self, kept: Kept) -> Adapter:
        """A copy with other expected numbers of kept values, for the masks it has, and its costs computed from them."""
        kept = kept.otherwise(self.expected)
        changed = replace(
            self,
            kept=self.kept if kept.ranks is None else kept.ranks,
            router_kept=None if self.router_tau is None else kept.inputs,
            exact_kept=None if self.exact_tau is None else kept.outputs,
        )
        cost = changed._counted(kept)
        return replace(changed, flops=cost.flops, bytes=cost.bytes)

    @property
    def density(self) -> float:
        """Expected fraction of ranks kept."""
        return self.kept / self.ranks

    @property
    def width(self) -> int:
        """Number of inputs of the linears it replaces."""
        router = self.matrix("router")
        return self.ranks if router is None else router.shape[1 if self.router_tau is None else 0]

    @property
    def out(self) -> int | None:
        """Number of outputs of the linears it replaces, stacked; None where neither its weight nor its bias determines it."""
        weight = self.matrix("weight")
        if weight is not None:
            return weight.shape[1]
        return None if self.bias is None else len(self.bias)

    @property
    def router_density(self) -> float:
        """Expected fraction of inputs the router reads: 1 where nothing masks them."""
        return 1.0 if self.router_kept is None else self.router_kept / self.width

    @property
    def exact_density(self) -> float:
        """Expected fraction of outputs that are computed from the model's own weight: 0 where none can be."""
        return 0.0 if self.exact_kept is None or self.out is None else self.exact_kept / self.out

    @property
    def reads_model(self) -> bool:
        """Whether it multiplies by the model's own weight, or by rows of it: that weight cannot be freed."""
        return self.weight is None or self.exact_tau is not None

    def bits(self) -> dict[str, int]:
        """Bits per number of each matrix of the adapter: ``{"router": 8, "weight": 16}``."""
        return {key: matrix.bits for key, matrix in self.matrices.items()}

    @property
    def expected_cost(self) -> Cost:
        """Expected cost per token: the fields ``flops`` and ``bytes``."""
        return Cost(self.flops, self.bytes)

    @property
    def dense_cost(self) -> Cost:
        """Dense cost per token of the layers it replaces."""
        return Cost(self.dense_flops, self.dense_bytes)

    @overload
    def cost(
        self, metric: str, kept: float | None = None, router_kept: float | None = None, exact_kept: float | None = None
    ) -> float: ...

    @overload
    def cost(self, metric: None = None, kept: Kept | None = None) -> Cost: ...

    @overload
    def cost(self, metric: Kept) -> Cost: ...

    def cost(
        self,
        metric: str | Kept | None = None,
        kept: float | Kept | None = None,
        router_kept: float | None = None,
        exact_kept: float | None = None,
    ) -> Cost | float:
        """Cost per token: ``adapter.cost(Kept(...))``; in one metric ``adapter.cost("bytes", kept, router_kept, exact_kept)``.

        Where nothing is given as kept, ``expected_cost``. Otherwise computed from the stored matrices: the router's rows that are
        read, a row of the weight, scales included, for each kept rank, and the model's own rows of outputs computed exactly. A
        mean that is None is replaced by the expected one.

        Raises:
            UnknownMetric.
        """
        if isinstance(metric, Kept):
            metric, kept = None, metric
        if not isinstance(kept, Kept):
            kept = Kept(kept, router_kept, exact_kept)
        found = self.expected_cost if kept == Kept() else self._counted(kept)
        return found if metric is None else found[metric]

    def _counted(self, kept: Kept) -> Cost:
        kept = kept.otherwise(self.expected)
        weight = self.matrix("weight")
        assert kept.ranks is not None
        if weight is None:
            return self.dense_cost * kept.ranks / self.ranks
        own = Cost()
        if self.exact_kept is not None and kept.outputs is not None:
            own = self.dense_cost * kept.outputs / weight.shape[1]
        return self.fixed_cost(kept.inputs) + self._uses(weight) * kept.ranks * _row(weight) + own

    def fixed_cost(self, inputs: float | None = None) -> Cost:
        """The cost that does not depend on ``tau``: of the router, which reads ``inputs`` inputs (None: as many as expected)."""
        router, weight = self.matrix("router"), self.matrix("weight")
        if router is None or weight is None:
            return Cost()
        rows: float = self.ranks
        if self.router_kept is not None:
            rows = self.router_kept if inputs is None else inputs
        return self._uses(weight) * rows * _row(router)

    def costed(self) -> Adapter:
        """A copy with ``flops`` and ``bytes`` computed from its tensors and its expected kept values."""
        assert self.dense_flops > 0 and self.dense_bytes > 0, f"{self.name}: the dense costs come first"
        return self.with_kept(self.expected)

    def _uses(self, weight: Matrix) -> float:
        """How many times each token is multiplied by the weight."""
        return self.dense_flops / (self.width * weight.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter, by field name."""
        named = {key: getattr(self, key) for key in TENSORS}
        return {key: value for key, value in named.items() if value is not None}

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors that are trained and follow the model's dtype: not thresholds, scales and quantised matrices."""
        given = self.tensors()
        return tuple(key for key in ("router", "weight", "bias", "shift") if key in given and is_plain(given[key]))

    def to(self, dtype: torch.dtype) -> Adapter:
        """A copy with factors in the model's dtype. Thresholds stay fp32; quantised matrices and their scales are not cast."""
        changed: dict[str, Any] = {key: getattr(self, key).contiguous() for key in MATRICES if getattr(self, key) is not None}
        changed |= {key: (changed.get(key, getattr(self, key))).to(dtype) for key in self.trained}
        return replace(self, **changed)

    def on(self, device: torch.device | str) -> Adapter:
        """A copy on another device."""
        moved: dict[str, Any] = {key: value.to(device) for key, value in self.tensors().items()}
        return replace(self, **moved)


def _row(matrix: Matrix) -> Cost:
    """Cost of reading one row of a stored matrix, scales included."""
    return Cost(matrix.flops_per_row, matrix.bytes_per_row)


def _check_vector(adapter: Adapter, key: str, length: int, dtype: torch.dtype | None = None) -> None:
    value: Tensor | None = getattr(adapter, key)
    if value is not None:
        fits = tuple(value.shape) == (length,) and (is_plain(value) if dtype is None else value.dtype == dtype)
        _check(adapter, key, f"{tuple(value.shape)} {value.dtype}", fits, f"({length},) {dtype or 'floating'}")


def _check(adapter: Adapter, key: str, got: str, right: bool, expected: str) -> None:
    if not right:
        todo = "Stack the sites in the adapter's order, and pass what formats.pack returned."
        raise BadOperand(name=f"{adapter.name}: {key}", got=got, expected=expected, todo=todo)
