// Rotates a slice of each head of each row in place: (a, b) becomes (a cos - b sin, b cos + a sin).
// Grid: one invocation a pair. Head h's slice starts at offset + h * head_stride of its row.
// lib: batch (Row), rope_table (rope_rotation), rope_interleaved or rope_half (rope_elements).
// Constants: WORKGROUP.

struct Params {
  tokens: u32,
  heads: u32,
  pairs: u32,
  stride: u32,
  offset: u32,
  head_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;         // [tokens, stride]
@group(0) @binding(2) var<storage, read> rows: array<Row>;            // [tokens]
@group(0) @binding(3) var<storage, read> rope_table: array<vec2<f32>>; // [256 + blocks, pairs]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = (group.x + group.y * groups.x) * WORKGROUP + lane;
  let pair = i % params.pairs;
  let head = i / params.pairs % params.heads;
  let token = i / params.pairs / params.heads;
  if (token < params.tokens) {
    let turn = rope_rotation(rows[token].position, pair, params.pairs);
    let start = token * params.stride + params.offset + head * params.head_stride;
    let at = start + rope_elements(pair, params.pairs);
    let a = x[at.x];
    let b = x[at.y];
    x[at.x] = a * turn.x - b * turn.y;
    x[at.y] = b * turn.x + a * turn.y;
  }
}
