// The rotation of a rope pair, from the table that src/num/rope.rs makes: 256 rows for
// position % 256, then one row for each position / 256.
// Binding of the kernel: rope_table: array<vec2<f32>>, [256 + blocks, pairs] of (cos, sin).

// (cos, sin) of pair `pair` at `position`, of slices with `pairs` pairs. The attention factor of
// YaRN and longrope is in it.
fn rope_rotation(position: u32, pair: u32, pairs: u32) -> vec2<f32> {
  let fine = rope_table[(position % 256u) * pairs + pair];
  let coarse = rope_table[(256u + position / 256u) * pairs + pair];
  return vec2<f32>(fine.x * coarse.x - fine.y * coarse.y, fine.y * coarse.x + fine.x * coarse.y);
}
