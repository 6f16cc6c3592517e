// Depthwise 3x3 convolutions with what stands before and after them.
// elements.cuh comes before it in the same compilation.
//
//   CHANNELS  of the input                    MULTIPLIER  outputs per input channel, 1 or 2
//   AFFINE    1: places inside the image are scaled and shifted first, and scaled by a gate per
//             image and channel (channel attention), which may be null
//   INPUT_SILU  1: SiLU is applied to the input first
//   ACTIVATION  of the output: 0 none, 1 ReLU, 2 SiLU
//   STRIP       neighbouring places of a row that a thread computes,
//   EACH        for so many output channels, 4 or 8
//
// Long strips read each input less often; short ones fill the device with few images.

#define INPUTS (EACH / MULTIPLIER)
#define VECTORS (CHANNELS / INPUTS)

typedef float Strip[STRIP][EACH];

struct Place {
    long long image;
    int h, w, vector;
};

// Input channels as they lie in memory, so that many loads can be under way at once.
struct __align__(16) Raw {
#if DTYPE == 0
    float v[INPUTS];
#else
    unsigned v[INPUTS / 2];
#endif
};

__device__ __forceinline__ Raw fetch(const elem* __restrict__ from, bool inside) {
    Raw raw = {};
    if (inside) {
#if DTYPE == 0
        if (INPUTS == 2) *(float2*)raw.v = *(const float2*)from;
        else
#pragma unroll
            for (int i = 0; i < INPUTS; i += 4) *(float4*)(raw.v + i) = *(const float4*)(from + i);
#else
        if (INPUTS == 8) *(uint4*)raw.v = *(const uint4*)from;
        else if (INPUTS == 4) *(uint2*)raw.v = *(const uint2*)from;
        else raw.v[0] = *(const unsigned*)from;
#endif
    }
    return raw;
}

__device__ __forceinline__ void unpack(float (&v)[INPUTS], const Raw& raw) {
#if DTYPE == 0
#pragma unroll
    for (int c = 0; c < INPUTS; ++c) v[c] = raw.v[c];
#else
#pragma unroll
    for (int c = 0; c < INPUTS; c += 2) unpack2(v[c], v[c + 1], raw.v[c / 2]);
#endif
}

// Convolve a strip of places of `image`, whose rows of `stride` values begin with the channels of
// this thread. `prepare` changes the values of a place before they are used; places outside the
// image are zeros after it.
template <typename Prepare>
__device__ __forceinline__ void convolve(Strip& sum, const elem* __restrict__ image, int stride,
                                         const float* __restrict__ taps,
                                         const float* __restrict__ bias, const Place& at, int height,
                                         int width, Prepare prepare) {
    const int channel = at.vector * EACH, outputs = CHANNELS * MULTIPLIER;
    float b[EACH];
    parameters(b, bias + channel);
#pragma unroll
    for (int o = 0; o < STRIP; ++o)
#pragma unroll
        for (int c = 0; c < EACH; ++c) sum[o][c] = b[c];
#pragma unroll
    for (int dy = 0; dy < 3; ++dy) {
        const int h = at.h + dy - 1;
        const bool row_inside = h >= 0 && h < height;
        const elem* row = image + (long long)(h * width + at.w - 1) * stride;
        Raw raw[STRIP + 2];
#pragma unroll
        for (int column = 0; column < STRIP + 2; ++column) {
            const int w = at.w + column - 1;
            raw[column] = fetch(row + column * stride, row_inside && w >= 0 && w < width);
        }
        float tap[3][EACH];
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) parameters(tap[dx], taps + (dy * 3 + dx) * outputs + channel);
#pragma unroll
        for (int column = 0; column < STRIP + 2; ++column) {
            const int w = at.w + column - 1;
            float v[INPUTS];
            unpack(v, raw[column]);
            prepare(v, row_inside && w >= 0 && w < width);
#pragma unroll
            for (int dx = 0; dx < 3; ++dx) {
                const int o = column - dx;
                if (o < 0 || o >= STRIP) continue;
#pragma unroll
                for (int c = 0; c < EACH; ++c) sum[o][c] += tap[dx][c] * v[c / MULTIPLIER];
            }
        }
    }
}

#ifdef KERNEL_depthwise
__device__ __forceinline__ float activate(float v) {
    return ACTIVATION == 1 ? relu(v) : ACTIVATION == 2 ? silu(v) : v;
}

// x: rows of `stride` values; out: rows of `out_stride`. taps (9, C), bias (C), gate (B, `gates`).
// With `scatter`, output channel c goes to place scatter[c] of its row, or nowhere if that is -1.
extern "C" __global__ void __launch_bounds__(256, DTYPE == 0 ? 1 : EACH == 4 ? 3 : 2)
depthwise(const elem* __restrict__ x, const float* __restrict__ scale,
          const float* __restrict__ shift, const float* __restrict__ gate,
          const float* __restrict__ taps, const float* __restrict__ bias,
          const int* __restrict__ scatter, elem* out, int items, int height, int width, int stride,
          int out_stride, int gates) {
    const int item = blockIdx.x * 256 + threadIdx.x;
    if (item >= items) return;
    const int strips = (width + STRIP - 1) / STRIP;
    Place at;
    at.vector = item % VECTORS;
    at.w = item / VECTORS % strips * STRIP;
    at.h = item / VECTORS / strips % height;
    at.image = item / VECTORS / strips / height;
    const int channel = at.vector * INPUTS;
    float factor[INPUTS], offset[INPUTS];
    if (AFFINE) {
        parameters(factor, scale + channel);
        parameters(offset, shift + channel);
        if (gate) {
            float g[INPUTS];
            parameters(g, gate + at.image * gates + channel);
#pragma unroll
            for (int c = 0; c < INPUTS; ++c) factor[c] *= g[c];
        }
    }
    const elem* image = x + at.image * height * width * stride + channel;
    Strip sum;
    convolve(sum, image, stride, taps, bias, at, height, width,
             [&](float (&v)[INPUTS], bool inside) {
#pragma unroll
                 for (int c = 0; c < INPUTS; ++c) {
                     if (AFFINE) v[c] = v[c] * factor[c] + (inside ? offset[c] : 0.f);
                     if (INPUT_SILU) v[c] = silu(v[c]);
                 }
             });
    const int first = at.vector * EACH;
#pragma unroll
    for (int o = 0; o < STRIP; ++o) {
        if (at.w + o >= width) break;
#pragma unroll
        for (int c = 0; c < EACH; ++c) sum[o][c] = activate(sum[o][c]);
        elem* row = out + ((at.image * height + at.h) * width + at.w + o) * out_stride;
        if (!scatter) {
            store(row + first, sum[o]);
            continue;
        }
#pragma unroll
        for (int c = 0; c < EACH; ++c)
            if (const int place = scatter[first + c]; place >= 0) row[place] = from_float(sum[o][c]);
    }
}
#endif

#ifdef KERNEL_interact
// Mask each branch by the other, and write both in the order in which the next block reads them:
// out (B, H, W, 2 C). The local branch comes before its last ReLU. The masked places are summed per channel: sums (B, blocks, 2 C).
// A block has a whole number of strips, all of one image.
extern "C" __global__ void __launch_bounds__(256, DTYPE == 0 ? 1 : EACH == 4 ? 3 : 2)
interact(const elem* __restrict__ local, const elem* __restrict__ global,
         const float* __restrict__ taps, const float* __restrict__ bias, elem* __restrict__ out,
         float* __restrict__ sums, int height, int width, int write) {
    __shared__ float total[256][2 * EACH + 1];
    const int strips = (width + STRIP - 1) / STRIP, parts = blockDim.x / VECTORS;
    const int part = threadIdx.x / VECTORS, strip = blockIdx.x * parts + part;
    Place at;
    at.vector = threadIdx.x % VECTORS;
    at.w = strip % strips * STRIP;
    at.h = strip / strips;
    at.image = blockIdx.y;
    const int channel = at.vector * EACH;
    // The first half of the channels goes to the next block's left half, a before b.
    const int place = channel < CHANNELS / 2 ? channel : CHANNELS / 2 + channel;
#pragma unroll
    for (int c = 0; c < 2 * EACH; ++c) total[threadIdx.x][c] = 0.f;
    if (at.h < height) {
        const long long origin = at.image * height * width;
        const elem* of_local = local + origin * CHANNELS + channel;
        const elem* of_global = global + origin * CHANNELS + channel;
        elem* row = out + (origin + at.h * width + at.w) * 2 * CHANNELS + place;
        const int here = at.h * width + at.w;
#pragma unroll 1  // two halves of the registers, not both at once
        for (int swap = 0; swap < 2; ++swap) {
            const elem* masking = swap ? of_global : of_local;
            const elem* masked = swap ? of_local : of_global;
            Strip mask;
            convolve(mask, masking, CHANNELS, taps, bias, at, height, width,
                     [&](float (&v)[EACH], bool) {
                         if (swap) return;
#pragma unroll
                         for (int c = 0; c < EACH; ++c) v[c] = relu(v[c]);
                     });
            float seen[EACH] = {};
#pragma unroll
            for (int o = 0; o < STRIP; ++o) {
                if (at.w + o >= width) break;
                float v[EACH];
                load(v, masked + (here + o) * CHANNELS);
#pragma unroll
                for (int c = 0; c < EACH; ++c) {
                    if (swap) v[c] = relu(v[c]);
                    v[c] *= sigmoid(swap ? gelu(mask[o][c]) : relu(mask[o][c]));
                    seen[c] += v[c];
                }
                if (write) store(row + o * 2 * CHANNELS + swap * (CHANNELS / 2), v);
            }
#pragma unroll
            for (int c = 0; c < EACH; ++c) total[threadIdx.x][swap * EACH + c] = seen[c];
        }
    }
    __syncthreads();
    float* to = sums + (at.image * gridDim.x + blockIdx.x) * 2 * CHANNELS;
    for (int i = threadIdx.x; i < 2 * CHANNELS; i += blockDim.x) {
        const int vector = i / (2 * EACH), c = i % (2 * EACH), first = vector * EACH;
        float s = 0.f;
        for (int p = 0; p < parts; ++p) s += total[p * VECTORS + vector][c];
        const int start = first < CHANNELS / 2 ? first : CHANNELS / 2 + first;
        to[start + (c < EACH ? c : CHANNELS / 2 + c - EACH)] = s;
    }
}
#endif

#ifdef KERNEL_attention
// The channel attention's gate from those sums, and the gated means: both (B, C).
extern "C" __global__ void attention(const float* __restrict__ sums,
                                     const float* __restrict__ weight, float* __restrict__ gate,
                                     float* __restrict__ means, int channels, int blocks,
                                     float scale) {
    const long long image = blockIdx.x;
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        float mean = 0.f;
#pragma unroll 8
        for (int b = 0; b < blocks; ++b) mean += sums[(image * blocks + b) * channels + c];
        mean *= scale;
        const float g = sigmoid(mean * weight[c]);
        gate[image * channels + c] = g;
        means[image * channels + c] = g * mean;
    }
}
#endif
