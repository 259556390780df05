//! What runs a model: the latent cache and its pages.

mod bisect;
mod cache;
mod pages;

pub use bisect::{run_until, stages};
pub use cache::{Cache, CacheShape, LatentPages, State};
pub use pages::{PageCopy, Pages, SequenceId};
