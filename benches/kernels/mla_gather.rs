//! Times `mla_gather` on the chosen adapter.

pub fn run() {
    crate::time("mla_gather");
}
