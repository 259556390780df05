// Records of the latent cache as rows of f32, for one piece of the context: what keys and values are expanded from.
// Grid: x blocks of TILE keys of a span, y spans. Keys whose page lies in another chunk write nothing.
// lib: batch, cache_* (UNITS, stage, quad_of).
// Constants: R latent and P rope width, W = R + P rounded up to 8, PAGE tokens, TILE records, WORKGROUP.

struct Params {
  first_page: u32, // of the bound chunk
  pages: u32,      // in the bound chunk
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;          // [sequences]
@group(0) @binding(2) var<storage, read> spans: array<Span>;              // [spans]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;         // [entries] page numbers
@group(0) @binding(4) var<storage, read> cache: array<vec4<u32>>;         // [pages, PAGE, record]
@group(0) @binding(5) var<storage, read_write> latents: array<vec4<f32>>; // [keys, R / 4]
@group(0) @binding(6) var<storage, read_write> k_pe: array<vec4<f32>>;    // [keys, P / 4 rounded up]; anything where P is 0

const ROPE_QUADS = (P + 3u) / 4u;      // vec4 of a rope key
const QUADS = R / 4u + ROPE_QUADS;     // of both
const NOWHERE = 0xffffffffu;

// The record of the key at `position` in the bound chunk, or NOWHERE.
fn record_at(pages: u32, position: u32) -> u32 {
  let page = block_table[pages + position / PAGE] - params.first_page; // one before the chunk wraps around
  return select(NOWHERE, page * PAGE + position % PAGE, page < params.pages);
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let span = spans[block.y];
  let pages = batch[span.sequence].pages;
  let first = span.begin + block.x * TILE;
  if (first >= span.end) {
    return;
  }
  let count = min(TILE, span.end - first);
  for (var i = lane; i < count * UNITS; i += WORKGROUP) {
    let record = record_at(pages, first + i / UNITS);
    if (record != NOWHERE) {
      stage(i / UNITS, i % UNITS, cache[record * UNITS + i % UNITS]);
    }
  }
  workgroupBarrier();
  for (var i = lane; i < count * QUADS; i += WORKGROUP) {
    let key = i / QUADS;
    let quad = i % QUADS;
    if (record_at(pages, first + key) != NOWHERE) {
      let row = span.row + first - span.begin + key;
      if (quad < R / 4u) {
        latents[row * (R / 4u) + quad] = quad_of(key, quad);
      } else {
        k_pe[row * ROPE_QUADS + quad - R / 4u] = quad_of(key, quad);
      }
    }
  }
}
