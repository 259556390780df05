// The next token of each row of logits: repetition penalty, temperature, top-k, top-p, min-p, then a draw;
// greedy, without all that but the penalty, where the temperature is 0 or top-k 1. Writes its record, too.
// Grid: one workgroup a row.
// lib: batch (Sequence, Row), sampler (Sampler, Record, random), sample_cut (Cut, cut_at, draw),
// reduce_* (reduce_sum, reduce_max).
// Constants: WORKGROUP, which divides 1024.

struct Params {
  rows: u32,
  vocabulary: u32, // at most 2^18
  stride: u32,     // of logits, a multiple of 4
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> batch: array<Sequence>;         // [sequences]
@group(0) @binding(2) var<storage, read> rows: array<Row>;               // [rows]
@group(0) @binding(3) var<storage, read> samplers: array<Sampler>;       // [slots]
@group(0) @binding(4) var<storage, read> logits: array<vec4<f32>>;       // [rows, stride / 4]
@group(0) @binding(5) var<storage, read_write> seen: array<u32>;         // [slots, ceil(vocabulary / 32)] bits
@group(0) @binding(6) var<storage, read_write> tokens: array<u32>;       // [rows]
@group(0) @binding(7) var<storage, read_write> records: array<Record>;   // [rows]

const TOP = 5u;

// An integer that grows with a finite number, both zeros alike; 0 is below all.
fn order_of(x: f32) -> u32 {
  let bits = bitcast<u32>(select(x, 0.0, x == 0.0));
  return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn number_of(order: u32) -> f32 {
  return bitcast<f32>(select(~order, order & 0x7fffffffu, order >= 0x80000000u));
}

// The greater order, of equal ones the lower id.
fn better(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
  return select(b, a, a.x > b.x || (a.x == b.x && a.y < b.y));
}

fn reduce_best(value: vec2<u32>, lane: u32) -> vec2<u32> {
  workgroupBarrier(); // the last readers of scratch are done
  scratch[lane] = value;
  workgroupBarrier();
  if (lane < 16u) {
    var part = value;
    for (var i = lane + 16u; i < WORKGROUP; i += 16u) {
      part = better(part, scratch[i]);
    }
    scratch[lane] = part; // no other lane reads this column
  }
  workgroupBarrier();
  var best = scratch[0];
  for (var i = 1u; i < 16u; i++) {
    best = better(best, scratch[i]);
  }
  return best;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let row = group.x + group.y * groups.x;
  if (row >= params.rows) {
    return;
  }
  let sequence = batch[rows[row].sequence];
  let rule = samplers[sequence.slot];
  first_quad = row * (params.stride / 4u);
  first_word = sequence.slot * ((params.vocabulary + 31u) / 32u);
  penalty = rule.repetition_penalty;

  // This lane's greatest logits (order, id), the greatest after the penalty, and the sum of exp(logit - most).
  var top: array<vec2<u32>, TOP>;
  var best = vec2<u32>(0u);
  var most = LEAST;
  var sum = 0.0;
  var broken = 0.0;
  let quads = (params.vocabulary + 3u) / 4u;
  for (var start = lane; start < quads; start += WORKGROUP * UNROLL) {
    var x: array<vec4<f32>, UNROLL>;
    for (var k = 0u; k < UNROLL; k++) {
      x[k] = logits[first_quad + min(start + k * WORKGROUP, quads - 1u)];
    }
    for (var k = 0u; k < UNROLL; k++) {
      let first_id = 4u * (start + k * WORKGROUP);
      for (var i = 0u; i < 4u; i++) {
        let id = first_id + i;
        let finite = is_finite(x[k][i]);
        broken = select(broken, 1.0, id < params.vocabulary && !finite);
        x[k][i] = select(LEAST, x[k][i], id < params.vocabulary && finite);
      }
      let upper = max(max(x[k].x, x[k].y), max(x[k].z, x[k].w));
      if (upper > most) {
        sum *= exp(most - upper);
        most = upper;
      }
      sum += dot(exp(x[k] - most), vec4<f32>(1.0));
      if (penalty != 1.0) {
        for (var i = 0u; i < 4u; i++) {
          if (x[k][i] > LEAST) {
            best = better(vec2<u32>(order_of(penalised(x[k][i], first_id + i)), first_id + i), best);
          }
        }
      }
      if (order_of(upper) > top[4].x && upper > LEAST) {
        for (var i = 0u; i < 4u; i++) {
          let order = order_of(x[k][i]);
          // A lane's ids rise: of equal logits the first stays.
          if (order > top[4].x && x[k][i] > LEAST) {
            let own = vec2<u32>(order, first_id + i);
            top[4] = select(own, top[3], order > top[3].x);
            top[3] = select(top[3], select(own, top[2], order > top[2].x), order > top[3].x);
            top[2] = select(top[2], select(own, top[1], order > top[1].x), order > top[2].x);
            top[1] = select(top[1], select(own, top[0], order > top[0].x), order > top[1].x);
            top[0] = select(top[0], own, order > top[0].x);
          }
        }
      }
    }
  }
  broken = reduce_max(broken, lane);
  let peak = reduce_max(most, lane);
  let log_sum = peak + log(reduce_sum(sum * exp(most - peak), lane));
  var greatest = vec2<u32>(0u);
  for (var j = 0u; j < TOP; j++) {
    let winner = reduce_best(top[0], lane);
    let won = all(top[0] == winner);
    top[0] = select(top[0], top[1], won);
    top[1] = select(top[1], top[2], won);
    top[2] = select(top[2], top[3], won);
    top[3] = select(top[3], top[4], won);
    top[4] = select(top[4], vec2<u32>(0u), won);
    if (j == 0u) {
      greatest = winner;
    }
    if (lane == 0u) {
      records[row].top_tokens[j] = select(params.vocabulary, winner.y, winner.x > 0u);
      records[row].top_logprobs[j] = select(LEAST, number_of(winner.x) - log_sum, winner.x > 0u);
    }
  }
  if (rule.repetition_penalty != 1.0) {
    best = reduce_best(best, lane);
  } else {
    best = greatest;
  }

  var token = best.y;
  if (rule.temperature > 0.0 && rule.top_k != 1u) {
    largest = number_of(best.x);
    scale = min(1.0 / (STEP * rule.temperature), 1.0e30);
    var cut = Cut(LAST, ALL, -1.0);
    if (rule.top_k > 0u && rule.top_k < params.vocabulary) {
      cut = cut_at(vec2<f32>(f32(rule.top_k), ALL), lane);
    }
    if (rule.top_p < 1.0) {
      cut = cut_at(vec2<f32>(ALL, rule.top_p * cut.mass), lane);
    }
    if (rule.min_p > 0.0) {
      let key = u32(clamp(-log(rule.min_p) / STEP, 0.0, f32(LAST)));
      if (key < cut.key) {
        cut = Cut(key, ALL, 0.0);
      }
    }
    // 24 bits, so that the share is below 1 in f32.
    token = draw(cut, f32(random(sequence.seed, rows[row].position) >> 8u) * STEP, lane);
  }

  if (lane == 0u) {
    tokens[row] = token;
    seen[first_word + token / 32u] |= 1u << (token % 32u);
    let logit = logits[first_quad + token / 4u][token % 4u];
    records[row].token = token;
    records[row].logprob = select(LEAST, logit - log_sum, greatest.x > 0u);
    records[row].non_finite = u32(broken);
  }
}
