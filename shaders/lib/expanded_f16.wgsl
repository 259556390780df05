// Expanded keys and values of f16, and rope keys of f32, moved by 256 lanes to a tile of f16 for the matrix units.
// lib: halves.
// Constants: N and P widths of a key's parts, V of a value, KEYS of a tile.
// Of the kernel: bindings `kv` and `k_pe`, and `tile` with rows of PITCH vec4: N values of a key, V of a value, P of the
// rope key.

const PARTS = (N + V) / 8u; // 16 bytes each, of an expanded key and value
const ROPE_PARTS = P / 4u;  // likewise, of a rope key

// What a lane moves of a tile, at most.
struct Parts {
  a0: vec4<u32>,
  a1: vec4<u32>,
  a2: vec4<u32>,
  a3: vec4<u32>,
  b0: vec4<f32>,
  b1: vec4<f32>,
}

// Which key of a tile, of `parts` each, and which of its parts a lane's part `i` is.
fn place(lane: u32, i: u32, parts: u32) -> vec2<u32> {
  let at = lane + 256u * i;
  return vec2<u32>(at / parts, at % parts);
}

// A part of an expanded key and value; behind `last` stands the last one's again, a number that weighs 0.
fn expanded(row: u32, last: u32, head: u32, at: vec2<u32>) -> vec4<u32> {
  return kv[(min(row + at.x, last) * params.kv_stride + head * (N + V)) / 8u + at.y];
}

fn turned(row: u32, last: u32, at: vec2<u32>) -> vec4<f32> {
  return k_pe[min(row + at.x, last) * (params.k_pe_stride / 4u) + at.y];
}

// Loads this lane's parts of the tile whose first key stands in row `row`.
fn fetch(row: u32, last: u32, head: u32, lane: u32) -> Parts {
  var p: Parts;
  p.a0 = expanded(row, last, head, place(lane, 0u, PARTS));
  if (KEYS * PARTS > 256u) { p.a1 = expanded(row, last, head, place(lane, 1u, PARTS)); }
  if (KEYS * PARTS > 512u) { p.a2 = expanded(row, last, head, place(lane, 2u, PARTS)); }
  if (KEYS * PARTS > 768u) { p.a3 = expanded(row, last, head, place(lane, 3u, PARTS)); }
  if (P > 0u) { p.b0 = turned(row, last, place(lane, 0u, ROPE_PARTS)); }
  if (KEYS * ROPE_PARTS > 256u) { p.b1 = turned(row, last, place(lane, 1u, ROPE_PARTS)); }
  return p;
}

fn keep_expanded(at: vec2<u32>, part: vec4<u32>) {
  if (at.x < KEYS) {
    let to = at.x * PITCH + 2u * at.y;
    tile[to] = halves(part.x, part.y);
    tile[to + 1u] = halves(part.z, part.w);
  }
}

fn keep_turned(at: vec2<u32>, part: vec4<f32>) {
  if (at.x < KEYS) {
    tile[at.x * PITCH + (N + V) / 4u + at.y] = vec4<f16>(part);
  }
}

fn keep(p: Parts, lane: u32) {
  keep_expanded(place(lane, 0u, PARTS), p.a0);
  if (KEYS * PARTS > 256u) { keep_expanded(place(lane, 1u, PARTS), p.a1); }
  if (KEYS * PARTS > 512u) { keep_expanded(place(lane, 2u, PARTS), p.a2); }
  if (KEYS * PARTS > 768u) { keep_expanded(place(lane, 3u, PARTS), p.a3); }
  if (P > 0u) { keep_turned(place(lane, 0u, ROPE_PARTS), p.b0); }
  if (KEYS * ROPE_PARTS > 256u) { keep_turned(place(lane, 1u, ROPE_PARTS), p.b1); }
}
