/*
 * Vectors of floats and their functions for one instruction set; included once for each by
 * levels.h, which defines LANES, TARGET and NAME.
 */

#define vf NAME(vf)
#define vi NAME(vi)
#define INLINE TARGET static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

/* V_MAX and V_MIN return their second argument where one of the two is NaN. */
#if LANES == 16
#define V_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define V_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#elif LANES == 8
#define V_MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define V_MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#elif defined(__x86_64__)
#define V_MAX(a, b) ((vf)_mm_max_ps((__m128)(a), (__m128)(b)))
#define V_MIN(a, b) ((vf)_mm_min_ps((__m128)(a), (__m128)(b)))
#else
#define V_MAX(a, b) ((vf)vmaxq_f32((float32x4_t)(a), (float32x4_t)(b)))
#define V_MIN(a, b) ((vf)vminq_f32((float32x4_t)(a), (float32x4_t)(b)))
#endif

INLINE vf NAME(splat)(float value)
{
    return value - (vf){0}; /* as adding zero would change the sign of zero */
}

/* Load the first ``count`` lanes, zeros beyond. */
INLINE vf NAME(load)(const float *from, int count)
{
    vf v = {0};
    if (count >= LANES) {
        memcpy(&v, from, sizeof v);
        return v;
    }
#if LANES == 16
    v = (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#elif LANES == 8
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
    v = (vf)_mm256_maskload_ps(from, (__m256i)(lane < count));
#else
    for (int lane = 0; lane < count; lane++)
        v[lane] = from[lane];
#endif
    return v;
}

INLINE void NAME(store)(float *to, vf v, int count)
{
    if (count >= LANES) {
        memcpy(to, &v, sizeof v);
        return;
    }
#if LANES == 16
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
#elif LANES == 8
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
    _mm256_maskstore_ps(to, (__m256i)(lane < count), (__m256)v);
#else
    for (int lane = 0; lane < count; lane++)
        to[lane] = v[lane];
#endif
}

INLINE float NAME(sum)(vf v)
{
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
#if LANES == 8
    const quad sum = (quad)_mm256_castps256_ps128((__m256)v)
                   + (quad)_mm256_extractf128_ps((__m256)v, 1);
#else
    const quad sum = v;
#endif
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
#endif
}

/*
 * 2^t to 1.5 ulp: 0 far below -127, infinite from 128, NaN for NaN. Without the instructions that
 * take a number apart and scale by a power of two, adding 1.5 * 2^23 rounds to an integer and
 * leaves it in the low bits.
 */
INLINE vf NAME(exp2)(vf t)
{
#if LANES == 16
    const vf f = (vf)_mm512_reduce_ps((__m512)t, 0);
#else
    const vf round = NAME(splat)(12582912.0f);
    t = V_MIN(NAME(splat)(128.0f), V_MAX(NAME(splat)(-127.0f), t));
    const vf shifted = t + round;
    const vf f = t - (shifted - round);
#endif
    vf p = NAME(splat)(0.0013264727f);
    p = p * f + 0.0096715126f;
    p = p * f + 0.055507337f;
    p = p * f + 0.24022242f;
    p = p * f + 0.69314698f;
    p = p * f + 1.0f;
#if LANES == 16
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)(t - f));
#else
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

/*
 * The same of four vectors in step: one alone is a chain of ten instructions that wait for each
 * other. The empty statements keep the compiler from putting the four one after the other.
 */
INLINE void NAME(exp2_of_4)(vf t0, vf t1, vf t2, vf t3, vf *e0, vf *e1, vf *e2, vf *e3)
{
#if LANES == 16
#define IN_STEP __asm__("" : "+v"(p0), "+v"(p1), "+v"(p2), "+v"(p3));
#define REDUCE(i)                                               \
    const vf f##i = (vf)_mm512_reduce_ps((__m512)t##i, 0);      \
    vf p##i = 0.0013264727f * f##i + 0.0096715126f;
#define THIRD(i) p##i = p##i * f##i + 0.055507337f;
#define SECOND(i) p##i = p##i * f##i + 0.24022242f;
#define FIRST(i) p##i = p##i * f##i + 0.69314698f;
#define LAST(i) p##i = p##i * f##i + 1.0f;
#define SCALE(i) *e##i = (vf)_mm512_scalef_ps((__m512)p##i, (__m512)(t##i - f##i));
    EACH_4(REDUCE) IN_STEP
    EACH_4(THIRD) IN_STEP
    EACH_4(SECOND) IN_STEP
    EACH_4(FIRST) IN_STEP
    EACH_4(LAST) IN_STEP
    EACH_4(SCALE)
#undef IN_STEP
#undef REDUCE
#undef THIRD
#undef SECOND
#undef FIRST
#undef LAST
#undef SCALE
#else
    *e0 = NAME(exp2)(t0);
    *e1 = NAME(exp2)(t1);
    *e2 = NAME(exp2)(t2);
    *e3 = NAME(exp2)(t3);
#endif
}

/* log(1 + e) for e in [0, 1], to 1.5 ulp of the result however small e is. */
INLINE vf NAME(log1p)(vf e)
{
    vf p = NAME(splat)(-0.0033184746f);
    p = p * e + 0.020204594f;
    p = p * e - 0.057664461f;
    p = p * e + 0.10680557f;
    p = p * e - 0.15355397f;
    p = p * e + 0.19695401f;
    p = p * e - 0.24958588f;
    p = p * e + 0.33330511f;
    p = p * e - 0.49999933f;
    p = p * e + 1.0f;
    return p * e;
}

/* exp(-|z|), which neither overflows nor loses the small values. */
INLINE vf NAME(exp_minus_abs)(vf z)
{
    return NAME(exp2)(V_MAX(z, -z) * -LOG2_E);
}

INLINE vf NAME(softplus)(vf z)
{
    return V_MAX(NAME(splat)(0.0f), z) + NAME(log1p)(NAME(exp_minus_abs)(z));
}

/* 1 / (1 + exp(-z)), as accurate for small results as for those near 1. */
INLINE vf NAME(sigmoid)(vf z)
{
    return NAME(exp2)(V_MIN(NAME(splat)(0.0f), z) * LOG2_E) / (1.0f + NAME(exp_minus_abs)(z));
}

/* 1 / v, for v from 1 to 2^126. */
INLINE vf NAME(reciprocal)(vf v)
{
#if LANES == 16
    /* A division takes 16 cycles, this 4, and is as good but for half a unit in the last place. */
    const vf guess = (vf)_mm512_rcp14_ps((__m512)v);
    return guess + guess * (1.0f - v * guess);
#else
    return 1.0f / v;
#endif
}

/* 1 / (1 + exp(-z)), exactly 0 only in the limit. */
INLINE vf NAME(logistic)(vf z)
{
    const vf exponential = NAME(exp2)(V_MIN(NAME(splat)(126.0f), z * -LOG2_E));
    return NAME(reciprocal)(1.0f + exponential);
}

INLINE vf NAME(silu)(vf z)
{
    return z * NAME(logistic)(z);
}

/*
 * z times the normal distribution's cumulative function, its error below 2e-7 times z
 * [Abramowitz and Stegun, 7.1.26].
 */
INLINE vf NAME(gelu)(vf z)
{
    const vf size = V_MAX(z, -z), scaled = size * 0.70710678f;
    const vf t = NAME(reciprocal)(1.0f + 0.3275911f * scaled);
    vf p = NAME(splat)(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vf half_tail = 0.5f * p * t * NAME(exp2)(scaled * scaled * -LOG2_E);
    return V_MAX(NAME(splat)(0.0f), z) - size * half_tail;
}
