//! Every shipped variant of every kernel, without a GPU: naga parses and validates it, every backend's
//! writer takes it, it keeps to the limits it was made for, and Rust and WGSL agree on layouts.

use std::collections::BTreeSet;
use std::mem::offset_of;

use lamina::gpu::{Access, Caps, Dialect, MatrixUnits, Shader};
use lamina::kernels::sample::{Record, Sampler};
use lamina::kernels::{ALL, Row, Sequence, Span, Split};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ShaderStage, StorageAccess, TypeInner, back};

/// A shader as naga sees it, with where it comes from.
struct Parsed {
    /// Kernel, variant and variant key, for messages.
    what: String,
    /// The caps it was made for.
    caps: Caps,
    kernel: &'static str,
    shader: std::sync::Arc<Shader>,
    module: Module,
    info: ModuleInfo,
}

/// Machines that kernels are made for: the least there is, and those whose features open other paths.
fn machines() -> Vec<Caps> {
    let units = |size, width| Caps::with(MatrixUnits { size, width });
    let apple = Caps { subgroups: Some((4, 64)), matrix_width: Some(32), ..units(8, 32) };
    vec![Caps::portable(), Caps::everything(), Caps::matrices(), apple, units(8, 8), units(16, 16), units(16, 64)]
}

fn capabilities(shader: &Shader) -> Capabilities {
    // unpack2x16float and the like: WebGPU has them with no feature.
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let wants = shader.extensions;
    capabilities.set(Capabilities::SHADER_FLOAT16, wants.f16);
    capabilities.set(Capabilities::SUBGROUP | Capabilities::SUBGROUP_BARRIER, wants.subgroups);
    capabilities.set(Capabilities::COOPERATIVE_MATRIX, wants.cooperative_matrix);
    capabilities
}

fn parse(caps: &Caps, kernel: &'static str, variant: &str, shader: &std::sync::Arc<Shader>) -> Parsed {
    let what = format!("{kernel} {variant}, '{}'", shader.key());
    let text = shader.compose(Dialect::Naga).text;
    let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(&text)));
    let mut validator = Validator::new(ValidationFlags::all(), capabilities(shader));
    validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE);
    validator.subgroup_operations(naga::valid::SubgroupOperationSet::all());
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(&text)));
    Parsed { what, caps: caps.clone(), kernel, shader: shader.clone(), module, info }
}

/// Every shader of every kernel on every machine, each text once.
fn all() -> Vec<Parsed> {
    let mut seen = BTreeSet::new();
    let mut parsed = Vec::new();
    for caps in machines() {
        for kernel in ALL.iter() {
            let shaders = (kernel.shaders)(&caps);
            for (variant, shader) in shaders {
                if seen.insert(shader.key().to_string()) {
                    parsed.push(parse(&caps, kernel.name, variant, &shader));
                }
            }
        }
    }
    parsed
}

/// The shaders that measure ceilings.
fn ceilings() -> Vec<Parsed> {
    let shaders = lamina::bench::ceilings::SHADERS.into_iter().map(|make| make());
    shaders.map(|shader| parse(&Caps::everything(), shader.kernel, "ceiling", &shader)).collect()
}

impl Parsed {
    fn kind(&self) -> lamina::gpu::Extensions {
        self.shader.extensions
    }

    /// True where neither the device nor the browser has to offer anything.
    fn is_portable(&self) -> bool {
        let kind = self.kind();
        !(kind.f16 || kind.subgroups || kind.cooperative_matrix)
    }

    /// Name and size of the workgroup variables that `main` uses.
    fn workgroup_variables(&self) -> Vec<(String, u32)> {
        let main = self.info.get_entry_point(0);
        let used = |(handle, variable): (naga::Handle<naga::GlobalVariable>, &naga::GlobalVariable)| {
            let size = self.module.types[variable.ty].inner.size(self.module.to_ctx());
            let counts = variable.space == AddressSpace::WorkGroup && !main[handle].is_empty();
            counts.then(|| (variable.name.clone().unwrap_or_default(), size))
        };
        self.module.global_variables.iter().filter_map(used).collect()
    }
}

#[test]
fn the_shaders_that_measure_ceilings_parse_and_validate_and_name_their_bindings() {
    for parsed in ceilings() {
        let storage = parsed.module.global_variables.iter().filter(|(_, v)| v.binding.is_some()).count();
        assert_eq!(storage, parsed.shader.bindings().len(), "{}", parsed.kernel);
    }
}

#[test]
fn every_variant_parses_and_validates_and_has_one_entry_point_main() {
    let all = all();
    for kernel in ALL.iter() {
        assert!(all.iter().any(|p| p.kernel == kernel.name), "{} has no variant on any machine", kernel.name);
    }
    for p in all {
        let entries: Vec<_> = p.module.entry_points.iter().map(|e| (e.name.as_str(), e.stage)).collect();
        assert_eq!(entries, [("main", ShaderStage::Compute)], "{}", p.what);
    }
}

#[test]
fn every_variant_translates_to_spir_v_and_msl() {
    for p in all().into_iter().chain(ceilings()) {
        let lang_version = if p.is_portable() { (1, 0) } else { (1, 3) };
        let options = back::spv::Options { lang_version, ..back::spv::Options::default() };
        let words = back::spv::write_vec(&p.module, &p.info, &options, None);
        assert!(words.is_ok_and(|words| !words.is_empty()), "{}: SPIR-V", p.what);
        let lang_version = if p.is_portable() { (2, 0) } else { (2, 4) };
        let options = back::msl::Options { lang_version, ..back::msl::Options::default() };
        let written = back::msl::write_string(&p.module, &p.info, &options, &back::msl::PipelineOptions::default());
        let (text, translation) = written.unwrap_or_else(|e| panic!("{}: MSL: {e}", p.what));
        let names: Vec<_> = translation.entry_point_names.into_iter().collect::<Result<_, _>>().expect("MSL bindings");
        assert!(text.contains(&names[0]), "{}", p.what);
    }
}

/// The pointers that a block stores fragments to.
fn stored(block: &naga::Block, found: &mut Vec<naga::Handle<naga::Expression>>) {
    for statement in block.iter() {
        match statement {
            naga::Statement::CooperativeStore { data, .. } => found.push(data.pointer),
            naga::Statement::Block(block) => stored(block, found),
            naga::Statement::If { accept, reject, .. } => {
                stored(accept, found);
                stored(reject, found);
            }
            naga::Statement::Switch { cases, .. } => cases.iter().for_each(|case| stored(&case.body, found)),
            naga::Statement::Loop { body, continuing, .. } => {
                stored(body, found);
                stored(continuing, found);
            }
            _ => (),
        }
    }
}

#[test]
fn fragments_of_8x8_come_from_scalars_and_go_there_since_metal_takes_no_pointers_to_vectors() {
    let small = |p: &Parsed| p.shader.key().contains("coop_mat8x8");
    let (mut loads, mut stores) = (0, 0);
    for p in all().into_iter().chain(ceilings()).filter(small) {
        let entry = [(&p.module.entry_points[0].function, p.info.get_entry_point(0))];
        let others = p.module.functions.iter().map(|(handle, function)| (function, &p.info[handle]));
        for (function, info) in others.chain(entry) {
            let loaded = function.expressions.iter().filter_map(|(_, expression)| match expression {
                naga::Expression::CooperativeLoad { data, .. } => Some(data.pointer),
                _ => None,
            });
            let mut pointers: Vec<_> = loaded.collect();
            loads += pointers.len();
            stored(&function.body, &mut pointers);
            stores += pointers.len();
            for pointer in pointers {
                let kind = info[pointer].ty.inner_with(&p.module.types);
                let base = kind.pointer_base_type().unwrap_or_else(|| panic!("{}: no pointer", p.what));
                assert!(matches!(base.inner_with(&p.module.types), TypeInner::Scalar(_)), "{}: {kind:?}", p.what);
            }
        }
    }
    assert!(loads > 0 && stores > loads);
}

#[test]
fn every_variant_without_matrix_units_translates_to_hlsl() {
    // DX12 has no cooperative matrices, and naga's HLSL writer panics on them.
    for p in all().iter().filter(|p| !p.kind().cooperative_matrix) {
        // Portable kernels run through Windows' own compiler, which stops at 5.1.
        let shader_model = if p.is_portable() { back::hlsl::ShaderModel::V5_1 } else { back::hlsl::ShaderModel::V6_2 };
        let options = back::hlsl::Options { shader_model, ..back::hlsl::Options::default() };
        let pipeline = back::hlsl::PipelineOptions { entry_point: None };
        let mut text = String::new();
        let written = back::hlsl::Writer::new(&mut text, &options, &pipeline).write(&p.module, &p.info, None);
        written.unwrap_or_else(|e| panic!("{}: HLSL: {e}", p.what));
        assert!(text.contains("main"), "{}", p.what);
    }
}

#[test]
fn every_portable_variant_translates_to_glsl_es_3_1() {
    // GL adapters offer neither f16 nor subgroups nor cooperative matrices.
    for p in all().iter().filter(|p| p.is_portable()) {
        let options = back::glsl::Options {
            version: back::glsl::Version::new_gles(310),
            zero_initialize_workgroup_memory: false,
            ..back::glsl::Options::default()
        };
        let pipeline = back::glsl::PipelineOptions {
            shader_stage: ShaderStage::Compute,
            entry_point: "main".into(),
            multiview: None,
        };
        let (mut text, policies) = (String::new(), naga::proc::BoundsCheckPolicies::default());
        let writer = back::glsl::Writer::new(&mut text, &p.module, &p.info, &options, &pipeline, policies);
        writer.and_then(|mut w| w.write()).unwrap_or_else(|e| panic!("{}: GLSL: {e}", p.what));
        assert!(text.starts_with("#version 310 es"), "{}", p.what);
    }
}

#[test]
fn the_first_variant_of_every_spec_is_portable_and_within_webgpus_defaults() {
    let caps = Caps::portable();
    for kernel in ALL.iter() {
        for (variant, shader) in (kernel.shaders)(&caps) {
            let p = parse(&caps, kernel.name, variant, &shader);
            assert!(p.is_portable(), "{} needs {:?}", p.what, p.kind());
        }
    }
}

#[test]
fn every_variant_keeps_to_the_limits_of_the_machine_it_was_made_for() {
    for p in all() {
        let main = p.info.get_entry_point(0);
        let storage = p.module.global_variables.iter().filter(|(handle, variable)| {
            matches!(variable.space, AddressSpace::Storage { .. }) && !main[*handle].is_empty()
        });
        let storage = storage.count();
        assert!(storage <= 8 && storage as u32 <= p.caps.storage_buffers, "{} binds {storage} buffers", p.what);
        let bytes: u32 = p.workgroup_variables().iter().map(|(_, size)| size).sum();
        assert!(bytes <= p.caps.workgroup_bytes, "{} takes {bytes} of {} bytes", p.what, p.caps.workgroup_bytes);
        let [x, y, z] = p.module.entry_points[0].workgroup_size;
        assert!(x * y * z <= p.caps.invocations && z <= 64, "{} has {x} x {y} x {z} invocations", p.what);
    }
}

#[test]
fn every_workgroup_variable_is_a_multiple_of_16_bytes() {
    // Matrix loads from others gave wrong results on a real driver.
    for p in all() {
        for (name, size) in p.workgroup_variables() {
            assert_eq!(size % 16, 0, "{}: '{name}' has {size} bytes", p.what);
        }
    }
}

#[test]
fn the_bindings_that_the_composer_reads_are_those_that_naga_sees() {
    for p in all() {
        let mut seen = Vec::new();
        for (_, variable) in p.module.global_variables.iter() {
            let access = match variable.space {
                AddressSpace::Uniform => Access::Uniform,
                AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Access::ReadWrite,
                AddressSpace::Storage { .. } => Access::Read,
                _ => continue,
            };
            let binding = variable.binding.unwrap_or_else(|| panic!("{}: a buffer without binding", p.what));
            assert_eq!(binding.group, 0, "{}", p.what);
            seen.push((binding.binding, variable.name.clone().unwrap_or_default(), access));
        }
        let mut read: Vec<_> = p.shader.bindings().iter().map(|d| (d.index, d.name.clone(), d.access)).collect();
        seen.sort_by_key(|(index, ..)| *index);
        read.sort_by_key(|(index, ..)| *index);
        assert_eq!(read, seen, "{}", p.what);
    }
}

#[test]
fn the_head_comment_names_every_constant_and_alias_that_specialises_the_kernel() {
    for p in all() {
        let text = p.shader.compose(Dialect::Naga).text;
        let source = p.shader.parts().last().expect("the kernel file");
        let head: String = source.text.lines().take_while(|line| line.starts_with("//")).collect();
        let words: BTreeSet<&str> = head.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
        let prelude = text.lines().take_while(|l| ["enable ", "const ", "alias "].iter().any(|k| l.starts_with(k)));
        for name in prelude.filter_map(|line| Some(line.split_once(" = ")?.0.split_once(' ')?.1)) {
            assert!(words.contains(name), "shaders/{}.wgsl: its head comment does not name {name}", source.name);
        }
    }
}

/// Name, offset and scalar type of each member of a WGSL struct, and its size.
fn members(module: &Module, name: &str) -> Option<(Vec<(String, usize, &'static str)>, usize)> {
    module.types.iter().find_map(|(_, ty)| {
        let TypeInner::Struct { members, span } = &ty.inner else { return None };
        let member = |m: &naga::StructMember| {
            let kind = match module.types[m.ty].inner {
                TypeInner::Scalar(naga::Scalar::U32) => "u32",
                TypeInner::Scalar(naga::Scalar::I32) => "i32",
                TypeInner::Scalar(naga::Scalar::F32) => "f32",
                TypeInner::Array { .. } => "array",
                _ => "no 4-byte number",
            };
            (m.name.clone().unwrap_or_default(), m.offset as usize, kind)
        };
        (ty.name.as_deref() == Some(name)).then(|| (members.iter().map(member).collect(), *span as usize))
    })
}

#[test]
fn rusts_params_match_the_wgsl_struct_and_fit_the_uniform() {
    for p in all() {
        let params = ALL.iter().find(|e| e.name == p.kernel).expect("from the list").params;
        let rust: Vec<_> = params.iter().map(|f| (f.name.to_string(), f.offset, f.kind)).collect();
        let (wgsl, size) = members(&p.module, "Params").unwrap_or_default();
        assert_eq!(rust, wgsl, "{}: Params in src/kernels/{}.rs and in the shader", p.what, p.kernel);
        assert!(size <= 256, "{}: Params of {size} bytes", p.what);
        let uniform = p.shader.bindings().iter().any(|d| d.access == Access::Uniform);
        assert_eq!(uniform, !rust.is_empty(), "{}: Params and the uniform", p.what);
    }
}

#[test]
fn the_facts_of_sequences_are_laid_out_as_the_shaders_read_them() {
    let text = lamina::wgsl!("lib/batch").text;
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
    macro_rules! same {
        ($name:ident { $($field:ident),* }) => {
            let fields = vec![$((stringify!($field).to_string(), offset_of!($name, $field), "u32"),)*];
            let rust = (fields, size_of::<$name>());
            assert_eq!(Some(rust), members(&module, stringify!($name)), stringify!($name));
        };
    }
    same!(Sequence { position, tokens, first_row, pages, slot, seed, first_partial, splits });
    same!(Row { sequence, position });
    same!(Split { sequence, begin, end, partial });
    same!(Span { sequence, begin, end, row });
}

#[test]
fn samplers_and_records_are_laid_out_as_the_shaders_read_them() {
    let text = lamina::wgsl!("lib/sampler").text;
    let module = naga::front::wgsl::parse_str(text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(text)));
    macro_rules! same {
        ($name:ident { $($field:ident: $kind:literal),* }) => {
            let fields = vec![$((stringify!($field).to_string(), offset_of!($name, $field), $kind),)*];
            let rust = (fields, size_of::<$name>());
            assert_eq!(Some(rust), members(&module, stringify!($name)), stringify!($name));
        };
    }
    same!(Sampler {
        temperature: "f32",
        top_k: "u32",
        top_p: "f32",
        min_p: "f32",
        repetition_penalty: "f32",
        unused: "array"
    });
    same!(Record {
        token: "u32",
        logprob: "f32",
        non_finite: "u32",
        top_tokens: "array",
        top_logprobs: "array",
        unused: "array"
    });
}

/// Browsers have compilers of their own: tests/browser gives these files to Tint, Chromium's.
#[test]
#[ignore = "writes files: LAMINA_SHADERS=FOLDER"]
fn shaders_for_browsers() {
    let folder = std::path::PathBuf::from(std::env::var("LAMINA_SHADERS").expect("LAMINA_SHADERS names a folder"));
    let plain = |parsed: &&Parsed| {
        let wants = parsed.shader.extensions;
        !wants.subgroups && !wants.cooperative_matrix
    };
    for (i, parsed) in all().iter().filter(plain).enumerate() {
        let text = format!("// {}\n{}", parsed.what, parsed.shader.compose(Dialect::Browser).text);
        std::fs::write(folder.join(format!("{}-{i}.wgsl", parsed.kernel)), text).expect("a file can be written");
    }
}
