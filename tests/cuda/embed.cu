// y = scale * table[id] for the ids of one chunk of the table; zeros for ids outside the vocabulary.

struct Params {
  u32 tokens, length, table_stride, y_stride, vocabulary, first, count;
  float scale;
};

extern "C" __global__ void embed(Params params, Grid grid, const u32 *tokens, const void *table, float *y) {
  EACH(i, (u64)params.tokens * params.length) {
    u64 token = i / params.length, column = i % params.length;
    u32 id = tokens[token];
    float *to = y + token * params.y_stride + column;
    if (id >= params.vocabulary) {
      *to = 0.0f; // no chunk holds it
    } else if (id >= params.first && id - params.first < params.count) {
      *to = params.scale * weight(table, (u64)(id - params.first) * params.table_stride + column);
    }
  }
}
