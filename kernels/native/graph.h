/*
 * The inference graph on CPUs: a list of steps over maps in (batch, height, width, channels), all
 * float32. mambamic/graph/cpu_steps.py makes the lists.
 */

#ifndef GRAPH_H
#define GRAPH_H

#include "scan2d.h"

enum kind {
    PIXELS,      /* (B, H, W, 3) bytes in ``in`` to out * scale + shift */
    PRODUCT,     /* rows of ``in`` times weight */
    CONVOLUTION, /* dense, square kernel */
    DEPTHWISE,   /* 3 x 3, padded by 1 */
    LAYER_NORM,  /* rows of ``in``, gathered by ``index`` where there is one */
    MERGE_NORM,  /* the four phases of 2 x 2 patches, normalised together */
    SCAN,        /* ``scan`` */
    GROUP_SCAN,  /* ``scan`` together with the products that give its projections */
    GATE,        /* layer norm of ``in`` times ``other`` */
    RECOMBINE,   /* the end of MambaMIC's global branch */
    INTERACT,    /* MambaMIC's two branches modulate each other; sums for the attention */
    ATTENTION,   /* factors per channel from the sums, to ``scale_out``; means to ``out`` */
    MEAN,        /* over the positions */
    INTERLEAVE,  /* MedMamba's two branches, in turn channel by channel, plus ``in`` */
    KINDS,
};

/* How much of a step is one item; of the steps that are not named here, a row or an image. */
enum {
    PRODUCT_ROWS = 64,
    PRODUCT_COLUMNS = 96,
    PIXELS_OF_ITEM = 64,
    ATTENTION_CHANNELS = 48,
};

enum activation { NONE, RELU, GELU, SILU };

/*
 * One step. Pitches are in floats from one pixel to the next. Sizes are those of the output, of
 * ``in`` where they are called so. A null ``scale`` is one, a null ``bias`` or ``shift`` zero.
 */
struct step {
    const void *in;
    const float *other, *third; /* further inputs of the same height and width */
    const float *weight;        /* PRODUCT, CONVOLUTION: packed (N / lanes, K, lanes);
                                   GROUP_SCAN: two such, for rows and for columns;
                                   DEPTHWISE: (multiplier, 9, C); norms, ATTENTION: (C,) */
    const float *bias;          /* DEPTHWISE with ``edges``: (multiplier, 16, C) */
    const float *scale, *shift; /* of the input's channels; ``scale`` (B, C) if scale_pitch */
    float *out;
    float *scale_out;           /* ATTENTION: (B, C) */
    float *sums;                /* INTERACT, ATTENTION: (B, H, C) */
    const int32_t *index;       /* LAYER_NORM, RECOMBINE: where each channel comes from */
    const int32_t *order;       /* RECOMBINE: which channel is stored at each place */
    const struct scan *scan;
    int64_t kind;
    int64_t waits;              /* for all steps before to end */
    int64_t batch, height, width, in_height, in_width;
    int64_t channels;           /* of the input, or of the output where they are not the same */
    int64_t columns;            /* PRODUCT, CONVOLUTION: channels of the output */
    int64_t in_pitch, out_pitch, third_pitch, scale_pitch;
    int64_t groups, in_group, out_group; /* DEPTHWISE: groups of C channels that share weights;
                                            PRODUCT with ``out_group``: the rows of a pixel, which
                                            are stored that far apart, by position */
    int64_t transposed;                  /* PRODUCT with ``out_group``: column by column */
    int64_t kernel, stride, padding, multiplier, edges, activation;
    int64_t panels;                      /* GROUP_SCAN: from the first weight to the second, in
                                            units of four bytes */
    int64_t half;                        /* PRODUCT, CONVOLUTION, GROUP_SCAN: weight is bfloat16,
                                            packed (N / 16, K / 32, 16, 16, 2), K in pairs */
    float factor;               /* RECOMBINE: of ``other`` */
};

typedef void step_work(const struct step *step, int64_t item, void *scratch);

/* Rows of the output in one item of CONVOLUTION. */
static inline int64_t convolution_rows(const struct step *step)
{
    return step->width < PRODUCT_ROWS ? PRODUCT_ROWS / step->width : 1;
}

/* Inputs of one row of a product. */
static inline int64_t product_depth(const struct step *step)
{
    return step->channels * (step->kind == CONVOLUTION ? step->kernel * step->kernel : 1);
}

/* Bytes that a product with bfloat16 weights needs: its rows as bfloat16, and four tiles. */
static inline size_t half_bytes(const struct step *step)
{
    const int64_t rows = block_count(PRODUCT_ROWS, 32) * 32;
    const int64_t depth = block_count(product_depth(step), 32) * 32;
    return step->half ? (size_t)(rows * depth * 2 + 4 * 16 * 16 * 4) : 0;
}

/* Bytes of projections that an item of GROUP_SCAN needs. */
static inline size_t group_scan_bytes(const struct step *step)
{
    return (size_t)(scan_length(step->scan) * step->columns) * sizeof(float);
}

struct step_kernels {
    step_work *work[KINDS];
};

/* Matrix products on bfloat16 tiles, see graph_half.h: whether they work here, ... */
int half_available(void);
/* ... what a thread calls before and after it uses them, ... */
void half_begin(void);
void half_end(void);

#endif
