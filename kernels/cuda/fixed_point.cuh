// Factors p = value * scale of a block as integers of 31 bits, for each token, and their four digits in base 256.
//
// With M the largest |p| of the token in the block, and U the power of two for which 2^29 <= M / U < 2^30: p is rounded to P * U, P an
// integer. Each factor is off by U / 2 <= 2^-30 M: less than fp32's own rounding where |p| is above M / 64, and 2^-12 of a p of
// M / 2^18. The sums of P times numbers of the weight are exact.
//
// Digits are -128 ... 127, so that each is a byte that tensor cores multiply: P = d0 + 256 d1 + 256^2 d2 + 256^3 d3. Adding 0x00808080
// makes the lower three unsigned, and flipping their upper bits subtracts 128 from each.
#if INTEGERS

struct FixedPoint {
  float inverse, unit;  // 1 / U and U
  bool odd;             // some p is not finite, or too small for U: neither is used
};

DEVICE u32* largest(char* memory, int token) { return (u32*)(memory + AT_LARGEST) + token * ALL_WARPS; }

// Bits of |p|: as integers they compare as the numbers do, with infinity and NaN above all.
DEVICE u32 magnitude(float p) { return bits_of_float(p) & 0x7FFFFFFFu; }

DEVICE void store_largest(char* memory, int token, u32 mine) {
  u32 most = largest_in_warp(mine);
  if (thread_index() % LANES == 0) largest(memory, token)[thread_index() / LANES] = most;
}

// After a barrier.
DEVICE FixedPoint fixed_point(char* memory, int token) {
  u32 most = 0;
#pragma unroll
  for (int j = 0; j < ALL_WARPS; j++) most = max(most, largest(memory, token)[j]);
  if (most == 0) return {0.f, 0.f, false};
  u32 exponent = most >> 23;
  if (exponent >= 255 || exponent < 40) return {0.f, 0.f, true};
  return {float_of_bits((127 + 29 + 127 - exponent) << 23), float_of_bits((exponent - 29) << 23), false};
}

DEVICE u32 digits_of(float p, float inverse) { return ((u32)nearest_integer(p * inverse) + 0x00808080u) ^ 0x00808080u; }

// Where the factor of an entry lies: lane t of a product's second operand has ranks 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a step, and
// these are neighbours.
DEVICE int slot_of(int place) { return place / STEP * STEP + place % 8 / 2 * 4 + place % STEP / 8 * 2 + place % 2; }

// The sum of P times numbers, from the sums of its digits. Each is below 128 * 128 * LISTED, which 32 bits hold.
static_assert(LISTED < 1 << 17);
DEVICE float number_of(const int (&digit)[4]) {
  return (float)digit[3] * 16777216.f + ((float)digit[2] * 65536.f + ((float)digit[1] * 256.f + (float)digit[0]));
}
#endif
