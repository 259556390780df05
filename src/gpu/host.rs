//! The `cpu` device: host memory, and the twins that run on it.

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::Arc;

use super::buffer::{Buffer, Place, View};
use super::caps::Caps;
use super::recording::{Call, Recording};
use crate::error::{Error, Result};

/// Allocates `size` bytes of host memory, filled with zeros.
pub(super) fn alloc(size: u64, label: &str) -> Result<Buffer> {
    let count = usize::try_from(size / 4).unwrap_or(usize::MAX);
    // Reserved first on trial: `vec!` ends the process where there is no memory.
    Vec::<u32>::new().try_reserve_exact(count).map_err(|error| Error::OutOfMemory {
        adapter: Caps::cpu().label(),
        asked: format!("{size} bytes for {label}"),
        offered: format!("the system said: {error}"),
    })?;
    Ok(Buffer::new(size, label, Place::Host(std::sync::Mutex::new(Arc::new(vec![0u32; count])))))
}

/// Runs each call's twin in order.
pub(super) fn run(recording: &Recording) {
    for call in recording.calls() {
        log::trace!("twin of {} {}", call.stage, call.shader.kernel);
        (call.twin)(&Host { call });
    }
}

fn words(view: &View) -> &std::sync::Mutex<Arc<Vec<u32>>> {
    match &view.buffer.0.place {
        Place::Host(words) => words,
        Place::Gpu(_) => panic!("{}: a twin runs on host memory, this buffer is on a GPU", view.label()),
    }
}

pub(super) fn read(view: &View) -> Vec<u8> {
    Snapshot::<u8>::of(view).to_vec()
}

pub(super) fn write(view: &View, offset: u64, bytes: &[u8]) {
    let mut words = words(view).lock().expect("no twin panics while it holds this lock");
    let all: &mut [u8] = bytemuck::cast_slice_mut(Arc::make_mut(&mut words).as_mut_slice());
    let start = (view.offset + offset) as usize;
    all[start..start + bytes.len()].copy_from_slice(bytes);
}

/// What a twin sees of its call: the bindings' contents, by name.
pub struct Host<'a> {
    call: &'a Call,
}

impl Host<'_> {
    fn view(&self, name: &str) -> &View {
        let found = self.call.bindings.iter().find(|(n, _)| *n == name);
        &found.unwrap_or_else(|| panic!("{}: no binding named {name}", self.call.shader.kernel)).1
    }

    /// The binding's contents as they are now; later writes do not change them.
    pub fn get<T: bytemuck::Pod>(&self, name: &str) -> Snapshot<T> {
        Snapshot::of(self.view(name))
    }

    /// Writes `values` to the binding from element `at` on.
    pub fn set<T: bytemuck::Pod>(&self, name: &str, at: usize, values: &[T]) {
        let offset = (at * size_of::<T>()) as u64;
        write(self.view(name), offset, bytemuck::cast_slice(values));
    }
}

/// The contents of a view at one moment; derefs to a slice.
pub struct Snapshot<T> {
    words: Arc<Vec<u32>>,
    start: usize,
    end: usize,
    kind: PhantomData<T>,
}

impl<T: bytemuck::Pod> Snapshot<T> {
    fn of(view: &View) -> Snapshot<T> {
        let words = words(view).lock().expect("no twin panics while it holds this lock").clone();
        let (start, end) = (view.offset as usize, (view.offset + view.size) as usize);
        Snapshot { words, start, end, kind: PhantomData }
    }
}

impl<T: bytemuck::Pod> Deref for Snapshot<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let bytes: &[u8] = bytemuck::cast_slice(&self.words);
        bytemuck::cast_slice(&bytes[self.start..self.end])
    }
}
