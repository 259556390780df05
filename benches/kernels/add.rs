//! Times `add` on the chosen adapter.

pub fn run() {
    crate::time("add");
}
