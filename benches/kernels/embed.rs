//! Times `embed` on the chosen adapter.

pub fn run() {
    crate::time("embed");
}
