//! SPIR-V of a kernel whose loops the driver must not unroll: WGSL has no such hint and naga writes none.
//! A driver that unrolls the loop of a kernel on matrix units spills its fragments to memory. Such kernels also move
//! f16 as words, 16 bytes a load.

use std::borrow::Cow;
use std::collections::HashMap;

use wgpu::naga;

use super::compose::Shader;

/// OpLoopMerge, and the hint among its loop controls.
const LOOP_MERGE: u32 = 246;
const DONT_UNROLL: u32 = 2;
/// OpExtInst, and UnpackHalf2x16 among those of GLSL.std.450, the only set that naga imports.
const EXT_INST: u32 = 12;
const UNPACK_HALF: u32 = 62;
/// OpFConvert and OpBitcast: a type, a result, an operand.
const F_CONVERT: u32 = 115;
const BITCAST: u32 = 124;

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
    keep_halves(&mut words);
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

/// Calls `edit` with each instruction of a SPIR-V module: its opcode and its words.
fn instructions(words: &mut [u32], mut edit: impl FnMut(u32, &mut [u32])) {
    let mut at = 5; // behind the header
    while at < words.len() {
        let (length, code) = ((words[at] >> 16) as usize, words[at] & 0xffff);
        let end = at + length.max(1);
        edit(code, &mut words[at..end]);
        at = end;
    }
}

/// Sets the hint at every loop of a SPIR-V module.
fn dont_unroll(words: &mut [u32]) {
    instructions(words, |code, words| {
        if code == LOOP_MERGE {
            words[3] |= DONT_UNROLL;
        }
    });
}

/// Takes the halves of a word as they are where a kernel unpacks them to f32 and narrows them again, which is all
/// that WGSL and naga have to turn words into f16.
fn keep_halves(words: &mut [u32]) {
    let mut unpacked = HashMap::new();
    instructions(words, |code, words| match (code, &words[..]) {
        (EXT_INST, [_, _, result, _, UNPACK_HALF, word]) => {
            unpacked.insert(*result, *word);
        }
        (F_CONVERT, [head, _, _, wide]) => {
            if let Some(word) = unpacked.get(wide) {
                (words[0], words[3]) = (head & !0xffff | BITCAST, *word);
            }
        }
        _ => {}
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "enable f16;
@group(0) @binding(0) var<storage, read_write> words: array<u32>;
@group(0) @binding(1) var<storage, read_write> halves: array<vec2<f16>>;
@compute @workgroup_size(1)
fn main() {
  for (var i = 0u; i < 4u; i++) {
    halves[i] = vec2<f16>(unpack2x16float(words[i])) + vec2<f16>(vec2<f32>(f32(words[i + 4u])));
  }
}";

    #[test]
    fn loops_stay_rolled_and_halves_that_are_only_moved_are_not_converted() {
        let module = naga::front::wgsl::parse_str(TEXT).unwrap();
        let mut validator = naga::valid::Validator::new(Default::default(), naga::valid::Capabilities::all());
        let info = validator.validate(&module).unwrap();
        let options = naga::back::spv::Options { lang_version: (1, 6), ..Default::default() };
        let mut words = naga::back::spv::write_vec(&module, &info, &options, None).unwrap();
        let count = |words: &mut [u32], wanted: u32| {
            let mut found = 0;
            instructions(words, |code, _| found += usize::from(code == wanted));
            found
        };
        let before = [F_CONVERT, BITCAST].map(|code| count(&mut words, code));
        keep_halves(&mut words);
        assert_eq!([F_CONVERT, BITCAST].map(|code| count(&mut words, code)), [before[0] - 1, before[1] + 1]);
        assert!(before[0] > 1, "the other conversion is of a number: {before:?}");
        dont_unroll(&mut words);
        let mut loops = Vec::new();
        instructions(&mut words, |code, words| loops.extend((code == LOOP_MERGE).then(|| words[3])));
        assert!(loops.len() == 1 && loops[0] & DONT_UNROLL != 0, "{loops:?}");
    }
}
