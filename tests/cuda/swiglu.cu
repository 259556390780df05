// y = silu(gate) * up.

struct Params { u32 rows, length, gate_stride, gate_offset, up_stride, up_offset, y_stride; };

extern "C" __global__ void swiglu(Params params, Grid grid, const float *gate, const float *up, float *y) {
  EACH(i, (u64)params.rows * params.length) {
    u64 row = i / params.length, column = i % params.length;
    float g = gate[row * params.gate_stride + params.gate_offset + column];
    y[row * params.y_stride + column] = silu(g) * up[row * params.up_stride + params.up_offset + column];
  }
}
