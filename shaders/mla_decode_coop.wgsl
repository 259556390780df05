// As mla_decode, on matrix units: products of f16 fragments of 16 x 16 summed in f32. A block of 16 BLOCKS
// (token, head) rows folds the split in tiles of TILE tokens, with queries and outputs in registers.
// 8 subgroups of 32: for the scores 4 quarters of a record times 2 groups, which halve the rows or the tokens;
// for the values each takes COLUMNS fragments of 16 columns. Arrays of fragments are indexed by constants alone,
// or drivers put them in memory.
// Grid: x blocks of rows of the longest sequence, y splits of one cache chunk.
// lib: batch, rows_* (record_of), score_* (score, NOTHING), record_* (Part, fetch, keep, quad_at, query_of, output_of).
// Constants: R latent and P rope width, W record values, STEPS = W / 64 rounded up, COLUMNS = R / 128 rounded up,
// BLOCKS and TILE: 1 and 32, or 4 and 16; Cell, an element of the cache.

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

alias Rows = coop_mat16x16<f16, A>;
alias Tokens = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

const ROWS = 16u * BLOCKS;
const PITCH = 16u * STEPS + 2u;                    // vec4<f16> of a tile's row: 16 bytes more, for the banks
const SCORE_PITCH = select(66u, 10u, TILE == 32u); // vec4 of a row, of 4 blocks all: 32 bytes more, for the banks
const SCORES = select(16u, 160u, TILE == 32u);     // from one quarter's to the next's
const WEIGHT_PITCH = TILE / 4u + 2u;               // vec4<f16>
const LANES = TILE / 4u;                           // that share a row's softmax
const MOST = 15.0;                                 // weights are at most 2^MOST: f16 holds them
const FRESH = 7.0;                                 // and 2^FRESH where a maximum has just moved
const FOUR = BLOCKS == 4u;
const HOLDS = FOUR && STEPS == 9u;                 // one step's queries in memory, for want of registers
const LOWEST = -1.0e30;                            // below every score
const NEVER = 0xffffffffu;

var<workgroup> tile: array<vec4<f16>, TILE * PITCH>;           // at first 16 rows of queries
var<workgroup> scores: array<vec4<f32>, max(16u * SCORE_PITCH, 4u * SCORES)>; // and scratch of 64 a subgroup
var<workgroup> weights: array<vec4<f16>, ROWS * WEIGHT_PITCH>;
var<workgroup> factors: array<f32, ROWS>;                      // of the rows' outputs
var<workgroup> held: array<vec4<f16>, select(2u, 16u * SCORE_PITCH, HOLDS)>; // a step's queries, as their scores
var<workgroup> moved: array<u32, 4>;                             // the tile where a maximum moved last; this tile

// Loads this lane's part of token `token`'s record. Behind the end the last one's: numbers, that weigh 0.
fn fetch_token(pages: u32, token: u32, end: u32, lane: u32) -> Part {
  return fetch(record_of(pages, min(token, end - 1u)), lane);
}

// Puts 16 query rows from `first` on to the tile; `start` is the sequence's first.
fn keep_queries(start: u32, first: u32, last: u32, lane: u32) {
  let row = start + min(first + lane / 16u, last);
  for (var i = 0u; i < STEPS; i++) {
    let place = lane % 16u + 16u * i;
    let quad = quad_at(place);
    var value = vec4<f32>(0.0);
    if (quad < W / 4u) {
      value = query_of(quad, queries[row * (W / 4u) + quad]);
    }
    tile[lane / 16u * PITCH + place] = vec4<f16>(value);
  }
}

// Which 16 columns of the values: of those that there are.
fn fragment_of(subgroup: u32, j: u32) -> u32 {
  return select(min(subgroup * COLUMNS + j, R / 16u - 1u), subgroup * COLUMNS + j, R % 128u == 0u);
}

fn add(a: Rows, b: Tokens, sums: Sums) -> Sums {
  return coopMultiplyAdd(a, b, sums);
}

// A fragment of a tile's records, for scores.
fn key_of(keys: u32, step: u32) -> Tokens {
  return coopLoad<Tokens>(&tile[keys + 4u * step], PITCH);
}

// A fragment of the 16 rows of queries in the tile.
fn queries_of(quarter: u32, step: u32) -> Rows {
  return coopLoadT<Rows>(&tile[(quarter * STEPS + step) * 4u], PITCH);
}

// A block's fragment of outputs times its rows' factors. `at` is subgroup and lane.
fn rescaled(sums: Sums, block: u32, at: vec2<u32>) -> Sums {
  let scratch = at.x * 64u;
  coopStoreT(sums, &scores[scratch], 4u);
  subgroupBarrier();
  scores[scratch + at.y] *= factors[16u * block + at.y / 4u];
  scores[scratch + 32u + at.y] *= factors[16u * block + 8u + at.y / 4u];
  subgroupBarrier();
  let result = coopLoadT<Sums>(&scores[scratch], 4u);
  subgroupBarrier(); // the scratch is free
  return result;
}

// Writes a block's fragment of outputs, times the rows' factors, to the partials of rows.x .. rows.x + rows.y - 1.
fn write(sums: Sums, block: u32, j: u32, rows: vec2<u32>, at: vec2<u32>) {
  let scratch = at.x * 64u;
  coopStoreT(sums, &scores[scratch], 4u);
  subgroupBarrier();
  let fragment = at.x * COLUMNS + j;
  for (var i = at.y; i < 64u && fragment < R / 16u; i += 32u) {
    let row = 16u * block + i / 4u;
    if (row < rows.y) {
      let at = (rows.x + row) * (R / 4u + 1u) + quad_at(4u * fragment + i % 4u);
      partials[at] = output_of(scores[scratch + i] * factors[row]);
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
  let quarter = subgroup % 4u;
  let row_group = select(subgroup / 4u, 0u, BLOCKS == 1u);
  let token_group = select(0u, subgroup / 4u, BLOCKS == 1u);
  let place = index / 16u; // this lane's token of a tile; of 32 the one 16 further, too
  let side = index % 16u;
  var part0 = fetch_token(sequence.pages, split.begin + place, split.end, side);
  var part1: Part;
  if (TILE == 32u) { part1 = fetch_token(sequence.pages, split.begin + place + 16u, split.end, side); }

  var q: array<Rows, 18>; // 9 steps of a block, 9 of another
  for (var turn = 0u; turn < BLOCKS; turn++) {
    keep_queries(sequence.first_row * params.heads, block_first + 16u * turn, block_rows - 1u, index);
    workgroupBarrier();
    if (HOLDS) {
      let step = (index / 64u * STEPS + STEPS - 1u) * 4u;
      let to = index % 64u / 4u * SCORE_PITCH + (index / 64u * BLOCKS + turn) * 4u;
      held[to + index % 4u] = tile[index % 64u / 4u * PITCH + step + index % 4u];
    }
    // Loops for conditions: naga takes no matrices under one that only a subgroup agrees on.
    for (var mine = turn; mine == row_group * (BLOCKS / 2u); mine = NEVER) {
      q[0] = queries_of(quarter, 0u); if (STEPS > 1u) { q[1] = queries_of(quarter, 1u); }
      if (STEPS > 2u) { q[2] = queries_of(quarter, 2u); } if (STEPS > 3u) { q[3] = queries_of(quarter, 3u); }
      if (STEPS > 4u) { q[4] = queries_of(quarter, 4u); } if (STEPS > 5u) { q[5] = queries_of(quarter, 5u); }
      if (STEPS > 6u) { q[6] = queries_of(quarter, 6u); } if (STEPS > 7u) { q[7] = queries_of(quarter, 7u); }
      if (STEPS > 8u && !HOLDS) { q[8] = queries_of(quarter, 8u); }
    }
    for (var mine = turn; mine == row_group * 2u + 1u && FOUR; mine = NEVER) {
      q[9] = queries_of(quarter, 0u); if (STEPS > 1u) { q[10] = queries_of(quarter, 1u); }
      if (STEPS > 2u) { q[11] = queries_of(quarter, 2u); } if (STEPS > 3u) { q[12] = queries_of(quarter, 3u); }
      if (STEPS > 4u) { q[13] = queries_of(quarter, 4u); } if (STEPS > 5u) { q[14] = queries_of(quarter, 5u); }
      if (STEPS > 6u) { q[15] = queries_of(quarter, 6u); } if (STEPS > 7u) { q[16] = queries_of(quarter, 7u); }
      if (STEPS > 8u && !HOLDS) { q[17] = queries_of(quarter, 8u); }
    }
    workgroupBarrier();
  }

  var o: array<Sums, 16>; // 4 fragments of each block
  let nth = index / LANES; // whose softmax this lane shares; of 64 rows turned, so that lanes meet in no bank
  let row = select(nth, nth / 4u * 4u + nth % 2u * 2u + nth / 2u % 2u, FOUR); // behind ROWS none
  let column = index % LANES;
  let end = min(split.end, sequence.position + min(block_first + row, block_rows - 1u) / params.heads + 1u);
  var maximum = LOWEST;
  var total = 0.0;
  if (index == 0u) { moved[0] = NEVER; }

  for (var base = split.begin; base < split.end; base += TILE) {
    keep(place * PITCH, side, part0);
    if (TILE == 32u) { keep((place + 16u) * PITCH, side, part1); }
    part0 = fetch_token(sequence.pages, base + TILE + place, split.end, side); // on its way while this tile is folded
    if (TILE == 32u) { part1 = fetch_token(sequence.pages, base + TILE + place + 16u, split.end, side); }
    workgroupBarrier();

    let keys = token_group * 16u * PITCH + quarter * STEPS * 4u;
    var s: array<Sums, 2>;
    { let k = key_of(keys, 0u); s[0] = add(q[0], k, s[0]); if (FOUR) { s[1] = add(q[9], k, s[1]); } }
    if (STEPS > 1u) { let k = key_of(keys, 1u); s[0] = add(q[1], k, s[0]); if (FOUR) { s[1] = add(q[10], k, s[1]); } }
    if (STEPS > 2u) { let k = key_of(keys, 2u); s[0] = add(q[2], k, s[0]); if (FOUR) { s[1] = add(q[11], k, s[1]); } }
    if (STEPS > 3u) { let k = key_of(keys, 3u); s[0] = add(q[3], k, s[0]); if (FOUR) { s[1] = add(q[12], k, s[1]); } }
    if (STEPS > 4u) { let k = key_of(keys, 4u); s[0] = add(q[4], k, s[0]); if (FOUR) { s[1] = add(q[13], k, s[1]); } }
    if (STEPS > 5u) { let k = key_of(keys, 5u); s[0] = add(q[5], k, s[0]); if (FOUR) { s[1] = add(q[14], k, s[1]); } }
    if (STEPS > 6u) { let k = key_of(keys, 6u); s[0] = add(q[6], k, s[0]); if (FOUR) { s[1] = add(q[15], k, s[1]); } }
    if (STEPS > 7u) { let k = key_of(keys, 7u); s[0] = add(q[7], k, s[0]); if (FOUR) { s[1] = add(q[16], k, s[1]); } }
    if (STEPS > 8u) {
      let k = key_of(keys, 8u);
      if (HOLDS) {
        let at = (quarter * BLOCKS + 2u * row_group) * 4u;
        s[0] = add(coopLoadT<Rows>(&held[at], SCORE_PITCH), k, s[0]);
        s[1] = add(coopLoadT<Rows>(&held[at + 4u], SCORE_PITCH), k, s[1]);
      } else {
        s[0] = add(q[8], k, s[0]);
      }
    }
    let put = quarter * SCORES + 8u * row_group + 4u * token_group;
    coopStoreT(s[0], &scores[put], SCORE_PITCH);
    if (FOUR) { coopStoreT(s[1], &scores[put + 4u], SCORE_PITCH); }
    workgroupBarrier();

    if (row < ROWS) {
      let at = row % 16u * SCORE_PITCH + row / 16u * 4u + column;
      let sum = scores[at] + scores[at + SCORES] + scores[at + 2u * SCORES] + scores[at + 3u * SCORES];
      let t = base + 4u * column;
      let low = vec2<f32>(score(sum.x, t, end), score(sum.y, t + 1u, end));
      let score = vec4<f32>(low, score(sum.z, t + 2u, end), score(sum.w, t + 3u, end));
      var largest = max(max(score.x, score.y), max(score.z, score.w));
      largest = max(largest, subgroupShuffleXor(largest, 1u));
      largest = max(largest, subgroupShuffleXor(largest, 2u));
      if (LANES > 4u) { largest = max(largest, subgroupShuffleXor(largest, 4u)); }
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
      o[0] = rescaled(o[0], 0u, at); if (COLUMNS > 1u) { o[1] = rescaled(o[1], 0u, at); }
      if (COLUMNS > 2u) { o[2] = rescaled(o[2], 0u, at); } if (COLUMNS > 3u) { o[3] = rescaled(o[3], 0u, at); }
      if (FOUR) {
        o[4] = rescaled(o[4], 1u, at); if (COLUMNS > 1u) { o[5] = rescaled(o[5], 1u, at); }
        if (COLUMNS > 2u) { o[6] = rescaled(o[6], 1u, at); } if (COLUMNS > 3u) { o[7] = rescaled(o[7], 1u, at); }
        o[8] = rescaled(o[8], 2u, at); if (COLUMNS > 1u) { o[9] = rescaled(o[9], 2u, at); }
        if (COLUMNS > 2u) { o[10] = rescaled(o[10], 2u, at); } if (COLUMNS > 3u) { o[11] = rescaled(o[11], 2u, at); }
        o[12] = rescaled(o[12], 3u, at); if (COLUMNS > 1u) { o[13] = rescaled(o[13], 3u, at); }
        if (COLUMNS > 2u) { o[14] = rescaled(o[14], 3u, at); } if (COLUMNS > 3u) { o[15] = rescaled(o[15], 3u, at); }
      }
    }
    for (var i = 0u; i < TILE / 16u; i++) {
      let w0 = coopLoadT<Rows>(&weights[4u * i], WEIGHT_PITCH);
      let w1 = coopLoadT<Rows>(&weights[min(1u, BLOCKS - 1u) * 16u * WEIGHT_PITCH + 4u * i], WEIGHT_PITCH);
      let w2 = coopLoadT<Rows>(&weights[min(2u, BLOCKS - 1u) * 16u * WEIGHT_PITCH + 4u * i], WEIGHT_PITCH);
      let w3 = coopLoadT<Rows>(&weights[min(3u, BLOCKS - 1u) * 16u * WEIGHT_PITCH + 4u * i], WEIGHT_PITCH);
      let here = 16u * i * PITCH;
      {
        let v = coopLoadT<Tokens>(&tile[here + 4u * fragment_of(subgroup, 0u)], PITCH);
        o[0] = add(w0, v, o[0]);
        if (FOUR) { o[4] = add(w1, v, o[4]); o[8] = add(w2, v, o[8]); o[12] = add(w3, v, o[12]); }
      }
      if (COLUMNS > 1u) {
        let v = coopLoadT<Tokens>(&tile[here + 4u * fragment_of(subgroup, 1u)], PITCH);
        o[1] = add(w0, v, o[1]);
        if (FOUR) { o[5] = add(w1, v, o[5]); o[9] = add(w2, v, o[9]); o[13] = add(w3, v, o[13]); }
      }
      if (COLUMNS > 2u) {
        let v = coopLoadT<Tokens>(&tile[here + 4u * fragment_of(subgroup, 2u)], PITCH);
        o[2] = add(w0, v, o[2]);
        if (FOUR) { o[6] = add(w1, v, o[6]); o[10] = add(w2, v, o[10]); o[14] = add(w3, v, o[14]); }
      }
      if (COLUMNS > 3u) {
        let v = coopLoadT<Tokens>(&tile[here + 4u * fragment_of(subgroup, 3u)], PITCH);
        o[3] = add(w0, v, o[3]);
        if (FOUR) { o[7] = add(w1, v, o[7]); o[11] = add(w2, v, o[11]); o[15] = add(w3, v, o[15]); }
      }
    }
    workgroupBarrier(); // the tile is free
  }

  total += subgroupShuffleXor(total, 1u);
  total += subgroupShuffleXor(total, 2u);
  if (LANES > 4u) { total += subgroupShuffleXor(total, 4u); }
  let rows = vec2<u32>(split.partial * params.heads + block_first, min(ROWS, block_rows - block_first));
  if (row < ROWS && column == 0u) {
    factors[row] = 1.0 / max(total, 1e-30);
    if (row < rows.y) {
      let lse = select(NOTHING, maximum + log2(max(total, 1e-30)), total > 0.0);
      partials[(rows.x + row) * (R / 4u + 1u) + R / 4u] = vec4<f32>(lse, 0.0, 0.0, 0.0);
    }
  }
  workgroupBarrier();
  let at = vec2<u32>(subgroup, lane);
  write(o[0], 0u, 0u, rows, at); if (COLUMNS > 1u) { write(o[1], 0u, 1u, rows, at); }
  if (COLUMNS > 2u) { write(o[2], 0u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[3], 0u, 3u, rows, at); }
  if (FOUR) {
    write(o[4], 1u, 0u, rows, at); if (COLUMNS > 1u) { write(o[5], 1u, 1u, rows, at); }
    if (COLUMNS > 2u) { write(o[6], 1u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[7], 1u, 3u, rows, at); }
    write(o[8], 2u, 0u, rows, at); if (COLUMNS > 1u) { write(o[9], 2u, 1u, rows, at); }
    if (COLUMNS > 2u) { write(o[10], 2u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[11], 2u, 3u, rows, at); }
    write(o[12], 3u, 0u, rows, at); if (COLUMNS > 1u) { write(o[13], 3u, 1u, rows, at); }
    if (COLUMNS > 2u) { write(o[14], 3u, 2u, rows, at); } if (COLUMNS > 3u) { write(o[15], 3u, 3u, rows, at); }
  }
}
