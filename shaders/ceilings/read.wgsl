// The sum of all words modulo 2^32, one partial sum an invocation: memory is read and hardly anything else done.
// Grid: any number of workgroups; invocation i takes vectors i, i + n, i + 2 n ...
// lib: none.
// Constants: WORKGROUP.

struct Params {
  vectors: u32, // of four words
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;     // [vectors]
@group(0) @binding(2) var<storage, read_write> sums: array<u32>;  // [invocations]

const UNROLL = 8u; // loads that an invocation has under way

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let own = group.x * WORKGROUP + lane;
  let step = groups.x * WORKGROUP;
  var sum = vec4<u32>(0u);
  var i = own;
  for (; i + (UNROLL - 1u) * step < params.vectors; i += UNROLL * step) {
    var values: array<vec4<u32>, UNROLL>;
    for (var k = 0u; k < UNROLL; k++) {
      values[k] = x[i + k * step];
    }
    for (var k = 0u; k < UNROLL; k++) {
      sum += values[k];
    }
  }
  for (; i < params.vectors; i += step) {
    sum += x[i];
  }
  sums[own] = sum.x + sum.y + sum.z + sum.w;
}
