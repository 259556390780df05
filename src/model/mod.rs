//! Models: what a configuration says, which tensors belong to it, and the tensors on a device.

mod attention;
pub mod config;
pub mod families;
mod fields;
pub mod forward;
pub mod generation;
pub mod load;
mod mlp;
mod pack;
pub mod plan;
mod prefill;
mod read;
pub mod rope;
pub mod tensors;
pub mod traffic;

pub use config::Config;
pub use load::Model;
