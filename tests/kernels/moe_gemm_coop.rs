#[test]
fn moe_gemm_coop_agrees_with_its_twin_on_every_adapter() {
    lamina::check::assert_parity("moe_gemm_coop");
}
