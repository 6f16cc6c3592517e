/*
 * The forward scan for one instruction set; included by scan2d_level.h. Vectors run across
 * channels.
 */

#define weights NAME(weights)

/* One direction's parameters for LANES channels; A is in units of log2, as exp2 is what is run. */
struct weights {
    vf bias, skip, A[MAX_STATES];
    vf *dt; /* [R] */
};

/* Bring one direction's parameters of a block of channels into the lanes. */
TARGET static void NAME(pack)(const struct scan *scan, int direction, int64_t channel, int count,
                              struct weights *w)
{
    const int64_t first = direction * scan->channels + channel;
    const int64_t states = scan->states, rank = scan->rank;
    w->bias = NAME(load)(scan->dt_bias + first, count);
    w->skip = NAME(load)(scan->skip + first, count);
    for (int64_t n = 0; n < states; n++) {
        const int64_t row = direction * states + n;
        w->A[n] = NAME(load)(scan->A + row * scan->channels + channel, count) * LOG2_E;
    }
    for (int64_t r = 0; r < rank; r++) {
        const int64_t row = direction * rank + r;
        w->dt[r] = NAME(load)(scan->dt_weight + row * scan->channels + channel, count);
    }
}

/* Apart from the states, as one softplus takes half as long as all states of its position. */
INLINE void NAME(steps)(const struct scan *scan, const struct weights *w,
                        const float *projections, const int64_t *positions, int count, vf *delta)
{
    const int64_t stride = scan_stride(scan), rank = scan->rank;
    for (int i = 0; i < count; i++) {
        const float *dt = projections + positions[i] * stride;
        vf sum = w->bias;
        for (int64_t r = 0; r < rank; r++)
            sum += w->dt[r] * dt[r];
        delta[i] = NAME(softplus)(sum);
    }
}

/* Advance the states over one chunk; ``y`` may be null. */
INLINE void NAME(advance_any)(const struct scan *scan, const struct weights *w,
                              const float *projections, const int64_t *positions, int count,
                              const vf *delta, const vf *x, vf *y, vf *state)
{
    const int64_t stride = scan_stride(scan);
    for (int i = 0; i < count; i++) {
        const float *b = projections + positions[i] * stride + scan->rank;
        const float *c = b + scan->states;
        const vf drive = delta[i] * x[i];
        vf sum = w->skip * x[i];
        for (int64_t n = 0; n < scan->states; n++) {
            state[n] = NAME(exp2)(delta[i] * w->A[n]) * state[n] + drive * b[n];
            sum += state[n] * c[n];
        }
        if (y)
            y[i] = sum;
    }
}

/*
 * Advance 8 of 16 states from the ``first``, in variables as a compiler keeps an array in memory.
 * Four exponentials go in step: one alone is a chain of ten instructions that wait for each other.
 */
INLINE void NAME(advance_8)(const struct scan *scan, const vf *A, const float *projections,
                            const int64_t *positions, int count, const vf *delta, const vf *x,
                            vf *y, vf *state)
{
    const int64_t stride = scan_stride(scan);
#define LOAD(n) vf s##n = state[n];
#define STEP(n)                                 \
    s##n = e##n * s##n + drive * b[n];          \
    *(n % 2 ? &odd : &even) += s##n * c[n];
#define STORE(n) state[n] = s##n;
    EACH_8(LOAD)
    for (int i = 0; i < count; i++) {
        const float *b = projections + positions[i] * stride, *c = b + 16;
        const vf drive = delta[i] * x[i];
        vf even = y[i], odd = {0}, e0, e1, e2, e3, e4, e5, e6, e7;
        NAME(exp2_of_4)(delta[i] * A[0], delta[i] * A[1], delta[i] * A[2], delta[i] * A[3],
                        &e0, &e1, &e2, &e3);
        EACH_4(STEP)
        NAME(exp2_of_4)(delta[i] * A[4], delta[i] * A[5], delta[i] * A[6], delta[i] * A[7],
                        &e4, &e5, &e6, &e7);
        EACH_4_MORE(STEP)
        y[i] = even + odd;
    }
    EACH_8(STORE)
#undef LOAD
#undef STEP
#undef STORE
}

INLINE void NAME(advance_16)(const struct scan *scan, const struct weights *w,
                             const float *projections, const int64_t *positions, int count,
                             const vf *delta, const vf *x, vf *y, vf *state)
{
    vf unused[CHUNK];
    vf *sums = y ? y : unused;
    for (int i = 0; i < count; i++)
        sums[i] = w->skip * x[i];
    const float *b = projections + scan->rank;
    NAME(advance_8)(scan, w->A, b, positions, count, delta, x, sums, state);
    NAME(advance_8)(scan, w->A + 8, b + 8, positions, count, delta, x, sums, state + 8);
}

/* The same for ``states`` that the call may know as a constant. */
INLINE void NAME(advance)(const int states, const struct scan *scan, const struct weights *w,
                          const float *projections, const int64_t *positions, int count,
                          const vf *delta, const vf *x, vf *y, vf *state)
{
    if (states == 16)
        NAME(advance_16)(scan, w, projections, positions, count, delta, x, y, state);
    else
        NAME(advance_any)(scan, w, projections, positions, count, delta, x, y, state);
}

#if LANES == 16
/* As NAME(pack) for at most 8 channels: two states share a vector, n and n + 8. */
TARGET static void NAME(pack_halves)(const struct scan *scan, int direction, int64_t channel,
                                     int count, struct weights *w)
{
    NAME(pack)(scan, direction, channel, count, w);
    for (int n = 0; n < 8; n++)
        w->A[n] = (vf)_mm512_shuffle_f32x4((__m512)w->A[n], (__m512)w->A[n + 8], 0x44);
    w->bias = (vf)_mm512_shuffle_f32x4((__m512)w->bias, (__m512)w->bias, 0x44);
    for (int64_t r = 0; r < scan->rank; r++)
        w->dt[r] = (vf)_mm512_shuffle_f32x4((__m512)w->dt[r], (__m512)w->dt[r], 0x44);
}

/* As NAME(advance) for 16 states after NAME(pack_halves); x is in both halves, y in the lower. */
INLINE void NAME(advance_halves)(const struct scan *scan, const struct weights *w,
                                 const float *projections, const int64_t *positions, int count,
                                 const vf *delta, const vf *x, vf *y, vf *state)
{
    const int64_t stride = scan_stride(scan);
    const __m512i upper = _mm512_set_epi32(8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0);
#define LOAD(n)                                                                   \
    const __m512i pair##n = _mm512_add_epi32(upper, _mm512_set1_epi32(n));        \
    vf s##n = state[n];
#define STEP(n)                                                                   \
    s##n = e##n * s##n + drive * (vf)_mm512_permutexvar_ps(pair##n, b);           \
    *(n % 2 ? &odd : &even) += s##n * (vf)_mm512_permutexvar_ps(pair##n, c);
#define STORE(n) state[n] = s##n;
    EACH_8(LOAD)
    for (int i = 0; i < count; i++) {
        const float *from = projections + positions[i] * stride + scan->rank;
        const __m512 b = _mm512_loadu_ps(from), c = _mm512_loadu_ps(from + 16);
        const vf step = delta[i], drive = step * x[i], *A = w->A;
        vf even = w->skip * x[i], odd = {0}, e0, e1, e2, e3, e4, e5, e6, e7;
        NAME(exp2_of_4)(step * A[0], step * A[1], step * A[2], step * A[3], &e0, &e1, &e2, &e3);
        EACH_4(STEP)
        NAME(exp2_of_4)(step * A[4], step * A[5], step * A[6], step * A[7], &e4, &e5, &e6, &e7);
        EACH_4_MORE(STEP)
        const __m512 sum = (__m512)(even + odd);
        y[i] = (vf)_mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e));
    }
    EACH_8(STORE)
#undef LOAD
#undef STEP
#undef STORE
}
#endif

/* Bytes of scratch for NAME(forward). */
static size_t NAME(forward_scratch)(const struct scan *scan)
{
    return (size_t)scan->rank * sizeof(vf);
}

/* Where one direction's projections of a group begin. */
INLINE const float *NAME(projections)(const struct scan *scan, int64_t image, int64_t group,
                                      int direction)
{
    const int64_t features = scan_features(scan), length = scan_length(scan);
    if (scan->paired) {
        const int64_t pair = (image * scan->groups + group) * 2 + (direction & 1);
        return scan->projections + (pair * length * 2 + (direction >> 1)) * features;
    }
    const int64_t first = image * length * scan->groups + group;
    return scan->projections + (first * DIRECTIONS + direction) * features;
}

/* The positions of a chunk; its pixels are fetched early, as they lie far apart. */
INLINE void NAME(look_ahead)(const struct scan *scan, int direction, int64_t start,
                             const float *image_x, const float *image_y, int64_t *positions)
{
    const int64_t length = scan_length(scan), pixel = scan->groups * scan->channels;
    if (start >= length)
        return;
    const int count = block_size(length, start, CHUNK);
    scan_positions(scan, direction, start, count, positions);
    for (int i = 0; i < count; i++) {
        __builtin_prefetch(image_x + positions[i] * pixel);
        __builtin_prefetch(image_y + positions[i] * pixel, 1);
    }
}

/* One direction of a block of channels, all of them or the last few; see NAME(direction). */
INLINE void NAME(lanes_direction)(const struct scan *scan, int direction, int64_t channel,
                                  const int lanes, const float *image_x, float *image_y,
                                  const float *projections, struct weights *w)
{
    const int64_t length = scan_length(scan), pixel = scan->groups * scan->channels;
    vf state[MAX_STATES] = {{0}}, delta[CHUNK], x[CHUNK], y[CHUNK];
    int64_t positions[CHUNK], next[CHUNK], rows[CHUNK];
#if LANES == 16
    const int halves = lanes <= 8 && scan->states == 16;
    if (halves)
        NAME(pack_halves)(scan, direction, channel, lanes, w);
    else
#endif
        NAME(pack)(scan, direction, channel, lanes, w);
    NAME(look_ahead)(scan, direction, 0, image_x, image_y, next);
    for (int64_t start = 0; start < length; start += CHUNK) {
        const int count = block_size(length, start, CHUNK);
        memcpy(positions, next, sizeof next);
        NAME(look_ahead)(scan, direction, start + CHUNK, image_x, image_y, next);
        for (int i = 0; i < count; i++) {
            const int64_t place = direction >> 1 ? length - 1 - start - i : start + i;
            rows[i] = scan->paired ? place : positions[i];
            x[i] = NAME(load)(image_x + positions[i] * pixel, lanes);
        }
        NAME(steps)(scan, w, projections, rows, count, delta);
#if LANES == 16
        if (halves) {
            for (int i = 0; i < count; i++)
                x[i] = (vf)_mm512_shuffle_f32x4((__m512)x[i], (__m512)x[i], 0x44);
            NAME(advance_halves)(scan, w, projections, rows, count, delta, x, y, state);
        } else
#endif
            NAME(advance)((int)scan->states, scan, w, projections, rows, count, delta, x, y,
                          state);
        if (direction)
            for (int i = 0; i < count; i++)
                y[i] += NAME(load)(image_y + positions[i] * pixel, lanes);
        for (int i = 0; i < count; i++)
            NAME(store)(image_y + positions[i] * pixel, y[i], lanes);
    }
}

/*
 * One direction of a block of LANES channels of one group. The first of all directions, 0, writes
 * y, so that it needs no zeros beforehand.
 */
TARGET static void NAME(direction)(const struct scan *scan, int64_t image, int64_t group,
                                   int64_t block, int direction, const float *projections,
                                   void *scratch)
{
    const int64_t channel = block * LANES, pixel = scan->groups * scan->channels;
    const int64_t first = image * scan_length(scan) * pixel + group * scan->channels + channel;
    const int lanes = block_size(scan->channels, channel, LANES);
    struct weights w = {.dt = scratch};
    if (lanes == LANES)
        NAME(lanes_direction)(scan, direction, channel, LANES, scan->x + first, scan->y + first,
                              projections, &w);
    else
        NAME(lanes_direction)(scan, direction, channel, lanes, scan->x + first, scan->y + first,
                              projections, &w);
}

/* One work item: all four directions of a block, one after the other, each before its reverse. */
TARGET static void NAME(forward)(const struct scan *scan, int64_t item, void *scratch)
{
    const int64_t blocks = block_count(scan->channels, LANES);
    const int64_t image = item / blocks / scan->groups, group = item / blocks % scan->groups;
    for (int i = 0; i < DIRECTIONS; i++) {
        const int direction = i / 2 + i % 2 * 2;
        NAME(direction)(scan, image, group, item % blocks, direction,
                        NAME(projections)(scan, image, group, direction), scratch);
    }
}
