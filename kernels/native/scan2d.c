/*
 * The 2-D selective scan on CPUs, forward and backward: plain C behind a C interface, float32.
 * kernels/reference.py is the definition; kernels/cpu.py checks what comes in here.
 */

#include "scan2d.h"

#include "pool.h"

#include <stdatomic.h>
#include <stdlib.h>

#if defined(__clang__)
#define UNROLL_STATES _Pragma("unroll 16")
#else
#define UNROLL_STATES _Pragma("GCC unroll 16")
#endif

#define EACH_4_MORE(X) X(4) X(5) X(6) X(7)
#define EACH_8(X) EACH_4(X) EACH_4_MORE(X)

#define TEMPLATE "scan2d_level.h"
#include "levels.h"

typedef void work_item(const struct scan *scan, int64_t item, void *scratch);
typedef void one_direction(const struct scan *scan, int64_t image, int64_t group, int64_t block,
                           int direction, const float *projections, void *scratch);
typedef size_t scratch_size(const struct scan *scan);

static const struct {
    int lanes;
    one_direction *direction;
    work_item *forward, *backward;
    scratch_size *forward_scratch, *backward_scratch;
} kernels[] = {
    [BASELINE] = {4, direction_baseline, forward_baseline, backward_baseline,
                  forward_scratch_baseline, backward_scratch_baseline},
#if defined(__x86_64__)
    [AVX2] = {8, direction_avx2, forward_avx2, backward_avx2, forward_scratch_avx2,
              backward_scratch_avx2},
    [AVX512] = {16, direction_avx512, forward_avx512, backward_avx512, forward_scratch_avx512,
                backward_scratch_avx512},
#endif
};

int64_t scan2d_items(const struct scan *scan, int level)
{
    return scan->batch * scan->groups * block_count(scan->channels, kernels[level].lanes);
}

size_t scan2d_scratch(const struct scan *scan, int level)
{
    return kernels[level].forward_scratch(scan);
}

void scan2d_work(const struct scan *scan, int64_t item, void *scratch, int level)
{
    kernels[level].forward(scan, item, scratch);
}

void scan2d_direction(const struct scan *scan, int64_t image, int64_t group, int direction,
                      const float *projections, void *scratch, int level)
{
    const int64_t blocks = block_count(scan->channels, kernels[level].lanes);
    for (int64_t block = 0; block < blocks; block++)
        kernels[level].direction(scan, image, group, block, direction, projections, scratch);
}

/* A change of any signature or structure changes this number, which kernels/cpu.py expects. */
EXPORT int scan2d_interface(void)
{
    return 2;
}

struct job {
    const struct scan *scan;
    work_item *work;
    size_t scratch;
    int64_t items;
    _Atomic int64_t next;
};

static void run_items(void *argument)
{
    struct job *job = argument;
    void *scratch = aligned_alloc(64, (job->scratch + 63) / 64 * 64 + 64);
    if (!scratch)
        return;
    for (;;) {
        const int64_t item = atomic_fetch_add(&job->next, 1);
        if (item >= job->items)
            break;
        job->work(job->scan, item, scratch);
    }
    free(scratch);
}

/*
 * Returns 0, or 1 where memory ran out. Fewer threads than asked for are no error, and neither is
 * one without memory while others still work.
 */
static int run_job(struct job *job, parallel_region *parallel, int threads)
{
    run_on_threads(run_items, job, parallel, job->items < threads ? (int)job->items : threads);
    return atomic_load(&job->next) < job->items;
}

/* Waking the threads takes as long as this many updates of a state, or longer. */
static int worthwhile_threads(const struct scan *scan, int threads)
{
    enum { SMALL = 1 << 17 };
    const int64_t updates =
        scan->batch * scan->groups * DIRECTIONS * scan_length(scan) * scan->channels
        * scan->states;
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
        .items = scan2d_items(scan, level),
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
