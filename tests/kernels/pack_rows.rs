#[test]
fn pack_rows_agrees_with_its_twin_on_every_adapter() {
    lamina::check::assert_parity("pack_rows");
}
