//! Times `rms_norm` on the chosen adapter.

pub fn run() {
    crate::time("rms_norm");
}
