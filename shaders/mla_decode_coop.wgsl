// As mla_decode, on matrix units: products of f16 fragments of 16 x 16 summed in f32. A block of 16 (token, head) rows
// folds the split in tiles of 32 tokens, with queries and outputs in registers. mla_decode_coop_rows64 takes many rows.
// 8 subgroups of 32: for the scores 4 quarters of a record times the tile's halves, for the values COLUMNS fragments
// of 16 columns each. Arrays of fragments are indexed by constants alone, or drivers put them in memory.
// Grid: x blocks of rows of the longest sequence, y splits of one cache chunk.
// lib: batch, score_* (NOTHING), record_* (Part, keep, quad_at, output_of), block_coop, and for it rows_*.
// Constants: R latent and P rope width, W record values, STEPS = W / 64 rounded up, COLUMNS = R / 128 rounded up,
// ROWS, which is 16; Cell, an element of the cache.

struct Params {
  heads: u32,
  first_split: u32, // of the bound chunk
  first_page: u32,
  page_bits: u32,   // a page has 1 << page_bits tokens
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;            // [sequences]
@group(0) @binding(2) var<storage, read> splits: array<Split>;              // [splits]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;           // [entries] page numbers
@group(0) @binding(4) var<storage, read> queries: array<vec4<f32>>;         // [tokens, heads, W / 4], in units of log2
// Never written: of what could be, drivers leave loads where they stand, ahead of their use.
@group(0) @binding(5) var<storage, read_write> cache: array<Cell>;          // [pages, page tokens, record]
@group(0) @binding(6) var<storage, read_write> partials: array<vec4<f32>>;  // [partial tokens, heads, R / 4 + 1]

const TILE = 32u;
const SCORE_PITCH = 10u;             // vec4 of a row: 32 bytes more, for the banks
const SCORES = 16u * SCORE_PITCH;    // from one quarter's to the next's
const WEIGHT_PITCH = TILE / 4u + 2u; // vec4<f16>

var<workgroup> tile: array<vec4<f16>, TILE * PITCH>;           // at first 16 rows of queries
var<workgroup> scores: array<vec4<f32>, 4u * SCORES>;          // and scratch of 64 a subgroup
var<workgroup> weights: array<vec4<f16>, ROWS * WEIGHT_PITCH>;
var<workgroup> factors: array<f32, ROWS>;                      // of the rows' outputs
var<workgroup> moved: array<u32, 4>;                           // the tile where a maximum moved last; this tile

// A fragment of outputs times its rows' factors. `at` is subgroup and lane.
fn rescaled(sums: Sums, at: vec2<u32>) -> Sums {
  let scratch = at.x * 64u;
  coopStoreT(sums, &scores[scratch], 4u);
  subgroupBarrier();
  scores[scratch + at.y] *= factors[at.y / 4u];
  scores[scratch + 32u + at.y] *= factors[8u + at.y / 4u];
  subgroupBarrier();
  let result = coopLoadT<Sums>(&scores[scratch], 4u);
  subgroupBarrier(); // the scratch is free
  return result;
}

// Writes a fragment of outputs, times the rows' factors, to rows.x .. rows.x + rows.y - 1.
fn write(sums: Sums, j: u32, rows: vec2<u32>, at: vec2<u32>) {
  let scratch = at.x * 64u;
  coopStoreT(sums, &scores[scratch], 4u);
  subgroupBarrier();
  let fragment = at.x * COLUMNS + j;
  for (var i = at.y; i < 64u && fragment < R / 16u; i += 32u) {
    let row = i / 4u;
    if (row < rows.y) {
      let to = (rows.x + row) * (R / 4u + 1u) + quad_at(4u * fragment + i % 4u);
      partials[to] = output_of(scores[scratch + i] * factors[row]);
    }
  }
  subgroupBarrier(); // the scratch is free
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) block: vec3<u32>,
  @builtin(local_invocation_index) index: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let split = splits[params.first_split + block.y];
  let sequence = batch[split.sequence];
  let block_first = block.x * ROWS;
  let block_rows = sequence.tokens * params.heads;
  if (block_first >= block_rows) {
    return; // another sequence of the batch has more rows
  }
  let columns = subgroup % 4u * STEPS * 4u; // this subgroup's quarter of the record
  let half = subgroup / 4u;                 // of the tile's tokens
  let place = index / 16u;                  // this lane's token of a tile; the one 16 further, too
  let side = index % 16u;
  var part0 = fetch_token(sequence.pages, split.begin + place, split.end, side);
  var part1 = fetch_token(sequence.pages, split.begin + place + 16u, split.end, side);

  keep_queries(sequence.first_row * params.heads, block_first, block_rows - 1u, index);
  workgroupBarrier();
  var q: array<Rows, 9>;
  q[0] = queries_of(columns, 0u); if (STEPS > 1u) { q[1] = queries_of(columns, 1u); }
  if (STEPS > 2u) { q[2] = queries_of(columns, 2u); } if (STEPS > 3u) { q[3] = queries_of(columns, 3u); }
  if (STEPS > 4u) { q[4] = queries_of(columns, 4u); } if (STEPS > 5u) { q[5] = queries_of(columns, 5u); }
  if (STEPS > 6u) { q[6] = queries_of(columns, 6u); } if (STEPS > 7u) { q[7] = queries_of(columns, 7u); }
  if (STEPS > 8u) { q[8] = queries_of(columns, 8u); }
  workgroupBarrier();

  var o: array<Sums, 4>;
  let row = index / 8u; // whose softmax this lane shares; behind ROWS none
  let column = index % 8u;
  let end = min(split.end, sequence.position + min(block_first + row, block_rows - 1u) / params.heads + 1u);
  var maximum = LOWEST;
  var total = 0.0;
  if (index == 0u) { moved[0] = NEVER; }

  for (var base = split.begin; base < split.end; base += TILE) {
    keep(place * PITCH, side, part0);
    keep((place + 16u) * PITCH, side, part1);
    part0 = fetch_token(sequence.pages, base + TILE + place, split.end, side); // on its way while this tile is folded
    part1 = fetch_token(sequence.pages, base + TILE + place + 16u, split.end, side);
    workgroupBarrier();

    let keys = half * 16u * PITCH + columns;
    var s: Sums;
    s = add(q[0], key_of(keys, 0u), s); if (STEPS > 1u) { s = add(q[1], key_of(keys, 1u), s); }
    if (STEPS > 2u) { s = add(q[2], key_of(keys, 2u), s); } if (STEPS > 3u) { s = add(q[3], key_of(keys, 3u), s); }
    if (STEPS > 4u) { s = add(q[4], key_of(keys, 4u), s); } if (STEPS > 5u) { s = add(q[5], key_of(keys, 5u), s); }
    if (STEPS > 6u) { s = add(q[6], key_of(keys, 6u), s); } if (STEPS > 7u) { s = add(q[7], key_of(keys, 7u), s); }
    if (STEPS > 8u) { s = add(q[8], key_of(keys, 8u), s); }
    coopStoreT(s, &scores[subgroup % 4u * SCORES + 4u * half], SCORE_PITCH);
    workgroupBarrier();

    if (row < ROWS) {
      let at = row * SCORE_PITCH + column;
      let sum = scores[at] + scores[at + SCORES] + scores[at + 2u * SCORES] + scores[at + 3u * SCORES];
      let score = seen(sum, base + 4u * column, end);
      var largest = largest_of(score);
      largest = max(largest, subgroupShuffleXor(largest, 4u));
      var factor = 1.0;
      if (largest > maximum + MOST) {
        factor = exp2(maximum - (largest - FRESH));
        maximum = largest - FRESH;
        total *= factor;
        if (column == 0u && base > split.begin) { moved[0] = base; }
      }
      if (column == 0u) { factors[row] = factor; }
      let weight = exp2(score - maximum);
      total += weight.x + weight.y + weight.z + weight.w;
      weights[row * WEIGHT_PITCH + column] = vec4<f16>(weight);
    }
    if (index == 0u) { moved[1] = base; }
    workgroupBarrier();

    if (moved[0] == moved[1]) { // rare
      let at = vec2<u32>(subgroup, lane);
      o[0] = rescaled(o[0], at); if (COLUMNS > 1u) { o[1] = rescaled(o[1], at); }
      if (COLUMNS > 2u) { o[2] = rescaled(o[2], at); } if (COLUMNS > 3u) { o[3] = rescaled(o[3], at); }
    }
    for (var i = 0u; i < TILE / 16u; i++) {
      let w = coopLoadT<Rows>(&weights[4u * i], WEIGHT_PITCH);
      o[0] = add(w, value_of(16u * i * PITCH, subgroup, 0u), o[0]);
      if (COLUMNS > 1u) { o[1] = add(w, value_of(16u * i * PITCH, subgroup, 1u), o[1]); }
      if (COLUMNS > 2u) { o[2] = add(w, value_of(16u * i * PITCH, subgroup, 2u), o[2]); }
      if (COLUMNS > 3u) { o[3] = add(w, value_of(16u * i * PITCH, subgroup, 3u), o[3]); }
    }
    workgroupBarrier(); // the tile is free
  }

  total += subgroupShuffleXor(total, 1u);
  total += subgroupShuffleXor(total, 2u);
  total += subgroupShuffleXor(total, 4u);
  let rows = vec2<u32>(split.partial * params.heads + block_first, min(ROWS, block_rows - block_first));
  if (row < ROWS && column == 0u) {
    factors[row] = 1.0 / max(total, 1e-30);
    if (row < rows.y) {
      let lse = select(maximum + log2(total), NOTHING, total <= 0.0); // no number where a weight is none
      partials[(rows.x + row) * (R / 4u + 1u) + R / 4u] = vec4<f32>(lse, 0.0, 0.0, 0.0);
    }
  }
  workgroupBarrier();
  let at = vec2<u32>(subgroup, lane);
  write(o[0], 0u, rows, at); if (COLUMNS > 1u) { write(o[1], 1u, rows, at); }
  if (COLUMNS > 2u) { write(o[2], 2u, rows, at); } if (COLUMNS > 3u) { write(o[3], 3u, rows, at); }
}
