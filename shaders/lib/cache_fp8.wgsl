// A tile of fp8 records in workgroup memory: R e4m3 codes, an f32 scale for each 128 of them, P f16
// values (append_fp8 writes them). Codes are decoded once, to f16, which holds each of their values;
// the scales, which f16 may not hold, are applied as a quad is read.
// Constants: R, P, W, TILE.

const SCALES = (R + 127u) / 128u;
const UNITS = (R / 4u + SCALES + P / 2u + 3u) / 4u; // vec4<u32> a record

var<workgroup> tile: array<u32, TILE * W / 2u>;                        // [TILE, W / 2] pairs of f16
var<workgroup> tile_scales: array<f32, (TILE * SCALES + 3u) / 4u * 4u>; // [TILE, SCALES]

// The values of four e4m3 codes. A code below the normal ones counts 2^-9.
fn e4m3_values(codes: u32) -> vec4<f32> {
  let each = (vec4<u32>(codes) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(0xffu);
  let magnitude = each & vec4<u32>(0x7fu);
  let normal = bitcast<vec4<f32>>((magnitude << vec4<u32>(20u)) + vec4<u32>(120u << 23u));
  let value = select(normal, vec4<f32>(magnitude) * 0.001953125, magnitude < vec4<u32>(8u));
  return select(value, -value, each >= vec4<u32>(0x80u));
}

// Puts word `word` of a record, 4 bytes, at place `token` of the tile.
fn stage_word(token: u32, word: u32, value: u32) {
  let row = token * (W / 2u);
  if (word < R / 4u) {
    let values = e4m3_values(value);
    tile[row + 2u * word] = pack2x16float(values.xy); // exact: no rounding to disagree about
    tile[row + 2u * word + 1u] = pack2x16float(values.zw);
  } else if (word < R / 4u + SCALES) {
    tile_scales[token * SCALES + word - R / 4u] = bitcast<f32>(value);
  } else if (word < R / 4u + SCALES + P / 2u) {
    tile[row + R / 2u + word - R / 4u - SCALES] = value;
  }
}

// Puts unit `unit` of a record at place `token` of the tile.
fn stage(token: u32, unit: u32, value: vec4<u32>) {
  for (var k = 0u; k < 4u; k++) {
    stage_word(token, 4u * unit + k, value[k]);
  }
  if (unit == 0u) {
    for (var pair = (R + P) / 2u; pair < W / 2u; pair++) {
      tile[token * (W / 2u) + pair] = 0u; // meets the queries' zeros
    }
  }
}

// Values 4 quad .. 4 quad + 3 of the tile's record `token`.
fn quad_of(token: u32, quad: u32) -> vec4<f32> {
  let at = token * (W / 2u) + 2u * quad;
  let value = vec4<f32>(unpack2x16float(tile[at]), unpack2x16float(tile[at + 1u]));
  if (quad < R / 4u) {
    return value * tile_scales[token * SCALES + quad / 32u];
  }
  return value;
}
