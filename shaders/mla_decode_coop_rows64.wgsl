// As mla_decode_coop, for blocks of 64 (token, head) rows, bound by matrix units and by reads of workgroup memory: two
// tiles of 16 tokens stand there, so that a tile's scores and the outputs of the one before it are taken between the
// same two barriers. 8 subgroups of 32: for the scores 2 halves of a record times 4 blocks of 16 rows, for the values
// COLUMNS fragments of 16 columns each.
// Outputs are rescaled in a second loop alone, which goes on where a maximum has moved: where the code for it stands in
// the first one, drivers copy the outputs' registers at every tile.
// Grid: x blocks of rows of the longest sequence, y splits of one cache chunk.
// lib: batch, score_* (NOTHING), record_* (Part, keep, quad_at, output_of), block_coop, and for it rows_*.
// Constants: R latent and P rope width, W record values, STEPS = W / 64 rounded up, COLUMNS = R / 128 rounded up,
// ROWS, which is 64; Cell, an element of the cache.

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

const TILE = 16u;
const SLOT = TILE * PITCH;      // vec4<f16> from one tile to the next
const HALF_STEPS = 2u * STEPS;  // fragments of a row's 16 columns in a half of a record
const SCORE_PITCH = 34u;        // vec4 of a row, of 2 halves of 4 blocks: 32 bytes more, for the banks, factors and the flag
const FLAG = 33u;               // of the scores: the tile where a maximum moved last, as `mark` has it
const UNMOVED = 0x7f000000u;    // no tile, and a number as f32
const WEIGHT_PITCH = 6u;        // vec4<f16>

var<workgroup> tile: array<vec4<f16>, 2u * SLOT>;              // at first 32 rows of queries
var<workgroup> scores: array<vec4<f32>, 16u * SCORE_PITCH>;    // and scratch of 16 x 4 a subgroup
var<workgroup> weights: array<vec4<f16>, ROWS * WEIGHT_PITCH>;

// A tile's first token as bits of an f32 that no device takes for 0.
fn mark(base: u32) -> u32 {
  return base | 0x40000000u;
}

// Where a row's factor stands beside the scores, as component row / 16. Lanes write components apart, as scalars.
fn factor_at(row: u32) -> u32 {
  return row % 16u * SCORE_PITCH + 32u;
}

// A block's scores by a half of the record: against the tile's tokens, from vec4 `keys` of their rows on.
fn scores_of(q: ptr<function, array<Rows, 18>>, keys: u32) -> Sums {
  var s: Sums;
  if (HALF_STEPS > 0u) { s = add((*q)[0], key_of(keys, 0u), s); } if (HALF_STEPS > 1u) { s = add((*q)[1], key_of(keys, 1u), s); }
  if (HALF_STEPS > 2u) { s = add((*q)[2], key_of(keys, 2u), s); } if (HALF_STEPS > 3u) { s = add((*q)[3], key_of(keys, 3u), s); }
  if (HALF_STEPS > 4u) { s = add((*q)[4], key_of(keys, 4u), s); } if (HALF_STEPS > 5u) { s = add((*q)[5], key_of(keys, 5u), s); }
  if (HALF_STEPS > 6u) { s = add((*q)[6], key_of(keys, 6u), s); } if (HALF_STEPS > 7u) { s = add((*q)[7], key_of(keys, 7u), s); }
  if (HALF_STEPS > 8u) { s = add((*q)[8], key_of(keys, 8u), s); } if (HALF_STEPS > 9u) { s = add((*q)[9], key_of(keys, 9u), s); }
  if (HALF_STEPS > 10u) { s = add((*q)[10], key_of(keys, 10u), s); } if (HALF_STEPS > 11u) { s = add((*q)[11], key_of(keys, 11u), s); }
  if (HALF_STEPS > 12u) { s = add((*q)[12], key_of(keys, 12u), s); } if (HALF_STEPS > 13u) { s = add((*q)[13], key_of(keys, 13u), s); }
  if (HALF_STEPS > 14u) { s = add((*q)[14], key_of(keys, 14u), s); } if (HALF_STEPS > 15u) { s = add((*q)[15], key_of(keys, 15u), s); }
  if (HALF_STEPS > 16u) { s = add((*q)[16], key_of(keys, 16u), s); } if (HALF_STEPS > 17u) { s = add((*q)[17], key_of(keys, 17u), s); }
  return s;
}

// Adds a tile's values to the outputs, with the weights that stand there.
fn fold(o: ptr<function, array<Sums, 16>>, tokens: u32, subgroup: u32) {
  let w0 = coopLoadT<Rows>(&weights[0], WEIGHT_PITCH);
  let w1 = coopLoadT<Rows>(&weights[16u * WEIGHT_PITCH], WEIGHT_PITCH);
  let w2 = coopLoadT<Rows>(&weights[32u * WEIGHT_PITCH], WEIGHT_PITCH);
  let w3 = coopLoadT<Rows>(&weights[48u * WEIGHT_PITCH], WEIGHT_PITCH);
  {
    let v = value_of(tokens, subgroup, 0u);
    (*o)[0] = add(w0, v, (*o)[0]); (*o)[4] = add(w1, v, (*o)[4]); (*o)[8] = add(w2, v, (*o)[8]); (*o)[12] = add(w3, v, (*o)[12]);
  }
  if (COLUMNS > 1u) {
    let v = value_of(tokens, subgroup, 1u);
    (*o)[1] = add(w0, v, (*o)[1]); (*o)[5] = add(w1, v, (*o)[5]); (*o)[9] = add(w2, v, (*o)[9]); (*o)[13] = add(w3, v, (*o)[13]);
  }
  if (COLUMNS > 2u) {
    let v = value_of(tokens, subgroup, 2u);
    (*o)[2] = add(w0, v, (*o)[2]); (*o)[6] = add(w1, v, (*o)[6]); (*o)[10] = add(w2, v, (*o)[10]); (*o)[14] = add(w3, v, (*o)[14]);
  }
  if (COLUMNS > 3u) {
    let v = value_of(tokens, subgroup, 3u);
    (*o)[3] = add(w0, v, (*o)[3]); (*o)[7] = add(w1, v, (*o)[7]); (*o)[11] = add(w2, v, (*o)[11]); (*o)[15] = add(w3, v, (*o)[15]);
  }
}

// A block's fragment of outputs times its rows' factors. `at` is subgroup and lane.
fn rescaled(sums: Sums, block: u32, at: vec2<u32>) -> Sums {
  coopStoreT(sums, &scores[4u * at.x], SCORE_PITCH);
  subgroupBarrier();
  let here = 4u * at.x + at.y / 4u * SCORE_PITCH + at.y % 4u;
  scores[here] *= scores[factor_at(at.y / 4u)][block];
  scores[here + 8u * SCORE_PITCH] *= scores[factor_at(at.y / 4u + 8u)][block];
  subgroupBarrier();
  let result = coopLoadT<Sums>(&scores[4u * at.x], SCORE_PITCH);
  subgroupBarrier(); // the scratch is free
  return result;
}

// Writes a block's fragment of outputs, times the rows' factors, to rows.x .. rows.x + rows.y - 1.
fn write(sums: Sums, block: u32, j: u32, rows: vec2<u32>, at: vec2<u32>) {
  coopStoreT(sums, &scores[4u * at.x], SCORE_PITCH);
  subgroupBarrier();
  let fragment = at.x * COLUMNS + j;
  for (var i = at.y; i < 64u && fragment < R / 16u; i += 32u) {
    let row = 16u * block + i / 4u;
    if (row < rows.y) {
      let to = (rows.x + row) * (R / 4u + 1u) + quad_at(4u * fragment + i % 4u);
      let sum = scores[4u * at.x + i / 4u * SCORE_PITCH + i % 4u];
      partials[to] = output_of(sum * scores[factor_at(i / 4u)][block]);
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
  let mine = subgroup % 4u;                      // the block whose scores this subgroup takes
  let columns = subgroup / 4u * HALF_STEPS * 4u; // by this half of the record
  let put = 4u * subgroup;
  let place = index / 16u;                       // this lane's token of a tile
  let side = index % 16u;
  var part = fetch_token(sequence.pages, split.begin + place, split.end, side);

  var q: array<Rows, 18>;
  let held = mine % 2u * SLOT + columns; // where this subgroup's queries stand, in its turn
  let start = sequence.first_row * params.heads;
  for (var turn = 0u; turn < 2u; turn++) { // 32 rows, in both tiles
    keep_queries(start, block_first + 32u * turn, block_rows - 1u, index);
    keep_queries(start, block_first + 32u * turn, block_rows - 1u, index + 256u);
    workgroupBarrier();
    // A loop for a condition: naga takes no matrices under one that only a subgroup agrees on.
    for (var now = turn; now == mine / 2u; now = NEVER) {
      if (HALF_STEPS > 0u) { q[0] = queries_of(held, 0u); } if (HALF_STEPS > 1u) { q[1] = queries_of(held, 1u); }
      if (HALF_STEPS > 2u) { q[2] = queries_of(held, 2u); } if (HALF_STEPS > 3u) { q[3] = queries_of(held, 3u); }
      if (HALF_STEPS > 4u) { q[4] = queries_of(held, 4u); } if (HALF_STEPS > 5u) { q[5] = queries_of(held, 5u); }
      if (HALF_STEPS > 6u) { q[6] = queries_of(held, 6u); } if (HALF_STEPS > 7u) { q[7] = queries_of(held, 7u); }
      if (HALF_STEPS > 8u) { q[8] = queries_of(held, 8u); } if (HALF_STEPS > 9u) { q[9] = queries_of(held, 9u); }
      if (HALF_STEPS > 10u) { q[10] = queries_of(held, 10u); } if (HALF_STEPS > 11u) { q[11] = queries_of(held, 11u); }
      if (HALF_STEPS > 12u) { q[12] = queries_of(held, 12u); } if (HALF_STEPS > 13u) { q[13] = queries_of(held, 13u); }
      if (HALF_STEPS > 14u) { q[14] = queries_of(held, 14u); } if (HALF_STEPS > 15u) { q[15] = queries_of(held, 15u); }
      if (HALF_STEPS > 16u) { q[16] = queries_of(held, 16u); } if (HALF_STEPS > 17u) { q[17] = queries_of(held, 17u); }
    }
    workgroupBarrier();
  }

  var o: array<Sums, 16>; // 4 fragments of each block
  let nth = index / 4u;   // whose softmax this lane shares with three others; turned, so that lanes meet in no bank
  let row = nth / 4u * 4u + nth % 2u * 2u + nth / 2u % 2u;
  let column = index % 4u;
  let read = row % 16u * SCORE_PITCH + row / 16u * 4u + column;
  let end = min(split.end, sequence.position + min(block_first + row, block_rows - 1u) / params.heads + 1u);
  var total = 0.0;
  if (index == 0u) { scores[FLAG].x = bitcast<f32>(UNMOVED); }

  keep(place * PITCH, side, part);
  part = fetch_token(sequence.pages, split.begin + TILE + place, split.end, side);
  workgroupBarrier();
  coopStoreT(scores_of(&q, columns), &scores[put], SCORE_PITCH);
  workgroupBarrier();

  let first = seen(scores[read] + scores[read + 16u], split.begin + 4u * column, end);
  var maximum = max(largest_of(first) - FRESH, LOWEST);
  var base = split.begin;
  var here = 0u;    // the tile at `base`
  var over = false; // one of this lane's scores passes its row's maximum by too much
  for (; base < split.end; base += TILE) {
    let next = SLOT - here;
    let sums = scores[read] + scores[read + 16u];
    keep(next + place * PITCH, side, part);
    part = fetch_token(sequence.pages, base + 2u * TILE + place, split.end, side); // on its way until the next turn
    let score = seen(sums, base + 4u * column, end);
    over = max(max(score.x, score.y), max(score.z, score.w)) > maximum + MOST;
    if (over) { scores[FLAG].x = bitcast<f32>(mark(base)); }
    let weight = exp2(score - select(maximum, -LOWEST, over)); // 0 for now
    total += weight.x + weight.y + weight.z + weight.w;
    weights[row * WEIGHT_PITCH + column] = vec4<f16>(weight);
    workgroupBarrier();

    let stop = bitcast<u32>(scores[FLAG].x) == mark(base);
    fold(&o, here, subgroup); // ahead of the scores, whose sums wait for each other: 3 % less time than behind them
    coopStoreT(scores_of(&q, next + columns), &scores[put], SCORE_PITCH);
    here = next;
    workgroupBarrier();
    if (stop) { break; }
  }

  // From the tile on where a maximum is to move: most lanes' tokens of it are folded.
  let rest = select(base + TILE, base, over);
  if (base < split.end) {
    part = fetch_token(sequence.pages, base + place, split.end, side);
  }
  for (; base < split.end; base += TILE) {
    keep(place * PITCH, side, part);
    part = fetch_token(sequence.pages, base + TILE + place, split.end, side);
    if (index == 0u) { scores[FLAG].x = bitcast<f32>(UNMOVED); } // set again below where this tile moves one
    workgroupBarrier();
    coopStoreT(scores_of(&q, columns), &scores[put], SCORE_PITCH);
    workgroupBarrier();

    var score = seen(scores[read] + scores[read + 16u], base + 4u * column, end);
    if (base < rest) { score = vec4<f32>(NOTHING); }
    let largest = largest_of(score);
    var factor = 1.0;
    if (largest > maximum + MOST) {
      factor = exp2(maximum - (largest - FRESH));
      maximum = largest - FRESH;
      total *= factor;
      scores[FLAG].x = bitcast<f32>(mark(base));
    }
    if (column == 0u) { scores[factor_at(row)][row / 16u] = factor; }
    let weight = exp2(score - maximum);
    total += weight.x + weight.y + weight.z + weight.w;
    weights[row * WEIGHT_PITCH + column] = vec4<f16>(weight);
    workgroupBarrier();

    if (bitcast<u32>(scores[FLAG].x) == mark(base)) { // rare
      let at = vec2<u32>(subgroup, lane);
      o[0] = rescaled(o[0], 0u, at); if (COLUMNS > 1u) { o[1] = rescaled(o[1], 0u, at); }
      if (COLUMNS > 2u) { o[2] = rescaled(o[2], 0u, at); } if (COLUMNS > 3u) { o[3] = rescaled(o[3], 0u, at); }
      o[4] = rescaled(o[4], 1u, at); if (COLUMNS > 1u) { o[5] = rescaled(o[5], 1u, at); }
      if (COLUMNS > 2u) { o[6] = rescaled(o[6], 1u, at); } if (COLUMNS > 3u) { o[7] = rescaled(o[7], 1u, at); }
      o[8] = rescaled(o[8], 2u, at); if (COLUMNS > 1u) { o[9] = rescaled(o[9], 2u, at); }
      if (COLUMNS > 2u) { o[10] = rescaled(o[10], 2u, at); } if (COLUMNS > 3u) { o[11] = rescaled(o[11], 2u, at); }
      o[12] = rescaled(o[12], 3u, at); if (COLUMNS > 1u) { o[13] = rescaled(o[13], 3u, at); }
      if (COLUMNS > 2u) { o[14] = rescaled(o[14], 3u, at); } if (COLUMNS > 3u) { o[15] = rescaled(o[15], 3u, at); }
    }
    fold(&o, 0u, subgroup);
    workgroupBarrier(); // the tile is free
  }

  total += subgroupShuffleXor(total, 1u);
  total += subgroupShuffleXor(total, 2u);
  let rows = vec2<u32>(split.partial * params.heads + block_first, min(ROWS, block_rows - block_first));
  if (column == 0u) {
    scores[factor_at(row)][row / 16u] = 1.0 / max(total, 1e-30);
    if (row < rows.y) {
      let lse = select(maximum + log2(total), NOTHING, total <= 0.0); // no number where a weight is none
      partials[(rows.x + row) * (R / 4u + 1u) + R / 4u] = vec4<f32>(lse, 0.0, 0.0, 0.0);
    }
  }
  workgroupBarrier();
  let at = vec2<u32>(subgroup, lane);
  write(o[0], 0u, 0u, rows, at); if (COLUMNS > 1u) { write(o[1], 0u, 1u, rows, at); }
  if (COLUMNS > 2u) { write(o[2], 0u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[3], 0u, 3u, rows, at); }
  write(o[4], 1u, 0u, rows, at); if (COLUMNS > 1u) { write(o[5], 1u, 1u, rows, at); }
  if (COLUMNS > 2u) { write(o[6], 1u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[7], 1u, 3u, rows, at); }
  write(o[8], 2u, 0u, rows, at); if (COLUMNS > 1u) { write(o[9], 2u, 1u, rows, at); }
  if (COLUMNS > 2u) { write(o[10], 2u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[11], 2u, 3u, rows, at); }
  write(o[12], 3u, 0u, rows, at); if (COLUMNS > 1u) { write(o[13], 3u, 1u, rows, at); }
  if (COLUMNS > 2u) { write(o[14], 3u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[15], 3u, 3u, rows, at); }
}
