// The product of each pair's expert with the pair's row of x, tile by tile of moe_sort; one chunk of experts.

struct Params { u32 rows, columns, blocks, first_expert, chunk_experts, share, x_stride, y_stride; };
struct Tile { u32 expert, first, count, unused; };

extern "C" __global__ void moe_gemm(Params params, Grid grid, const u32 *order, const Tile *tiles, const void *weights,
                                    const float *x, float *y) {
  u32 outputs = params.rows / JOINED;
  for (u32 t = 0u; t < grid.x; t++) {
    Tile tile = tiles[t];
    if (tile.expert < params.first_expert || tile.expert - params.first_expert >= params.chunk_experts) continue;
    EACH_WARP(i, (u64)tile.count * outputs) {
      u32 pair = order[tile.first + i / outputs], output = i % outputs;
      u64 row = (u64)(tile.expert - params.first_expert) * params.rows + (u64)output * JOINED;
      float sum = joined(weights, row, x + (u64)(pair / params.share) * params.x_stride, params.columns, 0, 0.0f);
      if (threadIdx.x % WARP == 0u) y[(u64)pair * params.y_stride + output] = sum;
    }
  }
}
