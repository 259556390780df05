// e4m3 codes as f16.
// lib: halves.

// Codes 0, 2, 1, 3 as their values over 2^8: sign, exponent and mantissa moved to where f16 has them, which is exact
// for subnormal ones, too.
fn values_of(codes: u32) -> vec4<f16> {
  let even = ((codes << 8u) & 0x80008000u) | ((codes << 7u) & 0x3f803f80u);
  let odd = (codes & 0x80008000u) | ((codes >> 1u) & 0x3f803f80u);
  return halves(even, odd);
}
