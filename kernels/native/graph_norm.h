/* Normalisations, means and whatever moves channels, for one instruction set. */

#define EPSILON 1e-5f

/* Layer norm of ``count`` channels, times ``gate`` if there is one; ``out`` may be ``row``. */
INLINE void NAME(normalise)(const float *row, int64_t count, const float *weight,
                            const float *bias, const float *gate, float *out)
{
    const int64_t whole = count / LANES * LANES;
    const int rest = (int)(count - whole);
    vf sum = {0}, squares = {0};
    for (int64_t c = 0; c < whole; c += LANES)
        sum += NAME(load)(row + c, LANES);
    if (rest)
        sum += NAME(load)(row + whole, rest);
    const float mean = NAME(sum)(sum) / (float)count;
    for (int64_t c = 0; c < whole; c += LANES) {
        const vf v = NAME(load)(row + c, LANES) - mean;
        squares += v * v;
    }
    if (rest) {
        const vf v = NAME(load)(row + whole, rest) - mean;
        squares += v * v;
    }
    /* The lanes beyond the end held zeros. */
    const float beyond = rest ? (float)(LANES - rest) * mean * mean : 0.0f;
    const float variance = (NAME(sum)(squares) - beyond) / (float)count;
    const float scale = 1.0f / sqrtf(variance + EPSILON);
    for (int64_t c = 0; c < count; c += LANES) {
        const int lanes = block_size(count, c, LANES);
        vf v = (NAME(load)(row + c, lanes) - mean) * scale;
        v = v * NAME(load)(weight + c, lanes) + NAME(load)(bias + c, lanes);
        if (gate)
            v *= NAME(load)(gate + c, lanes);
        NAME(store)(out + c, v, lanes);
    }
}

INLINE void NAME(gather)(const float *from, const int32_t *index, int64_t count, float *to)
{
    for (int64_t c = 0; c < count; c++)
        to[c] = from[index[c]];
}

/* Copy channels of an image's pixel, each times its factor. */
INLINE void NAME(scaled)(const struct step *step, int64_t image, const float *from, float *to)
{
    const float *scale = step->scale ? step->scale + image * step->scale_pitch : NULL;
    for (int64_t c = 0; c < step->channels; c++)
        to[c] = scale ? from[c] * scale[c] : from[c];
}

/* One row. */
TARGET static void NAME(layer_norm)(const struct step *step, int64_t item, void *scratch)
{
    const int64_t count = step->channels, first = item * step->width;
    float *row = scratch, *moved = row + count;
    for (int64_t p = first; p < first + step->width; p++) {
        NAME(scaled)(step, item / step->height, (const float *)step->in + p * step->in_pitch, row);
        if (step->index)
            NAME(gather)(row, step->index, count, moved);
        NAME(normalise)(step->index ? moved : row, count, step->weight, step->bias,
                        NULL, step->out + p * step->out_pitch);
    }
}

/* One row of the output. */
TARGET static void NAME(merge_norm)(const struct step *step, int64_t item, void *scratch)
{
    const int64_t image = item / step->height, y = item % step->height, count = step->channels;
    const float *in = (const float *)step->in
                    + (image * step->in_height + 2 * y) * step->in_width * count;
    float *row = scratch, *out = step->out + item * step->width * 4 * count;
    for (int64_t x = 0; x < step->width; x++, in += 2 * count, out += 4 * count) {
        for (int phase = 0; phase < 4; phase++)
            NAME(scaled)(step, image, in + (phase % 2 * step->in_width + phase / 2) * count,
                         row + phase * count);
        NAME(normalise)(row, 4 * count, step->weight, step->bias, NULL, out);
    }
}

TARGET static void NAME(gate)(const struct step *step, int64_t item, void *scratch)
{
    (void)scratch;
    const int64_t total = step->batch * step->height * step->width, count = step->channels;
    const int64_t first = item * PIXELS_OF_ITEM;
    const int64_t end = first + block_size(total, first, PIXELS_OF_ITEM);
    for (int64_t p = first; p < end; p++)
        NAME(normalise)((const float *)step->in + p * count, count, step->weight, step->bias,
                        step->other + p * count, step->out + p * count);
}

/*
 * One row: a pixel takes the feed-forward's result, ``in`` and the filtered ``third``, from its
 * mirror image across the diagonal.
 */
TARGET static void NAME(recombine)(const struct step *step, int64_t item, void *scratch)
{
    const int64_t image = item / step->height, y = item % step->height, count = step->channels;
    float *both = scratch, *row = both + step->in_pitch + step->third_pitch, *normal = row + count;
    for (int64_t x = 0; x < step->width; x++) {
        const int64_t mirror = (image * step->height + x) * step->width + y;
        const int64_t pixel = item * step->width + x;
        memcpy(both, (const float *)step->in + mirror * step->in_pitch,
               (size_t)step->in_pitch * sizeof *both);
        memcpy(both + step->in_pitch, step->third + mirror * step->third_pitch,
               (size_t)step->third_pitch * sizeof *both);
        NAME(gather)(both, step->index, count, row);
        for (int64_t c = 0; c < count; c++)
            row[c] += step->factor * step->other[pixel * count + c];
        NAME(normalise)(row, count, step->weight, step->bias, NULL, normal);
        NAME(gather)(normal, step->order, count, step->out + pixel * count);
    }
}

/* ATTENTION_CHANNELS of one image. */
TARGET static void NAME(attention)(const struct step *step, int64_t item, void *scratch)
{
    (void)scratch;
    const int64_t count = step->channels, parts = block_count(count, ATTENTION_CHANNELS);
    const int64_t image = item / parts, first = item % parts * ATTENTION_CHANNELS;
    const int64_t end = first + block_size(count, first, ATTENTION_CHANNELS);
    const float positions = (float)(step->height * step->width);
    for (int64_t c = first; c < end; c += LANES) {
        const int lanes = block_size(end, c, LANES);
        vf mean = {0};
        for (int64_t y = 0; y < step->height; y++)
            mean += NAME(load)(step->sums + (image * step->height + y) * count + c, lanes);
        mean /= positions;
        const vf scale = NAME(logistic)(mean * NAME(load)(step->weight + c, lanes));
        NAME(store)(step->scale_out + image * count + c, scale, lanes);
        NAME(store)(step->out + image * count + c, mean * scale, lanes);
    }
}

/* One image. */
TARGET static void NAME(mean)(const struct step *step, int64_t item, void *scratch)
{
    (void)scratch;
    const int64_t count = step->channels, positions = step->height * step->width;
    const float *in = (const float *)step->in + item * positions * count;
    for (int64_t c = 0; c < count; c += LANES) {
        const int lanes = block_size(count, c, LANES);
        vf sum = {0};
        for (int64_t p = 0; p < positions; p++)
            sum += NAME(load)(in + p * count + c, lanes);
        NAME(store)(step->out + item * count + c, sum / (float)positions, lanes);
    }
}

TARGET static void NAME(interleave)(const struct step *step, int64_t item, void *scratch)
{
    (void)scratch;
    const int64_t total = step->batch * step->height * step->width, half = step->channels / 2;
    const int64_t first = item * PIXELS_OF_ITEM;
    const int64_t count = block_size(total, first, PIXELS_OF_ITEM) * half;
    const float *in = (const float *)step->in + first * 2 * half;
    const float *left = step->other + first * half, *right = step->third + first * half;
    float *out = step->out + first * 2 * half;
    for (int64_t i = 0; i < count; i++) {
        out[2 * i] = in[2 * i] + left[i];
        out[2 * i + 1] = in[2 * i + 1] + right[i];
    }
}

/* One row. */
TARGET static void NAME(pixels)(const struct step *step, int64_t item, void *scratch)
{
    (void)scratch;
    const uint8_t *in = (const uint8_t *)step->in + item * step->width * 3;
    float *out = step->out + item * step->width * 3;
    for (int64_t x = 0; x < step->width; x++)
        for (int c = 0; c < 3; c++)
            out[3 * x + c] = (float)in[3 * x + c] * step->scale[c] + step->shift[c];
}

#undef EPSILON
