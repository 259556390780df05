// A tile of records of W f32 values in workgroup memory.
// Constants: W, TILE.

const UNITS = W / 4u; // vec4<u32> a record

var<workgroup> tile: array<vec4<f32>, TILE * W / 4u>; // [TILE, W / 4]

// Puts unit `unit` of a record at place `token` of the tile.
fn stage(token: u32, unit: u32, value: vec4<u32>) {
  tile[token * (W / 4u) + unit] = bitcast<vec4<f32>>(value);
}

// Values 4 quad .. 4 quad + 3 of the tile's record `token`.
fn quad_of(token: u32, quad: u32) -> vec4<f32> {
  return tile[token * (W / 4u) + quad];
}
