// Products of bf16 or fp16, for any number of tokens: tensor cores multiply weights in the dtype of the values by the values.
//
// The first operand of an m16n8k16 product has weights of 16 ranks, the second has values of up to 8 tokens, so that the cost of a
// step hardly depends on the number of tokens, and what is not finite comes out as of a dense product. What is rounded:
//     4 bits  weights, number * scale, once, as those of a dense model with dequantised weights are; before that scales of another
//             dtype than the values
//     8 bits  value * scale, once, for each rank and token. In fp16 the scale's power of two stays with the weights: products could
//             be too small for fp16.
//     16 bits nothing
//
// Transposed loads of 16 bits give a lane registers of two ranks each. In 16 bits they are the first operand as they are. Else
// unpacking is one AND-XOR for two numbers, whose stored form u is the number plus 8 or, with the sign of a byte flipped, 128; then
// arithmetic on pairs, which other units execute:
//     bf16  the bits of u, up to 255, are the number u * 2^-133: multiples of that are evenly spaced up to 2^-125. One multiply-add
//           by scale * 2^101 gives weight * 2^-32, rounded once. For scales below 2^27; those below 2^-94 lose bits.
//     fp16  u in the mantissa of 1024 is 1024 + u; the number follows exactly, and is multiplied by the scale. Scales below 2^-14
//           lose bits.
// An upper nibble stays where it is, as 16 u.
#if !INTEGERS

constexpr int SETS = (TOKENS + 7) / 8;  // of 8 tokens
constexpr int NUMBERS = 16 / BITS;      // of 16 bits of a row
constexpr int TILES = 4 * NUMBERS;      // of 16 outputs
constexpr u32 BOTH = 0x00010001u;       // times 16 bits: a pair of them
constexpr float UNIT = VALUE == 1 ? 4294967296.f : 1.f;  // of the sums of unpacked weights

// The output in row g, or ``upper`` g + 8, of a tile. Tile i * NUMBERS + j is of the i-th two chunks of 16 bytes, of which a lane has
// 2 NUMBERS numbers: the 2 j-th of them in row g, the next in row g + 8.
DEVICE int output_of(int tile, int upper, int g) {
  int number = tile % NUMBERS * 2 + upper;
  return ((tile / NUMBERS * 2 + number / NUMBERS) * 8 + g) * NUMBERS + number % NUMBERS;
}

// Weights of two ranks in a group, from the pair of their scales.
struct Weights {
  u32 scale, upper, offset;

  DEVICE Weights() {}
  DEVICE Weights(u32 pair) {
    if (VALUE == 1) {
      scale = product(pair, 0x7200 * BOTH);                          // 2^101
      upper = product(pair, 0x7000 * BOTH);                          // 2^97
      offset = product(pair, (BITS == 4 ? 0xB100 : 0xB300) * BOTH);  // -8 or -128, times 2^-32
    } else {
      scale = pair;
    }
  }

  // The e-th of the numbers that 16 bits of each rank hold.
  DEVICE u32 from(u32 x, int e) const {
    if (BITS == 16) return x;
    const bool high = BITS == 4 && e % 2;
    const u32 mask = BITS == 8 ? 0x00FF : high ? 0x00F0 : 0x000F, flip = (VALUE == 1 ? 0 : 0x6400) + (BITS == 8 ? 0x0080 : 0);
    u32 u = and_xor(x >> 8 * (BITS == 8 ? e : e / 2), mask * BOTH, flip * BOTH);
    if (VALUE == 1) return product_plus(u, high ? upper : scale, offset);
    // 1 / 16 and -72, or 1 and -1032 or -1152
    u32 number = high ? product_plus(u, 0x2C00 * BOTH, 0xD480 * BOTH)
                      : product_plus(u, 0x3C00 * BOTH, (BITS == 4 ? 0xE408 : 0xE480) * BOTH);
    return product(number, scale);
  }
};

// 4 bits: a lane copies the same SCALE_UNIT bytes of the scales of some ranks, LANES / PARTS apart.
constexpr int PARTS = BITS == 4 ? GROUPS * SCALE_BYTES / SCALE_UNIT : 1;

struct Products {
  const Share& share;
  float tiles[SETS][TILES][4] = {};
  int from[4];  // where a lane's rows of a transposed load begin in a stage, for each two chunks of 16 bytes
  const char* scales;       // of rank 0, what a lane copies, and how much there is of it
  int scale_size;
  const u16* values[SETS];  // of a lane's token, from its first rank of a step on; without a token those of the last, for no output

  DEVICE Products(const Share& share) : share(share) {
    int lane = share.lane, row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) from[i] = row * ROW_BYTES + ((2 * i + lane / 8 % 2) ^ swizzle(row)) * 16;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
      int token = set * 8 + lane / 4;
      values[set] = share.values() + (token < TOKENS ? token : TOKENS - 1) * VALUE_STRIDE + lane % 4 * 2;
    }
    if (BITS != 4) return;
    u32 group = share.column / GROUP + lane % PARTS * (SCALE_UNIT / SCALE_BYTES);
    int left = ((share.end() + GROUP - 1) / GROUP - (int)group) * SCALE_BYTES;
    scale_size = left < 0 ? 0 : left < SCALE_UNIT ? left : SCALE_UNIT;
    scales = kept((const char*)share.a.scale + (left > 0 ? group * SCALE_BYTES : 0));
  }
  DEVICE void begin() {}
  DEVICE void prepare() {}

  // 4 bits: begin to copy the scales of 16 ranks, (STEP, GROUPS).
  DEVICE void fetch_scales(char* to, int place) const {
    bool there = place < share.listed && (PARTS > 1 || share.lane < STEP);
    int entry = share.lane / PARTS % STEP;
#pragma unroll
    for (int i = 0; i < (PARTS > 1 ? PARTS / 2 : 1); i++) {
      u32 rank = share.ranks()[place + entry + i * (LANES / PARTS)];
      const char* from = scales + (u64)rank * (share.a.scale_row * SCALE_BYTES);
      copy_if<SCALE_UNIT>(there, to + (share.lane + i * LANES) * SCALE_UNIT, from, scale_size);
    }
  }

  // A lane multiplies ranks 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a step, t its index modulo 4.
  template <int STAGE>
  DEVICE void multiply_step(int place) {
    const char* stage = share.rows() + STAGE * STAGE_BYTES;
    u32 b[SETS][2];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
#pragma unroll
      for (int k = 0; k < 2; k++) b[set][k] = *(const u32*)(values[set] + place + 8 * k);
    }
    Scales scales[2] = {{*this, stage, place, 0}, {*this, stage, place, 1}};
    Weights weights[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 x[4];  // two chunks of the lower ranks, then of the upper ones
      load_transposed(x, stage + from[i]);
      if (i % (4 / GROUPS) == 0) {
#pragma unroll
        for (int k = 0; k < 2 && BITS < 16; k++) weights[k] = Weights(scales[k].pair(i * GROUPS / 4));
      }
#pragma unroll
      for (int j = 0; j < NUMBERS; j++) {
        u32 a[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          int number = 2 * j + k % 2;
          a[k] = weights[k / 2].from(x[k / 2 * 2 + number / NUMBERS], number % NUMBERS);
        }
#pragma unroll
        for (int set = 0; set < SETS; set++) multiply(tiles[set][i * NUMBERS + j], a, b[set]);
      }
    }
  }

  // The scales of ranks 2 t and 2 t + 1, or of 2 t + 8 and 2 t + 9.
  struct Scales {
    static constexpr int WORDS = BITS == 4 ? GROUPS * SCALE_BYTES / 4 : 1;  // of a rank
    u32 word[2 * WORDS];

    DEVICE Scales(const Products& products, const char* stage, int place, int upper) {
      const Share& share = products.share;
      int rank = share.lane % 4 * 2 + 8 * upper;
      if (BITS == 4) {
        const u32* stored = (const u32*)(stage + STEP * ROW_BYTES) + rank * WORDS;
#pragma unroll
        for (int i = 0; i < 2 * WORDS; i++) {
          if (WORDS == 1) word[i] = ((const Two*)stored)->word[i];
          else word[i] = ((const Four*)stored)[i / 4].word[i % 4];
        }
      } else if (LISTS_POWERS) {
        word[0] = *(const u32*)(share.values() + TOKENS * VALUE_STRIDE + place + rank);
      }
    }

    // of a group, in the dtype of the values
    DEVICE u32 pair(int group) const {
      if (BITS == 8) return LISTS_POWERS ? word[0] : 0x3F80 * BOTH;  // bf16: 1
      if (SCALE == VALUE) return bytes_of(word[group / 2], word[WORDS + group / 2], group % 2 ? 0x7632 : 0x5410);
      return pair_of(one(group), one(WORDS * 4 / SCALE_BYTES + group));
    }
    DEVICE float one(int i) const { return SCALE == 0 ? float_of_bits(word[i]) : widened((u16)(word[i / 2] >> i % 2 * 16), SCALE); }
  };

  // A warp's sums for tokens ``from`` ... from + AT_ONCE - 1 to shared memory: (AT_ONCE, COLUMNS) of a warp.
  DEVICE void store_sums(int from) const {
    float* to = (float*)(share.memory + AT_SUMS) + share.warp * AT_ONCE * COLUMNS;
    int g = share.lane / 4, t = share.lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      int first = output_of(tile, 0, g), second = output_of(tile, 1, g);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int token = 2 * t + i;
        const float* sums = tiles[from / 8][tile] + i;
        if (from + token >= TOKENS) continue;
        float* at = to + token * COLUMNS + place_of_sum(first, token);
        if (BITS < 16) {
          *(Two*)at = {bits_of_float(sums[0] * UNIT), bits_of_float(sums[2] * UNIT)};
        } else {
          at[0] = sums[0];
          to[token * COLUMNS + place_of_sum(second, token)] = sums[2];
        }
      }
    }
  }
};

// The sum of a segment's warps, for output i of (SEGMENTS, AT_ONCE, COLUMNS). Warps of a segment are SEGMENTS apart.
DEVICE float sum_of_warps(const Share& share, int i) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < WARPS; j++) sum += ((const float*)(share.memory + AT_SUMS))[j * SEGMENTS * AT_ONCE * COLUMNS + i];
  return sum;
}
#endif
