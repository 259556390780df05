//! Times `moe_combine` on the chosen adapter.

pub fn run() {
    crate::time("moe_combine");
}
