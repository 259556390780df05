// Absorbed attention of a step's queries over one split of each sequence's latent cache: a block of ROWS
// (token, head) rows folds each record once. Writes normalised outputs and log-sum-exps for mla_combine.
// Grid: x blocks of rows of the longest sequence, y splits of one cache chunk.
// lib: batch, rows_* (record_of), score_* (score, NOTHING), cache_* (UNITS, stage, quad_of), transpose8_*, fold.
// Constants: R latent and P rope width, W = R + P rounded up to 8, WORKGROUP, ROWS of a block, TILE
// tokens and SCRATCH values in workgroup memory.

struct Params {
  heads: u32,
  first_split: u32, // of the bound chunk
  first_page: u32,
  page_bits: u32,   // a page has 1 << page_bits tokens
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;            // [sequences]
@group(0) @binding(2) var<storage, read> splits: array<Split>;              // [splits]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;           // [entries] page numbers
@group(0) @binding(4) var<storage, read> queries: array<vec4<f32>>;         // [tokens, heads, W / 4], in units of log2
@group(0) @binding(5) var<storage, read> cache: array<vec4<u32>>;           // [pages, page tokens, record]
@group(0) @binding(6) var<storage, read_write> partials: array<vec4<f32>>;  // [partial tokens, heads, R / 4 + 1]

var<private> block_first: u32;  // the block's first row, of `block_rows` of the sequence
var<private> block_rows: u32;
var<private> query_start: u32;  // the sequence's first query row
var<private> position: u32;     // of its first new token

fn query(row: u32, quad: u32) -> vec4<f32> {
  return queries[(query_start + min(block_first + row, block_rows - 1u)) * (W / 4u) + quad];
}

fn end_of(row: u32) -> u32 {
  return position + min(block_first + row, block_rows - 1u) / params.heads + 1u;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let split = splits[params.first_split + block.y];
  let sequence = batch[split.sequence];
  let first = block.x * ROWS; // browsers take private variables for different in each lane
  let rows = sequence.tokens * params.heads;
  block_first = first;
  block_rows = rows;
  if (first >= rows) {
    return; // another sequence of the batch has more rows
  }
  query_start = sequence.first_row * params.heads;
  position = sequence.position;

  fold(sequence.pages, split.begin, split.end, lane);

  let band = lane / COLUMN_LANES;
  for (var i = 0u; i < 2u * BAND; i++) {
    let row = 2u * band * BAND + i;
    if (row < min(ROWS, block_rows - block_first)) {
      let at = (split.partial * params.heads + block_first + row) * (COLUMNS + 1u);
      let factor = 1.0 / max(total_of(row), 1e-30);
      for (var turn = 0u; turn < PASSES; turn++) {
        let column = lane % COLUMN_LANES + turn * COLUMN_LANES;
        if (column < COLUMNS) {
          partials[at + column] = factor * folded[2u * turn * BAND + i];
        }
      }
      if (lane % COLUMN_LANES == 0u) {
        partials[at + COLUMNS] = vec4<f32>(lse_of(row), 0.0, 0.0, 0.0);
      }
    }
  }
}
