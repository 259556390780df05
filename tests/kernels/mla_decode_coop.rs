#[test]
fn mla_decode_coop_agrees_with_its_twin_on_every_adapter_with_matrix_units() {
    lamina::check::assert_parity("mla_decode_coop");
}
