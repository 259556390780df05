//! Times `gemv` on the chosen adapter.

pub fn run() {
    crate::time("gemv");
}
