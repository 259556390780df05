// As product_coop, on matrix units of any size and subgroups of any width: fragments of U x U. Loops over them have
// constant bounds, so that drivers unroll them. Tiles are of scalars: Metal loads fragments from nothing else.
// Constants: FRAGMENTS of 16 tokens of a subgroup, U rows and columns of a fragment, WIDTH of a subgroup; Rows, Tokens
// and Sums, fragments.
// lib: epilogue_* (EPILOGUE_ROWS), halves, product_parts (Parts, row_of, fetch).
// Of the kernel: Place, and place(token), where a token's outputs go; finish(row, place, first, second), which takes the
// sums of four outputs' rows, the first `row`.

const PITCH = 40u;                          // of a tile's row: 16 bytes more than a step, for the banks
const SUBGROUPS = 256u / WIDTH;
const ROW_GROUPS = min(SUBGROUPS, 8u);      // subgroups side by side over the rows; the others over the tokens
const ROW_FRAGMENTS = TILE_ROWS / U / ROW_GROUPS;
const TOKEN_FRAGMENTS = TILE_TOKENS / U / (SUBGROUPS / ROW_GROUPS);
const LANES = U / 4u / EPILOGUE_ROWS;       // that hand out a token's outputs

var<workgroup> tile_w: array<f16, TILE_ROWS * PITCH>;
var<workgroup> tile_x: array<f16, TILE_TOKENS * PITCH>;
var<workgroup> leaving: array<f32, SUBGROUPS * U * U>; // a fragment of each subgroup: [tokens, rows]

fn keep_w(to: u32, part: vec4<u32>) {
  let low = halves(part.x, part.y);
  let high = halves(part.z, part.w);
  tile_w[to] = low.x; tile_w[to + 1u] = low.y; tile_w[to + 2u] = low.z; tile_w[to + 3u] = low.w;
  tile_w[to + 4u] = high.x; tile_w[to + 5u] = high.y; tile_w[to + 6u] = high.z; tile_w[to + 7u] = high.w;
}

fn keep_x(to: u32, part: vec4<u32>) {
  let low = halves(part.x, part.y);
  let high = halves(part.z, part.w);
  tile_x[to] = low.x; tile_x[to + 1u] = low.y; tile_x[to + 2u] = low.z; tile_x[to + 3u] = low.w;
  tile_x[to + 4u] = high.x; tile_x[to + 5u] = high.y; tile_x[to + 6u] = high.z; tile_x[to + 7u] = high.w;
}

fn keep(p: Parts, lane: u32) {
  let to = row_of(lane) * PITCH + lane % 4u * 8u;
  keep_w(to, p.w0);
  keep_w(to + 64u * PITCH, p.w1);
  keep_w(to + 128u * PITCH, p.w2);
  keep_w(to + 192u * PITCH, p.w3);
  if (FRAGMENTS > 1u || lane < 128u) { keep_x(to, p.x0); }
  if (FRAGMENTS > 2u) { keep_x(to + 64u * PITCH, p.x1); }
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
        a[i] = coopLoadT<Rows>(&tile_w[(mine.x + i * U) * PITCH + k], PITCH);
      }
      for (var j = 0u; j < TOKEN_FRAGMENTS; j++) {
        let b = coopLoad<Tokens>(&tile_x[(mine.y + j * U) * PITCH + k], PITCH);
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
