// The forward pass; common.cuh and the scan_*.cuh come before it.
//   KEEP      1: store the states that begin every tile
//
// A block is four warps: one for each direction, over the same CHANNELS channels of one image.
// A warp stages a tile of 16 positions by itself: B and C as float, the step sizes, the drive.
// A lane holds SPT states of each of CPT channels in registers; lanes that share a channel add
// up their parts of its output. The sum over directions is built up by tile, rows before
// columns, with barriers between, so it is deterministic without atomics:
//   MERGE_GLOBAL  in `partial`, fetched while the tile is scanned
//   MERGE_SHARED  in shared memory, where the image is small
// Few images do not fill the chip. Then the scan goes in chunks of the sequence, all at once:
//   SUMMARISE     each chunk's final state from a zero start, and its sum of steps
//   RESCAN        each chunk from its own start, which scan_starts has worked out from those; a
//                 direction's outputs go to its own part of `partial`, which scan_merge adds up

// The outputs of a step: the sum over the states of c * s, by the lanes that share a channel.
// Each of them ends with the channel of one of its slots, the one that has its own number. Float32
// is summed in full; otherwise tensor cores do it, with states as exact as the type put out.
__device__ __forceinline__ float read_out(const float s[CPT][SPT], const float c[SPT], int part) {
    float y[4];
#if DTYPE == 0
    const unsigned all = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y[i] = 0.f;
#pragma unroll
        for (int n = 0; n < SPT; ++n)
            if (i < CPT) y[i] += c[n] * s[i < CPT ? i : 0][n];
    }
    const bool upper = part & 2, odd = part & 1;
    y[0] = (upper ? y[2] : y[0]) + __shfl_xor_sync(all, upper ? y[0] : y[2], 2);
    y[1] = (upper ? y[3] : y[1]) + __shfl_xor_sync(all, upper ? y[1] : y[3], 2);
    return (odd ? y[1] : y[0]) + __shfl_xor_sync(all, odd ? y[0] : y[1], 1);
#else
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        const int low = 2 * m, high = 2 * m + 1 < CPT ? 2 * m + 1 : 0;
#pragma unroll
        for (int n = 0; n < SPT; n += 2) {
            const bool there = 2 * m + 1 < CPT;
            const float a[4] = {s[low][n], there ? s[high][n] : 0.f, s[low][n + 1],
                                there ? s[high][n + 1] : 0.f};
            mma(sum, a, c[n], c[n + 1]);
        }
        y[2 * m] = sum[0], y[2 * m + 1] = sum[2];
    }
    const float even = part & 2 ? y[2] : y[0], odd = part & 2 ? y[3] : y[1];
    return part & 1 ? odd : even;
#endif
}

// What a lane reads for one step.
struct Step {
    float b[SPT], c[SPT];
    float2 drive[CPT];  // the step and the drive
};

__device__ __forceinline__ void load_step(Step& step, const float* bc,
                                          const float* const drive[CPT], int t) {
#pragma unroll
    for (int n = 0; n < SPT; n += 4) {
        *(float4*)(step.b + n) = *(const float4*)(bc + t * 2 * D_STATE + n);
        *(float4*)(step.c + n) = *(const float4*)(bc + t * 2 * D_STATE + D_STATE + n);
    }
#pragma unroll
    for (int i = 0; i < CPT; ++i)
        step.drive[i] = *(const float2*)(drive[SWAP ? i ^ (t & 1) : i] + t * STEP_STRIDE);
}

// Scan the staged tile; its outputs overwrite the steps. It goes on to a multiple of GROUP: what
// it makes of steps beyond the end of the image nobody reads.
__device__ __forceinline__ void scan_tile(Warp& warp, float s[CPT][SPT], const float a2[CPT][SPT],
                                          float total[CPT], const int slots[CPT], int part,
                                          int count) {
    const float *bc = warp.bc[0] + part * SPT, *drive[CPT];
    float* out = warp.steps[0] + slots[0] + 8 * part;
#pragma unroll
    for (int i = 0; i < CPT; ++i) drive[i] = warp.steps[0] + 2 * slots[i];
    Step next;
    load_step(next, bc, drive, 0);
#pragma unroll 1
    for (int start = 0; start < count; start += GROUP) {
#pragma unroll
        for (int t = 0; t < GROUP; ++t) {
            const Step now = next;
            load_step(next, bc, drive, t + 1);
#pragma unroll
            for (int i = 0; i < CPT; ++i) {
                if (MODE == SUMMARISE) total[i] += now.drive[i].x;
#pragma unroll
                for (int n = 0; n < SPT; ++n)
                    s[i][n] = exp2_fast(now.drive[i].x * a2[i][n]) * s[i][n] +
                              now.drive[i].y * now.b[n];
            }
            if (MODE == SUMMARISE) continue;
            // All lanes have read this row: they came together in read_out since. What a fourth
            // part of three writes falls between the outputs and the next row.
            out[t * STEP_STRIDE] = read_out(s, now.c, part);
        }
        bc += GROUP * 2 * D_STATE, out += GROUP * STEP_STRIDE;
#pragma unroll
        for (int i = 0; i < CPT; ++i) drive[i] += GROUP * STEP_STRIDE;
    }
}

// Fetch what other directions have left where this tile is to be added.
__device__ __forceinline__ void fetch_sums(Warp& warp, const Problem& p, const float* partial,
                                           Entry where, int from, int lane) {
#if MODE == MERGE_GLOBAL && ALIGNED
#pragma unroll
    for (int start = 0; start < TILE * QUARTERS; start += 32) {
        const int t = (start + lane) / QUARTERS, c = (start + lane) % QUARTERS * 4;
        const unsigned at = __shfl_sync(0xffffffffu, where.place, from + t);
        const int flags = __shfl_sync(0xffffffffu, where.flags, from + t);
        if (!(flags & (FIRST | LATE | BEYOND)) && c < p.channels)
            copy16(&warp.sums[t][c], at_place(partial + c, at, p.y_values * 4));
    }
#endif
}

// Add the scanned tile to the sum over directions, and put out what is complete.
__device__ __forceinline__ void merge(Warp& warp, const Problem& p, elem* y, float* partial,
                                      float* map, Entry where, int from, int count, int lane) {
#pragma unroll
    for (int start = 0; start < TILE * QUARTERS; start += 32) {
        if (start / QUARTERS >= count) break;
        const int t = (start + lane) / QUARTERS, c = (start + lane) % QUARTERS * 4;
        const unsigned at = __shfl_sync(0xffffffffu, where.place, from + t);
        const int flags = __shfl_sync(0xffffffffu, where.flags, from + t);
        const bool there = !(flags & BEYOND) && c < p.channels;
        const bool complete = MODE <= MERGE_SHARED && (flags & LAST);
        const int valid = p.channels - c;
        float4 v = *(const float4*)&warp.steps[t][c];
#if MODE == MERGE_SHARED
        float* sum = map + at * CHANNELS + c;
        const float4 before = *(const float4*)sum;
#else
        float* sum = at_place(partial + c, at, p.y_values * 4);
        float4 before = make_float4(0.f, 0.f, 0.f, 0.f);
#if MODE == MERGE_GLOBAL
        before = *(const float4*)&warp.sums[t][c];
        if (there && ((flags & LATE) || (!ALIGNED && !(flags & FIRST))))
            before = load_sum(sum, valid);
#endif
#endif
        v = make_float4(v.x * READ_OUT + before.x, v.y * READ_OUT + before.y,
                        v.z * READ_OUT + before.z, v.w * READ_OUT + before.w);
        if (there && complete) store_out(at_place(y + c, at, p.y_values * ELEM_BYTES), v, valid);
        if (there && !complete) {
            if (MODE == MERGE_SHARED)
                *(float4*)sum = v;
            else
                store_sum(sum, v, valid);
        }
    }
}

// Bring the warp's weights into the order in which `lift` reads them.
__device__ __forceinline__ void prepare(Warp& warp, const Problem& p, const float* dt_weight,
                                        const float* dt_bias, const float* skip, int D, int d0,
                                        int lane) {
    const float* weight = dt_weight + (p.k * D + d0) * DT_RANK;
#pragma unroll
    for (int step = 0; step < K_STEPS; ++step)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            const int c = n * 8 + lane / 4, r = step * 8 + lane % 4;
            const bool valid = c < p.channels;
            warp.weights[(step * N_TILES + n) * 32 + lane] =
                make_float2(valid && r < DT_RANK ? weight[c * DT_RANK + r] : 0.f,
                            valid && r + 4 < DT_RANK ? weight[c * DT_RANK + r + 4] : 0.f);
        }
    if (lane >= N_TILES * 4) return;
    float bias[2], through[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int c = lane / 4 * 8 + lane % 4 * 2 + i;
        bias[i] = through[i] = 0.f;
        if (c >= p.channels) continue;
        bias[i] = dt_bias[p.k * D + d0 + c];
        for (int k = 0; k < K_DIRECTIONS; ++k) through[i] += skip[k * D + d0 + c];
    }
    warp.constants[lane] = make_float4(bias[0], bias[1], through[0], through[1]);
}

// Store the states of a tile or chunk at its place in (..., D, D_STATE).
__device__ __forceinline__ void keep_states(const float s[CPT][SPT], float* states, long long index,
                                            int D, int d0, const int slots[CPT],
                                            const bool valid[CPT], int part) {
#pragma unroll
    for (int i = 0; i < CPT; ++i) {
        if (!valid[i]) continue;
        float4* kept = (float4*)(states + (index * D + d0 + slots[i]) * D_STATE + part * SPT);
#pragma unroll
        for (int n = 0; n < SPT; n += 4)
            kept[n / 4] = make_float4(s[i][n], s[i][n + 1], s[i][n + 2], s[i][n + 3]);
    }
}

#define ROWS_WRITTEN 1  // named barriers: writers arrive, those who go on from there wait
#define COLUMNS_WRITTEN 2

extern "C" __global__ void __launch_bounds__(THREADS, 65536 / REGISTERS / THREADS)
scan_forward(const elem* __restrict__ x, const elem* __restrict__ projections,
             const float* __restrict__ dt_weight, const float* __restrict__ dt_bias,
             const float* __restrict__ A, const float* __restrict__ skip, elem* y,
             float* partial, float* states, float* sums, int images, int height, int width, int D,
             int x_stride, int stack, int groups, int chunk_tiles) {
    extern __shared__ __align__(16) char memory[];
    const int lane = threadIdx.x % 32, k = threadIdx.x / 32, part = lane % SHARING;
    const int L = height * width, tiles = (L + TILE - 1) / TILE;
    const int chunks = (tiles + chunk_tiles - 1) / chunk_tiles;
    const int chunk = blockIdx.x % chunks, group = blockIdx.x / chunks % groups;
    const int image = blockIdx.x / chunks / groups, d0 = group * CHANNELS;
    const bool rows_first = !(k & 1);
    // The tile in which opposite directions meet: only there do they write to the same places.
    const int meeting = (L - 1) / (2 * TILE);
    Warp& warp = ((Warp*)memory)[k];
    float* map = (float*)((Warp*)memory + K_DIRECTIONS);

    Problem p;
    p.k = k, p.height = height, p.width = width, p.channels = min(CHANNELS, D - d0);
    p.first = chunk * chunk_tiles, p.last = min(tiles, p.first + chunk_tiles);
    const int per_scan = PACKED ? (K_DIRECTIONS * DT_RANK + 7) / 8 * 8 + K_DIRECTIONS * 2 * D_STATE
                                : K_DIRECTIONS * ROW;
    const int row_stride = stack * per_scan, y_stride = stack * D;
    p.x_bytes = x_stride * ELEM_BYTES, p.row_bytes = row_stride * ELEM_BYTES, p.y_values = y_stride;
    p.odd = DTYPE == 0 ? 0 : k & DT_RANK & 1;
    const long long places = (long long)(image / stack) * L;
    const elem* row = projections + places * row_stride + image % stack * per_scan;
    p.bc = row + k * 2 * D_STATE;
    p.rows = row + (PACKED ? K_DIRECTIONS * 2 * D_STATE + k * DT_RANK : k * ROW) - p.odd;
    const int channel = image % stack * D + d0;
    p.x = x + places * x_stride + channel;
    y += places * y_stride + channel;
    partial += places * y_stride + channel + (MODE == RESCAN ? (long long)images * L * D * k : 0);

    const long long sequence = ((long long)image * K_DIRECTIONS + k) * chunks + chunk;
    float s[CPT][SPT], a2[CPT][SPT], total[CPT];
    int slots[CPT];
    bool valid[CPT];
#pragma unroll
    for (int i = 0; i < CPT; ++i) {
        slots[i] = 8 * i + lane / SHARING;
        valid[i] = slots[i] < p.channels;
        total[i] = 0.f;
        const float4* a = (const float4*)(A + (k * D + d0 + slots[i]) * D_STATE + part * SPT);
#pragma unroll
        for (int n = 0; n < SPT; n += 4) {
            const float4 v = valid[i] ? a[n / 4] : make_float4(0.f, 0.f, 0.f, 0.f);
            a2[i][n] = v.x * LOG2E, a2[i][n + 1] = v.y * LOG2E;
            a2[i][n + 2] = v.z * LOG2E, a2[i][n + 3] = v.w * LOG2E;
        }
#pragma unroll
        for (int n = 0; n < SPT; n += 4) {
            float4 start = make_float4(0.f, 0.f, 0.f, 0.f);
            if (MODE == RESCAN && valid[i])
                start = *(const float4*)(states + (sequence * D + d0 + slots[i]) * D_STATE +
                                         part * SPT + n);
            s[i][n] = start.x, s[i][n + 1] = start.y, s[i][n + 2] = start.z, s[i][n + 3] = start.w;
        }
    }
    prepare(warp, p, dt_weight, dt_bias, skip, D, d0, lane);
    // Half of the lanes know where this tile's steps lie, the other half where the next one's.
    Walk walk = walk_from(k, p.first * TILE + lane, height, width);
    Entry where = entry(walk, k, height, width), after = where;
    fetch(warp, p, where.place, 0, lane);
    for (int tile = p.first; tile < p.last; ++tile) {
        const int from = (tile - p.first) % 2 * TILE, count = min(TILE, L - tile * TILE);
        await_copies();
        __syncwarp();
        stage(warp, p, where, from, count, map, lane);
        __syncwarp();
        if (tile + 1 < p.last) {
            if (from) {
                advance(walk, k, height, width);
                after = entry(walk, k, height, width);
            }
            fetch(warp, p, after.place, TILE - from, lane);
        }
        if (MODE <= MERGE_SHARED && rows_first && tile && tile - 1 != meeting)
            barrier_sync(COLUMNS_WRITTEN, THREADS);
        fetch_sums(warp, p, partial, where, from, lane);
        if (KEEP)
            keep_states(s, states, ((long long)image * K_DIRECTIONS + k) * tiles + tile, D, d0,
                        slots, valid, part);
        scan_tile(warp, s, a2, total, slots, part, count);
        await_copies();
        __syncwarp();
        if (MODE == RESCAN) {
            merge(warp, p, y, partial, map, where, from, count, lane);
        } else if (MODE <= MERGE_SHARED) {
            const bool alone = tile == meeting;  // each direction after the other
            if (alone)
#pragma unroll 1
                for (int turn = 0; turn < ((k & 1) << 1 | k >> 1); ++turn) __syncthreads();
            else if (!rows_first)
                barrier_sync(ROWS_WRITTEN, THREADS);
            merge(warp, p, y, partial, map, where, from, count, lane);
            if (alone)
#pragma unroll 1
                for (int turn = (k & 1) << 1 | k >> 1; turn < K_DIRECTIONS; ++turn) __syncthreads();
            else if (rows_first)
                barrier_arrive(ROWS_WRITTEN, THREADS);
            else if (tile + 1 < p.last)
                barrier_arrive(COLUMNS_WRITTEN, THREADS);
        }
        where = after;
    }
#if MODE == SUMMARISE
    keep_states(s, states, sequence, D, d0, slots, valid, part);
    if (part == 0)
#pragma unroll
        for (int i = 0; i < CPT; ++i)
            if (valid[i]) sums[sequence * D + d0 + slots[i]] = total[i];
#endif
}
