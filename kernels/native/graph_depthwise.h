/* Depthwise 3 x 3 convolutions, and what is fused with one, for one instruction set. */

/* The nine taps of LANES channels; taps outside the image have no weight and a pixel inside. */
#define taps NAME(taps)

struct taps {
    vf weight[9];
    int64_t at[9]; /* relative to the pixel */
};

/* Keep those taps whose row and column lie inside. */
INLINE void NAME(mask_taps)(const struct taps *all, int top, int bottom, int left, int right,
                            struct taps *inside)
{
    for (int t = 0; t < 9; t++) {
        const int out = (!top && t < 3) || (!bottom && t > 5) || (!left && t % 3 == 0)
                     || (!right && t % 3 == 2);
        inside->weight[t] = out ? (vf){0} : all->weight[t];
        inside->at[t] = out ? 0 : all->at[t];
    }
}

INLINE vf NAME(apply_taps)(const struct taps *taps, const float *pixel, vf sum, int lanes)
{
    for (int t = 0; t < 9; t++)
        sum += taps->weight[t] * NAME(load)(pixel + taps->at[t], lanes);
    return sum;
}

INLINE void NAME(load_taps)(const float *weight, int64_t channels, int64_t pitch, int64_t width,
                            vf scale, int lanes, struct taps *taps)
{
    for (int t = 0; t < 9; t++) {
        taps->weight[t] = NAME(load)(weight + t * channels, lanes) * scale;
        taps->at[t] = ((t / 3 - 1) * width + t % 3 - 1) * pitch;
    }
}

/* The columns from ``x`` to ``end`` of a row, of LANES channels, one output of each. */
INLINE void NAME(depthwise_span)(const struct step *step, const struct taps *all, int64_t y,
                                 int64_t x, int64_t end, const float *in, const float *bias,
                                 float *out, const int lanes)
{
    const int top = y > 0, bottom = y < step->height - 1, left = x > 0;
    const int right = end < step->width;
    struct taps inside;
    NAME(mask_taps)(all, top, bottom, left, right, &inside);
    if (step->edges)
        bias += (top + 2 * bottom + 4 * left + 8 * right) * step->channels;
    const vf start = NAME(load)(bias, lanes);
    for (; x < end; x++) {
        const vf sum = NAME(apply_taps)(&inside, in + x * step->in_pitch, start, lanes);
        NAME(store)(out + x * step->out_pitch, NAME(activate)(sum, step->activation), lanes);
    }
}

INLINE void NAME(depthwise_block)(const struct step *step, const struct taps *all, int64_t y,
                                  const float *in, const float *bias, float *out, const int lanes)
{
    const int64_t width = step->width;
    NAME(depthwise_span)(step, all, y, 0, 1, in, bias, out, lanes);
    if (width > 2)
        NAME(depthwise_span)(step, all, y, 1, width - 1, in, bias, out, lanes);
    if (width > 1)
        NAME(depthwise_span)(step, all, y, width - 1, width, in, bias, out, lanes);
}

/* One row. */
TARGET static void NAME(depthwise)(const struct step *step, int64_t item, void *scratch)
{
    (void)scratch;
    const int64_t image = item / step->height, y = item % step->height;
    const int64_t channels = step->channels, pixel = item * step->width;
    for (int64_t group = 0; group < step->groups; group++)
        for (int64_t c = 0; c < channels; c += LANES)
            for (int64_t m = 0; m < step->multiplier; m++) {
                const int lanes = block_size(channels, c, LANES);
                const float *in = (const float *)step->in + pixel * step->in_pitch
                                + group * step->in_group + c;
                float *out = step->out + pixel * step->out_pitch + group * step->out_group
                           + m * channels + c;
                const float *bias = step->bias + m * (step->edges ? 16 : 1) * channels + c;
                const vf scale = step->scale
                    ? NAME(load)(step->scale + image * step->scale_pitch + c, lanes)
                    : NAME(splat)(1.0f);
                struct taps all;
                NAME(load_taps)(step->weight + m * 9 * channels + c, channels, step->in_pitch,
                                step->width, scale, lanes, &all);
                if (lanes == LANES)
                    NAME(depthwise_block)(step, &all, y, in, bias, out, LANES);
                else
                    NAME(depthwise_block)(step, &all, y, in, bias, out, lanes);
            }
}

/*
 * Columns of a row of the interaction: ``in`` is the local branch, ``other`` the global one, and
 * each is stored under the mask of the other, the masked local channels ``behind`` the others.
 */
INLINE void NAME(interact_span)(const struct step *step, const struct taps *all, int64_t y,
                                int64_t x, int64_t end, const float *local, const float *global,
                                vf bias, float *out, vf *sum_a, vf *sum_b, const int lanes)
{
    const int64_t half = step->channels, behind = half / 2;
    struct taps inside;
    NAME(mask_taps)(all, y > 0, y < step->height - 1, x > 0, end < step->width, &inside);
    for (; x < end; x++) {
        const vf l = NAME(apply_taps)(&inside, local + x * half, bias, lanes);
        const vf g = NAME(apply_taps)(&inside, global + x * half, bias, lanes);
        const vf a = NAME(logistic)(V_MAX(NAME(splat)(0.0f), l))
                   * NAME(load)(global + x * half, lanes);
        const vf b = NAME(logistic)(NAME(gelu)(g)) * NAME(load)(local + x * half, lanes);
        NAME(store)(out + x * 2 * half, a, lanes);
        NAME(store)(out + x * 2 * half + behind, b, lanes);
        *sum_a += a;
        *sum_b += b;
    }
}

INLINE void NAME(interact_block)(const struct step *step, int64_t item, int64_t c, const int lanes)
{
    const int64_t half = step->channels, quarter = half / 2, y = item % step->height;
    const int64_t width = step->width, place = c + (c >= quarter ? quarter : 0);
    const float *local = (const float *)step->in + item * width * half + c;
    const float *global = step->other + item * width * half + c;
    float *out = step->out + item * width * 2 * half + place;
    const vf bias = NAME(load)(step->bias + c, lanes);
    vf sum_a = {0}, sum_b = {0};
    struct taps all;
    NAME(load_taps)(step->weight + c, half, half, width, NAME(splat)(1.0f), lanes, &all);
    NAME(interact_span)(step, &all, y, 0, 1, local, global, bias, out, &sum_a, &sum_b, lanes);
    if (width > 2)
        NAME(interact_span)(step, &all, y, 1, width - 1, local, global, bias, out, &sum_a, &sum_b,
                            lanes);
    if (width > 1)
        NAME(interact_span)(step, &all, y, width - 1, width, local, global, bias, out, &sum_a,
                            &sum_b, lanes);
    NAME(store)(step->sums + item * 2 * half + place, sum_a, lanes);
    NAME(store)(step->sums + item * 2 * half + place + quarter, sum_b, lanes);
}

/* One row, the first half of the channels and then the second: they are stored apart. */
TARGET static void NAME(interact)(const struct step *step, int64_t item, void *scratch)
{
    (void)scratch;
    const int64_t quarter = step->channels / 2;
    for (int part = 0; part < 2; part++)
        for (int64_t c = 0; c < quarter; c += LANES) {
            const int lanes = block_size(quarter, c, LANES);
            if (lanes == LANES)
                NAME(interact_block)(step, item, part * quarter + c, LANES);
            else
                NAME(interact_block)(step, item, part * quarter + c, lanes);
        }
}

#undef taps
