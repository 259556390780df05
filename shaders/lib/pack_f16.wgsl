// Two f32 as two f16 in a word, rounded to nearest even: WGSL's pack2x16float may round either way.

fn pack_f16(value: vec2<f32>) -> u32 {
  let bits = bitcast<vec2<u32>>(value);
  let magnitude = bits & vec2<u32>(0x7fffffffu);
  // Adding all but the half of what goes, and one more where the last kept bit is odd, carries
  // exactly where rounding goes up.
  let rounded = magnitude + vec2<u32>(0xfffu) + ((magnitude >> vec2<u32>(13u)) & vec2<u32>(1u));
  let normal = (rounded >> vec2<u32>(13u)) - vec2<u32>(112u << 10u);
  // Below 2^-14 codes count 2^-24.
  let small = min(bitcast<vec2<f32>>(magnitude), vec2<f32>(1.0)) * 16777216.0;
  let subnormal = vec2<u32>(round(small));
  let beyond = select(vec2<u32>(0x7c00u), vec2<u32>(0x7e00u), magnitude > vec2<u32>(0x7f800000u));
  var code = select(normal, subnormal, magnitude < vec2<u32>(0x38800000u));
  code = select(code, beyond, magnitude >= vec2<u32>(0x477ff000u)); // 65520 rounds to infinity
  code |= (bits >> vec2<u32>(16u)) & vec2<u32>(0x8000u);
  return code.x | (code.y << 16u);
}
