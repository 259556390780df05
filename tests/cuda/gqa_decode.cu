// Attention over one split of each sequence's keys and values, a (token, head) row a block: online softmax in base 2.

struct Params { u32 heads, groups, first_split, first_page, page_bits; };

extern "C" __global__ void gqa_decode(Params params, Grid grid, const Sequence *batch, const Split *splits,
                                      const u32 *block_table, const float *queries, const u16 *cache,
                                      float *partials) {
  __shared__ float weights[THREADS];
  constexpr u32 OWN = (D + THREADS - 1u) / THREADS; // columns of a thread
  u32 each = params.heads / params.groups;
  for (u32 s = 0u; s < grid.y; s++) {
    Split split = splits[params.first_split + s];
    Sequence sequence = batch[split.sequence];
    const u32 *pages = block_table + sequence.pages;
    EACH_BLOCK(row, sequence.tokens * params.heads) {
      u32 group = (u32)row % params.heads / each;
      const float *query = queries + ((u64)sequence.first_row * params.heads + row) * D;
      auto key = [&](u32 token) {
        u64 page = pages[token >> params.page_bits] - params.first_page;
        u64 record = (page << params.page_bits) + (token & ((1u << params.page_bits) - 1u));
        return cache + (record * params.groups + group) * 2u * D; // its value is D further
      };
      u32 end = least(split.end, sequence.position + (u32)row / params.heads + 1u);
      float sums[OWN], largest = NOTHING, total = 0.0f;
      for (u32 k = 0u; k < OWN; k++) sums[k] = 0.0f;
      for (u32 base = split.begin; base < end; base += THREADS) {
        u32 token = base + threadIdx.x;
        float score = NOTHING;
        if (token < end) {
          const u16 *own = key(token);
          double sum = 0.0; // large scores that one f32 sum in turn would round too often
          for (u32 i = 0u; i < D; i++) sum += (double)query[i] * f16_value(own[i]);
          score = (float)sum;
        }
        float most = fmaxf(largest, block_max(score));
        float shrink = exp2f(largest - most), weight = token < end ? exp2f(score - most) : 0.0f;
        weights[threadIdx.x] = weight;
        total = total * shrink + block_sum(weight); // its barriers show all weights
        for (u32 k = 0u; k < OWN; k++) {
          u32 column = threadIdx.x + k * THREADS;
          if (column >= D) continue;
          sums[k] *= shrink;
          for (u32 t = 0u; t < least(THREADS, end - base); t++) {
            sums[k] += weights[t] * f16_value(key(base + t)[D + column]);
          }
        }
        largest = most;
        __syncthreads(); // the weights' readers are done
      }
      float *partial = partials + ((u64)split.partial * params.heads + row) * (D + 4u);
      for (u32 k = 0u; k < OWN; k++) {
        u32 column = threadIdx.x + k * THREADS;
        if (column < D) partial[column] = total > 0.0f ? sums[k] / total : 0.0f;
      }
      EACH_THREAD(i, 4u) partial[D + i] = i > 0u ? 0.0f : total > 0.0f ? largest + log2f(total) : NOTHING;
    }
  }
}
