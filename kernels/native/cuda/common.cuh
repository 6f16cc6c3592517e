// The 2-D selective scan on the GPU: cross-scan, step projection, softplus, scan, skip and merge.
//
// Compiled at run time by NVRTC, so it includes nothing and takes its sizes as macros:
//   DTYPE     0 float32, 1 float16, 2 bfloat16: x, projections, y and their gradients
//   D_STATE   N, which is 16              DT_RANK   R
//   CHANNELS  channels per block
//   KEEP      1: the forward pass stores the state at the start of every tile
//   SPLIT     1: the channels of an image are spread over several blocks (backward)
//
// Layouts, all contiguous: x, y (B, L, D); projections (B, L, K, R + 2N), row = dt, B, C;
// dt_weight (K, D, R); dt_bias, skip (K, D); A (K, D, N); states (B, K, tiles, D, N).
// Sums over directions and channels are taken in a fixed order, without atomics.

#define K_DIRECTIONS 4
#define TILE 16  // positions staged at once, and the distance between stored states
#define ROW (DT_RANK + 2 * D_STATE)

#if DTYPE == 0
typedef float elem;
__device__ __forceinline__ float to_float(elem v) { return v; }
__device__ __forceinline__ elem from_float(float v) { return v; }
#elif DTYPE == 1
typedef unsigned short elem;
__device__ __forceinline__ float to_float(elem v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
}
__device__ __forceinline__ elem from_float(float v) {
    elem h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
#else
typedef unsigned short elem;
__device__ __forceinline__ float to_float(elem v) {
    return __uint_as_float((unsigned)v << 16);
}
__device__ __forceinline__ elem from_float(float v) {  // round to nearest even, NaN kept quiet
    unsigned bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (elem)((bits >> 16) | 0x40u);
    return (elem)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#endif

// A sum as it is stored. What float16 cannot hold, as happens to a trained MedMamba with rare images,
// becomes its largest: infinity would be no number after the norm that follows.
__device__ __forceinline__ elem narrowed(float v) {
#if DTYPE == 1
    if (fabsf(v) > 65504.f) v = copysignf(65504.f, v);
#endif
    return from_float(v);
}

#define LOG2E 1.4426950408889634f

__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ float softplus(float z) { return z > 20.f ? z : log1pf(expf(z)); }

// Where step `l` of direction `k` lies in the image: by rows, by columns, and both reversed.
__device__ __forceinline__ int position(int k, int l, int height, int width) {
    if (k >= 2) l = height * width - 1 - l;
    return (k & 1) ? (l % height) * width + l / height : l;
}

#define PAD4(n) (((n) + 3) / 4 * 4)
#define STAGED (2 * D_STATE + PAD4(DT_RANK))  // a staged row: B, C, dt, each 16-byte aligned
