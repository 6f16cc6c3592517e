// The forward pass; common.cuh comes before it in the same compilation.

#define THREADS (K_DIRECTIONS * CHANNELS)
#define GROUP 8
#define WARPS (THREADS / 32)
#define SLOTS (K_DIRECTIONS * TILE)  // rows staged at once: one warp fetches the B and C of one
#define FETCH_BC ((SLOTS + WARPS - 1) / WARPS)
#define FETCH_DT ((SLOTS * DT_RANK + THREADS - 1) / THREADS)
#define PLACE 0x03ffffff  // the position in an entry of `where`
#define FIRST 0x40000000  // no other direction has written there yet
#define LAST 0x20000000   // all other directions have
#define NOWHERE -1        // beyond the end of the image

// When direction `k` writes its step `l`: by tile, and within a tile rows before columns.
__device__ __forceinline__ int turn(int k, int l) {
    return l / TILE * K_DIRECTIONS + ((k & 1) << 1 | k >> 1);
}

// Where step `l` of direction `k` lies, and whether it is the first or the last to write there.
__device__ __forceinline__ int entry(int k, int l, int height, int width) {
    const int L = height * width;
    if (l >= L) return NOWHERE;
    const int at = position(k, l, height, width);
    const int by_columns = at % width * height + at / width;
    const int mine = turn(k, l);
    const int turns[K_DIRECTIONS] = {turn(0, at), turn(1, by_columns), turn(2, L - 1 - at),
                                     turn(3, L - 1 - by_columns)};
    bool first = true, last = true;
#pragma unroll
    for (int other = 0; other < K_DIRECTIONS; ++other) {
        first &= turns[other] >= mine;
        last &= turns[other] <= mine;
    }
    return at | (first ? FIRST : 0) | (last ? LAST : 0);
}

// The row of projections that belongs to an entry of `where` in direction `k`.
__device__ __forceinline__ const elem* row_of(const elem* image_rows, int place, int k) {
    return image_rows + ((place & PLACE) * K_DIRECTIONS + k) * ROW;
}

// A block walks CHANNELS channels of one image in all four directions at once, tile by tile in
// step. A thread is one channel in one direction; it keeps the states in registers and fetches
// the next tile while it works on this one. The sum over directions is built up in `partial`:
// barriers fix the order in which they write, so it needs no atomics and is deterministic.
extern "C" __global__ void __launch_bounds__(THREADS, 65536 / REGISTERS / THREADS)
scan_forward(const elem* __restrict__ x, const elem* __restrict__ projections,
             const float* __restrict__ dt_weight, const float* __restrict__ dt_bias,
             const float* __restrict__ A, const float* __restrict__ skip, elem* y,
             float* partial, float* __restrict__ states, int batch, int height, int width, int D) {
    __shared__ __align__(16) float rows[SLOTS * STAGED];
    __shared__ float values[TILE][THREADS];  // a thread's own x, then its output
    __shared__ int where[2][SLOTS];  // by direction, then step
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, k = tid / CHANNELS, image = blockIdx.x;
    const int d = blockIdx.y * CHANNELS + tid % CHANNELS;
    const bool active = d < D;
    const int L = height * width, tiles = (L + TILE - 1) / TILE;
    // The tile in which opposite directions meet: only there do they write to the same places.
    const int meeting = (L - 1) / (2 * TILE);
    const long long base = (long long)image * L * D + d;
    const elem* in = x + base;
    elem* out = y + base;
    float* out_sum = partial + base;
    const elem* image_rows = projections + (long long)image * L * K_DIRECTIONS * ROW;

    float s[D_STATE], a2[D_STATE], w[DT_RANK], bias = 0.f, through = 0.f;
#pragma unroll
    for (int n = 0; n < D_STATE; ++n) {
        s[n] = 0.f;
        a2[n] = active ? A[(k * D + d) * D_STATE + n] * LOG2E : 0.f;
    }
#pragma unroll
    for (int r = 0; r < DT_RANK; ++r) w[r] = active ? dt_weight[(k * D + d) * DT_RANK + r] : 0.f;
    if (active) {
        bias = dt_bias[k * D + d];
        through = skip[k * D + d];
    }
    if (tid < SLOTS) where[0][tid] = entry(tid / TILE, tid % TILE, height, width);
    __syncthreads();

    elem next_bc[FETCH_BC], next_dt[FETCH_DT], next_x[TILE];
    for (int tile = -1; tile < tiles; ++tile) {
        const int now = tile & 1, next = now ^ 1;
        if (tile >= 0) {
#pragma unroll
            for (int i = 0; i < FETCH_BC; ++i)
                if (warp + i * WARPS < SLOTS)
                    rows[(warp + i * WARPS) * STAGED + lane] = to_float(next_bc[i]);
#pragma unroll
            for (int i = 0; i < FETCH_DT; ++i) {
                const int index = tid + i * THREADS;
                if (index < SLOTS * DT_RANK)
                    rows[index / DT_RANK * STAGED + 2 * D_STATE + index % DT_RANK] =
                        to_float(next_dt[i]);
            }
#pragma unroll
            for (int t = 0; t < TILE; ++t) values[t][tid] = to_float(next_x[t]);
            if (tid < SLOTS)
                where[next][tid] =
                    entry(tid / TILE, (tile + 1) * TILE + tid % TILE, height, width);
            __syncthreads();
        }
        // Entry tile -1 only fetches tile 0, whose places are in where[0].
        const int* places = where[tile < 0 ? 0 : next];
#pragma unroll
        for (int i = 0; i < FETCH_BC; ++i) {
            const int slot = warp + i * WARPS;
            next_bc[i] = 0;
            if (slot < SLOTS && places[slot] != NOWHERE)
                next_bc[i] = row_of(image_rows, places[slot], slot / TILE)[DT_RANK + lane];
        }
#pragma unroll
        for (int i = 0; i < FETCH_DT; ++i) {
            const int index = tid + i * THREADS, slot = index / DT_RANK;
            next_dt[i] = 0;
            if (slot < SLOTS && places[slot] != NOWHERE)
                next_dt[i] = row_of(image_rows, places[slot], slot / TILE)[index % DT_RANK];
        }
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            const int at = places[k * TILE + t];
            next_x[t] = at != NOWHERE && active ? in[(at & PLACE) * D] : (elem)0;
        }
        if (tile < 0) continue;
#if KEEP
        if (active) {
            float4* kept = (float4*)(states +
                (((long long)(image * K_DIRECTIONS + k) * tiles + tile) * D + d) * D_STATE);
#pragma unroll
            for (int n = 0; n < D_STATE / 4; ++n)
                kept[n] = make_float4(s[4 * n], s[4 * n + 1], s[4 * n + 2], s[4 * n + 3]);
        }
#endif
        // Steps beyond the end see zero rows and zero input; their output is never written.
#pragma unroll 2
        for (int t = 0; t < TILE; ++t) {
            const float* row = rows + (k * TILE + t) * STAGED;
            const float u = values[t][tid];
            float z = bias;
#pragma unroll
            for (int r = 0; r < DT_RANK; ++r) z += w[r] * row[2 * D_STATE + r];
            const float delta = softplus(z), drive = delta * u;
            float even = through * u, odd = 0.f;
#pragma unroll
            for (int n = 0; n < D_STATE; n += 2) {
                s[n] = exp2_fast(delta * a2[n]) * s[n] + drive * row[n];
                s[n + 1] = exp2_fast(delta * a2[n + 1]) * s[n + 1] + drive * row[n + 1];
                even += row[D_STATE + n] * s[n];
                odd += row[D_STATE + n + 1] * s[n + 1];
            }
            values[t][tid] = even + odd;
        }
        // Rows before columns; and where opposite directions meet, one after the other.
#pragma unroll
        for (int phase = 0; phase < K_DIRECTIONS; ++phase) {
            const bool opposite = phase & 1;
            if (opposite && tile != meeting) continue;
            if (phase) __syncthreads();
            const bool mine = (k & 1) == phase >> 1 && (tile != meeting || k >> 1 == opposite);
            if (!mine || !active) continue;
#pragma unroll 1
            for (int start = 0; start < TILE; start += GROUP) {  // in groups, to save registers
                const int* places = where[now] + k * TILE + start;
                float sum[GROUP];
#pragma unroll
                for (int t = 0; t < GROUP; ++t) {
                    sum[t] = values[start + t][tid];
                    const int at = places[t];
                    if (at != NOWHERE && !(at & FIRST)) sum[t] += out_sum[(at & PLACE) * D];
                }
#pragma unroll
                for (int t = 0; t < GROUP; ++t) {
                    const int at = places[t];
                    if (at == NOWHERE) continue;
                    if (at & LAST)
                        out[(at & PLACE) * D] = from_float(sum[t]);
                    else
                        out_sum[(at & PLACE) * D] = sum[t];
                }
            }
        }
        __syncthreads();
    }
}
