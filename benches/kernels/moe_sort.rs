//! Times `moe_sort` on the chosen adapter.

pub fn run() {
    crate::time("moe_sort");
}
