#include "pool.h"

#include <pthread.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

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

struct share {
    void (*work)(void *);
    void *data;
};

static void run_share(void *argument)
{
    const struct share *share = argument;
    const uint64_t mode = flush_subnormals();
    share->work(share->data);
    restore_subnormals(mode);
}

static void *run_share_of_thread(void *argument)
{
    run_share(argument);
    return NULL;
}

/* Work on the calling thread and up to threads - 1 new ones. */
static void run_on_own_threads(struct share *share, int threads)
{
    enum { MOST = 256 };
    pthread_t others[MOST];
    int started = 0;
    while (started < threads - 1 && started < MOST
           && pthread_create(&others[started], NULL, run_share_of_thread, share) == 0)
        started++;
    run_share(share);
    for (int i = 0; i < started; i++)
        pthread_join(others[i], NULL);
}

void run_on_threads(void (*work)(void *), void *data, parallel_region *parallel, int threads)
{
    struct share share = {work, data};
    if (threads <= 1)
        run_share(&share);
    else if (parallel)
        parallel(run_share, &share, (unsigned)threads, 0);
    else
        run_on_own_threads(&share, threads);
}
