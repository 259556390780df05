// Absorbed attention over one split of each sequence's latent cache, a (token, head) row a block. With COOP, which
// stands beside mla_decode_coop, queries are f16.

struct Params { u32 heads, first_split, first_page, page_bits; };

__device__ inline void decode(const Params &params, u32 count, const Sequence *batch, const Split *splits,
                              const u32 *block_table, const float *queries, const u8 *cache, float *partials) {
  __shared__ float query[W];
  for (u32 s = 0u; s < count; s++) {
    Split split = splits[params.first_split + s];
    Sequence sequence = batch[split.sequence];
    Pages pages = {cache, block_table + sequence.pages, params.first_page, params.page_bits};
    EACH_BLOCK(row, sequence.tokens * params.heads) {
      const float *own = queries + ((u64)sequence.first_row * params.heads + row) * W;
      float *partial = partials + ((u64)split.partial * params.heads + row) * (R + 4u);
      __syncthreads(); // the last row's readers are done
#if defined(COOP)
      EACH_THREAD(i, W) query[i] = f16_value(f16_bits(own[i]));
#else
      EACH_THREAD(i, W) query[i] = own[i];
#endif
      __syncthreads();
      u32 end = least(split.end, sequence.position + (u32)row / params.heads + 1u);
      write_lse(partial, fold(query, pages, split.begin, end, partial));
    }
  }
}

#if defined(COOP)
extern "C" __global__ void mla_decode_coop(Params params, Grid grid, const Sequence *batch, const Split *splits,
                                           const u32 *block_table, const float *queries, const u8 *cache,
                                           float *partials) {
  decode(params, grid.y, batch, splits, block_table, queries, cache, partials);
}
#else
extern "C" __global__ void mla_decode(Params params, Grid grid, const Sequence *batch, const Split *splits,
                                      const u32 *block_table, const float *queries, const u8 *cache, float *partials) {
  decode(params, grid.y, batch, splits, block_table, queries, cache, partials);
}
#endif
