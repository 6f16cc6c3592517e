// Concatenate the channels of two tensors and shuffle them, or the reverse; any 2- or 4-byte type.
//
//   BYTES     per value
//   CHANNELS  in all; GROUPS of them change places with what is in a group
//   FIRST_IN, FIRST_OUT  channels of the first tensor that is read, and that is written; the
//             second has the rest, and is null where there is none
//   TRANSPOSED  1: height and width change places as well
//
// Rows that are read may lie apart; what is written is dense.

#if BYTES == 2
typedef unsigned short value;
#else
typedef unsigned value;
#endif

#define THREADS 256
#define ROWS ((1023 + CHANNELS) / CHANNELS)  // of a block

extern "C" __global__ void __launch_bounds__(THREADS)
shuffle(const value* __restrict__ first, const value* __restrict__ second,
        value* __restrict__ first_out, value* __restrict__ second_out, int rows, int first_stride,
        int second_stride, int height, int width) {
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHANNELS; i += THREADS) {
        const int c = i % CHANNELS;
        const long long row = (long long)blockIdx.x * ROWS + i / CHANNELS;
        if (row >= rows) break;
        // Height and width are those of what is written.
        long long from = row;
        if (TRANSPOSED) {
            const int w = (int)row % width, h = (int)row / width % height;
            from += w * height + h - (h * width + w);
        }
        const int source = c % GROUPS * (CHANNELS / GROUPS) + c / GROUPS;
        const value v = source < FIRST_IN ? first[from * first_stride + source]
                                          : second[from * second_stride + source - FIRST_IN];
        if (c < FIRST_OUT)
            first_out[row * FIRST_OUT + c] = v;
        else
            second_out[row * (CHANNELS - FIRST_OUT) + c - FIRST_OUT] = v;
    }
}
