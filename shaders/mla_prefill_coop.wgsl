// As mla_prefill, on matrix units: products of f16 fragments of 16 x 16 summed in f32. 8 subgroups of 32 take 16
// tokens each of a head, with queries and outputs in registers, and share tiles of KEYS keys. Arrays of fragments are
// indexed by constants alone, or drivers put them in memory.
// Grid: x blocks of ROWS tokens of a sequence, y heads, z spans. Causal by position; with ACCUMULATE
// the result is merged by log-sum-exp with what `output` and `lse` hold of earlier pieces.
// lib: batch, expanded_f16 (Parts, fetch, keep).
// Constants: N and P widths of a key's parts, V of a value, multiples of 16, N + P and V at most 256; KEYS 16 or 32;
// ACCUMULATE.

struct Params {
  heads: u32,
  q_stride: u32,    // strides count values
  kv_stride: u32,
  k_pe_stride: u32,
  output_stride: u32,
  scale: f32,       // of the scores, times log2(e)
  beta: f32,        // queries grow by 1 + beta ln(1 + floor(position / length))
  length: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;         // [sequences]
@group(0) @binding(2) var<storage, read> spans: array<Span>;             // [spans]
@group(0) @binding(3) var<storage, read> q: array<vec4<f32>>;            // [tokens, q_stride / 4]: heads of N + P, turned
// Neither is written: of what could be, drivers leave loads where they stand, ahead of their use.
@group(0) @binding(4) var<storage, read_write> kv: array<vec4<u32>>;     // [keys, kv_stride / 8]: heads of N + V, f16
@group(0) @binding(5) var<storage, read_write> k_pe: array<vec4<f32>>;   // [keys, k_pe_stride / 4]: P, turned; anything where P is 0
@group(0) @binding(6) var<storage, read_write> output: array<vec4<f32>>; // [tokens, output_stride / 4]: heads of V
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;          // [tokens, heads], natural logarithm

alias Rows = coop_mat16x16<f16, A>;
alias Keys = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

const ROWS = 128u;
const STEPS = (N + P) / 16u;      // fragments of a query
const COLUMNS = V / 16u;          // of a value
const PITCH = (N + V + P) / 4u + 2u; // vec4<f16> of a key's row: 16 bytes more, for the banks
const WEIGHT_PITCH = KEYS / 4u + 2u;
const SCRATCH_PITCH = 5u;         // vec4<f32>
const MOST = 15.0;                // weights are at most 2^MOST: f16 holds them
const FRESH = 7.0;                // and 2^FRESH where a maximum has just moved
const NOTHING = -3.0e38;          // a score or log-sum-exp without a key
const LOWEST = -1.0e30;           // below every score
const LN_2 = 0.6931471805599453;
const NEVER = 0xffffffffu;

var<workgroup> tile: array<vec4<f16>, KEYS * PITCH>; // at first KEYS rows of queries
var<workgroup> scratch: array<vec4<f32>, 128u * SCRATCH_PITCH>;  // a fragment of each subgroup
var<workgroup> weights: array<vec4<f16>, 128u * WEIGHT_PITCH>;   // 16 rows of each subgroup

// Queries' fragments of the rows that stand in the tile from `row` on.
fn query_of(row: u32, step: u32) -> Rows {
  return coopLoadT<Rows>(&tile[row * PITCH + 4u * step], PITCH);
}

fn key_of(key: u32, step: u32) -> Keys {
  return coopLoad<Keys>(&tile[key * PITCH + select(0u, V / 4u, 16u * step >= N) + 4u * step], PITCH);
}

fn value_of(key: u32, column: u32) -> Keys {
  return coopLoadT<Keys>(&tile[key * PITCH + N / 4u + 4u * column], PITCH);
}

fn add(a: Rows, b: Keys, sums: Sums) -> Sums {
  return coopMultiplyAdd(a, b, sums);
}

// A fragment of outputs with a tile's values, of weights for 16 keys each.
fn folded(w0: Rows, w1: Rows, column: u32, sums: Sums) -> Sums {
  var all = add(w0, value_of(0u, column), sums);
  if (KEYS == 32u) { all = add(w1, value_of(16u, column), all); }
  return all;
}

// What a lane sees of a fragment of 16 rows x 16 columns: four columns of rows lane / 4 and lane / 4 + 8. `at` is
// where its subgroup's scratch starts, and the lane.
fn seen_of(sums: Sums, at: vec2<u32>) -> array<vec4<f32>, 2> {
  coopStoreT(sums, &scratch[at.x], SCRATCH_PITCH);
  subgroupBarrier();
  let here = at.x + at.y / 4u * SCRATCH_PITCH + at.y % 4u;
  let result = array<vec4<f32>, 2>(scratch[here], scratch[here + 8u * SCRATCH_PITCH]);
  subgroupBarrier(); // the scratch is free
  return result;
}

// A fragment of outputs times its rows' factors.
fn rescaled(sums: Sums, factors: vec2<f32>, at: vec2<u32>) -> Sums {
  coopStoreT(sums, &scratch[at.x], SCRATCH_PITCH);
  subgroupBarrier();
  let here = at.x + at.y / 4u * SCRATCH_PITCH + at.y % 4u;
  scratch[here] *= factors.x;
  scratch[here + 8u * SCRATCH_PITCH] *= factors.y;
  subgroupBarrier();
  let result = coopLoadT<Sums>(&scratch[at.x], SCRATCH_PITCH);
  subgroupBarrier(); // the scratch is free
  return result;
}

// A row sees the keys up to its own position.
fn masked(score: vec4<f32>, key: u32, position: u32, end: u32) -> vec4<f32> {
  let keys = vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u);
  return select(vec4<f32>(NOTHING), score, (keys <= vec4<u32>(position)) & (keys < vec4<u32>(end)));
}

// Writes a row's four outputs, with what stands there weighed by `before`.
fn put(exists: bool, to: u32, value: vec4<f32>, before: f32) {
  if (exists) {
    if (ACCUMULATE && before > 0.0) { // what weighs 0 may be no number
      output[to] = before * output[to] + value;
    } else {
      output[to] = value;
    }
  }
}

// Writes a fragment of outputs, times its rows' factors.
fn leave(sums: Sums, column: u32, exists: vec2<bool>, to: vec2<u32>, factors: vec2<f32>, before: vec2<f32>, at: vec2<u32>) {
  let seen = seen_of(sums, at);
  put(exists.x, to.x + 4u * column, seen[0] * factors.x, before.x);
  put(exists.y, to.y + 4u * column, seen[1] * factors.y, before.y);
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) block: vec3<u32>,
  @builtin(num_workgroups) blocks: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) rank: u32,
) {
  let head = block.y;
  let span = spans[block.z];
  let sequence = batch[span.sequence];
  // Of the sequence's new tokens. The last see the most keys: they start first.
  let first = (blocks.x - 1u - block.x) * ROWS;
  if (first >= sequence.tokens) {
    return;
  }
  // Keys behind the block's last token are seen by none of its rows.
  let end = min(span.end, sequence.position + min(first + ROWS, sequence.tokens));
  let last = span.row + max(end, span.begin + 1u) - 1u - span.begin;
  var parts = fetch(span.row, last, head, lane);

  var queries: array<Rows, 16>;
  for (var turn = 0u; turn < ROWS / KEYS; turn++) {
    for (var i = lane; i < KEYS * (N + P) / 4u; i += 256u) {
      let row = i / ((N + P) / 4u);
      let quad = i % ((N + P) / 4u);
      let token = min(first + KEYS * turn + row, sequence.tokens - 1u); // rows behind the last token repeat it
      let at = ((sequence.first_row + token) * params.q_stride + head * (N + P)) / 4u + quad;
      let grown = f32((sequence.position + token) / max(params.length, 1u));
      tile[row * PITCH + quad] = vec4<f16>(q[at] * (params.scale * (1.0 + params.beta * log(1.0 + grown))));
    }
    workgroupBarrier();
    // Loops for conditions: naga takes no matrices under one that only a subgroup agrees on.
    for (var mine = turn; mine == subgroup / (KEYS / 16u); mine = NEVER) {
      let row = subgroup % (KEYS / 16u) * 16u;
      queries[0] = query_of(row, 0u); if (STEPS > 1u) { queries[1] = query_of(row, 1u); }
      if (STEPS > 2u) { queries[2] = query_of(row, 2u); } if (STEPS > 3u) { queries[3] = query_of(row, 3u); }
      if (STEPS > 4u) { queries[4] = query_of(row, 4u); } if (STEPS > 5u) { queries[5] = query_of(row, 5u); }
      if (STEPS > 6u) { queries[6] = query_of(row, 6u); } if (STEPS > 7u) { queries[7] = query_of(row, 7u); }
      if (STEPS > 8u) { queries[8] = query_of(row, 8u); } if (STEPS > 9u) { queries[9] = query_of(row, 9u); }
      if (STEPS > 10u) { queries[10] = query_of(row, 10u); } if (STEPS > 11u) { queries[11] = query_of(row, 11u); }
      if (STEPS > 12u) { queries[12] = query_of(row, 12u); } if (STEPS > 13u) { queries[13] = query_of(row, 13u); }
      if (STEPS > 14u) { queries[14] = query_of(row, 14u); } if (STEPS > 15u) { queries[15] = query_of(row, 15u); }
    }
    workgroupBarrier();
  }

  var o: array<Sums, 16>;
  let at = vec2<u32>(subgroup * 16u * SCRATCH_PITCH, rank);
  let mine = first + 16u * subgroup;                          // the subgroup's first token
  let rows = vec2<u32>(mine + rank / 4u, mine + rank / 4u + 8u); // whose softmax this lane shares with three others
  let positions = vec2<u32>(sequence.position) + rows;
  let sees = min(end, sequence.position + mine + 16u);        // what keys the subgroup needs
  let quad = rank % 4u;
  let weight_row = 16u * subgroup * WEIGHT_PITCH;
  let all_see = min(end, sequence.position + mine + 1u);      // and which all of its rows see
  var maximum = vec2<f32>(LOWEST);
  var total = vec2<f32>(0.0);

  for (var begin = span.begin; begin < end; begin += KEYS) {
    keep(parts, lane);
    workgroupBarrier();
    // On its way while this tile is folded.
    parts = fetch(span.row + begin + KEYS - span.begin, last, head, lane);
    for (var key = begin; key < sees; key = NEVER) {
      var s: array<Sums, 2>;
      { s[0] = add(queries[0], key_of(0u, 0u), s[0]); if (KEYS == 32u) { s[1] = add(queries[0], key_of(16u, 0u), s[1]); } }
      if (STEPS > 1u) { s[0] = add(queries[1], key_of(0u, 1u), s[0]); if (KEYS == 32u) { s[1] = add(queries[1], key_of(16u, 1u), s[1]); } }
      if (STEPS > 2u) { s[0] = add(queries[2], key_of(0u, 2u), s[0]); if (KEYS == 32u) { s[1] = add(queries[2], key_of(16u, 2u), s[1]); } }
      if (STEPS > 3u) { s[0] = add(queries[3], key_of(0u, 3u), s[0]); if (KEYS == 32u) { s[1] = add(queries[3], key_of(16u, 3u), s[1]); } }
      if (STEPS > 4u) { s[0] = add(queries[4], key_of(0u, 4u), s[0]); if (KEYS == 32u) { s[1] = add(queries[4], key_of(16u, 4u), s[1]); } }
      if (STEPS > 5u) { s[0] = add(queries[5], key_of(0u, 5u), s[0]); if (KEYS == 32u) { s[1] = add(queries[5], key_of(16u, 5u), s[1]); } }
      if (STEPS > 6u) { s[0] = add(queries[6], key_of(0u, 6u), s[0]); if (KEYS == 32u) { s[1] = add(queries[6], key_of(16u, 6u), s[1]); } }
      if (STEPS > 7u) { s[0] = add(queries[7], key_of(0u, 7u), s[0]); if (KEYS == 32u) { s[1] = add(queries[7], key_of(16u, 7u), s[1]); } }
      if (STEPS > 8u) { s[0] = add(queries[8], key_of(0u, 8u), s[0]); if (KEYS == 32u) { s[1] = add(queries[8], key_of(16u, 8u), s[1]); } }
      if (STEPS > 9u) { s[0] = add(queries[9], key_of(0u, 9u), s[0]); if (KEYS == 32u) { s[1] = add(queries[9], key_of(16u, 9u), s[1]); } }
      if (STEPS > 10u) { s[0] = add(queries[10], key_of(0u, 10u), s[0]); if (KEYS == 32u) { s[1] = add(queries[10], key_of(16u, 10u), s[1]); } }
      if (STEPS > 11u) { s[0] = add(queries[11], key_of(0u, 11u), s[0]); if (KEYS == 32u) { s[1] = add(queries[11], key_of(16u, 11u), s[1]); } }
      if (STEPS > 12u) { s[0] = add(queries[12], key_of(0u, 12u), s[0]); if (KEYS == 32u) { s[1] = add(queries[12], key_of(16u, 12u), s[1]); } }
      if (STEPS > 13u) { s[0] = add(queries[13], key_of(0u, 13u), s[0]); if (KEYS == 32u) { s[1] = add(queries[13], key_of(16u, 13u), s[1]); } }
      if (STEPS > 14u) { s[0] = add(queries[14], key_of(0u, 14u), s[0]); if (KEYS == 32u) { s[1] = add(queries[14], key_of(16u, 14u), s[1]); } }
      if (STEPS > 15u) { s[0] = add(queries[15], key_of(0u, 15u), s[0]); if (KEYS == 32u) { s[1] = add(queries[15], key_of(16u, 15u), s[1]); } }
      let low = seen_of(s[0], at);
      var low0 = low[0];
      var low1 = low[1];
      var high0 = vec4<f32>(NOTHING);
      var high1 = vec4<f32>(NOTHING);
      if (KEYS == 32u) {
        let high = seen_of(s[1], at);
        high0 = high[0];
        high1 = high[1];
      }
      if (key + KEYS > all_see) {
        low0 = masked(low0, key + 4u * quad, positions.x, end);
        low1 = masked(low1, key + 4u * quad, positions.y, end);
        high0 = masked(high0, key + 16u + 4u * quad, positions.x, end);
        high1 = masked(high1, key + 16u + 4u * quad, positions.y, end);
      }
      // Of what this lane has; the row's other lanes are asked where it matters.
      let most0 = max(low0, high0);
      let most1 = max(low1, high1);
      var largest = vec2<f32>(max(max(most0.x, most0.y), max(most0.z, most0.w)), max(max(most1.x, most1.y), max(most1.z, most1.w)));
      for (var rare = subgroupAny(any(largest > maximum + vec2<f32>(MOST))); rare; rare = false) {
        largest = max(largest, subgroupShuffleXor(largest, 1u));
        largest = max(largest, subgroupShuffleXor(largest, 2u));
        let moves = largest > maximum + vec2<f32>(MOST);
        let next = select(maximum, largest - vec2<f32>(FRESH), moves);
        let factors = select(vec2<f32>(1.0), exp2(maximum - next), moves);
        maximum = next;
        total *= factors;
        o[0] = rescaled(o[0], factors, at); if (COLUMNS > 1u) { o[1] = rescaled(o[1], factors, at); }
        if (COLUMNS > 2u) { o[2] = rescaled(o[2], factors, at); } if (COLUMNS > 3u) { o[3] = rescaled(o[3], factors, at); }
        if (COLUMNS > 4u) { o[4] = rescaled(o[4], factors, at); } if (COLUMNS > 5u) { o[5] = rescaled(o[5], factors, at); }
        if (COLUMNS > 6u) { o[6] = rescaled(o[6], factors, at); } if (COLUMNS > 7u) { o[7] = rescaled(o[7], factors, at); }
        if (COLUMNS > 8u) { o[8] = rescaled(o[8], factors, at); } if (COLUMNS > 9u) { o[9] = rescaled(o[9], factors, at); }
        if (COLUMNS > 10u) { o[10] = rescaled(o[10], factors, at); } if (COLUMNS > 11u) { o[11] = rescaled(o[11], factors, at); }
        if (COLUMNS > 12u) { o[12] = rescaled(o[12], factors, at); } if (COLUMNS > 13u) { o[13] = rescaled(o[13], factors, at); }
        if (COLUMNS > 14u) { o[14] = rescaled(o[14], factors, at); } if (COLUMNS > 15u) { o[15] = rescaled(o[15], factors, at); }
      }
      low0 = exp2(low0 - maximum.x); low1 = exp2(low1 - maximum.y);
      high0 = exp2(high0 - maximum.x); high1 = exp2(high1 - maximum.y);
      let sum0 = low0 + high0;
      let sum1 = low1 + high1;
      total += vec2<f32>(sum0.x + sum0.y + sum0.z + sum0.w, sum1.x + sum1.y + sum1.z + sum1.w);
      let to = weight_row + rank / 4u * WEIGHT_PITCH + quad;
      weights[to] = vec4<f16>(low0); weights[to + 8u * WEIGHT_PITCH] = vec4<f16>(low1);
      if (KEYS == 32u) { weights[to + 4u] = vec4<f16>(high0); weights[to + 8u * WEIGHT_PITCH + 4u] = vec4<f16>(high1); }
      subgroupBarrier();
      let w0 = coopLoadT<Rows>(&weights[weight_row], WEIGHT_PITCH);
      let w1 = coopLoadT<Rows>(&weights[weight_row + select(0u, 4u, KEYS == 32u)], WEIGHT_PITCH); // of keys 16 to 31
      o[0] = folded(w0, w1, 0u, o[0]); if (COLUMNS > 1u) { o[1] = folded(w0, w1, 1u, o[1]); }
      if (COLUMNS > 2u) { o[2] = folded(w0, w1, 2u, o[2]); } if (COLUMNS > 3u) { o[3] = folded(w0, w1, 3u, o[3]); }
      if (COLUMNS > 4u) { o[4] = folded(w0, w1, 4u, o[4]); } if (COLUMNS > 5u) { o[5] = folded(w0, w1, 5u, o[5]); }
      if (COLUMNS > 6u) { o[6] = folded(w0, w1, 6u, o[6]); } if (COLUMNS > 7u) { o[7] = folded(w0, w1, 7u, o[7]); }
      if (COLUMNS > 8u) { o[8] = folded(w0, w1, 8u, o[8]); } if (COLUMNS > 9u) { o[9] = folded(w0, w1, 9u, o[9]); }
      if (COLUMNS > 10u) { o[10] = folded(w0, w1, 10u, o[10]); } if (COLUMNS > 11u) { o[11] = folded(w0, w1, 11u, o[11]); }
      if (COLUMNS > 12u) { o[12] = folded(w0, w1, 12u, o[12]); } if (COLUMNS > 13u) { o[13] = folded(w0, w1, 13u, o[13]); }
      if (COLUMNS > 14u) { o[14] = folded(w0, w1, 14u, o[14]); } if (COLUMNS > 15u) { o[15] = folded(w0, w1, 15u, o[15]); }
    }
    workgroupBarrier(); // the tile is free
  }

  total += vec2<f32>(subgroupShuffleXor(total.x, 1u), subgroupShuffleXor(total.y, 1u));
  total += vec2<f32>(subgroupShuffleXor(total.x, 2u), subgroupShuffleXor(total.y, 2u));
  let found = total > vec2<f32>(0.0);
  let here = select(vec2<f32>(NOTHING), (maximum + log2(max(total, vec2<f32>(1e-30)))) * LN_2, found);
  var factors = select(vec2<f32>(0.0), 1.0 / max(total, vec2<f32>(1e-30)), found);
  let exists = rows < vec2<u32>(sequence.tokens);
  let tokens = vec2<u32>(sequence.first_row) + rows;
  var before = vec2<f32>(0.0); // the earlier pieces' weight
  var merged = here;
  if (ACCUMULATE) {
    var earlier = vec2<f32>(NOTHING);
    if (exists.x) { earlier.x = max(lse[tokens.x * params.heads + head], NOTHING); }
    if (exists.y) { earlier.y = max(lse[tokens.y * params.heads + head], NOTHING); }
    let largest = max(earlier, here);
    let old = select(vec2<f32>(0.0), exp(earlier - largest), earlier > vec2<f32>(0.5 * NOTHING));
    let recent = select(vec2<f32>(0.0), exp(here - largest), found);
    let sum = max(old + recent, vec2<f32>(1e-30));
    before = old / sum;
    factors *= recent / sum;
    merged = select(vec2<f32>(NOTHING), largest + log(sum), old + recent > vec2<f32>(0.0));
    subgroupBarrier(); // every lane has read the earlier lse
  }
  if (quad == 0u && exists.x) { lse[tokens.x * params.heads + head] = merged.x; }
  if (quad == 0u && exists.y) { lse[tokens.y * params.heads + head] = merged.y; }
  let to = (tokens * params.output_stride + vec2<u32>(head * V)) / 4u + vec2<u32>(quad);
  leave(o[0], 0u, exists, to, factors, before, at); if (COLUMNS > 1u) { leave(o[1], 1u, exists, to, factors, before, at); }
  if (COLUMNS > 2u) { leave(o[2], 2u, exists, to, factors, before, at); } if (COLUMNS > 3u) { leave(o[3], 3u, exists, to, factors, before, at); }
  if (COLUMNS > 4u) { leave(o[4], 4u, exists, to, factors, before, at); } if (COLUMNS > 5u) { leave(o[5], 5u, exists, to, factors, before, at); }
  if (COLUMNS > 6u) { leave(o[6], 6u, exists, to, factors, before, at); } if (COLUMNS > 7u) { leave(o[7], 7u, exists, to, factors, before, at); }
  if (COLUMNS > 8u) { leave(o[8], 8u, exists, to, factors, before, at); } if (COLUMNS > 9u) { leave(o[9], 9u, exists, to, factors, before, at); }
  if (COLUMNS > 10u) { leave(o[10], 10u, exists, to, factors, before, at); } if (COLUMNS > 11u) { leave(o[11], 11u, exists, to, factors, before, at); }
  if (COLUMNS > 12u) { leave(o[12], 12u, exists, to, factors, before, at); } if (COLUMNS > 13u) { leave(o[13], 13u, exists, to, factors, before, at); }
  if (COLUMNS > 14u) { leave(o[14], 14u, exists, to, factors, before, at); } if (COLUMNS > 15u) { leave(o[15], 15u, exists, to, factors, before, at); }
}
