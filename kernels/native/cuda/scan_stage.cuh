// How a warp fetches and stages a tile; common.cuh, scan_walk.cuh, scan_memory.cuh and
// scan_steps.cuh come before it.
//   CHANNELS  per warp, 24 or 32          MODE      one of the four below, see forward.cu
//   PACKED    1: at each place B, C of all directions, then their dt, padded to 8 values
//   WARP_BYTES  of shared memory that the launch gives each warp

#define MERGE_GLOBAL 0
#define MERGE_SHARED 1
#define SUMMARISE 2
#define RESCAN 3

#define CPT (CHANNELS / 8)
#define SPT 4
#define SHARING (D_STATE / SPT)  // lanes that share a channel
#define QUARTERS (CHANNELS / 4)
#define THREADS (32 * K_DIRECTIONS)
#define GROUP (MODE == MERGE_SHARED ? 2 : 8)  // steps between two looks at the count
// The tensor cores cut off what TF32 does not keep of a state, on average this much of it.
#define READ_OUT (DTYPE == 0 ? 1.f : 1.000352f)

// Rows in shared memory, padded so that accesses are free of bank conflicts.
#define X_STRIDE (CHANNELS == 24 ? 24 : CHANNELS + 16 / ELEM_BYTES)
#define STEP_STRIDE (2 * CHANNELS)  // floats: a step and a drive per channel
#define SWAP (CHANNELS == 32)  // in odd rows of steps neighbouring eights change places
#define SUM_STRIDE (CHANNELS == 24 ? 24 : 40)
// Words of 4 bytes in which a row of projections lies, or its dt: it may start halfway in a word.
#define WORDS (((PACKED ? DT_RANK : ROW) * ELEM_BYTES + 2) / 4)
#define RAW_WORDS (WORDS | 1)

struct Warp {
    // (step, drive) by channel, then the outputs. Of the row after the last one, here and in bc,
    // a scan reads what it does not use.
    __align__(16) float steps[TILE][STEP_STRIDE];
    __align__(16) float bc[TILE][2 * D_STATE];
    __align__(16) elem x[TILE][X_STRIDE];
#if MODE == MERGE_GLOBAL
    __align__(16) float sums[TILE][SUM_STRIDE];
#endif
    float4 constants[N_TILES * 4];  // bias and skip of two channels
    float2 weights[K_STEPS * N_TILES * 32];
#if PACKED
    __align__(16) elem raw_bc[TILE][2 * D_STATE];
#endif
    unsigned raw[TILE * RAW_WORDS];
};
static_assert(sizeof(Warp) == WARP_BYTES, "the launch asks for another size");

// What a warp works on, in global memory.
struct Problem {
    int k, height, width, first, last;  // direction; tiles [first, last)
    int channels;                       // valid ones of CHANNELS
    unsigned x_bytes, row_bytes, y_values;  // from place to place
    const elem* x;                          // the first channel
    const elem *rows, *bc;  // the word in which the first row starts; packed: B and C
    int odd;                // rows start halfway in a word
};

// Start copying a tile's x and projections. Beyond the image's end they are some other place's.
__device__ __forceinline__ void fetch(Warp& warp, const Problem& p, unsigned place, int from,
                                      int lane) {
    const unsigned all = 0xffffffffu;
#if PACKED
    const int piece = 16 / ELEM_BYTES, pieces = 2 * D_STATE / piece;
#pragma unroll
    for (int start = 0; start < TILE * pieces; start += 32) {
        const int t = (start + lane) / pieces, n = lane % pieces * piece;
        const unsigned at = __shfl_sync(all, place, from + t);
        copy16(&warp.raw_bc[t][n], at_place(p.bc + n, at, p.row_bytes));
    }
#pragma unroll
    for (int start = 0; start < TILE * WORDS; start += 32) {
        const int t = (start + lane) / WORDS, word = (start + lane) % WORDS;
        const unsigned at = __shfl_sync(all, place, from + t);
        if (t < TILE)
            copy4(warp.raw + t * RAW_WORDS + word,
                  at_place((const unsigned*)p.rows + word, at, p.row_bytes));
    }
#else
#pragma unroll
    for (int t = 0; t < TILE; ++t) {
        const unsigned at = __shfl_sync(all, place, from + t);
#pragma unroll
        for (int word = lane; word < WORDS + lane; word += 32)
            if (word < WORDS)
                copy4(warp.raw + t * RAW_WORDS + word,
                      at_place((const unsigned*)p.rows + word, at, p.row_bytes));
    }
#endif
    const int width = ALIGNED ? 16 / ELEM_BYTES : 1, per_row = CHANNELS / width;
#pragma unroll 4
    for (int start = 0; start < TILE * per_row; start += 32) {
        const int t = (start + lane) / per_row, c = (start + lane) % per_row * width;
        const unsigned at = __shfl_sync(all, place, from + t);
        if (t >= TILE || c >= p.channels) continue;
        const elem* value = at_place(p.x + c, at, p.x_bytes);
        if (ALIGNED)
            copy16(&warp.x[t][c], value);
        else
            warp.x[t][c] = *value;
    }
}

// Turn a fetched tile into what the scan reads: B and C as float, steps, drives; and where this
// direction is the first to write, the sum over directions starts with the skip's part.
__device__ __forceinline__ void stage(Warp& warp, const Problem& p, Entry where, int from,
                                      int count, float* map, int lane) {
    const elem* raw = (const elem*)warp.raw + p.odd;
    const int stride = RAW_WORDS * 4 / ELEM_BYTES, g = lane / 4, t = lane % 4;
#if PACKED
#pragma unroll
    for (int i = lane * 4; i < TILE * 2 * D_STATE; i += 32 * 4)
        *(float4*)(warp.bc[0] + i) = load_four(warp.raw_bc[0] + i);
#else
#pragma unroll
    for (int row = 0; row < TILE; ++row)
        warp.bc[row][lane] = to_float(raw[row * stride + DT_RANK + lane]);
#endif
    float z[N_TILES][4];
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
        const float4 constant = warp.constants[n * 4 + t];
        z[n][0] = z[n][2] = constant.x;
        z[n][1] = z[n][3] = constant.y;
    }
    lift(z, raw + g * stride, stride, warp.weights, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half;
        if (8 * half >= count) break;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            const int c = 8 * n + 2 * t;
            const float2 u = load_pair(&warp.x[row][c]);
            const float d0 = softplus_fast(z[n][2 * half]), d1 = softplus_fast(z[n][2 * half + 1]);
            *(float4*)&warp.steps[row][SWAP ? 2 * (c ^ 8 * (g & 1)) : 2 * c] =
                make_float4(d0, d0 * u.x, d1, d1 * u.y);
        }
#if MODE <= MERGE_SHARED
        const bool first = __shfl_sync(0xffffffffu, where.flags, from + row) & FIRST;
#if MODE == MERGE_GLOBAL
        float* sum = &warp.sums[row][2 * t];
#else
        float* sum = map + __shfl_sync(0xffffffffu, where.place, from + row) * CHANNELS + 2 * t;
#endif
        if (!first) continue;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
            const float4 constant = warp.constants[n * 4 + t];
            const float2 u = load_pair(&warp.x[row][8 * n + 2 * t]);
            *(float2*)(sum + 8 * n) = make_float2(constant.z * u.x, constant.w * u.y);
        }
#endif
    }
}
