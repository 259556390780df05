//! Number formats and tables on the CPU. Imports nothing of this crate.

pub mod fp8;
pub mod record;
pub mod rope;
