// A tile of records of W f16 values in workgroup memory.
// Constants: W, TILE.

const UNITS = W / 8u; // vec4<u32> a record

var<workgroup> tile: array<vec2<u32>, TILE * W / 4u>; // [TILE, W / 4]

// Puts unit `unit` of a record at place `token` of the tile.
fn stage(token: u32, unit: u32, value: vec4<u32>) {
  tile[token * (W / 4u) + 2u * unit] = value.xy;
  tile[token * (W / 4u) + 2u * unit + 1u] = value.zw;
}

// Values 4 quad .. 4 quad + 3 of the tile's record `token`.
fn quad_of(token: u32, quad: u32) -> vec4<f32> {
  let words = tile[token * (W / 4u) + quad];
  return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}
