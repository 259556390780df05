// y[token, row] = epilogue(W[row] . x[token]); with NORM of the normalised x, with PRODUCT_COOP of rows of pack_rows.

struct Params {
  u32 rows, columns, blocks, first_row, tokens, x_stride, x_offset, y_stride, y_offset;
  float scale, eps;
};

#if defined(PUT_F16)
// What f16 does not hold becomes its largest number.
typedef u16 Output;
__device__ inline u16 put(float value) { return f16_bits(fabsf(value) > 65504.0f ? copysignf(65504.0f, value) : value); }
#else
typedef float Output;
__device__ inline float put(float value) { return value; }
#endif

// `product(row, token)` is what makes an output.
template <class Product> __device__ void products(const Params &params, Output *y, Product product) {
  u32 outputs = params.rows / JOINED;
  EACH_WARP(i, (u64)params.tokens * outputs) {
    u32 token = i / outputs, output = i % outputs;
    float sum = product((u64)output * JOINED, token);
    if (threadIdx.x % WARP == 0u) {
      u64 to = (u64)token * params.y_stride + params.y_offset + params.first_row / JOINED + output;
#if defined(EPILOGUE_ADD)
      y[to] += params.scale * sum;
#else
      y[to] = put(sum);
#endif
    }
  }
}

#if defined(PRODUCT_COOP)
extern "C" __global__ void gemm_coop(Params params, Grid grid, const void *weights, const u16 *x, const float *scales,
                                     Output *y) {
  products(params, y, [&](u64 row, u32 token) {
    return joined(weights, row, x + (u64)token * params.blocks * 32u, params.columns, scales[token]);
  });
}
#else
__device__ inline void products(const Params &params, const void *weights, const float *x, const float *norm,
                                float *y) {
  products(params, y, [&](u64 row, u32 token) {
    const float *own = x + (u64)token * params.x_stride + params.x_offset;
    return joined(weights, row, own, params.columns, norm, params.eps);
  });
}

#if defined(GEMM)
extern "C" __global__ void gemm(Params params, Grid grid, const void *weights, const float *x, float *y) {
  products(params, weights, x, nullptr, y);
}
#else
extern "C" __global__ void gemv(Params params, Grid grid, const void *weights, const float *x, const float *norm,
                                float *y) {
  products(params, weights, x, NORM ? norm : nullptr, y);
}
#endif
#endif
