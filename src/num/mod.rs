//! Number formats and tables on the CPU. Imports nothing of this crate.

pub mod rope;
