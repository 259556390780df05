// Writes an fp8 record, 16 bytes at a time: R e4m3 codes, an f32 scale for each 128 of them, P f16
// values, zeros up to 16 bytes (FlashMLA's V3.2 layout). src/num/record.rs gives the same bits.
// Needs: cache: array<vec4<u32>>, values: array<f32, W> in workgroup memory; pack_f16, R, P, WORKGROUP.

const FP8_SCALES = (R + 127u) / 128u;
const FP8_RECORD = (R / 4u + FP8_SCALES + P / 2u + 3u) / 4u; // vec4<u32> a record

// The largest magnitude of each 16 latent values.
var<workgroup> append_largest: array<f32, (R / 16u + 3u) / 4u * 4u>;

// The exponent field of the scale of codes [128 block, 128 block + 128): the least power of two `s`
// with largest <= 448 s, at least 2^-64. 448 is 1.75 * 2^8, so a mantissa over 1.75 carries.
fn fp8_exponent(block: u32) -> u32 {
  var largest = 0.0;
  for (var i = block * 8u; i < min(block * 8u + 8u, R / 16u); i++) {
    largest = max(largest, append_largest[i]);
  }
  return max((bitcast<u32>(largest) + 0x1fffffu) >> 23u, 71u) - 8u;
}

// Four e4m3 codes, rounded to nearest even.
fn e4m3_codes(value: vec4<f32>) -> u32 {
  let magnitude = min(abs(value), vec4<f32>(448.0));
  let bits = bitcast<vec4<u32>>(magnitude);
  let rounded = bits + vec4<u32>(0x7ffffu) + ((bits >> vec4<u32>(20u)) & vec4<u32>(1u));
  let normal = (rounded >> vec4<u32>(20u)) - vec4<u32>(120u << 3u);
  // Below 2^-6 codes count 2^-9.
  let subnormal = vec4<u32>(round(magnitude * 512.0));
  let codes = select(normal, subnormal, magnitude < vec4<f32>(0.015625));
  let signs = (bitcast<vec4<u32>>(value) >> vec4<u32>(24u)) & vec4<u32>(0x80u);
  let bytes = (codes | signs) << vec4<u32>(0u, 8u, 16u, 24u);
  return bytes.x | bytes.y | bytes.z | bytes.w;
}

// Word `word` of the record, in 4 bytes.
fn fp8_word(word: u32) -> u32 {
  if (word < R / 4u) {
    let inverse = bitcast<f32>((254u - fp8_exponent(word / 32u)) << 23u);
    let at = word * 4u;
    return e4m3_codes(inverse * vec4<f32>(values[at], values[at + 1u], values[at + 2u], values[at + 3u]));
  }
  if (word < R / 4u + FP8_SCALES) {
    return fp8_exponent(word - R / 4u) << 23u;
  }
  let pair = word - R / 4u - FP8_SCALES;
  if (pair < P / 2u) {
    return pack_f16(vec2<f32>(values[R + 2u * pair], values[R + 2u * pair + 1u]));
  }
  return 0u;
}

fn append_record(record: u32, lane: u32) {
  for (var i = lane; i < R / 16u; i += WORKGROUP) {
    var largest = 0.0;
    for (var k = 0u; k < 16u; k++) {
      largest = max(largest, abs(values[i * 16u + k]));
    }
    append_largest[i] = largest;
  }
  workgroupBarrier();
  for (var unit = lane; unit < FP8_RECORD; unit += WORKGROUP) {
    let word = unit * 4u;
    cache[record * FP8_RECORD + unit] =
      vec4<u32>(fp8_word(word), fp8_word(word + 1u), fp8_word(word + 2u), fp8_word(word + 3u));
  }
}
