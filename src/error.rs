//! The one error type: what went wrong, with what was expected and what was found.

use std::path::PathBuf;

/// What can go wrong in lamina.
///
/// Each message names the file, tensor, flag or adapter it is about, what was
/// expected and what was found. [`Error::exit_code`] gives the process's exit code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user asked for something that cannot be (a flag, a name, a number).
    #[error("{what}: expected {expected}, found {found}")]
    Usage {
        /// The flag, variable or argument.
        what: String,
        /// What it takes.
        expected: String,
        /// What was given.
        found: String,
    },
    /// The driver refused or failed a request.
    #[error("{adapter}: {asked} failed: {found}")]
    Driver {
        /// The adapter's name and backend.
        adapter: String,
        /// What was asked of it.
        asked: String,
        /// What it answered.
        found: String,
    },
    /// The adapter has too little memory for a buffer.
    #[error("{adapter}: out of memory: asked for {asked}, {offered}")]
    OutOfMemory {
        /// The adapter's name and backend.
        adapter: String,
        /// The bytes asked for and what they are for.
        asked: String,
        /// What the adapter offers, as far as it says.
        offered: String,
    },
    /// The device was lost: driver reset, time-out or removal.
    #[error("{adapter}: the device was lost during {asked}: {found}")]
    DeviceLost {
        /// The adapter's name and backend.
        adapter: String,
        /// What was running.
        asked: String,
        /// The driver's reason.
        found: String,
    },
    /// A shader does not compile: a fault of lamina or of the driver, never of the user.
    #[error("{file}:{line}: {message} (on {adapter})")]
    Shader {
        /// The adapter's name and backend.
        adapter: String,
        /// The shader file, such as `shaders/gemv.wgsl`.
        file: String,
        /// The line in that file, from 1.
        line: usize,
        /// The compiler's message.
        message: String,
    },
    /// The latent cache has too few free pages.
    #[error("the latent cache is out of pages: asked for {asked}, {free} of {total} are free")]
    OutOfPages {
        /// Pages asked for.
        asked: usize,
        /// Pages that nobody holds.
        free: usize,
        /// Pages of the cache.
        total: usize,
    },
    /// A step or a context is larger than what was allocated for.
    #[error("too many {what}: asked for {asked}, allocated for {limit}")]
    Capacity {
        /// What there is too much of.
        what: String,
        /// How much was asked for.
        asked: u64,
        /// How much there is room for.
        limit: u64,
    },
    /// A sequence's pages lie in too many runs, each in another buffer of the cache.
    #[error("sequence {sequence} of the batch lies in {runs} runs of pages, of at most {most}")]
    Fragmented {
        /// Its index in the batch.
        sequence: usize,
        /// Runs of pages within one buffer.
        runs: usize,
        /// The most that can be merged.
        most: usize,
    },
    /// A model gave logits that are no numbers: its weights, or a kernel, are at fault.
    #[error(
        "the logits at position {position} are not finite numbers: a weight of the model is none, or a kernel is wrong \
         (lamina check holds the kernels against the CPU)"
    )]
    NotFinite {
        /// The position in the sequence, from 0.
        position: usize,
    },
    /// A checkpoint, configuration or tokenizer holds something else than it must.
    #[error("{file}: {what}: expected {expected}, found {found}", file = file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// The tensor or field in it.
        what: String,
        /// What belongs there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A model has a part that lamina does not compute.
    #[error("{file}: {feature}: not supported", file = file.display())]
    Unsupported {
        /// The file that says so.
        file: PathBuf,
        /// The part, such as an indexer or fp8 weights.
        feature: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// The exit code of the command line: 2 for usage, 1 for failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage { .. } => 2,
            _ => 1,
        }
    }
}

/// A result with lamina's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
