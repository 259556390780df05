// y = x: as many bytes are written as read.
// Grid: one invocation four vectors, WORKGROUP apart.
// lib: none.
// Constants: WORKGROUP.

struct Params {
  vectors: u32, // of four words
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;       // [vectors]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<u32>>; // [vectors]

const EACH = 4u; // vectors of an invocation

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let first = (group.x + group.y * groups.x) * WORKGROUP * EACH + lane;
  for (var k = 0u; k < EACH; k++) {
    let i = first + k * WORKGROUP;
    if (i < params.vectors) {
      y[i] = x[i];
    }
  }
}
