// The masks by which MambaMIC's branches modulate each other, forward and backward.
// elements.cuh comes before it in the same compilation.
//
// a = sigmoid(relu(from_local)) * global, b = sigmoid(gelu(from_global)) * local.

#define THREADS 256

#ifdef KERNEL_masks_forward
extern "C" __global__ void __launch_bounds__(THREADS)
masks_forward(const elem* __restrict__ from_local, const elem* __restrict__ from_global,
              const elem* __restrict__ local, const elem* __restrict__ global,
              elem* __restrict__ a, elem* __restrict__ b, int vectors) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= vectors) return;
    const long long at = (long long)i * VECTOR;
    float mask[VECTOR], v[VECTOR];
    load(mask, from_local + at);
    load(v, global + at);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) v[c] *= sigmoid(relu(mask[c]));
    store(a + at, v);
    load(mask, from_global + at);
    load(v, local + at);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) v[c] *= sigmoid(gelu(mask[c]));
    store(b + at, v);
}
#endif

#ifdef KERNEL_masks_backward
extern "C" __global__ void __launch_bounds__(THREADS)
masks_backward(const elem* __restrict__ grad_a, const elem* __restrict__ grad_b,
               const elem* __restrict__ from_local, const elem* __restrict__ from_global,
               const elem* __restrict__ local, const elem* __restrict__ global,
               elem* __restrict__ grad_from_local, elem* __restrict__ grad_from_global,
               elem* __restrict__ grad_local, elem* __restrict__ grad_global, int vectors) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= vectors) return;
    const long long at = (long long)i * VECTOR;
    float g[VECTOR], z[VECTOR], v[VECTOR];
    load(g, grad_a + at);
    load(z, from_local + at);
    load(v, global + at);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        const float s = sigmoid(relu(z[c]));
        z[c] = z[c] > 0.f ? g[c] * v[c] * s * (1.f - s) : 0.f;
        v[c] = g[c] * s;
    }
    store(grad_from_local + at, z);
    store(grad_global + at, v);
    load(g, grad_b + at);
    load(z, from_global + at);
    load(v, local + at);
#pragma unroll
    for (int c = 0; c < VECTOR; ++c) {
        const float below = 0.5f * (1.f + erff(z[c] * 0.70710678118654752f));  // of a normal value
        const float density = 0.39894228040143268f * __expf(-0.5f * z[c] * z[c]);
        const float s = sigmoid(z[c] * below);
        z[c] = g[c] * v[c] * s * (1.f - s) * (below + z[c] * density);
        v[c] = g[c] * s;
    }
    store(grad_from_global + at, z);
    store(grad_local + at, v);
}
#endif
