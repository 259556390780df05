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

// The same with a row of pack_rows.
__device__ inline float product(const void *weights, u64 row, const u16 *x, u32 columns, float scale) {
  u64 start = row * ((columns + 31u) / 32u * 32u);
  float sum = 0.0f;
  for (u32 i = threadIdx.x % WARP; i < columns; i += WARP) sum += weight(weights, start + i) * f16_value(x[i]);
  return warp_sum(sum) * scale;
}

// The product that makes an output, before what `y` holds: the arguments are those of `product`.
template <class... Of> __device__ float joined(const void *weights, u64 row, Of... of) {
  float first = product(weights, row, of...);
  return JOINED == 2u ? silu(first) * product(weights, row + 1u, of...) : first;
}
