// Products of a tile of rows of f16 weights with a tile of packed activations, on matrix units: fragments of
// 16 x 16, summed in f32. 8 subgroups of 32: each takes a quarter of the rows and half of the tokens, whose sums stay
// in registers. A step of 32 columns is multiplied while the next is on its way from device memory to registers.
// Arrays of fragments are indexed by constants alone, or drivers put them in memory.
// Constants: FRAGMENTS of 16 tokens of a subgroup, 1, 2 or 4.
// lib: epilogue_* (EPILOGUE_ROWS), halves, product_parts (Parts, row_of, fetch).
// Of the kernel: Place, and place(token), where a token's outputs go; finish(row, place, first, second), which takes the
// sums of four outputs' rows, the first `row`.

alias RowFragment = coop_mat16x16<f16, A>;
alias TokenFragment = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

const PITCH = 10u;              // vec4 of a tile's row: 16 bytes more than a step, for the banks
const LEAVING_PITCH = 9u;         // vec4 of a token's 32 rows that leave, likewise
const LEAVING = 16u * LEAVING_PITCH; // of a subgroup

var<workgroup> tile_w: array<vec4<f16>, TILE_ROWS * PITCH>;
var<workgroup> tile_x: array<vec4<f16>, TILE_TOKENS * PITCH>;
var<workgroup> leaving: array<vec4<f32>, 8u * LEAVING>;

fn keep(p: Parts, lane: u32) {
  let to = row_of(lane) * PITCH + lane % 4u * 2u;
  tile_w[to] = halves(p.w0.x, p.w0.y); tile_w[to + 1u] = halves(p.w0.z, p.w0.w);
  tile_w[to + 64u * PITCH] = halves(p.w1.x, p.w1.y); tile_w[to + 64u * PITCH + 1u] = halves(p.w1.z, p.w1.w);
  tile_w[to + 128u * PITCH] = halves(p.w2.x, p.w2.y); tile_w[to + 128u * PITCH + 1u] = halves(p.w2.z, p.w2.w);
  tile_w[to + 192u * PITCH] = halves(p.w3.x, p.w3.y); tile_w[to + 192u * PITCH + 1u] = halves(p.w3.z, p.w3.w);
  if (FRAGMENTS > 1u || lane < 128u) { tile_x[to] = halves(p.x0.x, p.x0.y); tile_x[to + 1u] = halves(p.x0.z, p.x0.w); }
  if (FRAGMENTS > 2u) { tile_x[to + 64u * PITCH] = halves(p.x1.x, p.x1.y); tile_x[to + 64u * PITCH + 1u] = halves(p.x1.z, p.x1.w); }
}

fn rows_at(at: u32) -> RowFragment {
  return coopLoadT<RowFragment>(&tile_w[at], PITCH);
}

fn tokens_at(at: u32) -> TokenFragment {
  return coopLoad<TokenFragment>(&tile_x[at], PITCH);
}

fn add(a: RowFragment, b: TokenFragment, sums: Sums) -> Sums {
  return coopMultiplyAdd(a, b, sums);
}

// Where a lane's tokens of a fragment go: of those of each turn, 32 / LANES apart.
struct Places {
  p0: Place,
  p1: Place,
  p2: Place,
  p3: Place,
}

const LANES = 8u / EPILOGUE_ROWS; // of a token
const TURN = 32u / LANES;         // tokens of a turn

// Of the fragment that starts at `token`: all loaded at once.
fn places(token: u32, lane: u32) -> Places {
  let i = token + lane / LANES;
  var p: Places;
  p.p0 = place(i);
  p.p1 = place(i + TURN);
  if (LANES == 8u) { p.p2 = place(i + 2u * TURN); p.p3 = place(i + 3u * TURN); }
  return p;
}

// Hands out a lane's share of a turn.
fn hand(row: u32, at: Place, start: u32, quad: u32) {
  let a = leaving[start + quad];
  let b = leaving[start + quad + EPILOGUE_ROWS - 1u];
  let pairs = EPILOGUE_ROWS == 2u;
  finish(row + 4u * quad, at, select(a, vec4<f32>(a.xz, b.xz), pairs), vec4<f32>(a.yw, b.yw));
}

// Hands out the sums of 32 rows of 16 tokens: `row` is the first one, `at` subgroup and lane.
fn leave(low: Sums, high: Sums, row: u32, p: Places, at: vec2<u32>) {
  let here = at.x * LEAVING;
  coopStore(low, &leaving[here], LEAVING_PITCH);
  coopStore(high, &leaving[here + 4u], LEAVING_PITCH);
  subgroupBarrier();
  let quad = at.y % LANES * EPILOGUE_ROWS;
  let start = here + at.y / LANES * LEAVING_PITCH;
  hand(row, p.p0, start, quad);
  hand(row, p.p1, start + TURN * LEAVING_PITCH, quad);
  if (LANES == 8u) {
    hand(row, p.p2, start + 2u * TURN * LEAVING_PITCH, quad);
    hand(row, p.p3, start + 3u * TURN * LEAVING_PITCH, quad);
  }
  subgroupBarrier(); // the memory is free
}

// The products of the tile from `first` (row, token) on, over `steps` steps. `w` and `t` are where this lane's rows
// and tokens (row_of(lane) + 64 i) start, in parts of 8 columns, with the lane's own column in them.
fn products(first: vec2<u32>, steps: u32, w: vec4<u32>, t: vec2<u32>, lane: u32, at: vec2<u32>) {
  var c: array<Sums, 16>; // 4 fragments of rows for each of tokens
  let mine = vec2<u32>(at.x % 4u * 64u, at.x / 4u * 16u * FRAGMENTS);
  let ws = mine.x * PITCH;
  let xs = mine.y * PITCH;
  var parts = fetch(w, t, 0u);
  for (var step = 0u; step < steps; step++) {
    keep(parts, lane);
    workgroupBarrier();
    parts = fetch(w, t, 4u * min(step + 1u, steps - 1u)); // on its way while this step is multiplied
    {
      let a0 = rows_at(ws); let a1 = rows_at(ws + 16u * PITCH);
      let a2 = rows_at(ws + 32u * PITCH); let a3 = rows_at(ws + 48u * PITCH);
      { let b = tokens_at(xs); c[0] = add(a0, b, c[0]); c[1] = add(a1, b, c[1]); c[2] = add(a2, b, c[2]); c[3] = add(a3, b, c[3]); }
      if (FRAGMENTS > 1u) {
        let b = tokens_at(xs + 16u * PITCH);
        c[4] = add(a0, b, c[4]); c[5] = add(a1, b, c[5]); c[6] = add(a2, b, c[6]); c[7] = add(a3, b, c[7]);
      }
      if (FRAGMENTS > 2u) {
        let b = tokens_at(xs + 32u * PITCH);
        c[8] = add(a0, b, c[8]); c[9] = add(a1, b, c[9]); c[10] = add(a2, b, c[10]); c[11] = add(a3, b, c[11]);
        let d = tokens_at(xs + 48u * PITCH);
        c[12] = add(a0, d, c[12]); c[13] = add(a1, d, c[13]); c[14] = add(a2, d, c[14]); c[15] = add(a3, d, c[15]);
      }
    }
    {
      let a0 = rows_at(ws + 4u); let a1 = rows_at(ws + 16u * PITCH + 4u);
      let a2 = rows_at(ws + 32u * PITCH + 4u); let a3 = rows_at(ws + 48u * PITCH + 4u);
      { let b = tokens_at(xs + 4u); c[0] = add(a0, b, c[0]); c[1] = add(a1, b, c[1]); c[2] = add(a2, b, c[2]); c[3] = add(a3, b, c[3]); }
      if (FRAGMENTS > 1u) {
        let b = tokens_at(xs + 16u * PITCH + 4u);
        c[4] = add(a0, b, c[4]); c[5] = add(a1, b, c[5]); c[6] = add(a2, b, c[6]); c[7] = add(a3, b, c[7]);
      }
      if (FRAGMENTS > 2u) {
        let b = tokens_at(xs + 32u * PITCH + 4u);
        c[8] = add(a0, b, c[8]); c[9] = add(a1, b, c[9]); c[10] = add(a2, b, c[10]); c[11] = add(a3, b, c[11]);
        let d = tokens_at(xs + 48u * PITCH + 4u);
        c[12] = add(a0, d, c[12]); c[13] = add(a1, d, c[13]); c[14] = add(a2, d, c[14]); c[15] = add(a3, d, c[15]);
      }
    }
    workgroupBarrier(); // the tiles are free
  }
  let row = first.x + mine.x;
  let token = first.y + mine.y;
  { let p = places(token, at.y); leave(c[0], c[1], row, p, at); leave(c[2], c[3], row + 32u, p, at); }
  if (FRAGMENTS > 1u) {
    { let p = places(token + 16u, at.y); leave(c[4], c[5], row, p, at); leave(c[6], c[7], row + 32u, p, at); }
  }
  if (FRAGMENTS > 2u) {
    { let p = places(token + 32u, at.y); leave(c[8], c[9], row, p, at); leave(c[10], c[11], row + 32u, p, at); }
    { let p = places(token + 48u, at.y); leave(c[12], c[13], row, p, at); leave(c[14], c[15], row + 32u, p, at); }
  }
}
