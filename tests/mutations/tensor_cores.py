"""Mutations of the masked GEMV on tensor cores: its CUDA source, which an emulator runs, its launcher and when it is chosen."""

from __future__ import annotations

from tests.mutations.mutation import Mutation as M

_TESTS = "tests/kernels/test_tensor_cores.py"
_FP64 = f"{_TESTS}::test_matches_fp64"

MUTATIONS = (
    M("tc-mask-strict", "A value at its threshold is dropped.",
      "kernels/cuda/listing.cuh", "!(f * f < tau[i])", "!(f * f <= tau[i])",
      f"{_TESTS}::test_a_value_at_its_threshold_is_kept"),
    M("tc-early-list-of-some", "Ranks that a threshold drops are multiplied before it is known.",
      "kernels/cuda/listing.cuh", "if (ballot(!all)) count = -LISTED;", "",
      f"{_TESTS}::test_an_early_launch_reads_no_value_before_it_waits"),
    M("tc-values-before-the-wait", "Values are read before the previous kernel is waited for.",
      "kernels/cuda/listing.cuh", "wait_for_previous_kernel();", "",
      f"{_TESTS}::test_an_early_launch_reads_no_value_before_it_waits"),
    M("tc-values-of-one-token", "All tokens have the last one's values.",
      "kernels/cuda/listing.cuh", "values[t * VALUE_STRIDE + place] = x;", "values[place] = x;",
      _FP64),
    M("tc-ring-too-short", "A piece of rows is overwritten before it is multiplied.",
      "kernels/cuda/rows.cuh", "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();",
      _FP64),
    M("tc-digit-sign", "A digit of factors is taken as unsigned.",
      "kernels/cuda/fixed_point.cuh", "+ 0x00808080u) ^ 0x00808080u;", "+ 0x00808080u) ^ 0x00008080u;",
      _FP64),
    M("tc-digit-lost", "The lowest digit is left out.",
      "kernels/cuda/fixed_point.cuh", "((float)digit[2] * 65536.f + ((float)digit[1] * 256.f + (float)digit[0]));",
      "((float)digit[2] * 65536.f);",
      f"{_TESTS}::test_outliers_leave_the_other_factors"),
    M("tc-odd-values", "Values that are not finite are multiplied as integers.",
      "kernels/cuda/fixed_point.cuh", "if (exponent >= 255 || exponent < 40) return {0.f, 0.f, true};", "",
      f"{_TESTS}::test_what_is_not_finite_is_so_where_it_is_in_the_dense_product"),
    M("tc-cluster-part", "A block of a cluster is left out of the sum.",
      "kernels/cuda/masked_gemv.cu", "for (int r = 0; r < SPLITS; r++) sum +=", "for (int r = 0; r < SPLITS - 1; r++) sum +=",
      _FP64),
    M("tc-bias-of-first-half", "The second half of a gated product has the first one's bias.",
      "kernels/cuda/masked_gemv.cu", "(column + part * a.half) * a.bias_column", "column * a.bias_column",
      f"{_TESTS}::test_the_activation_of_one_half_times_the_other"),
    M("tc-residual-of-first-token", "Every token has the first one's residual.",
      "kernels/cuda/masked_gemv.cu", "token * a.residual_token + column", "column",
      f"{_TESTS}::test_a_residual_is_added_in_fp32"),
    M("tc-alignment", "Rows that begin anywhere are accepted.",
      "kernels/cuda/implementations.py", "problem.alignment % ALIGNMENT or ", "",
      f"{_TESTS}::test_a_view_that_begins_between_16_bytes_is_declined"),
    M("tc-stale-code", "Compiled code of other constants is used.",
      "kernels/cuda/nvrtc.py", "repr((text, options, _version(nvrtc)))", "repr((source, options, _version(nvrtc)))",
      f"{_TESTS}::test_code_is_compiled_once"),
)  # fmt: skip
