// y[token, row] = W[row] . x[token] for a few tokens, rows joined by the epilogue; one chunk of rows of W. With
// NORM of x / sqrt(mean(x^2) + eps) * norm: the root is taken out of the sum, so that x is read but once.
// Grid: x blocks of TOKENS tokens, y and z blocks of TEAMS / SPLIT * ROWS rows. Strides and offsets count f32.
// lib: weights_* (WeightWord, WeightPart, weight_part, weight_values), epilogue_* (epilogue),
// team_* (Invocation, team_of, team_leave, team_total).
// Constants: WORKGROUP, TEAMS that work on ROWS rows each, UNROLL parts of a row that a lane has under
// way, SPLIT teams that share the columns of ROWS rows, TOKENS that share a read of W; NORM (bind anything to `norm` where not).

struct Params {
  rows: u32,      // of the chunk
  columns: u32,   // of W, any number
  blocks: u32,    // from one row of W to the next
  first_row: u32, // of the chunk in W
  tokens: u32,
  x_stride: u32,  // strides and offsets of x are multiples of 4
  x_offset: u32,
  y_stride: u32,
  y_offset: u32,
  scale: f32,     // of what is added to y
  eps: f32,       // of the norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weights: array<WeightWord>; // [rows, blocks]
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;        // [tokens, x_stride / 4]
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>;     // [ceil(columns / 4)]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;        // [tokens, y_stride]

const PART = 4u * WEIGHT_VECTORS;
const PRODUCTS = ROWS * TOKENS;
const OUTPUTS = PRODUCTS + select(0u, TOKENS, NORM); // sums of a lane: products, then squares of x
const BLOCK_ROWS = TEAMS / SPLIT * ROWS;
const BLOCK_OUTPUTS = BLOCK_ROWS / EPILOGUE_ROWS; // of a token

// Four elements of a row of x whose other elements belong to others.
fn x_masked(start: u32, quad: u32) -> vec4<f32> {
  var value = vec4<f32>(0.0);
  if (4u * quad < params.columns) {
    let own = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.columns);
    value = select(value, x[start + quad], own);
  }
  return value;
}

// Adds the products of one part of each row, those of `parts` from `first` on.
fn multiply(sums: ptr<function, array<f32, OUTPUTS>>, parts: ptr<function, array<WeightPart, ROWS * UNROLL>>,
            first: u32, starts: ptr<function, array<u32, TOKENS>>, part: u32, masked: bool) {
  var values: array<array<vec4<f32>, WEIGHT_VECTORS>, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    values[r] = weight_values((*parts)[first + r]);
  }
  for (var t = 0u; t < TOKENS; t++) {
    for (var v = 0u; v < WEIGHT_VECTORS; v++) {
      let quad = part * WEIGHT_VECTORS + v;
      var b: vec4<f32>;
      if (masked) {
        b = x_masked((*starts)[t], quad);
      } else {
        b = x[(*starts)[t] + quad];
      }
      if (NORM) {
        (*sums)[PRODUCTS + t] += dot(b, b);
        b *= norm[min(quad, (params.columns - 1u) / 4u)];
      }
      for (var r = 0u; r < ROWS; r++) {
        let a = values[r][v];
        let i = r * TOKENS + t;
        (*sums)[i] = a.x * b.x + (a.y * b.y + (a.z * b.z + (a.w * b.w + (*sums)[i])));
      }
    }
  }
}

// The sum of all teams that share some rows.
fn total(group: u32, output: u32, lane: u32) -> f32 {
  var sum = 0.0;
  for (var i = 0u; i < SPLIT; i++) {
    sum += team_total(group * SPLIT + i, output, lane);
  }
  return sum;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, at: Invocation) {
  let first_token = group.x * TOKENS;
  let first_row = (group.y + group.z * groups.y) * BLOCK_ROWS;
  if (first_row >= params.rows) {
    return;
  }
  let row_parts = params.blocks * (WEIGHT_BLOCK / PART);
  let whole = params.columns / PART; // parts with nothing behind the row's end
  let share = ((params.columns + PART - 1u) / PART + SPLIT - 1u) / SPLIT; // of a team, in parts
  let team = team_of(at);

  var x_starts: array<u32, TOKENS>;
  for (var t = 0u; t < TOKENS; t++) {
    x_starts[t] = (min(first_token + t, params.tokens - 1u) * params.x_stride + params.x_offset) / 4u;
  }
  for (var turn = 0u; turn < team.turns; turn++) {
    let number = team.first + turn * team.step;
    var starts: array<u32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
      starts[r] = min(first_row + number / SPLIT * ROWS + r, params.rows - 1u) * row_parts;
    }
    var sums: array<f32, OUTPUTS>;
    for (var i = 0u; i < OUTPUTS; i++) {
      sums[i] = 0.0;
    }
    var parts: array<WeightPart, ROWS * UNROLL>;
    let end = min((number % SPLIT + 1u) * share, (params.columns + PART - 1u) / PART);
    var part = number % SPLIT * share + team.rank;
    for (; part + (UNROLL - 1u) * team.width < min(end, whole); part += UNROLL * team.width) {
      for (var k = 0u; k < UNROLL; k++) {
        for (var r = 0u; r < ROWS; r++) {
          parts[k * ROWS + r] = weight_part(starts[r] + part + k * team.width);
        }
      }
      for (var k = 0u; k < UNROLL; k++) {
        multiply(&sums, &parts, k * ROWS, &x_starts, part + k * team.width, false);
      }
    }
    // The rest, and the part that is not all of the row.
    for (; part < end; part += team.width) {
      for (var r = 0u; r < ROWS; r++) {
        parts[r] = weight_part(starts[r] + part);
      }
      multiply(&sums, &parts, 0u, &x_starts, part, true);
    }
    team_leave(number, team.rank, sums);
  }
  workgroupBarrier();

  for (var i = at.lane; i < BLOCK_OUTPUTS * TOKENS; i += WORKGROUP) {
    let token = i / BLOCK_OUTPUTS;
    let output = i % BLOCK_OUTPUTS;
    let row = output * EPILOGUE_ROWS;
    if (first_row + row < params.rows && first_token + token < params.tokens) {
      var rows: array<f32, EPILOGUE_ROWS>;
      for (var e = 0u; e < EPILOGUE_ROWS; e++) {
        rows[e] = total((row + e) / ROWS, (row + e) % ROWS * TOKENS + token, at.lane);
      }
      if (NORM) {
        let squares = total(row / ROWS, PRODUCTS + token, at.lane);
        let factor = 1.0 / sqrt(squares / f32(params.columns) + params.eps);
        for (var e = 0u; e < EPILOGUE_ROWS; e++) {
          rows[e] *= factor;
        }
      }
      let column = (params.first_row + first_row) / EPILOGUE_ROWS + output;
      let to = (first_token + token) * params.y_stride + params.y_offset + column;
      y[to] = epilogue(rows, y[to]);
    }
  }
}
