//! Times `gqa_decode` on the chosen adapter.

pub fn run() {
    crate::time("gqa_decode");
}
