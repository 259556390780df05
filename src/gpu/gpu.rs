//! An opened adapter: memory, read-back, and the errors of the driver.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use futures::channel::oneshot;
#[cfg(target_arch = "wasm32")]
use futures::future::{Either, select};

use super::buffer::{Buffer, Place, View};
use super::caps::Caps;
use super::device::Usage;
use super::options::Options;
use super::pipelines::Pipelines;
use super::recorder::Recorder;
use crate::error::{Error, Result};

/// Uploads queue up in host memory until the next submission; past this many bytes one is made for them.
const PENDING_UPLOADS: u64 = 256 << 20;

/// What wgpu found wrong.
struct Fault {
    /// Out of memory.
    memory: bool,
    text: String,
}

impl From<wgpu::Error> for Fault {
    fn from(error: wgpu::Error) -> Fault {
        Fault { memory: matches!(error, wgpu::Error::OutOfMemory { .. }), text: error.to_string() }
    }
}

/// An opened GPU.
pub(super) struct Gpu {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub caps: Caps,
    pub pipelines: Pipelines,
    pub recorder: Mutex<Recorder>,
    /// Buffers that were allocated.
    pub allocations: AtomicU64,
    /// Bytes written since the last submission, about.
    pub pending: AtomicU64,
    /// The driver's reason, once the device is lost.
    lost: Arc<Mutex<Option<String>>>,
    /// Errors that no scope caught.
    stray: Arc<Mutex<Option<Fault>>>,
}

impl Gpu {
    /// Opens the adapter with all that it offers.
    #[allow(unsafe_code, reason = "wgpu asks for it before experimental features (cooperative matrices)")]
    pub async fn open(adapter: wgpu::Adapter, mut caps: Caps, options: &Options) -> Result<Gpu> {
        let wanted = wgpu::Features::SHADER_F16
            | wgpu::Features::SUBGROUP
            | wgpu::Features::SUBGROUP_BARRIER
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::PIPELINE_CACHE
            | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            | wgpu::Features::PASSTHROUGH_SHADERS;
        let mut limits = adapter.limits();
        if let Some(bytes) = options.binding_bytes {
            caps.binding_bytes = caps.binding_bytes.min(bytes);
        }
        limits.max_storage_buffer_binding_size = caps.binding_bytes;
        let request = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("lamina"),
            required_features: adapter.features() & wanted,
            required_limits: limits,
            // SAFETY: cooperative matrix kernels are tried against their twins before they are chosen.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            memory_hints: wgpu::MemoryHints::Performance,
            trace: wgpu::Trace::Off,
        });
        let (device, queue) = request.await.map_err(|error| Error::Driver {
            adapter: caps.label(),
            asked: "opening the device".into(),
            found: error.to_string(),
        })?;
        let (lost, stray) = (Arc::<Mutex<Option<String>>>::default(), Arc::<Mutex<Option<Fault>>>::default());
        let note = lost.clone();
        device.set_device_lost_callback(move |reason, message| {
            *note.lock().expect("a plain store") = Some(format!("{reason:?}: {message}"));
        });
        let note = stray.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            log::error!("{error}");
            note.lock().expect("a plain store").get_or_insert(error.into());
        }));
        let pipelines = Pipelines::new(&device, &caps, &adapter.get_info(), options);
        let recorder = Mutex::new(Recorder::new(&device));
        let (allocations, pending) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Gpu { device, queue, caps, pipelines, recorder, allocations, pending, lost, stray })
    }

    /// Allocates `size` bytes. The contents are zeros.
    pub fn alloc(&self, size: u64, label: &str) -> Result<Buffer> {
        let out_of_memory = |offered: String| Error::OutOfMemory {
            adapter: self.caps.label(),
            asked: format!("{size} bytes for {label}"),
            offered,
        };
        if size > self.caps.buffer_bytes {
            return Err(out_of_memory(format!("a buffer holds at most {} bytes", self.caps.buffer_bytes)));
        }
        let scopes = Scopes::push(&self.device);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::INDIRECT
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        match scopes.pop() {
            Some(wgpu::Error::OutOfMemory { .. }) => Err(out_of_memory("the driver has no such block left".into())),
            error => {
                self.explain("an allocation", error)?;
                self.allocations.fetch_add(1, Ordering::Relaxed);
                Ok(Buffer::new(size, label, Place::Gpu(buffer)))
            }
        }
    }

    pub fn write(&self, view: &View, offset: u64, bytes: &[u8]) -> Result<()> {
        let scopes = Scopes::push(&self.device);
        self.queue.write_buffer(gpu_buffer(view), view.offset + offset, bytes);
        self.explain("an upload", scopes.pop())?;
        let size = bytes.len() as u64;
        if self.pending.fetch_add(size, Ordering::Relaxed) + size > PENDING_UPLOADS {
            self.pending.store(0, Ordering::Relaxed);
            self.queue.submit([]);
            self.wait("an upload")?;
        }
        Ok(())
    }

    /// Copies the first view of each pair to the second.
    pub fn copy(&self, pairs: &[(View, View)]) -> Result<()> {
        let scopes = Scopes::push(&self.device);
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        for (from, to) in pairs {
            encoder.copy_buffer_to_buffer(gpu_buffer(from), from.offset, gpu_buffer(to), to.offset, from.size);
        }
        self.queue.submit([encoder.finish()]);
        self.explain("a copy", scopes.pop())
    }

    /// Starts to copy the views to the host, in one submission, behind all that was submitted before.
    pub fn start_read(&self, views: &[View]) -> Result<Reading> {
        let scopes = Scopes::push(&self.device);
        let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let copies = Copies::encode(&self.device, &mut encoder, views);
        let submission = self.queue.submit([encoder.finish()]);
        self.reading(copies, submission, scopes.pop())
    }

    /// The submitted copies, where nothing was `caught`.
    pub fn reading(
        &self,
        copies: Copies,
        submission: wgpu::SubmissionIndex,
        caught: Option<wgpu::Error>,
    ) -> Result<Reading> {
        let Copies { staging, sizes, asked } = copies;
        let (done, mapped) = oneshot::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            // The receiver is gone only when the caller has stopped waiting.
            let _ = done.send(result);
        });
        self.explain(&asked, caught)?;
        Ok(Reading { staging, sizes, asked, submission, mapped })
    }

    /// What was copied, once the GPU has got there.
    pub async fn finish_read(&self, reading: Reading) -> Result<Vec<Vec<u8>>> {
        let Reading { staging, sizes, asked, submission, mapped } = reading;
        self.wait_for(&asked, Some(submission))?;
        let answer = self.answer(mapped).await;
        if !matches!(answer, Ok(Ok(()))) {
            // A browser tells a loss by another promise.
            #[cfg(target_arch = "wasm32")]
            for _ in 0..40 {
                if self.lost.lock().expect("a plain store").is_some() {
                    break;
                }
                super::browser::pause(25).await;
            }
            self.explain(&asked, None)?;
            return Err(self.driver(&asked, format!("{answer:?}")));
        }
        if cfg!(target_arch = "wasm32") {
            self.explain(&asked, None)?;
        }
        let mapped = staging.get_mapped_range(..).map_err(|e| self.driver(&asked, e.to_string()))?;
        let mut at = 0;
        let mut read = Vec::with_capacity(sizes.len());
        for size in sizes {
            read.push(mapped[at as usize..(at + size) as usize].to_vec());
            at += size.next_multiple_of(8);
        }
        Ok(read)
    }

    /// Copies the views to the host and waits for it.
    pub async fn read(&self, views: &[View]) -> Result<Vec<Vec<u8>>> {
        let reading = self.start_read(views)?;
        self.finish_read(reading).await
    }

    /// Waits for the driver's answers, and tells its faults.
    pub async fn settle(&self) -> Result<()> {
        let scopes = Scopes::awaited(&self.device);
        let probe = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("the last of what was asked for"),
            size: 16,
            usage: wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let caught = scopes.settled().await;
        probe.destroy();
        self.explain("allocations and uploads", caught)
    }

    /// Waits until the GPU has done all that was submitted. In a browser the event loop does that.
    pub fn wait(&self, asked: &str) -> Result<()> {
        self.wait_for(asked, None)
    }

    /// As [`Gpu::wait`], awaited: a browser's page goes on meanwhile.
    pub async fn finished(&self, asked: &str) -> Result<()> {
        if !cfg!(target_arch = "wasm32") {
            return self.wait(asked);
        }
        let (done, finished) = oneshot::channel();
        self.queue.on_submitted_work_done(move || {
            // The receiver is gone only when the caller has stopped waiting.
            let _ = done.send(());
        });
        let _ = self.answer(finished).await; // a lost device drops the sender: it is explained below
        self.explain(asked, None)
    }

    /// What a callback of the driver tells, of work that was submitted.
    async fn answer<T>(&self, told: oneshot::Receiver<T>) -> std::result::Result<T, oneshot::Canceled> {
        #[cfg(target_arch = "wasm32")]
        return self.looking(told).await;
        #[cfg(not(target_arch = "wasm32"))]
        told.await
    }

    /// Firefox looks for work that is done when something is submitted, else ten times a second: empty submissions make
    /// it look, each after a tenth of the time that was waited.
    #[cfg(target_arch = "wasm32")]
    async fn looking<T>(&self, mut told: oneshot::Receiver<T>) -> std::result::Result<T, oneshot::Canceled> {
        let started = web_time::Instant::now();
        loop {
            let milliseconds = (started.elapsed().as_millis() / 10).clamp(1, 50) as u32;
            match select(told, std::pin::pin!(super::browser::pause(milliseconds))).await {
                Either::Left((answer, _)) => return answer,
                Either::Right(((), waiting)) => told = waiting,
            }
            self.queue.submit([]);
        }
    }

    /// Waits for one submission and those before it; for all of them where none is named.
    fn wait_for(&self, asked: &str, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        if cfg!(target_arch = "wasm32") {
            return Ok(());
        }
        let polled = self.device.poll(wgpu::PollType::Wait { submission_index, timeout: None });
        self.explain(asked, None)?;
        polled.map(drop).map_err(|error| self.driver(asked, error.to_string()))
    }

    /// An error that a scope caught, a lost device, or a stray error, as lamina's error.
    pub fn explain(&self, asked: &str, caught: Option<wgpu::Error>) -> Result<()> {
        let caught = caught.map(Fault::from).or_else(|| self.stray.lock().expect("a plain store").take());
        if caught.is_some() {
            // A loss may be told only now, after the faults that follow from it.
            let timeout = Some(std::time::Duration::from_secs(1));
            let _ = self.device.poll(wgpu::PollType::Wait { submission_index: None, timeout });
        }
        if let Some(found) = self.lost.lock().expect("a plain store").clone() {
            return Err(Error::DeviceLost { adapter: self.caps.label(), asked: asked.into(), found });
        }
        match caught {
            None => Ok(()),
            Some(Fault { memory: true, text }) => Err(Error::OutOfMemory {
                adapter: self.caps.label(),
                asked: asked.into(),
                offered: format!("the driver said: {text}"),
            }),
            Some(Fault { text, .. }) => Err(self.driver(asked, text)),
        }
    }

    pub fn usage(&self) -> Usage {
        Usage {
            allocations: self.allocations.load(Ordering::Relaxed),
            bind_groups: self.recorder.lock().expect("a panic in it is a fault of lamina").groups(),
            pipelines: self.pipelines.count(),
            bytes: self.device.generate_allocator_report().map(|report| report.total_allocated_bytes),
        }
    }

    pub fn driver(&self, asked: &str, found: String) -> Error {
        Error::Driver { adapter: self.caps.label(), asked: asked.into(), found }
    }
}

/// Copies of views to a buffer that the host can map, encoded.
pub(super) struct Copies {
    staging: wgpu::Buffer,
    sizes: Vec<u64>,
    asked: String,
}

impl Copies {
    pub fn encode(device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder, views: &[View]) -> Copies {
        let sizes: Vec<u64> = views.iter().map(|v| v.size).collect();
        let total: u64 = sizes.iter().map(|size| size.next_multiple_of(8)).sum();
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("read-back"),
            size: total.max(8),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut at = 0;
        for view in views.iter().filter(|view| view.size > 0) {
            encoder.copy_buffer_to_buffer(gpu_buffer(view), view.offset, &staging, at, view.size);
            at += view.size.next_multiple_of(8);
        }
        Copies { staging, sizes, asked: format!("a read-back of {total} bytes") }
    }
}

/// A copy to the host that is under way.
pub(super) struct Reading {
    staging: wgpu::Buffer,
    sizes: Vec<u64>,
    asked: String,
    submission: wgpu::SubmissionIndex,
    mapped: oneshot::Receiver<std::result::Result<(), wgpu::BufferAsyncError>>,
}

pub(super) fn gpu_buffer(view: &View) -> &wgpu::Buffer {
    match &view.buffer.0.place {
        Place::Gpu(buffer) => buffer,
        Place::Host(_) => panic!("{}: this buffer is the cpu device's, not a GPU's", view.label()),
    }
}

/// Error scopes around a piece of work on this thread.
pub(super) struct Scopes(Option<Guards>);

struct Guards {
    // In this order, since fields are dropped in it and wgpu wants the last scope popped first.
    internal: wgpu::ErrorScopeGuard,
    memory: wgpu::ErrorScopeGuard,
    validation: wgpu::ErrorScopeGuard,
}

impl Scopes {
    /// Scopes that are asked at once. In a browser there are none: each answers by a promise, and nobody may
    /// wait for one there, so that faults become stray ones, which the next read-back tells.
    pub fn push(device: &wgpu::Device) -> Scopes {
        if cfg!(target_arch = "wasm32") { Scopes(None) } else { Scopes::awaited(device) }
    }

    /// Scopes whose answer is awaited.
    pub fn awaited(device: &wgpu::Device) -> Scopes {
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        Scopes(Some(Guards { internal, memory, validation }))
    }

    /// The first error since [`Scopes::push`], out of memory before all others. Natively each answers at once.
    pub fn pop(self) -> Option<wgpu::Error> {
        if self.0.is_some() { pollster::block_on(self.settled()) } else { None }
    }

    /// As [`Scopes::pop`], awaited.
    pub async fn settled(self) -> Option<wgpu::Error> {
        let Guards { internal, memory, validation } = self.0?;
        // All are popped before one is awaited: what others do meanwhile stands in no scope of this.
        let (internal, memory, validation) = (internal.pop(), memory.pop(), validation.pop());
        let internal = internal.await;
        memory.await.or(validation.await).or(internal)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::gpu::{Recording, Shader, Source, adapter, grid_1d};

    pub const TOUCH: Source = Source {
        name: "touch",
        text: "@group(0) @binding(0) var<storage, read_write> y: array<u32>;\n\
               @compute @workgroup_size(1) fn main() { y[0] = 7u; }\n",
    };

    /// Every adapter, opened.
    pub fn gpus() -> Vec<Gpu> {
        let options = Options { checked: true, ..Options::default() };
        let open = |(adapter, caps)| pollster::block_on(Gpu::open(adapter, caps, &options)).expect("the adapter opens");
        let gpus: Vec<Gpu> = pollster::block_on(adapter::enumerate(true)).into_iter().map(open).collect();
        assert!(!gpus.is_empty(), "no GPU adapter on this machine: tests/run installs software ones");
        gpus
    }

    pub fn touch(buffer: &Buffer) -> Recording {
        let mut recording = Recording::new();
        recording.call(&Shader::of(TOUCH).build(), vec![("y", buffer.view())], &[], grid_1d(1), |_| {});
        recording
    }

    #[test]
    fn a_lost_device_is_an_error_that_says_so_wherever_it_shows() {
        for gpu in gpus() {
            let buffer = gpu.alloc(16, "y").unwrap();
            let recording = touch(&buffer);
            gpu.submit(&recording).unwrap();
            gpu.device.destroy();
            let lost = |result: Result<()>, asked: &str| {
                let error = result.expect_err(asked);
                assert!(matches!(error, Error::DeviceLost { .. }), "{asked}: {error}");
                let text = error.to_string();
                assert!(text.contains(&gpu.caps.label()) && text.contains("device was lost during"), "{text}");
            };
            lost(pollster::block_on(gpu.read(&[buffer.view()])).map(drop), "read");
            lost(gpu.submit(&recording), "submit");
            lost(gpu.write(&buffer.view(), 0, &[0; 4]), "write");
            lost(gpu.alloc(16, "x").map(drop), "alloc");
            lost(gpu.wait("wait"), "wait");
        }
    }

    #[test]
    fn a_freed_buffer_s_memory_and_bind_groups_go_with_it() {
        for gpu in gpus() {
            let groups = || gpu.recorder.lock().unwrap().groups();
            let allocated = || {
                gpu.wait("waiting").unwrap();
                gpu.device.generate_allocator_report().map(|report| report.total_allocated_bytes)
            };
            let keep = gpu.alloc(16, "kept").unwrap();
            gpu.submit(&touch(&keep)).unwrap();
            let before = allocated();
            for _ in 0..300 {
                let buffer = gpu.alloc(1 << 20, "short-lived").unwrap();
                gpu.submit(&touch(&buffer)).unwrap();
                gpu.submit(&touch(&buffer)).unwrap();
                assert!(groups() <= 256, "{} groups on {}", groups(), gpu.caps.label());
            }
            if let (Some(before), Some(after)) = (before, allocated()) {
                assert!(after < before + (4 << 20), "{before} bytes before and {after} after, on {}", gpu.caps.label());
            }
        }
    }

    #[test]
    fn uploads_beyond_the_pending_limit_are_submitted_on_the_way() {
        let gpu = gpus().remove(0);
        let buffer = gpu.alloc(64 << 20, "weights").unwrap();
        let block = vec![1u8; 64 << 20];
        for turn in 1..=5 {
            gpu.write(&buffer.view(), 0, &block).unwrap();
            let pending = gpu.pending.load(Ordering::Relaxed);
            assert_eq!(pending, if turn == 5 { 0 } else { turn << 26 }, "turn {turn}");
        }
        let read = pollster::block_on(gpu.read(&[buffer.slice((64 << 20) - 256, 256)])).unwrap();
        assert_eq!(read[0], [1; 256]);
    }
}
