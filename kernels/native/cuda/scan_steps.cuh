// The step sizes of a tile: softplus(dt_weight . dt + dt_bias) on tensor cores.

#define N_TILES (CHANNELS / 8)
#define K_STEPS ((DT_RANK + 7) / 8)

// softplus with a small relative error also where it is tiny: a polynomial in exp(-|z|), to a few
// units in the last place for float32, and 1e-5 where the input is less exact than that.
__device__ __forceinline__ float softplus_fast(float z) {
    const float e = exp2_fast(-LOG2E * fabsf(z));
#if DTYPE == 0
    float p = -8.539042235e-03f;
    p = p * e + 4.408904872e-02f;
    p = p * e - 1.076809098e-01f;
    p = p * e + 1.774518655e-01f;
    p = p * e - 2.449544355e-01f;
    p = p * e + 3.327547655e-01f;
    p = p * e - 4.999740519e-01f;
    p = p * e + 9.999998056e-01f;
#else
    float p = -2.386871363e-02f;
    p = p * e + 1.012211865e-01f;
    p = p * e - 2.100477255e-01f;
    p = p * e + 3.252063342e-01f;
    p = p * e - 4.993613212e-01f;
    p = p * e + 9.999915973e-01f;
#endif
    return p * e + fmaxf(z, 0.f);
}

// What TF32 keeps of a number; the rest, taken alone, TF32 keeps to 21 bits in all.
__device__ __forceinline__ float leading(float v) {
    return __uint_as_float(__float_as_uint(v) & 0xffffe000u);
}

// c += a (16 x 8) . b (8 x 8)
__device__ __forceinline__ void mma(float c[4], const float a[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Lift the low-rank steps of 16 positions to the warp's channels. float16 and bfloat16 are exact
// in TF32 and the weights go in two parts, so that the result has float32's accuracy.
//   z        lane (g, t): positions g, g + 8, channels 8 n + 2 t, 8 n + 2 t + 1
//   dt       position g's first value; `stride` elements to the next position's
//   weights  this lane's, [K_STEPS][N_TILES][32]
__device__ __forceinline__ void lift(float z[N_TILES][4], const elem* dt, int stride,
                                     const float2* weights, int lane) {
    const int t = lane % 4;
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step) {
        float a[4] = {0.f, 0.f, 0.f, 0.f};
        const elem* at = dt + step * 8 + t;
        if (step * 8 + t < DT_RANK) a[0] = to_float(at[0]), a[1] = to_float(at[8 * stride]);
        if (step * 8 + 4 < DT_RANK && step * 8 + 4 + t < DT_RANK)
            a[2] = to_float(at[4]), a[3] = to_float(at[8 * stride + 4]);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            const float2 w = weights[(step * N_TILES + n) * 32 + lane];
            const float h0 = leading(w.x), h1 = leading(w.y);
            mma(z[n], a, h0, h1);
            mma(z[n], a, w.x - h0, w.y - h1);
            if (DTYPE == 0) {
                const float rest[4] = {a[0] - leading(a[0]), a[1] - leading(a[1]),
                                       a[2] - leading(a[2]), a[3] - leading(a[3])};
                mma(z[n], rest, h0, h1);
            }
        }
    }
}
