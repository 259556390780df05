//! Times `sample` on the chosen adapter.

pub fn run() {
    crate::time("sample");
}
