/* Which instruction sets there are here, and threads that work through items. */

#ifndef POOL_H
#define POOL_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum level { BASELINE, AVX2, AVX512 };

/*
 * GOMP_parallel, the entry to the OpenMP threads that torch has already started. They spin for a
 * while after each of torch's own operations, and threads of ours would compete with them for the
 * same cores.
 */
typedef void parallel_region(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* The highest level that the processor and the operating system have. */
int scan2d_best_level(void);

/*
 * Call ``work`` on up to ``threads`` threads at once, this one among them, in a mode where
 * subnormal numbers are zero. ``parallel`` may be null: threads are then started for the call.
 */
void run_on_threads(void (*work)(void *), void *data, parallel_region *parallel, int threads);

#endif
