//! Times `moe_route` on the chosen adapter.

pub fn run() {
    crate::time("moe_route");
}
