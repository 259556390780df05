// Queries for the latent cache: W_UK,h^T q_nope and the turned q_pe, times a factor; one chunk of heads.
// Grid: x blocks of 64 latent columns, y heads of the chunk, z blocks of TOKENS tokens.
// lib: batch, rope_table, rope_* (rope_elements), unpack4_* (Packed4, unpack4).
// Constants: N and P widths of a query's parts, V of a value, R latent width, W = R + P rounded up to 8,
// TOKENS that share a read of W_UK.

struct Params {
  tokens: u32,
  heads: u32,
  first_head: u32, // of the bound chunk
  q_stride: u32,   // in f32
  scale: f32,      // softmax scale times log2(e)
  beta: f32,       // queries grow by 1 + beta ln(1 + floor(position / length))
  length: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<Row>;                // [tokens]
@group(0) @binding(2) var<storage, read> q: array<vec2<f32>>;             // [tokens, q_stride / 2]: heads of N + P
@group(0) @binding(3) var<storage, read> kv_b: array<Packed4>;            // [chunk heads, N + V, STRIDE]
@group(0) @binding(4) var<storage, read> rope_table: array<vec2<f32>>;    // [256 + blocks, P / 2]; anything where P is 0
@group(0) @binding(5) var<storage, read_write> queries: array<vec4<f32>>; // [tokens, heads, W / 4]

const WORKGROUP = 256u;
const LANES = 16u;                   // that share a row of W_UK, four columns each
const SLICES = WORKGROUP / LANES;    // rows under way at once
const UNROLL = select(4u, 8u, N > 4u * SLICES); // rows a lane has under way
const PADDED = (N + SLICES * UNROLL - 1u) / (SLICES * UNROLL) * (SLICES * UNROLL);
const STRIDE = (R + 31u) / 32u * 8u; // vec4 a row of kv_b

const REST = W - R;                  // a query's elements behind the latent: rope part and padding

// [PADDED, TOKENS] of q_nope, zeros behind N; afterwards [TOKENS, REST] of the queries.
var<workgroup> staged: array<f32, TOKENS * max(PADDED, REST)>;
var<workgroup> sums: array<vec4<f32>, WORKGROUP>; // [SLICES, LANES]

fn factor(token: u32) -> f32 {
  let steps = rows[token].position / max(params.length, 1u);
  return params.scale * (1.0 + params.beta * log(1.0 + f32(steps)));
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let head = params.first_head + block.y;
  let first = block.z * TOKENS;
  let count = min(TOKENS, params.tokens - first);
  let q_head = head * (N + P) / 2u;
  let column = block.x * LANES + lane % LANES;
  let slice = lane / LANES;

  // Rows of W_UK are under way before they are needed: the first while the queries are staged.
  var packed: array<Packed4, UNROLL>;
  let start = block.y * (N + V) * STRIDE + min(column, R / 4u - 1u);
  load(&packed, start, slice);
  for (var i = lane; i < TOKENS * PADDED / 2u; i += WORKGROUP) {
    let pair = i / TOKENS;
    let t = i % TOKENS;
    var value = vec2<f32>(0.0);
    if (pair < N / 2u && t < count) {
      value = q[(first + t) * (params.q_stride / 2u) + q_head + pair];
    }
    staged[2u * pair * TOKENS + t] = value.x;
    staged[(2u * pair + 1u) * TOKENS + t] = value.y;
  }
  workgroupBarrier();

  var sum: array<vec4<f32>, TOKENS>;
  for (var t = 0u; t < TOKENS; t++) {
    sum[t] = vec4<f32>(0.0);
  }
  for (var i = slice; i < PADDED; i += SLICES * UNROLL) {
    for (var k = 0u; k < UNROLL; k++) {
      let w = unpack4(packed[k]);
      for (var t = 0u; t < TOKENS; t++) {
        sum[t] += staged[(i + k * SLICES) * TOKENS + t] * w;
      }
    }
    if (i + SLICES * UNROLL < PADDED) {
      load(&packed, start, i + SLICES * UNROLL);
    }
  }

  for (var t = 0u; t < TOKENS; t++) {
    workgroupBarrier(); // the last token's readers are done
    sums[lane] = sum[t];
    workgroupBarrier();
    if (lane < LANES && column < R / 4u && t < count) {
      var all = vec4<f32>(0.0);
      for (var i = 0u; i < SLICES; i++) {
        all += sums[i * LANES + lane];
      }
      queries[((first + t) * params.heads + head) * (W / 4u) + column] = all * factor(first + t);
    }
  }

  // Four elements behind the latent are one store: turned in workgroup memory first.
  if (block.x == 0u && REST > 0u) {
    for (var i = lane; i < count * (P / 2u); i += WORKGROUP) {
      let t = i / max(P / 2u, 1u); // max: where P is 0 the loop does not run, but must compile
      let pair = i % max(P / 2u, 1u);
      let at = rope_elements(pair, P / 2u);
      let turn = factor(first + t) * rope_rotation(rows[first + t].position, pair, P / 2u);
      let x = rope_element(first + t, q_head, at.x);
      let y = rope_element(first + t, q_head, at.y);
      staged[t * REST + at.x] = x * turn.x - y * turn.y;
      staged[t * REST + at.y] = x * turn.y + y * turn.x;
    }
    workgroupBarrier();
    for (var i = lane; i < count * REST / 4u; i += WORKGROUP) {
      let t = i * 4u / max(REST, 1u);
      let at = i * 4u % max(REST, 1u);
      var value = vec4<f32>(0.0);
      for (var k = 0u; k < 4u; k++) {
        if (at + k < P) {
          value[k] = staged[t * REST + at + k];
        }
      }
      queries[((first + t) * params.heads + head) * (W / 4u) + (R + at) / 4u] = value;
    }
  }
}

// This lane's columns of every SLICES-th row of W_UK from `row` on.
fn load(packed: ptr<function, array<Packed4, UNROLL>>, start: u32, row: u32) {
  for (var k = 0u; k < UNROLL; k++) {
    (*packed)[k] = kv_b[start + min(row + k * SLICES, N - 1u) * STRIDE];
  }
}

fn rope_element(token: u32, q_head: u32, i: u32) -> f32 {
  return q[token * (params.q_stride / 2u) + q_head + (N + i) / 2u][(N + i) % 2u];
}
