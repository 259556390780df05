//! Times `rope` on the chosen adapter.

pub fn run() {
    crate::time("rope");
}
