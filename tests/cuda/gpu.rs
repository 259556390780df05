//! A CUDA device that runs the calls of recordings.

#![allow(unsafe_code, reason = "launching a CUDA kernel is unsafe: its arguments are not checked")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{Ptx, result, sys};
use lamina::gpu::{Access, Call, Grid, Host, Shader};

const COMMON: &str = include_str!("common.cu");
const RECORDS: &str = include_str!("records.cu");
const FOLD: &str = include_str!("fold.cu");
const LINEAR: &str = include_str!("linear.cu");
const ABSORB: &str = include_str!("absorb.cu");
const GEMV: &str = include_str!("gemv.cu");
const MOE_GEMM: &str = include_str!("moe_gemm.cu");
const DECODE: &str = include_str!("mla_decode.cu");

/// The texts of each kernel, behind [`COMMON`].
const KERNELS: [(&str, &[&str]); 27] = [
    ("add", &[include_str!("add.cu")]),
    ("embed", &[include_str!("embed.cu")]),
    ("gemm", &["#define GEMM\n", LINEAR, GEMV]),
    ("gemm_coop", &[LINEAR, GEMV]),
    ("gemv", &[LINEAR, GEMV]),
    ("gqa_append", &[include_str!("gqa_append.cu")]),
    ("gqa_decode", &[include_str!("gqa_decode.cu")]),
    ("mla_absorb", &[ABSORB, include_str!("mla_absorb.cu")]),
    ("mla_append", &[RECORDS, include_str!("mla_append.cu")]),
    ("mla_combine", &[include_str!("mla_combine.cu")]),
    ("mla_decode", &[RECORDS, FOLD, DECODE]),
    ("mla_decode_coop", &["#define COOP\n", RECORDS, FOLD, DECODE]),
    ("mla_decode_fused", &[RECORDS, FOLD, ABSORB, include_str!("mla_decode_fused.cu")]),
    ("mla_gather", &[RECORDS, include_str!("mla_gather.cu")]),
    ("mla_prefill", &[include_str!("mla_prefill.cu")]),
    ("mla_prefill_coop", &["#define COOP\n", include_str!("mla_prefill.cu")]),
    ("moe_combine", &[include_str!("moe_combine.cu")]),
    ("moe_gemm", &[LINEAR, MOE_GEMM]),
    ("moe_gemm_coop", &[LINEAR, MOE_GEMM]),
    ("moe_gemv", &[LINEAR, include_str!("moe_gemv.cu")]),
    ("moe_route", &[include_str!("moe_route.cu")]),
    ("moe_sort", &[include_str!("moe_sort.cu")]),
    ("pack_rows", &[include_str!("pack_rows.cu")]),
    ("rms_norm", &[include_str!("rms_norm.cu")]),
    ("rope", &[include_str!("rope.cu")]),
    ("sample", &[include_str!("sample.cu")]),
    ("swiglu", &[include_str!("swiglu.cu")]),
];

/// Blocks of a launch, of [`THREADS`]: kernels go by stride, so any number serves.
const BLOCKS: u32 = 1056;
/// As in `common.cu`.
const THREADS: u32 = 128;

/// The CUDA text of a kernel.
///
/// # Panics
/// When it has none.
pub fn text(kernel: &str) -> String {
    let texts = KERNELS.iter().find(|(name, _)| *name == kernel);
    let (_, texts) = texts.unwrap_or_else(|| panic!("{kernel} has no CUDA kernel in tests/cuda"));
    [&[COMMON], *texts].concat().join("\n")
}

/// The CUDA text for a shader: the shader's constants that the text names, its modules as macros, the text. What
/// is a Tuning alone is in no text, so that the variants of a shader have the same.
///
/// # Panics
/// When a kernel has none.
pub fn source(shader: &Shader) -> String {
    let text = text(shader.kernel);
    let names = |word: &str| text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word);
    let mut head = String::new();
    for part in shader.key().split(' ').skip(1) {
        match part.split_once('=') {
            Some((name, value)) if names(name) => {
                let kind = match (value.parse::<u32>(), value.parse::<bool>()) {
                    (Ok(_), _) => "unsigned",
                    (_, Ok(_)) => "bool",
                    _ => continue, // a type, which is WGSL's
                };
                head.push_str(&format!("constexpr {kind} {name} = {value};\n"));
            }
            None => {
                // Those for any matrix units compute the same.
                let name = part.strip_suffix("_any").unwrap_or(part).to_uppercase();
                if names(&name) {
                    head.push_str(&format!("#define {name}\n"));
                }
            }
            _ => {}
        }
    }
    head + &text
}

/// CUDA's compiler, found at run time.
#[derive(Clone, Copy)]
pub struct Nvrtc(());

impl Nvrtc {
    /// Looks for the library.
    ///
    /// # Errors
    /// What is missing.
    pub fn open() -> Result<Nvrtc, String> {
        // Sound: loading it runs nothing but its own initialisation.
        if unsafe { sys::is_culib_present() } { Ok(Nvrtc(())) } else { Err("no NVRTC library (libnvrtc)".into()) }
    }

    /// Compiles to machine code, which no driver need translate, for an architecture such as `sm_90`.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(self, source: &str, arch: &str) -> Result<Vec<u8>, String> {
        let text = std::ffi::CString::new(source).expect("a text without zeros");
        let program = result::create_program(&text, None).map_err(|e| format!("NVRTC: {e}"))?;
        // Sound: the program is a live one in each call, and the text outlives it.
        unsafe {
            let options = [format!("--gpu-architecture={arch}"), "--std=c++17".into()];
            let compiled = match result::compile_program(program, &options) {
                Ok(()) => cubin(program),
                Err(error) => {
                    let log = result::get_program_log(program).unwrap_or_default();
                    let log: Vec<u8> = log.iter().map(|c| c.to_ne_bytes()[0]).collect();
                    Err(format!("NVRTC: {error}: {}", String::from_utf8_lossy(&log).trim_end_matches('\0')))
                }
            };
            let _ = result::destroy_program(program);
            compiled
        }
    }
}

/// # Safety
/// The program is compiled and not destroyed.
unsafe fn cubin(program: sys::nvrtcProgram) -> Result<Vec<u8>, String> {
    let mut size = 0;
    let told = |result: sys::nvrtcResult| result.result().map_err(|e| format!("NVRTC: {e}"));
    told(unsafe { sys::nvrtcGetCUBINSize(program, &mut size) })?;
    let mut code = vec![0u8; size];
    told(unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) })?;
    Ok(code)
}

/// `Params`: a kernel takes as many of the bytes as its struct has.
#[repr(C, align(8))]
struct Params([u8; 256]);
unsafe impl DeviceRepr for Params {}

/// The workgroups of the WGSL dispatch.
#[repr(C)]
struct Workgroups([u32; 3]);
unsafe impl DeviceRepr for Workgroups {}

type Compiled = Arc<OnceLock<Result<CudaFunction, String>>>;

/// The first CUDA device, and the kernels compiled for it.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    nvrtc: Nvrtc,
    arch: String,
    name: String,
    functions: Mutex<HashMap<String, Compiled>>,
    /// A kernel, a line of its text, and what stands in its place.
    broken: Option<[&'static str; 3]>,
}

impl Gpu {
    /// Opens the first device.
    ///
    /// # Errors
    /// What is missing.
    pub fn open() -> Result<Gpu, String> {
        // Sound: loading it runs nothing but its own initialisation.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err("no CUDA driver (libcuda)".into());
        }
        let context = CudaContext::new(0).map_err(|e| format!("no CUDA device: {e:?}"))?;
        let nvrtc = Nvrtc::open()?;
        let fault = |e: cudarc::driver::DriverError| format!("the CUDA device does not answer: {e:?}");
        let (major, minor) = context.compute_capability().map_err(fault)?;
        let name = context.name().map_err(fault)?;
        let stream = context.default_stream();
        let (arch, functions) = (format!("sm_{major}{minor}"), Mutex::default());
        Ok(Gpu { context, stream, nvrtc, arch, name, functions, broken: None })
    }

    /// Its name and architecture.
    pub fn label(&self) -> String {
        format!("{}, {}", self.name, self.arch)
    }

    /// The same device with one line of a kernel's text replaced.
    pub fn breaking(&self, kernel: &'static str, line: &'static str, broken: &'static str) -> Gpu {
        let (context, stream) = (self.context.clone(), self.stream.clone());
        let (arch, name, functions) = (self.arch.clone(), self.name.clone(), Mutex::default());
        Gpu { context, stream, nvrtc: self.nvrtc, arch, name, functions, broken: Some([kernel, line, broken]) }
    }

    /// Puts CUDA in the place of a call's twin.
    pub fn take(self: &Arc<Gpu>, call: &mut Call) {
        let (gpu, shader, params) = (self.clone(), call.shader.clone(), call.params.clone());
        let Grid::Direct(grid) = call.grid else { panic!("{}: its grid is known on the device alone", shader.kernel) };
        call.twin = Arc::new(move |host: &Host| {
            if let Err(fault) = gpu.run(&shader, &params, grid, host) {
                panic!("{}: {fault}", shader.kernel);
            }
        });
    }

    /// Uploads the bindings, runs the kernel, and brings back what it may have written.
    fn run(&self, shader: &Shader, params: &[u8], grid: [u32; 3], host: &Host) -> Result<(), String> {
        let function = self.function(shader)?;
        let fault = |e: cudarc::driver::DriverError| format!("{e:?}");
        let bindings: Vec<_> = shader.bindings().iter().filter(|b| b.access != Access::Uniform).collect();
        let upload = |name: &str| self.stream.clone_htod(&host.get::<u8>(name)[..]).map_err(fault);
        let memory: Vec<CudaSlice<u8>> = bindings.iter().map(|b| upload(&b.name)).collect::<Result<_, _>>()?;
        let mut bytes = Params([0; 256]);
        bytes.0[..params.len()].copy_from_slice(params);
        let workgroups = Workgroups(grid);
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&bytes).arg(&workgroups);
        memory.iter().for_each(|buffer| {
            launch.arg(buffer);
        });
        let config = LaunchConfig { grid_dim: (BLOCKS, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // Sound where the kernel takes what its shader declares, in that order: what these tests are for.
        unsafe { launch.launch(config) }.map_err(fault)?;
        for (binding, buffer) in bindings.iter().zip(&memory).filter(|(b, _)| b.access == Access::ReadWrite) {
            let bytes = self.stream.clone_dtoh(buffer).map_err(fault)?;
            self.stream.synchronize().map_err(fault)?;
            host.set(&binding.name, 0, &bytes);
        }
        Ok(())
    }

    fn function(&self, shader: &Shader) -> Result<CudaFunction, String> {
        let mut text = source(shader);
        if let Some([_, line, broken]) = self.broken.filter(|[kernel, ..]| *kernel == shader.kernel) {
            assert!(text.contains(line), "{} has no line {line:?}", shader.kernel);
            text = text.replacen(line, broken, 1);
        }
        let slot = self.functions.lock().expect("no panic under this lock").entry(text.clone()).or_default().clone();
        let made = slot.get_or_init(|| {
            let fault = |e: cudarc::driver::DriverError| format!("{e:?}");
            let code = self.nvrtc.compile(&text, &self.arch)?;
            let module = self.context.load_module(Ptx::from_binary(code)).map_err(fault)?;
            module.load_function(shader.kernel).map_err(fault)
        });
        made.clone()
    }
}
