//! What runs read that rotate among several sets of the same work.

use crate::Result;
use crate::gpu::{Buffer, Device, View};

/// A buffer with a part for each set.
pub struct Sets {
    buffer: Buffer,
    /// Offset and size of each.
    parts: Vec<(u64, u64)>,
}

impl Sets {
    /// `of` of each set, uploaded.
    ///
    /// # Errors
    /// As [`Device::upload`], and [`crate::Error::OutOfMemory`] for a set that no binding shows whole.
    pub fn new<S, T: bytemuck::Pod>(device: &Device, sets: &[S], of: impl Fn(&S) -> &[T], label: &str) -> Result<Sets> {
        let (mut bytes, mut parts) = (Vec::new(), Vec::new());
        for set in sets {
            let part: &[u8] = bytemuck::cast_slice(of(set));
            device.caps().check_bound(part.len() as u64, label)?;
            parts.push((bytes.len() as u64, part.len() as u64));
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(256), 0);
        }
        Ok(Sets { buffer: device.upload(&bytes, label)?, parts })
    }

    /// The part of a set.
    pub fn view(&self, set: usize) -> View {
        let (offset, size) = self.parts[set];
        self.buffer.slice(offset, size)
    }
}
