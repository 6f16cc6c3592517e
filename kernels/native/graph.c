/*
 * Runs the list of steps that makes an inference graph, see graph.h: all threads stay in one
 * parallel region and take items of one step after the other.
 */

#include "graph.h"

#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#define TEMPLATE "graph_level.h"
#include "levels.h"

#if !defined(__x86_64__)
int half_available(void)
{
    return 0;
}

void half_begin(void)
{
}

void half_end(void)
{
}
#endif

static const struct step_kernels *const levels[] = {
    [BASELINE] = &kernels_baseline,
#if defined(__x86_64__)
    [AVX2] = &kernels_avx2,
    [AVX512] = &kernels_avx512,
#endif
};

static int64_t item_count(const struct step *step, int level)
{
    const int64_t rows = step->batch * step->height, pixels = rows * step->width;
    switch (step->kind) {
    case PRODUCT:
        return block_count(pixels, PRODUCT_ROWS) * block_count(step->columns, PRODUCT_COLUMNS);
    case CONVOLUTION:
        return step->batch * block_count(step->height, (int)convolution_rows(step))
             * block_count(step->columns, PRODUCT_COLUMNS);
    case SCAN: return scan2d_items(step->scan, level);
    case GROUP_SCAN: return step->scan->batch * step->scan->groups;
    case GATE:
    case INTERLEAVE: return block_count(pixels, PIXELS_OF_ITEM);
    case ATTENTION: return step->batch * block_count(step->channels, ATTENTION_CHANNELS);
    case MEAN: return step->batch;
    default: return rows;
    }
}

static size_t scratch_bytes(const struct step *step, int level)
{
    const int64_t padded = step->in_width + 2 * step->padding;
    switch (step->kind) {
    case PRODUCT: return half_bytes(step);
    case SCAN: return scan2d_scratch(step->scan, level);
    case GROUP_SCAN:
        return half_bytes(step) + scan2d_scratch(step->scan, level) + group_scan_bytes(step) + 64;
    case CONVOLUTION:
        return half_bytes(step)
             + (size_t)(((convolution_rows(step) - 1) * step->stride + step->kernel) * padded
                         * step->channels) * sizeof(float);
    case LAYER_NORM: return (size_t)(2 * step->channels) * sizeof(float);
    case MERGE_NORM: return (size_t)(4 * step->channels) * sizeof(float);
    case RECOMBINE:
        return (size_t)(step->in_pitch + step->third_pitch + 2 * step->channels) * sizeof(float);
    default: return 0;
    }
}

struct run {
    const struct step *steps;
    int64_t count;
    int level, threads, half;
    size_t scratch;
    int64_t *items;         /* of all steps before each, and of all */
    _Atomic int64_t *next;  /* (count, threads): how many each thread's share has given out */
    _Atomic int64_t done;   /* items of all steps */
    _Atomic int working;    /* threads that had memory */
};

static void wait_for(struct run *run, int64_t items)
{
    enum { SPINS = 2000 };
    for (int spin = 0; atomic_load_explicit(&run->done, memory_order_acquire) < items; spin++) {
        if (spin > SPINS)
            sched_yield();
#if defined(__x86_64__)
        else
            _mm_pause();
#endif
    }
}

/*
 * Work on one thread's share of a step, and return how many items that were. The same rows of an
 * image are the same thread's in each step, as far as possible: they are in its cache.
 */
static int64_t run_share(struct run *run, int64_t s, int share, void *scratch)
{
    const struct step *step = run->steps + s;
    const int64_t items = run->items[s + 1] - run->items[s];
    const int64_t first = items * share / run->threads, end = items * (share + 1) / run->threads;
    int64_t finished = 0;
    for (;; finished++) {
        const int64_t item = first + atomic_fetch_add(run->next + s * run->threads + share, 1);
        if (item >= end)
            return finished;
        if (step->kind == SCAN)
            scan2d_work(step->scan, item, scratch, run->level);
        else
            levels[run->level]->work[step->kind](step, item, scratch);
    }
}

static void run_steps(void *argument)
{
    struct run *run = argument;
    void *scratch = aligned_alloc(64, (run->scratch + 127) / 64 * 64);
    if (!scratch)
        return;
    const int own = atomic_fetch_add(&run->working, 1);
    if (run->half)
        half_begin();
    for (int64_t s = 0; s < run->count; s++) {
        int64_t finished = 0;
        if (run->steps[s].waits)
            wait_for(run, run->items[s]);
        for (int other = 0; other < run->threads; other++)
            finished += run_share(run, s, (own + other) % run->threads, scratch);
        atomic_fetch_add_explicit(&run->done, finished, memory_order_release);
    }
    if (run->half)
        half_end();
    free(scratch);
}

/*
 * Run all steps. Returns 0, or 1 where memory ran out. ``parallel`` may be null: threads are then
 * started for the call.
 */
EXPORT int graph_run(const struct step *steps, int64_t count, int level, parallel_region *parallel,
                     int threads)
{
    struct run run = {.steps = steps, .count = count, .level = level, .threads = threads};
    run.items = malloc((size_t)(count + 1) * sizeof *run.items);
    run.next = calloc((size_t)(count * threads + 1), sizeof *run.next);
    if (run.items && run.next) {
        run.items[0] = 0;
        for (int64_t s = 0; s < count; s++) {
            const size_t bytes = scratch_bytes(steps + s, level);
            run.items[s + 1] = run.items[s] + item_count(steps + s, level);
            run.scratch = bytes > run.scratch ? bytes : run.scratch;
            run.half |= steps[s].half != 0;
        }
        run_on_threads(run_steps, &run, parallel, threads);
    }
    free(run.items);
    free(run.next);
    return atomic_load(&run.working) == 0;
}

/* Whether matrix products may have bfloat16 weights, on the highest level, in this process. */
EXPORT int graph_half_available(void)
{
    return half_available();
}

/* Bytes of struct step, which mambamic/graph/cpu_steps.py lays out again. */
EXPORT int64_t graph_step_bytes(void)
{
    return (int64_t)sizeof(struct step);
}
