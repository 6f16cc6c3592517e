// Augmentation of training images in one pass: warp, stain, colour and normalisation.
//
// pixels (B, side, side, 3) bytes; out (B, side, side, 3) float32. settings (B, 22): the affine
// map from a place (column, row) of the result to one of the image, row by row; then what
// brightness, contrast, saturation and hue change by: a summand, two factors, and a part of the
// colour circle; then the affine map of the three optical densities, 3 x 4, row by row. Places
// outside are reflected at the border, between places it is bilinear.

#define SETTINGS 22
#define STAIN (1 << 8)  // in `order`: the optical densities are mapped

// A coordinate reflected at the outer edges of the first and the last pixel.
__device__ __forceinline__ float reflected(float v, int side) {
    v = fabsf(v + 0.5f);
    const float times = floorf(v / side), rest = v - times * side;
    v = ((int)times & 1 ? side - rest : rest) - 0.5f;
    return fminf(fmaxf(v, 0.f), side - 1.f);
}

__device__ __forceinline__ void saturate_colour(float (&rgb)[3], float factor) {
    const float high = fmaxf(rgb[0], fmaxf(rgb[1], rgb[2]));
    const float spread = high - fminf(rgb[0], fminf(rgb[1], rgb[2]));
    if (spread <= 0.f) return;
    const float most = fminf(factor, high / spread);  // a saturation of 1 is all there is
#pragma unroll
    for (int c = 0; c < 3; ++c) rgb[c] = high - (high - rgb[c]) * most;
}

__device__ __forceinline__ void turn_hue(float (&rgb)[3], float turn) {
    const float r = rgb[0], g = rgb[1], b = rgb[2];
    const float high = fmaxf(r, fmaxf(g, b)), spread = high - fminf(r, fminf(g, b));
    if (spread <= 0.f) return;
    // In sixths of the circle.
    float hue = r >= g && r >= b ? (g - b) / spread : g >= b ? (b - r) / spread + 2.f
                                                             : (r - g) / spread + 4.f;
    hue += 6.f * turn;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        const float from = hue + (c == 0 ? 5.f : c == 1 ? 3.f : 1.f);
        const float sector = from - 6.f * floorf(from * (1.f / 6.f));
        rgb[c] = high - spread * fminf(fmaxf(fminf(sector, 4.f - sector), 0.f), 1.f);
    }
}

// Optical density is what a stain adds to, in proportion to its amount (Beer and Lambert).
__device__ __forceinline__ void change_stain(float (&rgb)[3], const float* __restrict__ map) {
    float density[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) density[c] = -logf(fmaxf(rgb[c], 1.f / 255.f));
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        const float* row = map + 4 * c;
        rgb[c] = __saturatef(
            expf(-(row[0] * density[0] + row[1] * density[1] + row[2] * density[2] + row[3])));
    }
}

extern "C" __global__ void __launch_bounds__(256)
augment(const unsigned char* __restrict__ pixels, const float* __restrict__ settings,
        const float* __restrict__ scale, const float* __restrict__ shift, float* __restrict__ out,
        int side, int order) {
    const int at = blockIdx.x * 256 + threadIdx.x;
    if (at >= side * side) return;
    const float* own = settings + blockIdx.y * SETTINGS;
    const int column = at % side, row = at / side;
    const float x = reflected(own[0] * column + own[1] * row + own[2], side);
    const float y = reflected(own[3] * column + own[4] * row + own[5], side);
    const int left = (int)x, top = (int)y;
    const float across = x - left, down = y - top;
    const int right = min(left + 1, side - 1), bottom = min(top + 1, side - 1);
    const unsigned char* image = pixels + (long long)blockIdx.y * side * side * 3;
    float rgb[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        const float upper = image[(top * side + left) * 3 + c] * (1.f - across) +
                            image[(top * side + right) * 3 + c] * across;
        const float lower = image[(bottom * side + left) * 3 + c] * (1.f - across) +
                            image[(bottom * side + right) * 3 + c] * across;
        rgb[c] = (upper * (1.f - down) + lower * down) * (1.f / 255.f);
    }
    if (order & STAIN) change_stain(rgb, own + 10);
    for (int step = 0; step < 4; ++step) {
        const int kind = order >> 2 * step & 3;
        const float change = own[6 + kind];
        if (kind == 2) {
            saturate_colour(rgb, change);
        } else if (kind == 3) {
            turn_hue(rgb, change);
        } else {
#pragma unroll
            for (int c = 0; c < 3; ++c)
                rgb[c] = __saturatef(kind == 0 ? rgb[c] + change : rgb[c] * change);
        }
    }
    float* to = out + ((long long)blockIdx.y * side * side + at) * 3;
#pragma unroll
    for (int c = 0; c < 3; ++c) to[c] = __saturatef(rgb[c]) * scale[c] + shift[c];
}
