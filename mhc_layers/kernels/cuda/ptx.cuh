// The instructions of compute capability 8.0 and above that CUDA C++ has no name for. Everything else in this folder is
// plain CUDA C++, so that a host compiler can run it with these few replaced (tests/kernels/cuda_on_host.hpp).

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DEVICE __device__ __forceinline__

// two floats -> one word of two bf16, each rounded to nearest even
DEVICE u32 pack(float l, float h) {
  u32 w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(h), "f"(l));
  return w;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// BYTES from device to shared memory; zeros where the source lies outside the tensor
template <int BYTES> DEVICE void copy_async(void* to, const void* from, bool valid) {
  if constexpr (BYTES == 2) {
    *(u16*)to = valid ? *(const u16*)from : (u16)0;
  } else if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(valid ? BYTES : 0) : "memory");
  }
}
// 16 bytes that lie inside the tensor
DEVICE void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// the 128 bytes around an address into the L2 cache
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// four 8 x 8 matrices of bf16: lane 8 m + r gives the address of row r of matrix m, 16 bytes; lane 4p + q receives
// columns 2q, 2q + 1 of row p of each
DEVICE void load_matrices(u32* words, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)) : "memory");
}

// the same matrices transposed: lane 4p + q receives rows 2q, 2q + 1 of column p
DEVICE void load_transposed(u32* words, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)) : "memory");
}

// d += a b on the tensor core: a is 16 x 16 (or 16 x 8), b is 16 x 8 (8 x 8), bf16 in, fp32 out.
// Lane l = 4p + q holds a[p | p+8][2q, 2q+1 | 2q+8, 2q+9], b[2q, 2q+1 | 2q+8, 2q+9][p], d[p | p+8][2q, 2q+1].
// first: d = a b.
DEVICE void mma16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, bool first = false) {
  const float c0 = first ? 0.f : d[0], c1 = first ? 0.f : d[1], c2 = first ? 0.f : d[2], c3 = first ? 0.f : d[3];
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
DEVICE void mma8(float* d, u32 a0, u32 a1, u32 b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
}
