//! What runs a model: the latent cache and its pages.

mod cache;
mod pages;

pub use cache::{Cache, CacheShape, LatentPages, State};
pub use pages::{PageCopy, Pages, SequenceId};
