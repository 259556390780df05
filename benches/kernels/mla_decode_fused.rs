//! Times `mla_decode_fused` on the chosen adapter.

pub fn run() {
    crate::time("mla_decode_fused");
}
