//! Compiled kernels, by variant key.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

#[cfg(not(target_arch = "wasm32"))]
use rayon::prelude::*;

use super::caps::Caps;
use super::compose::{Access, Declared, Dialect, Shader};
use super::gpu::Scopes;
use super::kept;
use super::options::Options;
use crate::error::{Error, Result};

/// Largest cache that is read from disk, bytes.
const DISK_CACHE: usize = 64 << 20;

/// A compiled kernel.
pub(super) struct Pipeline {
    /// Unique in its device, for the bind group cache.
    pub id: usize,
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    pub bindings: Vec<Declared>,
}

/// The pipelines of one device, and their cache on disk where the driver has one.
pub(super) struct Pipelines {
    device: wgpu::Device,
    adapter: String,
    /// GL has one context for all threads, and wgpu gives up on one that waits 6 s for it.
    #[cfg(not(target_arch = "wasm32"))]
    parallel: bool,
    /// Out-of-bounds accesses are defined; off where the shaders' own tests have run.
    checked: bool,
    /// Workgroup memory is cleared.
    zeroed: bool,
    /// The adapter takes SPIR-V.
    #[cfg_attr(any(target_arch = "wasm32", target_vendor = "apple"), allow(dead_code, reason = "none does there"))]
    spirv: bool,
    made: Mutex<HashMap<String, Arc<Pipeline>>>,
    disk: Option<(wgpu::PipelineCache, PathBuf)>,
}

impl Pipelines {
    pub fn new(device: &wgpu::Device, caps: &Caps, info: &wgpu::AdapterInfo, options: &Options) -> Pipelines {
        let disk = if caps.pipeline_cache { disk_cache(device, info) } else { None };
        Pipelines {
            device: device.clone(),
            adapter: caps.label(),
            #[cfg(not(target_arch = "wasm32"))]
            parallel: caps.backend != "gl",
            checked: options.checked,
            zeroed: options.zeroed,
            spirv: caps.backend == "vulkan" && device.features().contains(wgpu::Features::PASSTHROUGH_SHADERS),
            made: Mutex::default(),
            disk,
        }
    }

    /// How many were compiled.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// The pipeline of a shader, compiled if it is new.
    pub fn get(&self, shader: &Shader) -> Result<Arc<Pipeline>> {
        if let Some(made) = self.lock().get(shader.key()) {
            return Ok(made.clone());
        }
        let compiled = self.compile(shader)?;
        Ok(self.keep(shader, compiled))
    }

    fn keep(&self, shader: &Shader, compiled: Pipeline) -> Arc<Pipeline> {
        let mut made = self.lock();
        let id = made.len();
        let entry = made.entry(shader.key().to_string());
        entry.or_insert_with(|| Arc::new(Pipeline { id, ..compiled })).clone()
    }

    /// Compiles all of them, one after the other: a browser answers each by a promise, and shows its page meanwhile.
    #[cfg(target_arch = "wasm32")]
    pub async fn prepare(&self, shaders: impl Iterator<Item = &Arc<Shader>>) -> Result<()> {
        for shader in shaders {
            if self.lock().contains_key(shader.key()) {
                continue;
            }
            let composed = shader.compose(Dialect::HERE);
            let scopes = Scopes::awaited(&self.device);
            let (module, compiled) = self.create(shader, &composed);
            if let Some(error) = scopes.settled().await {
                return Err(self.explain(shader, &composed, &module, error).await);
            }
            self.keep(shader, compiled);
        }
        Ok(())
    }

    /// Compiles all of them on all cores, and keeps what is new on disk.
    #[cfg(not(target_arch = "wasm32"))]
    pub async fn prepare<'a>(&self, shaders: impl Iterator<Item = &'a Arc<Shader>>) -> Result<()> {
        let mut new: HashMap<&str, &Shader> = shaders.map(|shader| (shader.key(), &**shader)).collect();
        new.retain(|key, _| !self.lock().contains_key(*key));
        let compile = |shader: &Shader| self.get(shader).map(drop);
        match self.parallel {
            true => new.par_iter().try_for_each(|(_, shader)| compile(shader))?,
            false => new.values().try_for_each(|shader| compile(shader))?,
        }
        if !new.is_empty() {
            self.save();
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Pipeline>>> {
        self.made.lock().expect("nothing panics while it holds this lock")
    }

    fn compile(&self, shader: &Shader) -> Result<Pipeline> {
        let started = web_time::Instant::now();
        let composed = shader.compose(Dialect::HERE);
        let scopes = Scopes::push(&self.device);
        let (module, compiled) = self.create(shader, &composed);
        if let Some(error) = scopes.pop() {
            return Err(pollster::block_on(self.explain(shader, &composed, &module, error)));
        }
        log::debug!("compiled {} in {:?}", shader.key(), started.elapsed());
        Ok(compiled)
    }

    /// Asks the driver for a pipeline; faults go to the error scopes.
    #[allow(unsafe_code, reason = "wgpu marks shaders without run-time checks unsafe; ours are tested with them")]
    fn create(&self, shader: &Shader, composed: &super::compose::Composed) -> (wgpu::ShaderModule, Pipeline) {
        let desc = wgpu::ShaderModuleDescriptor {
            label: Some(shader.key()),
            source: wgpu::ShaderSource::Wgsl(composed.text.as_str().into()),
        };
        let checks =
            if self.checked { wgpu::ShaderRuntimeChecks::checked() } else { wgpu::ShaderRuntimeChecks::unchecked() };
        // SAFETY: the kernels keep to their bindings and end their loops; every variant runs in the
        // tests with checks on.
        let usual = || unsafe { self.device.create_shader_module_trusted(desc, checks) };
        let module = self.rolled(shader, &composed.text).unwrap_or_else(usual);
        let bindings = shader.bindings().to_vec();
        let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(shader.kernel),
            entries: &bindings.iter().map(layout_entry).collect::<Vec<_>>(),
        });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(shader.kernel),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(shader.key()),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[],
                // Kernels write workgroup memory before they read it; clearing it costs llvmpipe a
                // minute a pipeline.
                zero_initialize_workgroup_memory: self.zeroed,
            },
            cache: self.disk.as_ref().map(|(cache, _)| cache),
        });
        (module, Pipeline { id: 0, pipeline, layout, bindings })
    }

    /// The module of a shader whose loops are to stay as they are, where the adapter takes SPIR-V.
    #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
    fn rolled(&self, shader: &Shader, text: &str) -> Option<wgpu::ShaderModule> {
        let wanted = self.spirv && shader.extensions.rolled;
        wanted.then(|| super::spirv::rolled(&self.device, shader, text, self.checked)).flatten()
    }

    #[cfg(any(target_arch = "wasm32", target_vendor = "apple"))]
    fn rolled(&self, _: &Shader, _: &str) -> Option<wgpu::ShaderModule> {
        None
    }

    /// The compiler's message with the shader file's own line.
    async fn explain(
        &self,
        shader: &Shader,
        composed: &super::compose::Composed,
        module: &wgpu::ShaderModule,
        error: wgpu::Error,
    ) -> Error {
        let info = module.get_compilation_info().await;
        let fault = info.messages.iter().find(|m| m.message_type == wgpu::CompilationMessageType::Error);
        let (line, message) = match fault {
            Some(m) => (m.location.map_or(1, |l| l.line_number as usize), m.message.trim().to_string()),
            None => {
                return Error::Driver {
                    adapter: self.adapter.clone(),
                    asked: format!("the pipeline '{}'", shader.key()),
                    found: error.to_string(),
                };
            }
        };
        let (file, line) = composed.locate(line);
        Error::Shader { adapter: self.adapter.clone(), file: file.to_string(), line, message }
    }

    /// Writes the driver's cache to disk. A failure costs only time at the next start.
    #[cfg(not(target_arch = "wasm32"))]
    fn save(&self) {
        let Some((cache, path)) = &self.disk else { return };
        let Some(data) = cache.get_data() else { return };
        match kept::write(path, &data) {
            Ok(()) => log::debug!("wrote {} bytes of pipelines to {}", data.len(), path.display()),
            Err(error) => log::warn!("cannot keep compiled pipelines in {}: {error}", path.display()),
        }
    }
}

/// The on-disk pipeline cache of this adapter and driver.
fn disk_cache(device: &wgpu::Device, info: &wgpu::AdapterInfo) -> Option<(wgpu::PipelineCache, PathBuf)> {
    let name = wgpu::util::pipeline_cache_key(info)?;
    let path = kept::folder()?.join(name);
    Some((load(device, &path), path))
}

/// The cache that a file holds; an empty one where there is none or it does not fit.
#[allow(unsafe_code, reason = "wgpu marks cache data from disk unsafe: a driver trusts it")]
fn load(device: &wgpu::Device, path: &Path) -> wgpu::PipelineCache {
    // Shaders of all versions gather in it: one that has grown too large is begun anew.
    let data = std::fs::read(path).ok().filter(|data| data.len() <= DISK_CACHE);
    // SAFETY: the file is one that `get_data` gave; its header names the adapter and driver, and with
    // `fallback` a file that does not fit them is ignored.
    unsafe {
        device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
            label: Some("lamina"),
            data: data.as_deref(),
            fallback: true,
        })
    }
}

fn layout_entry(declared: &Declared) -> wgpu::BindGroupLayoutEntry {
    let (ty, has_dynamic_offset) = match declared.access {
        Access::Uniform => (wgpu::BufferBindingType::Uniform, true),
        Access::Read => (wgpu::BufferBindingType::Storage { read_only: true }, false),
        Access::ReadWrite => (wgpu::BufferBindingType::Storage { read_only: false }, false),
    };
    wgpu::BindGroupLayoutEntry {
        binding: declared.index,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: None },
        count: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::gpu::tests::{TOUCH, gpus, touch};
    use crate::gpu::{Recording, grid_1d};

    #[test]
    fn variants_are_compiled_in_parallel_and_each_once() {
        for mut gpu in gpus() {
            // The user's cache is no place for this shader.
            gpu.pipelines.disk = None;
            let y = gpu.alloc(16, "y").unwrap();
            let mut recording = Recording::new();
            for n in (0..24).chain(0..24) {
                let shader = Shader::of(TOUCH).u32("SPARE", n).build();
                recording.call(&shader, vec![("y", y.view())], &[], grid_1d(1), |_| {});
            }
            pollster::block_on(gpu.prepare(&recording)).unwrap();
            let ids = |made: &HashMap<String, Arc<Pipeline>>| {
                let mut ids: Vec<usize> = made.values().map(|pipeline| pipeline.id).collect();
                ids.sort_unstable();
                ids
            };
            assert_eq!(ids(&gpu.pipelines.lock()), (0..24).collect::<Vec<_>>(), "{}", gpu.caps.label());
            gpu.submit(&recording).unwrap();
            assert_eq!(gpu.pipelines.lock().len(), 24, "and submitting compiles nothing more");
        }
    }

    #[test]
    fn pipelines_are_kept_on_disk_and_a_spoilt_file_is_as_good_as_none() {
        let folder = std::env::temp_dir().join(format!("lamina-pipelines-{}", std::process::id()));
        let path = folder.join("cache");
        let mut kept = 0;
        for mut gpu in gpus().into_iter().filter(|gpu| gpu.caps.pipeline_cache) {
            let mut prepare = |label: &str| {
                gpu.pipelines.made = Mutex::default();
                gpu.pipelines.disk = Some((load(&gpu.device, &path), path.clone()));
                let y = gpu.alloc(16, "y").unwrap();
                pollster::block_on(gpu.prepare(&touch(&y))).unwrap_or_else(|error| panic!("{label}: {error}"));
                gpu.submit(&touch(&y)).unwrap();
                assert_eq!(pollster::block_on(gpu.read(&[y.view()])).unwrap()[0][..4], [7, 0, 0, 0], "{label}");
                std::fs::read(&path).unwrap_or_else(|error| panic!("{label}: {error}"))
            };
            let first = prepare("with no file");
            assert!(!first.is_empty());
            prepare("with a file");
            std::fs::write(&path, b"no pipelines at all").unwrap();
            let again = prepare("with a spoilt file");
            assert_ne!(again, b"no pipelines at all");
            let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["cache"], "no part is left behind");
            std::fs::remove_dir_all(&folder).unwrap();
            kept += 1;
        }
        assert!(kept > 0, "no adapter here keeps pipelines: tests/run installs one");
    }
}
