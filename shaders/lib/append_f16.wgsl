// Writes a record of W f16 values, eight at a time.
// Needs: cache: array<vec4<u32>>, values: array<f32, W> in workgroup memory; pack_f16, W, WORKGROUP.

fn append_record(record: u32, lane: u32) {
  for (var unit = lane; unit < W / 8u; unit += WORKGROUP) {
    let at = unit * 8u;
    cache[record * (W / 8u) + unit] =
      vec4<u32>(pack_f16(vec2<f32>(values[at], values[at + 1u])), pack_f16(vec2<f32>(values[at + 2u], values[at + 3u])),
                pack_f16(vec2<f32>(values[at + 4u], values[at + 5u])), pack_f16(vec2<f32>(values[at + 6u], values[at + 7u])));
  }
}
