// Records of W f16 values, moved in parts of 8 into rows of a tile for the matrix units.
// lib: halves, scalar_tile (keep_four). Of the kernel: binding `cache`.
// Constants: W, a multiple of 8.

const UNITS = W / 8u; // parts of a record

// What a lane moves at once.
struct Part {
  value: vec4<u32>,
}

// A vec4 of a query as a tile's rows have theirs.
fn query_of(quad: u32, query: vec4<f32>) -> vec4<f32> {
  return query;
}

// A vec4 of an output, from the sums of a tile's rows.
fn output_of(sums: vec4<f32>) -> vec4<f32> {
  return sums;
}

// Loads part `unit` of record `record`.
fn fetch(record: u32, unit: u32) -> Part {
  return Part(cache[record * UNITS + unit]);
}

// Puts a part to the tile's row that starts at `row`.
fn stage(row: u32, unit: u32, part: Part) {
  keep_four(row + 8u * unit, halves(part.value.x, part.value.y));
  keep_four(row + 8u * unit + 4u, halves(part.value.z, part.value.w));
}
