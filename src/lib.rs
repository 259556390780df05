//! Multi-head Latent Attention (MLA) on any GPU: WGSL kernels and a wgpu runtime.

pub mod bench;
pub mod check;
#[cfg(feature = "cli")]
pub mod cli;
pub mod error;
pub mod gpu;
pub mod kernels;
pub mod num;
pub mod reference;

pub use error::{Error, Result};
