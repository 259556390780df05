// Element `column` of a head's query for the latent cache: W_UK^T q_nope, then q_pe turned, then zeros. `query` is
// [N + P], `w_uk` the head's rows of kv_b.

constexpr u32 STRIDE = (R + 31u) / 32u * 32u; // from one row of kv_b to the next

__device__ inline float absorbed(const float *query, const void *kv_b, u64 w_uk, u32 column, u32 position,
                                 const float *table) {
  if (column >= R) return column < R + P ? turned(query + N, column - R, position, table, P / 2u) : 0.0f;
  float sum = 0.0f;
  for (u32 n = 0u; n < N; n++) sum += query[n] * weight(kv_b, (w_uk + n) * STRIDE + column);
  return sum;
}
