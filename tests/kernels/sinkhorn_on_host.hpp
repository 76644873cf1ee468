// Runs the CUDA C++ of birkhoff/kernels/cuda/sinkhorn.cu on the host: one block at a time, every CUDA thread a fibre that
// runs until its warp meets. Inputs end at a page that must not be touched and results lie between sentinels, so a read or
// a write beyond an array ends the process or is seen. Shared memory starts as NaN.
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class To, class From> To bits_of(From from) { To to; std::memcpy(&to, &from, sizeof to); return to; }
inline float __int_as_float(int w) { return bits_of<float>(w); }
inline float __uint_as_float(unsigned w) { return bits_of<float>(w); }
inline unsigned __float_as_uint(float f) { return bits_of<unsigned>(f); }

// 16 bytes at a time need an address that is a multiple of 16
inline void must_be_aligned(const void* p) { if ((uintptr_t)p % 16) __builtin_trap(); }
inline uint4 __ldg(const uint4* p) { must_be_aligned(p); return *p; }
inline void __stcs(uint4* p, uint4 v) { must_be_aligned(p); *p = v; }

// the approximate instructions, which take and give zero for what is below the smallest normal number
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float host_exp_2(float x) { return flushed(std::exp2(flushed(x))); }
inline float host_reciprocal(float x) { return flushed(1.f / flushed(x)); }
inline float host_from_half(unsigned short h) { return (float)bits_of<_Float16>(h); }
inline unsigned short host_to_half(float f) { return bits_of<unsigned short>((_Float16)f); }

alignas(128) unsigned char memory[1 << 18];
struct { unsigned x; } blockIdx;
struct Fibre { ucontext_t context; std::vector<char> stack; bool finished = false; int step = 0; };
std::vector<Fibre> fibres;
ucontext_t scheduler;
int current = 0, arrived[32], generation[32];
std::function<void()> body;
struct Index { unsigned x; };
#define threadIdx (Index{(unsigned)current})

inline void __syncwarp() {
  const int me = current, warp = me / 32, mine = generation[warp];
  if (++arrived[warp] == 32) { arrived[warp] = 0, generation[warp]++; return; }
  while (generation[warp] == mine) swapcontext(&fibres[me].context, &scheduler), current = me;
}
double operands[2][32][32];  // two sets, because a lane can be one operation ahead
inline double (&exchange(double mine))[32] {
  const int warp = current / 32, set = fibres[current].step++ & 1;
  operands[set][warp][current % 32] = mine;
  __syncwarp();
  return operands[set][warp];
}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return (T)exchange((double)value)[current % 32 ^ mask]; }
inline bool __any_sync(unsigned, bool flag) {
  bool any = false;
  for (double x : exchange(flag)) any = any || x != 0;
  return any;
}

void entry() {
  body();
  fibres[current].finished = true;
  for (const int me = current;;) swapcontext(&fibres[me].context, &scheduler);
}
void run_block(int threads) {
  std::memset(memory, 0xff, sizeof memory);
  fibres = std::vector<Fibre>(threads);
  for (auto& fibre : fibres) {
    fibre.stack.resize(1 << 16);
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

// A copy that begins on 16 bytes and ends, to within 15 bytes, at a page that cannot be read.
struct Guarded {
  static constexpr size_t PAGE = 4096;
  size_t bytes, pages;
  unsigned char *map, *begin;
  Guarded(const void* from, size_t bytes) : bytes(bytes), pages((bytes + 2 * PAGE - 1) / PAGE) {
    map = (unsigned char*)mmap(nullptr, (pages + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(map + pages * PAGE, PAGE, PROT_NONE);
    begin = map + pages * PAGE - (bytes + 15) / 16 * 16;
    std::memset(map, 0xa5, pages * PAGE);
    if (from) std::memcpy(begin, from, bytes);
  }
  ~Guarded() { munmap(map, (pages + 1) * PAGE); }
  bool surrounded() const {
    bool whole = true;
    for (unsigned char* p = map; p < map + pages * PAGE; p++) whole = whole && (*p == 0xa5 || (p >= begin && p < begin + bytes));
    return whole;
  }
};
