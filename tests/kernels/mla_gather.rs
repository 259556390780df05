#[test]
fn mla_gather_agrees_with_its_twin_on_every_adapter() {
    lamina::check::assert_parity("mla_gather");
}
