/*
 * Includes TEMPLATE once per instruction set, with LANES, LEVEL, TARGET and NAME defined for it:
 * the library may be built on one machine and used on another, which chooses among the copies.
 */

#include "pool.h"

#include <string.h>

#define LOG2_E 1.44269504088896340736f
#define LN_2 0.69314718055994530942f

#define EACH_4(X) X(0) X(1) X(2) X(3)

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__x86_64__)
#include <immintrin.h>

#define LANES 16
#define LEVEL AVX512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define NAME(name) name##_avx512
#include "simd.h"
#include TEMPLATE
#include "simd_end.h"

#define LANES 8
#define LEVEL AVX2
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(name) name##_avx2
#include "simd.h"
#include TEMPLATE
#include "simd_end.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "the native CPU kernels know x86-64 and aarch64"
#endif

#define LANES 4
#define LEVEL BASELINE
#define TARGET
#define NAME(name) name##_baseline
#include "simd.h"
#include TEMPLATE
#include "simd_end.h"
