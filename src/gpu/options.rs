//! How a device is opened.

/// How to open a device.
#[derive(Clone, Debug)]
pub struct Options {
    /// No binding larger than this, bytes: tests cut tensors into many chunks with it.
    pub binding_bytes: Option<u64>,
    /// Out-of-bounds accesses and endless loops are caught in shaders. On in debug builds and tests.
    pub checked: bool,
    /// Workgroup memory is cleared before a kernel runs, as every browser does. For comparisons alone: it costs a
    /// software GL driver a minute a pipeline.
    pub zeroed: bool,
    /// Kernels take the variants that `lamina bench tune` found the fastest on this adapter. Off in tests, which do
    /// not depend on what a user keeps.
    pub tuned: bool,
    /// Kernels run on matrix units of software drivers, too, which multiply faster without: checks and tests try them.
    /// `LAMINA_MATRIX_UNITS` (`on`, `off`) goes before it.
    pub matrix_units: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            binding_bytes: None,
            checked: cfg!(debug_assertions),
            zeroed: false,
            tuned: true,
            matrix_units: false,
        }
    }
}
