// Products of few tokens with the matrices of their experts; one chunk of experts of W. Up: of each pair
// (token, slot), rows joined by the epilogue. Down: of each token, (y +) the sum over its slots of
// weight * product, where an expert without weights gives the token's own input. With NORM up takes
// x / sqrt(mean(x^2) + eps) * norm, as gemv does.
// Grid: x pairs (up) or tokens (down), y and z blocks of GROUPS * ROWS rows. Strides count f32.
// lib: weights_* (WeightWord, WeightPart, weight_part, weight_values), epilogue_* (epilogue),
// team_* (Invocation, team_of, team_leave, team_total).
// Constants: WORKGROUP; DOWN; SLOTS that an output joins: a token's in down, 1 in up; GROUPS of ROWS rows, each
// with SLOTS teams: TEAMS = GROUPS * SLOTS; UNROLL parts of a row that a lane has under way; NORM (bind anything
// to `norm` where not).

struct Params {
  rows: u32,         // of an expert
  columns: u32,      // of W, any number
  blocks: u32,       // from one row of W to the next
  first_expert: u32, // of the chunk
  chunk_experts: u32,
  experts: u32,      // that have weights, of all chunks
  share: u32,        // pairs that have the same row of x: the slots of a token in up, 1 in down
  x_stride: u32,     // a multiple of 4
  input_stride: u32,
  y_stride: u32,
  add: u32,          // 1: down adds to what y holds
  identity: u32,     // 1: the experts without weights are of this chunk
  eps: f32,          // of the norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> routes: array<vec2<u32>>;   // [pairs]: expert, bits of its weight
@group(0) @binding(2) var<storage, read> weights: array<WeightWord>; // [chunk_experts, rows, blocks]
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;        // [tokens (up) or pairs (down), x_stride / 4]
@group(0) @binding(4) var<storage, read> input: array<f32>;          // [tokens, input_stride]; down: as long as y
@group(0) @binding(5) var<storage, read> norm: array<vec4<f32>>;     // [ceil(columns / 4)]
@group(0) @binding(6) var<storage, read_write> y: array<f32>;        // [pairs (up) or tokens (down), y_stride]

const PART = 4u * WEIGHT_VECTORS;
const OUTPUTS = ROWS + select(0u, 1u, NORM); // sums of a lane: products, then squares of x
const BLOCK_ROWS = GROUPS * ROWS;

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
            first: u32, start: u32, part: u32, masked: bool) {
  var b: array<vec4<f32>, WEIGHT_VECTORS>;
  for (var v = 0u; v < WEIGHT_VECTORS; v++) {
    let quad = part * WEIGHT_VECTORS + v;
    if (masked) {
      b[v] = x_masked(start, quad);
    } else {
      b[v] = x[start + quad];
    }
    if (NORM) {
      (*sums)[OUTPUTS - 1u] += dot(b[v], b[v]);
      b[v] *= norm[min(quad, (params.columns - 1u) / 4u)];
    }
  }
  for (var r = 0u; r < ROWS; r++) {
    var a = weight_values((*parts)[first + r]);
    for (var v = 0u; v < WEIGHT_VECTORS; v++) {
      (*sums)[r] = a[v].x * b[v].x + (a[v].y * b[v].y + (a[v].z * b[v].z + (a[v].w * b[v].w + (*sums)[r])));
    }
  }
}

fn in_chunk(expert: u32) -> bool {
  return expert >= params.first_expert && expert - params.first_expert < params.chunk_experts;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, at: Invocation) {
  let unit = group.x;
  let first_row = (group.y + group.z * groups.y) * BLOCK_ROWS;
  if (first_row >= params.rows || (!DOWN && !in_chunk(routes[unit].x))) {
    return;
  }
  let row_parts = params.blocks * (WEIGHT_BLOCK / PART);
  let whole = params.columns / PART; // parts with nothing behind the row's end
  let team = team_of(at);

  for (var turn = 0u; turn < team.turns; turn++) {
    let number = team.first + turn * team.step;
    let pair = unit * SLOTS + number % SLOTS;
    let expert = routes[pair].x;
    var sums: array<f32, OUTPUTS>;
    for (var i = 0u; i < OUTPUTS; i++) {
      sums[i] = 0.0;
    }
    if (number < TEAMS && in_chunk(expert)) {
      let row_group = first_row + number / SLOTS * ROWS;
      var starts: array<u32, ROWS>;
      for (var r = 0u; r < ROWS; r++) {
        let row = (expert - params.first_expert) * params.rows + min(row_group + r, params.rows - 1u);
        starts[r] = row * row_parts;
      }
      let x_start = pair / params.share * (params.x_stride / 4u);
      var parts: array<WeightPart, ROWS * UNROLL>;
      var part = team.rank;
      for (; part + (UNROLL - 1u) * team.width < whole; part += UNROLL * team.width) {
        for (var k = 0u; k < UNROLL; k++) {
          for (var r = 0u; r < ROWS; r++) {
            parts[k * ROWS + r] = weight_part(starts[r] + part + k * team.width);
          }
        }
        for (var k = 0u; k < UNROLL; k++) {
          multiply(&sums, &parts, k * ROWS, x_start, part + k * team.width, false);
        }
      }
      // The rest, and the part that is not all of the row.
      for (; part * PART < params.columns; part += team.width) {
        for (var r = 0u; r < ROWS; r++) {
          parts[r] = weight_part(starts[r] + part);
        }
        multiply(&sums, &parts, 0u, x_start, part, part == whole);
      }
    }
    team_leave(number, team.rank, sums);
  }
  workgroupBarrier();

  for (var output = at.lane; output < BLOCK_ROWS / EPILOGUE_ROWS; output += WORKGROUP) {
    let row = output * EPILOGUE_ROWS;
    if (first_row + row < params.rows) {
      let column = first_row / EPILOGUE_ROWS + output;
      let to = unit * params.y_stride + column;
      if (DOWN) {
        var sum = 0.0;
        if (params.add == 1u) {
          sum = y[to];
        }
        for (var slot = 0u; slot < SLOTS; slot++) {
          let route = routes[unit * SLOTS + slot];
          if (in_chunk(route.x)) {
            sum += bitcast<f32>(route.y) * team_total(row / ROWS * SLOTS + slot, row % ROWS, at.lane);
          } else if (params.identity == 1u && route.x >= params.experts) {
            sum += bitcast<f32>(route.y) * input[unit * params.input_stride + column];
          }
        }
        y[to] = sum;
      } else {
        var rows: array<f32, EPILOGUE_ROWS>;
        for (var e = 0u; e < EPILOGUE_ROWS; e++) {
          rows[e] = team_total((row + e) / ROWS, (row + e) % ROWS, at.lane);
        }
        if (NORM) {
          let squares = team_total(row / ROWS, OUTPUTS - 1u, at.lane);
          let factor = 1.0 / sqrt(squares / f32(params.columns) + params.eps);
          for (var e = 0u; e < EPILOGUE_ROWS; e++) {
            rows[e] *= factor;
          }
        }
        y[to] = epilogue(rows, 0.0);
      }
    }
  }
}
