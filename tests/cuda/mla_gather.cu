// Records of the latent cache as f32: latents [keys, R], rope keys [keys, P rounded up to 4].

struct Params { u32 first_page, pages; };

constexpr u32 ROPE_STRIDE = (P + 3u) / 4u * 4u;

extern "C" __global__ void mla_gather(Params params, Grid grid, const Sequence *batch, const Span *spans,
                                      const u32 *block_table, const u8 *cache, float *latents, float *k_pe) {
  for (u32 s = 0u; s < grid.y; s++) {
    Span span = spans[s];
    EACH(i, (u64)(span.end - span.begin) * (R + ROPE_STRIDE)) {
      u32 key = i / (R + ROPE_STRIDE), column = i % (R + ROPE_STRIDE), token = span.begin + key;
      u32 page = block_table[batch[span.sequence].pages + token / PAGE] - params.first_page;
      if (page >= params.pages) continue; // of another chunk
      float value = record_value(cache + ((u64)page * PAGE + token % PAGE) * RECORD, column);
      if (column < R) {
        latents[(u64)(span.row + key) * R + column] = value;
      } else {
        k_pe[(u64)(span.row + key) * ROPE_STRIDE + column - R] = value;
      }
    }
  }
}
