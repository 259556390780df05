// For each expert its pairs (a token's slots that chose it, in order), and these cut into tiles for moe_gemm.
// Grid: one workgroup an expert.
// lib: none.
// Constants: WORKGROUP; EXPERTS that have weights: pairs of others are in no list; TILE, pairs of a tile.

struct Params {
  pairs: u32,
  tiles: u32, // room for them; what is left over gets a count of 0
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> routes: array<vec2<u32>>;      // [pairs]: expert, bits of its weight
@group(0) @binding(2) var<storage, read_write> order: array<u32>;       // [pairs]: pairs, expert after expert
@group(0) @binding(3) var<storage, read_write> tiles: array<vec4<u32>>; // [tiles]: expert, first in `order`, count, 0

var<workgroup> counts: array<atomic<u32>, (EXPERTS + 3u) / 4u * 4u>;
var<workgroup> found: array<u32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let expert = group.x;
  for (var e = lane; e < EXPERTS; e += WORKGROUP) {
    atomicStore(&counts[e], 0u);
  }
  workgroupBarrier();

  let span = (params.pairs + WORKGROUP - 1u) / WORKGROUP;
  let begin = min(lane * span, params.pairs);
  let end = min(begin + span, params.pairs);
  var own = 0u;
  for (var pair = begin; pair < end; pair++) {
    let chosen = routes[pair].x;
    own += u32(chosen == expert);
    if (chosen < EXPERTS) {
      atomicAdd(&counts[chosen], 1u);
    }
  }
  found[lane] = own;
  workgroupBarrier();

  var first = 0u;      // of the expert in `order`
  var first_tile = 0u;
  for (var e = 0u; e < expert; e++) {
    let count = atomicLoad(&counts[e]);
    first += count;
    first_tile += (count + TILE - 1u) / TILE;
  }
  let count = atomicLoad(&counts[expert]);
  let used = (count + TILE - 1u) / TILE;
  for (var i = lane; i < used && first_tile + i < params.tiles; i += WORKGROUP) {
    tiles[first_tile + i] = vec4<u32>(expert, first + i * TILE, min(TILE, count - i * TILE), 0u);
  }
  if (expert == EXPERTS - 1u) {
    for (var i = first_tile + used + lane; i < params.tiles; i += WORKGROUP) {
      tiles[i] = vec4<u32>(0u);
    }
  }

  var at = first;
  for (var i = 0u; i < lane; i++) {
    at += found[i];
  }
  for (var pair = begin; pair < end; pair++) {
    if (routes[pair].x == expert) {
      order[at] = pair;
      at++;
    }
  }
}
