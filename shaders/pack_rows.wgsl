// Rows of f32 as rows of f16, for matrix units. Each row is divided by the power of two that brings its largest
// element to 2^14 .. 2^15, so that none overflows and small ones keep their bits.
// Grid: one workgroup a row. Strides and offsets count f32 and are multiples of 4; length is any.
// lib: reduce_* (reduce_max), pack_f16.
// Constants: WORKGROUP.

struct Params {
  rows: u32,
  length: u32,
  blocks: u32,   // of 32 values from one row of y to the next, zeros behind the length
  x_stride: u32,
  x_offset: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [rows, x_stride / 4]
@group(0) @binding(2) var<storage, read_write> y: array<vec2<u32>>; // [rows, 8 blocks]: four values each
@group(0) @binding(3) var<storage, read_write> scales: array<f32>;  // [rows]: what the values are divided by

// Vectors that a lane keeps in registers between the maximum and the packing.
const KEEP = 8u;

// Four elements of a row, zeros behind its end: what stands there belongs to others.
fn x_quad(start: u32, quad: u32) -> vec4<f32> {
  var value = vec4<f32>(0.0);
  if (4u * quad < params.length) {
    let own = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.length);
    value = select(value, x[start + quad], own);
  }
  return value;
}

// The largest biased exponent of four numbers: 255 of one that is infinite or NaN.
fn exponent(value: vec4<f32>) -> u32 {
  let all = (bitcast<vec4<u32>>(value) >> vec4<u32>(23u)) & vec4<u32>(255u);
  return max(max(all.x, all.y), max(all.z, all.w));
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= params.rows) {
    return;
  }
  let start = (row * params.x_stride + params.x_offset) / 4u;
  let quads = 8u * params.blocks;

  var keep: array<vec4<f32>, KEEP>;
  var largest = 0u;
  for (var k = 0u; k < KEEP; k++) {
    keep[k] = x_quad(start, k * WORKGROUP + lane);
    largest = max(largest, exponent(keep[k]));
  }
  for (var i = KEEP * WORKGROUP + lane; i < quads; i += WORKGROUP) {
    largest = max(largest, exponent(x_quad(start, i)));
  }
  let found = u32(reduce_max(f32(largest), lane));
  // Both the factor and what undoes it are normal numbers.
  let e = clamp(found, 15u, 254u);
  let factor = bitcast<f32>((268u - e) << 23u);

  for (var k = 0u; k < KEEP; k++) {
    let i = k * WORKGROUP + lane;
    if (i < quads) {
      let value = keep[k] * factor;
      y[row * quads + i] = vec2<u32>(pack_f16(value.xy), pack_f16(value.zw));
    }
  }
  for (var i = KEEP * WORKGROUP + lane; i < quads; i += WORKGROUP) {
    let value = x_quad(start, i) * factor;
    y[row * quads + i] = vec2<u32>(pack_f16(value.xy), pack_f16(value.zw));
  }
  if (lane == 0u) {
    // A row with what is no number gives none, whatever the packing made of it.
    scales[row] = bitcast<f32>(select((e - 14u) << 23u, 0x7fc00000u, found == 255u));
  }
}
