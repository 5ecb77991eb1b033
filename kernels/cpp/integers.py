"""Masked matmuls of quantised weights by integer dot products: C++ text for ``masked_gemv.py``, and which CPUs it is for.

    c[k] = v[k] * scale[k, g] of 16 kept ranks  ~  step * (q1[k] + q2[k] / 254 + q3[k] / 254^2),   q integers in [-127, 127]
    y[n] += step * sum over k of (q1[k] + ...) * w[k, n]         sums of 16 products exact in int32, then added in fp32

Kept ranks lie anywhere, so bytes of four rows are interleaved in registers; then one instruction multiplies four ranks by 8 or
16 columns. ``step`` is the largest |c| of the 16 ranks over 127, for each group of columns where a weight has 4 bits.

Error of a coefficient: half of the last step, max |c| / (254 * 254 ^ (passes - 1)): 2^-16 of the largest of 16 coefficients in
two passes, for activations in 16 bits, whose own rounding is 2^-9 or 2^-12, and 2^-24 in three passes, for fp32. If the largest
is not finite, or too small for its reciprocal, the 16 ranks are multiplied in fp32: NaN and Inf come out as in the dense model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa


def facts(dtype: torch.dtype) -> dict[str, Any]:
    """What the text needs: ``dot``: "vnni" (vpdpbusd, 512 bits), "maddubs" (AVX2), or None where Inductor's ISA has neither."""
    isa = str(pick_vec_isa())
    dot = "vnni" if "avx512_vnni" in isa else "maddubs" if "avx" in isa else None
    bits = 512 if dot == "vnni" else 256
    return {"dot": dot, "passes": 3 if dtype == torch.float32 else 2, "bits": bits, "mm": f"_mm{bits}_"}


# dot products, and loads of up to B bytes
PRELUDE = r"""
  {%- set offset = 8 if packed else 128 if dot == "vnni" else 0 %}  {# unsigned weights are w + offset #}
  using Bytes = __m{{bits}}i;
  constexpr int P = {{passes}};  // integers of a coefficient
  constexpr int64_t B = {{bits // 8}};  // bytes of a row at once
  // add four neighbouring products, unsigned by signed, to each int32; two of them fit in int16
  auto dot4 = [](Bytes a, Bytes u, Bytes s) {
  {%- if dot == "vnni" %}
    return _mm512_dpbusd_epi32(a, u, s);
  {%- else %}
    return _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
  {%- endif %}
  };
  auto bytes_at = [](const void* p, [[maybe_unused]] int64_t count) {
  {%- if dot == "vnni" %}
    return _mm512_maskz_loadu_epi8(count < B ? (uint64_t(1) << count) - 1 : ~uint64_t(0), p);
  {%- else %}
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  {%- endif %}
  };
"""

# of masked_gemv alone
INTERLEAVE = r"""
  // the number of a group for each of its columns: two groups of 64 columns share a vector of 512 bits
  auto spread = [](const int32_t* p) {
  {%- if dot == "vnni" and packed and grain == 64 %}
    const Bytes first_second = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_permutexvar_epi32(first_second, _mm512_loadu_si512(p));
  {%- else %}
    return {{mm}}set1_epi32(*p);
  {%- endif %}
  };
  // bytes of four rows side by side: u[i] has positions 4 i to 4 i + 3 of each 16
  auto interleave = [](const Bytes (&r)[4], Bytes (&u)[4]) {
    const Bytes a = {{mm}}unpacklo_epi8(r[0], r[1]), b = {{mm}}unpacklo_epi8(r[2], r[3]);
    const Bytes c = {{mm}}unpackhi_epi8(r[0], r[1]), d = {{mm}}unpackhi_epi8(r[2], r[3]);
    u[0] = {{mm}}unpacklo_epi16(a, b), u[1] = {{mm}}unpackhi_epi16(a, b);
    u[2] = {{mm}}unpacklo_epi16(c, d), u[3] = {{mm}}unpackhi_epi16(c, d);
  };
"""

# before all blocks, where coefficients have no groups: the integers of 16 ranks at a time, as bytes of ranks 4 m to 4 m + 3
COEFFICIENTS = r"""
      const std::unique_ptr<int32_t[]> integer(new int32_t[ROOM / 16 * T * P * 4]), starts(new int32_t[ROOM / 16 * T * P]);
      const auto steps = floats(ROOM / 16 * T * P);
      const std::unique_ptr<bool[]> all_fit(new bool[ROOM / 16]);
      for (int64_t j = 0; j < kept; j += 16) {
        all_fit[j / 16] = true;
        for (int64_t t = 0; t < T; t++) {
          constexpr int64_t H = 16 / VL;
          Vec r[H];
          alignas(64) int32_t bits[16];  // of magnitudes: ordered as these are, and NaN is above all others
          for (int64_t h = 0; h < H; h++) {
            r[h] = Vec::loadu(coefficient.get() + t * ROOM + j + h * VL);
            at::vec::cast<int32_t>(r[h].abs()).store(bits + h * VL);
          }
          int32_t most = 0;
          for (int64_t i = 0; i < 16; i++) most = std::max(most, bits[i]);
          float largest;
          std::memcpy(&largest, &most, sizeof(largest));
          all_fit[j / 16] &= largest <= 1e30f && (largest >= 1e-30f || largest == 0.0f);
          largest = std::max(largest, 1e-30f);
          float step = largest / 127.0f, inverse = 127.0f / largest;
          for (int64_t p = 0; p < P; p++, step /= 254.0f, inverse *= 254.0f) {
            const int64_t at = (j / 16 * T + t) * P + p;
            for (int64_t h = 0; h < H; h++) {
              const Vec n = (r[h] * Vec(inverse)).round();
              r[h] = at::vec::fnmadd(n, Vec(step), r[h]);
              at::vec::convert_to_int_of_same_size(n).store(bits + h * VL);
            }
            auto* const bytes = reinterpret_cast<int8_t*>(integer.get() + at * 4);
            int32_t sum = 0;
            for (int64_t i = 0; i < 16; i++) {
              bytes[i] = static_cast<int8_t>(bits[i]);
              sum += bits[i];
            }
            starts[at] = -{{offset}} * sum;  // unsigned weights are w + {{offset}}
            steps[at] = step;
          }
        }
      }
"""

# in a block: ``integers`` adds 16 ranks to ``mixed``, whose columns are in the order of ``interleave``, in chunks of B bytes (of
# packed weights, even columns of all chunks and then odd ones). ``add`` multiplies in fp32
BLOCK = r"""
      {%- if dot == "vnni" %}
      const int64_t whole = places;
      {%- else %}
      const int64_t whole = places / B * B;
      {%- endif %}
      std::fill_n(mixed.get(), MIXED * T, 0.0f);
      auto integers = [&](int64_t j) {
        const {{weight_type}}*w[16], *next[16];
        for (int i = 0; i < 16; i++) {
          w[i] = W + row[j + i] * {{row_stride}}L + first{{ " / 2" if packed }};
          next[i] = W + row[std::min(j + 16 + i, kept - 1)] * {{row_stride}}L + first{{ " / 2" if packed }};
        }
        {%- if packed %}
        constexpr int64_t MOST = NB / GRAIN + 16;  // groups of a block, and room for a vector
        alignas(64) int32_t q[{{most}}][P][4][MOST], start[{{most}}][P][MOST];
        alignas(64) float largest[{{most}}][MOST], step[{{most}}][P][MOST];
        // integers of VL groups at a time, as bytes of ranks 4 m to 4 m + 3
        const int64_t groups = (width + GRAIN - 1) / GRAIN;
        auto quantise = [&](int64_t g, int64_t count) {
          Vec scale[16];
          for (int i = 0; i < 16; i++) {
            scale[i] = load(Scale + row[j + i] * {{scale_stride}}L + first / GRAIN + g, count);
            prefetch(Scale + row[std::min(j + 16 + i, kept - 1)] * {{scale_stride}}L + first / GRAIN + g);
          }
          for (int64_t t = 0; t < T; t++) {
            Vec r[16];
            Int bits(0);  // of magnitudes: ordered as these are, and NaN is above all others
            for (int i = 0; i < 16; i++) {
              r[i] = Vec(coefficient[t * ROOM + j + i]) * scale[i];
              bits = at::vec::maximum(bits, at::vec::cast<int32_t>(r[i].abs()));
            }
            Vec most = at::vec::cast<float>(bits);
            most.store(largest[t] + g);
            most = at::vec::maximum(most, Vec(1e-30f));
            Vec s = most / Vec(127.0f), inverse = Vec(127.0f) / most;
            for (int p = 0; p < P; p++) {
              Int sum(0);
              for (int m = 0; m < 4; m++) {
                Int bytes(0);
                for (int i = 0; i < 4; i++) {
                  Vec& c = r[4 * m + i];
                  const Vec n = (c * inverse).round();
                  const Int k = at::vec::convert_to_int_of_same_size(n);
                  c = at::vec::fnmadd(n, s, c);
                  bytes = bytes | ((k & Int(255)) << Int(8 * i));
                  sum = sum + k;
                }
                bytes.store(q[t][p][m] + g);
              }
              // unsigned weights are w + {{offset}}
              (Int(0) - sum * Int({{offset}})).store(start[t][p] + g);
              s.store(step[t][p] + g);
              s = s / Vec(254.0f);
              inverse = inverse * Vec(254.0f);
            }
          }
        };
        int64_t done = 0;
        for (; done + VL <= groups; done += VL) quantise(done, VL);
        if (done < groups) quantise(done, groups - done);
        bool fits = true;
        for (int64_t t = 0; t < T; t++)
          for (int64_t g = 0; g < groups; g++) {
            const float c = largest[t][g];
            fits = fits && c <= 1e30f && (c >= 1e-30f || c == 0.0f);
          }
        {%- else %}
        const auto* const q = reinterpret_cast<const int32_t(*)[P][4][1]>(integer.get() + j / 16 * T * P * 4);
        const auto* const start = reinterpret_cast<const int32_t(*)[P][1]>(starts.get() + j / 16 * T * P);
        const auto* const step = reinterpret_cast<const float(*)[P][1]>(steps.get() + j / 16 * T * P);
        const bool fits = all_fit[j / 16];
        {%- endif %}
        const int64_t end = fits ? whole : 0;
        for (int64_t at = 0; at < end; at += B) {
          Bytes u[4][4];
          for (int m = 0; m < 4; m++) {
            Bytes r[4];
            for (int i = 0; i < 4; i++) {
              r[i] = bytes_at(w[4 * m + i] + at, end - at);
              prefetch(next[4 * m + i] + at);
            }
            interleave(r, u[m]);
          }
          const int64_t g = {{"at / (GRAIN / 2)" if packed else "0"}};
          for (int64_t t = 0; t < T; t++) {
            Bytes k[P][4];
            for (int p = 0; p < P; p++)
              for (int m = 0; m < 4; m++) k[p][m] = spread(q[t][p][m] + g);
            float* const y = mixed.get() + t * MIXED + at;
            Bytes begin[P];
            __m{{bits}} unit[P];
            for (int p = 0; p < P; p++) {
              begin[p] = spread(start[t][p] + g);
              unit[p] = {{mm}}castsi{{bits}}_ps(spread(reinterpret_cast<const int32_t*>(step[t][p] + g)));
            }
            auto multiply = [&](float* sum, auto unsigned_at) {
              Bytes n[P];
              for (int p = 0; p < P; p++) n[p] = begin[p];
              for (int m = 0; m < 4; m++)
                for (int p = 0; p < P; p++) n[p] = unsigned_at(n[p], m, k[p][m]);
              auto total = {{mm}}loadu_ps(sum);
              for (int p = P - 1; p >= 0; p--) total = {{mm}}fmadd_ps({{mm}}cvtepi32_ps(n[p]), unit[p], total);
              {{mm}}storeu_ps(sum, total);
            };
            for (int i = 0; i < 4; i++) {
              {%- if packed %}
              const Bytes low = {{mm}}set1_epi8(15);
              multiply(y + i * (B / 4), [&](Bytes a, int m, Bytes c) { return dot4(a, {{mm}}and_si{{bits}}(u[m][i], low), c); });
              multiply(y + MIXED / 2 + i * (B / 4), [&](Bytes a, int m, Bytes c) {
                return dot4(a, {{mm}}and_si{{bits}}({{mm}}srli_epi16(u[m][i], 4), low), c);
              });
              {%- elif dot == "vnni" %}
              const Bytes sign = _mm512_set1_epi8(-128);
              multiply(y + i * (B / 4), [&](Bytes a, int m, Bytes c) { return dot4(a, _mm512_xor_si512(u[m][i], sign), c); });
              {%- else %}
              multiply(y + i * (B / 4), [&](Bytes a, int m, Bytes c) {
                return dot4(a, _mm256_abs_epi8(u[m][i]), _mm256_sign_epi8(c, u[m][i]));
              });
              {%- endif %}
            }
          }
        }
        for (int i = 0; i < 16 && end < places; i += 8) add(std::integral_constant<int, 8>(), j + i, end, places);
      };
"""

# after all ranks: ``mixed`` is added to the sums, whose columns are in order
COLLECT = r"""
      for (int64_t t = 0; t < T; t++)
        for (int64_t half = 0; half < {{2 if packed else 1}}; half++)
          for (int64_t at = 0; at < whole; at += B) {
            const float* const from = mixed.get() + t * MIXED + half * (MIXED / 2) + at;
            float* const to = sums.get() + t * NB + half * (NB / 2) + at;
            for (int64_t x = 0; x < B && x < whole - at; x++) to[x] += from[x / 4 % 4 * (B / 4) + x / 16 * 4 + x % 4];
          }
"""
