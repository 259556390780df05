// y = activation(gate) * up, element by element.
// Grid: one invocation four elements of a row. Strides and offsets count f32 and are multiples of 4.
// lib: activation_* (activation).
// Constants: WORKGROUP.

struct Params {
  rows: u32,
  length: u32,
  gate_stride: u32,
  gate_offset: u32,
  up_stride: u32,
  up_offset: u32,
  y_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> gate: array<vec4<f32>>;     // [rows, gate_stride / 4]
@group(0) @binding(2) var<storage, read> up: array<vec4<f32>>;       // [rows, up_stride / 4]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;  // [rows, y_stride / 4]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = (group.x + group.y * groups.x) * WORKGROUP + lane;
  let vectors = (params.length + 3u) / 4u;
  let row = i / vectors;
  let column = i % vectors;
  if (row < params.rows) {
    let g = gate[(row * params.gate_stride + params.gate_offset) / 4u + column];
    let u = up[(row * params.up_stride + params.up_offset) / 4u + column];
    y[row * params.y_stride / 4u + column] = activation(g) * u;
  }
}
