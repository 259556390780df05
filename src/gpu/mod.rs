//! The GPU layer, and the only folder that names wgpu.
//!
//! [`Device`] allocates memory and runs [`Recording`]s; [`Shader`] composes a kernel from its
//! WGSL file; [`Caps`] says what the adapter offers.

mod adapter;
#[cfg(target_arch = "wasm32")]
mod browser;
mod buffer;
mod caps;
mod compose;
mod device;
#[allow(clippy::module_inception, reason = "the file holds the type Gpu")]
mod gpu;
mod host;
mod kept;
mod options;
mod pipelines;
mod recorder;
mod recording;
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
mod spirv;
pub mod tuned;
mod width;

pub use adapter::{Selector, list};
pub use buffer::{Buffer, View, allocated};
pub use caps::{Caps, CooperativeShape, DeviceType, MatrixUnits};
pub use compose::{Access, Composed, Declared, Dialect, Extensions, Shader, ShaderBuilder, Source};
pub use device::{Device, Reading, Usage};
pub use host::{Host, Snapshot};
pub use options::Options;
pub use recording::{Call, Grid, Recording, Twin, grid_1d};
pub(crate) use width::shader as width;
