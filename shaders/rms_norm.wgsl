// y = x / sqrt(mean(x^2) + eps) * weight, row by row.
// Grid: one workgroup a row. Strides and offsets count f32 and are multiples of 4; length is any.
// lib: reduce_* (reduce_sum).
// Constants: WORKGROUP.

struct Params {
  rows: u32,
  length: u32,
  x_stride: u32,
  x_offset: u32,
  y_stride: u32,
  y_offset: u32,
  eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [rows, x_stride / 4]
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;  // [ceil(length / 4)]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>; // [rows, y_stride / 4]

// Vectors that a lane keeps in registers between the sum and the product: rows of up to
// 32 WORKGROUP elements are read once.
const KEEP = 8u;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= params.rows) {
    return;
  }
  let x_row = (row * params.x_stride + params.x_offset) / 4u;
  let y_row = (row * params.y_stride + params.y_offset) / 4u;
  let whole = params.length / 4u; // full vectors of the row
  let tail = params.length % 4u;  // elements after them: what follows belongs to others

  var keep: array<vec4<f32>, KEEP>;
  var squares = vec4<f32>(0.0);
  for (var k = 0u; k < KEEP; k++) {
    let i = k * WORKGROUP + lane;
    if (i < whole) {
      keep[k] = x[x_row + i];
      squares += keep[k] * keep[k];
    }
  }
  for (var i = KEEP * WORKGROUP + lane; i < whole; i += WORKGROUP) {
    let value = x[x_row + i];
    squares += value * value;
  }
  var last = 0.0;
  if (lane < tail) {
    last = x[x_row + whole][lane];
  }
  let sum = reduce_sum(dot(squares, vec4<f32>(1.0)) + last * last, lane);
  let norm = 1.0 / sqrt(sum / f32(params.length) + params.eps);

  for (var k = 0u; k < KEEP; k++) {
    let i = k * WORKGROUP + lane;
    if (i < whole) {
      y[y_row + i] = keep[k] * norm * weight[i];
    }
  }
  for (var i = KEEP * WORKGROUP + lane; i < whole; i += WORKGROUP) {
    y[y_row + i] = x[x_row + i] * norm * weight[i];
  }
  if (lane < tail) {
    y[y_row + whole][lane] = last * norm * weight[whole][lane];
  }
}
