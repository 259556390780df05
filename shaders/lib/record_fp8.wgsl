// Records of 512 e4m3 codes, an f32 scale for each 128 of them and P f16 values (append_fp8 writes them), moved by 16
// lanes each into rows of f16 of a tile for the matrix units: a lane takes 16 codes of each half of the latent.
// lib: halves, e4m3_halves (values_of).
// Constants: R, which is 512; P, a multiple of 4; STEPS: a row has 64 STEPS values, those behind R + P zero.

const RECORD = (R / 4u + 4u + P / 2u + 3u) / 4u; // vec4<u32>
const HALF = R / 32u;                            // of the codes
const SCALES = R / 16u;
const ROPE = SCALES + 1u;

// A latent value over what a tile's row has of it: 2^8, the scale of the largest f16, is not f16 times 2^8.
const UNIT = 2.0;

// What a lane moves of a record. Few wide loads: narrow ones, or scales by shuffles, cost more than registers.
struct Part {
  codes0: vec4<u32>,
  codes1: vec4<u32>,
  scales: vec2<u32>,
  rope: vec2<u32>,
}

// Which vec4 of a record stands at a vec4 of a tile's row. The four of a lane's 16 codes stand 16 vec4 apart, so that
// lanes do not meet in one memory bank.
fn quad_at(place: u32) -> u32 {
  return select(place, place / 64u * 64u + place % 16u * 4u + place / 16u % 4u, place < R / 4u);
}

// A vec4 of a query as a tile's rows have theirs: of four codes, 1 and 2 stand in each other's place.
fn query_of(quad: u32, query: vec4<f32>) -> vec4<f32> {
  return select(query, UNIT * query.xzyw, quad < R / 4u);
}

// A vec4 of an output, from the sums of a tile's rows.
fn output_of(sums: vec4<f32>) -> vec4<f32> {
  return UNIT * sums.xzyw;
}

// Loads lane `lane`'s part of record `record`.
fn fetch(record: u32, lane: u32) -> Part {
  let at = record * RECORD;
  var part: Part;
  part.codes0 = cache[at + lane];
  part.codes1 = cache[at + HALF + lane];
  part.scales = vec2<u32>(cache[at + SCALES][lane / 8u], cache[at + SCALES][2u + lane / 8u]);
  if (P > 0u) {
    let quad = min(lane, max(P / 4u, 1u) - 1u);
    let words = at + ROPE + quad / 2u;
    part.rope = vec2<u32>(cache[words][quad % 2u * 2u], cache[words][quad % 2u * 2u + 1u]);
  }
  return part;
}

fn keep_codes(at: u32, codes: vec4<u32>, scale: u32) {
  let factor = f16(bitcast<f32>(scale) * (256.0 / UNIT));
  tile[at] = values_of(codes.x) * factor;
  tile[at + 16u] = values_of(codes.y) * factor;
  tile[at + 32u] = values_of(codes.z) * factor;
  tile[at + 48u] = values_of(codes.w) * factor;
}

// Puts a part to the tile's row that starts at vec4 `row`.
fn keep(row: u32, lane: u32, part: Part) {
  keep_codes(row + lane, part.codes0, part.scales.x);
  keep_codes(row + R / 8u + lane, part.codes1, part.scales.y);
  if (P > 0u) {
    tile[row + R / 4u + lane] = select(vec4<f16>(), halves(part.rope.x, part.rope.y), lane < P / 4u);
  }
}
