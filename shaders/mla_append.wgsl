// One record of the latent cache: the latent normalised, the rope key turned, written to its page.
// Grid: one workgroup a row of the step. Rows whose page lies in another chunk write nothing.
// lib: batch, reduce_* (reduce_sum), rope_table, rope_* (rope_elements), append_* (append_record), pack_f16.
// Constants: R latent and P rope width, W = R + P rounded up to 8, PAGE tokens, WORKGROUP.

struct Params {
  rows: u32,
  kv_stride: u32,
  kv_offset: u32,
  first_page: u32, // of the bound chunk
  pages: u32,      // in the bound chunk
  eps: f32,
  scale: f32,      // of the latent, after its norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;        // [sequences]
@group(0) @binding(2) var<storage, read> rows: array<Row>;              // [rows]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;       // [entries] page numbers
@group(0) @binding(4) var<storage, read> kv: array<vec4<f32>>;          // [rows, kv_stride / 4]: R latent, P rope values
@group(0) @binding(5) var<storage, read> weight: array<vec4<f32>>;      // [R / 4]
@group(0) @binding(6) var<storage, read> rope_table: array<vec2<f32>>;  // [256 + blocks, P / 2]; anything where P is 0
@group(0) @binding(7) var<storage, read_write> cache: array<vec4<u32>>; // [pages, PAGE, record]

// The record's values.
var<workgroup> values: array<f32, W>;

fn kv_element(at: u32) -> f32 {
  return kv[at / 4u][at % 4u];
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let index = group.x + group.y * groups.x;
  if (index >= params.rows) {
    return;
  }
  let row = rows[index];
  let page = block_table[batch[row.sequence].pages + row.position / PAGE] - params.first_page;
  if (page >= params.pages) { // of another chunk; one before this wraps around
    return;
  }
  let start = index * params.kv_stride + params.kv_offset;

  var squares = 0.0;
  for (var i = lane; i < R / 4u; i += WORKGROUP) {
    let value = kv[start / 4u + i];
    squares += dot(value, value);
    values[4u * i] = value.x;
    values[4u * i + 1u] = value.y;
    values[4u * i + 2u] = value.z;
    values[4u * i + 3u] = value.w;
  }
  let norm = params.scale / sqrt(reduce_sum(squares, lane) / f32(R) + params.eps);
  // Each lane scales what it wrote itself.
  for (var i = lane; i < R / 4u; i += WORKGROUP) {
    let factor = norm * weight[i];
    values[4u * i] *= factor.x;
    values[4u * i + 1u] *= factor.y;
    values[4u * i + 2u] *= factor.z;
    values[4u * i + 3u] *= factor.w;
  }
  for (var pair = lane; pair < P / 2u; pair += WORKGROUP) {
    let turn = rope_rotation(row.position, pair, P / 2u);
    let at = rope_elements(pair, P / 2u);
    let x = kv_element(start + R + at.x);
    let y = kv_element(start + R + at.y);
    values[R + at.x] = x * turn.x - y * turn.y;
    values[R + at.y] = x * turn.y + y * turn.x;
  }
  for (var i = R + P + lane; i < W; i += WORKGROUP) {
    values[i] = 0.0;
  }
  workgroupBarrier();
  append_record(page * PAGE + row.position % PAGE, lane);
}
