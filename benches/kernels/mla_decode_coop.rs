//! Times `mla_decode_coop` on the chosen adapter, where it has matrix units.

pub fn run() {
    crate::time("mla_decode_coop");
}
