// From uint8 pixels to the first feature map, and MedMamba's residual.
// elements.cuh comes before it in the same compilation.

#ifdef KERNEL_stem
// A 3x3 convolution of stride 2 on normalised pixels, and GELU: x (B, height, width, 3) uint8 to
// (B, out_height, out_width, OUTPUTS). weight (27, OUTPUTS), rows by tap and colour.
// A block computes BAND rows of SPAN columns; a thread RUN columns of eight channels.
#define BAND 4
#define SPAN 56
#define RUN 4
#define TILE_HEIGHT (2 * BAND + 1)
#define TILE_ROW ((2 * SPAN + 1) * 3)
#define THREADS (BAND * SPAN / RUN * OUTPUTS / VECTOR)

extern "C" __global__ void __launch_bounds__(THREADS)
stem(const unsigned char* __restrict__ x, const float* __restrict__ scale,
     const float* __restrict__ shift, const float* __restrict__ weight,
     const float* __restrict__ bias, elem* __restrict__ out, int height, int width, int out_height,
     int out_width) {
    __shared__ float tile[TILE_HEIGHT][TILE_ROW];
    __shared__ __align__(16) float weights[27][OUTPUTS];
    const int first_row = blockIdx.y * BAND, first_column = blockIdx.x * SPAN;
    const unsigned char* image = x + (long long)blockIdx.z * height * width * 3;
    for (int i = threadIdx.x; i < 27 * OUTPUTS; i += THREADS)
        weights[i / OUTPUTS][i % OUTPUTS] = weight[i];
    for (int i = threadIdx.x; i < TILE_HEIGHT * TILE_ROW; i += THREADS) {
        const int h = 2 * first_row - 1 + i / TILE_ROW, w = 2 * first_column - 1 + i % TILE_ROW / 3;
        const int colour = i % 3;  // a row of the tile is a multiple of three
        const bool inside = h >= 0 && h < height && w >= 0 && w < width;
        tile[i / TILE_ROW][i % TILE_ROW] =
            inside ? image[(h * width + w) * 3 + colour] * scale[colour] + shift[colour] : 0.f;
    }
    __syncthreads();
    const int vector = threadIdx.x % (OUTPUTS / VECTOR), run = threadIdx.x / (OUTPUTS / VECTOR);
    const int row = run / (SPAN / RUN), column = run % (SPAN / RUN) * RUN;
    float sum[RUN][VECTOR], b[VECTOR];
    parameters(b, bias + vector * VECTOR);
#pragma unroll
    for (int o = 0; o < RUN; ++o)
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) sum[o][c] = b[c];
#pragma unroll 3
    for (int tap = 0; tap < 27; ++tap) {
        const float* w = &weights[tap][vector * VECTOR];
        const float4 low = *(const float4*)w, high = *(const float4*)(w + 4);
        const float t[VECTOR] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float* from = &tile[2 * row + tap / 9][2 * column * 3 + tap % 9];
#pragma unroll
        for (int o = 0; o < RUN; ++o)
#pragma unroll
            for (int c = 0; c < VECTOR; ++c) sum[o][c] += from[o * 6] * t[c];
    }
    const int h = first_row + row;
    if (h >= out_height) return;
#pragma unroll
    for (int o = 0; o < RUN; ++o) {
        const int w = first_column + column + o;
        if (w >= out_width) break;
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) sum[o][c] = gelu(sum[o][c]);
        store(out + ((((long long)blockIdx.z * out_height + h) * out_width + w) * OUTPUTS +
                     vector * VECTOR), sum[o]);
    }
}
#endif

#ifdef KERNEL_patches
// Normalise pixels and lay each 4x4 patch out as 48 values: x (B, height, width, 3) uint8 to
// (B, height / 4, width / 4, 4, 4, 3). A thread writes one row of a patch.
extern "C" __global__ void __launch_bounds__(256)
patches(const unsigned char* __restrict__ x, const float* __restrict__ scale,
        const float* __restrict__ shift, elem* __restrict__ out, int items, int height, int width) {
    const int item = blockIdx.x * 256 + threadIdx.x;
    if (item >= items) return;
    const int row = item % 4, w = item / 4 % (width / 4), h = item / 4 / (width / 4) % (height / 4);
    const long long image = item / 4 / (width / 4) / (height / 4);
    const unsigned char* from = x + ((image * height + 4 * h + row) * width + 4 * w) * 3;
#pragma unroll
    for (int i = 0; i < 12; i += 4) {
        float v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] = from[i + c] * scale[(i + c) % 3] + shift[(i + c) % 3];
        store(out + (long long)item * 12 + i, v);
    }
}
#endif

#ifdef KERNEL_interleave_add
// Add the shuffled branches, of which the left comes before its last ReLU:
// x[2 c] += relu(left[c]), x[2 c + 1] += right[c].
extern "C" __global__ void __launch_bounds__(256)
interleave_add(elem* x, const elem* __restrict__ left, const elem* __restrict__ right,
               int items) {
    const long long item = (long long)blockIdx.x * 256 + threadIdx.x;
    if (item >= items) return;
    float l[VECTOR], r[VECTOR];
    load(l, left + item * VECTOR);
    load(r, right + item * VECTOR);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        elem* at = x + (item * 2 + half) * VECTOR;
        float v[VECTOR];
        load(v, at);
#pragma unroll
        for (int c = 0; c < VECTOR; ++c) v[c] += c % 2 ? r[half * 4 + c / 2] : relu(l[half * 4 + c / 2]);
        store(at, v);
    }
}
#endif
