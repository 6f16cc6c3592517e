/* What every instruction set's copy of the scan shares: the problem and the order of positions. */

#ifndef SCAN2D_H
#define SCAN2D_H

#include <stddef.h>
#include <stdint.h>

enum {
    DIRECTIONS = 4,
    CHUNK = 32,       /* positions between two checkpoints of the backward pass */
    MAX_STATES = 64,
};

/*
 * One call. Shapes, all contiguous: x, y, grad_y (B, L, groups, D); projections (B, L, groups, K,
 * R + 2 N) with dt, then B, then C; dt_weight (K, R, D); dt_bias, skip (K, D); A (K, N, D);
 * L = height * width. ``paired`` projections are (B, groups, 2, L, 2, R + 2 N) instead, for each
 * direction and its reverse, which lie side by side, in the direction's own order: row by row, then
 * column by column. Groups of channels share all parameters; there is one in the backward pass.
 * Gradients of inputs that all images share are kept per image, (B, ...), and summed afterwards in
 * the order of the images; that of x is kept per direction, (B, K, L, D). So no sum depends on
 * the number of threads.
 */
struct scan {
    const float *x, *projections, *dt_weight, *dt_bias, *A, *skip, *grad_y;
    float *y;
    float *grad_x, *grad_projections, *grad_dt_weight, *grad_dt_bias, *grad_A, *grad_skip;
    int64_t batch, height, width, groups, channels, rank, states, paired;
};

static inline int64_t scan_length(const struct scan *scan)
{
    return scan->height * scan->width;
}

/* Numbers per position and direction in the projections. */
static inline int64_t scan_features(const struct scan *scan)
{
    return scan->rank + 2 * scan->states;
}

/* Numbers from one position's projections to the next one's. */
static inline int64_t scan_stride(const struct scan *scan)
{
    return (scan->paired ? 2 : scan->groups * DIRECTIONS) * scan_features(scan);
}

/*
 * The image positions of steps first .. first + count - 1 of a direction: row by row, column by
 * column, and both reversed.
 */
static inline void scan_positions(const struct scan *scan, int direction, int64_t first, int count,
                                  int64_t *positions)
{
    const int by_column = direction & 1, reversed = direction >> 1;
    const int64_t inner = by_column ? scan->height : scan->width;
    const int64_t last = scan_length(scan) - 1;
    int64_t line = first / inner, step = first % inner;
    for (int i = 0; i < count; i++) {
        const int64_t position = by_column ? step * scan->width + line : line * inner + step;
        positions[i] = reversed ? last - position : position;
        if (++step == inner) {
            step = 0;
            line++;
        }
    }
}

/* The forward scan in items that any threads may work on, for one instruction set. */
int64_t scan2d_items(const struct scan *scan, int level);
size_t scan2d_scratch(const struct scan *scan, int level);
void scan2d_work(const struct scan *scan, int64_t item, void *scratch, int level);

/*
 * One direction of all channels of a group, from paired projections of this group; direction 0
 * comes first, and each before its reverse where the bits are to be those of the items.
 */
void scan2d_direction(const struct scan *scan, int64_t image, int64_t group, int direction,
                      const float *projections, void *scratch, int level);

/* How many blocks of ``size`` cover ``total``, and how long the one from ``first`` is. */
static inline int64_t block_count(int64_t total, int size)
{
    return (total + size - 1) / size;
}

static inline int block_size(int64_t total, int64_t first, int size)
{
    const int64_t left = total - first;
    return left < size ? (int)left : size;
}

#endif
