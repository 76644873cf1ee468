// What the stream kernels of this folder share: bf16 words, asynchronous copies of rows, the tensor core's product.
// Compiled at run time with two macros: NUM_STREAMS (n) and DIM (C). The number of tokens M is an argument.
//
// Streams are bf16 in memory, two neighbouring channels to a 32-bit word. A number that needs more than bf16's 8
// significand bits (phi, dz) is carried as two bf16 terms, high + low, which keeps 16 bits; products accumulate in fp32.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DEVICE __device__ __forceinline__

constexpr int n = NUM_STREAMS;
constexpr int C = DIM;
constexpr int N = n * n + 2 * n;       // coefficients of a token: pre | post | res, rows of phi
constexpr int K = n * C;               // columns of phi, elements of a token's streams
constexpr int JT = (N + 7) / 8;        // the N coefficients in tensor-core tiles of 8, zero-padded
constexpr int VEC = C % 8 == 0 ? 8 : C % 4 == 0 ? 4 : C % 2 == 0 ? 2 : 1;  // channels a copy moves: rows stay aligned

DEVICE float low(u32 w) { return __uint_as_float(w << 16); }
DEVICE float high(u32 w) { return __uint_as_float(w & 0xffff0000u); }

// two floats -> one word of two bf16, each rounded to nearest even
DEVICE u32 pack(float l, float h) {
  u32 w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(h), "f"(l));
  return w;
}

// a pair of floats as two words: value = high term + low term, to 16 bits
DEVICE void split(float l, float h, u32& hi, u32& lo) {
  hi = pack(l, h);
  lo = pack(l - low(hi), h - high(hi));
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
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// 2 * VEC bytes from shared to device memory, streaming: nobody reads them soon
DEVICE void store_row(u16* to, const void* from) {
  if constexpr (VEC == 8) __stcs((uint4*)to, *(const uint4*)from);
  else if constexpr (VEC == 4) __stcs((uint2*)to, *(const uint2*)from);
  else if constexpr (VEC == 2) __stcs((u32*)to, *(const u32*)from);
  else *to = *(const u16*)from;
}

// COUNT neighbouring channels of phi[N, n, C] from `channel` on, zeros outside
template <int COUNT> DEVICE void load_floats(float* v, const float* phi, int j, int i, int channel) {
  const float* from = phi + (i64)j * K + i * C + channel;
  if constexpr (COUNT == 4 && C % 4 == 0) {
    *(float4*)v = j < N && channel < C ? __ldg((const float4*)from) : make_float4(0.f, 0.f, 0.f, 0.f);
  } else {
#pragma unroll
    for (int k = 0; k < COUNT; k++) v[k] = j < N && channel + k < C ? __ldg(from + k) : 0.f;
  }
}

// four 8 x 8 matrices of bf16: lane 8 m + r gives the address of row r of matrix m, 16 bytes; lane 4p + q receives
// columns 2q, 2q + 1 of row p of each
DEVICE void load_matrices(u32* words, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)) : "memory");
}

// d += a b on the tensor core: a is 16 x 16 (or 16 x 8), b is 16 x 8 (8 x 8), bf16 in, fp32 out.
// Lane l = 4p + q holds a[p | p+8][2q, 2q+1 | 2q+8, 2q+9], b[2q, 2q+1 | 2q+8, 2q+9][p], d[p | p+8][2q, 2q+1].
DEVICE void mma16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma8(float* d, u32 a0, u32 a1, u32 b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
}
