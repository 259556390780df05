#[test]
fn mla_prefill_coop_agrees_with_its_twin_on_every_adapter() {
    lamina::check::assert_parity("mla_prefill_coop");
}
