// x of all tokens in shared memory, in the order in which products take it; with a norm in front, times its gain and with sums of
// squares beside.
//
// A unit of columns is reordered: the j-th eight numbers of lane t's NUMBERS are chunk 4 j + t, so that four lanes read 64 neighbouring
// bytes. Within a chunk, numbers are in the order in which router_numbers.cuh unpacks pairs.

// The column, from the block's first, of a chunk's first number.
DEVICE int column_of(int chunk) {
  int unit = chunk / (UNIT / 8), place = chunk % (UNIT / 8);
  return unit * UNIT + place % 4 * NUMBERS + place / 4 * 8;
}

// Reads what the previous kernel does not write: the gain of a thread's own chunks, and scales.
DEVICE void begin_constants(const Share& share) {
  const Arguments& a = share.a;
  int thread = thread_index();
  if (BITS == 8) {
    for (int i = thread; i < ROWS; i += THREADS) {
      ((float*)(share.memory + AT_SCALES))[i] = read(a.scale, share.weight_row(i) * a.scale_row, SCALE);
    }
  }
  if (BITS == 4) {
    // TAKEN scales of each row, SCALE_UNIT bytes at a time
    constexpr int EACH = SCALE_UNIT / SCALE_BYTES, PIECES = (TAKEN + EACH - 1) / EACH, GROUPS = (COLUMNS + GROUP - 1) / GROUP;
    for (int i = thread; i < ROWS * PIECES; i += THREADS) {
      int place = i % PIECES * EACH, group = share.split * PART + place;
      int left = GROUPS - group < PART - place ? GROUPS - group : PART - place;
      char* to = share.memory + AT_SCALES + i / PIECES * SCALE_ROW_BYTES + i % PIECES * SCALE_UNIT;
      long long from = share.weight_row(i / PIECES) * a.scale_row + (left > 0 ? group : 0) * a.scale_group;
      if constexpr (SCALE_UNIT >= 4) {
        copy<SCALE_UNIT>(to, (const char*)a.scale + from * SCALE_BYTES, (left < 0 ? 0 : left < EACH ? left : EACH) * SCALE_BYTES);
      } else {
        *(u16*)to = left > 0 ? ((const u16*)a.scale)[from] : (u16)0;
      }
    }
  }
  if (GAIN >= 0) {
    for (int chunk = thread; chunk < CHUNKS; chunk += THREADS) {
      int column = column_of(chunk);
      float* to = (float*)(share.memory + AT_GAIN) + chunk * 8;
      // columns that are not there have x = 0
#pragma unroll
      for (int i = 0; i < 8; i++) to[i] = share.there(column) ? read(a.gain, (share.first + column + i) * a.gain_column, GAIN) + a.offset : 0.f;
    }
  }
}

// Copies a thread's own chunks of x: those that it will reorder, so that no other thread waits for them.
DEVICE void copy_values(const Share& share) {
  const Arguments& a = share.a;
  for (int chunk = thread_index(); chunk < CHUNKS; chunk += THREADS) {
    int column = column_of(chunk);
    bool there = share.there(column);
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
      char* to = share.x(token) + chunk * 16;
      const u16* from = (const u16*)a.x + token * a.x_token + (there ? share.first + column : 0) * a.x_column;
      if (WIDE) {
        copy<16>(to, from, there ? 16 : 0);
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) ((u16*)to)[i] = there ? from[i * a.x_column] : (u16)0;
      }
    }
  }
  close_copies();
  wait_for_copies<0>();
}

// Number i of a chunk, of those that are next to each other after reordering: pairs (0, 4), (1, 5), ... in 4 bits, in 8 bits (0, 2), ...
constexpr int source_of(int i) {
  return BITS == 4 ? i / 2 + i % 2 * 4 : BITS == 8 ? i / 4 * 4 + i % 4 / 2 + i % 2 * 2 : i;
}

DEVICE float number(const Four& chunk, int i) { return widened((u16)(chunk.word[i / 2] >> i % 2 * 16), VALUE); }

DEVICE Four reordered(const Four& x) {
  Four y;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int low = source_of(2 * i), high = source_of(2 * i + 1);
    y.word[i] = bytes_of(x.word[low / 2], x.word[high / 2], (low % 2 ? 0x32 : 0x10) + (high % 2 ? 0x7600 : 0x5400));
  }
  return y;
}

// Sums of squares of a warp's chunks, for each token.
DEVICE void store_squares(const Share& share, const float (&squares)[TOKENS]) {
#pragma unroll
  for (int token = 0; token < TOKENS; token++) {
    float sum = sum_in_warp(squares[token]);
    if (share.lane == 0) share.squares()[token * WARPS + share.warp] = sum;
  }
}

// Calls f(chunk, token, x, gains) for a thread's chunks, of which a few are read before any is given to f, which may write there.
constexpr int ABREAST = TOKENS >= 4 ? 1 : 4 / TOKENS;
struct Gains {
  FourFloats low, high;
};
template <class F>
DEVICE void for_chunks(const Share& share, F f) {
#pragma unroll 1
  for (int first = thread_index(); first < CHUNKS; first += THREADS * ABREAST) {
    auto there = [&](int i) { return CHUNKS % (THREADS * ABREAST) == 0 || first + i * THREADS < CHUNKS; };
    Gains gains[ABREAST];
#pragma unroll
    for (int i = 0; i < ABREAST; i++) {
      if (GAIN >= 0 && there(i)) gains[i] = ((const Gains*)(share.memory + AT_GAIN))[first + i * THREADS];
    }
#pragma unroll
    for (int from = 0; from < TOKENS; from += 4) {
      Four x[ABREAST][4];
#pragma unroll
      for (int i = 0; i < ABREAST * 4; i++) {
        int token = from + i % 4, chunk = first + i / 4 * THREADS;
        if (token < TOKENS && there(i / 4)) x[i / 4][i % 4] = *(const Four*)(share.x(token) + chunk * 16);
      }
#pragma unroll
      for (int i = 0; i < ABREAST * 4; i++) {
        int token = from + i % 4, chunk = first + i / 4 * THREADS;
        if (token < TOKENS && there(i / 4)) f(chunk, token, x[i / 4][i % 4], gains[i / 4]);
      }
    }
  }
}

DEVICE void add_squares(float& sum, const Four& x) {
#pragma unroll
  for (int i = 0; i < 8; i++) sum += number(x, i) * number(x, i);
}

// Replaces the copied numbers by those that are multiplied. Other threads may read them after a barrier. FACTORS: each token's is at hand.
template <bool FACTORS>
DEVICE void reorder_values(const Share& share) {
  if (BITS == 16 && !NORM) return;
  float squares[TOKENS] = {};
  for_chunks(share, [&](int chunk, int token, const Four& x, const Gains& gains) {
    Four& stored = *(Four*)(share.x(token) + chunk * 16);
    if (NORM && !FACTORS) add_squares(squares[token], x);
    if (GAIN < 0) {
      stored = reordered(x);
      return;
    }
    float factor = FACTORS ? share.factors()[token] : 1.f;
    // rounded once, as the normed input of a dense matmul is
    auto scaled = [&](int i) { return number(x, i) * factor * (i < 4 ? gains.low : gains.high).at[i % 4]; };
#pragma unroll
    for (int i = 0; i < 4; i++) stored.word[i] = pair_of(scaled(source_of(2 * i)), scaled(source_of(2 * i + 1)));
  });
  if (NORM && !FACTORS) store_squares(share, squares);
}

DEVICE void square_values(const Share& share) {
  float squares[TOKENS] = {};
  for_chunks(share, [&](int, int token, const Four& x, const Gains&) { add_squares(squares[token], x); });
  store_squares(share, squares);
}

// After a barrier: a block's sum of squares of a token; with several blocks where they all find it, after a barrier of the cluster.
DEVICE float sum_of_squares(const Share& share, int token) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < WARPS; j++) sum += share.squares()[token * WARPS + j];
  return sum;
}
DEVICE void publish_squares(const Share& share) {
  int thread = thread_index();
  if (NORM && SPLITS > 1 && thread < TOKENS) share.squares()[thread * WARPS] = sum_of_squares(share, thread);
}
// 1 / sqrt(mean x^2 + eps)
DEVICE float factor_of_norm(const Share& share, int token) {
  float sum = 0.f;
  if (SPLITS == 1) sum = sum_of_squares(share, token);
#pragma unroll
  for (int r = 0; SPLITS > 1 && r < SPLITS; r++) sum += of_block(share.squares() + token * WARPS, r);
  return inverse_root(sum * (1.f / COLUMNS) + share.a.eps);
}
