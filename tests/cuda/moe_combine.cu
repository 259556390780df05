// y = (y +) the sum of a token's experts' outputs, each times its weight; an expert without weights gives x.

struct Params { u32 tokens, length, x_stride, outputs_stride, y_stride; };

extern "C" __global__ void moe_combine(Params params, Grid grid, const Route *routes, const float *outputs,
                                       const float *x, float *y) {
  EACH(i, (u64)params.tokens * params.length) {
    u64 token = i / params.length, column = i % params.length;
    float sum = ACCUMULATE ? y[token * params.y_stride + column] : 0.0f;
    for (u64 pair = token * TOP_K; pair < (token + 1u) * TOP_K; pair++) {
      bool real = routes[pair].expert < EXPERTS;
      const float *from = real ? outputs + pair * params.outputs_stride : x + token * params.x_stride;
      sum += routes[pair].weight * from[column];
    }
    y[token * params.y_stride + column] = sum;
  }
}
