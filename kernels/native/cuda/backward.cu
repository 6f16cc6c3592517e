// The backward pass; common.cuh comes before it in the same compilation.
//
// A block walks CHANNELS channels of one image in one direction, from the last tile to the first.
// In a tile it scans forward from the stored state, keeping every state in registers, and then
// walks back. A warp owns 8 channels: a lane has channel lane % 8 and states 4 * (lane / 8) to
// + 3. Sums over channels, which B, C and dt need, are taken by the tensor cores: the states
// lie in the registers as the left operand of a product wants them, and what each channel is
// multiplied by as the right one.

#define OWN 4                           // states a lane holds
#define WARPS (CHANNELS / 8)            // a warp owns 8 channels
#define THREADS (32 * WARPS)
#define RANK_TILES ((DT_RANK + 7) / 8)  // products of 8 columns that cover the rank
#define STEP (2 * D_STATE + 8 * RANK_TILES)   // a staged row: B, C, dt and zeros
#define ROW_TURNS ((TILE + WARPS - 1) / WARPS)
#define STEP_TURNS ((TILE * DT_RANK + THREADS - 1) / THREADS)
// Per position: B and C, each of two halves of the channels, then dt.
#define SUMS (4 * D_STATE + 8 * RANK_TILES)
#define FULL 0xffffffffu
#define LN2 0.6931471805599453f

#if DTYPE == 2
__device__ __forceinline__ elem rounded(float v) {
    elem r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
#else
__device__ __forceinline__ elem rounded(float v) { return from_float(v); }
#endif

#if SPLIT
typedef float proj_grad;  // partial sums over a block's channels, added up afterwards
__device__ __forceinline__ proj_grad to_proj_grad(float v) { return v; }
#else
typedef elem proj_grad;
__device__ __forceinline__ proj_grad to_proj_grad(float v) { return rounded(v); }
#endif

__device__ __forceinline__ void multiply_tf32(float* sum, const float* a, const float* b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// sum += a x b, a warp's 16 x 8 by 8 x 8. The tensor cores cut operands to 11 bits, which is
// what half precision has; float32 operands go in two parts.
__device__ __forceinline__ void multiply(float* sum, const float* a, const float* b) {
#if DTYPE == 0
    float high_a[4], low_a[4], high_b[2], low_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        high_a[i] = __uint_as_float(__float_as_uint(a[i]) & 0xffffe000u);
        low_a[i] = a[i] - high_a[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        high_b[i] = __uint_as_float(__float_as_uint(b[i]) & 0xffffe000u);
        low_b[i] = b[i] - high_b[i];
    }
    multiply_tf32(sum, low_a, high_b);
    multiply_tf32(sum, high_a, low_b);
    multiply_tf32(sum, high_a, high_b);
#else
    multiply_tf32(sum, a, b);
#endif
}

// softplus(z) and its slope.
__device__ __forceinline__ float2 step_size(float z) {
#if DTYPE == 0
    return make_float2(softplus(z), 1.f / (1.f + expf(-z)));
#else
    // To about 1e-5: a series where 1 + e^z would lose what e^z has.
    const float e = exp2_fast(z * LOG2E);
    float log2_of, inverse;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_of) : "f"(1.f + e));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + e));
    const float series = e * (1.f + e * (-0.5f + e * (1.f / 3.f - 0.25f * e)));
    const float delta = e < 0.03125f ? series : log2_of * LN2;
    return z > 20.f ? make_float2(z, 1.f) : make_float2(delta, e * inverse);
#endif
}

// Sum two values each of two steps over the four lanes that share a channel; a lane ends with
// the value lane / 8 % 2 of the step lane / 16.
__device__ __forceinline__ float share(float first0, float second0, float first1, float second1,
                                       int lane) {
    const bool step = lane & 16, value = lane & 8;
    float first = (step ? first1 : first0) +
                  __shfl_xor_sync(FULL, step ? first0 : first1, 16);
    float second = (step ? second1 : second0) +
                   __shfl_xor_sync(FULL, step ? second0 : second1, 16);
    return (value ? second : first) + __shfl_xor_sync(FULL, value ? first : second, 8);
}

// The first value, or the second where the mask is all ones.
__device__ __forceinline__ float chosen(float first, float second, unsigned mask) {
    return __uint_as_float((__float_as_uint(first) & ~mask) | (__float_as_uint(second) & mask));
}

__device__ __forceinline__ float masked(float v, unsigned mask) {
    return __uint_as_float(__float_as_uint(v) & mask);
}

// What a warp has in shared memory for a tile, by position and channel.
struct Own {
    float4 inputs[TILE][8];        // the step, the step times x, the output's gradient, x
    float shares[TILE][2][8];      // sums over the states of a channel: for x, for the step
    float slopes[TILE][8];         // then the gradient of what softplus takes
    float weights[RANK_TILES * 8][8];
};

// What a thread fetches of a tile.
struct Fetched {
    float4 start;  // the states at the tile's start
    elem states[ROW_TURNS], steps[STEP_TURNS], x[TILE / 4], dy[TILE / 4];
};

// Hide from the compiler how a number came about, lest it work it out again at every use.
__device__ __forceinline__ int hidden(int v) {
    asm("" : "+r"(v));
    return v;
}

template <typename T>
__device__ __forceinline__ T& in_shared(char* shared, int offset) {
    return *(T*)(shared + offset);
}

// Where the sum over half of the channels lies for state n of B (of = 0) or C (of = 1). C is
// swizzled, so that a warp writes to all banks.
__device__ __forceinline__ int place_of_sum(int of, int half, int n) {
    return of * 2 * D_STATE + ((half * D_STATE + n) ^ (of * 8));
}

extern "C" __global__ void __launch_bounds__(THREADS, 65536 / REGISTERS / THREADS)
scan_backward(const elem* __restrict__ grad_y, const elem* __restrict__ x,
              const elem* __restrict__ projections, const float* __restrict__ dt_weight,
              const float* __restrict__ dt_bias, const float* __restrict__ A,
              const float* __restrict__ skip, const float* __restrict__ states,
              elem* __restrict__ grad_x, proj_grad* __restrict__ grad_projections,
              float* __restrict__ grad_dt_weight, float* __restrict__ grad_dt_bias,
              float* __restrict__ grad_A, float* __restrict__ grad_skip, int images, int height,
              int width, int D, int stack) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 8, group = lane / 8;
    const int blocks = (D + CHANNELS - 1) / CHANNELS;
    const int k = blockIdx.x % K_DIRECTIONS, block = blockIdx.x / K_DIRECTIONS % blocks;
    const int image = blockIdx.x / K_DIRECTIONS / blocks;
    const int d = block * CHANNELS + warp * 8 + c;
    const bool active = d < D;
    const int there = min(d, D - 1);  // lanes without a channel: another's, with zero x and dy
    const int L = height * width, tiles = (L + TILE - 1) / TILE;
    float* rows = (float*)shared;            // [TILE][STEP], of all warps
    float* all_sums = rows + TILE * STEP;    // [WARPS][TILE][SUMS]
    float* sums = all_sums + warp * TILE * SUMS;
    Own& own = ((Own*)(all_sums + WARPS * TILE * SUMS))[warp];
    // Byte offsets of what a lane reads and writes at each position.
    const int inputs_at = hidden((char*)&own.inputs[0][c] - shared);
    const int b_at = hidden(group * OWN * 4);
    const int sums_at = hidden((char*)(sums + place_of_sum(lane >> 1 & 1, lane >> 2 & 1,
                                                           group * OWN + (lane & 1) * 2)) - shared);
    const int share_at = hidden((char*)&own.shares[group / 2][group % 2][c] - shared);
    const unsigned half = hidden(lane & 4 ? -1 : 0);
    const unsigned mask_b[2] = {(unsigned)hidden(group == 0 ? -1 : 0),
                                (unsigned)hidden(group == 1 ? -1 : 0)};
    const unsigned mask_c[2] = {(unsigned)hidden(group == 2 ? -1 : 0),
                                (unsigned)hidden(group == 3 ? -1 : 0)};

    // Images that are stacked lie side by side at each place.
    const int place = stack * D, row_place = stack * K_DIRECTIONS * ROW;
    const long long first = (long long)(image / stack) * L * stack + image % stack;
    const elem *in = x + first * D + there, *in_grad = grad_y + first * D + there;
    const elem* in_rows = projections + (first * K_DIRECTIONS + k) * ROW;
    elem* out = grad_x + ((long long)k * images * L + first) * D + d;
    proj_grad* out_rows =
        grad_projections + (((long long)block * images * L + first) * K_DIRECTIONS + k) * ROW;
    const float4* kept = (const float4*)(states +
        ((long long)(image * K_DIRECTIONS + k) * tiles * D + there) * D_STATE + group * OWN);

    float a2[OWN], g[OWN], ga[OWN], gw[RANK_TILES][2], gskip = 0.f, gbias = 0.f;
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
        a2[j] = A[(k * D + there) * D_STATE + group * OWN + j] * LOG2E;
        g[j] = ga[j] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < RANK_TILES; ++i) gw[i][0] = gw[i][1] = 0.f;
    const float through = skip[k * D + there], bias = dt_bias[k * D + there];
#pragma unroll
    for (int r = group; r < RANK_TILES * 8; r += 4)
        own.weights[r][c] = r < DT_RANK && active ? dt_weight[(k * D + d) * DT_RANK + r] : 0.f;
    for (int i = threadIdx.x; i < TILE * 8 * RANK_TILES; i += THREADS)
        rows[i / (8 * RANK_TILES) * STEP + 2 * D_STATE + i % (8 * RANK_TILES)] = 0.f;
    __syncthreads();

    // Beyond the end stands the last position again, with zero x, dy and step.
    auto locate = [&](int tile) {
        return position(k, min(tile * TILE + lane % TILE, L - 1), height, width);
    };
    auto fetch = [&](Fetched& next, int tile, int where) {
        next.start = kept[tile * D * (D_STATE / 4)];
#pragma unroll
        for (int i = 0; i < ROW_TURNS; ++i) {
            const int at = __shfl_sync(FULL, where, (warp + i * WARPS) % TILE) * row_place;
            next.states[i] = in_rows[at + DT_RANK + lane];
        }
#pragma unroll
        for (int i = 0; i < STEP_TURNS; ++i) {
            const int index = threadIdx.x + i * THREADS;
            const int at = __shfl_sync(FULL, where, index / DT_RANK % TILE) * row_place;
            next.steps[i] = in_rows[at + index % DT_RANK];
        }
#pragma unroll
        for (int i = 0; i < TILE / 4; ++i) {
            const int at = __shfl_sync(FULL, where, group + 4 * i) * place;
            next.x[i] = in[at];
            next.dy[i] = in_grad[at];
        }
    };
    int where = locate(tiles - 1);
    Fetched now;
    fetch(now, tiles - 1, where);

    for (int tile = tiles - 1; tile >= 0; --tile) {
        const int count = min(TILE, L - tile * TILE);
        const float from_start[OWN] = {now.start.x, now.start.y, now.start.z, now.start.w};
#pragma unroll
        for (int i = 0; i < ROW_TURNS; ++i)
            if (warp + i * WARPS < TILE)
                rows[(warp + i * WARPS) * STEP + lane] = to_float(now.states[i]);
#pragma unroll
        for (int i = 0; i < STEP_TURNS; ++i) {
            const int index = threadIdx.x + i * THREADS;
            if (index < TILE * DT_RANK)
                rows[index / DT_RANK * STEP + 2 * D_STATE + index % DT_RANK] =
                    to_float(now.steps[i]);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE / 4; ++i) {
            const int t = group + 4 * i;
            const bool valid = active && t < count;
            float z = bias;
#pragma unroll
            for (int r = 0; r < DT_RANK; ++r)
                z += rows[t * STEP + 2 * D_STATE + r] * own.weights[r][c];
            const float2 found = step_size(z);
            const float u = valid ? to_float(now.x[i]) : 0.f, delta = valid ? found.x : 0.f;
            own.inputs[t][c] =
                make_float4(delta, delta * u, valid ? to_float(now.dy[i]) : 0.f, u);
            own.slopes[t][c] = valid ? found.y : 0.f;
        }
        __syncwarp();

        float s[TILE][OWN];
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            if (t % 8 == 0 && t >= count) break;
            const float2 input = in_shared<float2>(shared, inputs_at + t * 128);
            const float4 b = in_shared<float4>(shared, b_at + t * STEP * 4);
            const float bs[OWN] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < OWN; ++j)
                s[t][j] = exp2_fast(input.x * a2[j]) * (t ? s[t ? t - 1 : 0][j] : from_start[j]) +
                          input.y * bs[j];
        }
#pragma unroll
        for (int pair = TILE / 2 - 1; pair >= 0; --pair) {
            if (8 * (pair / 4) >= count) continue;
            float gu[2], gdelta[2];
#pragma unroll
            for (int odd = 1; odd >= 0; --odd) {
                const int t = 2 * pair + odd;
                const float4 input = in_shared<float4>(shared, inputs_at + t * 128);
                const float4 b = in_shared<float4>(shared, b_at + t * STEP * 4);
                const float4 C = in_shared<float4>(shared, b_at + (t * STEP + D_STATE) * 4);
                const float bs[OWN] = {b.x, b.y, b.z, b.w}, cs[OWN] = {C.x, C.y, C.z, C.w};
                gu[odd] = gdelta[odd] = 0.f;
#pragma unroll
                for (int j = 0; j < OWN; ++j) {
                    g[j] += input.z * cs[j];
                    gu[odd] += g[j] * bs[j];
                }
                // Columns: by half of the channels, by pair of states, for B and for C.
                const float of_b[2] = {masked(input.y, mask_b[0]), masked(input.y, mask_b[1])};
                const float of_c[2] = {masked(input.z, mask_c[0]), masked(input.z, mask_c[1])};
                float sum[4] = {0.f, 0.f, 0.f, 0.f};
                multiply(sum, g, of_b);
                multiply(sum, s[t], of_c);
                in_shared<float2>(shared, sums_at + t * SUMS * 4) =
                    make_float2(chosen(sum[0], sum[1], half), chosen(sum[2], sum[3], half));
#pragma unroll
                for (int j = 0; j < OWN; ++j) {
                    g[j] *= exp2_fast(input.x * a2[j]);
                    const float carried = g[j] * (t ? s[t ? t - 1 : 0][j] : from_start[j]);
                    ga[j] += input.x * carried;
                    gdelta[odd] += a2[j] * carried;
                }
            }
            in_shared<float>(shared, share_at + pair * 128) =
                share(gu[0], gdelta[0], gu[1], gdelta[1], lane);
        }
        __syncwarp();
        // The states are done with: their registers hold the next tile while this one is finished.
        const int here = where;
        if (tile) {
            where = locate(tile - 1);
            fetch(now, tile - 1, where);
        }
#pragma unroll
        for (int i = 0; i < TILE / 4; ++i) {
            const int t = group + 4 * i, at = __shfl_sync(FULL, here, t) * place;
            const float4 input = own.inputs[t][c];
            const float gu = own.shares[t][0][c];
            const float gdelta = input.w * gu + LN2 * own.shares[t][1][c];
            const float gz = t < count ? gdelta * own.slopes[t][c] : 0.f;
            own.slopes[t][c] = gz;
            gbias += gz;
            gskip += input.z * input.w;
            if (active && t < count) out[at] = rounded(input.x * gu + through * input.z);
        }
        __syncwarp();
        // The low-rank step: its gradient sums over channels, that of its weights over positions.
        const int row = lane / 4, column = lane % 4;
        const float* gz = own.slopes[0];
        const float by_position[4] = {gz[row * 8 + column], gz[(row + 8) * 8 + column],
                                      gz[row * 8 + column + 4], gz[(row + 8) * 8 + column + 4]};
#pragma unroll
        for (int i = 0; i < RANK_TILES; ++i) {
            const int r = i * 8 + row;
            const float weights[2] = {own.weights[r][column], own.weights[r][column + 4]};
            float sum[4] = {0.f, 0.f, 0.f, 0.f}, of_weight[4] = {0.f, 0.f, 0.f, 0.f};
            multiply(sum, by_position, weights);
#pragma unroll
            for (int q = 0; q < 2; ++q)
                *(float2*)(sums + (row + q * 8) * SUMS + 4 * D_STATE + i * 8 + column * 2) =
                    make_float2(sum[2 * q], sum[2 * q + 1]);
#pragma unroll
            for (int t = 0; t < TILE; t += 8) {
                const float by_channel[4] = {gz[(t + column) * 8 + row], 0.f,
                                             gz[(t + column + 4) * 8 + row], 0.f};
                const float dt[2] = {rows[(t + column) * STEP + 2 * D_STATE + r],
                                     rows[(t + column + 4) * STEP + 2 * D_STATE + r]};
                multiply(of_weight, by_channel, dt);
            }
            gw[i][0] += of_weight[0];
            gw[i][1] += of_weight[1];
        }
        __syncthreads();
        const int n = lane % D_STATE;
        const float* half0 = all_sums + warp * SUMS + place_of_sum(lane / D_STATE, 0, n);
        const float* half1 = all_sums + warp * SUMS + place_of_sum(lane / D_STATE, 1, n);
#pragma unroll
        for (int i = 0; i < ROW_TURNS; ++i) {
            const int t = i * WARPS, at = __shfl_sync(FULL, here, (t + warp) % TILE);
            if (t + warp < count) {
                float total = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w)
                    total += half0[(w * TILE + t) * SUMS] + half1[(w * TILE + t) * SUMS];
                out_rows[(long long)at * row_place + DT_RANK + lane] = to_proj_grad(total);
            }
        }
#pragma unroll
        for (int i = 0; i < STEP_TURNS; ++i) {
            const int index = threadIdx.x + i * THREADS, t = index / DT_RANK, r = index % DT_RANK;
            const int at = __shfl_sync(FULL, here, t % TILE);
            if (index < count * DT_RANK) {
                float total = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w)
                    total += all_sums[(w * TILE + t) * SUMS + 4 * D_STATE + r];
                out_rows[(long long)at * row_place + r] = to_proj_grad(total);
            }
        }
    }
    gbias += __shfl_xor_sync(FULL, gbias, 8);
    gskip += __shfl_xor_sync(FULL, gskip, 8);
    gbias += __shfl_xor_sync(FULL, gbias, 16);
    gskip += __shfl_xor_sync(FULL, gskip, 16);
    const long long image_channels = (long long)(image * K_DIRECTIONS + k) * D;
    const int owner = block * CHANNELS + warp * 8 + lane / 4;  // of the sums in gw
#pragma unroll
    for (int i = 0; i < RANK_TILES * 2; ++i) {
        const int r = i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (owner < D && r < DT_RANK)
            grad_dt_weight[(image_channels + owner) * DT_RANK + r] = gw[i / 2][i % 2];
    }
    if (!active) return;
#pragma unroll
    for (int j = 0; j < OWN; ++j)
        grad_A[(image_channels + d) * D_STATE + group * OWN + j] = ga[j];
    if (group == 0) {
        grad_dt_bias[image_channels + d] = gbias;
        grad_skip[image_channels + d] = gskip;
    }
}
