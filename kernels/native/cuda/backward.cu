// The backward pass; common.cuh comes before it in the same compilation.

// Copy one direction's rows of a tile into shared memory as float, reordered to B, C, dt.
__device__ __forceinline__ void stage_rows(float* staged, const elem* image, const int* where,
                                           int k, int count, int tid, int threads) {
    for (int i = tid; i < count * ROW; i += threads) {
        int t = i / ROW, c = i % ROW;
        float v = to_float(image[((long long)where[t] * K_DIRECTIONS + k) * ROW + c]);
        staged[t * STAGED + (c < DT_RANK ? 2 * D_STATE + c : c - DT_RANK)] = v;
    }
}

#define LANES 4                      // lanes that share a channel
#define OWN (D_STATE / LANES)        // states a lane holds
#define THREADS (CHANNELS * LANES)   // a warp holds 8 channels
#define WARPS (THREADS / 32)
#define RANKS_OWN ((DT_RANK + LANES - 1) / LANES)
#if SPLIT
typedef float proj_grad;  // partial sums over a block's channels, added up afterwards
__device__ __forceinline__ proj_grad to_proj_grad(float v) { return v; }
#else
typedef elem proj_grad;
__device__ __forceinline__ proj_grad to_proj_grad(float v) { return from_float(v); }
#endif

// Sum each of 2 * OWN values over the eight channels of a warp; every lane ends with
// 2 * OWN / 8 of the sums, so that no shuffle carries a value that nobody keeps.
__device__ __forceinline__ void reduce_scatter(float* v, int lane) {
#pragma unroll
    for (int half = OWN, bit = 16; bit >= 4; half /= 2, bit /= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            float keep = upper ? v[half + i] : v[i], send = upper ? v[i] : v[half + i];
            v[i] = keep + __shfl_xor_sync(0xffffffffu, send, bit);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 65536 / REGISTERS / THREADS)
scan_backward(const elem* __restrict__ grad_y, const elem* __restrict__ x,
              const elem* __restrict__ projections, const float* __restrict__ dt_weight,
              const float* __restrict__ dt_bias, const float* __restrict__ A,
              const float* __restrict__ skip, const float* __restrict__ states, elem* grad_x,
              float* partial, proj_grad* __restrict__ grad_projections,
              float* __restrict__ grad_dt_weight, float* __restrict__ grad_dt_bias,
              float* __restrict__ grad_A, float* __restrict__ grad_skip, int batch, int height,
              int width, int D) {
    __shared__ __align__(16) float rows[TILE * STAGED];
    __shared__ float xs[TILE][CHANNELS], dys[TILE][CHANNELS], deltas[TILE][CHANNELS];
    __shared__ float slopes[TILE][CHANNELS];  // sigmoid(z), then the gradient of z
    __shared__ float gxs[TILE][CHANNELS], weights[DT_RANK][CHANNELS];
    __shared__ float sums[WARPS][TILE][2 * D_STATE];
    __shared__ int where[TILE];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int c = tid / LANES, group = tid % LANES;
    const int image = blockIdx.x, first = blockIdx.y * CHANNELS, d = first + c;
    const bool active = d < D;
    const int L = height * width, tiles = (L + TILE - 1) / TILE;
    const long long base = (long long)image * L * D + first;
    const elem* image_rows = projections + (long long)image * L * K_DIRECTIONS * ROW;
    proj_grad* out_rows =
        grad_projections + (long long)(blockIdx.y * batch + image) * L * K_DIRECTIONS * ROW;

    for (int k = 0; k < K_DIRECTIONS; ++k) {
        float a[OWN], g[OWN], ga[OWN], gw[RANKS_OWN], gskip = 0.f, gbias = 0.f;
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            a[j] = active ? A[(k * D + d) * D_STATE + group * OWN + j] : 0.f;
            g[j] = ga[j] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < RANKS_OWN; ++i) gw[i] = 0.f;
        const float through = active ? skip[k * D + d] : 0.f;
        __syncthreads();
        for (int i = tid; i < DT_RANK * CHANNELS; i += THREADS) {
            int channel = first + i % CHANNELS;
            weights[i / CHANNELS][i % CHANNELS] =
                channel < D ? dt_weight[(k * D + channel) * DT_RANK + i / CHANNELS] : 0.f;
        }
        for (int tile = tiles - 1; tile >= 0; --tile) {
            const int count = min(TILE, L - tile * TILE);
            if (tid < count) where[tid] = position(k, tile * TILE + tid, height, width);
            __syncthreads();
            stage_rows(rows, image_rows, where, k, count, tid, THREADS);
            for (int i = tid; i < count * CHANNELS; i += THREADS) {
                int t = i / CHANNELS, channel = i % CHANNELS;
                long long at = base + (long long)where[t] * D + channel;
                bool there = first + channel < D;
                xs[t][channel] = there ? to_float(x[at]) : 0.f;
                dys[t][channel] = there ? to_float(grad_y[at]) : 0.f;
            }
            __syncthreads();
            for (int i = tid; i < count * CHANNELS; i += THREADS) {
                int t = i / CHANNELS, channel = i % CHANNELS;
                float z = first + channel < D ? dt_bias[k * D + first + channel] : 0.f;
#pragma unroll
                for (int r = 0; r < DT_RANK; ++r)
                    z += weights[r][channel] * rows[t * STAGED + 2 * D_STATE + r];
                deltas[t][channel] = softplus(z);
                slopes[t][channel] = 1.f / (1.f + expf(-z));
            }
            __syncthreads();

            float h[OWN], s[TILE][OWN];
#pragma unroll
            for (int j = 0; j < OWN; ++j)
                h[j] = active ? states[(((long long)(image * K_DIRECTIONS + k) * tiles + tile) * D +
                                        d) * D_STATE + group * OWN + j]
                              : 0.f;
#pragma unroll
            for (int t = 0; t < TILE; ++t) {
                if (t >= count) break;
                const float delta = deltas[t][c], drive = delta * xs[t][c];
#pragma unroll
                for (int j = 0; j < OWN; ++j) {
                    const float before = t ? s[t ? t - 1 : 0][j] : h[j];
                    s[t][j] = exp2_fast(delta * a[j] * LOG2E) * before +
                              drive * rows[t * STAGED + group * OWN + j];
                }
            }
#pragma unroll
            for (int t = TILE - 1; t >= 0; --t) {
                if (t >= count) continue;
                const float delta = deltas[t][c], u = xs[t][c], dy = dys[t][c];
                float gu = 0.f, gdelta = 0.f, v[2 * OWN];
#pragma unroll
                for (int j = 0; j < OWN; ++j) {
                    const float b = rows[t * STAGED + group * OWN + j];
                    const float decay = exp2_fast(delta * a[j] * LOG2E);
                    const float carried = decay * (t ? s[t ? t - 1 : 0][j] : h[j]);
                    g[j] += dy * rows[t * STAGED + D_STATE + group * OWN + j];
                    v[j] = g[j] * delta * u;
                    v[OWN + j] = dy * s[t][j];
                    gu += g[j] * b;
                    gdelta += g[j] * (a[j] * carried + u * b);
                    ga[j] += g[j] * delta * carried;
                    g[j] *= decay;
                }
                gu += __shfl_xor_sync(0xffffffffu, gu, 1);
                gdelta += __shfl_xor_sync(0xffffffffu, gdelta, 1);
                gu += __shfl_xor_sync(0xffffffffu, gu, 2);
                gdelta += __shfl_xor_sync(0xffffffffu, gdelta, 2);
                reduce_scatter(v, lane);
                // Lane bits 4, 3, 2 say which of the sums this lane kept: B or C, and the state.
                const int kept = (lane >> 2) & 7, per = OWN / 4;
#pragma unroll
                for (int i = 0; i < per; ++i) {
                    int index = kept * per + i;
                    sums[warp][t][(index / OWN) * D_STATE + group * OWN + index % OWN] = v[i];
                }
                __syncwarp();
                if (group == 0) {
                    const float gz = gdelta * slopes[t][c];
                    gxs[t][c] = delta * gu + through * dy;
                    slopes[t][c] = gz;
                    gbias += gz;
                    gskip += dy * u;
                }
            }
            __syncthreads();
            for (int i = tid; i < count * 2 * D_STATE; i += THREADS) {
                int t = i / (2 * D_STATE), n = i % (2 * D_STATE);
                float total = 0.f;
#pragma unroll
                for (int i_warp = 0; i_warp < WARPS; ++i_warp) total += sums[i_warp][t][n];
                out_rows[((long long)where[t] * K_DIRECTIONS + k) * ROW + DT_RANK + n] =
                    to_proj_grad(total);
            }
            for (int i = tid; i < count * DT_RANK; i += THREADS) {
                int t = i / DT_RANK, r = i % DT_RANK;
                float total = 0.f;
                for (int channel = 0; channel < CHANNELS; ++channel)
                    total += slopes[t][channel] * weights[r][channel];
                out_rows[((long long)where[t] * K_DIRECTIONS + k) * ROW + r] = to_proj_grad(total);
            }
            for (int i = tid; i < count * CHANNELS; i += THREADS) {
                int t = i / CHANNELS, channel = i % CHANNELS;
                if (first + channel >= D) continue;
                long long at = base + (long long)where[t] * D + channel;
                float total = gxs[t][channel] + (k ? partial[at] : 0.f);
                if (k < K_DIRECTIONS - 1)
                    partial[at] = total;
                else
                    grad_x[at] = from_float(total);
            }
#pragma unroll
            for (int i = 0; i < RANKS_OWN; ++i) {
                int r = group + i * LANES;
                if (r < DT_RANK)
                    for (int t = 0; t < count; ++t)
                        gw[i] += slopes[t][c] * rows[t * STAGED + 2 * D_STATE + r];
            }
            __syncthreads();
        }
        if (!active) continue;
        const long long channel = (long long)(image * K_DIRECTIONS + k) * D + d;
#pragma unroll
        for (int j = 0; j < OWN; ++j) grad_A[channel * D_STATE + group * OWN + j] = ga[j];
#pragma unroll
        for (int i = 0; i < RANKS_OWN; ++i)
            if (group + i * LANES < DT_RANK) grad_dt_weight[channel * DT_RANK + group + i * LANES] = gw[i];
        if (group == 0) {
            grad_dt_bias[channel] = gbias;
            grad_skip[channel] = gskip;
        }
    }
}
