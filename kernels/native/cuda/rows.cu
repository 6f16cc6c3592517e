// Layer normalisations with what stands before and after them, one position (row) at a time.
// elements.cuh comes before it in the same compilation.
//
//   WIDTH  channels that are normalised, a multiple of eight
//
// LANES lanes share a row and hold it in registers, so that it is read and written once. A `gate`
// scales the input per image and channel (channel attention); it may be null.

#define VECTORS (WIDTH / VECTOR)
#define LANES (VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : VECTORS > 2 ? 4 : VECTORS)
#define OWN ((VECTORS + LANES - 1) / LANES)
#define THREADS 256
#define ROWS (THREADS / LANES)

struct Row {
    float v[OWN][VECTOR];
};

__device__ __forceinline__ int lane_of_row() { return threadIdx.x % LANES; }

// Which vector is the lane's i-th, or one beyond the end of the row.
__device__ __forceinline__ int vector_of(int i) { return i * LANES + lane_of_row(); }

__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

// Subtract the mean and divide by the standard deviation; lanes beyond the end keep zeros.
__device__ __forceinline__ void normalise(Row& row) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) sum += row.v[i][c];
    const float mean = row_sum(sum) * (1.f / WIDTH);
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < OWN; ++i)
        if (vector_of(i) < VECTORS)
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) {
                row.v[i][c] -= mean;
                squares += row.v[i][c] * row.v[i][c];
            }
    const float scale = rsqrtf(row_sum(squares) * (1.f / WIDTH) + 1e-5f);
#pragma unroll
    for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) row.v[i][c] *= scale;
}

__device__ __forceinline__ void scale_and_shift(float (&v)[VECTOR], const float* weight,
                                                const float* bias, int at) {
    float w[VECTOR], b[VECTOR];
    parameters(w, weight + at);
    parameters(b, bias + at);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) v[c] = v[c] * w[c] + b[c];
}

__device__ __forceinline__ void multiply(float (&v)[VECTOR], const float* factors) {
    float f[VECTOR];
    parameters(f, factors);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) v[c] *= f[c];
}

__device__ __forceinline__ void add(float (&v)[VECTOR], const float* terms) {
    float t[VECTOR];
    parameters(t, terms);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) v[c] += t[c];
}

#define ROW_INDEX ((long long)blockIdx.x * ROWS + threadIdx.x / LANES)
#define EACH_VECTOR(i, at)                 \
    _Pragma("unroll") for (int i = 0; i < OWN; ++i) \
        if (const int at = vector_of(i) * VECTOR; at < WIDTH)

#ifdef KERNEL_gather_norm
// Normalise the right half of x (rows, 2 WIDTH), to which `offset` is added unless it is null, and
// write it in another order: (rows, WIDTH).
extern "C" __global__ void __launch_bounds__(THREADS)
gather_norm(const elem* __restrict__ x, const float* __restrict__ gate,
            const float* __restrict__ offset, const int* __restrict__ gather, const float* __restrict__ weight,
            const float* __restrict__ bias, elem* __restrict__ out, int rows, int positions) {
    __shared__ float staged[ROWS][WIDTH + 4];
    const long long r = ROW_INDEX;
    const int slot = threadIdx.x / LANES;
    Row row = {};
    if (r < rows) {
        EACH_VECTOR(i, at) {
            load(row.v[i], x + (r * 2 + 1) * WIDTH + at);
            if (gate) multiply(row.v[i], gate + (r / positions * 2 + 1) * WIDTH + at);
            if (offset) add(row.v[i], offset + at);
        }
    }
    normalise(row);
    EACH_VECTOR(i, at)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) staged[slot][at + c] = row.v[i][c];
    __syncwarp();
    if (r >= rows) return;
    EACH_VECTOR(i, at) {
        int from[VECTOR];
        *(int4*)from = __ldg((const int4*)(gather + at));
        *(int4*)(from + 4) = __ldg((const int4*)(gather + at) + 1);
        float v[VECTOR];
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) v[c] = staged[slot][from[c]];
        scale_and_shift(v, weight, bias, at);
        store(out + r * WIDTH + at, v);
    }
}
#endif

#ifdef KERNEL_split_norm
// Scale and shift the left half of x (rows, 2 WIDTH), and normalise the right half.
extern "C" __global__ void __launch_bounds__(THREADS)
split_norm(const elem* __restrict__ x, const float* __restrict__ left_scale,
           const float* __restrict__ left_shift, const float* __restrict__ weight,
           const float* __restrict__ bias, elem* __restrict__ left, elem* __restrict__ right,
           int rows) {
    const long long r = ROW_INDEX;
    Row row = {};
    if (r < rows) {
        EACH_VECTOR(i, at) {
            float v[VECTOR];
            load(v, x + r * 2 * WIDTH + at);
            scale_and_shift(v, left_scale, left_shift, at);
            store(left + r * WIDTH + at, v);
            load(row.v[i], x + (r * 2 + 1) * WIDTH + at);
        }
    }
    normalise(row);
    if (r >= rows) return;
    EACH_VECTOR(i, at) {
        scale_and_shift(row.v[i], weight, bias, at);
        store(right + r * WIDTH + at, row.v[i]);
    }
}
#endif

#ifdef KERNEL_gated_norm
// Normalise the scan's output y (rows, chunks, WIDTH) and multiply it by the SiLU of the gate,
// which stands behind the scanned half in z (rows, 2, chunks, WIDTH).
extern "C" __global__ void __launch_bounds__(THREADS)
gated_norm(const elem* __restrict__ y, const elem* __restrict__ z,
           const float* __restrict__ weight, const float* __restrict__ bias,
           elem* __restrict__ out, int rows, int chunks) {
    const long long r = ROW_INDEX, position = r / chunks;
    Row row = {};
    if (r < rows) {
        EACH_VECTOR(i, at) load(row.v[i], y + r * WIDTH + at);
    }
    normalise(row);
    if (r >= rows) return;
    EACH_VECTOR(i, at) {
        float gate[VECTOR];
        load(gate, z + (r + (position + 1) * chunks) * WIDTH + at);
        scale_and_shift(row.v[i], weight, bias, at);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) row.v[i][c] *= silu(gate[c]);
        store(out + r * WIDTH + at, row.v[i]);
    }
}
#endif

#ifdef KERNEL_transposed_residual_norm
// Add the SiLU of the filtered map, height and width exchanged, to the scaled chunks; normalise.
// n, out (B, side, side, WIDTH); f has rows of `stride` values.
extern "C" __global__ void __launch_bounds__(THREADS)
transposed_residual_norm(const elem* __restrict__ n, const elem* __restrict__ f,
                         const float* __restrict__ weight, const float* __restrict__ bias,
                         elem* __restrict__ out, int rows, int side, int stride, float scale) {
    const long long r = ROW_INDEX;
    Row row = {};
    if (r < rows) {
        const int at_w = r % side, at_h = r / side % side;
        const long long other = r + (long long)(at_w - at_h) * side + at_h - at_w;
        EACH_VECTOR(i, at) {
            float added[VECTOR];
            load(row.v[i], n + r * WIDTH + at);
            load(added, f + other * stride + at);
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) row.v[i][c] = row.v[i][c] * scale + silu(added[c]);
        }
    }
    normalise(row);
    if (r >= rows) return;
    EACH_VECTOR(i, at) {
        scale_and_shift(row.v[i], weight, bias, at);
        store(out + r * WIDTH + at, row.v[i]);
    }
}
#endif

#ifdef KERNEL_merge_norm
// Concatenate the phases of 2x2 patches of x (B, height, width, WIDTH / 4) and normalise; an odd
// last row or column is left out. out (B, height / 2, width / 2, WIDTH).
extern "C" __global__ void __launch_bounds__(THREADS)
merge_norm(const elem* __restrict__ x, const float* __restrict__ gate,
           const float* __restrict__ weight, const float* __restrict__ bias,
           elem* __restrict__ out, int rows, int height, int width) {
    const int channels = WIDTH / 4;
    const long long r = ROW_INDEX;
    Row row = {};
    if (r < rows) {
        const int w = r % (width / 2), h = r / (width / 2) % (height / 2);
        const long long image = r / ((height / 2) * (width / 2));
        EACH_VECTOR(i, at) {
            const int phase = at / channels, channel = at % channels;
            const long long place = (image * height + 2 * h + phase % 2) * width + 2 * w + phase / 2;
            load(row.v[i], x + place * channels + channel);
            if (gate) multiply(row.v[i], gate + image * channels + channel);
        }
    }
    normalise(row);
    if (r >= rows) return;
    EACH_VECTOR(i, at) {
        scale_and_shift(row.v[i], weight, bias, at);
        store(out + r * WIDTH + at, row.v[i]);
    }
}
#endif

#ifdef KERNEL_norm_rows
// Normalise rows in place.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_rows(elem* x, const float* __restrict__ weight, const float* __restrict__ bias, int rows) {
    const long long r = ROW_INDEX;
    Row row = {};
    if (r < rows) {
        EACH_VECTOR(i, at) load(row.v[i], x + r * WIDTH + at);
    }
    normalise(row);
    if (r >= rows) return;
    EACH_VECTOR(i, at) {
        scale_and_shift(row.v[i], weight, bias, at);
        store(x + r * WIDTH + at, row.v[i]);
    }
}
#endif
