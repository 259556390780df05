// Pairs of neighbours: element 2 i turns with element 2 i + 1 (DeepSeek).

// The two elements of pair `pair` in a slice of 2 `pairs` elements.
fn rope_elements(pair: u32, pairs: u32) -> vec2<u32> {
  return vec2<u32>(2u * pair, 2u * pair + 1u);
}
