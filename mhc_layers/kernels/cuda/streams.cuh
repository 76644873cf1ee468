// What the stream kernels of this folder share: bf16 words, asynchronous copies of rows, the tensor core's product.
// Compiled at run time with two macros: NUM_STREAMS (n) and DIM (C). The number of tokens M is an argument.
//
// Streams are bf16 in memory, two neighbouring channels to a 32-bit word. A number that needs more than bf16's 8
// significand bits (phi, dz) is carried as two bf16 terms, high + low, which keeps 16 bits; products accumulate in fp32.

constexpr int n = NUM_STREAMS;
constexpr int C = DIM;
constexpr int N = n * n + 2 * n;       // coefficients of a token: pre | post | res, rows of phi
constexpr int K = n * C;               // columns of phi, elements of a token's streams
constexpr int JT = (N + 7) / 8;        // the N coefficients in tensor-core tiles of 8, zero-padded
constexpr int VEC = C % 8 == 0 ? 8 : C % 4 == 0 ? 4 : C % 2 == 0 ? 2 : 1;  // channels a copy moves: rows stay aligned

DEVICE float low(u32 w) { return __uint_as_float(w << 16); }
DEVICE float high(u32 w) { return __uint_as_float(w & 0xffff0000u); }

// a pair of floats as two words: value = high term + low term, to 16 bits
DEVICE void split(float l, float h, u32& hi, u32& lo) {
  hi = pack(l, h);
  lo = pack(l - low(hi), h - high(hi));
}

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
