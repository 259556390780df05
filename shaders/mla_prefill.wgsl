// Attention of new tokens over keys and values that were expanded from latents: one piece of the context.
// Grid: x blocks of ROWS tokens of a sequence, y heads, z spans. Causal by position; with ACCUMULATE
// the result is merged by log-sum-exp with what `output` and `lse` hold of earlier pieces.
// lib: batch.
// Constants: N and P widths of a key's parts, V of a value, ACCUMULATE.

struct Params {
  heads: u32,
  q_stride: u32,    // strides count f32
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
@group(0) @binding(3) var<storage, read> q: array<vec2<f32>>;            // [tokens, q_stride / 2]: heads of N + P, turned
@group(0) @binding(4) var<storage, read> kv: array<vec4<f32>>;           // [keys, kv_stride / 4]: heads of N + V
@group(0) @binding(5) var<storage, read> k_pe: array<vec4<f32>>;         // [keys, k_pe_stride / 4]: P, turned; anything where P is 0
@group(0) @binding(6) var<storage, read_write> output: array<vec4<f32>>; // [tokens, output_stride / 4]: heads of V
@group(0) @binding(7) var<storage, read_write> lse: array<f32>;          // [tokens, heads], natural logarithm

// 256 invocations are 16 groups of four rows by 16 lanes. A lane scores its group's rows against two
// keys, and folds its group's rows of every sixteenth vec4 of the values.
const WORKGROUP = 256u;
const GROUPS = 16u;
const LANES = 16u;
const ROWS = 4u * GROUPS;
const KEYS = 2u * LANES;
const QUADS = (N + P + 3u) / 4u;      // vec4 of a query or key
const STAGED = 4u;                    // of them at a time
const STAGES = (QUADS + STAGED - 1u) / STAGED;
const COLUMNS = V / 4u;               // vec4 of a value
const PASSES = (COLUMNS + LANES - 1u) / LANES;
const NOTHING = -3.0e38;              // a score or log-sum-exp without a key
const LN_2 = 0.6931471805599453;

var<workgroup> staged_q: array<vec4<f32>, STAGED * ROWS>; // [STAGED, ROWS]; between stages the groups' maxima
var<workgroup> staged_k: array<vec4<f32>, STAGED * KEYS>; // [STAGED, KEYS]
var<workgroup> weights: array<vec4<f32>, KEYS * GROUPS>;  // [KEYS, GROUPS], a component for each of the four rows

fn load_q(start: u32, quad: u32) -> vec4<f32> {
  var value = vec4<f32>(0.0);
  if (quad < QUADS) {
    let at = start / 2u + 2u * quad;
    // The last quad's second half may be another head's, or padding: then the first stands there
    // again, a number that meets the key's zeros.
    let second = 4u * quad + 2u < N + P;
    value = vec4<f32>(q[at], q[at + u32(second)]);
  }
  return value;
}

fn load_k(row: u32, head: u32, quad: u32, exists: bool) -> vec4<f32> {
  var value = vec4<f32>(0.0);
  if (exists && quad < N / 4u) {
    value = kv[(row * params.kv_stride + head * (N + V)) / 4u + quad];
  } else if (exists && quad < QUADS) {
    let own = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(N + P);
    value = select(vec4<f32>(0.0), k_pe[row * params.k_pe_stride / 4u + quad - N / 4u], own);
  }
  return value;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) block: vec3<u32>, @builtin(num_workgroups) blocks: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let head = block.y;
  let span = spans[block.z];
  let sequence = batch[span.sequence];
  // Of the sequence's new tokens. The last see the most keys: they start first.
  let first = (blocks.x - 1u - block.x) * ROWS;
  if (first >= sequence.tokens) {
    return;
  }
  let group = lane / LANES;
  let column = lane % LANES;
  // Keys behind the block's last token are seen by none of its rows.
  let end = min(span.end, sequence.position + min(first + ROWS, sequence.tokens));
  // The positions of the group's rows, and the factors of their scores.
  let rows = vec4<u32>(sequence.position + first + 4u * group) + vec4<u32>(0u, 1u, 2u, 3u);
  let steps = vec4<f32>(rows / vec4<u32>(max(params.length, 1u)));
  let scale = params.scale * (1.0 + params.beta * log(1.0 + steps));

  // What this lane stages: rows behind the last token repeat it.
  let stage_row = sequence.first_row + min(first + lane / STAGED, sequence.tokens - 1u);
  let q_start = stage_row * params.q_stride + head * (N + P);
  let stage_key = lane / STAGED % KEYS;
  let stage_quad = lane % STAGED;

  var maximum = vec4<f32>(NOTHING);
  var total = vec4<f32>(0.0);
  var out0: array<vec4<f32>, PASSES>;
  var out1: array<vec4<f32>, PASSES>;
  var out2: array<vec4<f32>, PASSES>;
  var out3: array<vec4<f32>, PASSES>;
  for (var k = 0u; k < PASSES; k++) {
    out0[k] = vec4<f32>(0.0);
    out1[k] = vec4<f32>(0.0);
    out2[k] = vec4<f32>(0.0);
    out3[k] = vec4<f32>(0.0);
  }

  for (var begin = span.begin; begin < end; begin += KEYS) {
    let row = span.row + begin - span.begin; // of the tile's first key in kv
    let exists = begin + stage_key < end;
    var score0 = vec4<f32>(0.0);
    var score1 = vec4<f32>(0.0);
    var next_q = load_q(q_start, stage_quad);
    var next_k = load_k(row + stage_key, head, stage_quad, exists);
    for (var stage = 0u; stage < STAGES; stage++) {
      workgroupBarrier(); // the tiles' last readers are done
      staged_q[stage_quad * ROWS + lane / STAGED] = next_q;
      if (lane < STAGED * KEYS) {
        staged_k[stage_quad * KEYS + stage_key] = next_k;
      }
      workgroupBarrier();
      // The next stage's loads are under way while this one is folded.
      let quad = (stage + 1u) * STAGED + stage_quad;
      next_q = load_q(q_start, quad);
      next_k = load_k(row + stage_key, head, quad, exists);
      for (var i = 0u; i < STAGED; i++) {
        let at = i * ROWS + 4u * group;
        let q0 = staged_q[at];
        let q1 = staged_q[at + 1u];
        let q2 = staged_q[at + 2u];
        let q3 = staged_q[at + 3u];
        let k0 = staged_k[i * KEYS + column];
        let k1 = staged_k[i * KEYS + column + LANES];
        score0 += vec4<f32>(dot(q0, k0), dot(q1, k0), dot(q2, k0), dot(q3, k0));
        score1 += vec4<f32>(dot(q0, k1), dot(q1, k1), dot(q2, k1), dot(q3, k1));
      }
    }

    // A row sees the keys up to its own position.
    let key0 = begin + column;
    let key1 = key0 + LANES;
    let seen0 = (vec4<u32>(key0) <= rows) & vec4<bool>(key0 < end);
    let seen1 = (vec4<u32>(key1) <= rows) & vec4<bool>(key1 < end);
    score0 = select(vec4<f32>(NOTHING), score0 * scale, seen0);
    score1 = select(vec4<f32>(NOTHING), score1 * scale, seen1);

    workgroupBarrier(); // staged_q's last readers are done
    staged_q[lane] = max(score0, score1);
    workgroupBarrier();
    let before = maximum;
    for (var i = 0u; i < LANES; i++) {
      maximum = max(maximum, staged_q[group * LANES + i]);
    }
    let shrink = exp2(before - maximum);
    weights[column * GROUPS + group] = select(vec4<f32>(0.0), exp2(score0 - maximum), seen0);
    weights[(column + LANES) * GROUPS + group] = select(vec4<f32>(0.0), exp2(score1 - maximum), seen1);
    workgroupBarrier();

    total *= shrink;
    for (var k = 0u; k < PASSES; k++) {
      out0[k] *= shrink.x;
      out1[k] *= shrink.y;
      out2[k] *= shrink.z;
      out3[k] *= shrink.w;
    }
    // Keys behind the end weigh 0, and stand for the last one.
    let last = row + end - 1u - begin;
    for (var key = 0u; key < min(KEYS, end - begin); key += 4u) {
      let w0 = weights[key * GROUPS + group];
      let w1 = weights[(key + 1u) * GROUPS + group];
      let w2 = weights[(key + 2u) * GROUPS + group];
      let w3 = weights[(key + 3u) * GROUPS + group];
      total += (w0 + w1) + (w2 + w3);
      let at = head * (N + V) + N;
      let row0 = (min(row + key, last) * params.kv_stride + at) / 4u;
      let row1 = (min(row + key + 1u, last) * params.kv_stride + at) / 4u;
      let row2 = (min(row + key + 2u, last) * params.kv_stride + at) / 4u;
      let row3 = (min(row + key + 3u, last) * params.kv_stride + at) / 4u;
      for (var k = 0u; k < PASSES; k++) {
        let c = min(column + k * LANES, COLUMNS - 1u);
        let v0 = kv[row0 + c];
        let v1 = kv[row1 + c];
        let v2 = kv[row2 + c];
        let v3 = kv[row3 + c];
        out0[k] += w0.x * v0 + w1.x * v1 + w2.x * v2 + w3.x * v3;
        out1[k] += w0.y * v0 + w1.y * v1 + w2.y * v2 + w3.y * v3;
        out2[k] += w0.z * v0 + w1.z * v1 + w2.z * v2 + w3.z * v3;
        out3[k] += w0.w * v0 + w1.w * v1 + w2.w * v2 + w3.w * v3;
      }
    }
  }

  // Every lane of a group holds the same maxima and totals.
  let found = total > vec4<f32>(0.0);
  let here = select(vec4<f32>(NOTHING), (maximum + log2(max(total, vec4<f32>(1e-30)))) * LN_2, found);
  var factor = select(vec4<f32>(0.0), 1.0 / max(total, vec4<f32>(1e-30)), found);
  var keep = vec4<f32>(0.0); // the earlier pieces' weight
  var merged = here;
  let count = min(sequence.tokens - min(sequence.tokens, first + 4u * group), 4u); // rows of this group
  let first_row = sequence.first_row + first + 4u * group;
  if (ACCUMULATE) {
    var earlier = vec4<f32>(NOTHING);
    for (var j = 0u; j < count; j++) {
      earlier[j] = max(lse[(first_row + j) * params.heads + head], NOTHING);
    }
    let largest = max(earlier, here);
    let old = select(vec4<f32>(0.0), exp(earlier - largest), earlier > vec4<f32>(0.5 * NOTHING));
    let recent = select(vec4<f32>(0.0), exp(here - largest), found);
    let sum = max(old + recent, vec4<f32>(1e-30));
    keep = old / sum;
    factor *= recent / sum;
    merged = select(vec4<f32>(NOTHING), largest + log(sum), old + recent > vec4<f32>(0.0));
    storageBarrier(); // every lane has read the earlier lse
  }
  if (column < count) {
    lse[(first_row + column) * params.heads + head] = merged[column];
  }
  for (var k = 0u; k < PASSES; k++) {
    let c = column + k * LANES;
    if (c < COLUMNS) {
      let at = (first_row * params.output_stride + head * V) / 4u + c;
      store(at, 0u, count, out0[k] * factor.x, keep.x);
      store(at, 1u, count, out1[k] * factor.y, keep.y);
      store(at, 2u, count, out2[k] * factor.z, keep.z);
      store(at, 3u, count, out3[k] * factor.w, keep.w);
    }
  }
}

// Writes row `j` of a group's `count`, with what stands there weighed by `keep`.
fn store(first: u32, j: u32, count: u32, value: vec4<f32>, keep: f32) {
  if (j < count) {
    let at = first + j * params.output_stride / 4u;
    if (keep > 0.0) { // what weighs 0 may be no number
      output[at] = keep * output[at] + value;
    } else {
      output[at] = value;
    }
  }
}
