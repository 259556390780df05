// A tile of scalars, from which any matrix units load: Metal's take no pointers to vectors.
// Of the kernel: `tile`, an array of f16.

// Puts four values to the tile from `at` on.
fn keep_four(at: u32, value: vec4<f16>) {
  tile[at] = value.x;
  tile[at + 1u] = value.y;
  tile[at + 2u] = value.z;
  tile[at + 3u] = value.w;
}
