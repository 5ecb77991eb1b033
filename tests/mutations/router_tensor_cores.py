"""Mutations of the router on tensor cores: its CUDA source, which an emulator runs, its launcher and when it is chosen."""

from __future__ import annotations

from tests.mutations.mutation import Mutation as M

_TESTS = "tests/kernels/test_router_tensor_cores.py"
_FP64 = f"{_TESTS}::test_matches_fp64"

MUTATIONS = (
    M("tcr-values-before-the-wait", "x is read before the previous kernel is waited for.",
      "kernels/cuda/router.cu", "wait_for_previous_kernel();", "",
      _FP64),
    M("tcr-cluster-part", "A block of a cluster is left out of the sum.",
      "kernels/cuda/router.cu", "r = 0; SPLITS > 1 && r < SPLITS; r++) z +=", "r = 1; SPLITS > 1 && r < SPLITS; r++) z +=",
      _FP64),
    M("tcr-scale-of-the-first-row", "In 8 bits every row of a block has the first one's scale.",
      "kernels/cuda/router.cu", "(share.memory + AT_SCALES))[row];", "(share.memory + AT_SCALES))[0];",
      _FP64),
    M("tcr-columns-of-the-next-block", "Columns of the next block of a cluster are added twice.",
      "kernels/cuda/router_layout.cuh", "column < PART * UNIT && first + column < COLUMNS", "first + column < COLUMNS",
      _FP64),
    M("tcr-order-of-nibbles", "x is not in the order in which nibbles are unpacked.",
      "kernels/cuda/router_values.cuh", "BITS == 4 ? i / 2 + i % 2 * 4", "BITS == 4 ? i",
      _FP64),
    M("tcr-order-of-bytes", "x is not in the order in which bytes are unpacked.",
      "kernels/cuda/router_values.cuh", "BITS == 8 ? i / 4 * 4 + i % 4 / 2 + i % 2 * 2", "BITS == 8 ? i",
      _FP64),
    M("tcr-offset-of-gain", "Gemma's 1 + gain is the gain.",
      "kernels/cuda/router_values.cuh", "GAIN) + a.offset : 0.f", "GAIN) : 0.f",
      _FP64),
    M("tcr-stale-scales", "Scales behind the last are what was in memory.",
      "kernels/cuda/router_values.cuh", "PIECES = (TAKEN + EACH - 1) / EACH", "PIECES = (PART + EACH - 1) / EACH",
      _FP64),
    M("tcr-norm-behind-fp16", "In fp16 x is multiplied by its gain before it is divided by its norm.",
      "kernels/cuda/router_layout.cuh", "NORM && GAIN >= 0 && VALUE == 2", "false",
      f"{_TESTS}::test_small_and_large_values_with_a_norm_and_a_gain"),
    M("tcr-eps", "eps is left out.",
      "kernels/cuda/router_values.cuh", "(1.f / COLUMNS) + share.a.eps", "(1.f / COLUMNS)",
      f"{_TESTS}::test_eps_counts_where_the_input_is_small"),
    M("tcr-scale-of-the-first-unit", "Both units beside each other have the first one's scale.",
      "kernels/cuda/router_numbers.cuh", "unit_of(turn, half), SCALE);", "unit_of(turn, 0), SCALE);",
      _FP64),
    M("tcr-ring-not-filled", "A ring of weights is read once.",
      "kernels/cuda/router_numbers.cuh", "if (turn + i + AHEAD < TURNS) fetch(", "if (turn < 0) fetch(",
      _FP64),
    M("tcr-alignment", "Rows that begin anywhere are accepted.",
      "kernels/cuda/router_implementations.py", "problem.alignment % ALIGNMENT or ", "",
      f"{_TESTS}::test_a_view_that_begins_between_16_bytes_is_declined"),
    M("tcr-late", "A router behind a kernel of its graph does not start early.",
      "passes/lower_cuda_router.py", "early = starts_early(x, (weight, scale, gain))", "early = False",
      "tests/kernels/test_lower_triton.py::test_a_packed_router_on_tensor_cores_is_a_call_with_the_norm_in_it"),
)  # fmt: skip
