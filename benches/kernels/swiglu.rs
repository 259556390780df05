//! Times `swiglu` on the chosen adapter.

pub fn run() {
    crate::time("swiglu");
}
