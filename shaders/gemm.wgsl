// y[token, row] = W[row] . x[token] for many tokens, rows joined by the epilogue; one chunk of rows of W.
// Grid: x blocks of TILE_TOKENS tokens, y and z blocks of TILE_ROWS rows. Strides and offsets count f32.
// lib: weights_* (WeightWord, WeightPart, weight_part, weight_values), epilogue_* (epilogue).
// Constants: TILE_ROWS and TILE_TOKENS of a workgroup, LANE_ROWS and LANE_TOKENS of an invocation.

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
  eps: f32,       // of gemv's norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weights: array<WeightWord>; // [rows, blocks]
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;        // [tokens, x_stride / 4]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;        // [tokens, y_stride]

const STEP = 16u;                             // columns at a time
const QUADS = STEP / 4u;
const PITCH = QUADS + 1u;                     // vec4 a row of a tile: neighbours start in other memory banks
const ROW_LANES = TILE_ROWS / LANE_ROWS;
const TOKEN_LANES = TILE_TOKENS / LANE_TOKENS;
const WORKGROUP = ROW_LANES * TOKEN_LANES;
const ROW_PARTS = QUADS / WEIGHT_VECTORS;     // parts of a row and step
const W_LOADS = TILE_ROWS * ROW_PARTS / WORKGROUP;
const X_LOADS = TILE_TOKENS * QUADS / WORKGROUP;
const HALF = LANE_ROWS / EPILOGUE_ROWS;       // outputs of a lane and token

var<workgroup> tile_w: array<vec4<f32>, TILE_ROWS * PITCH>;
var<workgroup> tile_x: array<vec4<f32>, TILE_TOKENS * PITCH>;

// Four elements of a row of x, zeros behind its end: what stands there belongs to others.
fn x_quad(token: u32, quad: u32) -> vec4<f32> {
  var value = vec4<f32>(0.0);
  if (4u * quad < params.columns) {
    let at = (min(token, params.tokens - 1u) * params.x_stride + params.x_offset) / 4u + quad;
    let own = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.columns);
    value = select(value, x[at], own);
  }
  return value;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let first_token = group.x * TILE_TOKENS;
  let first_row = (group.y + group.z * groups.y) * TILE_ROWS;
  if (first_row >= params.rows) {
    return;
  }
  let row_lane = lane % ROW_LANES;
  let token_lane = lane / ROW_LANES;
  let steps = (params.columns + STEP - 1u) / STEP;
  let row_parts = params.blocks * (WEIGHT_BLOCK / (4u * WEIGHT_VECTORS));

  var sums: array<f32, LANE_TOKENS * LANE_ROWS>;
  for (var i = 0u; i < LANE_TOKENS * LANE_ROWS; i++) {
    sums[i] = 0.0;
  }
  // The next step's loads are under way while this one's products are summed.
  var parts: array<WeightPart, W_LOADS>;
  var quads: array<vec4<f32>, X_LOADS>;
  for (var step = 0u; step <= steps; step++) {
    if (step > 0u) {
      workgroupBarrier(); // the last step's readers are done
      for (var i = 0u; i < W_LOADS; i++) {
        let row = (i * WORKGROUP + lane) / ROW_PARTS;
        // Rows that one output joins stand apart, so that one lane reads them at the same place of each.
        let slot = row % EPILOGUE_ROWS * (TILE_ROWS / EPILOGUE_ROWS) + row / EPILOGUE_ROWS;
        var values = weight_values(parts[i]);
        for (var v = 0u; v < WEIGHT_VECTORS; v++) {
          tile_w[slot * PITCH + (i * WORKGROUP + lane) % ROW_PARTS * WEIGHT_VECTORS + v] = values[v];
        }
      }
      for (var i = 0u; i < X_LOADS; i++) {
        tile_x[(i * WORKGROUP + lane) / QUADS * PITCH + (i * WORKGROUP + lane) % QUADS] = quads[i];
      }
      workgroupBarrier();
    }
    if (step < steps) {
      for (var i = 0u; i < W_LOADS; i++) {
        let row = min(first_row + (i * WORKGROUP + lane) / ROW_PARTS, params.rows - 1u);
        parts[i] = weight_part(row * row_parts + step * ROW_PARTS + (i * WORKGROUP + lane) % ROW_PARTS);
      }
      for (var i = 0u; i < X_LOADS; i++) {
        let token = first_token + (i * WORKGROUP + lane) / QUADS;
        quads[i] = x_quad(token, step * QUADS + (i * WORKGROUP + lane) % QUADS);
      }
    }
    if (step > 0u) {
      for (var q = 0u; q < QUADS; q++) {
        var a: array<vec4<f32>, LANE_ROWS>;
        for (var r = 0u; r < LANE_ROWS; r++) {
          a[r] = tile_w[(row_lane + r * ROW_LANES) * PITCH + q];
        }
        for (var t = 0u; t < LANE_TOKENS; t++) {
          let b = tile_x[(token_lane + t * TOKEN_LANES) * PITCH + q];
          for (var r = 0u; r < LANE_ROWS; r++) {
            let i = t * LANE_ROWS + r;
            sums[i] = a[r].x * b.x + (a[r].y * b.y + (a[r].z * b.z + (a[r].w * b.w + sums[i])));
          }
        }
      }
    }
  }

  for (var t = 0u; t < LANE_TOKENS; t++) {
    let token = first_token + token_lane + t * TOKEN_LANES;
    for (var r = 0u; r < HALF; r++) {
      let output = row_lane + r * ROW_LANES;
      if (token < params.tokens && first_row + output * EPILOGUE_ROWS < params.rows) {
        var rows: array<f32, EPILOGUE_ROWS>;
        for (var e = 0u; e < EPILOGUE_ROWS; e++) {
          rows[e] = sums[t * LANE_ROWS + e * HALF + r];
        }
        let column = (params.first_row + first_row) / EPILOGUE_ROWS + output;
        let to = token * params.y_stride + params.y_offset + column;
        y[to] = epilogue(rows, y[to]);
      }
    }
  }
}
