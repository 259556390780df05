//! Times `mla_prefill` on the chosen adapter.

pub fn run() {
    crate::time("mla_prefill");
}
