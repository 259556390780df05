// As mla_prefill_coop, on matrix units of any size and subgroups of any width, in 32 KiB: each subgroup takes U tokens
// of a head, with queries and outputs in registers, and all share tiles of 16 keys. Loops over fragments have constant
// bounds, so that drivers unroll them.
// Grid: x blocks of ROWS tokens of a sequence, y heads, z spans. Causal by position; with ACCUMULATE
// the result is merged by log-sum-exp with what `output` and `lse` hold of earlier pieces.
// lib: batch, halves, scalar_tile (keep_four).
// Constants: N and P widths of a key's parts, V of a value, multiples of 16; ACCUMULATE; U rows and columns of a
// fragment, WIDTH invocations of a subgroup, SUBGROUPS; Rows, Tokens and Sums, fragments.

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
@group(0) @binding(4) var<storage, read> kv: array<vec4<u32>>;           // [keys, kv_stride / 8]: heads of N + V, f16
@group(0) @binding(5) var<storage, read> k_pe: array<vec4<f32>>;         // [keys, k_pe_stride / 4]: P, turned; anything where P is 0
@group(0) @binding(6) var<storage, read_write> output: array<vec4<f32>>; // [tokens, output_stride / 4]: heads of V
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;          // [tokens, heads], natural logarithm

const INVOCATIONS = SUBGROUPS * WIDTH;
const ROWS = SUBGROUPS * U;
const KEYS = 16u;
const SIDES = KEYS / U;            // fragments of a tile's keys
const STEPS = (N + P) / U;         // of a query
const COLUMNS = V / U;             // of a value
const PITCH = N + V + P + 8u;      // of a tile's row, N of a key, V of a value, P of the rope key: 16 bytes more, for the banks
const WEIGHT_PITCH = KEYS + 8u;
const LANES = min(WIDTH / U, 4u);  // that share a row's softmax
const EACH = KEYS / LANES;         // keys of a lane
const KV_PARTS = (N + V) / 8u;     // of a key and value, 16 bytes each
const KV_LOADS = (KEYS * KV_PARTS + INVOCATIONS - 1u) / INVOCATIONS; // parts that a lane moves of a tile
const PE_PARTS = max(P / 4u, 1u);  // likewise, of a rope key
const PE_LOADS = (KEYS * PE_PARTS + INVOCATIONS - 1u) / INVOCATIONS;
const MOST = 15.0;                 // weights are at most 2^MOST: f16 holds them
const FRESH = 7.0;                 // and 2^FRESH where a maximum has just moved
const NOTHING = -3.0e38;           // a score or log-sum-exp without a key
const LOWEST = -1.0e30;            // below every score
const LN_2 = 0.6931471805599453;
const NEVER = 0xffffffffu;

var<workgroup> tile: array<f16, KEYS * PITCH>;           // at first 16 rows of queries
var<workgroup> scratch: array<f32, ROWS * KEYS>;         // of each subgroup U x KEYS
var<workgroup> weights: array<f16, ROWS * WEIGHT_PITCH>;
var<workgroup> factors: array<vec2<f32>, ROWS>;          // of the rows' outputs, and of what earlier pieces left
var<workgroup> moved: array<u32, 4>;                     // the tile where a maximum moved last; this tile

// What a lane moves of a tile.
struct Parts {
  kv: array<vec4<u32>, KV_LOADS>,
  pe: array<vec4<f32>, PE_LOADS>,
}

// Loads this lane's parts of the tile whose first key stands in row `row`; behind `last` stands the last one's again, a
// number that weighs 0.
fn fetch(row: u32, last: u32, head: u32, lane: u32) -> Parts {
  var p: Parts;
  for (var i = 0u; i < KV_LOADS; i++) {
    let part = lane + i * INVOCATIONS;
    let key = min(row + part / KV_PARTS, last);
    p.kv[i] = kv[(key * params.kv_stride + head * (N + V)) / 8u + part % KV_PARTS];
  }
  for (var i = 0u; i < PE_LOADS && P > 0u; i++) {
    let part = lane + i * INVOCATIONS;
    p.pe[i] = k_pe[min(row + part / PE_PARTS, last) * (params.k_pe_stride / 4u) + part % PE_PARTS];
  }
  return p;
}

fn keep(p: Parts, lane: u32) {
  for (var i = 0u; i < KV_LOADS; i++) {
    let part = lane + i * INVOCATIONS;
    if (part < KEYS * KV_PARTS) {
      let to = part / KV_PARTS * PITCH + 8u * (part % KV_PARTS);
      keep_four(to, halves(p.kv[i].x, p.kv[i].y));
      keep_four(to + 4u, halves(p.kv[i].z, p.kv[i].w));
    }
  }
  for (var i = 0u; i < PE_LOADS && P > 0u; i++) {
    let part = lane + i * INVOCATIONS;
    if (part < KEYS * PE_PARTS) {
      keep_four(part / PE_PARTS * PITCH + N + V + 4u * (part % PE_PARTS), vec4<f16>(p.pe[i]));
    }
  }
}

// A fragment of outputs times its rows' factors. `at` is subgroup and lane.
fn rescaled(sums: Sums, at: vec2<u32>) -> Sums {
  let here = at.x * U * KEYS;
  coopStoreT(sums, &scratch[here], U);
  subgroupBarrier();
  for (var i = at.y; i < U * U; i += WIDTH) {
    scratch[here + i] *= factors[at.x * U + i / U].x;
  }
  subgroupBarrier();
  let result = coopLoadT<Sums>(&scratch[here], U);
  subgroupBarrier(); // the scratch is free
  return result;
}

// Writes a fragment of the outputs of tokens rows.x .. rows.y - 1, from value `to` of the output on, times their
// factors, with what stands there weighed by theirs.
fn leave(sums: Sums, to: u32, rows: vec2<u32>, at: vec2<u32>) {
  let here = at.x * U * KEYS;
  coopStoreT(sums, &scratch[here], U);
  subgroupBarrier();
  for (var i = at.y; i < U * U / 4u; i += WIDTH) {
    let row = i / (U / 4u);
    if (rows.x + row < rows.y) {
      let quad = here + 4u * i;
      let factor = factors[at.x * U + row];
      let value = factor.x * vec4<f32>(scratch[quad], scratch[quad + 1u], scratch[quad + 2u], scratch[quad + 3u]);
      let there = (to + row * params.output_stride) / 4u + i % (U / 4u);
      if (ACCUMULATE && factor.y > 0.0) { // what weighs 0 may be no number
        output[there] = factor.y * output[there] + value;
      } else {
        output[there] = value;
      }
    }
  }
  subgroupBarrier(); // the scratch is free
}

@compute @workgroup_size(INVOCATIONS)
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

  var queries: array<Rows, STEPS>;
  for (var turn = 0u; turn < ROWS / 16u; turn++) {
    for (var i = lane; i < 4u * (N + P); i += INVOCATIONS) {
      let row = i / ((N + P) / 4u);
      let quad = i % ((N + P) / 4u);
      let token = min(first + 16u * turn + row, sequence.tokens - 1u); // rows behind the last token repeat it
      let at = ((sequence.first_row + token) * params.q_stride + head * (N + P)) / 4u + quad;
      let grown = f32((sequence.position + token) / max(params.length, 1u));
      keep_four(row * PITCH + 4u * quad, vec4<f16>(q[at] * (params.scale * (1.0 + params.beta * log(1.0 + grown)))));
    }
    workgroupBarrier();
    // A loop for a condition: naga takes no matrices under one that only a subgroup agrees on.
    for (var mine = turn; mine == subgroup / SIDES; mine = NEVER) {
      for (var i = 0u; i < STEPS; i++) {
        queries[i] = coopLoadT<Rows>(&tile[subgroup % SIDES * U * PITCH + i * U], PITCH);
      }
    }
    workgroupBarrier();
  }

  var o: array<Sums, COLUMNS>;
  let at = vec2<u32>(subgroup, rank);
  let here = subgroup * U * KEYS;                // the subgroup's scratch
  let mine = first + U * subgroup;               // its first token
  let row = min(rank / LANES, U - 1u);           // whose softmax this lane shares with LANES - 1 others
  let shares = rank / LANES < U;                 // or nobody's
  let own = EACH * (rank % LANES);               // the first of its keys
  let position = sequence.position + mine + row;
  var maximum = LOWEST;
  var total = 0.0;
  if (lane == 0u) { moved[0] = NEVER; }

  for (var begin = span.begin; begin < end; begin += KEYS) {
    keep(parts, lane);
    workgroupBarrier();
    // On its way while this tile is folded.
    parts = fetch(span.row + begin + KEYS - span.begin, last, head, lane);
    for (var side = 0u; side < SIDES; side++) {
      var s: Sums;
      for (var i = 0u; i < STEPS; i++) {
        let key = side * U * PITCH + i * U + select(0u, V, i * U >= N);
        s = coopMultiplyAdd(queries[i], coopLoad<Tokens>(&tile[key], PITCH), s);
      }
      coopStoreT(s, &scratch[here + side * U], KEYS);
    }
    subgroupBarrier();
    // A row sees the keys up to its own position.
    var score: array<f32, EACH>;
    var largest = NOTHING;
    for (var i = 0u; i < EACH; i++) {
      let key = begin + own + i;
      score[i] = select(NOTHING, scratch[here + row * KEYS + own + i], key <= position && key < end);
      largest = max(largest, score[i]);
    }
    if (LANES > 1u) { largest = max(largest, subgroupShuffleXor(largest, 1u)); }
    if (LANES > 2u) { largest = max(largest, subgroupShuffleXor(largest, 2u)); }
    var factor = 1.0;
    if (largest > maximum + MOST) {
      factor = exp2(maximum - (largest - FRESH));
      maximum = largest - FRESH;
      total *= factor;
      if (begin > span.begin) { moved[0] = begin; }
    }
    if (shares && own == 0u) { factors[subgroup * U + row] = vec2<f32>(factor, 0.0); }
    for (var i = 0u; i < EACH && shares; i++) {
      let weight = exp2(score[i] - maximum);
      total += weight;
      weights[(subgroup * U + row) * WEIGHT_PITCH + own + i] = f16(weight);
    }
    if (lane == 0u) { moved[1] = begin; }
    workgroupBarrier();
    if (moved[0] == moved[1]) { // rare; of all subgroups, so that drivers see that they agree
      for (var i = 0u; i < COLUMNS; i++) {
        o[i] = rescaled(o[i], at);
      }
    }
    for (var side = 0u; side < SIDES; side++) {
      let w = coopLoadT<Rows>(&weights[subgroup * U * WEIGHT_PITCH + side * U], WEIGHT_PITCH);
      for (var i = 0u; i < COLUMNS; i++) {
        o[i] = coopMultiplyAdd(w, coopLoadT<Tokens>(&tile[side * U * PITCH + N + i * U], PITCH), o[i]);
      }
    }
    workgroupBarrier(); // the tile is free
  }

  if (LANES > 1u) { total += subgroupShuffleXor(total, 1u); }
  if (LANES > 2u) { total += subgroupShuffleXor(total, 2u); }
  let found = total > 0.0;
  let now = select(NOTHING, (maximum + log2(max(total, 1e-30))) * LN_2, found);
  let token = sequence.first_row + mine + row;
  let writes = shares && own == 0u && mine + row < sequence.tokens;
  var factor = vec2<f32>(select(0.0, 1.0 / max(total, 1e-30), found), 0.0);
  var merged = now;
  if (ACCUMULATE && writes) {
    let earlier = max(lse[token * params.heads + head], NOTHING);
    let largest = max(earlier, now);
    let old = select(0.0, exp(earlier - largest), earlier > 0.5 * NOTHING);
    let recent = select(0.0, exp(now - largest), found);
    let sum = max(old + recent, 1e-30);
    factor = vec2<f32>(factor.x * recent, old) / sum;
    merged = select(NOTHING, largest + log(sum), old + recent > 0.0);
  }
  if (writes) {
    lse[token * params.heads + head] = merged;
    factors[subgroup * U + row] = factor;
  }
  subgroupBarrier();
  let to = (sequence.first_row + mine) * params.output_stride + head * V;
  for (var i = 0u; i < COLUMNS; i++) {
    leave(o[i], to + i * U, vec2<u32>(mine, sequence.tokens), at);
  }
}
