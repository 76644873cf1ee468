// Runs the CUDA C++ of mhc_layers/kernels/cuda on the host, one block at a time, by fibres.hpp.
//
// The instructions of ptx.cuh are replaced by their definitions. Asynchronous copies happen at the earliest moment the
// program allows (at the copy) or at the latest (when the wait for their group returns): a kernel must be right under both,
// or it reads a tile that may not have arrived, or overwrites one that is in use.
#include <algorithm>
#include <cmath>
#include <deque>

#include "fibres.hpp"

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned out = 0;
  for (int k = 0; k < 4; k++) out |= (unsigned)(both >> (8 * (selector >> (4 * k) & 7)) & 0xff) << (8 * k);
  return out;
}
using std::min;

struct Copy { void* to; const void* from; int bytes; bool valid; };
struct Copies {
  std::vector<Copy> open;                // not yet committed
  std::deque<std::vector<Copy>> groups;  // committed and pending
};
std::vector<Copies> copies;  // of each fibre
bool copies_late = false;

template <class Kernel> void launch(unsigned x, unsigned y, int threads, bool late, Kernel kernel) {
  gridDim.x = x, gridDim.y = y, copies_late = late, body = kernel;
  for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
    for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++) copies.assign(threads, {}), run_block(threads);
}

// ---- the instructions of ptx.cuh

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
#define DEVICE static inline

DEVICE u32 to_bf16(float f) {
  const u32 w = __float_as_uint(f);
  return f != f ? 0x7fffu : (w + 0x7fffu + (w >> 16 & 1)) >> 16;
}
DEVICE u32 pack(float l, float h) { return to_bf16(l) | to_bf16(h) << 16; }
DEVICE float bf16(u32 word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

DEVICE void perform(const Copy& copy) {
  if (copy.valid) std::memcpy(copy.to, copy.from, copy.bytes);
  else std::memset(copy.to, 0, copy.bytes);
}
template <int BYTES> DEVICE void copy_async(void* to, const void* from, bool valid) {
  const Copy copy = {to, from, BYTES, valid};
  if (copies_late && BYTES > 2) copies[current].open.push_back(copy);
  else perform(copy);
}
DEVICE void copy_async(void* to, const void* from) { copy_async<16>(to, from, true); }
DEVICE void prefetch(const void*) {}
DEVICE void copies_commit() {
  auto& mine = copies[current];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int PENDING> DEVICE void copies_wait() {
  auto& groups = copies[current].groups;
  for (; (int)groups.size() > PENDING; groups.pop_front())
    for (const Copy& copy : groups.front()) perform(copy);
}

struct Lane { u32 a[4], b[2]; const void* row; };
Operands<Lane> operands;

DEVICE void load_matrices(u32* words, const void* row) {
  auto& lanes = exchange(operands, {{}, {}, row});
  const int q = current % 4, p = current % 32 / 4;
  for (int m = 0; m < 4; m++) std::memcpy(words + m, (const char*)lanes[8 * m + p].row + 4 * q, 4);
}

DEVICE void load_transposed(u32* words, const void* row) {
  auto& lanes = exchange(operands, {{}, {}, row});
  const int q = current % 4, p = current % 32 / 4;
  for (int m = 0; m < 4; m++)
    for (int h = 0; h < 2; h++)
      std::memcpy((char*)(words + m) + 2 * h, (const char*)lanes[8 * m + 2 * q + h].row + 2 * p, 2);
}

// d[r, c] += sum_k a[r, k] b[k, c]: element k sits in word k / 8, lane k % 8 / 2, half k % 2
DEVICE void multiply(float* d, Lane (&lanes)[32], int depth) {
  const int q = current % 4, p = current % 32 / 4;
  for (int e = 0; e < 4; e++) {
    const int column = 2 * q + e % 2, upper = e / 2;
    double sum = d[e];
    for (int k = 0; k < depth; k++) {
      const float a = bf16(lanes[4 * p + k % 8 / 2].a[2 * (k / 8) + upper], k % 2);
      const float b = bf16(lanes[4 * column + k % 8 / 2].b[k / 8], k % 2);
      sum += (double)a * b;
    }
    d[e] = (float)sum;
  }
}
DEVICE void mma16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, bool first = false) {
  if (first) d[0] = d[1] = d[2] = d[3] = 0.f;
  multiply(d, exchange(operands, {{a0, a1, a2, a3}, {b0, b1}, nullptr}), 16);
}
DEVICE void mma8(float* d, u32 a0, u32 a1, u32 b0) { multiply(d, exchange(operands, {{a0, a1}, {b0}, nullptr}), 8); }
DEVICE float __shfl_sync(unsigned, float value, int lane) {
  return __uint_as_float(exchange(operands, {{__float_as_uint(value)}, {}, nullptr})[lane].a[0]);
}
DEVICE float __shfl_xor_sync(unsigned, float value, int mask) {
  return __uint_as_float(exchange(operands, {{__float_as_uint(value)}, {}, nullptr})[current % 32 ^ mask].a[0]);
}
