// Four f16 values of a row, without f16 arithmetic.

alias Packed4 = vec2<u32>;

fn unpack4(word: Packed4) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}
