// Queries for the latent cache, times a factor; one chunk of heads.

struct Params {
  u32 tokens, heads, first_head, q_stride;
  float scale, beta;
  u32 length;
};

extern "C" __global__ void mla_absorb(Params params, Grid grid, const Row *rows, const float *q, const void *kv_b,
                                      const float *table, float *queries) {
  EACH(i, (u64)params.tokens * grid.y * W) {
    u32 column = i % W, head = i / W % grid.y;
    u64 token = i / W / grid.y;
    u32 position = rows[token].position;
    const float *query = q + token * params.q_stride + (params.first_head + head) * (N + P);
    float factor = params.scale * growth(position, params.beta, params.length);
    float value = absorbed(query, kv_b, (u64)head * (N + V), column, position, table);
    queries[(token * params.heads + params.first_head + head) * W + column] = factor * value;
  }
}
