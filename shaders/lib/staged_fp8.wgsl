// Records of R e4m3 codes, an f32 scale for each 128 of them and P f16 values (append_fp8 writes them), moved in parts
// of 16 bytes into rows of f16 of a tile for the matrix units.
// lib: halves, e4m3_halves, scalar_tile (keep_four). Of the kernel: binding `cache`.
// Constants: R, which is 512; P, a multiple of 4.

const UNITS = (R / 4u + 4u + P / 2u + 3u) / 4u; // parts of a record: codes, scales, the rope part
const SCALES = R / 16u;

// A latent value over what a tile's row has of it: 2^8, the scale of the largest f16, is not f16 times 2^8.
const UNIT = 2.0;

// What a lane moves at once, and the scale where those are codes.
struct Part {
  value: vec4<u32>,
  scale: u32,
}

// A vec4 of a query as a tile's rows have theirs.
fn query_of(quad: u32, query: vec4<f32>) -> vec4<f32> {
  return select(query, UNIT * query, quad < R / 4u);
}

// A vec4 of an output, from the sums of a tile's rows.
fn output_of(sums: vec4<f32>) -> vec4<f32> {
  return UNIT * sums;
}

// Loads part `unit` of record `record`.
fn fetch(record: u32, unit: u32) -> Part {
  let at = record * UNITS;
  return Part(cache[at + unit], cache[at + SCALES][min(unit, SCALES - 1u) / 8u]);
}

// Puts a part to the tile's row that starts at `row`.
fn stage(row: u32, unit: u32, part: Part) {
  if (unit < SCALES) {
    let factor = f16(bitcast<f32>(part.scale) * (256.0 / UNIT));
    for (var i = 0u; i < 4u; i++) {
      keep_four(row + 16u * unit + 4u * i, values_of(part.value[i]).xzyw * factor);
    }
  } else if (unit > SCALES) {
    let column = 8u * (unit - SCALES - 1u);
    if (column < P) { keep_four(row + R + column, halves(part.value.x, part.value.y)); }
    if (column + 4u < P) { keep_four(row + R + column + 4u, halves(part.value.z, part.value.w)); }
  }
}
