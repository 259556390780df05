// As mla_decode_coop, on matrix units of any size and subgroups of any width, in 32 KiB: a block of 16 (token, head)
// rows folds the split in tiles of 16 tokens, with queries and outputs in registers. For the scores each subgroup
// takes a run of a record's columns, for the values a run of theirs. Loops over fragments have constant bounds, so that
// drivers unroll them.
// Grid: x blocks of rows of the longest sequence, y splits of one cache chunk.
// lib: batch, rows_* (record_of), score_* (score, NOTHING),
// scalar_tile (keep_four), staged_* (UNITS, Part, fetch, stage, query_of, output_of).
// Constants: R latent and P rope width, W record values, U rows and columns of a fragment, WIDTH invocations of a
// subgroup, SUBGROUPS; Rows, Tokens and Sums, fragments; Cell, an element of the cache.

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
@group(0) @binding(5) var<storage, read> cache: array<Cell>;                // [pages, page tokens, record]
@group(0) @binding(6) var<storage, read_write> partials: array<vec4<f32>>;  // [partial tokens, heads, R / 4 + 1]

const INVOCATIONS = SUBGROUPS * WIDTH;
const ROWS = 16u;
const TILE = 16u;
const SIDES = 16u / U;                                        // fragments of the rows, and of a tile's tokens
const RUN = SUBGROUPS * U;
const STEPS = (W + RUN - 1u) / RUN;                           // fragments of a record that a subgroup takes
const COLUMNS = (R + RUN - 1u) / RUN;                         // and of a value
const PITCH = STEPS * RUN + 8u;                               // of a tile's row: 16 bytes more, for the banks
const WEIGHT_PITCH = TILE + 8u;
const SCORES = ROWS * TILE;                                   // of a subgroup
const LOADS = (TILE * UNITS + INVOCATIONS - 1u) / INVOCATIONS; // parts that a lane moves of a tile
const MOST = 15.0;                                            // weights are at most 2^MOST: f16 holds them
const FRESH = 7.0;                                            // and 2^FRESH where a maximum has just moved
const NEVER = 0xffffffffu;

var<workgroup> tile: array<f16, TILE * PITCH>;         // at first the rows of queries
var<workgroup> scores: array<f32, SUBGROUPS * SCORES>; // of each subgroup's columns; its scratch
var<workgroup> weights: array<f16, ROWS * WEIGHT_PITCH>;
var<workgroup> factors: array<f32, ROWS>;              // of the rows' outputs
var<workgroup> moved: array<u32, 4>;                   // the tile where a maximum moved last; this tile

// A tile's part `i`: behind the end the last token's, numbers that weigh 0.
fn fetch_part(pages: u32, base: u32, end: u32, i: u32) -> Part {
  return fetch(record_of(pages, min(base + i / UNITS, end - 1u)), i % UNITS);
}

// The sum of a score's parts.
fn sum_of(at: u32) -> f32 {
  var sum = 0.0;
  for (var i = 0u; i < SUBGROUPS; i++) {
    sum += scores[at + i * SCORES];
  }
  return sum;
}

// A fragment of outputs times its rows' factors; `side` is the fragment's among the rows, `at` subgroup and lane.
fn rescaled(sums: Sums, side: u32, at: vec2<u32>) -> Sums {
  let scratch = at.x * SCORES;
  coopStoreT(sums, &scores[scratch], U);
  subgroupBarrier();
  for (var i = at.y; i < U * U; i += WIDTH) {
    scores[scratch + i] *= factors[side * U + i / U];
  }
  subgroupBarrier();
  let result = coopLoadT<Sums>(&scores[scratch], U);
  subgroupBarrier(); // the scratch is free
  return result;
}

// Writes a fragment of outputs from column `column` on, times the rows' factors, to the partials of
// rows.x .. rows.x + rows.y - 1.
fn write(sums: Sums, side: u32, column: u32, rows: vec2<u32>, at: vec2<u32>) {
  let scratch = at.x * SCORES;
  coopStoreT(sums, &scores[scratch], U);
  subgroupBarrier();
  for (var i = at.y; i < U * U / 4u; i += WIDTH) {
    let row = side * U + i / (U / 4u);
    if (row < rows.y && column < R) {
      let quad = scratch + 4u * i;
      let values = vec4<f32>(scores[quad], scores[quad + 1u], scores[quad + 2u], scores[quad + 3u]);
      let to = (rows.x + row) * (R / 4u + 1u) + column / 4u + i % (U / 4u);
      partials[to] = output_of(values * factors[row]);
    }
  }
  subgroupBarrier(); // the scratch is free
}

@compute @workgroup_size(INVOCATIONS)
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
  var parts: array<Part, LOADS>;
  for (var i = 0u; i < LOADS; i++) {
    parts[i] = fetch_part(sequence.pages, split.begin, split.end, index + i * INVOCATIONS);
  }

  // The columns behind W stay 0.
  for (var i = index; i < ROWS * STEPS * RUN / 4u; i += INVOCATIONS) {
    let row = i / (STEPS * RUN / 4u);
    let quad = i % (STEPS * RUN / 4u);
    var value = vec4<f32>(0.0);
    if (quad < W / 4u) {
      let query = sequence.first_row * params.heads + min(block_first + row, block_rows - 1u);
      value = query_of(quad, queries[query * (W / 4u) + quad]);
    }
    keep_four(row * PITCH + 4u * quad, vec4<f16>(value));
  }
  workgroupBarrier();
  let mine = subgroup * STEPS * U; // the subgroup's first column
  var q: array<Rows, STEPS * SIDES>;
  for (var step = 0u; step < STEPS; step++) {
    for (var side = 0u; side < SIDES; side++) {
      q[step * SIDES + side] = coopLoadT<Rows>(&tile[side * U * PITCH + mine + step * U], PITCH);
    }
  }
  workgroupBarrier();

  var o: array<Sums, COLUMNS * SIDES>;
  let at = vec2<u32>(subgroup, lane);
  let row = index / 4u; // whose softmax this lane shares with three others; behind ROWS none
  let column = index % 4u;
  let end = min(split.end, sequence.position + min(block_first + row, block_rows - 1u) / params.heads + 1u);
  var maximum = NOTHING;
  var total = 0.0;
  if (index == 0u) { moved[0] = NEVER; }

  for (var base = split.begin; base < split.end; base += TILE) {
    for (var i = 0u; i < LOADS; i++) {
      let part = index + i * INVOCATIONS;
      if (part < TILE * UNITS) {
        stage(part / UNITS * PITCH, part % UNITS, parts[i]);
      }
    }
    workgroupBarrier();
    // On their way while this tile is folded.
    for (var i = 0u; i < LOADS; i++) {
      parts[i] = fetch_part(sequence.pages, base + TILE, split.end, index + i * INVOCATIONS);
    }

    var s: array<Sums, SIDES * SIDES>;
    for (var step = 0u; step < STEPS; step++) {
      for (var tokens = 0u; tokens < SIDES; tokens++) {
        let key = coopLoad<Tokens>(&tile[tokens * U * PITCH + mine + step * U], PITCH);
        for (var side = 0u; side < SIDES; side++) {
          let i = side * SIDES + tokens;
          s[i] = coopMultiplyAdd(q[step * SIDES + side], key, s[i]);
        }
      }
    }
    for (var i = 0u; i < SIDES * SIDES; i++) {
      coopStoreT(s[i], &scores[subgroup * SCORES + (i / SIDES * TILE + i % SIDES) * U], TILE);
    }
    workgroupBarrier();

    if (row < ROWS) {
      let first = row * TILE + 4u * column;
      let t = base + 4u * column;
      let low = vec2<f32>(score(sum_of(first), t, end), score(sum_of(first + 1u), t + 1u, end));
      let high = vec2<f32>(score(sum_of(first + 2u), t + 2u, end), score(sum_of(first + 3u), t + 3u, end));
      let score = vec4<f32>(low, high);
      var largest = max(max(score.x, score.y), max(score.z, score.w));
      largest = max(largest, subgroupShuffleXor(largest, 1u));
      largest = max(largest, subgroupShuffleXor(largest, 2u));
      var factor = 1.0;
      if (largest > maximum + MOST) {
        factor = exp2(maximum - (largest - FRESH));
        maximum = largest - FRESH;
        total *= factor;
        if (column == 0u && base > split.begin) { moved[0] = base; }
      }
      if (column == 0u) { factors[row] = factor; }
      let weight = select(exp2(score - maximum), vec4<f32>(0.0), score <= vec4<f32>(0.5 * NOTHING));
      total += weight.x + weight.y + weight.z + weight.w;
      let to = row * WEIGHT_PITCH + 4u * column;
      weights[to] = f16(weight.x);
      weights[to + 1u] = f16(weight.y);
      weights[to + 2u] = f16(weight.z);
      weights[to + 3u] = f16(weight.w);
    }
    if (index == 0u) { moved[1] = base; }
    workgroupBarrier();

    if (moved[0] == moved[1]) { // rare
      for (var i = 0u; i < COLUMNS * SIDES; i++) {
        o[i] = rescaled(o[i], i % SIDES, at);
      }
    }
    for (var tokens = 0u; tokens < SIDES; tokens++) {
      var w: array<Rows, SIDES>;
      for (var side = 0u; side < SIDES; side++) {
        w[side] = coopLoadT<Rows>(&weights[side * U * WEIGHT_PITCH + tokens * U], WEIGHT_PITCH);
      }
      for (var i = 0u; i < COLUMNS; i++) {
        let value = coopLoadT<Tokens>(&tile[tokens * U * PITCH + (subgroup * COLUMNS + i) * U], PITCH);
        for (var side = 0u; side < SIDES; side++) {
          o[i * SIDES + side] = coopMultiplyAdd(w[side], value, o[i * SIDES + side]);
        }
      }
    }
    workgroupBarrier(); // the tile is free
  }

  total += subgroupShuffleXor(total, 1u);
  total += subgroupShuffleXor(total, 2u);
  let rows = vec2<u32>(split.partial * params.heads + block_first, min(ROWS, block_rows - block_first));
  if (row < ROWS && column == 0u) {
    factors[row] = 1.0 / max(total, 1e-30);
    if (row < rows.y) {
      let lse = select(maximum + log2(total), NOTHING, total <= 0.0); // no number where a weight is none
      partials[(rows.x + row) * (R / 4u + 1u) + R / 4u] = vec4<f32>(lse, 0.0, 0.0, 0.0);
    }
  }
  workgroupBarrier();
  for (var i = 0u; i < COLUMNS * SIDES; i++) {
    write(o[i], i % SIDES, (subgroup * COLUMNS + i / SIDES) * U, rows, at);
  }
}
