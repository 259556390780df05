// The splits of each (token, head) row merged by log-sum-exp, a row a block; with VALUES then W_UV.

struct Params { u32 tokens, heads, first_head, output_stride; };

constexpr u32 STRIDE = (R + 31u) / 32u * 32u; // from one row of kv_b to the next

extern "C" __global__ void mla_combine(Params params, Grid grid, const Sequence *batch, const Row *rows,
                                       const float *partials, const void *kv_b, float *output, float *lse) {
  __shared__ float latent[R];
  u32 heads = VALUES ? grid.y : params.heads; // of the chunk
  EACH_BLOCK(i, (u64)params.tokens * heads) {
    u32 token = i / heads, head = i % heads, all = params.first_head + head;
    Sequence sequence = batch[rows[token].sequence];
    u64 first = (u64)(sequence.first_partial + token - sequence.first_row) * params.heads + all;
    const float *part = partials + first * (R + 4u);
    u64 step = (u64)sequence.tokens * params.heads * (R + 4u); // from one split to the next
    float largest = NOTHING, sum = 0.0f;
    for (u32 s = 0u; s < sequence.splits; s++) largest = fmaxf(largest, part[s * step + R]);
    for (u32 s = 0u; s < sequence.splits; s++) {
      if (part[s * step + R] > 0.5f * NOTHING) sum += exp2f(part[s * step + R] - largest);
    }
    __syncthreads(); // the last row's readers are done
    EACH_THREAD(c, R) {
      float merged = 0.0f;
      for (u32 s = 0u; s < sequence.splits; s++) {
        // What weighs nothing may be no number.
        if (part[s * step + R] > 0.5f * NOTHING) merged += exp2f(part[s * step + R] - largest) * part[s * step + c];
      }
      latent[c] = sum > 0.0f ? merged / sum : 0.0f;
    }
    __syncthreads();
    float *to = output + (u64)token * params.output_stride + all * (VALUES ? V : R);
    EACH_THREAD(v, VALUES ? V : R) {
      float value = 0.0f;
      if (VALUES) {
        for (u32 c = 0u; c < R; c++) value += latent[c] * weight(kv_b, ((u64)head * (N + V) + N + v) * STRIDE + c);
      } else {
        value = latent[v];
      }
      to[v] = value;
    }
    if (threadIdx.x == 0u) lse[(u64)token * params.heads + all] = sum > 0.0f ? (largest + log2f(sum)) * LN_2 : NOTHING;
  }
}
