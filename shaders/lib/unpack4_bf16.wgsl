// Four bf16 values of a row: the upper halves of f32.

alias Packed4 = vec2<u32>;

fn unpack4(word: Packed4) -> vec4<f32> {
  return bitcast<vec4<f32>>(vec4<u32>(word.x << 16u, word.x & 0xffff0000u, word.y << 16u, word.y & 0xffff0000u));
}
