// The names of kernels/cuda/primitives.cuh on a CPU: a cluster's threads are coroutines that run in turn up to where they wait for
// each other. Slow, and stricter than a GPU in two ways: shared memory begins as NaN, and an asynchronous copy is made as late as
// the waits allow.
#pragma once
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define DEVICE inline
#define KERNEL extern "C"
#define CLUSTER(blocks)
#define BOUNDS(threads, blocks)
#define CONSTANT const

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};
struct Block {
  std::vector<char> memory;
  Barrier barrier;
};
struct WarpState {
  Barrier barrier;
  u32 words[32][6];
};
struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index, block;
  bool done = false;
  std::deque<std::vector<Copy>> copies;
};
struct Cluster {
  std::vector<Block> blocks;
  std::vector<WarpState> warps;
  std::vector<Thread> threads;
  Barrier barrier;
  int first_block = 0, threads_of_block = 0;
  ucontext_t scheduler;
  Thread* current = nullptr;
};
inline Cluster* cluster = nullptr;

inline void wait_at(Barrier& b) {
  int generation = b.generation;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    b.generation++;
  }
  while (b.generation == generation) swapcontext(&cluster->current->context, &cluster->scheduler);
}
inline WarpState& warp_state() {
  Thread& t = *cluster->current;
  return cluster->warps[(t.block * cluster->threads_of_block + t.index) / 32];
}
inline u32 max(u32 x, u32 y) { return x > y ? x : y; }
inline int lane_index() { return cluster->current->index % 32; }

inline int thread_index() { return cluster->current->index; }
inline int block_index() { return cluster->first_block + cluster->current->block; }
inline char* shared_memory() { return cluster->blocks[cluster->current->block].memory.data(); }
inline void sync_block() { wait_at(cluster->blocks[cluster->current->block].barrier); }
inline void sync_warp() { wait_at(warp_state().barrier); }
inline u32 ballot(bool p) {
  WarpState& w = warp_state();
  w.words[lane_index()][0] = p;
  sync_warp();
  u32 all = 0;
  for (int i = 0; i < 32; i++) all |= w.words[i][0] << i;
  sync_warp();
  return all;
}
inline u32 largest_in_warp(u32 x) {
  WarpState& w = warp_state();
  w.words[lane_index()][0] = x;
  sync_warp();
  u32 most = 0;
  for (int i = 0; i < 32; i++) most = max(most, w.words[i][0]);
  sync_warp();
  return most;
}
inline int ones(u32 x) { return __builtin_popcount(x); }
inline u32 bytes_of(u32 a, u32 b, u32 selector) {
  u64 both = (u64)b << 32 | a;
  u32 d = 0;
  for (int i = 0; i < 4; i++) d |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return d;
}
inline u32 and_xor(u32 a, u32 b, u32 c) { return (a & b) ^ c; }
template <class To, class From>
inline To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float float_of_bits(u32 x) { return same_bits<float>(x); }
inline u32 bits_of_float(float x) { return same_bits<u32>(x); }
inline int nearest_integer(float x) {
  if (x != x) return 0;  // as a GPU converts it
  return x >= 2147483648.f ? 0x7FFFFFFF : x <= -2147483648.f ? -0x7FFFFFFF - 1 : (int)std::nearbyint(x);
}
inline float float_of_half(u16 x) { return (float)same_bits<_Float16>(x); }
inline u16 half_of_float(float x) { return same_bits<u16>((_Float16)x); }
inline u16 bfloat_of_float(float x) {
  if (x != x) return 0x7FFF;
  u32 y = bits_of_float(x);
  return (u16)((y + 0x7FFF + (y >> 16 & 1)) >> 16);
}
inline float exponential(float x) { return std::exp(x); }
inline float error_function(float x) { return std::erf(x); }
inline float inverse_root(float x) { return 1.f / std::sqrt(x); }
inline float sum_in_warp(float x) {
  WarpState& w = warp_state();
  for (int apart = 16; apart; apart /= 2) {
    w.words[lane_index()][0] = bits_of_float(x);
    sync_warp();
    x += float_of_bits(w.words[lane_index() ^ apart][0]);
    sync_warp();
  }
  return x;
}
template <int WORDS, bool CHECKED>
inline void read_once(u32 (&to)[WORDS], const char* from, bool there) {
  if (CHECKED && !there) {
    std::memset(to, 0, sizeof to);
    return;
  }
  if ((std::uintptr_t)from % sizeof to) std::abort();
  std::memcpy(to, from, sizeof to);
}

// one number of a pair
inline double part(u32 word, int upper) {
  u16 x = (u16)(word >> 16 * upper);
  return VALUE == 1 ? float_of_bits((u32)x << 16) : float_of_half(x);
}
// both are exact in fp32 before they are rounded here, unless they are far apart
inline u32 pair_of(float low, float high) {
  return VALUE == 1 ? bfloat_of_float(low) | (u32)bfloat_of_float(high) << 16 : half_of_float(low) | (u32)half_of_float(high) << 16;
}
inline u32 product(u32 a, u32 b) { return pair_of((float)(part(a, 0) * part(b, 0)), (float)(part(a, 1) * part(b, 1))); }
inline u32 product_plus(u32 a, u32 b, u32 c) {
  return pair_of((float)(part(a, 0) * part(b, 0) + part(c, 0)), (float)(part(a, 1) * part(b, 1) + part(c, 1)));
}
inline void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  WarpState& w = warp_state();
  u32 mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::memcpy(w.words[lane_index()], mine, sizeof mine);
  sync_warp();
  int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; i++) {
    int upper = i / 2, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      u32 a = w.words[g * 4 + k % 8 / 2][k / 8 * 2 + upper], b = w.words[column * 4 + k % 8 / 2][4 + k / 8];
      sum += part(a, k % 2) * part(b, k % 2);
    }
    c[i] = (float)sum;
  }
  sync_warp();
}
inline void multiply(int (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  WarpState& w = warp_state();
  u32 mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  std::memcpy(w.words[lane_index()], mine, sizeof mine);
  sync_warp();
  auto part = [](u32 word, int byte) { return (int)(signed char)(word >> 8 * byte & 255); };
  int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; i++) {
    int upper = i / 2, column = 2 * t + i % 2;
    for (int k = 0; k < 32; k++) {
      u32 x = w.words[g * 4 + k % 16 / 4][k / 16 * 2 + upper], y = w.words[column * 4 + k % 16 / 4][4 + k / 16];
      c[i] += part(x, k % 4) * part(y, k % 4);
    }
  }
  sync_warp();
}
inline void load_transposed(u32 (&x)[4], const void* row) {
  WarpState& w = warp_state();
  if ((std::uintptr_t)row % 16) std::abort();
  std::memcpy(w.words[lane_index()], row, 16);
  sync_warp();
  int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; i++) {
    auto number = [&](int from) { return w.words[i * 8 + from][g / 2] >> g % 2 * 16 & 0xFFFF; };
    x[i] = number(2 * t) | number(2 * t + 1) << 16;
  }
  sync_warp();
}

template <class T>
inline T kept(T x) {
  return x;
}
template <int BYTES>
inline void copy(void* to, const void* from, int size) {
  auto& open = cluster->current->copies;
  if (open.empty()) open.emplace_back();
  if ((std::uintptr_t)from % BYTES || (std::uintptr_t)to % BYTES) std::abort();  // as the GPU does
  open.back().push_back({to, from, BYTES, size});
}
template <int BYTES>
inline void copy_if(bool there, void* to, const void* from, int size) {
  if (there) copy<BYTES>(to, from, size);
}
inline void close_copies() {
  auto& open = cluster->current->copies;
  if (open.empty()) open.emplace_back();
  open.emplace_back();
}
template <int OPEN>
inline void wait_for_copies() {
  auto& open = cluster->current->copies;
  // the last group is not closed
  while ((int)open.size() - 1 > OPEN) {
    for (Copy& c : open.front()) {
      std::memset(c.to, 0, c.bytes);
      std::memcpy(c.to, c.from, c.size);
    }
    open.pop_front();
  }
}
// What the previous kernel writes, which is there once it is waited for.
struct Late {
  void* to;
  const void* from;
  size_t size;
};
inline Late late = {};
inline void wait_for_previous_kernel() { std::memcpy(late.to, late.from, late.size); }
inline void start_next_kernel() {}
inline void sync_cluster() { wait_at(cluster->barrier); }
inline void sync_cluster_after_reads() { wait_at(cluster->barrier); }
inline float of_block(const float* p, int rank) {
  Block& mine = cluster->blocks[cluster->current->block];
  return *(const float*)(cluster->blocks[rank].memory.data() + ((const char*)p - mine.memory.data()));
}

// Run ``kernel`` in every thread of every block.
template <class F>
void run_on_cluster(int grid, int blocks, int threads, int shared_bytes, F kernel) {
  static F* body;
  body = &kernel;
  for (int first = 0; first < grid; first += blocks) {
    Cluster mine;
    cluster = &mine;
    mine.first_block = first;
    mine.threads_of_block = threads;
    mine.blocks.resize(blocks);
    mine.warps.resize(blocks * threads / 32);
    mine.threads.resize(blocks * threads);
    mine.barrier.expected = blocks * threads;
    for (auto& w : mine.warps) w.barrier.expected = 32;
    for (auto& b : mine.blocks) {
      b.memory.assign(shared_bytes, (char)0xFF);
      b.barrier.expected = threads;
    }
    for (int i = 0; i < (int)mine.threads.size(); i++) {
      Thread& t = mine.threads[i];
      t.index = i % threads;
      t.block = i / threads;
      t.stack = std::make_unique<char[]>(1 << 16);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = 1 << 16;
      t.context.uc_link = &mine.scheduler;
      makecontext(&t.context, (void (*)()) + [] { (*body)(); cluster->current->done = true; }, 0);
    }
    for (bool left = true; left;) {
      left = false;
      for (Thread& t : mine.threads) {
        if (t.done) continue;
        left = true;
        mine.current = &t;
        swapcontext(&mine.scheduler, &t.context);
      }
    }
  }
}
