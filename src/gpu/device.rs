//! The one handle through which everything else uses a GPU, or the twins in its place.

use std::sync::Arc;
use std::time::Duration;

use super::adapter::{self, Selector};
use super::buffer::{Buffer, View};
use super::caps::Caps;
use super::gpu::{Gpu, Options};
use super::host;
use super::recording::Recording;
use crate::error::Result;

/// A GPU, or the `cpu` device: where memory is allocated and recordings run. Clones share it.
#[derive(Clone)]
pub struct Device(Arc<Kind>);

enum Kind {
    Gpu(Box<Gpu>),
    Cpu(Caps),
}

impl Device {
    /// Opens the adapter that `selector` means.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] when no adapter or several answer, [`crate::Error::Driver`] when
    /// the driver refuses.
    pub async fn open(selector: &Selector, options: &Options) -> Result<Device> {
        if *selector == Selector::Cpu {
            return Ok(Device::cpu(options));
        }
        let list = adapter::list().await;
        match selector.choose(&list)? {
            Some(index) => Ok(Device(Arc::new(Kind::Gpu(Box::new(Gpu::open(index, options).await?))))),
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
            Kind::Cpu(_) => Ok(host::alloc(size, label)),
        }
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
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`] and other faults of the driver.
    ///
    /// # Panics
    /// When the values leave the view.
    pub fn write<T: bytemuck::Pod>(&self, view: &View, offset: u64, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let end = offset + bytes.len() as u64;
        assert!(end <= view.size(), "{}: {end} bytes written to a view of {}", view.label(), view.size());
        if bytes.is_empty() {
            return Ok(());
        }
        // Copies come in words of 4 bytes.
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(4), 0);
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.write(view, offset, &padded),
            Kind::Cpu(_) => {
                host::write(view, offset, bytes);
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

    /// Compiles what the recording needs, in parallel.
    ///
    /// # Errors
    /// [`crate::Error::Shader`] with the shader file's line, or [`crate::Error::Driver`].
    pub fn prepare(&self, recording: &Recording) -> Result<()> {
        match &*self.0 {
            Kind::Gpu(gpu) => gpu.prepare(recording),
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
