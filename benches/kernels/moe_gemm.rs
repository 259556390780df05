//! Times `moe_gemm` on the chosen adapter.

pub fn run() {
    crate::time("moe_gemm");
}
