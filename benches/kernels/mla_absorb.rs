//! Times `mla_absorb` on the chosen adapter.

pub fn run() {
    crate::time("mla_absorb");
}
