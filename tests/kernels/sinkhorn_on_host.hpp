// Runs the CUDA C++ of birkhoff/kernels/cuda/sinkhorn.cu on the host, one block at a time, by fibres.hpp. Inputs end at a page
// that must not be touched and results lie between sentinels, so a read or a write beyond an array ends the process or is
// seen.
#include <sys/mman.h>

#include <cmath>

#include "fibres.hpp"

#define __noinline__
inline float __int_as_float(int w) { return bits_of<float>(w); }

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

unsigned char (&memory)[sizeof shared] = shared;

Operands<double> operands;
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return (T)exchange(operands, (double)value)[current % 32 ^ mask];
}
inline bool __any_sync(unsigned, bool flag) {
  bool any = false;
  for (double x : exchange(operands, (double)flag)) any = any || x != 0;
  return any;
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
