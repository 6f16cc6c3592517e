// Layer normalisation of rows of few channels, for training: forward and backward.
// elements.cuh comes before it in the same compilation.
//
//   WIDTH  channels that are normalised, a multiple of eight, at most 768
//   GATED  1: the result is multiplied by the SiLU of a gate
//
// LANES lanes share a row and hold it in registers, so that it is read and written once. The
// backward pass normalises again rather than reading statistics. Rows of x, of the gate and of
// the gradient that comes in may lie apart; what is written is dense.

#define VECTORS (WIDTH / VECTOR)
#define LANES (VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : VECTORS > 2 ? 4 : VECTORS)
#define OWN ((VECTORS + LANES - 1) / LANES)
#define THREADS 256
#define ROWS (THREADS / LANES)
#define EACH_VECTOR(i, at)                          \
    _Pragma("unroll") for (int i = 0; i < OWN; ++i) \
        if (const int at = (i * LANES + threadIdx.x % LANES) * VECTOR; at < WIDTH)

typedef float Row[OWN][VECTOR];

__device__ __forceinline__ float row_mean(const Row& row) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) sum += row[i][c];
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum * (1.f / WIDTH);
}

// Subtract the mean, divide by the standard deviation and return 1 over the latter; lanes beyond
// the end of a row keep zeros.
__device__ __forceinline__ float normalise(Row& row, float eps) {
    const float mean = row_mean(row);
    Row squares = {};
    EACH_VECTOR(i, at)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            row[i][c] -= mean;
            squares[i][c] = row[i][c] * row[i][c];
        }
    const float scale = rsqrtf(row_mean(squares) + eps);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) row[i][c] *= scale;
    return scale;
}

#ifdef KERNEL_norm_forward
extern "C" __global__ void __launch_bounds__(THREADS)
norm_forward(const elem* __restrict__ x, const elem* __restrict__ gate,
             const float* __restrict__ weight, const float* __restrict__ bias,
             elem* __restrict__ out, int rows, int stride, int gate_stride, float eps) {
    const long long r = (long long)blockIdx.x * ROWS + threadIdx.x / LANES;
    Row row = {};
    if (r < rows) {
        EACH_VECTOR(i, at) load(row[i], x + r * stride + at);
    }
    normalise(row, eps);
    if (r >= rows) return;
    EACH_VECTOR(i, at) {
        float w[VECTOR], b[VECTOR], z[VECTOR];
        parameters(w, weight + at);
        parameters(b, bias + at);
        if (GATED) load(z, gate + r * gate_stride + at);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
            row[i][c] = (row[i][c] * w[c] + b[c]) * (GATED ? silu(z[c]) : 1.f);
        store(out + r * WIDTH + at, row[i]);
    }
}
#endif

#ifdef KERNEL_norm_backward
// Sum over the lanes and warps of the block that hold the same channels.
__device__ __forceinline__ void write_sums(Row& own, float (*staged)[WIDTH], float* out) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
#pragma unroll
            for (int step = 16; step >= LANES; step /= 2)
                own[i][c] += __shfl_xor_sync(0xffffffffu, own[i][c], step);
    __syncthreads();
    if (lane < LANES) {
        EACH_VECTOR(i, at)
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) staged[warp][at + c] = own[i][c];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < WIDTH; c += THREADS) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < THREADS / 32; ++w) total += staged[w][c];
        out[c] = total;
    }
}

// sums: (blocks, 2, WIDTH), the gradients of weight and bias from the rows of each block.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_backward(const elem* __restrict__ grad, const elem* __restrict__ x,
              const elem* __restrict__ gate, const float* __restrict__ weight,
              const float* __restrict__ bias, elem* __restrict__ grad_x,
              elem* __restrict__ grad_gate, float* __restrict__ sums, int rows, int grad_stride,
              int stride, int gate_stride, float eps) {
    __shared__ float staged[THREADS / 32][WIDTH];
    Row grad_weight = {}, grad_bias = {}, w = {};
    EACH_VECTOR(i, at) parameters(w[i], weight + at);
    for (long long first = (long long)blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
        const long long r = first + threadIdx.x / LANES;
        Row row = {}, g = {};
        if (r < rows) {
            EACH_VECTOR(i, at) {
                load(row[i], x + r * stride + at);
                load(g[i], grad + r * grad_stride + at);
            }
        }
        const float scale = normalise(row, eps);
        if (GATED && r < rows) {
            EACH_VECTOR(i, at) {
                float z[VECTOR], b[VECTOR];
                load(z, gate + r * gate_stride + at);
                parameters(b, bias + at);
#pragma unroll
                for (int c = 0; c < VECTOR; ++c) {
                    const float s = sigmoid(z[c]), normed = row[i][c] * w[i][c] + b[c];
                    const float by_gate = g[i][c] * normed;
                    g[i][c] *= z[c] * s;
                    z[c] = by_gate * s * (1.f + z[c] * (1.f - s));
                }
                store(grad_gate + r * WIDTH + at, z);
            }
        }
        Row projected;
#pragma unroll
        for (int i = 0; i < OWN; ++i)
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) {
                grad_weight[i][c] += g[i][c] * row[i][c];
                grad_bias[i][c] += g[i][c];
                g[i][c] *= w[i][c];
                projected[i][c] = g[i][c] * row[i][c];
            }
        const float mean = row_mean(g), along = row_mean(projected);
        if (r >= rows) continue;
        EACH_VECTOR(i, at) {
#pragma unroll
            for (int c = 0; c < VECTOR; ++c)
                g[i][c] = scale * (g[i][c] - mean - row[i][c] * along);
            store(grad_x + r * WIDTH + at, g[i]);
        }
    }
    write_sums(grad_weight, staged, sums + (long long)blockIdx.x * 2 * WIDTH);
    write_sums(grad_bias, staged, sums + (long long)blockIdx.x * 2 * WIDTH + WIDTH);
}
#endif
