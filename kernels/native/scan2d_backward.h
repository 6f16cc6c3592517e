/*
 * The gradients of the scan for one instruction set; included by scan2d_level.h. States
 * are not stored: a first pass keeps one checkpoint per chunk, and each chunk is run again from it.
 */

#define task NAME(task)

/*
 * One direction of one image. Within a chunk all blocks of channels are worked on in turn, so that
 * the gradients that channels share are first added up lane by lane.
 */
struct task {
    const struct scan *scan;
    int direction;
    int64_t blocks, chunks;
    const float *x, *grad_y, *projections;
    float *grad_x, *grad_projections;
    struct weights *w; /* [blocks] */
    vf *checkpoints;   /* [chunks][blocks][N] */
    vf *adjoint;       /* [blocks][N], the gradient of the states after the positions in work */
    vf *sums;          /* [blocks][2 + N + R], the gradients of bias, skip, A and dt_weight */
    vf *shared;        /* [CHUNK][R + 2 N], the gradients of the projections */
    vf *states;        /* [CHUNK + 1][N], before and after each position of a chunk */
    vf *decays;        /* [CHUNK][N] */
    int count;         /* positions in the chunk in work; what follows is of that chunk */
    int64_t positions[CHUNK];
    vf z[CHUNK], u[CHUNK], grad[CHUNK];
};

/* Point the arrays of a task behind it, at ``base``, and return the bytes that all take. */
TARGET static size_t NAME(lay_out)(const struct scan *scan, struct task *task, uintptr_t base)
{
    const size_t vectors = sizeof(vf);
    const size_t blocks = (size_t)block_count(scan->channels, LANES);
    const size_t chunks = (size_t)block_count(scan_length(scan), CHUNK);
    const size_t states = (size_t)scan->states, rank = (size_t)scan->rank;
    uintptr_t end = base + sizeof *task;
#define CARVE(field, bytes) (task->field = (void *)end, end += (bytes))
    CARVE(w, blocks * sizeof(struct weights));
    for (size_t block = 0; base && block < blocks; block++)
        task->w[block].dt = (vf *)end + block * rank;
    end += blocks * rank * vectors;
    CARVE(checkpoints, chunks * blocks * states * vectors);
    CARVE(adjoint, blocks * states * vectors);
    CARVE(sums, blocks * (2 + states + rank) * vectors);
    CARVE(shared, CHUNK * (rank + 2 * states) * vectors);
    CARVE(states, (CHUNK + 1) * states * vectors);
    CARVE(decays, CHUNK * states * vectors);
#undef CARVE
    return end - base;
}

/* Bytes of scratch for NAME(backward). */
TARGET static size_t NAME(backward_scratch)(const struct scan *scan)
{
    struct task measured;
    return NAME(lay_out)(scan, &measured, 0);
}

/* The steps before softplus, z, at the positions of a chunk. */
INLINE void NAME(raw_steps)(const struct scan *scan, const struct weights *w,
                            const float *projections, const int64_t *positions, int count, vf *z)
{
    const int64_t stride = scan_stride(scan);
    for (int i = 0; i < count; i++) {
        const float *dt = projections + positions[i] * stride;
        vf sum = w->bias;
        for (int64_t r = 0; r < scan->rank; r++)
            sum += w->dt[r] * dt[r];
        z[i] = sum;
    }
}

/* Find the positions of a chunk, and its channels' input and steps there. */
TARGET static void NAME(begin_chunk)(struct task *task, int64_t chunk, int64_t block)
{
    const struct scan *scan = task->scan;
    const int64_t channels = scan->channels, channel = block * LANES;
    const int lanes = block_size(channels, channel, LANES);
    task->count = block_size(scan_length(scan), chunk * CHUNK, CHUNK);
    scan_positions(scan, task->direction, chunk * CHUNK, task->count, task->positions);
    for (int i = 0; i < task->count; i++) {
        const int64_t at = task->positions[i] * channels + channel;
        task->u[i] = NAME(load)(task->x + at, lanes);
        task->grad[i] = NAME(load)(task->grad_y + at, lanes);
    }
    NAME(raw_steps)(scan, task->w + block, task->projections, task->positions, task->count,
                    task->z);
}

/* Run all chunks of a block forward and keep the states that each begins with. */
INLINE void NAME(keep_checkpoints)(const int states, struct task *task, int64_t block)
{
    vf state[MAX_STATES] = {{0}};
    for (int64_t chunk = 0; chunk < task->chunks; chunk++) {
        memcpy(task->checkpoints + (chunk * task->blocks + block) * states, state,
               (size_t)states * sizeof *state);
        vf delta[CHUNK];
        NAME(begin_chunk)(task, chunk, block);
        for (int i = 0; i < task->count; i++)
            delta[i] = NAME(softplus)(task->z[i]);
        NAME(advance)(states, task->scan, task->w + block, task->projections, task->positions,
                      task->count, delta, task->u, NULL, state);
    }
}

/* Run a chunk forward from its checkpoint, keep its states, and add to the gradient of C. */
INLINE void NAME(run_again)(const int states, struct task *task, int64_t chunk, int64_t block)
{
    const int64_t rank = task->scan->rank, features = scan_features(task->scan);
    const struct weights *w = task->w + block;
    const vf *checkpoint = task->checkpoints + (chunk * task->blocks + block) * states;
    vf s[MAX_STATES];
    for (int n = 0; n < states; n++)
        task->states[n] = s[n] = checkpoint[n];
    for (int i = 0; i < task->count; i++) {
        const float *b = task->projections + task->positions[i] * DIRECTIONS * features + rank;
        const vf delta = NAME(softplus)(task->z[i]), drive = delta * task->u[i];
        const vf grad = task->grad[i];
        vf *after = task->states + (i + 1) * states, *decays = task->decays + i * states;
        vf *grad_c = task->shared + i * features + rank + states;
        UNROLL_STATES
        for (int n = 0; n < states; n++) {
            decays[n] = NAME(exp2)(delta * w->A[n]);
            after[n] = s[n] = decays[n] * s[n] + drive * b[n];
            grad_c[n] += grad * s[n];
        }
    }
}

/* Run a chunk backward through the states that run_again kept. */
INLINE void NAME(run_back)(const int states, struct task *task, int64_t block)
{
    const struct scan *scan = task->scan;
    const int64_t rank = scan->rank, features = scan_features(scan);
    const int lanes = block_size(scan->channels, block * LANES, LANES);
    const struct weights *w = task->w + block;
    vf *adjoint = task->adjoint + block * states;
    vf *grad_bias = task->sums + block * (2 + states + rank), *grad_skip = grad_bias + 1;
    vf *grad_A = grad_bias + 2, *grad_weight = grad_A + states;
    for (int i = task->count - 1; i >= 0; i--) {
        const float *dt = task->projections + task->positions[i] * DIRECTIONS * features;
        const float *b = dt + rank, *c = b + states;
        const vf *before = task->states + i * states, *decays = task->decays + i * states;
        const vf z = task->z[i], u = task->u[i], grad = task->grad[i];
        const vf delta = NAME(softplus)(z), drive = delta * u;
        vf *grad_dt = task->shared + i * features, *grad_b = grad_dt + rank;
        vf by_drive = {0}, by_decay = {0};
        UNROLL_STATES
        for (int n = 0; n < states; n++) {
            const vf g = adjoint[n] + grad * c[n], carried = g * decays[n];
            const vf of_exponent = carried * before[n];
            grad_b[n] += g * drive;
            by_drive += g * b[n];
            by_decay += of_exponent * w->A[n];
            grad_A[n] += of_exponent * delta;
            adjoint[n] = carried;
        }
        const vf grad_z = (by_drive * u + by_decay * LN_2) * NAME(sigmoid)(z);
        *grad_bias += grad_z;
        *grad_skip += grad * u;
        for (int64_t r = 0; r < rank; r++) {
            grad_weight[r] += grad_z * dt[r];
            grad_dt[r] += grad_z * w->dt[r];
        }
        NAME(store)(task->grad_x + task->positions[i] * scan->channels + block * LANES,
                    delta * by_drive + w->skip * grad, lanes);
    }
}

/* Write the gradients of a chunk's projections, which are sums over all lanes. */
TARGET static void NAME(finish_chunk)(const struct task *task)
{
    const int64_t features = scan_features(task->scan);
    for (int i = 0; i < task->count; i++) {
        float *to = task->grad_projections + task->positions[i] * DIRECTIONS * features;
        for (int64_t f = 0; f < features; f++) {
            const quad *quads = (const quad *)(task->shared + i * features + f);
            quad sum = quads[0];
            for (int q = 1; q < LANES / 4; q++)
                sum += quads[q];
            to[f] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
    }
}

/* Write the gradients of the parameters; ``item`` is the index of image and direction. */
TARGET static void NAME(write_sums)(const struct task *task, int64_t item)
{
    const struct scan *scan = task->scan;
    const int64_t states = scan->states, rank = scan->rank;
    for (int64_t channel = 0; channel < scan->channels; channel++) {
        const int64_t row = item * scan->channels + channel, lane = channel % LANES;
        const vf *sums = task->sums + channel / LANES * (2 + states + rank);
        scan->grad_dt_bias[row] = sums[0][lane];
        scan->grad_skip[row] = sums[1][lane];
        for (int64_t n = 0; n < states; n++)
            scan->grad_A[row * states + n] = sums[2 + n][lane];
        for (int64_t r = 0; r < rank; r++)
            scan->grad_dt_weight[row * rank + r] = sums[2 + states + r][lane];
    }
}

INLINE void NAME(run_task)(const int states, struct task *task)
{
    const struct scan *scan = task->scan;
    for (int64_t block = 0; block < task->blocks; block++) {
        const int lanes = block_size(scan->channels, block * LANES, LANES);
        NAME(pack)(scan, task->direction, block * LANES, lanes, task->w + block);
        NAME(keep_checkpoints)(states, task, block);
    }
    for (int64_t chunk = task->chunks - 1; chunk >= 0; chunk--) {
        memset(task->shared, 0, (size_t)(CHUNK * scan_features(scan)) * sizeof(vf));
        for (int64_t block = 0; block < task->blocks; block++) {
            NAME(begin_chunk)(task, chunk, block);
            NAME(run_again)(states, task, chunk, block);
            NAME(run_back)(states, task, block);
        }
        NAME(finish_chunk)(task);
    }
}

/* One work item: one direction of one image, all channels. */
TARGET static void NAME(backward)(const struct scan *scan, int64_t item, void *scratch)
{
    const int64_t length = scan_length(scan), features = scan_features(scan);
    const int64_t image = item / DIRECTIONS, direction = item % DIRECTIONS;
    const int64_t pixels = image * length * scan->channels;
    const int64_t feature = (image * length * DIRECTIONS + direction) * features;
    struct task *task = scratch;
    NAME(lay_out)(scan, task, (uintptr_t)scratch);
    task->scan = scan;
    task->direction = (int)direction;
    task->blocks = block_count(scan->channels, LANES);
    task->chunks = block_count(length, CHUNK);
    task->x = scan->x + pixels;
    task->grad_y = scan->grad_y + pixels;
    task->projections = scan->projections + feature;
    task->grad_x = scan->grad_x + item * length * scan->channels;
    task->grad_projections = scan->grad_projections + feature;
    memset(task->adjoint, 0, (size_t)(task->blocks * scan->states) * sizeof(vf));
    memset(task->sums, 0,
           (size_t)(task->blocks * (2 + scan->states + scan->rank)) * sizeof(vf));
    if (scan->states == 16)
        NAME(run_task)(16, task);
    else
        NAME(run_task)((int)scan->states, task);
    NAME(write_sums)(task, item);
}

#undef task
#undef weights
