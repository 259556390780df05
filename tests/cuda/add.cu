// x += scale * y.

struct Params {
  u32 length;
  float scale;
};

extern "C" __global__ void add(Params params, Grid grid, const float *y, float *x) {
  EACH(i, params.length) x[i] += params.scale * y[i];
}
