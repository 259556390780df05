// Weights stored as f16, read without f16 arithmetic.
//
// Modules weights_*: a row is whole blocks of WEIGHT_BLOCK values; lanes read parts of it, 4 WEIGHT_VECTORS
// values each, numbered from the binding's start. Loading and decoding are apart, so that several
// loads can be under way.

alias WeightWord = vec4<u32>; // an element of the binding `weights`
alias WeightPart = vec4<u32>; // a part as it is loaded
const WEIGHT_BLOCK = 32u;
const WEIGHT_VECTORS = 2u;

fn weight_part(part: u32) -> WeightPart {
  return weights[part];
}

fn weight_values(part: WeightPart) -> array<vec4<f32>, WEIGHT_VECTORS> {
  return array<vec4<f32>, WEIGHT_VECTORS>(
    vec4<f32>(unpack2x16float(part.x), unpack2x16float(part.y)),
    vec4<f32>(unpack2x16float(part.z), unpack2x16float(part.w)));
}
