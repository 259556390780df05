//! Times `mla_combine` on the chosen adapter.

pub fn run() {
    crate::time("mla_combine");
}
