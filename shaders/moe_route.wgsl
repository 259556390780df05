// Which experts a token goes to, and how they weigh: the TOP_K greatest scores of the router's logits, then
// SHARED experts that every token goes to, numbered behind the others.
// Grid: one workgroup a token. Equal choices go by the lower index.
// lib: reduce_* (reduce_sum, reduce_max).
// Constants: WORKGROUP; EXPERTS, TOP_K; SOFTMAX, else sigmoid; BIAS, whether `bias` is added to choose (bind
// anything to it where not); GROUPS of which KEPT are kept by the sum of their GROUP_BEST greatest choices;
// what masks the others: ZERO_CHOICE counts them as 0, else below all, and ZERO_SCORE weighs them 0;
// RENORMALISE, whether the weights are divided by their sum; SHARED.

struct Params {
  tokens: u32,
  stride: u32, // of logits
  scale: f32,  // of the weights
  shared_weight: f32, // of each shared expert
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;            // [tokens, stride]
@group(0) @binding(2) var<storage, read> bias: array<f32>;              // [EXPERTS]
@group(0) @binding(3) var<storage, read_write> routes: array<vec2<u32>>; // [tokens, SLOTS]: expert, bits of its weight

const OWN = (EXPERTS + WORKGROUP - 1u) / WORKGROUP; // experts of a lane: lane, lane + WORKGROUP ...
const GROUP = EXPERTS / GROUPS;
const SLOTS = TOP_K + SHARED;
const LEAST = -3.0e38;
const NAN = 0x7fc00000u;

var<workgroup> keys: array<u32, (EXPERTS + 3u) / 4u * 4u>;
var<workgroup> group_keys: array<u32, (GROUPS + 3u) / 4u * 4u>;
var<workgroup> chosen: array<vec2<u32>, (TOP_K + 1u) / 2u * 2u>; // expert, bits of its score

// WGSL lets compilers assume that no number is infinite or NaN: the bits tell.
fn is_finite(x: f32) -> bool {
  return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// An integer that grows with a finite number; 0 is below all.
fn key_of(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn number_of(key: u32) -> f32 {
  return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}

fn sigmoid(x: f32) -> f32 {
  let e = exp(-abs(x)); // cannot overflow
  return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

fn group_is_kept(group: u32) -> bool {
  let own = group_keys[group];
  var before = 0u;
  for (var g = 0u; g < GROUPS; g++) {
    let key = group_keys[g];
    before += u32(key > own || (key == own && g < group));
  }
  return before < KEPT;
}

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
  let token = group.x + group.y * groups.x;
  if (token >= params.tokens) {
    return;
  }

  var scores: array<f32, OWN>;
  var largest = LEAST;
  var broken = 0.0;
  for (var k = 0u; k < OWN; k++) {
    let expert = k * WORKGROUP + lane;
    if (expert < EXPERTS) {
      scores[k] = logits[token * params.stride + expert];
      broken = select(1.0, broken, is_finite(scores[k]));
      largest = max(largest, scores[k]);
    }
  }
  if (SOFTMAX) {
    largest = reduce_max(largest, lane);
    var sum = 0.0;
    for (var k = 0u; k < OWN; k++) {
      if (k * WORKGROUP + lane < EXPERTS) {
        scores[k] = exp(scores[k] - largest);
        sum += scores[k];
      }
    }
    sum = reduce_sum(sum, lane);
    for (var k = 0u; k < OWN; k++) {
      scores[k] /= sum;
    }
  } else {
    for (var k = 0u; k < OWN; k++) {
      scores[k] = sigmoid(scores[k]);
    }
  }

  for (var k = 0u; k < OWN; k++) {
    let expert = k * WORKGROUP + lane;
    if (expert < EXPERTS) {
      var choice = scores[k];
      if (BIAS) {
        choice += bias[expert];
        broken = select(1.0, broken, is_finite(choice));
      }
      keys[expert] = key_of(choice);
    }
  }
  broken = reduce_max(broken, lane); // its barriers show all keys, too

  if (GROUPS > 1u) {
    for (var g = lane; g < GROUPS; g += WORKGROUP) {
      var best = 0u;
      var second = 0u;
      for (var i = 0u; i < GROUP; i++) {
        let key = keys[g * GROUP + i];
        second = max(second, min(best, key));
        best = max(best, key);
      }
      group_keys[g] = best;
      if (GROUP_BEST == 2u) {
        group_keys[g] = key_of(number_of(best) + number_of(second));
      }
    }
    workgroupBarrier();
    for (var k = 0u; k < OWN; k++) {
      let expert = k * WORKGROUP + lane;
      if (expert < EXPERTS && !group_is_kept(expert / GROUP)) {
        keys[expert] = select(0u, key_of(0.0), ZERO_CHOICE);
        scores[k] = select(scores[k], 0.0, ZERO_SCORE);
      }
    }
  }
  if (broken > 0.0) {
    for (var expert = lane; expert < EXPERTS; expert += WORKGROUP) {
      keys[expert] = EXPERTS - expert;
    }
  }
  workgroupBarrier();

  // An expert's place is the number of experts that go before it: all places at once, none twice.
  var before: array<u32, OWN>;
  var own: array<u32, OWN>;
  for (var k = 0u; k < OWN; k++) {
    before[k] = 0u;
    own[k] = keys[min(k * WORKGROUP + lane, EXPERTS - 1u)];
  }
  for (var i = 0u; i < EXPERTS; i++) {
    let key = keys[i];
    for (var k = 0u; k < OWN; k++) {
      before[k] += u32(key > own[k] || (key == own[k] && i < k * WORKGROUP + lane));
    }
  }
  for (var k = 0u; k < OWN; k++) {
    let expert = k * WORKGROUP + lane;
    if (expert < EXPERTS && before[k] < TOP_K) {
      chosen[before[k]] = vec2<u32>(expert, bitcast<u32>(scores[k]));
    }
  }
  workgroupBarrier();

  if (lane < TOP_K) {
    let route = chosen[lane];
    var weight = bitcast<f32>(route.y);
    if (RENORMALISE) {
      var sum = 1e-20;
      for (var k = 0u; k < TOP_K; k++) {
        sum += bitcast<f32>(chosen[k].y);
      }
      weight /= sum;
    }
    let bits = select(bitcast<u32>(weight * params.scale), NAN, broken > 0.0);
    routes[token * SLOTS + lane] = vec2<u32>(route.x, bits);
  } else if (lane < SLOTS) {
    routes[token * SLOTS + lane] = vec2<u32>(EXPERTS + lane - TOP_K, bitcast<u32>(params.shared_weight));
  }
}
