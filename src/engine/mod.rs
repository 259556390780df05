//! What runs a model: the latent cache and its pages.

mod bisect;
mod cache;
mod fact;
mod generate;
mod inspect;
mod options;
mod pages;
mod step;

pub use bisect::{run_until, stages};
pub use cache::{Cache, CacheShape, LatentPages, PAGES, State};
pub use generate::{Finish, Request};
pub use options::Options;
pub use pages::{PageCopy, Pages, SequenceId};
pub use step::Engine;
