// The product of each pair's expert with the pair's row of x, tile by tile of moe_sort; one chunk of experts. With
// PRODUCT_COOP the rows are those of pack_rows.

struct Params { u32 rows, columns, blocks, first_expert, chunk_experts, share, x_stride, y_stride; };
struct Tile { u32 expert, first, count, unused; };

// `sum(row of weights, row of x)` is an output's sum.
template <class Sum>
__device__ void products(const Params &params, u32 count, const u32 *order, const Tile *tiles, float *y, Sum sum) {
  u32 outputs = params.rows / JOINED;
  for (u32 t = 0u; t < count; t++) {
    Tile tile = tiles[t];
    if (tile.expert < params.first_expert || tile.expert - params.first_expert >= params.chunk_experts) continue;
    EACH_WARP(i, (u64)tile.count * outputs) {
      u32 pair = order[tile.first + i / outputs], output = i % outputs;
      u64 row = (u64)(tile.expert - params.first_expert) * params.rows + (u64)output * JOINED;
      float value = sum(row, pair / params.share);
      if (threadIdx.x % WARP == 0u) y[(u64)pair * params.y_stride + output] = value;
    }
  }
}

#if defined(PRODUCT_COOP)
extern "C" __global__ void moe_gemm_coop(Params params, Grid grid, const u32 *order, const Tile *tiles,
                                         const void *weights, const u16 *x, const float *scales, float *y) {
  products(params, grid.x, order, tiles, y, [&](u64 row, u32 from) {
    return joined(weights, row, x + (u64)from * params.blocks * 32u, params.columns, scales[from]);
  });
}
#else
extern "C" __global__ void moe_gemm(Params params, Grid grid, const u32 *order, const Tile *tiles, const void *weights,
                                    const float *x, float *y) {
  products(params, grid.x, order, tiles, y, [&](u64 row, u32 from) {
    return joined(weights, row, x + (u64)from * params.x_stride, params.columns, nullptr, 0.0f);
  });
}
#endif
