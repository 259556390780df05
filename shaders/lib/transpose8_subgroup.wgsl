// Sums of eight values over eight neighbouring invocations, each invocation left with one of them,
// by shuffles. Every invocation calls it. Subgroups have at least eight invocations, in the order of
// the workgroup's.

// With k = lane % 8: the sum over the eight lanes of value k, of low (0 to 3) and high (4 to 7).
fn transpose8(low: vec4<f32>, high: vec4<f32>, lane: u32) -> f32 {
  let upper = (lane & 4u) != 0u;
  let four = select(low, high, upper) + subgroupShuffleXor(select(high, low, upper), 4u);
  let second = (lane & 2u) != 0u;
  let two = select(four.xy, four.zw, second) + subgroupShuffleXor(select(four.zw, four.xy, second), 2u);
  let odd = (lane & 1u) != 0u;
  return select(two.x, two.y, odd) + subgroupShuffleXor(select(two.y, two.x, odd), 1u);
}
