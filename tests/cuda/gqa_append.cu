// A row's queries turned and scaled, its keys turned, keys and values written to their page: a value a thread.

struct Params {
  u32 heads, groups, stride, first_page, pages, page_bits;
  float scale;
};

extern "C" __global__ void gqa_append(Params params, Grid grid, const Sequence *batch, const Row *rows,
                                      const u32 *block_table, const float *qkv, const float *table, u16 *cache,
                                      float *queries) {
  u32 slots = params.heads + 2u * params.groups;
  EACH(i, (u64)grid.y * slots * D) {
    u32 k = i % D, slot = i / D % slots;
    u64 token = i / D / slots;
    Row row = rows[token];
    const float *own = qkv + token * params.stride + slot * D;
    bool turns = slot < params.heads + params.groups;
    float value = turns ? turned(own, k, row.position, table, D / 2u) : own[k];
    if (slot < params.heads) {
      queries[(token * params.heads + slot) * D + k] = value * params.scale;
      continue;
    }
    u32 page = block_table[batch[row.sequence].pages + (row.position >> params.page_bits)] - params.first_page;
    if (page >= params.pages) continue; // of another chunk
    u64 record = ((u64)page << params.page_bits) + (row.position & ((1u << params.page_bits) - 1u));
    u32 group = (slot - params.heads) % params.groups, is_value = (slot - params.heads) / params.groups;
    cache[((record * params.groups + group) * 2u + is_value) * D + k] = f16_bits(value);
  }
}
