//! The one handle through which everything else uses a GPU, or the twins in its place.

use std::sync::Arc;
use std::time::Duration;

use super::adapter::{self, Selector};
use super::buffer::{Buffer, View};
use super::caps::Caps;
use super::gpu::Gpu;
use super::host;
use super::options::Options;
use super::recording::Recording;
use super::tuned;
use super::width;
use crate::error::{Error, Result};

/// A GPU, or the `cpu` device: where memory is allocated and recordings run. Clones share it.
#[derive(Clone)]
pub struct Device(Arc<Kind>);

/// What a GPU holds for this process: whoever runs for long wants it not to grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Buffers that were allocated since the device was opened, those that were freed counted too.
    pub allocations: u64,
    /// Cached bind groups.
    pub bind_groups: usize,
    /// Compiled pipelines.
    pub pipelines: usize,
    /// Bytes of all buffers, where the backend counts them.
    pub bytes: Option<u64>,
}

/// A copy to the host that is under way.
pub struct Reading(Read);

enum Read {
    Gpu(super::gpu::Reading),
    Done(Vec<Vec<u8>>),
}

enum Kind {
    Gpu(Box<Gpu>),
    Cpu(Caps),
}

/// What `LAMINA_MATRIX_UNITS` says.
///
/// # Errors
/// [`Error::Usage`] where it is neither.
pub(super) fn switch() -> Result<Option<bool>> {
    match std::env::var("LAMINA_MATRIX_UNITS").unwrap_or_default().as_str() {
        "" => Ok(None),
        "on" => Ok(Some(true)),
        "off" => Ok(Some(false)),
        other => Err(Error::Usage {
            what: "LAMINA_MATRIX_UNITS".into(),
            expected: "on or off".into(),
            found: format!("'{other}'"),
        }),
    }
}

impl Device {
    /// Opens the adapter that `selector` means.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] when no adapter or several answer, or for a `LAMINA_MATRIX_UNITS` that says nothing;
    /// [`crate::Error::Driver`] when the driver refuses.
    pub async fn open(selector: &Selector, options: &Options) -> Result<Device> {
        if *selector == Selector::Cpu {
            return Ok(Device::cpu(options));
        }
        let mut found = adapter::enumerate(options.checked).await;
        let list: Vec<Caps> = found.iter().map(|(_, caps)| caps.clone()).collect();
        match selector.choose(&list)? {
            Some(index) => {
                let (adapter, mut caps) = found.swap_remove(index);
                if options.tuned {
                    caps.tuned = tuned::load(&caps);
                }
                caps.matrix_kernels = switch()?.unwrap_or(options.matrix_units || !caps.is_software());
                let mut device = Device(Arc::new(Kind::Gpu(Box::new(Gpu::open(adapter, caps, options).await?))));
                let width = width::measured(&device).await?;
                if let Some(Kind::Gpu(gpu)) = Arc::get_mut(&mut device.0) {
                    gpu.caps.matrix_width = width;
                }
                Ok(device)
            }
            None => {
                log::warn!("no GPU adapter found: running on the CPU twins (see lamina info)");
                Ok(Device::cpu(options))
            }
        }
    }

    /// The `cpu` device: every kernel's twin.
    pub fn cpu(options: &Options) -> Device {
        let mut caps = Caps::cpu();
        if let Some(bytes) = options.binding_bytes {
            caps.binding_bytes = bytes;
        }
        Device(Arc::new(Kind::Cpu(caps)))
    }

    /// The `cpu` device in the place of an adapter with `caps`: kernels record the variants that they have for
    /// it, and their twins run. For tests.
    pub fn cpu_as(caps: Caps) -> Device {
        Device(Arc::new(Kind::Cpu(caps)))
    }

    /// What it offers.
    pub fn caps(&self) -> &Caps {
        match &*self.0 {
            Kind::Gpu(gpu) => &gpu.caps,
            Kind::Cpu(caps) => caps,
        }
    }

    /// Allocates at least `size` bytes, all zero.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn alloc(&self, size: u64, label: &str) -> Result<Buffer> {
        let size = size.next_multiple_of(16).max(16);
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.alloc(size, label),
            Kind::Cpu(_) => host::alloc(size, label),
        }
    }

    /// As [`Device::alloc`], for memory that kernels bind whole.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], where it is more than one binding shows, too.
    pub fn alloc_bound(&self, size: u64, label: &str) -> Result<Buffer> {
        self.caps().check_bound(size, label)?;
        self.alloc(size, label)
    }

    /// Allocates a buffer that holds `values`.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`Device::write`].
    pub fn upload<T: bytemuck::Pod>(&self, values: &[T], label: &str) -> Result<Buffer> {
        let buffer = self.alloc(size_of_val(values) as u64, label)?;
        self.write(&buffer.view(), 0, values)?;
        Ok(buffer)
    }

    /// Writes `values` to the view from byte `offset` on. Takes effect before what is submitted next.
    /// Writes come in words of 4 bytes: the rest of a last word that the values do not fill is zero.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`] and other faults of the driver.
    ///
    /// # Panics
    /// When the values leave the view, or the offset is no multiple of 4.
    pub fn write<T: bytemuck::Pod>(&self, view: &View, offset: u64, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let end = offset + bytes.len() as u64;
        assert!(end <= view.size(), "{}: {end} bytes written to a view of {}", view.label(), view.size());
        assert!(offset.is_multiple_of(4), "{}: a write at {offset}, not a multiple of 4", view.label());
        let whole = bytes.len() / 4 * 4;
        let (words, rest) = bytes.split_at(whole);
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        let parts = [(offset, words), (offset + whole as u64, &last[..])];
        for (offset, part) in &parts[usize::from(words.is_empty())..1 + usize::from(!rest.is_empty())] {
            match &*self.0 {
                Kind::Gpu(gpu) => gpu.write(view, *offset, part)?,
                Kind::Cpu(_) => host::write(view, *offset, part),
            }
        }
        Ok(())
    }

    /// Copies the first view of each pair to the second, in order, in one submission. Runs after what was
    /// submitted before.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`] and other faults of the driver.
    ///
    /// # Panics
    /// When the sizes of a pair differ, or both are views of one buffer.
    pub fn copy(&self, pairs: &[(View, View)]) -> Result<()> {
        for (from, to) in pairs {
            assert!(from.size() == to.size(), "{} bytes copied to {}", from.size(), to.size());
            assert!(from.buffer.0.id != to.buffer.0.id, "{}: copied within one buffer", from.label());
        }
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.copy(pairs),
            Kind::Cpu(_) => {
                pairs.iter().for_each(|(from, to)| host::write(to, 0, &host::read(from)));
                Ok(())
            }
        }
    }

    /// The views' contents once all that was submitted has run.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`] and other faults of the driver.
    pub async fn read(&self, views: &[View]) -> Result<Vec<Vec<u8>>> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.read(views).await,
            Kind::Cpu(_) => Ok(views.iter().map(host::read).collect()),
        }
    }

    /// Starts to copy the views to the host, as they are after all that was submitted so far. What is
    /// submitted meanwhile does not hold up [`Device::finish`].
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn start_read(&self, views: &[View]) -> Result<Reading> {
        Ok(Reading(match &*self.0 {
            Kind::Gpu(gpu) => Read::Gpu(gpu.start_read(views)?),
            Kind::Cpu(_) => Read::Done(views.iter().map(host::read).collect()),
        }))
    }

    /// The contents of the views of [`Device::start_read`] on the same device.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub async fn finish(&self, reading: Reading) -> Result<Vec<Vec<u8>>> {
        match (&*self.0, reading.0) {
            (Kind::Gpu(gpu), Read::Gpu(reading)) => gpu.finish_read(reading).await,
            (_, Read::Done(bytes)) => Ok(bytes),
            (Kind::Cpu(_), Read::Gpu(_)) => panic!("a read-back is finished on the device that it was started on"),
        }
    }

    /// Compiles what the recording needs: natively in parallel, before it returns; in a browser one pipeline
    /// after the other, while the page goes on.
    ///
    /// # Errors
    /// [`crate::Error::Shader`] with the shader file's line, or [`crate::Error::Driver`].
    pub async fn prepare(&self, recording: &Recording) -> Result<()> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.prepare(recording).await,
            Kind::Cpu(_) => Ok(()),
        }
    }

    /// Submits the recording. On a GPU it returns before it has run.
    ///
    /// # Errors
    /// As [`Device::prepare`], and [`crate::Error::DeviceLost`].
    pub fn submit(&self, recording: &Recording) -> Result<()> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.submit(recording),
            Kind::Cpu(_) => {
                host::run(recording);
                Ok(())
            }
        }
    }

    /// As [`Device::submit`] and [`Device::start_read`], in one submission.
    ///
    /// # Errors
    /// As both.
    pub fn submit_reading(&self, recording: &Recording, views: &[View]) -> Result<Reading> {
        Ok(Reading(match &*self.0 {
            Kind::Gpu(gpu) => Read::Gpu(gpu.submit_reading(recording, views)?),
            Kind::Cpu(_) => {
                host::run(recording);
                Read::Done(views.iter().map(host::read).collect())
            }
        }))
    }

    /// Waits until all that was submitted has run.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`] and other faults of the driver.
    pub fn wait(&self) -> Result<()> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.wait("waiting"),
            Kind::Cpu(_) => Ok(()),
        }
    }

    /// As [`Device::wait`], awaited, in a browser too: the page goes on meanwhile.
    ///
    /// # Errors
    /// As [`Device::wait`].
    pub async fn finished(&self) -> Result<()> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.finished("waiting").await,
            Kind::Cpu(_) => Ok(()),
        }
    }

    /// The driver's faults in what was asked for so far, once it has answered to all of it. A browser answers
    /// by promises: there a fault is told by the next read-back, or here.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::DeviceLost`] and other faults of the driver.
    pub async fn settle(&self) -> Result<()> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.settle().await,
            Kind::Cpu(_) => Ok(()),
        }
    }

    /// Gives the device back to the driver: whatever is asked of it afterwards fails as on a lost device.
    pub fn destroy(&self) {
        if let Kind::Gpu(gpu) = &*self.0 {
            gpu.device.destroy();
        }
    }

    /// What it holds; `None` for the `cpu` device.
    pub fn usage(&self) -> Option<Usage> {
        match &*self.0 {
            Kind::Gpu(gpu) => Some(gpu.usage()),
            Kind::Cpu(_) => None,
        }
    }

    /// Runs the recordings in turn, `times` times, in one submission and times each by the GPU's
    /// clock; `None` where there are no timestamps.
    ///
    /// # Errors
    /// As [`Device::submit`].
    pub async fn time(&self, recordings: &[Recording], times: u32) -> Result<Option<Vec<Duration>>> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.time(recordings, times).await,
            Kind::Cpu(_) => Ok(None),
        }
    }
}
