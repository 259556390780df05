#[test]
fn gqa_decode_agrees_with_its_twin_on_every_adapter() {
    lamina::check::assert_parity("gqa_decode");
}
