// Records of W f16 values, moved by 16 lanes each into rows of f16 of a tile for the matrix units.
// Constants: W; STEPS vec4 of a row that a lane moves, at most 9: a row has 64 STEPS values, those behind W zero.

const LAST = 16u * (STEPS - 1u);

// What a lane moves of a record: values 4 (lane + 16 i) .. 4 (lane + 16 i) + 3.
struct Part {
  a0: vec4<f16>,
  a1: vec4<f16>,
  a2: vec4<f16>,
  a3: vec4<f16>,
  a4: vec4<f16>,
  a5: vec4<f16>,
  a6: vec4<f16>,
  a7: vec4<f16>,
  a8: vec4<f16>,
}

// Which vec4 of a record stands at a vec4 of a tile's row.
fn quad_at(place: u32) -> u32 {
  return place;
}

// A vec4 of a query as a tile's rows have theirs.
fn query_of(quad: u32, query: vec4<f32>) -> vec4<f32> {
  return query;
}

// A vec4 of an output, from the sums of a tile's rows.
fn output_of(sums: vec4<f32>) -> vec4<f32> {
  return sums;
}

// Loads lane `lane`'s part of record `record`.
fn fetch(record: u32, lane: u32) -> Part {
  let at = record * (W / 4u) + lane;
  var part: Part;
  if (STEPS > 1u) { part.a0 = cache[at]; }
  if (STEPS > 2u) { part.a1 = cache[at + 16u]; }
  if (STEPS > 3u) { part.a2 = cache[at + 32u]; }
  if (STEPS > 4u) { part.a3 = cache[at + 48u]; }
  if (STEPS > 5u) { part.a4 = cache[at + 64u]; }
  if (STEPS > 6u) { part.a5 = cache[at + 80u]; }
  if (STEPS > 7u) { part.a6 = cache[at + 96u]; }
  if (STEPS > 8u) { part.a7 = cache[at + 112u]; }
  part.a8 = cache[select(record * (W / 4u) + min(lane + LAST, W / 4u - 1u), at + LAST, W % 64u == 0u)];
  return part;
}

// Puts a part to the tile's row that starts at vec4 `row`.
fn keep(row: u32, lane: u32, part: Part) {
  let at = row + lane;
  if (STEPS > 1u) { tile[at] = part.a0; }
  if (STEPS > 2u) { tile[at + 16u] = part.a1; }
  if (STEPS > 3u) { tile[at + 32u] = part.a2; }
  if (STEPS > 4u) { tile[at + 48u] = part.a3; }
  if (STEPS > 5u) { tile[at + 64u] = part.a4; }
  if (STEPS > 6u) { tile[at + 80u] = part.a5; }
  if (STEPS > 7u) { tile[at + 96u] = part.a6; }
  if (STEPS > 8u) { tile[at + 112u] = part.a7; }
  if (W % 64u == 0u || lane + LAST < W / 4u) {
    tile[at + LAST] = part.a8;
  } else {
    tile[at + LAST] = vec4<f16>();
  }
}
