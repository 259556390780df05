#[test]
fn moe_gemv_agrees_with_its_twin_on_every_adapter() {
    lamina::check::assert_parity("moe_gemv");
}
