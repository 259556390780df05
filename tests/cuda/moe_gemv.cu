// Up: y[pair] = silu(gate x) * up x of each pair's expert. Down: y[token] = (y +) the sum over its slots of
// weight * (W x[pair]), where an expert without weights gives the token's input. One chunk of experts.

struct Params {
  u32 rows, columns, blocks, first_expert, chunk_experts, experts, share, x_stride, input_stride, y_stride;
  u32 add, identity;
  float eps;
};

extern "C" __global__ void moe_gemv(Params params, Grid grid, const Route *routes, const void *weights, const float *x,
                                    const float *input, const float *norm, float *y) {
  u32 outputs = params.rows / JOINED;
  EACH_WARP(i, (u64)grid.x * outputs) {
    u32 unit = i / outputs, output = i % outputs;
    float *to = y + (u64)unit * params.y_stride + output;
    float sum = DOWN && params.add == 1u ? *to : 0.0f;
    bool any = DOWN;
    for (u32 slot = 0u; slot < SLOTS; slot++) {
      u32 pair = unit * SLOTS + slot;
      Route route = routes[pair];
      float factor = DOWN ? route.weight : 1.0f;
      if (route.expert >= params.first_expert && route.expert - params.first_expert < params.chunk_experts) {
        u64 row = (u64)(route.expert - params.first_expert) * params.rows + (u64)output * JOINED;
        const float *own = x + (u64)(pair / params.share) * params.x_stride;
        sum += factor * joined(weights, row, own, params.columns, NORM ? norm : 0, params.eps);
        any = true;
      } else if (DOWN && params.identity == 1u && route.expert >= params.experts) {
        sum += factor * input[(u64)unit * params.input_stride + output];
      }
    }
    __syncwarp(); // every lane has read y
    if (any && threadIdx.x % WARP == 0u) *to = sum;
  }
}
