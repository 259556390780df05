// Weights stored as bf16, the upper halves of f32. weights_f16 says what the functions are.

alias WeightWord = vec4<u32>;
alias WeightPart = vec4<u32>;
const WEIGHT_BLOCK = 32u;
const WEIGHT_VECTORS = 2u;

fn weight_part(part: u32) -> WeightPart {
  return weights[part];
}

fn weight_values(part: WeightPart) -> array<vec4<f32>, WEIGHT_VECTORS> {
  let low = bitcast<vec4<f32>>(part << vec4<u32>(16u));
  let high = bitcast<vec4<f32>>(part & vec4<u32>(0xffff0000u));
  return array<vec4<f32>, WEIGHT_VECTORS>(
    vec4<f32>(low.x, high.x, low.y, high.y),
    vec4<f32>(low.z, high.z, low.w, high.w));
}
