// Attention of a step's queries over one split of each sequence's latent cache, with the up-projections
// absorbed in workgroup memory: W_UK^T q_nope is built there for a block of ROWS (head, token) rows and never
// leaves. With VALUES, for sequences of one split, W_UV is applied there too.
// Grid: x blocks of rows of the longest sequence and one chunk of heads, y splits of one cache chunk.
// lib: batch, rope_table, rope_* (rope_elements), unpack4_* (Packed4, unpack4), rows_* (record_of),
// score_* (score, NOTHING), cache_* (UNITS, stage, quad_of), transpose8_*, fold.
// Constants: N and P widths of a query's parts, V of a value, R latent width, W = R + P rounded up to 8, VALUES,
// WORKGROUP, ROWS of a block, TILE tokens and SCRATCH values in workgroup memory.

struct Params {
  heads: u32,
  first_head: u32,  // of the bound chunk of kv_b
  chunk_heads: u32,
  first_split: u32, // of the bound chunk of the cache
  first_page: u32,
  page_bits: u32,   // a page has 1 << page_bits tokens
  q_stride: u32,    // in f32
  scale: f32,       // softmax scale times log2(e)
  beta: f32,        // queries grow by 1 + beta ln(1 + floor(position / length))
  length: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;         // [sequences]
@group(0) @binding(2) var<storage, read> splits: array<Split>;           // [splits]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;        // [entries] page numbers
@group(0) @binding(4) var<storage, read> q: array<f32>;                  // [tokens, q_stride]: heads of N + P, not turned
@group(0) @binding(5) var<storage, read> kv_b: array<Packed4>;           // [chunk heads, N + V, STRIDE]
@group(0) @binding(6) var<storage, read> rope_table: array<vec2<f32>>;   // [256 + blocks, P / 2]; anything where P is 0
@group(0) @binding(7) var<storage, read> cache: array<vec4<u32>>;        // [pages, page tokens, record]
@group(0) @binding(8) var<storage, read_write> output: array<f32>;       // partials [partial tokens, heads, R + 4]; VALUES: [tokens, heads, V]

const STRIDE = (R + 31u) / 32u * 8u; // vec4 a row of kv_b
const UNROLL = 4u;                   // rows of W_UK that a lane has under way
const VALUE_LANES = 16u;             // that share a row of W_UV
const SUMS = ROWS * R;               // where in `scratch` those lanes' sums stand

var<private> block_first: u32; // the block's first row, of `block_rows` of the sequence's in this chunk
var<private> block_rows: u32;
var<private> block_tokens: u32;
var<private> block_position: u32;

// Token and head in the chunk of a row of the block: the tokens of a head follow each other, and read its
// matrices together. Rows behind the last repeat it.
fn place_of(row: u32) -> vec2<u32> {
  let place = min(block_first + row, block_rows - 1u);
  return vec2<u32>(place % block_tokens, place / block_tokens);
}

fn query(row: u32, quad: u32) -> vec4<f32> {
  let at = row * W + 4u * quad;
  return vec4<f32>(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]);
}

fn end_of(row: u32) -> u32 {
  return block_position + place_of(row).x + 1u;
}

// Absorbed queries, [ROWS, W], into `scratch`.
fn absorb(first_row: u32, lane: u32) {
  for (var i = lane; i < ROWS * (R / 4u); i += WORKGROUP) {
    let row = i / (R / 4u);
    let column = i % (R / 4u);
    let place = place_of(row);
    let q_nope = (first_row + place.x) * params.q_stride + (params.first_head + place.y) * (N + P);
    let start = place.y * (N + V) * STRIDE + column;
    var sum = vec4<f32>(0.0);
    for (var n = 0u; n < N; n += UNROLL) {
      var packed: array<Packed4, UNROLL>;
      for (var k = 0u; k < UNROLL; k++) {
        packed[k] = kv_b[start + (n + k) * STRIDE]; // N is a multiple of 8
      }
      for (var k = 0u; k < UNROLL; k++) {
        sum += q[q_nope + n + k] * unpack4(packed[k]);
      }
    }
    sum *= factor(place.x);
    let at = row * W + 4u * column;
    scratch[at] = sum.x;
    scratch[at + 1u] = sum.y;
    scratch[at + 2u] = sum.z;
    scratch[at + 3u] = sum.w;
  }
  for (var i = lane; i < ROWS * (P / 2u); i += WORKGROUP) {
    let row = i / max(P / 2u, 1u); // max: where P is 0 the loop does not run, but must compile
    let pair = i % max(P / 2u, 1u);
    let place = place_of(row);
    let q_pe = (first_row + place.x) * params.q_stride + (params.first_head + place.y) * (N + P) + N;
    let turn = factor(place.x) * rope_rotation(block_position + place.x, pair, P / 2u);
    let at = rope_elements(pair, P / 2u);
    let x = q[q_pe + at.x];
    let y = q[q_pe + at.y];
    scratch[row * W + R + at.x] = x * turn.x - y * turn.y;
    scratch[row * W + R + at.y] = x * turn.y + y * turn.x;
  }
  for (var i = lane; i < ROWS * (W - R - P); i += WORKGROUP) {
    let padding = max(W - R - P, 1u);
    scratch[i / padding * W + R + P + i % padding] = 0.0;
  }
}

fn factor(token: u32) -> f32 {
  let steps = (block_position + token) / max(params.length, 1u);
  return params.scale * (1.0 + params.beta * log(1.0 + f32(steps)));
}

// Normalised outputs and log-sum-exps, for mla_combine.
fn store_partials(partial: u32, lane: u32) {
  let band = lane / COLUMN_LANES;
  for (var i = 0u; i < 2u * BAND; i++) {
    let row = 2u * band * BAND + i;
    if (row < min(ROWS, block_rows - block_first)) {
      let place = place_of(row);
      let at = ((partial + place.x) * params.heads + params.first_head + place.y) * (R + 4u);
      let factor = 1.0 / max(total_of(row), 1e-30);
      for (var turn = 0u; turn < PASSES; turn++) {
        let column = lane % COLUMN_LANES + turn * COLUMN_LANES;
        if (column < COLUMNS) {
          let value = factor * folded[2u * turn * BAND + i];
          output[at + 4u * column] = value.x;
          output[at + 4u * column + 1u] = value.y;
          output[at + 4u * column + 2u] = value.z;
          output[at + 4u * column + 3u] = value.w;
        }
      }
      if (lane % COLUMN_LANES == 0u) {
        output[at + R] = lse_of(row);
      }
    }
  }
}

// W_UV applied to the normalised latents of the block's `rows` rows, which pass through `scratch`.
fn store_values(first_row: u32, rows: u32, lane: u32) {
  let band = lane / COLUMN_LANES;
  for (var i = 0u; i < 2u * BAND; i++) {
    let row = 2u * band * BAND + i;
    if (row < ROWS) {
      let factor = 1.0 / max(total_of(row), 1e-30);
      for (var turn = 0u; turn < PASSES; turn++) {
        let column = lane % COLUMN_LANES + turn * COLUMN_LANES;
        if (column < COLUMNS) {
          let value = factor * folded[2u * turn * BAND + i];
          let at = row * R + 4u * column;
          scratch[at] = value.x;
          scratch[at + 1u] = value.y;
          scratch[at + 2u] = value.z;
          scratch[at + 3u] = value.w;
        }
      }
    }
  }
  workgroupBarrier();
  for (var base = 0u; base < rows * V; base += WORKGROUP / VALUE_LANES) {
    let item = base + lane / VALUE_LANES;
    let row = min(item / V, rows - 1u);
    let start = (place_of(row).y * (N + V) + N + item % V) * STRIDE;
    var sum = 0.0;
    for (var column = lane % VALUE_LANES; column < COLUMNS; column += VALUE_LANES) {
      let at = row * R + 4u * column;
      sum += dot(unpack4(kv_b[start + column]),
                 vec4<f32>(scratch[at], scratch[at + 1u], scratch[at + 2u], scratch[at + 3u]));
    }
    scratch[SUMS + lane] = sum;
    workgroupBarrier();
    let own = base + lane;
    if (lane < WORKGROUP / VALUE_LANES && own < rows * V) {
      let place = place_of(own / V);
      var total = 0.0;
      for (var i = 0u; i < VALUE_LANES; i++) {
        total += scratch[SUMS + lane * VALUE_LANES + i];
      }
      output[((first_row + place.x) * params.heads + params.first_head + place.y) * V + own % V] = total;
    }
    workgroupBarrier(); // nobody reads the sums any more
  }
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let split = splits[params.first_split + block.y];
  let sequence = batch[split.sequence];
  let first = block.x * ROWS; // browsers take private variables for different in each lane
  let rows = sequence.tokens * params.chunk_heads;
  block_first = first;
  block_tokens = sequence.tokens;
  block_rows = rows;
  if (first >= rows) {
    return; // another sequence of the batch has more rows
  }
  block_position = sequence.position;

  absorb(sequence.first_row, lane);
  workgroupBarrier();
  fold(sequence.pages, split.begin, split.end, lane);
  if (VALUES) {
    store_values(sequence.first_row, min(ROWS, rows - first), lane);
  } else {
    store_partials(split.partial, lane);
  }
}
