// As product_coop, on matrix units of any size and subgroups of any width: fragments of U x U. Loops over them have
// constant bounds, so that drivers unroll them.
// Constants: FRAGMENTS of 16 tokens, 1 or 2, U rows and columns of a fragment, WIDTH of a subgroup; Rows, Tokens
// and Sums, fragments.
// lib: epilogue_* (EPILOGUE_ROWS), halves, scalar_tile (keep_four), product_parts (Parts, row_of, fetch).
// Of the kernel: Place, and place(token), where a token's outputs go; finish(row, place, first, second), which takes the
// sums of four outputs' rows, the first `row`.

const PITCH = 40u;                          // of a tile's row: 16 bytes more than a step, for the banks
const SUBGROUPS = 256u / WIDTH;
const ROW_GROUPS = min(SUBGROUPS, 8u);      // subgroups side by side over the rows; the others over the tokens
const ROW_FRAGMENTS = TILE_ROWS / U / ROW_GROUPS;
const TOKEN_FRAGMENTS = TILE_TOKENS / U / (SUBGROUPS / ROW_GROUPS);
const LANES = U / 4u / EPILOGUE_ROWS;       // that hand out a token's outputs

const TOKENS_AT = TILE_ROWS * PITCH;        // where the tokens stand in the tile, behind the rows

var<workgroup> tile: array<f16, TOKENS_AT + TILE_TOKENS * PITCH>;
var<workgroup> leaving: array<f32, SUBGROUPS * U * U>; // a fragment of each subgroup: [tokens, rows]

fn keep_part(to: u32, part: vec4<u32>) {
  keep_four(to, halves(part.x, part.y));
  keep_four(to + 4u, halves(part.z, part.w));
}

fn keep(p: Parts, lane: u32) {
  let to = row_of(lane) * PITCH + lane % 4u * 8u;
  keep_part(to, p.w0);
  keep_part(to + 64u * PITCH, p.w1);
  keep_part(to + 128u * PITCH, p.w2);
  keep_part(to + 192u * PITCH, p.w3);
  if (FRAGMENTS > 1u || lane < 128u) { keep_part(TOKENS_AT + to, p.x0); }
}

fn four(at: u32) -> vec4<f32> {
  return vec4<f32>(leaving[at], leaving[at + 1u], leaving[at + 2u], leaving[at + 3u]);
}

// Hands out the sums of a fragment: `first` is its first row and token, `at` subgroup and lane.
fn leave(sums: Sums, first: vec2<u32>, at: vec2<u32>) {
  let here = at.x * U * U;
  coopStore(sums, &leaving[here], U);
  subgroupBarrier();
  for (var i = at.y; i < U * LANES; i += WIDTH) {
    let token = i / LANES;
    let row = i % LANES * 4u * EPILOGUE_ROWS;
    let a = four(here + token * U + row);
    if (EPILOGUE_ROWS == 2u) {
      let b = four(here + token * U + row + 4u);
      finish(first.x + row, place(first.y + token), vec4<f32>(a.xz, b.xz), vec4<f32>(a.yw, b.yw));
    } else {
      finish(first.x + row, place(first.y + token), a, a);
    }
  }
  subgroupBarrier(); // the memory is free
}

// As in product_coop.
fn products(first: vec2<u32>, steps: u32, w: vec4<u32>, t: vec2<u32>, lane: u32, at: vec2<u32>) {
  var c: array<Sums, ROW_FRAGMENTS * TOKEN_FRAGMENTS>;
  let mine = vec2<u32>(at.x % ROW_GROUPS * ROW_FRAGMENTS, at.x / ROW_GROUPS * TOKEN_FRAGMENTS) * U;
  var parts = fetch(w, t, 0u);
  for (var step = 0u; step < steps; step++) {
    keep(parts, lane);
    workgroupBarrier();
    parts = fetch(w, t, 4u * min(step + 1u, steps - 1u)); // on its way while this step is multiplied
    for (var k = 0u; k < 32u; k += U) {
      var a: array<Rows, ROW_FRAGMENTS>;
      for (var i = 0u; i < ROW_FRAGMENTS; i++) {
        a[i] = coopLoadT<Rows>(&tile[(mine.x + i * U) * PITCH + k], PITCH);
      }
      for (var j = 0u; j < TOKEN_FRAGMENTS; j++) {
        let b = coopLoad<Tokens>(&tile[TOKENS_AT + (mine.y + j * U) * PITCH + k], PITCH);
        for (var i = 0u; i < ROW_FRAGMENTS; i++) {
          c[j * ROW_FRAGMENTS + i] = coopMultiplyAdd(a[i], b, c[j * ROW_FRAGMENTS + i]);
        }
      }
    }
    workgroupBarrier(); // the tiles are free
  }
  for (var i = 0u; i < ROW_FRAGMENTS * TOKEN_FRAGMENTS; i++) {
    leave(c[i], first + mine + U * vec2<u32>(i % ROW_FRAGMENTS, i / ROW_FRAGMENTS), at);
  }
}
