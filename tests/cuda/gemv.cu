// y[token, row] = epilogue(W[row] . x[token]); with NORM of the normalised x.

struct Params {
  u32 rows, columns, blocks, first_row, tokens, x_stride, x_offset, y_stride, y_offset;
  float scale, eps;
};

__device__ inline void products(const Params &params, const void *weights, const float *x, const float *norm,
                                float *y) {
  u32 outputs = params.rows / JOINED;
  EACH_WARP(i, (u64)params.tokens * outputs) {
    u32 token = i / outputs, output = i % outputs;
    const float *own = x + (u64)token * params.x_stride + params.x_offset;
    float sum = joined(weights, (u64)output * JOINED, own, params.columns, norm, params.eps);
    if (threadIdx.x % WARP == 0u) {
      u64 to = (u64)token * params.y_stride + params.y_offset + params.first_row / JOINED + output;
#if defined(EPILOGUE_ADD)
      y[to] += params.scale * sum;
#else
      y[to] = sum;
#endif
    }
  }
}

#if defined(GEMM)
extern "C" __global__ void gemm(Params params, Grid grid, const void *weights, const float *x, float *y) {
  products(params, weights, x, 0, y);
}
#else
extern "C" __global__ void gemv(Params params, Grid grid, const void *weights, const float *x, const float *norm,
                                float *y) {
  products(params, weights, x, NORM ? norm : 0, y);
}
#endif
