// Attention of a step's queries over keys and values that heads share in groups, one split of each sequence's
// context: bands of lanes take tokens in turn, each with its own maxima. Writes what mla_decode does.
// Grid: x blocks of ROWS (token, head) rows of each group, group after group; y splits of one cache chunk.
// lib: batch, rows_* (record_of), score_* (score, NOTHING), band_* (band_put, band_meet, band_sum, BAND_SCRATCH, BAND_SUMS).
// Constants: D width of a head, WORKGROUP, ROWS of a block, STEP tokens that a band takes at once.

struct Params {
  heads: u32,
  groups: u32,      // heads of keys and values
  first_split: u32, // of the bound chunk
  first_page: u32,
  page_bits: u32,   // a page has 1 << page_bits tokens
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;          // [sequences]
@group(0) @binding(2) var<storage, read> splits: array<Split>;            // [splits]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;         // [entries] page numbers
@group(0) @binding(4) var<storage, read> queries: array<vec4<f32>>;       // [tokens, heads, D / 4], in units of log2
@group(0) @binding(5) var<storage, read> cache: array<vec4<u32>>;         // [pages, page tokens, groups, key then value, D] f16
@group(0) @binding(6) var<storage, read_write> partials: array<f32>;      // [partial tokens, heads, D + 4]

const UNITS = D / 8u;            // vec4<u32> of a key, and lanes of a band
const BANDS = WORKGROUP / UNITS;
const VALUES = STEP * ROWS;      // scores of a band at once
const WIDTH = D + 4u;            // of a partial

var<workgroup> scratch: array<f32, max(BAND_SCRATCH, BANDS * D)>;   // of band_*; at last [BANDS, D] outputs
var<workgroup> sums: array<f32, max(BAND_SUMS, 2u * BANDS * ROWS)>; // of band_*; at last [BANDS, ROWS] maxima, then totals

// Values 0 to 3 and 4 to 7 of eight f16.
fn low(unit: vec4<u32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(unit.x), unpack2x16float(unit.y));
}

fn high(unit: vec4<u32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(unit.z), unpack2x16float(unit.w));
}

// Where this lane's part of the key of a step's first token stands, and the last of the STEP that there is: a step
// lies in one page. Behind the end the last token stands in: it is a number, and weighs 0.
fn place_of(pages: u32, token: u32, end: u32, group: u32, part: u32) -> vec2<u32> {
  let first = min(token, end - 1u);
  return vec2<u32>((record_of(pages, first) * params.groups + group) * 2u * UNITS + part, end - 1u - first);
}

// That of token `i` of the step; its value's is UNITS further.
fn key_at(place: vec2<u32>, i: u32) -> u32 {
  return place.x + min(i, place.y) * params.groups * 2u * UNITS;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) block: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
  let split = splits[params.first_split + block.y];
  let sequence = batch[split.sequence];
  let group = block.x % params.groups;
  let each = params.heads / params.groups; // heads of a group
  let rows = sequence.tokens * each;
  let first = block.x / params.groups * ROWS;
  if (first >= rows) {
    return; // another sequence of the batch has more rows
  }
  let band = lane / UNITS;
  let part = lane % UNITS;

  var query: array<vec4<f32>, 2u * ROWS>; // this lane's eight columns of each row
  var ends: array<u32, ROWS>;             // one past the last token that it sees
  var folded: array<vec4<f32>, 2u * ROWS>;
  var maximum: array<f32, ROWS>;
  var total: array<f32, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    let row = min(first + r, rows - 1u);
    let token = row / each;
    let at = ((sequence.first_row + token) * params.heads + group * each + row % each) * (D / 4u) + 2u * part;
    query[2u * r] = queries[at];
    query[2u * r + 1u] = queries[at + 1u];
    ends[r] = sequence.position + token + 1u;
    folded[2u * r] = vec4<f32>(0.0);
    folded[2u * r + 1u] = vec4<f32>(0.0);
    maximum[r] = NOTHING;
    total[r] = 0.0;
  }

  var place = place_of(sequence.pages, split.begin + band * STEP, split.end, group, part);
  var keys: array<vec4<u32>, STEP>;
  for (var i = 0u; i < STEP; i++) {
    keys[i] = cache[key_at(place, i)];
  }
  for (var base = split.begin; base < split.end; base += BANDS * STEP) {
    let start = base + band * STEP;
    var values: array<vec4<u32>, STEP>;
    for (var i = 0u; i < STEP; i++) {
      values[i] = cache[key_at(place, i) + UNITS];
    }
    for (var i = 0u; i < STEP; i++) {
      let key0 = low(keys[i]);
      let key1 = high(keys[i]);
      for (var r = 0u; r < ROWS; r++) {
        band_put(i * ROWS + r, dot(query[2u * r], key0) + dot(query[2u * r + 1u], key1), lane);
      }
    }
    place = place_of(sequence.pages, start + BANDS * STEP, split.end, group, part);
    for (var i = 0u; i < STEP; i++) { // on their way while this step is folded
      keys[i] = cache[key_at(place, i)];
    }
    band_meet(lane);
    for (var r = 0u; r < ROWS; r++) {
      var scores: array<f32, STEP>;
      var largest = maximum[r];
      for (var i = 0u; i < STEP; i++) {
        scores[i] = score(band_sum(i * ROWS + r, band), start + i, min(ends[r], split.end));
        largest = max(largest, scores[i]);
      }
      let scale = exp2(maximum[r] - largest);
      var sum = total[r] * scale;
      var out0 = folded[2u * r] * scale;
      var out1 = folded[2u * r + 1u] * scale;
      for (var i = 0u; i < STEP; i++) {
        let weight = select(exp2(scores[i] - largest), 0.0, scores[i] <= 0.5 * NOTHING);
        sum += weight;
        out0 += weight * low(values[i]);
        out1 += weight * high(values[i]);
      }
      maximum[r] = largest;
      total[r] = sum;
      folded[2u * r] = out0;
      folded[2u * r + 1u] = out1;
    }
  }

  workgroupBarrier(); // nobody reads sums any more
  if (part == 0u) {
    for (var r = 0u; r < ROWS; r++) {
      sums[band * ROWS + r] = maximum[r];
      sums[(BANDS + band) * ROWS + r] = total[r];
    }
  }
  workgroupBarrier();
  for (var r = 0u; r < ROWS; r++) {
    var largest = NOTHING;
    for (var b = 0u; b < BANDS; b++) {
      largest = max(largest, sums[b * ROWS + r]);
    }
    var sum = 0.0;
    for (var b = 0u; b < BANDS; b++) {
      sum += sums[(BANDS + b) * ROWS + r] * exp2(sums[b * ROWS + r] - largest);
    }
    let factor = exp2(maximum[r] - largest) / max(sum, 1e-30);
    for (var k = 0u; k < 4u; k++) {
      scratch[8u * lane + k] = folded[2u * r][k] * factor;
      scratch[8u * lane + 4u + k] = folded[2u * r + 1u][k] * factor;
    }
    workgroupBarrier();
    if (first + r < rows) {
      let row = first + r;
      let at = ((split.partial + row / each) * params.heads + group * each + row % each) * WIDTH;
      for (var column = lane; column < D; column += WORKGROUP) {
        var merged = 0.0;
        for (var b = 0u; b < BANDS; b++) {
          merged += scratch[b * D + column];
        }
        partials[at + column] = merged;
      }
      if (lane == 0u) {
        partials[at + D] = select(largest + log2(sum), NOTHING, sum <= 0.0);
      }
    }
    workgroupBarrier(); // scratch is free
  }
}
