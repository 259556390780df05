// The splits of each (token, head) row merged by log-sum-exp; with VALUES then W_UV of a chunk of heads.
// Grid: x parts of PART value rows (without VALUES of COLUMNS vec4), y heads of the chunk, z blocks of TOKENS
// tokens; with SERIAL blocks of rows, folded into y.
// lib: batch, unpack4_* (Packed4, unpack4).
// Constants: R latent width, N rows of W_UK and V of W_UV, VALUES, WORKGROUP,
// TOKENS that share a read of W_UV, PART, COLUMNS vec4 that are merged at once, SERIAL: a lane merges alone.

struct Params {
  tokens: u32,
  heads: u32,
  first_head: u32,    // of the bound chunk
  output_stride: u32, // from one token's output to the next
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;         // [sequences]
@group(0) @binding(2) var<storage, read> rows: array<Row>;               // [tokens]
@group(0) @binding(3) var<storage, read> partials: array<vec4<f32>>;     // [partial tokens, heads, R / 4 + 1]
@group(0) @binding(4) var<storage, read> kv_b: array<Packed4>;           // [chunk heads, N + V, STRIDE]; anything without VALUES
@group(0) @binding(5) var<storage, read_write> output: array<f32>;       // [tokens, output_stride]: heads of R, or of V
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;          // [tokens, heads], natural logarithm

const QUADS = R / 4u;                        // vec4 of a latent
const GROUPS = WORKGROUP / COLUMNS;          // groups of lanes that share the splits
const STRIDE = (R + 31u) / 32u * 8u;         // vec4 a row of kv_b
const LANES = 16u;                           // that share a row of W_UV
const ROWS = WORKGROUP / LANES;              // rows of W_UV under way at once
const OWN = (QUADS + LANES - 1u) / LANES;    // vec4 of a row of W_UV that a lane has under way
const UNROLL = select(8u, 4u, GROUPS >= 16u); // splits a lane has under way
const NOTHING = -3.0e38;                     // a log-sum-exp without a token
const LN_2 = 0.6931471805599453;

var<workgroup> shares: array<vec2<f32>, WORKGROUP>;         // of a group of splits: largest log-sum-exp, sum of weights
var<workgroup> latents: array<vec4<f32>, TOKENS * QUADS>;   // [TOKENS, QUADS]
var<workgroup> scratch: array<vec4<f32>, WORKGROUP>;

// The natural log-sum-exp of weights that sum to `sum` relative to the largest.
fn natural(largest: f32, sum: f32) -> f32 {
  return select((largest + log2(sum)) * LN_2, NOTHING, sum <= 0.0);
}

fn write_latent(token: u32, head: u32, column: u32, value: vec4<f32>) {
  let at = token * params.output_stride + head * R + 4u * column;
  output[at] = value.x;
  output[at + 1u] = value.y;
  output[at + 2u] = value.z;
  output[at + 3u] = value.w;
}

// Merges the splits of a row, from vec4 `start` of its latent on every COLUMNS-th, with no help of other lanes.
fn merge_alone(token: u32, head: u32, start: u32) {
  let sequence = batch[rows[token].sequence];
  let first = (sequence.first_partial + token - sequence.first_row) * params.heads + head;
  let step = sequence.tokens * params.heads;
  var largest = NOTHING;
  for (var s = 0u; s < sequence.splits; s++) {
    largest = max(largest, partials[(first + s * step) * (QUADS + 1u) + QUADS].x);
  }
  for (var column = start; column < QUADS; column += COLUMNS) {
    var sum = 0.0;
    var merged = vec4<f32>(0.0);
    for (var s = 0u; s < sequence.splits; s++) {
      let at = (first + s * step) * (QUADS + 1u);
      let found = partials[at + QUADS].x;
      let part = partials[at + column];
      if (!(found <= 0.5 * NOTHING)) { // else the part may be no number
        let weight = exp2(found - largest);
        sum += weight;
        merged += weight * part;
      }
    }
    write_latent(token, head, column, merged / max(sum, 1e-30));
    if (column == 0u) {
      lse[token * params.heads + head] = natural(largest, sum);
    }
  }
}

// Merges the splits of a row into latents[t]. Each lane finds the weights by itself: that costs less than
// waiting for others to find them.
fn merge(t: u32, token: u32, head: u32, lane: u32, part_of: u32) {
  let sequence = batch[rows[token].sequence];
  let splits = sequence.splits;
  let first = (sequence.first_partial + token - sequence.first_row) * params.heads + head;
  let step = sequence.tokens * params.heads; // rows from one split to the next

  let group = lane / COLUMNS;
  let first_column = select(part_of * COLUMNS, 0u, VALUES);
  let end_column = select(min(first_column + COLUMNS, QUADS), QUADS, VALUES);
  for (var base = first_column; base < end_column; base += COLUMNS) {
    let column = base + lane % COLUMNS;
    var share = vec2<f32>(NOTHING, 0.0);
    var merged = vec4<f32>(0.0);
    if (column < end_column && group < GROUPS) {
      for (var s = group; s < splits; s += GROUPS * UNROLL) {
        var found: array<f32, UNROLL>;
        var part: array<vec4<f32>, UNROLL>;
        for (var k = 0u; k < UNROLL; k++) {
          let at = (first + min(s + k * GROUPS, splits - 1u) * step) * (QUADS + 1u);
          found[k] = partials[at + QUADS].x;
          part[k] = partials[at + column];
        }
        let before = share.x;
        for (var k = 0u; k < UNROLL; k++) {
          share.x = max(share.x, select(NOTHING, found[k], s + k * GROUPS < splits));
        }
        let rescale = exp2(before - share.x);
        share.y *= rescale;
        merged *= rescale;
        for (var k = 0u; k < UNROLL; k++) {
          // What saw no token may be no number; a log-sum-exp that is none counts, so that it is seen.
          if (s + k * GROUPS < splits && !(found[k] <= 0.5 * NOTHING)) {
            let weight = exp2(found[k] - share.x);
            share.y += weight;
            merged += weight * part[k];
          }
        }
      }
    }
    if (GROUPS > 1u) {
      shares[lane] = share;
      scratch[lane] = merged;
      workgroupBarrier();
      if (group == 0u) {
        var largest = share.x;
        for (var i = 1u; i < GROUPS; i++) {
          largest = max(largest, shares[i * COLUMNS + lane].x);
        }
        let rescale = exp2(share.x - largest);
        share = vec2<f32>(largest, share.y * rescale);
        merged *= rescale;
        for (var i = 1u; i < GROUPS; i++) {
          let other = shares[i * COLUMNS + lane];
          let weight = exp2(other.x - largest);
          share.y += weight * other.y;
          merged += weight * scratch[i * COLUMNS + lane];
        }
      }
    }
    if (column < end_column && group == 0u) {
      merged /= max(share.y, 1e-30);
      if (VALUES) {
        latents[t * QUADS + column] = merged;
      } else {
        write_latent(token, head, column, merged);
      }
      if (column == 0u && (!VALUES || part_of == 0u)) {
        lse[token * params.heads + head] = natural(share.x, share.y);
      }
    }
    workgroupBarrier(); // shares and scratch are free, latents[t] is there
  }
}

@compute @workgroup_size(WORKGROUP)
fn main(
  @builtin(workgroup_id) block: vec3<u32>,
  @builtin(num_workgroups) blocks: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  if (SERIAL) {
    let row = (block.x + block.y * blocks.x) * GROUPS + lane / COLUMNS;
    if (lane / COLUMNS < GROUPS && row < params.tokens * params.heads) {
      merge_alone(row / params.heads, row % params.heads, lane % COLUMNS);
    }
    return;
  }
  let head = params.first_head + block.y;
  let first = block.z * TOKENS;
  let count = min(TOKENS, params.tokens - first);
  let start = (block.y * (N + V) + N) * STRIDE;
  // Rows of W_UV are under way before they are needed: those of the first turn while the splits are merged.
  var packed: array<Packed4, OWN>;
  if (VALUES) {
    load(&packed, start, block.x * PART, lane);
  }
  for (var t = 0u; t < count; t++) {
    merge(t, first + t, head, lane, block.x);
  }
  if (VALUES) {
    for (var row = block.x * PART; row < min((block.x + 1u) * PART, V); row += ROWS) {
      scratch[lane] = dots(&packed, lane % LANES);
      load(&packed, start, row + ROWS, lane);
      workgroupBarrier();
      let t = lane / ROWS;
      let value_row = row + lane % ROWS;
      if (t < count && value_row < V) {
        var sum = 0.0;
        for (var i = 0u; i < LANES; i++) {
          sum += scratch[lane % ROWS * LANES + i][t];
        }
        output[(first + t) * params.output_stride + head * V + value_row] = sum;
      }
      workgroupBarrier(); // scratch is free
    }
  }
}

// This lane's part of one of ROWS rows of W_UV from `row` on.
fn load(packed: ptr<function, array<Packed4, OWN>>, start: u32, row: u32, lane: u32) {
  let at = start + min(row + lane / LANES, V - 1u) * STRIDE;
  for (var k = 0u; k < OWN; k++) {
    (*packed)[k] = kv_b[at + min(lane % LANES + k * LANES, QUADS - 1u)];
  }
}

// This lane's part of the products of a row of W_UV with each token's latent.
fn dots(packed: ptr<function, array<Packed4, OWN>>, lane: u32) -> vec4<f32> {
  var sum = vec4<f32>(0.0);
  for (var k = 0u; k < OWN; k++) {
    let column = lane + k * LANES;
    if (column < QUADS) {
      let w = unpack4((*packed)[k]);
      for (var t = 0u; t < TOKENS; t++) {
        sum[t] += dot(w, latents[t * QUADS + column]);
      }
    }
  }
  return sum;
}
