//! Memory of a device, and ranges of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A block of device memory. Clones share it; it is freed with the last clone.
#[derive(Clone, Debug)]
pub struct Buffer(pub(super) Arc<Memory>);

#[derive(Debug)]
pub(super) struct Memory {
    /// Unique in this process, for the bind group cache.
    pub id: u64,
    pub size: u64,
    pub label: String,
    pub place: Place,
}

#[derive(Debug)]
pub(super) enum Place {
    Gpu(wgpu::Buffer),
    /// The `cpu` device's memory. A snapshot clones the `Arc`; a write under a live snapshot copies.
    Host(Mutex<Arc<Vec<u32>>>),
}

/// Bytes of all buffers of this process.
static ALLOCATED: AtomicU64 = AtomicU64::new(0);

/// Bytes that all buffers of this process take, on GPUs and on the host.
pub fn allocated() -> u64 {
    ALLOCATED.load(Ordering::Relaxed)
}

impl Drop for Memory {
    /// Frees at once: a cached bind group would keep the memory otherwise. What is in flight ends first.
    fn drop(&mut self) {
        ALLOCATED.fetch_sub(self.size, Ordering::Relaxed);
        if let Place::Gpu(buffer) = &self.place {
            buffer.destroy();
        }
    }
}

impl Buffer {
    pub(super) fn new(size: u64, label: &str, place: Place) -> Buffer {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        ALLOCATED.fetch_add(size, Ordering::Relaxed);
        Buffer(Arc::new(Memory { id, size, label: label.to_string(), place }))
    }

    /// A number that no other buffer of this process has.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Its size in bytes, a multiple of 16.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// The whole of it.
    pub fn view(&self) -> View {
        View { buffer: self.clone(), offset: 0, size: self.0.size }
    }

    /// `size` bytes from `offset`.
    ///
    /// # Panics
    /// When the range leaves the buffer, the offset is no multiple of 256, which is what every
    /// adapter takes as the start of a binding, or the size is no multiple of 4.
    pub fn slice(&self, offset: u64, size: u64) -> View {
        assert!(offset.is_multiple_of(256), "{}: a view starts at {offset}, not a multiple of 256", self.0.label);
        assert!(size.is_multiple_of(4), "{}: a view of {size} bytes, not a multiple of 4", self.0.label);
        assert!(
            offset + size <= self.0.size,
            "{}: view {offset}+{size} leaves the buffer's {} bytes",
            self.0.label,
            self.0.size
        );
        View { buffer: self.clone(), offset, size }
    }
}

/// A range of a [`Buffer`] that a kernel binds.
#[derive(Clone, Debug)]
pub struct View {
    pub(super) buffer: Buffer,
    pub(super) offset: u64,
    pub(super) size: u64,
}

impl View {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The buffer that it is a range of.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The same range of another buffer of the same size.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn of(&self, buffer: &Buffer) -> View {
        let (here, there) = (self.buffer.size(), buffer.size());
        assert!(here == there, "{}: a view of {here} bytes moved to {there}", self.label());
        View { buffer: buffer.clone(), offset: self.offset, size: self.size }
    }

    /// `size` bytes of it from `offset`.
    ///
    /// # Panics
    /// As [`Buffer::slice`], and when the range leaves the view.
    pub fn part(&self, offset: u64, size: u64) -> View {
        assert!(offset + size <= self.size, "{}: {offset}+{size} leaves a view of {} bytes", self.label(), self.size);
        self.buffer.slice(self.offset + offset, size)
    }

    /// The name its buffer was allocated under.
    pub fn label(&self) -> &str {
        &self.buffer.0.label
    }
}

impl From<&Buffer> for View {
    fn from(buffer: &Buffer) -> View {
        buffer.view()
    }
}
