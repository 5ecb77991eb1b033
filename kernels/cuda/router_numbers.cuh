// Weights as first operands of products, in the dtype of x. Numbers in 4 and 8 bits are exact in it: scales come later, to sums.
//
// Unpacking is one AND-XOR for two numbers, whose stored form u is the number plus 8 or, with the sign of a byte flipped, 128, then one
// multiply-add for two. The bits of u, up to 255, are a pair of subnormal numbers, in bf16 u * 2^-133 and in fp16 u * 2^-24, whose
// multiples are evenly spaced that far: times 2^127 or 2^15 they are u / 64 or u / 512, from which 8 or 128 times that is subtracted,
// all exactly. An upper nibble stays where it is, as 16 u. That is 1.1 instructions for each number in 4 bits, 1.3 in 8.

constexpr u32 BOTH = 0x00010001u;  // times 16 bits: a pair of them
constexpr u32 LOWER = (VALUE == 1 ? 0x7F00 : 0x7800) * BOTH, UPPER = (VALUE == 1 ? 0x7D00 : 0x6800) * BOTH;  // 2^127, 2^123; 2^15, 2^11
// -8 / 64, -128 / 64; -8 / 512, -128 / 512
constexpr u32 OFFSET = (VALUE == 1 ? (BITS == 4 ? 0xBE00 : 0xC000) : (BITS == 4 ? 0xA400 : 0xB400)) * BOTH;

// Eight numbers of a row, from the words that hold them, as four pairs in the order of router_values.cuh.
DEVICE void unpack(u32 (&pair)[4], const u32* word) {
  if (BITS == 16) {
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = word[i];
  } else if (BITS == 8) {
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = product_plus(and_xor(word[i / 2] >> i % 2 * 8, 0x00FF * BOTH, 0x0080 * BOTH), LOWER, OFFSET);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 u = (word[0] >> i / 2 * 8) & (i % 2 ? 0x00F0 : 0x000F) * BOTH;
      pair[i] = product_plus(u, i % 2 ? UPPER : LOWER, OFFSET);
    }
  }
}

// Weights of some turns of a warp, and the sums of their products with all tokens.
struct Products {
  const Share& share;
  u32 held[AHEAD][TILES][2][WORDS];
  float sums[TILES][SETS][CHAINS][4] = {};
  const char* w;             // of the lane's first row and column
  const char* values[SETS];  // the lane's token in its first chunk; without a token those of the last, for no output

  DEVICE Products(const Share& share) : share(share) {
    int g = share.lane / 4, t = share.lane % 4, unit = share.warp * TURN_UNITS;
    w = share.a.w + (long long)(share.first + unit * UNIT + t * NUMBERS) * BITS / 8;
    if (PAIRED) unit += g / 4;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
      int token = PAIRED ? g % 4 : set * 8 + g;
      values[set] = share.x(token < TOKENS ? token : TOKENS - 1) + (unit * (UNIT / 8) + t) * 16;
    }
  }

  // The unit and the row, of the block's, that a lane has in half of a tile.
  DEVICE int unit_of(int turn, int half) const { return (turn * WARPS + share.warp) * TURN_UNITS + (PAIRED ? half : 0); }
  DEVICE int row_of(int tile, int half) const { return tile * 16 + (PAIRED ? 0 : half * 8) + share.lane / 4; }

  // Begins to read the weights of a turn.
  DEVICE void fetch(u32 (&to)[TILES][2][WORDS], int turn) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int unit = unit_of(turn, half), from = turn * (WARPS * TURN_UNITS) + (PAIRED ? half : 0);
        bool there = share.there(unit * UNIT + share.lane % 4 * NUMBERS);
        long long row = share.weight_row(row_of(tile, half));
        read_once<WORDS, !WHOLE>(to[tile][half], w + row * share.a.w_row + from * (UNIT * BITS / 8), there);
      }
    }
  }
  DEVICE void begin() {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(held[i], i);
  }

  DEVICE void run() {
    if (AHEAD == TURNS) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++) multiply_turn(held[i], i);
      return;
    }
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn += AHEAD) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (turn + i < TURNS) multiply_turn(held[i], turn + i);
        if (turn + i + AHEAD < TURNS) fetch(held[i], turn + i + AHEAD);
      }
    }
  }

  DEVICE void multiply_turn(const u32 (&from)[TILES][2][WORDS], int turn) {
    if (BITS != 4) return multiply_unit(sums, from, turn);
    float group[TILES][SETS][CHAINS][4] = {};
    multiply_unit(group, from, turn);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float scale = read(share.memory + AT_SCALES + row_of(tile, half) * SCALE_ROW_BYTES, unit_of(turn, half), SCALE);
#pragma unroll
        for (int set = 0; set < SETS; set++) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) {
            float sum = group[tile][set][0][i];
            if (CHAINS == 2) sum += group[tile][set][CHAINS - 1][i];
            sums[tile][set][0][i] += sum * scale;
          }
        }
      }
    }
  }

  // Lane t of four multiplies its own NUMBERS columns of a unit, four at a time.
  DEVICE void multiply_unit(float (&to)[TILES][SETS][CHAINS][4], const u32 (&from)[TILES][2][WORDS], int turn) {
#pragma unroll
    for (int chunk = 0; chunk < NUMBERS / 8; chunk++) {
      Four x[SETS];
#pragma unroll
      for (int set = 0; set < SETS; set++) x[set] = *(const Four*)(values[set] + (turn * (WARPS * TURN_UNITS) * (UNIT / 8) + chunk * 4) * 16);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        u32 pair[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) unpack(pair[half], from[tile][half] + chunk * (BITS / 4));
#pragma unroll
        for (int step = 0; step < 2; step++) {
          u32 a[4] = {pair[0][2 * step], pair[1][2 * step], pair[0][2 * step + 1], pair[1][2 * step + 1]};
#pragma unroll
          for (int set = 0; set < SETS; set++) {
            u32 b[2] = {x[set].word[2 * step], x[set].word[2 * step + 1]};
            multiply(to[tile][set][step % CHAINS], a, b);
          }
        }
      }
    }
  }

  // A warp's sums to shared memory: (TOKENS, ROWS) of a warp, or of each of its two units.
  DEVICE void store() const {
    int t = share.lane % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int set = 0; set < SETS; set++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int half = i / 2, token = set * 8 + 2 * t + i % 2;
          if (PAIRED && t / 2 != half) continue;
          if (PAIRED) token %= 4;
          float sum = sums[tile][set][0][i];
          if (CHAINS == 2 && BITS != 4) sum += sums[tile][set][CHAINS - 1][i];
          float* to = share.sums() + (PAIRED ? share.warp * 2 + half : share.warp) * TOKENS * ROWS;
          if (token < TOKENS) to[token * ROWS + row_of(tile, half)] = sum;
        }
      }
    }
  }
};
