//! Times `gqa_append` on the chosen adapter.

pub fn run() {
    crate::time("gqa_append");
}
