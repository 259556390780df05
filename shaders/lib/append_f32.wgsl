// Writes a record of W f32 values, four at a time.
// Needs: cache: array<vec4<u32>>, values: array<f32, W> in workgroup memory; W, WORKGROUP.

fn append_record(record: u32, lane: u32) {
  for (var unit = lane; unit < W / 4u; unit += WORKGROUP) {
    let at = unit * 4u;
    cache[record * (W / 4u) + unit] =
      bitcast<vec4<u32>>(vec4<f32>(values[at], values[at + 1u], values[at + 2u], values[at + 3u]));
  }
}
