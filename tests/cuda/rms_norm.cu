// y = x / sqrt(mean(x^2) + eps) * weight, a row a block.

struct Params {
  u32 rows, length, x_stride, x_offset, y_stride, y_offset;
  float eps;
};

extern "C" __global__ void rms_norm(Params params, Grid grid, const float *x, const float *weight, float *y) {
  EACH_BLOCK(row, params.rows) {
    const float *from = x + row * params.x_stride + params.x_offset;
    float *to = y + row * params.y_stride + params.y_offset;
    float squares = 0.0f;
    EACH_THREAD(i, params.length) squares += from[i] * from[i];
    float root = sqrtf(block_sum(squares) / params.length + params.eps);
    EACH_THREAD(i, params.length) to[i] = from[i] / root * weight[i];
  }
}
