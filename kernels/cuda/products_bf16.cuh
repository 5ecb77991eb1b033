// Products of bf16, for any number of tokens.
//
// Unpacking is one instruction a number: a nibble q of two ranks becomes the mantissas of a pair of bf16, 128 + q, by a byte
// permutation for two ranks and one AND-XOR for each pair. They are the first operand of an m16n8k16 product; the second are
// p = value * scale of 16 ranks for 8 columns. With up to 4 tokens, and in fp16, two columns hold p rounded to bf16 and what that
// rounding left, so that products have 16 bits of mantissa; with more tokens one column holds the first alone. What 128 and the
// offset of the stored numbers add, OFFSET * sum p, is subtracted once.
//     4 bits  q = 0 ... 15 is a number plus 8                                OFFSET = 128 + 8
//     8 bits  two nibbles, 16 h + l is a number plus 128 (the sign flipped)  OFFSET = 17 * 128 + 128
// A value that is not finite would be NaN everywhere by that subtraction: then the sums of a warp are computed again, number by
// number.
#if !INTEGERS

constexpr int TILES = BITS == 4 ? 16 : 8;
constexpr float OFFSET = BITS == 4 ? 136.f : 2304.f;
DEVICE bool finite(float x) { return x - x == 0.f; }

struct Products {
  const Share& share;
  float tiles[SETS][TILES][4] = {};
  float totals[ITEMS][TOKENS] = {};  // of p, as the products see it, over a lane's entries

  // Columns of the second operand that no token uses stay zero.
  DEVICE Products(const Share& share) : share(share) {
    for (int i = share.lane; i < FACTOR_WORDS; i += LANES) share.factors()[i] = 0;
  }
  DEVICE void begin() {}
  DEVICE void prepare() {}

  template <int STAGE>
  DEVICE void multiply_step(int place) {
    make_factors<STAGE>(place);
    sync_warp();
    multiply_rows<STAGE>();
  }

  // p of 16 ranks, all groups and tokens, as the second operand of the products. Entry j of the step is at place j % 4 * 4 + j / 4,
  // so that a lane's four ranks, which are 4 apart, are neighbours.
  template <int STAGE>
  DEVICE void make_factors(int place) {
    u32 lane = share.lane, entry = lane % 16, at = entry % 4 * 4 + entry / 4;
    u16* to = (u16*)share.factors() + (GROUPS > 1 ? lane / 16 * 8 * STEP : 0) + at;
    const void* stored = share.rows() + STAGE * STAGE_BYTES + STEP * ROW_BYTES;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      if (GROUPS == 1 && lane >= 16) continue;
      float scale = BITS == 8 ? ((const float*)share.memory)[LENGTH + place + entry]
                              : read(stored, entry * GROUPS + (GROUPS > 1 ? lane / 16 : 0) + 2 * i, SCALE);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float p = value_of(share.values()[t * LENGTH + place + entry]) * scale;
        u16 high = bfloat_of_float(p);
        u16* column = to + (t / IN_SET * GROUPS + 2 * i) * 8 * STEP;
        float seen = float_of_bits((u32)high << 16);
        if (EXACT) {
          u16 rest = bfloat_of_float(p - seen);
          column[t % 4 * 2 * STEP] = high;
          column[(t % 4 * 2 + 1) * STEP] = rest;
          seen += float_of_bits((u32)rest << 16);
        } else {
          column[t % 8 * STEP] = high;
        }
        totals[i][t] += seen;
      }
    }
  }

  template <int STAGE>
  DEVICE void multiply_rows() {
    u32 g = share.lane / 4, t = share.lane % 4;
    const char* rows = share.rows() + STAGE * STAGE_BYTES;
    u32 b[SETS][GROUPS][2];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        const u32* from = share.factors() + (((set * GROUPS + group) * 8 + g) * STEP + 4 * t) / 2;
        b[set][group][0] = from[0];
        b[set][group][1] = from[1];
      }
    }
    u32 b16[SETS][2];  // 8 bits: 16 p
    if (BITS == 8) {
#pragma unroll
      for (int set = 0; set < SETS; set++) {
#pragma unroll
        for (int i = 0; i < 2; i++) b16[set][i] = times_16(b[set][0][i]);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      u32 q[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 chunk = (2 * c + g / 4) ^ 2 * t;
        q[j] = *(const u32*)(rows + j * 4 * ROW_BYTES + t * ROW_BYTES + chunk * 16 + g % 4 * 4);
      }
      const int group = c * GROUPS / 4;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        // 16 bits of each of two ranks: nibbles 4 h ... 4 h + 3
        u32 first = bytes_of(q[0], q[1], h ? 0x7632 : 0x5410), second = bytes_of(q[2], q[3], h ? 0x7632 : 0x5410);
        u32 x[4], y[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          // in 8 bits the upper nibble of a byte has the sign
          const u32 flip = BITS == 8 && e % 2 ? 0x43084308u : 0x43004300u;
          x[e] = and_xor(first >> 4 * e, 0x000F000Fu, flip);
          y[e] = and_xor(second >> 4 * e, 0x000F000Fu, flip);
        }
#pragma unroll
        for (int set = 0; set < SETS; set++) {
          if (BITS == 4) {
            u32 b0 = b[set][group][0], b1 = b[set][group][1];
            multiply(tiles[set][c * 4 + h * 2], x[0], x[1], y[0], y[1], b0, b1);
            multiply(tiles[set][c * 4 + h * 2 + 1], x[2], x[3], y[2], y[3], b0, b1);
          } else {
            multiply(tiles[set][c * 2 + h], x[0], x[2], y[0], y[2], b[set][0][0], b[set][0][1]);
            multiply(tiles[set][c * 2 + h], x[1], x[3], y[1], y[3], b16[set][0], b16[set][1]);
          }
        }
      }
    }
  }

  // Two bf16 times 16: exact, up to infinity.
  DEVICE static u32 times_16(u32 x) {
    float low = float_of_bits(x << 16) * 16.f, high = float_of_bits(x & 0xFFFF0000u) * 16.f;
    return bfloat_of_float(low) | (u32)bfloat_of_float(high) << 16;
  }

  // The sum of p over all entries, for each token and group, in every lane.
  DEVICE void add_totals() {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int apart = 1; apart < 16; apart *= 2) totals[i][t] += of_lane(totals[i][t], apart);
      }
    }
  }

  // A warp's sums for tokens ``from`` ... from + AT_ONCE - 1 to shared memory: (AT_ONCE, COLUMNS) of a warp.
  DEVICE void store_sums(int from) {
    if (from == 0) add_totals();
    float* to = (float*)(share.memory + AT_SUMS) + share.warp * AT_ONCE * COLUMNS;
    int g = share.lane / 4, t = share.lane % 4;
#pragma unroll
    for (int token = from; token < from + AT_ONCE && token < TOKENS; token++) {
      const int set = token / IN_SET;
      // exact: lane t has both columns of token t of a set; else of tokens 2 t and 2 t + 1
      bool mine = EXACT ? t == token % 4 : t == token % 8 / 2;
      bool odd = false;
      float total[GROUPS];
#pragma unroll
      for (int group = 0; group < GROUPS; group++) {
        total[group] = in_lane(totals[group / 2][token], GROUPS > 1 ? group % 2 * 16 : 0);
        odd = odd || !finite(total[group]);
      }
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        int c = BITS == 4 ? tile / 4 : tile / 2;
        int output = BITS == 4 ? c * 64 + g * 8 + tile % 4 * 2 : c * 32 + g * 4 + tile % 2 * 2;
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float* found = tiles[set][tile] + 2 * row;
          float sum = EXACT ? found[0] + found[1] : found[token % 2];
          if (mine) to[(token - from) * COLUMNS + output + row] = sum - OFFSET * total[c * GROUPS / 4];
        }
      }
      sync_warp();
      for (int o = share.lane; odd && o < COLUMNS && share.column + o < share.end(); o += LANES) {
        to[(token - from) * COLUMNS + o] = slow_sum(share, share.first, WARPS, share.column + o, token);
      }
      sync_warp();
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
