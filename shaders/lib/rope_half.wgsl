// Pairs across the halves: element i turns with element i + pairs (GPT-NeoX, Llama in transformers).

// The two elements of pair `pair` in a slice of 2 `pairs` elements.
fn rope_elements(pair: u32, pairs: u32) -> vec2<u32> {
  return vec2<u32>(pair, pair + pairs);
}
