// As moe_gemm, on matrix units: f16 weights and packed activations.
// Grid: x tiles of pairs, y and z blocks of TILE_ROWS rows. Strides count f32.
// lib: product_parts (TILE_ROWS, row_of), product_coop or product_coop_any (products), put_f32 (put, Four), epilogue_*.
// Constants: FRAGMENTS of 16 pairs of a subgroup, 1, 2 or 4: moe_sort's tiles have 32 times as many; for
// product_coop_any U, WIDTH, Rows, Tokens, Sums.

struct Params {
  rows: u32,         // of an expert
  columns: u32,      // of W, any number
  blocks: u32,       // from one row of W to the next, and from one of x
  first_expert: u32, // of the chunk
  chunk_experts: u32,
  share: u32,        // pairs that have the same row of x: the slots of a token in up, 1 in down
  x_stride: u32,     // of what was packed
  y_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> order: array<u32>;                 // [pairs]: pairs, expert after expert
@group(0) @binding(2) var<storage, read> tiles: array<vec4<u32>>;           // expert, first in `order`, count, 0
// Neither is written: of what could be, drivers leave loads where they stand, ahead of their use.
@group(0) @binding(3) var<storage, read_write> weights: array<vec4<u32>>; // [chunk_experts, rows, 4 blocks]
@group(0) @binding(4) var<storage, read_write> x: array<vec4<u32>>;       // [pairs / share, 4 blocks]
@group(0) @binding(5) var<storage, read> scales: array<f32>;                // [pairs / share], of the packed rows
@group(0) @binding(6) var<storage, read_write> y: array<Four>;              // [pairs, y_stride / 4]

// Where the tile starts in `order`, and its pairs.
var<private> listed: vec2<u32>;

// Where a pair's outputs start, its scale, and whether there is such a pair.
struct Place {
  to: u32,
  scale: f32,
  exists: bool,
}

// Of a pair, numbered within its tile.
fn place(token: u32) -> Place {
  let pair = order[listed.x + min(token, listed.y - 1u)];
  return Place(pair * params.y_stride, scales[pair / params.share], token < listed.y);
}

// Takes the sums of four outputs of a pair, from row `row` on.
fn finish(row: u32, at: Place, first: vec4<f32>, second: vec4<f32>) {
  if (at.exists && row < params.rows) {
    let to = at.to + row / EPILOGUE_ROWS;
    put(to, min((params.rows - row) / EPILOGUE_ROWS, 4u), first * at.scale, second * at.scale);
  }
}

// Where the row of x of a pair of the tile starts.
fn x_at(token: u32) -> u32 {
  return order[listed.x + min(token, listed.y - 1u)] / params.share * (4u * params.blocks);
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) rank: u32,
) {
  // Workgroups of a tile follow each other: they share its rows of x, and tiles of an expert its matrix.
  let turn = group.x + group.y * groups.x;
  let tile = tiles[turn / groups.y];
  let expert = tile.x - params.first_expert; // wraps round below the chunk
  let first_row = (turn % groups.y + group.z * groups.y) * TILE_ROWS;
  if (tile.z == 0u || tile.x < params.first_expert || expert >= params.chunk_experts || first_row >= params.rows) {
    return;
  }
  listed = tile.yz;
  let apart = vec4<u32>(0u, 64u, 128u, 192u) + vec4<u32>(row_of(lane));
  let row = vec4<u32>(expert * params.rows) + min(vec4<u32>(first_row) + apart, vec4<u32>(params.rows - 1u));
  let w = row * (4u * params.blocks) + lane % 4u;
  let t = vec2<u32>(x_at(apart.x), x_at(apart.y)) + lane % 4u;
  products(vec2<u32>(first_row, 0u), params.blocks, w, t, lane, vec2<u32>(subgroup, rank));
}
