#[test]
fn mla_decode_fused_agrees_with_its_twin_on_every_adapter() {
    lamina::check::assert_parity("mla_decode_fused");
}
