// Four f32 values of a row.

alias Packed4 = vec4<f32>;

fn unpack4(word: Packed4) -> vec4<f32> {
  return word;
}
