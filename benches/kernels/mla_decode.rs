//! Times `mla_decode` on the chosen adapter.

pub fn run() {
    crate::time("mla_decode");
}
