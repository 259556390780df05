//! Workgroup memory as an earlier kernel may leave it.

use lamina::gpu::{Device, Host, Recording, Shader, Source, grid_1d};

/// Fills 16 KiB of workgroup memory with NaN; `seen` keeps the compiler from leaving the stores out.
const POISON: Source = Source {
    name: "poison",
    text: "@group(0) @binding(0) var<storage, read_write> seen: array<u32>;
var<workgroup> memory: array<vec4<u32>, 1024>;
@compute @workgroup_size(64) fn main(@builtin(local_invocation_index) lane: u32) {
  for (var i = lane; i < 1024u; i += 64u) { memory[i] = vec4<u32>(0x7fc00000u); }
  workgroupBarrier();
  if (memory[seen[0] % 1024u].x == 0u) { seen[1] = 1u; }
}
",
};

/// Leaves NaN in the workgroup memory of every core.
pub fn poison(device: &Device) -> Recording {
    let seen = device.alloc(16, "seen").expect("16 bytes").view();
    let mut recording = Recording::new();
    // Enough workgroups that every core gets one.
    let groups = if device.caps().is_software() { 64 } else { 4096 };
    recording.call(&Shader::of(POISON).build(), vec![("seen", seen)], &[], grid_1d(groups), |_: &Host| {});
    recording
}
