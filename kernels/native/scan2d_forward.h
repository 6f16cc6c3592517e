/*
 * The forward scan for one instruction set; included once for each by scan2d.c, which defines
 * LANES, TARGET, NAME, V_MAX and V_MIN. Vectors run across channels.
 */

#define vf NAME(vf)
#define vi NAME(vi)
#define weights NAME(weights)
#define INLINE TARGET static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

/* One direction's parameters for LANES channels; A is in units of log2, as exp2 is what is run. */
struct weights {
    vf bias, skip, A[MAX_STATES];
    vf *dt; /* [R] */
};

INLINE vf NAME(splat)(float value)
{
    return (vf){0} + value;
}

INLINE vf NAME(load)(const float *from, int count)
{
    vf v = {0};
    if (count == LANES)
        memcpy(&v, from, sizeof v);
    else
        memcpy(&v, from, (size_t)count * sizeof *from);
    return v;
}

INLINE void NAME(store)(float *to, vf v, int count)
{
    if (count == LANES)
        memcpy(to, &v, sizeof v);
    else
        memcpy(to, &v, (size_t)count * sizeof *to);
}

/*
 * 2^t to 1.5 ulp: exactly 0 below -127, infinite from 128, NaN for NaN (the second argument of
 * V_MAX and V_MIN is the one that they return for NaN). Adding 1.5 * 2^23 rounds to an integer and
 * leaves it in the low bits.
 */
INLINE vf NAME(exp2)(vf t)
{
    const vf round = NAME(splat)(12582912.0f);
    t = V_MIN(NAME(splat)(128.0f), V_MAX(NAME(splat)(-127.0f), t));
    const vf shifted = t + round;
    const vf f = t - (shifted - round);
    vf p = NAME(splat)(0.0013264727f);
    p = p * f + 0.0096715126f;
    p = p * f + 0.055507337f;
    p = p * f + 0.24022242f;
    p = p * f + 0.69314698f;
    p = p * f + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
}

/* log(1 + e) for e in [0, 1], to 1.5 ulp of the result however small e is. */
INLINE vf NAME(log1p)(vf e)
{
    vf p = NAME(splat)(-0.0033184746f);
    p = p * e + 0.020204594f;
    p = p * e - 0.057664461f;
    p = p * e + 0.10680557f;
    p = p * e - 0.15355397f;
    p = p * e + 0.19695401f;
    p = p * e - 0.24958588f;
    p = p * e + 0.33330511f;
    p = p * e - 0.49999933f;
    p = p * e + 1.0f;
    return p * e;
}

/* exp(-|z|), which neither overflows nor loses the small values. */
INLINE vf NAME(exp_minus_abs)(vf z)
{
    return NAME(exp2)(V_MAX(z, -z) * -LOG2_E);
}

INLINE vf NAME(softplus)(vf z)
{
    return V_MAX(NAME(splat)(0.0f), z) + NAME(log1p)(NAME(exp_minus_abs)(z));
}

/* 1 / (1 + exp(-z)), as accurate for small results as for those near 1. */
INLINE vf NAME(sigmoid)(vf z)
{
    return NAME(exp2)(V_MIN(NAME(splat)(0.0f), z) * LOG2_E) / (1.0f + NAME(exp_minus_abs)(z));
}

/* Bring one direction's parameters of a block of channels into the lanes. */
TARGET static void NAME(pack)(const struct scan *scan, int direction, int64_t channel, int count,
                              struct weights *w)
{
    const int64_t first = direction * scan->channels + channel;
    const int64_t states = scan->states, rank = scan->rank;
    w->bias = NAME(load)(scan->dt_bias + first, count);
    w->skip = NAME(load)(scan->skip + first, count);
    for (int64_t n = 0; n < states; n++) {
        w->A[n] = (vf){0};
        for (int lane = 0; lane < count; lane++)
            w->A[n][lane] = scan->A[(first + lane) * states + n] * LOG2_E;
    }
    for (int64_t r = 0; r < rank; r++) {
        w->dt[r] = (vf){0};
        for (int lane = 0; lane < count; lane++)
            w->dt[r][lane] = scan->dt_weight[(first + lane) * rank + r];
    }
}

/* The steps before softplus, z, at the positions of a chunk. */
INLINE void NAME(raw_steps)(const struct scan *scan, const struct weights *w,
                            const float *projections, const int64_t *positions, int count, vf *z)
{
    const int64_t stride = DIRECTIONS * scan_features(scan);
    for (int i = 0; i < count; i++) {
        const float *dt = projections + positions[i] * stride;
        vf sum = w->bias;
        for (int64_t r = 0; r < scan->rank; r++)
            sum += w->dt[r] * dt[r];
        z[i] = sum;
    }
}

/*
 * Advance the states over one chunk; ``y`` may be null. ``states`` is a constant where the call
 * gives one, and so is the test of ``y``: the states then stay in registers.
 */
INLINE void NAME(advance)(const int states, const struct scan *scan, const struct weights *w,
                          const float *projections, const int64_t *positions, int count,
                          const vf *z, const vf *x, vf *y, vf *state)
{
    const int64_t stride = DIRECTIONS * scan_features(scan);
    vf s[MAX_STATES];
    for (int n = 0; n < states; n++)
        s[n] = state[n];
    for (int i = 0; i < count; i++) {
        const float *b = projections + positions[i] * stride + scan->rank;
        const float *c = b + states;
        const vf delta = NAME(softplus)(z[i]), drive = delta * x[i];
        vf even = w->skip * x[i], odd = {0};
        UNROLL_STATES
        for (int n = 0; n < states; n++) {
            s[n] = NAME(exp2)(delta * w->A[n]) * s[n] + drive * b[n];
            if (n % 2)
                odd += s[n] * c[n];
            else
                even += s[n] * c[n];
        }
        if (y)
            y[i] = even + odd;
    }
    for (int n = 0; n < states; n++)
        state[n] = s[n];
}

/* Bytes of scratch for NAME(forward). */
static size_t NAME(forward_scratch)(const struct scan *scan)
{
    return (size_t)scan->rank * sizeof(vf);
}

/* One work item: all four directions of LANES channels of one image, one after the other. */
TARGET static void NAME(forward)(const struct scan *scan, int64_t item, void *scratch)
{
    const int64_t length = scan_length(scan), channels = scan->channels;
    const int64_t blocks = block_count(channels, LANES);
    const int64_t image = item / blocks, channel = item % blocks * LANES;
    const int lanes = block_size(channels, channel, LANES);
    const float *image_x = scan->x + image * length * channels + channel;
    float *image_y = scan->y + image * length * channels + channel;
    struct weights w = {.dt = scratch};
    for (int direction = 0; direction < DIRECTIONS; direction++) {
        const float *projections =
            scan->projections + (image * length * DIRECTIONS + direction) * scan_features(scan);
        vf state[MAX_STATES] = {{0}}, z[CHUNK], x[CHUNK], y[CHUNK];
        int64_t positions[CHUNK];
        NAME(pack)(scan, direction, channel, lanes, &w);
        for (int64_t start = 0; start < length; start += CHUNK) {
            const int count = block_size(length, start, CHUNK);
            scan_positions(scan, direction, start, count, positions);
            for (int i = 0; i < count; i++)
                x[i] = NAME(load)(image_x + positions[i] * channels, lanes);
            NAME(raw_steps)(scan, &w, projections, positions, count, z);
            if (scan->states == 16)
                NAME(advance)(16, scan, &w, projections, positions, count, z, x, y, state);
            else
                NAME(advance)((int)scan->states, scan, &w, projections, positions, count, z, x, y,
                              state);
            for (int i = 0; i < count; i++) {
                float *to = image_y + positions[i] * channels;
                /* The first direction writes, so that y needs no zeros beforehand. */
                NAME(store)(to, direction ? NAME(load)(to, lanes) + y[i] : y[i], lanes);
            }
        }
    }
}
