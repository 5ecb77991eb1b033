"""``router`` with quantised weights by integer dot products: C++ text for ``router.py``, for the CPUs of ``integers.py``.

    x[d] of B bytes of a row  ~  step * (q1[d] + q2[d] / 254 + q3[d] / 254^2),   step = max |x| / 127, q integers in [-127, 127]
    z[r] += step * scale * sum over d of (q1[d] + ...) * w[r, d]        sums exact in int32, then added in fp32

Every thread makes the integers of all tokens once. The error of an input is that of a coefficient in ``integers.py``, of the
largest of its 64 inputs (128 of a packed weight; half of both with AVX2). If one of the largest is not finite, or too small, all
is multiplied in fp32.
"""

from __future__ import annotations

# after the inputs are floats: their integers. One half, or even and odd inputs of a packed weight
INPUTS = r"""
    constexpr int64_t PLACES = {{"D / 2" if packed else "D"}}, CHUNKS = (PLACES + B - 1) / B, HALVES = {{2 if packed else 1}};
    bool fits = true;
    const std::unique_ptr<int8_t[]> q(new int8_t[TOKENS * CHUNKS * P * HALVES * B]);
    const std::unique_ptr<int32_t[]> start(new int32_t[TOKENS * CHUNKS * P * (B / 4)]);
    const auto steps = floats(TOKENS * CHUNKS * P);
    for (int64_t t = 0; t < TOKENS; t++)
      for (int64_t c = 0; c < CHUNKS; c++) {
        float values[HALVES * B], largest = 0.0f;
        for (int64_t h = 0; h < HALVES; h++)
          for (int64_t i = 0; i < B; i++)
            values[h * B + i] = c * B + i < PLACES ? x[(HALVES * t + h) * PAD + c * B + i] : 0.0f;
        for (const float v : values) {
          largest = std::max(largest, std::abs(v));
          fits = fits && std::abs(v) <= 1e30f;  // NaN is not
        }
        fits = fits && (largest >= 1e-30f || largest == 0.0f);
        float step = std::max(largest, 1e-30f) / 127.0f, inverse = 127.0f / std::max(largest, 1e-30f);
        for (int64_t p = 0; p < P; p++, step /= 254.0f, inverse *= 254.0f) {
          const int64_t at = (t * CHUNKS + c) * P + p;
          steps[at] = step;
          int8_t* const integer = q.get() + at * HALVES * B;
          for (int64_t i = 0; i < HALVES * B; i++) {
            const float n = std::nearbyint(values[i] * inverse);
            integer[i] = static_cast<int8_t>(n);
            values[i] -= n * step;
          }
          Bytes sum = {{mm}}setzero_si{{bits}}();  // unsigned weights are w + {{offset}}
          {%- if offset %}
          for (int64_t h = 0; h < HALVES; h++)
            sum = dot4(sum, {{mm}}set1_epi8(static_cast<char>({{offset}})), bytes_at(integer + h * B, B));
          {%- endif %}
          sum = {{mm}}sub_epi32({{mm}}setzero_si{{bits}}(), sum);
          {{mm}}storeu_si{{bits}}(reinterpret_cast<Bytes*>(start.get() + at * (B / 4)), sum);
        }
      }
"""

ROWS = r"""
    auto integers = [&](auto rows, int64_t first) {
      constexpr int R = decltype(rows)::value;
      __m{{bits}} sum[R][TOKENS];
      for (auto& s : sum) for (auto& a : s) a = {{mm}}setzero_ps();
      for (int64_t c = 0; c < CHUNKS; c++)
        for (int i = 0; i < R; i++) {
          const int64_t r = first + i;
          const Bytes w = bytes_at(W + r * {{row_stride}}L + c * B, PLACES - c * B);
          prefetch(W + std::min(r + R, N - 1) * {{row_stride}}L + c * B);
          {%- if packed %}
          const Bytes even = {{mm}}and_si{{bits}}(w, {{mm}}set1_epi8(15));
          const Bytes odd = {{mm}}and_si{{bits}}({{mm}}srli_epi16(w, 4), {{mm}}set1_epi8(15));
          const int64_t g = c * B * 2 / {{group}};
          auto scale = {{mm}}set1_ps(static_cast<float>(Scale[{{scale_index}}]));
          {%- if bits == 512 and group == 64 %}
          if (c * B + B / 2 < PLACES) {
            const int64_t g = c * B * 2 / {{group}} + 1;
            scale = _mm512_mask_broadcastss_ps(scale, 0xff00, _mm_set_ss(static_cast<float>(Scale[{{scale_index}}])));
          }
          {%- endif %}
          {%- elif dot == "vnni" %}
          const Bytes u = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
          {%- else %}
          const Bytes u = _mm256_abs_epi8(w);
          {%- endif %}
          for (int64_t t = 0; t < TOKENS; t++) {
            auto y = {{mm}}setzero_ps();
            for (int64_t p = P - 1; p >= 0; p--) {
              const int64_t at = (t * CHUNKS + c) * P + p;
              const int8_t* const integer = q.get() + at * HALVES * B;
              Bytes n = bytes_at(start.get() + at * (B / 4), B);
              {%- if packed %}
              n = dot4(dot4(n, even, bytes_at(integer, B)), odd, bytes_at(integer + B, B));
              {%- elif dot == "vnni" %}
              n = dot4(n, u, bytes_at(integer, B));
              {%- else %}
              n = dot4(n, u, _mm256_sign_epi8(bytes_at(integer, B), w));
              {%- endif %}
              y = {{mm}}fmadd_ps({{mm}}cvtepi32_ps(n), {{mm}}set1_ps(steps[at]), y);
            }
            sum[i][t] = {% if packed %}{{mm}}fmadd_ps(y, scale, sum[i][t]){% else %}{{mm}}add_ps(sum[i][t], y){% endif %};
          }
        }
      for (int i = 0; i < R; i++) {
        [[maybe_unused]] const int64_t r = first + i;
        for (int64_t t = 0; t < TOKENS; t++) {
          float parts[B / 4];
          {{mm}}storeu_ps(parts, sum[i][t]);
          for (int64_t n = B / 8; n > 0; n /= 2)
            for (int64_t k = 0; k < n; k++) parts[k] += parts[k + n];
          result[t * N + r] = parts[0]{{row_scale}};
        }
      }
    };
"""
