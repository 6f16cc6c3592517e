/*
 * Matrix products for one instruction set: dense convolutions, 1 x 1 convolutions, linear layers.
 * A tile of ROWS x 3 vectors stays in registers over the whole depth.
 */

#if LANES == 16
#define ROWS 8
#else
#define ROWS 4
#endif

#define VECTORS 3
#if defined(__clang__)
#define UNROLL_TILE _Pragma("unroll 8")
#else
#define UNROLL_TILE _Pragma("GCC unroll 8")
#endif

INLINE vf NAME(activate)(vf v, int64_t activation)
{
    switch (activation) {
    case RELU: return V_MAX(NAME(splat)(0.0f), v);
    case GELU: return NAME(gelu)(v);
    case SILU: return NAME(silu)(v);
    default: return v;
    }
}

/*
 * rows x vectors outputs. Each row of the input is ``segments`` runs of ``depth`` floats, one run
 * every ``segment`` floats; ``weight`` is (vectors, segments * depth, LANES).
 */
INLINE void NAME(tile)(const int rows, const int vectors, const struct step *step,
                       const float *const *in, int64_t segments, int64_t segment, int64_t depth,
                       int64_t column, float *const *out)
{
    const int64_t panel = segments * depth * LANES;
    const float *weight = step->weight + column / LANES * panel;
    vf sums[ROWS][VECTORS];
    UNROLL_TILE
    for (int r = 0; r < rows; r++)
        UNROLL_TILE
        for (int v = 0; v < vectors; v++)
            sums[r][v] = NAME(splat)(0.0f);
    for (int64_t s = 0; s < segments; s++)
        for (int64_t k = 0; k < depth; k++, weight += LANES) {
            vf w[VECTORS];
            UNROLL_TILE
            for (int v = 0; v < vectors; v++)
                w[v] = NAME(load)(weight + v * panel, LANES);
            UNROLL_TILE
            for (int r = 0; r < rows; r++) {
                const vf x = NAME(splat)(in[r][s * segment + k]);
                UNROLL_TILE
                for (int v = 0; v < vectors; v++)
                    sums[r][v] += x * w[v];
            }
        }
    const int lanes = block_size(step->columns, column + (vectors - 1) * LANES, LANES);
    const float least = step->activation == RELU ? 0.0f : -INFINITY;
    UNROLL_TILE
    for (int v = 0; v < vectors; v++) {
        const vf bias = NAME(load)(step->bias + column + v * LANES, LANES);
        UNROLL_TILE
        for (int r = 0; r < rows; r++)
            sums[r][v] = V_MAX(NAME(splat)(least), sums[r][v] + bias);
    }
    if (step->activation > RELU) {
        vf curved[ROWS][VECTORS];
        UNROLL_TILE
        for (int v = 0; v < vectors; v++)
            UNROLL_TILE
            for (int r = 0; r < rows; r++)
                curved[r][v] = sums[r][v];
        UNROLL_TILE
        for (int r = 0; r < rows; r++)
            UNROLL_TILE
            for (int v = 0; v < vectors; v++)
                NAME(store)(out[r] + column + v * LANES,
                            NAME(activate)(curved[r][v], step->activation),
                            v < vectors - 1 ? LANES : lanes);
        return;
    }
    UNROLL_TILE
    for (int v = 0; v < vectors - 1; v++)
        UNROLL_TILE
        for (int r = 0; r < rows; r++)
            NAME(store)(out[r] + column + v * LANES, sums[r][v], LANES);
    if (lanes == LANES)
        UNROLL_TILE
        for (int r = 0; r < rows; r++)
            NAME(store)(out[r] + column + (vectors - 1) * LANES, sums[r][vectors - 1], LANES);
    else
        UNROLL_TILE
        for (int r = 0; r < rows; r++)
            NAME(store)(out[r] + column + (vectors - 1) * LANES, sums[r][vectors - 1], lanes);
}

#define TILE(rows, vectors)                                                             \
    TARGET static __attribute__((noinline)) void NAME(tile_##rows##_##vectors)(         \
        const struct step *step, const float *const *in, int64_t segments,              \
        int64_t segment, int64_t depth, int64_t column, float *const *out)              \
    {                                                                                   \
        NAME(tile)(rows, vectors, step, in, segments, segment, depth, column, out);     \
    }
#define TILES(rows) TILE(rows, 1) TILE(rows, 2) TILE(rows, 3)
#if ROWS == 8
TILES(8)
#endif
TILES(4) TILES(2) TILES(1)

#if LANES == 16
#include "graph_half.h"
#endif

/* All columns from ``first`` to ``end`` of some rows; ``scratch`` is of half_bytes. */
TARGET static void NAME(row_of_tiles)(const struct step *step, const float *const *in, int rows,
                                      int64_t segments, int64_t segment, int64_t depth,
                                      int64_t first, int64_t end, float *const *out, void *scratch)
{
#if LANES == 16
    if (step->half) {
        half_row_of_tiles(step, in, rows, segments, segment, depth, first, end, out, scratch);
        return;
    }
#endif
    (void)scratch;
    typedef void tile(const struct step *, const float *const *, int64_t, int64_t, int64_t,
                      int64_t, float *const *);
#define OF(rows) {NAME(tile_##rows##_1), NAME(tile_##rows##_2), NAME(tile_##rows##_3)}
    static tile *const tiles[][VECTORS] = {
        OF(1), OF(2), OF(4),
#if ROWS == 8
        OF(8),
#endif
    };
    for (int64_t column = first; column < end;) {
        const int64_t left = block_count(end - column, LANES);
        const int vectors = left == 4 ? 2 : left < VECTORS ? (int)left : VECTORS;
        for (int r = 0; r < rows;) {
            int size = 0; /* log2 of the rows of a tile */
            while ((2 << size) <= rows - r && (2 << size) <= ROWS)
                size++;
            tiles[size][vectors - 1](step, in + r, segments, segment, depth, column, out + r);
            r += 1 << size;
        }
        column += vectors * LANES;
    }
}
#undef OF
#undef TILE
#undef TILES

/* Where the results of a product's rows go. */
INLINE void NAME(outputs)(const struct step *step, int64_t start, int rows, float **out)
{
    if (!step->out_group) {
        for (int r = 0; r < rows; r++)
            out[r] = step->out + (start + r) * step->out_pitch;
        return;
    }
    const int64_t width = step->width / step->groups;
    int64_t group = start % step->groups, x = start / step->groups % width;
    int64_t y = start / step->width % step->height, image = start / step->width / step->height;
    for (int r = 0; r < rows; r++) {
        const int64_t position = step->transposed ? x * step->height + y : y * width + x;
        out[r] = step->out + (image * step->groups + group) * step->out_group
               + position * step->out_pitch;
        if (++group == step->groups) {
            group = 0;
            if (++x == width) {
                x = 0;
                if (++y == step->height) {
                    y = 0;
                    image++;
                }
            }
        }
    }
}

TARGET static void NAME(product)(const struct step *step, int64_t item, void *scratch)
{
    const int64_t total = step->batch * step->height * step->width;
    const int64_t parts = block_count(step->columns, PRODUCT_COLUMNS);
    const int64_t start = item / parts * PRODUCT_ROWS, first = item % parts * PRODUCT_COLUMNS;
    const int rows = block_size(total, start, PRODUCT_ROWS);
    const int64_t end = first + block_size(step->columns, first, PRODUCT_COLUMNS);
    const float *in[PRODUCT_ROWS];
    float *out[PRODUCT_ROWS];
    for (int r = 0; r < rows; r++)
        in[r] = (const float *)step->in + (start + r) * step->in_pitch;
    NAME(outputs)(step, start, rows, out);
    NAME(row_of_tiles)(step, in, rows, 1, 0, step->channels, first, end, out, scratch);
}

/*
 * One group of an image: the projections of a direction and its reverse, which lie side by side,
 * and at once their scans, while the projections are in the cache.
 */
TARGET static void NAME(group_scan)(const struct step *step, int64_t item, void *scratch)
{
    const struct scan *scan = step->scan;
    const int64_t image = item / scan->groups, group = item % scan->groups;
    const int64_t length = scan_length(scan), pixel = scan->groups * scan->channels;
    const float *x = scan->x + image * length * pixel + group * scan->channels;
    float *projections = (float *)((char *)scratch + half_bytes(step));
    void *rest = (char *)projections + (group_scan_bytes(step) + 63) / 64 * 64;
    struct step product = *step;
    for (int pair = 0; pair < 2; pair++) {
        for (int64_t start = 0; start < length; start += PRODUCT_ROWS) {
            const int rows = block_size(length, start, PRODUCT_ROWS);
            int64_t positions[PRODUCT_ROWS];
            const float *in[PRODUCT_ROWS];
            float *out[PRODUCT_ROWS];
            scan_positions(scan, pair, start, rows, positions);
            for (int r = 0; r < rows; r++) {
                in[r] = x + positions[r] * pixel;
                out[r] = projections + (start + r) * step->columns;
            }
            NAME(row_of_tiles)(&product, in, rows, 1, 0, scan->channels, 0, step->columns, out,
                               scratch);
        }
        for (int reverse = 0; reverse < 2; reverse++)
            scan2d_direction(scan, image, group, pair + 2 * reverse,
                             projections + reverse * scan_features(scan), rest, LEVEL);
        product.weight += step->panels;
    }
}

/* One row of the input, scaled and shifted, between zeros. */
TARGET static void NAME(padded_row)(const struct step *step, int64_t image, int64_t row, float *to)
{
    const int64_t channels = step->channels, edge = step->padding * channels;
    const int64_t length = step->in_width * channels;
    if (row < 0 || row >= step->in_height) {
        memset(to, 0, (size_t)(length + 2 * edge) * sizeof *to);
        return;
    }
    memset(to, 0, (size_t)edge * sizeof *to);
    memset(to + edge + length, 0, (size_t)edge * sizeof *to);
    const float *from = (const float *)step->in
                      + (image * step->in_height + row) * step->in_width * step->in_pitch;
    to += edge;
    for (int64_t x = 0; x < step->in_width; x++, from += step->in_pitch, to += channels)
        if (step->scale)
            for (int64_t c = 0; c < channels; c++)
                to[c] = from[c] * step->scale[c] + step->shift[c];
        else
            memcpy(to, from, (size_t)channels * sizeof *to);
}

/* Some columns of as many rows of the output as make a product of about PRODUCT_ROWS pixels. */
TARGET static void NAME(convolution)(const struct step *step, int64_t item, void *scratch)
{
    const int64_t parts = block_count(step->columns, PRODUCT_COLUMNS);
    const int64_t high = convolution_rows(step), blocks = block_count(step->height, (int)high);
    const int64_t image = item / parts / blocks, top = item / parts % blocks * high;
    const int64_t first = item % parts * PRODUCT_COLUMNS;
    const int64_t end = first + block_size(step->columns, first, PRODUCT_COLUMNS);
    const int64_t rows = block_size(step->height, top, (int)high);
    const int64_t segment = (step->in_width + 2 * step->padding) * step->channels;
    float *padded = (float *)((char *)scratch + half_bytes(step));
    for (int64_t k = 0; k < (rows - 1) * step->stride + step->kernel; k++)
        NAME(padded_row)(step, image, top * step->stride + k - step->padding,
                         padded + k * segment);
    for (int64_t start = 0; start < rows * step->width; start += PRODUCT_ROWS) {
        const int count = block_size(rows * step->width, start, PRODUCT_ROWS);
        const float *in[PRODUCT_ROWS];
        float *out[PRODUCT_ROWS];
        for (int r = 0; r < count; r++) {
            const int64_t y = (start + r) / step->width, x = (start + r) % step->width;
            in[r] = padded + y * step->stride * segment + x * step->stride * step->channels;
            out[r] = step->out + ((image * step->height + top + y) * step->width + x)
                                     * step->out_pitch;
        }
        NAME(row_of_tiles)(step, in, count, step->kernel, segment,
                           step->kernel * step->channels, first, end, out, scratch);
    }
}

#undef VECTORS
#undef UNROLL_TILE
#undef ROWS
