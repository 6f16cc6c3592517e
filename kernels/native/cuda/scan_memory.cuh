// Copies between global and shared memory in the widest accesses that the sizes allow.
//   ALIGNED   1: rows of x and y are made of whole groups of 8 channels, 16-byte aligned

#define ELEM_BYTES ((int)sizeof(elem))

// One multiplication: places are far apart, their number has 32 bits, the distance as well.
template <class T>
__device__ __forceinline__ T* at_place(T* base, unsigned place, unsigned stride_bytes) {
    return (T*)((unsigned long long)base + (unsigned long long)place * stride_bytes);
}

__device__ __forceinline__ unsigned shared_address(const void* at) {
    return (unsigned)__cvta_generic_to_shared(at);
}

__device__ __forceinline__ void copy4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if DTYPE == 0
__device__ __forceinline__ float4 load_four(const elem* at) { return *(const float4*)at; }
#else
__device__ __forceinline__ float4 load_four(const elem* at) {
    const uint2 v = *(const uint2*)at;
    return make_float4(to_float((elem)(v.x & 0xffffu)), to_float((elem)(v.x >> 16)),
                       to_float((elem)(v.y & 0xffffu)), to_float((elem)(v.y >> 16)));
}
#endif

// Two neighbouring elements in shared memory, 4-byte aligned (8 for float32).
__device__ __forceinline__ float2 load_pair(const elem* at) {
#if DTYPE == 0
    return *(const float2*)at;
#else
    const unsigned both = *(const unsigned*)at;
    return make_float2(to_float((elem)(both & 0xffffu)), to_float((elem)(both >> 16)));
#endif
}

// From global memory as other warps of the block left it, past the first-level cache.
__device__ __forceinline__ float load_fresh(const float* at) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}

// Four channels of a partial sum, of which `channels` are there.
__device__ __forceinline__ float4 load_sum(const float* at, int channels) {
#if ALIGNED
    float4 all;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(all.x), "=f"(all.y), "=f"(all.z), "=f"(all.w)
                 : "l"(at)
                 : "memory");
    return all;
#else
    float4 v = make_float4(load_fresh(at), 0.f, 0.f, 0.f);
    if (channels > 1) v.y = load_fresh(at + 1);
    if (channels > 2) v.z = load_fresh(at + 2);
    if (channels > 3) v.w = load_fresh(at + 3);
    return v;
#endif
}

__device__ __forceinline__ void store_sum(float* at, float4 v, int channels) {
    if (ALIGNED) {
        *(float4*)at = v;
        return;
    }
    at[0] = v.x;
    if (channels > 1) at[1] = v.y;
    if (channels > 2) at[2] = v.z;
    if (channels > 3) at[3] = v.w;
}

__device__ __forceinline__ void store_out(elem* at, float4 v, int channels) {
#if DTYPE == 0
    store_sum(at, v, channels);
#else
    const elem out[4] = {narrowed(v.x), narrowed(v.y), narrowed(v.z), narrowed(v.w)};
#if ALIGNED
    *(uint2*)at = make_uint2(out[0] | (unsigned)out[1] << 16, out[2] | (unsigned)out[3] << 16);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < channels) at[i] = out[i];
#endif
#endif
}
