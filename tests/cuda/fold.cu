// Attention of one query over one split of a paged latent cache, by a block: online softmax in base 2.

// Where a sequence's records stand.
struct Pages {
  const u8 *cache;
  const u32 *table; // the sequence's part of the block table
  u32 first_page, page_bits;

  __device__ const u8 *record(u32 token) const {
    u64 page = table[token >> page_bits] - first_page;
    return cache + ((page << page_bits) + (token & ((1u << page_bits) - 1u))) * RECORD;
  }
};

constexpr u32 OWN = (R + THREADS - 1u) / THREADS; // columns of a thread

// Folds the records of tokens begin .. end into `output` [R], normalised, and gives the log-sum-exp.
__device__ inline float fold(const float *query, const Pages &pages, u32 begin, u32 end, float *output) {
  __shared__ float weights[THREADS];
  float sums[OWN], largest = NOTHING, total = 0.0f;
  for (u32 k = 0u; k < OWN; k++) sums[k] = 0.0f;
  for (u32 base = begin; base < end; base += THREADS) {
    u32 token = base + threadIdx.x;
    float score = NOTHING;
    if (token < end) {
      const u8 *record = pages.record(token);
      score = 0.0f;
      for (u32 i = 0u; i < W; i++) score += query[i] * record_value(record, i);
    }
    float most = fmaxf(largest, block_max(score));
    float shrink = exp2f(largest - most), weight = token < end ? exp2f(score - most) : 0.0f;
    weights[threadIdx.x] = weight;
    total = total * shrink + block_sum(weight); // its barriers show all weights
    for (u32 k = 0u; k < OWN; k++) {
      u32 column = threadIdx.x + k * THREADS;
      if (column < R) {
        sums[k] *= shrink;
        for (u32 t = 0u; t < least(THREADS, end - base); t++) {
          sums[k] += weights[t] * record_value(pages.record(base + t), column);
        }
      }
    }
    largest = most;
    __syncthreads(); // the weights' readers are done
  }
  for (u32 k = 0u; k < OWN; k++) {
    u32 column = threadIdx.x + k * THREADS;
    if (column < R) output[column] = total > 0.0f ? sums[k] / total : 0.0f;
  }
  return total > 0.0f ? largest + log2f(total) : NOTHING;
}

// Writes the four values behind a partial's output.
__device__ inline void write_lse(float *partial, float lse) {
  EACH_THREAD(i, 4u) partial[R + i] = i == 0u ? lse : 0.0f;
}
