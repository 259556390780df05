//! SPIR-V of a kernel whose loops the driver must not unroll: WGSL has no such hint and naga writes none.
//! A driver that unrolls the loop of a kernel on matrix units spills its fragments to memory.

use std::borrow::Cow;

use wgpu::naga;

use super::compose::Shader;

/// OpLoopMerge, and the hint among its loop controls.
const LOOP_MERGE: u32 = 246;
const DONT_UNROLL: u32 = 2;

/// The module of `text`, with every loop left as it is. `None` where it does not compile: the usual path
/// then says why.
#[allow(unsafe_code, reason = "wgpu marks SPIR-V that it did not write itself unsafe")]
pub(super) fn rolled(device: &wgpu::Device, shader: &Shader, text: &str, checked: bool) -> Option<wgpu::ShaderModule> {
    let module = naga::front::wgsl::parse_str(text).ok()?;
    let capabilities = naga::valid::Capabilities::all();
    let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
    validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
    validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    let info = validator.validate(&module).ok()?;
    let policy = match checked {
        true => naga::proc::BoundsCheckPolicy::Restrict,
        false => naga::proc::BoundsCheckPolicy::Unchecked,
    };
    let options = naga::back::spv::Options {
        lang_version: (1, 6), // what cooperative matrices need
        flags: naga::back::spv::WriterFlags::empty(),
        bounds_check_policies: naga::proc::BoundsCheckPolicies { index: policy, buffer: policy, ..Default::default() },
        zero_initialize_workgroup_memory: naga::back::spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: checked,
        ..Default::default()
    };
    let mut words = naga::back::spv::write_vec(&module, &info, &options, None).ok()?;
    dont_unroll(&mut words);
    let [x, y, z] = module.entry_points.first()?.workgroup_size;
    let entry = wgpu::PassthroughShaderEntryPoint { name: Cow::Borrowed("main"), workgroup_size: (x, y, z) };
    let desc = wgpu::ShaderModuleDescriptorPassthrough {
        label: Some(shader.key()),
        entry_points: Cow::Owned(vec![entry]),
        spirv: Some(Cow::Owned(words)),
        ..Default::default()
    };
    // SAFETY: naga wrote it from WGSL that it validated, and a loop's hint changes no result.
    Some(unsafe { device.create_shader_module_passthrough(desc) })
}

/// Sets the hint at every loop of a SPIR-V module.
fn dont_unroll(words: &mut [u32]) {
    let mut at = 5; // behind the header
    while at < words.len() {
        let (length, code) = ((words[at] >> 16) as usize, words[at] & 0xffff);
        if code == LOOP_MERGE {
            words[at + 3] |= DONT_UNROLL;
        }
        at += length.max(1);
    }
}
