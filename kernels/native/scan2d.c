/*
 * The 2-D selective scan on CPUs, forward and backward: plain C behind a C interface, float32.
 * kernels/reference.py is the definition; kernels/cpu.py checks what comes in here.
 *
 * The same source is compiled once per instruction set and the caller chooses among those that
 * the processor has: the library may be built on one machine and used on another.
 */

#include "scan2d.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define LOG2_E 1.44269504088896340736f
#define LN_2 0.69314718055994530942f
#define EXPORT __attribute__((visibility("default")))

#if defined(__clang__)
#define UNROLL_STATES _Pragma("unroll 16")
#else
#define UNROLL_STATES _Pragma("GCC unroll 16")
#endif

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define NAME(name) name##_avx512
#define V_MAX(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define V_MIN(a, b) ((vf)_mm512_min_ps((__m512)(a), (__m512)(b)))
#include "scan2d_forward.h"
#include "scan2d_backward.h"

#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(name) name##_avx2
#define V_MAX(a, b) ((vf)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define V_MIN(a, b) ((vf)_mm256_min_ps((__m256)(a), (__m256)(b)))
#include "scan2d_forward.h"
#include "scan2d_backward.h"

#define V_MAX(a, b) ((vf)_mm_max_ps((__m128)(a), (__m128)(b)))
#define V_MIN(a, b) ((vf)_mm_min_ps((__m128)(a), (__m128)(b)))
#elif defined(__aarch64__)
#include <arm_neon.h>

#define V_MAX(a, b) ((vf)vmaxq_f32((float32x4_t)(a), (float32x4_t)(b)))
#define V_MIN(a, b) ((vf)vminq_f32((float32x4_t)(a), (float32x4_t)(b)))
#else
#error "the native CPU scan knows x86-64 and aarch64"
#endif

#define LANES 4
#define TARGET
#define NAME(name) name##_baseline
#include "scan2d_forward.h"
#include "scan2d_backward.h"

typedef void work_item(const struct scan *scan, int64_t item, void *scratch);
typedef size_t scratch_size(const struct scan *scan);

enum level { BASELINE, AVX2, AVX512 };

static const struct {
    int lanes;
    work_item *forward, *backward;
    scratch_size *forward_scratch, *backward_scratch;
} kernels[] = {
    [BASELINE] = {4, forward_baseline, backward_baseline, forward_scratch_baseline,
                  backward_scratch_baseline},
#if defined(__x86_64__)
    [AVX2] = {8, forward_avx2, backward_avx2, forward_scratch_avx2, backward_scratch_avx2},
    [AVX512] = {16, forward_avx512, backward_avx512, forward_scratch_avx512,
                backward_scratch_avx512},
#endif
};

#if defined(__x86_64__)
/* The registers that the operating system saves; only valid where the OSXSAVE bit is set. */
static uint32_t saved_registers(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}
#endif

/* Not __builtin_cpu_supports: in a library that zig links, it finds nothing. */
EXPORT int scan2d_best_level(void)
{
#if defined(__x86_64__)
    uint32_t a, b, c, d, c1;
    if (!__get_cpuid(1, &a, &b, &c1, &d) || !(c1 & bit_OSXSAVE) || !(c1 & bit_FMA))
        return BASELINE;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2))
        return BASELINE;
    const uint32_t saved = saved_registers(), ymm = 0x06, zmm = 0xe6;
    const uint32_t wanted = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    if ((b & wanted) == wanted && (saved & zmm) == zmm)
        return AVX512;
    return (saved & ymm) == ymm ? AVX2 : BASELINE;
#else
    return BASELINE;
#endif
}

/* A change of any signature here changes this number, which kernels/cpu.py expects. */
EXPORT int scan2d_interface(void)
{
    return 1;
}

/*
 * States die away through the subnormal numbers, each of which costs a hundred cycles. As the
 * mode belongs to the thread, it is put back.
 */
static uint64_t flush_subnormals(void)
{
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    uint64_t before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | (UINT64_C(1) << 24)));
    return before;
#endif
}

static void restore_subnormals(uint64_t before)
{
#if defined(__x86_64__)
    _mm_setcsr((unsigned)before);
#else
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#endif
}

/*
 * GOMP_parallel, the entry to the OpenMP threads that torch has already started. They spin for a
 * while after each of torch's own operations, and threads of ours would compete with them for the
 * same cores.
 */
typedef void parallel_region(void (*work)(void *), void *data, unsigned threads, unsigned flags);

struct job {
    const struct scan *scan;
    work_item *work;
    size_t scratch;
    int64_t items;
    _Atomic int64_t next;
};

static void *run_items(void *argument)
{
    struct job *job = argument;
    void *scratch = aligned_alloc(64, (job->scratch + 63) / 64 * 64 + 64);
    if (!scratch)
        return NULL;
    const uint64_t mode = flush_subnormals();
    for (;;) {
        const int64_t item = atomic_fetch_add(&job->next, 1);
        if (item >= job->items)
            break;
        job->work(job->scan, item, scratch);
    }
    restore_subnormals(mode);
    free(scratch);
    return NULL;
}

static void run_items_of_team(void *argument)
{
    run_items(argument);
}

/* Work through the items on the calling thread and up to threads - 1 new ones. */
static void run_on_own_threads(struct job *job, int threads)
{
    enum { MOST = 256 };
    pthread_t others[MOST];
    int started = 0;
    while (started < threads - 1 && started < MOST
           && pthread_create(&others[started], NULL, run_items, job) == 0)
        started++;
    run_items(job);
    for (int i = 0; i < started; i++)
        pthread_join(others[i], NULL);
}

/*
 * Returns 0, or 1 where memory ran out. Fewer threads than asked for are no error, and neither is
 * one without memory while others still work.
 */
static int run_job(struct job *job, parallel_region *parallel, int threads)
{
    if (job->items < threads)
        threads = (int)job->items;
    if (threads <= 1)
        run_items(job);
    else if (parallel)
        parallel(run_items_of_team, job, (unsigned)threads, 0);
    else
        run_on_own_threads(job, threads);
    return atomic_load(&job->next) < job->items;
}

/* Waking the threads takes as long as this many updates of a state, or longer. */
static int worthwhile_threads(const struct scan *scan, int threads)
{
    enum { SMALL = 1 << 17 };
    const int64_t updates =
        scan->batch * DIRECTIONS * scan_length(scan) * scan->channels * scan->states;
    return updates < SMALL ? 1 : threads;
}

/*
 * Fill scan->y. Returns 0, or 1 where memory ran out. ``parallel`` may be null: threads are then
 * started for the call.
 */
EXPORT int scan2d_forward(const struct scan *scan, int level, parallel_region *parallel,
                          int threads)
{
    struct job job = {
        .scan = scan,
        .work = kernels[level].forward,
        .scratch = kernels[level].forward_scratch(scan),
        .items = scan->batch * block_count(scan->channels, kernels[level].lanes),
    };
    return run_job(&job, parallel, worthwhile_threads(scan, threads));
}

/* Fill the gradients of scan, per image and direction. Returns 0, or 1 where memory ran out. */
EXPORT int scan2d_backward(const struct scan *scan, int level, parallel_region *parallel,
                           int threads)
{
    struct job job = {
        .scan = scan,
        .work = kernels[level].backward,
        .scratch = kernels[level].backward_scratch(scan),
        .items = scan->batch * DIRECTIONS,
    };
    return run_job(&job, parallel, worthwhile_threads(scan, threads));
}
