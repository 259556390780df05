// Attention of a block of ROWS query rows over a run of tokens of one sequence, by online softmax in
// base 2: scores against whole records, values from their first R columns. Each record is read from
// memory once, into a tile, for all rows.
// The kernel gives `query(row, quad)`, values 4 quad .. 4 quad + 3 of a row of the block, and
// `end_of(row)`, one past the last token that it sees; and binds `cache`.
// lib: rows_* (record_of), score_* (score, NOTHING), cache_* (UNITS, stage, quad_of), transpose8_* (transpose8).
// Constants: ROWS a multiple of 4, TILE tokens a multiple of 4, WORKGROUP, R, W, SCRATCH.

const QUADS = W / 4u;                                       // vec4 of a record
const PAIRS = ROWS / 2u;                                    // of rows
const LANES = min(WORKGROUP / PAIRS, QUADS + 7u) / 8u * 8u; // that share a record's quads for a pair of rows
const STEPS = (QUADS + LANES - 1u) / LANES;
const PIECES = LANES / 8u;                                  // of a product
const LOADS = (TILE * UNITS + WORKGROUP - 1u) / WORKGROUP;  // units that a lane loads of a tile
const COLUMNS = R / 4u;                                     // vec4 of a value
const PASSES = (COLUMNS + WORKGROUP - 1u) / WORKGROUP;
const COLUMN_LANES = (COLUMNS + PASSES - 1u) / PASSES;      // a lane folds every COLUMN_LANES-th vec4 ...
const BANDS = min(WORKGROUP / COLUMN_LANES, PAIRS);
const BAND = (PAIRS + BANDS - 1u) / BANDS;                  // ... of BAND pairs of rows
const WIDE = BAND % 2u == 0u;                               // the weights of two pairs are one load
const MARGIN = 8.0;                                         // by which scores may pass the kept maximum

var<workgroup> scratch: array<f32, SCRATCH>;                  // of transpose8_*; the kernel's outside of `fold`
var<workgroup> fold_pieces: array<f32, ROWS * TILE * PIECES>; // [ROWS, TILE, PIECES]; at last the totals, [ROWS, 4]
var<workgroup> fold_weights: array<vec4<f32>, TILE * PAIRS / 2u>; // [TILE, PAIRS / 2]
var<workgroup> fold_scales: array<vec2<f32>, PAIRS>;          // at last the maxima
var<workgroup> fold_moved: vec4<u32>;                         // x: the tile where a maximum moved last

var<private> fold_query0: array<vec4<f32>, STEPS>;            // this lane's quads of its pair of rows
var<private> fold_query1: array<vec4<f32>, STEPS>;
var<private> fold_next: array<vec4<u32>, LOADS>;              // this lane's units of the next tile
var<private> fold_maximum: vec2<f32>;                         // of a pair of rows
var<private> fold_total: vec2<f32>;                           // of their weights of every fourth token
var<private> folded: array<vec4<f32>, 2u * PASSES * BAND>;    // outputs times totals: [PASSES, BAND] pairs of rows

// Loads a tile's units to registers: they follow each other, since a page has whole tiles. Behind the end stands
// the first record again, which weighs 0 there. Not under a condition: drivers wait for loads where branches meet.
fn fetch(pages: u32, base: u32, end: u32, lane: u32) {
  let token = min(base, end - 1u);
  let first = record_of(pages, token) * UNITS;
  for (var i = 0u; i < LOADS; i++) {
    let unit = lane + i * WORKGROUP;
    fold_next[i] = cache[first + select(unit % UNITS, unit, unit < min(end - token, TILE) * UNITS)];
  }
}

fn add_dot(sum: f32, a: vec4<f32>, b: vec4<f32>) -> f32 {
  return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

// Four sums, and the products of a row with four tokens' keys: `dot` would add each apart.
fn add_dots(s: vec4<f32>, a: vec4<f32>, k0: vec4<f32>, k1: vec4<f32>, k2: vec4<f32>, k3: vec4<f32>) -> vec4<f32> {
  return vec4<f32>(add_dot(s.x, a, k0), add_dot(s.y, a, k1), add_dot(s.z, a, k2), add_dot(s.w, a, k3));
}

// The products of a pair of rows with four tokens of the tile, in pieces.
fn products(part: u32, pair: u32, lane: u32) {
  var low = vec4<f32>(0.0);
  var high = vec4<f32>(0.0);
  for (var i = 0u; i < STEPS; i++) {
    let quad = min(lane % LANES + i * LANES, QUADS - 1u); // behind the last the query is 0
    let key0 = quad_of(part, quad);
    let key1 = quad_of(part + 1u, quad);
    let key2 = quad_of(part + 2u, quad);
    let key3 = quad_of(part + 3u, quad);
    let a = fold_query0[i];
    let b = fold_query1[i];
    low = add_dots(low, a, key0, key1, key2, key3);
    high = add_dots(high, b, key0, key1, key2, key3);
  }
  let sum = transpose8(low, high, lane);
  if (lane < PAIRS * LANES) {
    let row = 2u * pair + lane / 4u % 2u;
    fold_pieces[(row * TILE + part + lane % 4u) * PIECES + lane % LANES / 8u] = sum;
  }
}

// The scores of a pair of rows with a token of the tile.
fn scores_of(pair: u32, place: u32, token: u32, ends: vec2<u32>) -> vec2<f32> {
  var sum = vec2<f32>(0.0);
  let at = (2u * pair * TILE + place) * PIECES;
  for (var i = 0u; i < PIECES; i++) {
    sum += vec2<f32>(fold_pieces[at + i], fold_pieces[at + TILE * PIECES + i]);
  }
  return vec2<f32>(score(sum.x, token, ends.x), score(sum.y, token, ends.y));
}

// Lanes [0, 4 PAIRS): four for a pair of rows, which know the same maxima and each weigh every
// fourth token. The maximum moves only when a score passes it by the margin: few tiles rescale.
fn softmax(base: u32, ends: vec2<u32>, lane: u32) {
  let pair = lane / 4u;
  var largest = vec2<f32>(NOTHING);
  var own: array<vec2<f32>, TILE / 4u>;
  for (var t = 0u; t < TILE; t++) {
    let scores = scores_of(pair, t, base + t, ends);
    largest = max(largest, scores);
    own[t / 4u] = select(own[t / 4u], scores, t % 4u == lane % 4u);
  }
  let moved = largest > fold_maximum + MARGIN;
  let scale = select(vec2<f32>(1.0), exp2(fold_maximum - largest), moved);
  fold_maximum = select(fold_maximum, largest, moved);
  fold_total *= scale;
  if (lane % 4u == 0u) {
    fold_scales[pair] = scale;
    if (moved.x || moved.y) {
      fold_moved.x = base;
    }
  }
  for (var i = 0u; i < TILE / 4u; i++) {
    let t = lane % 4u + 4u * i;
    let scores = own[i];
    // What is no number weighs as such, so that a broken model is seen.
    let weight = select(exp2(scores - fold_maximum), vec2<f32>(0.0), scores <= vec2<f32>(0.5 * NOTHING));
    fold_total += weight;
    let at = (t * PAIRS + pair) / 2u;
    let k = 2u * (pair % 2u);
    fold_weights[at][k] = weight.x;
    fold_weights[at][k + 1u] = weight.y;
  }
}

fn add_value(pair: u32, weight: vec2<f32>, value: vec4<f32>) {
  folded[2u * pair] += weight.x * value;
  folded[2u * pair + 1u] += weight.y * value;
}

// Adds the tile's values, weighed.
fn values(base: u32, band: u32, lane: u32) {
  if (fold_moved.x == base) { // rare
    for (var i = 0u; i < BAND; i++) {
      let scale = fold_scales[min(band * BAND + i, PAIRS - 1u)];
      for (var turn = 0u; turn < PASSES; turn++) {
        folded[2u * (turn * BAND + i)] *= scale.x;
        folded[2u * (turn * BAND + i) + 1u] *= scale.y;
      }
    }
  }
  for (var t = 0u; t < TILE; t++) {
    for (var turn = 0u; turn < PASSES; turn++) {
      let value = quad_of(t, min(lane % COLUMN_LANES + turn * COLUMN_LANES, COLUMNS - 1u));
      if (WIDE) {
        for (var i = 0u; i < BAND; i += 2u) {
          let weight = fold_weights[(t * PAIRS + min(band * BAND + i, PAIRS - 2u)) / 2u];
          add_value(turn * BAND + i, weight.xy, value);
          add_value(turn * BAND + i + 1u, weight.zw, value);
        }
      } else {
        for (var i = 0u; i < BAND; i++) {
          let at = t * PAIRS + min(band * BAND + i, PAIRS - 1u);
          let weight = fold_weights[at / 2u];
          add_value(turn * BAND + i, select(weight.xy, weight.zw, at % 2u == 1u), value);
        }
      }
    }
  }
}

// Folds tokens [begin, end) of the sequence whose block table starts at `pages`.
fn fold(pages: u32, begin: u32, end: u32, lane: u32) {
  let pair = min(lane / LANES, PAIRS - 1u);
  for (var i = 0u; i < STEPS; i++) {
    let quad = lane % LANES + i * LANES;
    fold_query0[i] = vec4<f32>(0.0);
    fold_query1[i] = vec4<f32>(0.0);
    if (quad < QUADS) {
      fold_query0[i] = query(2u * pair, quad);
      fold_query1[i] = query(2u * pair + 1u, quad);
    }
  }
  let weighed = lane / 4u % PAIRS; // the pair whose softmax this lane shares
  let ends = vec2<u32>(end_of(2u * weighed), end_of(2u * weighed + 1u));
  fold_maximum = vec2<f32>(NOTHING);
  fold_total = vec2<f32>(0.0);
  for (var i = 0u; i < 2u * PASSES * BAND; i++) {
    folded[i] = vec4<f32>(0.0);
  }

  if (lane == 0u) {
    fold_moved.x = 0xffffffffu;
  }
  fetch(pages, begin, end, lane);
  for (var base = begin; base < end; base += TILE) {
    workgroupBarrier(); // nobody reads the last tile any more
    for (var i = 0u; i < LOADS; i++) {
      let unit = lane + i * WORKGROUP;
      if (unit < TILE * UNITS) {
        stage(unit / UNITS, unit % UNITS, fold_next[i]);
      }
    }
    workgroupBarrier();
    fetch(pages, base + TILE, end, lane); // on its way while this tile is folded
    for (var part = 0u; part < TILE; part += 4u) {
      products(part, pair, lane);
    }
    workgroupBarrier();
    if (lane < 4u * PAIRS) {
      softmax(base, ends, lane);
    }
    workgroupBarrier();
    values(base, lane / COLUMN_LANES, lane);
  }

  workgroupBarrier(); // nobody reads pieces and scales any more
  if (lane < 4u * PAIRS) {
    fold_pieces[8u * weighed + lane % 4u] = fold_total.x;
    fold_pieces[8u * weighed + 4u + lane % 4u] = fold_total.y;
    if (lane % 4u == 0u) {
      fold_scales[weighed] = fold_maximum;
    }
  }
  workgroupBarrier();
}

// After `fold`: the sum of a row's weights.
fn total_of(row: u32) -> f32 {
  return fold_pieces[4u * row] + fold_pieces[4u * row + 1u] + fold_pieces[4u * row + 2u] + fold_pieces[4u * row + 3u];
}

// After `fold`: a row's log-sum-exp in base 2.
fn lse_of(row: u32) -> f32 {
  let total = total_of(row);
  return select(fold_scales[row / 2u][row % 2u] + log2(total), NOTHING, total <= 0.0);
}
