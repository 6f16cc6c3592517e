// What joins the chunks of a chunked scan; common.cuh comes before it.

#define THREADS 256

// From each chunk's final state after a zero start, and its sum of steps, to its actual start.
//   ends, starts (sequences, chunks, D, N); sums (sequences, chunks, D); A (K, D, N)
extern "C" __global__ void __launch_bounds__(THREADS)
scan_starts(const float* __restrict__ A, const float* __restrict__ ends,
            const float* __restrict__ sums, float* __restrict__ starts, int values, int chunks,
            int D) {
    const int i = blockIdx.x * THREADS + threadIdx.x;  // sequence, channel, state
    if (i >= values) return;
    const int of_sequence = D * D_STATE, sequence = i / of_sequence, in_sequence = i % of_sequence;
    const float a2 = A[sequence % K_DIRECTIONS * of_sequence + in_sequence] * LOG2E;
    long long at = (long long)sequence * chunks * of_sequence + in_sequence;
    float s = 0.f;
#pragma unroll 8
    for (int chunk = 0; chunk < chunks; ++chunk, at += of_sequence) {
        starts[at] = s;
        s = exp2_fast(sums[at / D_STATE] * a2) * s + ends[at];
    }
}

// Adds up the directions, and the skip.
//   y (places, stack, D), x the same with `x_stride` values from place to place;
//   partial (K, places, stack, D); skip (K, D)
extern "C" __global__ void __launch_bounds__(THREADS)
scan_merge(const elem* __restrict__ x, const float* __restrict__ skip,
           const float* __restrict__ partial, elem* __restrict__ y, int values, int D,
           int stack, int x_stride) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= values) return;
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < K_DIRECTIONS; ++k) sum += skip[k * D + i % D];
    sum *= to_float(x[(long long)(i / (stack * D)) * x_stride + i % (stack * D)]);
    // In the order in which the other modes merge.
    sum += partial[i];
    sum += partial[i + 2 * (long long)values];
    sum += partial[i + (long long)values];
    sum += partial[i + 3 * (long long)values];
    y[i] = narrowed(sum);
}
