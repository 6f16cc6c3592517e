// Batch normalisation in training, with the ReLU behind it, of rows of channels.
// elements.cuh comes before it in the same compilation.
//
//   CHANNELS  a multiple of eight, at most 2048
//   RELU      1: what is negative after the normalisation becomes 0
//
// A thread keeps eight channels and walks over the rows. Sums go through one array per block, added
// up in a fixed order.

#define VECTORS (CHANNELS / VECTOR)
#define THREADS 256
#define ROWS (THREADS / VECTORS)  // that a block works on at once
#define UNROLL 4

struct Own {
    int channel, row;
    bool active;
};

__device__ __forceinline__ Own own_place() {
    Own own;
    own.channel = threadIdx.x % VECTORS * VECTOR;
    own.row = threadIdx.x / VECTORS;
    own.active = own.row < ROWS;
    return own;
}

// Call `work(row)` for this thread's rows, a few of them at a time.
template <typename Work>
__device__ __forceinline__ void each_row(const Own& own, int rows, Work work) {
    if (!own.active) return;
    const int step = gridDim.x * ROWS;
    int row = blockIdx.x * ROWS + own.row;
    for (; (long long)row + (UNROLL - 1) * (long long)step < rows; row += UNROLL * step) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) work(row + i * step);
    }
    for (; row < rows; row += step) work(row);
}

// Add up two values per channel over the rows of a block; sums is (blocks, 2, CHANNELS).
__device__ __forceinline__ void write_sums(const Own& own, const float (&a)[VECTOR],
                                           const float (&b)[VECTOR], float* sums) {
    __shared__ float staged[ROWS][2][CHANNELS];
    if (own.active)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            staged[own.row][0][own.channel + c] = a[c];
            staged[own.row][1][own.channel + c] = b[c];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += THREADS) {
        float total = 0.f;
        for (int row = 0; row < ROWS; ++row) total += staged[row][i / CHANNELS][i % CHANNELS];
        sums[(long long)blockIdx.x * 2 * CHANNELS + i] = total;
    }
}

// Both totals of a channel over all blocks; a warp works on one channel at a time.
__device__ __forceinline__ float2 total(const float* __restrict__ sums, int blocks, int channel) {
    float a = 0.f, b = 0.f;
    for (int block = threadIdx.x % 32; block < blocks; block += 32) {
        a += sums[block * 2 * CHANNELS + channel];
        b += sums[block * 2 * CHANNELS + CHANNELS + channel];
    }
#pragma unroll
    for (int step = 16; step; step /= 2) {
        a += __shfl_xor_sync(0xffffffffu, a, step);
        b += __shfl_xor_sync(0xffffffffu, b, step);
    }
    return make_float2(a, b);
}

#ifdef KERNEL_batch_norm_sums
// Sums of x and of its square, x counted from its first row lest the difference lose precision.
extern "C" __global__ void __launch_bounds__(THREADS)
batch_norm_sums(const elem* __restrict__ x, float* __restrict__ sums, int rows) {
    const Own own = own_place();
    float pivot[VECTOR], sum[VECTOR] = {}, squares[VECTOR] = {};
    load(pivot, x + own.channel);
    each_row(own, rows, [&](int row) {
        float v[VECTOR];
        load(v, x + (long long)row * CHANNELS + own.channel);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            v[c] -= pivot[c];
            sum[c] += v[c];
            squares[c] += v[c] * v[c];
        }
    });
    write_sums(own, sum, squares, sums);
}
#endif

#ifdef KERNEL_batch_norm_statistics
// statistics (4, CHANNELS): mean, 1 over the standard deviation, and the two as a factor and a
// summand with weight and bias; the running ones follow.
extern "C" __global__ void __launch_bounds__(THREADS)
batch_norm_statistics(const elem* __restrict__ x, const float* __restrict__ sums,
                      const float* __restrict__ weight, const float* __restrict__ bias,
                      float* __restrict__ statistics, float* __restrict__ running_mean,
                      float* __restrict__ running_var, int rows, int blocks, float momentum,
                      float eps) {
    const int channel = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (channel >= CHANNELS) return;
    const float2 sum = total(sums, blocks, channel);
    if (threadIdx.x % 32) return;
    const float from_pivot = sum.x / rows, mean = to_float(x[channel]) + from_pivot;
    const float variance = fmaxf(sum.y / rows - from_pivot * from_pivot, 0.f);
    const float inverse = rsqrtf(variance + eps), factor = weight[channel] * inverse;
    statistics[channel] = mean;
    statistics[CHANNELS + channel] = inverse;
    statistics[2 * CHANNELS + channel] = factor;
    statistics[3 * CHANNELS + channel] = bias[channel] - mean * factor;
    const float unbiased = variance * ((float)rows / max(rows - 1, 1));
    running_mean[channel] += momentum * (mean - running_mean[channel]);
    running_var[channel] += momentum * (unbiased - running_var[channel]);
}
#endif

#ifdef KERNEL_batch_norm_apply
extern "C" __global__ void __launch_bounds__(THREADS)
batch_norm_apply(const elem* __restrict__ x, const float* __restrict__ statistics,
                 elem* __restrict__ out, int rows) {
    const Own own = own_place();
    float factor[VECTOR], summand[VECTOR];
    parameters(factor, statistics + 2 * CHANNELS + own.channel);
    parameters(summand, statistics + 3 * CHANNELS + own.channel);
    each_row(own, rows, [&](int row) {
        float v[VECTOR];
        load(v, x + (long long)row * CHANNELS + own.channel);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            v[c] = v[c] * factor[c] + summand[c];
            if (RELU) v[c] = relu(v[c]);
        }
        store(out + (long long)row * CHANNELS + own.channel, v);
    });
}
#endif

// The gradient of the normalised x, and the normalised x itself without weight and bias.
__device__ __forceinline__ void through_relu(float (&g)[VECTOR], float (&v)[VECTOR],
                                             const float (&mean)[VECTOR],
                                             const float (&inverse)[VECTOR],
                                             const float (&factor)[VECTOR],
                                             const float (&summand)[VECTOR]) {
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        if (RELU && v[c] * factor[c] + summand[c] <= 0.f) g[c] = 0.f;
        v[c] = (v[c] - mean[c]) * inverse[c];
    }
}

#ifdef KERNEL_batch_norm_grad_sums
// Sums of the gradient and of its product with the normalised x.
extern "C" __global__ void __launch_bounds__(THREADS)
batch_norm_grad_sums(const elem* __restrict__ grad, const elem* __restrict__ x,
                     const float* __restrict__ statistics, float* __restrict__ sums, int rows) {
    const Own own = own_place();
    float mean[VECTOR], inverse[VECTOR], factor[VECTOR], summand[VECTOR];
    parameters(mean, statistics + own.channel);
    parameters(inverse, statistics + CHANNELS + own.channel);
    parameters(factor, statistics + 2 * CHANNELS + own.channel);
    parameters(summand, statistics + 3 * CHANNELS + own.channel);
    float sum[VECTOR] = {}, along[VECTOR] = {};
    each_row(own, rows, [&](int row) {
        float g[VECTOR], v[VECTOR];
        load(g, grad + (long long)row * CHANNELS + own.channel);
        load(v, x + (long long)row * CHANNELS + own.channel);
        through_relu(g, v, mean, inverse, factor, summand);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) {
            sum[c] += g[c];
            along[c] += g[c] * v[c];
        }
    });
    write_sums(own, sum, along, sums);
}
#endif

#ifdef KERNEL_batch_norm_grad_total
// totals (2, CHANNELS): the gradients of bias and weight.
extern "C" __global__ void __launch_bounds__(THREADS)
batch_norm_grad_total(const float* __restrict__ sums, float* __restrict__ totals, int blocks) {
    const int channel = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (channel >= CHANNELS) return;
    const float2 sum = total(sums, blocks, channel);
    if (threadIdx.x % 32) return;
    totals[channel] = sum.x;
    totals[CHANNELS + channel] = sum.y;
}
#endif

#ifdef KERNEL_batch_norm_grad
extern "C" __global__ void __launch_bounds__(THREADS)
batch_norm_grad(const elem* __restrict__ grad, const elem* __restrict__ x,
                const float* __restrict__ statistics, const float* __restrict__ totals,
                elem* __restrict__ grad_x, int rows) {
    const Own own = own_place();
    float mean[VECTOR], inverse[VECTOR], factor[VECTOR], summand[VECTOR];
    parameters(mean, statistics + own.channel);
    parameters(inverse, statistics + CHANNELS + own.channel);
    parameters(factor, statistics + 2 * CHANNELS + own.channel);
    parameters(summand, statistics + 3 * CHANNELS + own.channel);
    float sum[VECTOR], along[VECTOR];
    parameters(sum, totals + own.channel);
    parameters(along, totals + CHANNELS + own.channel);
    const float share = 1.f / rows;
    each_row(own, rows, [&](int row) {
        float g[VECTOR], v[VECTOR];
        load(g, grad + (long long)row * CHANNELS + own.channel);
        load(v, x + (long long)row * CHANNELS + own.channel);
        through_relu(g, v, mean, inverse, factor, summand);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c)
            g[c] = factor[c] * (g[c] - share * (sum[c] + v[c] * along[c]));
        store(grad_x + (long long)row * CHANNELS + own.channel, g);
    });
}
#endif
