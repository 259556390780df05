// As gemm, on matrix units: f16 weights and packed activations.
// Grid: x blocks of TILE_TOKENS tokens, y and z blocks of TILE_ROWS rows. Strides and offsets count f32.
// lib: product_parts (TILE_ROWS, TILE_TOKENS, row_of), product_coop or product_coop_any (products), put_* (put, Four),
// epilogue_*.
// Constants: FRAGMENTS of 16 tokens of a subgroup, 1, 2 or 4; for product_coop_any U, WIDTH, Rows, Tokens, Sums.

struct Params {
  rows: u32,      // of the chunk
  columns: u32,   // of W, any number
  blocks: u32,    // from one row of W to the next, and from one of x
  first_row: u32, // of the chunk in W
  tokens: u32,
  x_stride: u32,  // of what was packed
  x_offset: u32,
  y_stride: u32,
  y_offset: u32,
  scale: f32,     // of what is added to y
  eps: f32,       // of gemv's norm
}

@group(0) @binding(0) var<uniform> params: Params;
// Neither is written: of what could be, drivers leave loads where they stand, ahead of their use.
@group(0) @binding(1) var<storage, read_write> weights: array<vec4<u32>>; // [rows, 4 blocks]
@group(0) @binding(2) var<storage, read_write> x: array<vec4<u32>>;       // [tokens, 4 blocks]
@group(0) @binding(3) var<storage, read> scales: array<f32>;                // [tokens], of the packed rows
@group(0) @binding(4) var<storage, read_write> y: array<Four>;              // [tokens, y_stride / 4]

// Where a token's outputs start, its scale, and whether there is such a token.
struct Place {
  to: u32,
  scale: f32,
  exists: bool,
}

fn place(token: u32) -> Place {
  let at = min(token, params.tokens - 1u);
  return Place(at * params.y_stride + params.y_offset, scales[at], token < params.tokens);
}

// Takes the sums of four outputs of a token, from row `row` on.
fn finish(row: u32, at: Place, first: vec4<f32>, second: vec4<f32>) {
  if (at.exists && row < params.rows) {
    let to = at.to + (params.first_row + row) / EPILOGUE_ROWS;
    put(to, min((params.rows - row) / EPILOGUE_ROWS, 4u), first * at.scale, second * at.scale);
  }
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) rank: u32,
) {
  let first = vec2<u32>((group.y + group.z * groups.y) * TILE_ROWS, group.x * TILE_TOKENS);
  if (first.x >= params.rows) {
    return;
  }
  let apart = vec4<u32>(0u, 64u, 128u, 192u) + vec4<u32>(row_of(lane));
  let row = min(vec4<u32>(first.x) + apart, vec4<u32>(params.rows - 1u));
  let token = min(vec2<u32>(first.y) + apart.xy, vec2<u32>(params.tokens - 1u));
  let w = row * (4u * params.blocks) + lane % 4u;
  let t = token * (4u * params.blocks) + lane % 4u;
  products(first, params.blocks, w, t, lane, vec2<u32>(subgroup, rank));
}
