// A step's queries, keys and values of attention in groups: queries turned and scaled, keys turned, keys and values
// written to their pages as f16. Rows whose page lies in another chunk write their queries alone.
// Grid: x blocks of quads of a row's values, y rows of the step.
// lib: batch, rope_table, rope_half (rope_elements).
// Constants: D width of a head, WORKGROUP.

struct Params {
  heads: u32,
  groups: u32,     // heads of keys and values
  stride: u32,     // from one row of qkv to the next
  first_page: u32, // of the bound chunk
  pages: u32,      // in the bound chunk
  page_bits: u32,  // a page has 1 << page_bits tokens
  scale: f32,      // of the queries
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;           // [sequences]
@group(0) @binding(2) var<storage, read> rows: array<Row>;                 // [rows]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;          // [entries] page numbers
@group(0) @binding(4) var<storage, read> qkv: array<f32>;                  // [rows, stride]: heads, then keys, then values of the groups, D each
@group(0) @binding(5) var<storage, read> rope_table: array<vec2<f32>>;     // [256 + blocks, D / 2]
@group(0) @binding(6) var<storage, read_write> cache: array<u32>;          // [pages, page tokens, groups, key then value, D / 2] pairs of f16
@group(0) @binding(7) var<storage, read_write> queries: array<f32>;        // [rows, heads, D]

const HALF = D / 2u; // pairs of a head

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let item = block.x * WORKGROUP + lane;
  let slot = item / (D / 4u); // a head, a key or a value
  let i = item % (D / 4u) * 2u;
  if (slot >= params.heads + 2u * params.groups) {
    return;
  }
  let row = rows[block.y];
  let start = block.y * params.stride + slot * D;
  let at = rope_elements(i, HALF); // of pair i; those of pair i + 1 follow them
  var x = vec2<f32>(qkv[start + at.x], qkv[start + at.x + 1u]);
  var y = vec2<f32>(qkv[start + at.y], qkv[start + at.y + 1u]);
  if (slot < params.heads + params.groups) {
    let turn0 = rope_rotation(row.position, i, HALF);
    let turn1 = rope_rotation(row.position, i + 1u, HALF);
    let cosine = vec2<f32>(turn0.x, turn1.x);
    let sine = vec2<f32>(turn0.y, turn1.y);
    let turned = x * cosine - y * sine;
    y = y * cosine + x * sine;
    x = turned;
  }
  if (slot < params.heads) {
    let to = (block.y * params.heads + slot) * D;
    queries[to + at.x] = x.x * params.scale;
    queries[to + at.x + 1u] = x.y * params.scale;
    queries[to + at.y] = y.x * params.scale;
    queries[to + at.y + 1u] = y.y * params.scale;
    return;
  }
  let page = block_table[batch[row.sequence].pages + (row.position >> params.page_bits)] - params.first_page;
  if (page >= params.pages) { // of another chunk; one before this wraps around
    return;
  }
  let record = (page << params.page_bits) + (row.position & ((1u << params.page_bits) - 1u));
  let group = (slot - params.heads) % params.groups;
  let is_value = (slot - params.heads) / params.groups;
  let to = ((record * params.groups + group) * 2u + is_value) * HALF;
  cache[to + at.x / 2u] = pack2x16float(x);
  cache[to + at.y / 2u] = pack2x16float(y);
}
