// Numbers that no driver can guess or compress: word i of the whole is hash(first + i).
// Grid: one invocation four words.
// lib: none.
// Constants: WORKGROUP.

struct Params {
  vectors: u32, // of four words
  first: u32,   // word of the whole that y starts with
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>; // [vectors]

fn hash(word: vec4<u32>) -> vec4<u32> {
  let a = (word ^ (word >> vec4<u32>(16u))) * 0x7feb352du;
  let b = (a ^ (a >> vec4<u32>(15u))) * 0x846ca68bu;
  return b ^ (b >> vec4<u32>(16u));
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let i = (group.x + group.y * groups.x) * WORKGROUP + lane;
  if (i < params.vectors) {
    y[i] = hash(vec4<u32>(params.first + 4u * i) + vec4<u32>(0u, 1u, 2u, 3u));
  }
}
