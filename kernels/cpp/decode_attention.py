"""``decode_attention`` on a CPU: a C++ template for Inductor that reads each head of a cache once, only where a token attends.

    y[b, h, t, :] = sum over s of p[s] * v[b, g, s, :]      p = softmax over s of (scale * q[b, h, t, :] . k[b, g, s, :] + mask)

The R = H / G query heads of a head of keys are, with all tokens, M rows that share its loads. Positions are taken in blocks of
64: a block that the mask excludes for all rows is neither read nor computed, and rows of the others are summed up by an online
softmax. A span of blocks of one head is a unit of work and yields, for each row, a maximum, a sum of weights and a sum of
weighted values. Threads take units in turn, since those that read anything are neighbours, and then reduce a row's spans in
their order. Spans depend on sizes alone: two runs are equal to the bit, on any number of threads.

Error: fp32 accumulation; keys and values in bf16 and fp16 are converted in registers. The result is fp32, and the cast to q's
dtype is fused into the template. NaN and infinities of a block that is read come out as in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP

from rana_fx.kernels.cpp.template import RowsTemplate

BLOCK = 64  # positions that are skipped or read together
_UNITS = 256  # of work, about: enough for many threads, and a bound on the memory for their results

_OPEN = r"""
  // rana_decode_attention
  constexpr int64_t B = {{batch}}, G = {{groups}}, R = {{repeats}}, TOKENS = {{tokens}}, S = {{positions}};
  constexpr int64_t D = {{channels}}, E = {{values}}, M = R * TOKENS, BLOCK = {{block}}, SPAN = {{span}};
  constexpr int64_t SPANS = (S + SPAN - 1) / SPAN, DP = (D + VL - 1) / VL * VL, EP = (E + VL - 1) / VL * VL;
  constexpr int64_t UNIT = M * (EP + 2);
  constexpr int KEYS = VL >= 16 || {{rows}} <= 3 ? 4 : 2;  // side by side; with {{rows}} rows in half of the registers or more
  constexpr float LOWEST = -std::numeric_limits<float>::infinity();
  const auto units = floats(SPANS * B * G * UNIT);
  auto larger = [](float a, float b) { return b > a || b != b ? b : a; };  // NaN is the largest
  #pragma omp parallel num_threads({{threads}})
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    const auto query = floats(M * DP), weight = floats(M * BLOCK), added = floats({{mask_rows}} * BLOCK);
    auto unit = [&](int64_t index) {
      const int64_t g = index % G, b = index / G % B, begin = index / (G * B) * SPAN, end = std::min(S, begin + SPAN);
      float* const maximum = units.get() + index * UNIT;
      float* const sum = maximum + M;
      float* const value = sum + M;
      std::fill_n(maximum, M, LOWEST);
      bool begun = false;
      for (int64_t first = begin; first < end; first += BLOCK) {
        const int64_t width = std::min(BLOCK, end - first);
"""

# M rows of the mask, or those of the tokens where heads share them
_MASK = r"""
        bool any = false;
        for (int64_t m = 0; m < {{mask_rows}}; m++) {
          [[maybe_unused]] const int64_t h = g * R + m / TOKENS, t = m % TOKENS;
          const {{mask_type}}* const row = Mask + {{mask_index}} + first * {{mask_step}}L;
          {%- if listed %}
          any |= std::memchr(row, 1, width) != nullptr;
          {%- else %}
          for (int64_t c = 0; c < width; c++) any |= {{attends}};
          {%- endif %}
        }
        if (!any) continue;
        for (int64_t m = 0; m < {{mask_rows}}; m++) {
          [[maybe_unused]] const int64_t h = g * R + m / TOKENS, t = m % TOKENS;
          const {{mask_type}}* const row = Mask + {{mask_index}} + first * {{mask_step}}L;
          float* const to = added.get() + m * BLOCK;
          for (int64_t c = 0; c < width; c++) to[c] = {{addend}};
        }
"""

_SCORES = r"""
        if (!begun) {
          begun = true;
          std::fill_n(sum, M * (EP + 1), 0.0f);
          for (int64_t m = 0; m < M; m++) {
            const int64_t h = g * R + m / TOKENS, t = m % TOKENS;
            const auto* const row = Q + {{q_index}};
            float* const to = query.get() + m * DP;
            {%- if q_step == 1 %}
            for (int64_t d = 0; d + VL <= D; d += VL) (load(row + d, VL) * Vec({{scale}})).store(to + d);
            constexpr int64_t REST = D / VL * VL;
            {%- else %}
            constexpr int64_t REST = 0;
            {%- endif %}
            for (int64_t d = REST; d < D; d++) to[d] = {{scale}} * static_cast<float>(row[d * {{q_step}}L]);
            std::fill_n(to + D, DP - D, 0.0f);
          }
        }
        const {{key_type}}* const keys = K + {{k_index}};
        const {{key_type}}* const values = V + {{v_index}};
        constexpr int64_t LINE = 64 / sizeof({{key_type}});  // of a cache
        auto score = [&](auto rows, auto several, int64_t m, int64_t c) {
          constexpr int N_ROWS = decltype(rows)::value, N_KEYS = decltype(several)::value;
          Vec dot[N_ROWS][N_KEYS];
          for (auto& row : dot) for (auto& x : row) x = Vec(0.0f);
          auto step = [&](int64_t d, int64_t n) {
            Vec q[N_ROWS];
            for (int i = 0; i < N_ROWS; i++) q[i] = Vec::loadu(query.get() + (m + i) * DP + d);
            for (int j = 0; j < N_KEYS; j++) {
              const Vec k = load(keys + (c + j) * {{k_step}}L + d, n);
              for (int i = 0; i < N_ROWS; i++) dot[i][j] = at::vec::fmadd(k, q[i], dot[i][j]);
            }
          };
          if (m == 0)  // meanwhile, values come from memory
            for (int j = 0; j < N_KEYS; j++)
              for (int64_t e = 0; e < E; e += LINE) prefetch(values + (c + j) * {{v_step}}L + e);
          int64_t d = 0;
          for (; d + VL <= D; d += VL) step(d, VL);
          if (d < D) step(d, D - d);
          for (int i = 0; i < N_ROWS; i++) totals(dot[i], weight.get() + (m + i) * BLOCK + c);
        };
        each_rows([&](auto rows, int64_t m) {
          int64_t c = 0;
          for (; c + KEYS <= width; c += KEYS) score(rows, std::integral_constant<int, KEYS>(), m, c);
          for (; c < width; c++) score(rows, std::integral_constant<int, 1>(), m, c);
        });
"""

_SOFTMAX = r"""
        for (int64_t m = 0; m < M; m++) {
          float* const w = weight.get() + m * BLOCK;
          {%- if masked %}
          const float* const a = added.get() + (m % {{mask_rows}}) * BLOCK;
          for (int64_t c = 0; c < width; c++) w[c] += a[c];
          {%- endif %}
          std::fill_n(w + width, BLOCK - width, LOWEST);
          Vec most(w[0]);
          for (int64_t c = 0; c < BLOCK; c += VL) most = at::vec::maximum(most, Vec::loadu(w + c));
          alignas(64) float parts[VL];
          most.store(parts);
          const float before = maximum[m];
          float now = before;
          for (int64_t i = 0; i < VL; i++) now = larger(now, parts[i]);
          if (now == LOWEST) {  // nothing yet
            std::fill_n(w, BLOCK, 0.0f);
            continue;
          }
          maximum[m] = now;
          Vec total(0.0f);
          for (int64_t c = 0; c < BLOCK; c += VL) {
            const Vec p = (Vec::loadu(w + c) - Vec(now)).exp();
            p.store(w + c);
            total = total + p;
          }
          total.store(parts);
          for (int64_t n = VL / 2; n > 0; n /= 2)
            for (int64_t i = 0; i < n; i++) parts[i] += parts[i + n];
          if (before == now || before == LOWEST) {
            sum[m] += parts[0];
            continue;
          }
          const float factor = std::exp(before - now);
          sum[m] = sum[m] * factor + parts[0];
          float* const y = value + m * EP;
          for (int64_t e = 0; e < EP; e += VL) (Vec::loadu(y + e) * Vec(factor)).store(y + e);
        }
"""

_VALUES = r"""
        auto mix = [&](auto rows, auto vectors, int64_t m, int64_t e, int64_t last) {
          constexpr int N_ROWS = decltype(rows)::value, N = decltype(vectors)::value;
          float* const y = value + m * EP + e;
          const float* const w = weight.get() + m * BLOCK;
          Vec sums[N_ROWS][N];
          for (int i = 0; i < N_ROWS; i++)
            for (int j = 0; j < N; j++) sums[i][j] = Vec::loadu(y + i * EP + j * VL);
          for (int64_t c = 0; c < width; c++) {
            const {{key_type}}* const x = values + c * {{v_step}}L + e;
            Vec p[N_ROWS];
            for (int i = 0; i < N_ROWS; i++) p[i] = Vec(w[i * BLOCK + c]);
            for (int j = 0; j < N; j++) {
              const Vec v = load(x + j * VL, j + 1 < N ? VL : last);
              for (int i = 0; i < N_ROWS; i++) sums[i][j] = at::vec::fmadd(v, p[i], sums[i][j]);
            }
          }
          for (int i = 0; i < N_ROWS; i++)
            for (int j = 0; j < N; j++) sums[i][j].store(y + i * EP + j * VL);
        };
        each_rows([&](auto rows, int64_t m) {
          int64_t e = 0;
          for (; e + KEYS * VL <= E; e += KEYS * VL) mix(rows, std::integral_constant<int, KEYS>(), m, e, VL);
          for (; e + VL <= E; e += VL) mix(rows, std::integral_constant<int, 1>(), m, e, VL);
          if (e < E) mix(rows, std::integral_constant<int, 1>(), m, e, E - e);
        });
      }
    };
"""

# how ``score`` and ``mix`` are called for all rows, and sums of vectors
_SHARED = r"""
    auto each_rows = [&](auto take) {
      int64_t m = 0;
      for (; m + {{rows}} <= M; m += {{rows}}) take(std::integral_constant<int, {{rows}}>(), m);
      {%- if rest %}
      take(std::integral_constant<int, {{rest}}>(), m);
      {%- endif %}
    };
    auto totals = [](const auto& dots, float* to) {
      constexpr int N_KEYS = std::extent_v<std::remove_reference_t<decltype(dots)>>;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
      if constexpr (N_KEYS == 4) {
#if defined(CPU_CAPABILITY_AVX512)
        auto half = [](const Vec& x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
#else
        auto half = [](const Vec& x) { return static_cast<__m256>(x); };
#endif
        const __m256 low = _mm256_hadd_ps(half(dots[0]), half(dots[1])), high = _mm256_hadd_ps(half(dots[2]), half(dots[3]));
        const __m256 all = _mm256_hadd_ps(low, high);
        _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
        return;
      }
#endif
      for (int j = 0; j < N_KEYS; j++) {
        alignas(64) float parts[VL];
        dots[j].store(parts);
        for (int64_t n = VL / 2; n > 0; n /= 2)
          for (int64_t i = 0; i < n; i++) parts[i] += parts[i + n];
        to[j] = parts[0];
      }
    };
"""

_REDUCE = r"""
    for (int64_t index = thread; index < SPANS * B * G; index += count) unit(index);
    #pragma omp barrier
    const auto factor = floats(SPANS);
    for (int64_t index = B * G * M * thread / count; index < B * G * M * (thread + 1) / count; index++) {
      const int64_t m = index % M, g = index / M % G, b = index / (M * G), h = g * R + m / TOKENS, t = m % TOKENS;
      auto of = [&](int64_t span) { return units.get() + ((span * B + b) * G + g) * UNIT; };
      float* const y = result + (b * TOKENS + t) * N + h * E;
      float most = LOWEST, total = 0.0f;
      for (int64_t span = 0; span < SPANS; span++) most = larger(most, of(span)[m]);
      if (most == LOWEST) {  // the mask excludes every position
        std::fill_n(y, E, 0.0f);
        continue;
      }
      for (int64_t span = 0; span < SPANS; span++) {
        const float one = of(span)[m];
        factor[span] = one == LOWEST ? 0.0f : one == most ? 1.0f : std::exp(one - most);
        if (one != LOWEST) total += factor[span] * of(span)[M + m];
      }
      auto reduce = [&](int64_t e, int64_t n) {
        Vec all(0.0f);
        for (int64_t span = 0; span < SPANS; span++)
          if (of(span)[m] != LOWEST) all = at::vec::fmadd(Vec::loadu(of(span) + 2 * M + m * EP + e), Vec(factor[span]), all);
        (all / Vec(total)).store(y + e, n);
      };
      int64_t e = 0;
      for (; e + VL <= E; e += VL) reduce(e, VL);
      if (e < E) reduce(e, E - e);
    }
  }
"""


class DecodeAttentionTemplate(RowsTemplate):
    """Inputs: q (B, H, T, D), k (B, G, S, D), v (B, G, S, E), and None or a mask expanded to (B, H, T, S). Output: (B T, H E)."""

    body: ClassVar[str] = (
        _OPEN.replace("    auto unit =", _SHARED + "    auto unit =")
        + "{% if masked %}" + _MASK + "{% endif %}"
        + _SCORES + _SOFTMAX + _VALUES + _REDUCE
    )  # fmt: skip

    def __init__(self, q: Any, k: Any, v: Any, mask: Any, *, layout: ir.Layout, scale: float) -> None:
        batch, heads, tokens, channels = (int(size) for size in q.get_size())
        _, groups, positions, values = (int(size) for size in v.get_size())
        repeats, blocks = heads // groups, -(-positions // BLOCK)
        shared = mask is None or repeats == 1 or int(mask.get_stride()[1]) == 0
        rows = min((-(-repeats * tokens // n), n) for n in (1, 2, 3, 4))[1]  # the fewest groups, as even as possible
        super().__init__(
            "rana_decode_attention",
            {"Q": q, "K": k, "V": v} | ({} if mask is None else {"Mask": mask}),
            layout,
            products=batch * heads * tokens * positions * (channels + values),
            batch=batch,
            groups=groups,
            repeats=repeats,
            tokens=tokens,
            positions=positions,
            channels=channels,
            values=values,
            block=BLOCK,
            span=BLOCK * math.ceil(blocks * batch * groups / _UNITS),
            rows=rows,
            rest=repeats * tokens % rows,
            scale=f"static_cast<float>({scale!r})",
            key_type=DTYPE_TO_CPP[k.get_dtype()],
            q_index=" + ".join(f"{name} * {int(stride)}L" for name, stride in zip("bht", q.get_stride(), strict=False)),
            q_step=int(q.get_stride()[3]),
            k_index=_start(k),
            v_index=_start(v),
            k_step=int(k.get_stride()[2]),
            v_step=int(v.get_stride()[2]),
            masked=mask is not None,
            mask_rows=tokens if shared else repeats * tokens,
            **_mask_facts(mask),
        )


def _start(x: Any) -> str:
    """Where the positions of a block start."""
    b, g, s, _ = x.get_stride()
    return f"b * {int(b)}L + g * {int(g)}L + first * {int(s)}L"


def _mask_facts(mask: Any) -> dict[str, Any]:
    """How the template reads position c of a block in a row of the mask: whether it attends, and what it adds to a score."""
    if mask is None:
        return {}
    *strides, step = (int(stride) for stride in mask.get_stride())
    at = f"row[c * {step}L]"
    number = f"static_cast<float>({at})"
    attends, addend = (at, f"{at} ? 0.0f : LOWEST") if mask.get_dtype() == torch.bool else (f"!({number} == LOWEST)", number)
    return {
        "mask_type": DTYPE_TO_CPP[mask.get_dtype()],
        "mask_index": " + ".join(f"{name} * {stride}L" for name, stride in zip("bht", strides, strict=True)),
        "mask_step": step,
        "listed": step == 1 and mask.get_dtype() == torch.bool,
        "attends": attends,
        "addend": addend,
    }
