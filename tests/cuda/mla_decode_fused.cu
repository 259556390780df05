// As mla_decode, of queries that are absorbed in shared memory; with VALUES W_UV is applied, too. A (token, head)
// row of one chunk of heads a block.

struct Params {
  u32 heads, first_head, chunk_heads, first_split, first_page, page_bits, q_stride;
  float scale, beta;
  u32 length;
};

extern "C" __global__ void mla_decode_fused(Params params, Grid grid, const Sequence *batch, const Split *splits,
                                            const u32 *block_table, const float *q, const void *kv_b,
                                            const float *table, const u8 *cache, float *output) {
  __shared__ float query[W], latent[R];
  for (u32 s = 0u; s < grid.y; s++) {
    Split split = splits[params.first_split + s];
    Sequence sequence = batch[split.sequence];
    Pages pages = {cache, block_table + sequence.pages, params.first_page, params.page_bits};
    EACH_BLOCK(row, sequence.tokens * params.chunk_heads) {
      u32 token = row / params.chunk_heads, head = row % params.chunk_heads;
      u32 position = sequence.position + token, all = params.first_head + head;
      const float *own = q + (u64)(sequence.first_row + token) * params.q_stride + all * (N + P);
      float factor = params.scale * growth(position, params.beta, params.length);
      __syncthreads(); // the last row's readers are done
      EACH_THREAD(i, W) query[i] = factor * absorbed(own, kv_b, (u64)head * (N + V), i, position, table);
      __syncthreads();
      u32 end = least(split.end, position + 1u);
      if (!VALUES) {
        float *partial = output + ((u64)(split.partial + token) * params.heads + all) * (R + 4u);
        write_lse(partial, fold(query, pages, split.begin, end, partial));
        continue;
      }
      fold(query, pages, split.begin, end, latent);
      __syncthreads();
      EACH_THREAD(v, V) {
        float sum = 0.0f;
        for (u32 c = 0u; c < R; c++) sum += latent[c] * weight(kv_b, ((u64)head * (N + V) + N + v) * STRIDE + c);
        output[((u64)(sequence.first_row + token) * params.heads + all) * V + v] = sum;
      }
    }
  }
}
