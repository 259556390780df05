// y = (y +) the sum of a token's experts' outputs, each times its weight; an expert without weights gives x.
// Grid: one invocation four elements of a token. Strides count f32 and are multiples of 4.
// lib: none.
// Constants: WORKGROUP; EXPERTS that have weights, TOP_K of a token; ACCUMULATE, whether y is added to.

struct Params {
  tokens: u32,
  length: u32,
  x_stride: u32,
  outputs_stride: u32,
  y_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> routes: array<vec2<u32>>;  // [tokens, TOP_K]: expert, bits of its weight
@group(0) @binding(2) var<storage, read> outputs: array<vec4<f32>>; // [tokens, TOP_K, outputs_stride / 4]
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;       // [tokens, x_stride / 4]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>; // [tokens, y_stride / 4]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = (group.x + group.y * groups.x) * WORKGROUP + lane;
  let vectors = (params.length + 3u) / 4u;
  let token = i / vectors;
  let column = i % vectors;
  if (token < params.tokens) {
    let at = token * params.y_stride / 4u + column;
    var sum = vec4<f32>(0.0);
    if (ACCUMULATE) {
      sum = y[at];
    }
    for (var k = 0u; k < TOP_K; k++) {
      let pair = token * TOP_K + k;
      let route = routes[pair];
      var value: vec4<f32>;
      if (route.x < EXPERTS) {
        value = outputs[pair * params.outputs_stride / 4u + column];
      } else {
        value = x[token * params.x_stride / 4u + column];
      }
      sum += bitcast<f32>(route.y) * value;
    }
    y[at] = sum;
  }
}
