// Rotates a slice of each head of each row in place, a slice's pair a thread.

struct Params { u32 tokens, heads, pairs, stride, offset, head_stride; };

extern "C" __global__ void rope(Params params, Grid grid, float *x, const Row *rows, const float *table) {
  EACH(i, (u64)params.tokens * params.heads * params.pairs) {
    u32 pair = i % params.pairs, head = i / params.pairs % params.heads;
    u64 token = i / params.pairs / params.heads;
    float *slice = x + token * params.stride + params.offset + head * params.head_stride;
#if defined(ROPE_HALF)
    u32 first = pair, second = pair + params.pairs;
#else
    u32 first = 2u * pair, second = 2u * pair + 1u;
#endif
    float a = turned(slice, first, rows[token].position, table, params.pairs);
    float b = turned(slice, second, rows[token].position, table, params.pairs);
    slice[first] = a;
    slice[second] = b;
  }
}
