// Products of matrix rows with activations, by a warp, and what becomes of them.

#if defined(EPILOGUE_SWIGLU)
constexpr u32 JOINED = 2u; // rows that make an output: a gate and its up
#else
constexpr u32 JOINED = 1u;
#endif

// The product of a row of `columns` weights with x; with a norm, with x / sqrt(mean(x^2) + eps) * norm.
__device__ inline float product(const void *weights, u64 row, const float *x, u32 columns, const float *norm,
                                float eps) {
  u32 lane = threadIdx.x % WARP;
  u64 start = row * ((columns + 31u) / 32u * 32u);
  float sum = 0.0f, squares = 0.0f;
  for (u32 i = lane; i < columns; i += WARP) {
    sum += weight(weights, start + i) * x[i] * (norm ? norm[i] : 1.0f);
    squares += x[i] * x[i];
  }
  sum = warp_sum(sum);
  return norm ? sum / sqrtf(warp_sum(squares) / columns + eps) : sum;
}

// The product that makes an output, before what `y` holds.
__device__ inline float joined(const void *weights, u64 row, const float *x, u32 columns, const float *norm,
                               float eps) {
  float first = product(weights, row, x, columns, norm, eps);
  return JOINED == 2u ? silu(first) * product(weights, row + 1u, x, columns, norm, eps) : first;
}
