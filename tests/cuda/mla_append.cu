// One record of the latent cache: the latent normalised, the rope key turned, written to its page: one thread a row.

struct Params {
  u32 rows, kv_stride, kv_offset, first_page, pages;
  float eps, scale;
};

extern "C" __global__ void mla_append(Params params, Grid grid, const Sequence *batch, const Row *rows,
                                      const u32 *block_table, const float *kv, const float *weight,
                                      const float *table, u8 *cache) {
  EACH(i, params.rows) {
    Row row = rows[i];
    u32 page = block_table[batch[row.sequence].pages + row.position / PAGE] - params.first_page;
    if (page >= params.pages) continue; // of another chunk
    const float *own = kv + i * params.kv_stride + params.kv_offset;
    float values[W], squares = 0.0f;
    for (u32 k = 0u; k < R; k++) squares += own[k] * own[k];
    float factor = params.scale / sqrtf(squares / R + params.eps);
    for (u32 k = 0u; k < R; k++) values[k] = own[k] * factor * weight[k];
    for (u32 k = 0u; k < P; k++) values[R + k] = turned(own + R, k, row.position, table, P / 2u);
    for (u32 k = R + P; k < W; k++) values[k] = 0.0f;
    write_record(cache + ((u64)page * PAGE + row.position % PAGE) * RECORD, values);
  }
}
