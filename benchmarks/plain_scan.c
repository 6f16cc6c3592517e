/*
 * The yardstick of benchmarks/cpu.py: the recurrence alone as a plain loop, with the 16 states of
 * a channel in one vector. x, delta, y (sequences, L, D) and B, C (sequences, L, 16) are ready
 * made and in the order of the scan; A (4, D, 16) is in units of log2.
 */

#include <immintrin.h>
#include <stdint.h>

typedef float states __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));

static inline states exp2_of(states t)
{
    const states shifted = t + 12582912.0f, f = t - (shifted - 12582912.0f);
    states p = 0.0013264727f * f + 0.0096715126f;
    p = p * f + 0.055507337f;
    p = p * f + 0.24022242f;
    p = p * f + 0.69314698f;
    p = p * f + 1.0f;
    return (states)((integers)p + ((integers)shifted << 23));
}

void plain_scan(int64_t sequences, int64_t length, int64_t channels, const float *x,
                const float *delta, const states *A, const states *B, const states *C, float *y)
{
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t q = 0; q < sequences; q++)
        for (int64_t d = 0; d < channels; d++) {
            const states a = A[q % 4 * channels + d];
            states s = {0};
            for (int64_t l = q * length; l < (q + 1) * length; l++) {
                const float step = delta[l * channels + d], u = x[l * channels + d];
                s = exp2_of(step * a) * s + step * u * B[l];
                y[l * channels + d] = _mm512_reduce_add_ps((__m512)(s * C[l]));
            }
        }
}
