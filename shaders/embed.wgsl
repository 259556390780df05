// y = scale * table[id] for the ids of one chunk of the table; zeros for ids outside the vocabulary.
// Grid: one invocation four elements of a row. y's stride counts f32, the table's its own elements.
// lib: unpack4_* (Packed4, unpack4).
// Constants: WORKGROUP.

struct Params {
  tokens: u32,
  length: u32,
  table_stride: u32,
  y_stride: u32,
  vocabulary: u32,
  first: u32,
  count: u32,
  scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;         // [tokens]
@group(0) @binding(2) var<storage, read> table: array<Packed4>;      // [count, table_stride / 4]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;  // [tokens, y_stride / 4]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = (group.x + group.y * groups.x) * WORKGROUP + lane;
  let vectors = (params.length + 3u) / 4u;
  let token = i / vectors;
  let column = i % vectors;
  if (token >= params.tokens) {
    return;
  }
  let id = tokens[token];
  let at = token * params.y_stride / 4u + column;
  if (id >= params.vocabulary) {
    // No chunk holds it: the first one answers.
    if (params.first == 0u) {
      y[at] = vec4<f32>(0.0);
    }
  } else if (id >= params.first && id - params.first < params.count) {
    y[at] = params.scale * unpack4(table[(id - params.first) * (params.table_stride / 4u) + column]);
  }
}
