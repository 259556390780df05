//! Times `mla_append` on the chosen adapter.

pub fn run() {
    crate::time("mla_append");
}
