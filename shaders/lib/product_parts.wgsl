// What 256 lanes move of a product's operands for a step of 32 columns: 256 rows of f16 weights and 32 FRAGMENTS packed
// activations.
// Constants: FRAGMENTS of 16 tokens of a subgroup, 1, 2 or 4.
// Of the kernel: bindings `weights` and `x`, arrays of vec4<u32>, 8 values of f16 each.

const TILE_ROWS = 256u;
const TILE_TOKENS = 32u * FRAGMENTS;

// What a lane moves of a step: 8 columns of every 64th row and token.
struct Parts {
  w0: vec4<u32>,
  w1: vec4<u32>,
  w2: vec4<u32>,
  w3: vec4<u32>,
  x0: vec4<u32>,
  x1: vec4<u32>,
}

// Which of 64 rows, and tokens, a lane moves a quarter of: eight lanes in turn have two that are 4 apart, for the banks.
fn row_of(lane: u32) -> u32 {
  return lane / 32u * 8u + lane % 32u / 8u + lane / 4u % 2u * 4u;
}

fn fetch(w: vec4<u32>, t: vec2<u32>, at: u32) -> Parts {
  var p: Parts;
  p.w0 = weights[w.x + at];
  p.w1 = weights[w.y + at];
  p.w2 = weights[w.z + at];
  p.w3 = weights[w.w + at];
  p.x0 = x[t.x + at];
  if (FRAGMENTS > 2u) { p.x1 = x[t.y + at]; }
  return p;
}
