// x += scale * y: a branch added to the residual stream.
// Grid: one invocation an element of four. x, y [length] f32; length counts f32.
// lib: none.
// Constants: WORKGROUP.

struct Params {
  length: u32,
  scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;        // [length / 4]
@group(0) @binding(2) var<storage, read_write> x: array<vec4<f32>>;  // [length / 4]

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = (group.x + group.y * groups.x) * WORKGROUP + lane;
  if (i * 4u < params.length) {
    x[i] += params.scale * y[i];
  }
}
