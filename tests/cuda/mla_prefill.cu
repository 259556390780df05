// Attention of new tokens over expanded keys and values, a (token, head) row a thread; with ACCUMULATE merged with
// what `output` and `lse` hold of earlier pieces of the context. With COOP, which stands for mla_prefill_coop, queries
// (the scale of the scores in them) and rope keys are rounded to f16, and keys and values are f16.

struct Params {
  u32 heads, q_stride, kv_stride, k_pe_stride, output_stride;
  float scale, beta;
  u32 length;
};

#if defined(COOP)
#define KERNEL mla_prefill_coop
typedef u16 Expanded;
__device__ inline float seen(float value) { return f16_value(f16_bits(value)); }
__device__ inline float held(u16 value) { return f16_value(value); }
#else
#define KERNEL mla_prefill
typedef float Expanded;
__device__ inline float seen(float value) { return value; }
__device__ inline float held(float value) { return value; }
#endif

extern "C" __global__ void KERNEL(Params params, Grid grid, const Sequence *batch, const Span *spans, const float *q,
                                  const Expanded *kv, const float *k_pe, float *output, float *lse) {
  for (u32 s = 0u; s < grid.z; s++) {
    Span span = spans[s];
    Sequence sequence = batch[span.sequence];
    EACH(i, (u64)sequence.tokens * params.heads) {
      u32 token = i / params.heads, head = i % params.heads;
      u32 position = sequence.position + token, end = least(span.end, position + 1u);
      u64 row = sequence.first_row + token;
      const float *query = q + row * params.q_stride + head * (N + P);
      float factor = params.scale * growth(position, params.beta, params.length);
      auto score = [&](u32 key) {
        u64 at = span.row + key - span.begin;
        const Expanded *nope = kv + at * params.kv_stride + head * (N + V);
        const float *rope = k_pe + at * params.k_pe_stride;
        float sum = 0.0f;
        for (u32 n = 0u; n < N; n++) sum += seen(factor * query[n]) * held(nope[n]);
        for (u32 p = 0u; p < P; p++) sum += seen(factor * query[N + p]) * seen(rope[p]);
        return sum;
      };
      float largest = NOTHING, total = 0.0f, sums[V];
      for (u32 v = 0u; v < V; v++) sums[v] = 0.0f;
      for (u32 key = span.begin; key < end; key++) largest = fmaxf(largest, score(key));
      for (u32 key = span.begin; key < end; key++) {
        float weight = exp2f(score(key) - largest);
        const Expanded *value = kv + (u64)(span.row + key - span.begin) * params.kv_stride + head * (N + V) + N;
        total += weight;
        for (u32 v = 0u; v < V; v++) sums[v] += weight * held(value[v]);
      }
      float here = total > 0.0f ? (largest + log2f(total)) * LN_2 : NOTHING;
      float *to = output + row * params.output_stride + head * V, *own = lse + row * params.heads + head;
      float before = ACCUMULATE ? *own : NOTHING, most = fmaxf(before, here);
      // What saw no key weighs nothing, whatever it holds.
      float old = before > 0.5f * NOTHING ? expf(before - most) : 0.0f;
      float recent = total > 0.0f ? expf(here - most) : 0.0f;
      for (u32 v = 0u; v < V; v++) {
        float value = recent > 0.0f ? recent * (sums[v] / total) : 0.0f;
        if (old > 0.0f) value += old * to[v];
        to[v] = old + recent > 0.0f ? value / (old + recent) : 0.0f;
      }
      *own = old + recent > 0.0f ? most + logf(old + recent) : NOTHING;
    }
  }
}
