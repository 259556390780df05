//! Models: what a configuration says, which tensors belong to it.

pub mod config;
pub mod families;
mod fields;
mod read;
pub mod rope;
pub mod tensors;

pub use config::Config;
