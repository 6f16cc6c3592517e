/*
 * Matrix products of bfloat16 with sums in float32, on the tile registers (AMX) of x86-64
 * processors that have them. Included in graph.c once; the rest of the graph stays float32.
 */

#include <sys/syscall.h>
#include <unistd.h>

#define HALF_TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl")))

enum { TILE = 16, TILE_DEPTH = 32 }; /* rows and columns of a result; inputs of one step */

/* Ask the processor, and then the kernel, which gives the registers on demand only. */
int half_available(void)
{
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    uint32_t a, b, c, d, d1, saved, high;
    if (scan2d_best_level() != AVX512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)
        || !__get_cpuid_count(7, 1, &a, &b, &c, &d1))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const uint32_t tiles = 1u << 24 | 1u << 22, state = 3u << 17, converts = 1u << 5;
    if ((d & tiles) != tiles || !(a & converts) || (saved & state) != state)
        return 0;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

/* Eight tiles of 16 rows and 64 bytes; static, as compilers see only a part of it being read. */
static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) tile_shapes = {
    .palette = 1,
    .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
};

HALF_TARGET void half_begin(void)
{
    _tile_loadconfig(&tile_shapes);
}

HALF_TARGET void half_end(void)
{
    _tile_release();
}

/* Bring rows of the input together as bfloat16, zeros behind their end and below the last. */
HALF_TARGET static __attribute__((noinline)) void half_rows(const float *const *in, int rows,
                                                            int64_t segments, int64_t segment,
                                                            int64_t depth, int64_t padded,
                                                            uint16_t *to)
{
    const int whole = (rows + 2 * TILE - 1) / (2 * TILE) * 2 * TILE;
    for (int r = 0; r < whole; r++, to += padded) {
        memset(to + padded - TILE_DEPTH, 0, TILE_DEPTH * sizeof *to);
        if (r >= rows) {
            memset(to, 0, (size_t)padded * sizeof *to);
            continue;
        }
        for (int64_t s = 0; s < segments; s++)
            for (int64_t k = 0; k < depth; k += 16) {
                const int64_t left = depth - k;
                const __mmask16 mask = (__mmask16)(left < 16 ? (1u << left) - 1 : 0xffff);
                const __m512 v = _mm512_maskz_loadu_ps(mask, in[r] + s * segment + k);
                _mm256_mask_storeu_epi16(to + s * depth + k, mask,
                                         (__m256i)_mm512_cvtneps_pbh(v));
            }
    }
}

/* Two by two tiles over the whole depth, stored as (2, 2, 16, 16). */
HALF_TARGET static __attribute__((noinline)) void half_tiles(const uint16_t *in,
                                                             const uint16_t *weight,
                                                             int64_t padded, int64_t panel,
                                                             float *sums)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < padded; k += TILE_DEPTH, weight += TILE * TILE_DEPTH) {
        _tile_loadd(4, in + k, padded * 2);
        _tile_loadd(5, in + TILE * padded + k, padded * 2);
        _tile_loadd(6, weight, 64);
        _tile_loadd(7, weight + panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

/* As NAME(row_of_tiles) of graph_product.h; ``scratch`` is of half_bytes. */
TARGET static void half_row_of_tiles(const struct step *step, const float *const *in, int rows,
                                     int64_t segments, int64_t segment, int64_t depth,
                                     int64_t first, int64_t end, float *const *out, void *scratch)
{
    const int64_t padded = block_count(segments * depth, TILE_DEPTH) * TILE_DEPTH;
    const int64_t panel = padded * TILE;
    float *sums = scratch;
    uint16_t *halves = (uint16_t *)(sums + 4 * TILE * TILE);
    half_rows(in, rows, segments, segment, depth, padded, halves);
    for (int64_t column = first; column < end; column += 2 * TILE) {
        const int both = end - column > TILE;
        const uint16_t *weight = (const uint16_t *)step->weight + column / TILE * panel;
        for (int row = 0; row < rows; row += 2 * TILE) {
            half_tiles(halves + row * padded, weight, padded, both ? panel : 0, sums);
            const int count = rows - row < 2 * TILE ? rows - row : 2 * TILE;
            for (int side = 0; side <= both; side++) {
                const int64_t at = column + side * TILE;
                const NAME(vf) bias = NAME(load)(step->bias + at, TILE);
                const int lanes = block_size(step->columns, at, TILE);
                for (int r = 0; r < count; r++) {
                    const float *sum = sums + (r / TILE * 2 + side) * 256 + r % TILE * TILE;
                    const NAME(vf) v = NAME(load)(sum, TILE) + bias;
                    NAME(store)(out[row + r] + at, NAME(activate)(v, step->activation), lanes);
                }
            }
        }
    }
}
