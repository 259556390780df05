// y = x / sqrt(mean(x^2) + eps) * weight, row by row; with BRANCH first x += scale * branch.
// Grid: one workgroup a row. Strides and offsets count f32 and are multiples of 4; length is any.
// lib: reduce_* (reduce_sum).
// Constants: WORKGROUP; BRANCH, whether `branch` is added (bind anything to it where not).

struct Params {
  rows: u32,
  length: u32,
  x_stride: u32,
  x_offset: u32,
  y_stride: u32,
  y_offset: u32,
  branch_stride: u32,
  eps: f32,
  scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>;   // [rows, x_stride / 4]
@group(0) @binding(2) var<storage, read> branch: array<vec4<f32>>;    // [rows, branch_stride / 4]
@group(0) @binding(3) var<storage, read> weight: array<vec4<f32>>;    // [ceil(length / 4)]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;   // [rows, y_stride / 4]

// Vectors that a lane keeps in registers between the sum and the product: rows of up to
// 32 WORKGROUP elements are read once.
const KEEP = 8u;

// The row's vector at `at` of x, with the branch's at `branch_at` added.
fn load(at: u32, branch_at: u32) -> vec4<f32> {
  var value = x[at];
  if (BRANCH) {
    value += params.scale * branch[branch_at];
    x[at] = value;
  }
  return value;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= params.rows) {
    return;
  }
  let x_row = (row * params.x_stride + params.x_offset) / 4u;
  let y_row = (row * params.y_stride + params.y_offset) / 4u;
  let branch_row = row * params.branch_stride / 4u;
  let whole = params.length / 4u; // full vectors of the row
  let tail = params.length % 4u;  // elements after them: what follows belongs to others

  var keep: array<vec4<f32>, KEEP>;
  var squares = vec4<f32>(0.0);
  for (var k = 0u; k < KEEP; k++) {
    let i = k * WORKGROUP + lane;
    if (i < whole) {
      keep[k] = load(x_row + i, branch_row + i);
      squares += keep[k] * keep[k];
    }
  }
  for (var i = KEEP * WORKGROUP + lane; i < whole; i += WORKGROUP) {
    let value = load(x_row + i, branch_row + i);
    squares += value * value;
  }
  var last = 0.0;
  if (lane < tail) {
    last = x[x_row + whole][lane];
    if (BRANCH) {
      last += params.scale * branch[branch_row + whole][lane];
      x[x_row + whole][lane] = last;
    }
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
