//! Times `gemm` on the chosen adapter.

pub fn run() {
    crate::time("gemm");
}
