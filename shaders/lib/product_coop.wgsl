// Products of a tile of rows of f16 weights with a tile of packed activations, on matrix units: fragments of
// 16 x 16, summed in f32. 4 subgroups of 32: each takes half of the rows and half of the tokens, whose sums stay in
// registers. A step of 32 columns is multiplied while the next is on its way to the other half of the memory.
// Arrays of fragments are indexed by constants alone, or drivers put them in memory.
// Constants: FRAGMENTS of 16 tokens of a subgroup, 1, 2 or 4.
// Of the kernel: bindings `weights` and `x`, arrays of mat2x4<f16>; finish(row, token, sums of 4 rows).

alias RowFragment = coop_mat16x16<f16, A>;
alias TokenFragment = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

const TILE_ROWS = 128u;
const TILE_TOKENS = 32u * FRAGMENTS;
const PITCH = 10u;                       // vec4 of a tile's row: 16 bytes more than a step, for the banks
const W_STAGE = TILE_ROWS * PITCH;
const X_STAGE = TILE_TOKENS * PITCH;

var<workgroup> tile_w: array<vec4<f16>, 2u * W_STAGE>;
var<workgroup> tile_x: array<vec4<f16>, 2u * X_STAGE>;
var<workgroup> scratch: array<vec4<f32>, 256>; // a fragment of each subgroup

// What a lane moves of a step: 8 columns of every 32nd row and token.
struct Parts {
  w0: mat2x4<f16>,
  w1: mat2x4<f16>,
  w2: mat2x4<f16>,
  w3: mat2x4<f16>,
  x0: mat2x4<f16>,
  x1: mat2x4<f16>,
  x2: mat2x4<f16>,
  x3: mat2x4<f16>,
}

fn fetch(w: vec4<u32>, t: vec4<u32>, at: u32) -> Parts {
  var p: Parts;
  p.w0 = weights[w.x + at];
  p.w1 = weights[w.y + at];
  p.w2 = weights[w.z + at];
  p.w3 = weights[w.w + at];
  p.x0 = x[t.x + at];
  if (FRAGMENTS > 1u) { p.x1 = x[t.y + at]; }
  if (FRAGMENTS > 2u) { p.x2 = x[t.z + at]; p.x3 = x[t.w + at]; }
  return p;
}

fn keep(p: Parts, stage: u32, lane: u32) {
  let to = lane / 4u * PITCH + lane % 4u * 2u;
  let w = stage * W_STAGE + to;
  tile_w[w] = p.w0[0]; tile_w[w + 1u] = p.w0[1];
  tile_w[w + 32u * PITCH] = p.w1[0]; tile_w[w + 32u * PITCH + 1u] = p.w1[1];
  tile_w[w + 64u * PITCH] = p.w2[0]; tile_w[w + 64u * PITCH + 1u] = p.w2[1];
  tile_w[w + 96u * PITCH] = p.w3[0]; tile_w[w + 96u * PITCH + 1u] = p.w3[1];
  let t = stage * X_STAGE + to;
  tile_x[t] = p.x0[0]; tile_x[t + 1u] = p.x0[1];
  if (FRAGMENTS > 1u) { tile_x[t + 32u * PITCH] = p.x1[0]; tile_x[t + 32u * PITCH + 1u] = p.x1[1]; }
  if (FRAGMENTS > 2u) {
    tile_x[t + 64u * PITCH] = p.x2[0]; tile_x[t + 64u * PITCH + 1u] = p.x2[1];
    tile_x[t + 96u * PITCH] = p.x3[0]; tile_x[t + 96u * PITCH + 1u] = p.x3[1];
  }
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

// Hands the sums of a fragment out: `row` and `token` are its first ones, `at` subgroup and lane.
fn leave(sums: Sums, row: u32, token: u32, at: vec2<u32>) {
  coopStore(sums, &scratch[at.x * 64u], 4u);
  subgroupBarrier();
  finish(row + at.y % 4u * 4u, token + at.y / 4u, scratch[at.x * 64u + at.y]);
  finish(row + at.y % 4u * 4u, token + 8u + at.y / 4u, scratch[at.x * 64u + 32u + at.y]);
  subgroupBarrier(); // the scratch is free
}

// The products of the tile from `first` (row, token) on, over `steps` steps. `w` and `t` are where this lane's rows
// and tokens (lane / 4 + 32 i) start, in parts of 8 columns, with the lane's own column in them.
fn products(first: vec2<u32>, steps: u32, w: vec4<u32>, t: vec4<u32>, lane: u32, at: vec2<u32>) {
  var c: array<Sums, 16>; // 4 fragments of rows for each of tokens
  let half = vec2<u32>(at.x % 2u * 64u, at.x / 2u * 16u * FRAGMENTS);
  var parts = fetch(w, t, 0u);
  keep(parts, 0u, lane);
  workgroupBarrier();
  for (var step = 0u; step < steps; step++) {
    parts = fetch(w, t, 4u * min(step + 1u, steps - 1u)); // on its way while this step is multiplied
    let ws = step % 2u * W_STAGE + half.x * PITCH;
    let xs = step % 2u * X_STAGE + half.y * PITCH;
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
    // The other half: its readers are past the last step's barrier.
    keep(parts, (step + 1u) % 2u, lane);
    workgroupBarrier();
  }
  let row = first.x + half.x;
  let token = first.y + half.y;
  leave(c[0], row, token, at); leave(c[1], row + 16u, token, at);
  leave(c[2], row + 32u, token, at); leave(c[3], row + 48u, token, at);
  if (FRAGMENTS > 1u) {
    leave(c[4], row, token + 16u, at); leave(c[5], row + 16u, token + 16u, at);
    leave(c[6], row + 32u, token + 16u, at); leave(c[7], row + 48u, token + 16u, at);
  }
  if (FRAGMENTS > 2u) {
    leave(c[8], row, token + 32u, at); leave(c[9], row + 16u, token + 32u, at);
    leave(c[10], row + 32u, token + 32u, at); leave(c[11], row + 48u, token + 32u, at);
    leave(c[12], row, token + 48u, at); leave(c[13], row + 16u, token + 48u, at);
    leave(c[14], row + 32u, token + 48u, at); leave(c[15], row + 48u, token + 48u, at);
  }
}
