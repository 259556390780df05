//! What a step is told, in a buffer that steps share.

use crate::error::Result;
use crate::gpu::{Device, View};

/// A buffer of a step's facts, with what it holds: steps of decoding differ in few of them, and each upload
/// stands between two steps on the GPU.
pub(super) struct Fact {
    pub view: View,
    held: Vec<u8>,
}

impl Fact {
    pub fn new(view: View) -> Fact {
        Fact { view, held: Vec::new() }
    }

    /// Writes the values to the buffer's start, where they are not there already.
    ///
    /// # Errors
    /// As [`Device::write`].
    pub fn write<T: bytemuck::Pod>(&mut self, device: &Device, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if !self.held.starts_with(bytes) {
            device.write(&self.view, 0, values)?;
            self.held = bytes.to_vec();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::Options;

    #[test]
    fn what_changed_is_written_and_a_start_of_what_is_there_is_not() {
        let device = Device::cpu(&Options::default());
        let mut fact = Fact::new(device.alloc(16, "numbers").unwrap().view());
        let held = |fact: &Fact| {
            let bytes = pollster::block_on(device.read(std::slice::from_ref(&fact.view))).unwrap().remove(0);
            bytemuck::pod_collect_to_vec::<u8, u32>(&bytes)
        };
        fact.write(&device, &[1u32, 2, 3]).unwrap();
        fact.write(&device, &[1u32, 2]).unwrap();
        assert_eq!(held(&fact), [1, 2, 3, 0]);
        fact.write(&device, &[7u32]).unwrap();
        fact.write(&device, &[7u32, 2, 5]).unwrap();
        assert_eq!(held(&fact), [7, 2, 5, 0], "a shorter write forgot what stood behind it");
        // What others wrote behind its back stays where the same is asked for again.
        device.write(&fact.view, 0, &[9u32]).unwrap();
        fact.write(&device, &[7u32, 2]).unwrap();
        assert_eq!(held(&fact), [9, 2, 5, 0], "an upload of what is there");
    }
}
