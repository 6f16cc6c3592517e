// What the inference graph's kernels share: element types, vectors of eight channels, activations.
//
// DTYPE: 0 float32, 1 float16, 2 bfloat16. Arithmetic is float32 throughout; parameters of
// norms and depthwise kernels are float32. Images are (B, H, W, C), channels contiguous.
// A file holds several kernels; KERNEL_name is defined for the one that is compiled.

#define VECTOR 8  // channels that a thread moves at once: 16 bytes of a half-precision type

#if DTYPE == 0
typedef float elem;
#else
typedef unsigned short elem;
#endif

#if DTYPE == 1
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
#elif DTYPE == 2
__device__ __forceinline__ float to_float(elem v) { return __uint_as_float((unsigned)v << 16); }
__device__ __forceinline__ elem from_float(float v) {  // round to nearest even, NaN kept quiet
    unsigned bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (elem)((bits >> 16) | 0x40u);
    return (elem)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
__device__ __forceinline__ float to_float(elem v) { return v; }
__device__ __forceinline__ elem from_float(float v) { return v; }
#endif

#if DTYPE != 0
__device__ __forceinline__ unsigned pack2(float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned r;
#if DTYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
#else
    return (unsigned)from_float(low) | (unsigned)from_float(high) << 16;
#endif
}
#endif

#if DTYPE != 0
__device__ __forceinline__ void unpack2(float& low, float& high, unsigned pair) {
#if DTYPE == 1
    asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(pair));
#else
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
#endif
}
#endif

// Load and store N channels, 4 or 8, at an address aligned to N elements.
template <int N>
__device__ __forceinline__ void load(float (&to)[N], const elem* __restrict__ from) {
#if DTYPE == 0
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 four = *(const float4*)(from + i);
        to[i] = four.x; to[i + 1] = four.y; to[i + 2] = four.z; to[i + 3] = four.w;
    }
#else
    unsigned pairs[N / 2];
    if (N == 8) *(uint4*)pairs = *(const uint4*)from;
    else *(uint2*)pairs = *(const uint2*)from;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) unpack2(to[2 * i], to[2 * i + 1], pairs[i]);
#endif
}

template <int N>
__device__ __forceinline__ void store(elem* to, const float (&from)[N]) {
#if DTYPE == 0
#pragma unroll
    for (int i = 0; i < N; i += 4)
        *(float4*)(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
#else
    unsigned pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = pack2(from[2 * i], from[2 * i + 1]);
    if (N == 8) *(uint4*)to = *(uint4*)pairs;
    else *(uint2*)to = *(uint2*)pairs;
#endif
}

// Load N parameters, a multiple of four.
template <int N>
__device__ __forceinline__ void parameters(float (&to)[N], const float* __restrict__ from) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 four = __ldg((const float4*)(from + i));
        to[i] = four.x; to[i + 1] = four.y; to[i + 2] = four.z; to[i + 3] = four.w;
    }
}

__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }
__device__ __forceinline__ float silu(float v) { return v * sigmoid(v); }
__device__ __forceinline__ float relu(float v) { return fmaxf(v, 0.f); }
__device__ __forceinline__ float gelu(float v) {
    return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
}
