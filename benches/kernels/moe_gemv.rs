//! Times `moe_gemv` on the chosen adapter.

pub fn run() {
    crate::time("moe_gemv");
}
