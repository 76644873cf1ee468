// Runs one block of a CUDA kernel on the host: every CUDA thread is a fibre that runs until its warp or its block meets, and
// then yields, so execution is deterministic. Shared memory starts as NaN. The launchers, cuda_on_host.hpp and
// sinkhorn_on_host.hpp, define the instructions that their kernels use.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __align__(n)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class To, class From> To bits_of(From from) { To to; std::memcpy(&to, &from, sizeof to); return to; }
inline float __uint_as_float(unsigned w) { return bits_of<float>(w); }
inline unsigned __float_as_uint(float f) { return bits_of<unsigned>(f); }

alignas(128) unsigned char shared[1 << 18];
struct dim3 { unsigned x = 0, y = 0, z = 0; } blockIdx, gridDim, blockDim;

struct Fibre { ucontext_t context; std::vector<char> stack; bool finished = false; int operations = 0; };
std::vector<Fibre> fibres;
ucontext_t scheduler;
int current = 0;
std::function<void()> body;
struct { int block = 0, warp[32] = {}; } arrived, generation;
struct Index { unsigned x; };
#define threadIdx (Index{(unsigned)current})

inline void yield() {
  const int me = current;
  swapcontext(&fibres[me].context, &scheduler);
  current = me;
}
inline void meet(int& count, int& generation, int size) {
  const int mine = generation;
  if (++count == size) { count = 0, generation++; return; }
  while (generation == mine) yield();
}
inline void __syncthreads() { meet(arrived.block, generation.block, (int)fibres.size()); }
inline void __syncwarp() { meet(arrived.warp[current / 32], generation.warp[current / 32], 32); }

// What each lane gives to an operation of its warp; two sets, because a lane can be one operation ahead.
template <class T> struct Operands { T lanes[2][32][32]; };
template <class T> inline T (&exchange(Operands<T>& operands, const T& mine))[32] {
  const int warp = current / 32, set = fibres[current].operations++ & 1;
  operands.lanes[set][warp][current % 32] = mine;
  __syncwarp();
  return operands.lanes[set][warp];
}

inline void entry() {
  body();
  fibres[current].finished = true;
  for (;;) yield();
}
inline void run_block(int threads) {
  std::memset(shared, 0xff, sizeof shared);
  fibres = std::vector<Fibre>(threads);
  blockDim.x = threads;
  for (auto& fibre : fibres) {
    fibre.stack.resize(1 << 17);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data(), fibre.context.uc_stack.ss_size = fibre.stack.size();
    makecontext(&fibre.context, entry, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (int k = 0; k < threads; k++)
      if (!fibres[k].finished) current = k, alive = true, swapcontext(&scheduler, &fibres[k].context);
  }
}
