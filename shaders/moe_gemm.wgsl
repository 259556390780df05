// Products of many tokens with the matrices of their experts, tile by tile of moe_sort; one chunk of experts
// of W. Each pair (token, slot) gets a row of y; rows of W are joined by the epilogue.
// Grid: x tiles of pairs, y and z blocks of TILE_ROWS rows. Strides count f32.
// lib: weights_* (WeightWord, WeightPart, weight_part, weight_values), epilogue_* (epilogue).
// Constants: TILE_ROWS and TILE_PAIRS of a workgroup, LANE_ROWS and LANE_PAIRS of an invocation.

struct Params {
  rows: u32,         // of an expert
  columns: u32,      // of W, any number
  blocks: u32,       // from one row of W to the next
  first_expert: u32, // of the chunk
  chunk_experts: u32,
  share: u32,        // pairs that have the same row of x: the slots of a token in up, 1 in down
  x_stride: u32,     // a multiple of 4
  y_stride: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> order: array<u32>;          // [pairs]: pairs, expert after expert
@group(0) @binding(2) var<storage, read> tiles: array<vec4<u32>>;    // expert, first in `order`, count, 0
@group(0) @binding(3) var<storage, read> weights: array<WeightWord>; // [chunk_experts, rows, blocks]
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;        // [pairs / share, x_stride / 4]
@group(0) @binding(5) var<storage, read_write> y: array<f32>;        // [pairs, y_stride]

const STEP = 16u;                             // columns at a time
const QUADS = STEP / 4u;
const PITCH = QUADS + 1u;                     // vec4 a row of a tile: neighbours start in other memory banks
const ROW_LANES = TILE_ROWS / LANE_ROWS;
const PAIR_LANES = TILE_PAIRS / LANE_PAIRS;
const WORKGROUP = ROW_LANES * PAIR_LANES;
const ROW_PARTS = QUADS / WEIGHT_VECTORS;     // parts of a row and step
const W_LOADS = TILE_ROWS * ROW_PARTS / WORKGROUP;
const X_LOADS = TILE_PAIRS * QUADS / WORKGROUP;
const HALF = LANE_ROWS / EPILOGUE_ROWS;       // outputs of a lane and pair

var<workgroup> tile_w: array<vec4<f32>, TILE_ROWS * PITCH>;
var<workgroup> tile_x: array<vec4<f32>, TILE_PAIRS * PITCH>;

// Four elements of a row of x, zeros behind its end: what stands there belongs to others.
fn x_quad(start: u32, quad: u32) -> vec4<f32> {
  var value = vec4<f32>(0.0);
  if (4u * quad < params.columns) {
    let own = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(params.columns);
    value = select(value, x[start + quad], own);
  }
  return value;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let tile = tiles[group.x];
  let first = tile.y;
  let count = tile.z;
  let expert = tile.x - params.first_expert; // wraps round below the chunk
  let first_row = (group.y + group.z * groups.y) * TILE_ROWS;
  if (count == 0u || tile.x < params.first_expert || expert >= params.chunk_experts || first_row >= params.rows) {
    return;
  }
  let row_lane = lane % ROW_LANES;
  let pair_lane = lane / ROW_LANES;
  let steps = (params.columns + STEP - 1u) / STEP;
  let row_parts = params.blocks * (WEIGHT_BLOCK / (4u * WEIGHT_VECTORS));

  var w_starts: array<u32, W_LOADS>;
  for (var i = 0u; i < W_LOADS; i++) {
    let row = min(first_row + (i * WORKGROUP + lane) / ROW_PARTS, params.rows - 1u);
    w_starts[i] = (expert * params.rows + row) * row_parts + (i * WORKGROUP + lane) % ROW_PARTS;
  }
  var x_starts: array<u32, X_LOADS>;
  for (var i = 0u; i < X_LOADS; i++) {
    let pair = order[first + min((i * WORKGROUP + lane) / QUADS, count - 1u)];
    x_starts[i] = pair / params.share * (params.x_stride / 4u);
  }
  var sums: array<f32, LANE_PAIRS * LANE_ROWS>;
  for (var i = 0u; i < LANE_PAIRS * LANE_ROWS; i++) {
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
        parts[i] = weight_part(w_starts[i] + step * ROW_PARTS);
      }
      for (var i = 0u; i < X_LOADS; i++) {
        quads[i] = x_quad(x_starts[i], step * QUADS + (i * WORKGROUP + lane) % QUADS);
      }
    }
    if (step > 0u) {
      for (var q = 0u; q < QUADS; q++) {
        var a: array<vec4<f32>, LANE_ROWS>;
        for (var r = 0u; r < LANE_ROWS; r++) {
          a[r] = tile_w[(row_lane + r * ROW_LANES) * PITCH + q];
        }
        for (var t = 0u; t < LANE_PAIRS; t++) {
          let b = tile_x[(pair_lane + t * PAIR_LANES) * PITCH + q];
          for (var r = 0u; r < LANE_ROWS; r++) {
            let i = t * LANE_ROWS + r;
            sums[i] = a[r].x * b.x + (a[r].y * b.y + (a[r].z * b.z + (a[r].w * b.w + sums[i])));
          }
        }
      }
    }
  }

  for (var t = 0u; t < LANE_PAIRS; t++) {
    let at = pair_lane + t * PAIR_LANES;
    if (at < count) {
      let to = order[first + at] * params.y_stride + first_row / EPILOGUE_ROWS;
      for (var r = 0u; r < HALF; r++) {
        let output = row_lane + r * ROW_LANES;
        if (first_row + output * EPILOGUE_ROWS < params.rows) {
          var rows: array<f32, EPILOGUE_ROWS>;
          for (var e = 0u; e < EPILOGUE_ROWS; e++) {
            rows[e] = sums[t * LANE_ROWS + e * HALF + r];
          }
          y[to + output] = epilogue(rows, 0.0);
        }
      }
    }
  }
}
