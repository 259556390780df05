// Weights stored as f32. weights_f16 says what the functions are.

alias WeightWord = vec4<f32>;
alias WeightPart = vec4<f32>;
const WEIGHT_BLOCK = 32u;
const WEIGHT_VECTORS = 1u;

fn weight_part(part: u32) -> WeightPart {
  return weights[part];
}

fn weight_values(part: WeightPart) -> array<vec4<f32>, WEIGHT_VECTORS> {
  return array<vec4<f32>, WEIGHT_VECTORS>(part);
}
