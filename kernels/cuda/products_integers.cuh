// Products of integers, for 1 and 2 tokens: tensor cores multiply numbers of the weight, as signed bytes, by the digits of P.
//
// The first operand of an m16n8k32 product has 16 ranks and 16 pairs of bytes of their rows, as transposed loads of 16 bits from
// shared memory give them: along k a rank has two neighbouring bytes. The second operand has the four digits of P in columns 0 to 3
// beside the first byte of a pair, with zeros beside the second, and in columns 4 to 7 the reverse: one product gives the sums of both
// bytes by all digits. In 8 bits bytes are multiplied as they are stored. In 4 bits they are split: a nibble q = number + 8 in the
// upper half of a byte, its upper bit flipped, is 16 times the number.
#if INTEGERS

constexpr int PARTS = BITS == 4 ? 2 : 1;  // outputs of a byte

struct Products {
  const Share& share;
  int tiles[TOKENS][4][PARTS][4] = {};
  float inverse[TOKENS];
  int from[4];         // where a lane's rows of a transposed load begin in a stage, for each two chunks of 16 bytes
  u32 selector, mask;  // of a lane's digit and byte

  DEVICE Products(const Share& share) : share(share) {
    int lane = share.lane, row = lane % 8 + lane / 16 * 8, digit = lane / 4 % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) from[i] = row * ROW_BYTES + ((2 * i + lane / 8 % 2) ^ swizzle(row)) * 16;
    selector = 0x4400 + 0x1111 * digit;
    mask = kept(lane < 16 ? 0x00FF00FFu : 0xFF00FF00u);
  }

  // 4 bits: the scales of a warp's entries lie as in the list, (LENGTH, GROUPS) for each segment.
  DEVICE char* scales(int place) const { return share.memory + AT_SCALES + (share.segment * LENGTH + place) * GROUPS * SCALE_BYTES; }

  // Calls f(place, part) for the SCALE_UNIT bytes of scales that this lane copies, four at a time so that reads overlap. Beyond
  // the last step the first entry is repeated.
  template <class F>
  DEVICE void for_scales(F f) const {
    constexpr u32 UNITS = GROUPS * SCALE_BYTES / SCALE_UNIT, AT_A_TIME = 4;
    u32 start = share.first * STEP, last = share.listed, steps = last > start ? (last - start - 1) / (STEP * WARPS) + 1 : 0;
    for (u32 i = share.lane; i < steps * STEP * UNITS; i += LANES * AT_A_TIME) {
#pragma unroll
      for (u32 j = 0; j < AT_A_TIME; j++) {
        u32 entry = (i + j * LANES) / UNITS, place = entry / STEP * (STEP * WARPS) + start + entry % STEP;
        f(entry < steps * STEP ? place : start, (i + j * LANES) % UNITS);
      }
    }
  }

  // The largest |scale| of SCALE_UNIT bytes. The compared bits order as in magnitude().
  DEVICE static float largest_scale(const char* at) {
    struct alignas(SCALE_UNIT) Unit {
      u32 word[SCALE_UNIT / 4];
    } unit = *(const Unit*)at;
    u32 most = 0;
#pragma unroll
    for (int j = 0; j < SCALE_UNIT / 4; j++) {
      u32 x = unit.word[j];
      most = SCALE_BYTES == 4 ? max(most, x & 0x7FFFFFFFu) : max(max(most, x << 16 & 0x7FFF0000u), x & 0x7FFF0000u);
    }
    return SCALE == 2 ? float_of_half((u16)(most >> 16)) : float_of_bits(most);
  }

  // Begins to copy the scales of all entries, before the first rows.
  DEVICE void begin() {
    if (BITS == 8) return;
    for_scales([&](u32 place, u32 part) {
      bool there = (int)place < share.listed;
      copy_scales(share, scales(place) + part * SCALE_UNIT, there ? place : 0, part, there);
    });
    close_copies();
  }

  // Finds the largest factor, while the first rows arrive. All threads of the block call it.
  DEVICE void prepare() {
    if (BITS == 8) return;
    u32 most[TOKENS] = {};
    if (share.column < share.end()) {
      wait_for_copies<STAGES - 1>();
      for_scales([&](u32 place, u32 part) {
        float scale = largest_scale(scales(place) + part * SCALE_UNIT);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) most[t] = max(most[t], magnitude(value_of(share.values()[t * LENGTH + place]) * scale));
      });
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) store_largest(share.memory, t, most[t]);
    sync_block();
#pragma unroll
    for (int t = 0; t < TOKENS; t++) inverse[t] = fixed_point(share.memory, t).inverse;
  }

  template <int STAGE>
  DEVICE void multiply_step(int place) {
    if (BITS == 4) {
      make_factors(place);
      sync_warp();
    }
    multiply_rows(share.rows() + STAGE * STAGE_BYTES, place);
  }

  // P of 16 ranks, all groups and tokens. Half a warp makes those of ITEMS neighbouring groups: (TOKENS, ITEMS, 2, STEP), so that the
  // halves write to different banks.
  DEVICE void make_factors(int place) {
    int entry = share.lane % 16, half = share.lane / 16;
    u32* to = share.factors() + half * STEP + slot_of(entry);
    const char* stored = scales(place + entry) + half * ITEMS * SCALE_BYTES;
    // all reads before all writes, which the compiler may not exchange
    float scale[ITEMS], value[TOKENS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) scale[i] = read(stored, i, SCALE);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) value[t] = value_of(share.values()[t * LENGTH + place + entry]);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int i = 0; i < ITEMS; i++) to[(t * ITEMS + i) * 2 * STEP] = digits_of(value[t] * scale[i], inverse[t]);
    }
  }

  // The second operand of the products by ranks of a step, for a token and group.
  DEVICE void load_factors(u32 (&b)[2], int place, int token, int group) const {
    const u32* factors = BITS == 8 ? (const u32*)(share.memory + AT_VALUES) + token * LENGTH + place
                                   : share.factors() + ((token * ITEMS + group % ITEMS) * 2 + group / ITEMS) * STEP;
    Four four = *(const Four*)(factors + share.lane % 4 * 4);
    b[0] = bytes_of(four.word[0], four.word[1], selector) & mask;
    b[1] = bytes_of(four.word[2], four.word[3], selector) & mask;
  }

  DEVICE void multiply_rows(const char* rows, int place) {
    u32 x[4][4], b[TOKENS][2];
#pragma unroll
    for (int i = 0; i < 4; i++) load_transposed(x[i], rows + from[i]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i % (4 / GROUPS) == 0) {
#pragma unroll
        for (int t = 0; t < TOKENS; t++) load_factors(b[t], place, t, i * GROUPS / 4);
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        u32 q[4];
#pragma unroll
        for (int j = 0; j < 4; j++) q[j] = BITS == 8 ? x[i][j] : and_xor(part ? x[i][j] : x[i][j] << 4, 0xF0F0F0F0u, 0x80808080u);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) multiply(tiles[t][i][part], q, b[t]);
      }
    }
  }

  // A warp's sums of digits to shared memory: (TOKENS, COLUMNS, 4) of a warp.
  DEVICE void store_sums(int) const {
    int g = share.lane / 4, byte = share.lane / 2 % 2, digits = share.lane % 2 * 2;
    int* to = (int*)(share.memory + AT_SUMS) + share.warp * TOKENS * COLUMNS * 4 + digits;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          int output = ((i * 8 + g) * 2 + byte) * PARTS + part;
          const int* sums = tiles[t][i / 2][part] + i % 2 * 2;
          *(Two*)(to + (t * COLUMNS + output) * 4) = {(u32)sums[0], (u32)sums[1]};
        }
      }
    }
  }
};

// The sum of a segment's warps, for output i of (SEGMENTS, TOKENS, COLUMNS). Warps of a segment are SEGMENTS apart.
DEVICE float sum_of_warps(const Share& share, int i) {
  int token = i / COLUMNS % TOKENS;
  FixedPoint point = fixed_point(share.memory, token);
  if (point.odd) {
    int start = first_column(share.a, share.block, i / (TOKENS * COLUMNS)), column = start + i % COLUMNS;
    return column < end_of(share.a, start) ? slow_sum(share, 0, 1, column, token) : 0.f;
  }
  int sum[4] = {};
#pragma unroll
  for (int j = 0; j < WARPS; j++) {
    Four found = ((const Four*)(share.memory + AT_SUMS))[j * SEGMENTS * TOKENS * COLUMNS + i];
#pragma unroll
    for (int d = 0; d < 4; d++) sum[d] += (int)found.word[d];
  }
  return number_of(sum) * (BITS == 4 ? point.unit / 16.f : point.unit);
}
#endif
