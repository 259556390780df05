//! Checkpoints on disk: which tensors there are, and their bytes. Knows nothing of models or GPUs.

mod checkpoint;
mod shard;

pub use checkpoint::{Checkpoint, Dtype, TensorView};
