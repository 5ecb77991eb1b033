// The pipeline of a warp: pieces of rows are copied to a ring of STAGES in shared memory, and multiplied when they have arrived.

// Where a row's chunks of 16 bytes lie: chunk ^ swizzle, so that a chunk of 8 rows, which is read at once, lies in different banks.
DEVICE int swizzle(int row) { return row % 8; }

// The same for all steps of a lane: it copies 16 bytes of each of 4 ranks.
struct Copier {
  const char* w;  // of rank 0
  int size, entry, to[4];

  DEVICE Copier(const Share& share) {
    int chunk = share.lane % 8, from = share.column + chunk * (16 * 8 / BITS);
    entry = share.lane / 8 * 4;
    size = from < share.end() ? 16 : 0;
    w = kept(share.a.w + (size ? (u32)from * BITS / 8 : 0));
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = (entry + i) * ROW_BYTES + (chunk ^ swizzle(entry + i)) * 16;
  }
};

template <class Products>
struct Pipeline {
  const Share& share;
  Products& products;
  const Copier copier;

  DEVICE Pipeline(const Share& share, Products& products) : share(share), products(products), copier(share) {}

  // The ranks that a lane copies of the 16 from ``place`` on. Beyond the list they are any numbers: shared memory goes on.
  DEVICE Four ranks_at(int place) { return *(const Four*)(share.ranks() + place + copier.entry); }

  // Begin to copy the 16 listed ranks from ``place`` on.
  template <int STAGE>
  DEVICE void fetch(int place, const Four& ranks) {
    char* stage = share.rows() + STAGE * STAGE_BYTES;
    bool there = place < share.listed;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // weights in 16 bits may be infinite, and times 0 NaN: where the list ends within the step they are zeros
      int size = BITS == 16 && place + copier.entry + i >= share.listed ? 0 : copier.size;
      copy_if<16>(there, stage + copier.to[i], copier.w + (u64)ranks.word[i] * share.a.w_row, size);
    }
    if constexpr (BITS == 4 && !INTEGERS) products.fetch_scales(stage + STEP * ROW_BYTES, place);
    close_copies();
  }

  template <int STAGE>
  DEVICE void step(int place) {
    int next = place + (STAGES - 1) * STEP * WARPS;
    Four ranks = ranks_at(next);  // read while the copies arrive
    wait_for_copies<STAGES - 2>();
    sync_warp();
    // into the stage that was multiplied in the step before
    fetch<(STAGE + STAGES - 1) % STAGES>(next, ranks);
    products.template multiply_step<STAGE>(place);
  }

  template <int STAGE>
  DEVICE void steps(int place) {
    if constexpr (STAGE < STAGES) {
      if (place < share.listed) {
        step<STAGE>(place);
        steps<STAGE + 1>(place + STEP * WARPS);
      }
    }
  }

  template <int STAGE>
  DEVICE void first_fetches(int place) {
    if constexpr (STAGE < STAGES - 1) {
      fetch<STAGE>(place, ranks_at(place));
      first_fetches<STAGE + 1>(place + STEP * WARPS);
    }
  }

  DEVICE void begin() { first_fetches<0>(share.first * STEP); }
  DEVICE void run() {
    for (int place = share.first * STEP; place < share.listed; place += STAGES * STEP * WARPS) steps<0>(place);
    wait_for_copies<0>();
  }
};
