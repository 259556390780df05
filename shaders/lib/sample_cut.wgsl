// Which tokens of a row of logits the filters keep, and the draw among them, by the whole workgroup.
// lib: reduce_* (reduce_max). Of the kernel: params (vocabulary), logits, seen. Constants: WORKGROUP,
// which divides 1024.
//
// A token's key is how far it is below the greatest logit, after the temperature, in steps of 2^-24: the most
// probable tokens have the smallest keys, and a key says the weight. Each filter keeps the first so many of the
// tokens in order of (key, id), so all filters are one cut, found digit by digit, without sorting.

const DIGIT = 10u;
const BINS = 1024u;
const PER_LANE = BINS / WORKGROUP;
const STEP = 5.9604644775390625e-8; // 2^-24, a key's unit
const LAST = 1073741760u;           // keys from 64 on weigh nothing
const ALL = 1.0e9;                  // more than there is of anything
const NONE = 0xffffffffu;
const WHOLE = 0x80000000u;          // added to a bin that is kept whole
const LEAST = -3.0e38;
const UNROLL = 4u;                  // loads a lane has under way

struct Cut {
  key: u32,   // every token with a smaller key,
  ties: f32,  // and of those with this one the first so many
  mass: f32,  // the sum of their weights
}

var<private> first_quad: u32; // of the row's logits
var<private> first_word: u32; // of the slot's seen tokens
var<private> penalty: f32;
var<private> largest: f32;    // logit after the penalty
var<private> scale: f32;      // from logits to keys

var<workgroup> counts: array<atomic<u32>, BINS>; // of tokens with a digit
var<workgroup> losses: array<atomic<u32>, BINS>; // how much less they weigh than their number at the bin's start
var<workgroup> scratch: array<vec2<u32>, WORKGROUP>;
var<workgroup> first: array<atomic<u32>, 4>;     // one is used
var<workgroup> found: vec4<u32>;

// WGSL lets compilers assume that no number is infinite or NaN: the bits tell.
fn is_finite(x: f32) -> bool {
  return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

// The sum of the lanes' before this one; `scan_total` gives that of all.
fn scan(value: vec2<f32>, lane: u32) -> vec2<f32> {
  var sum = value;
  for (var step = 1u; step < WORKGROUP; step *= 2u) {
    workgroupBarrier();
    scratch[lane] = bitcast<vec2<u32>>(sum);
    workgroupBarrier();
    if (lane >= step) {
      sum += bitcast<vec2<f32>>(scratch[lane - step]);
    }
  }
  workgroupBarrier();
  scratch[lane] = bitcast<vec2<u32>>(sum);
  workgroupBarrier();
  return select(vec2<f32>(0.0), bitcast<vec2<f32>>(scratch[max(lane, 1u) - 1u]), lane > 0u);
}

fn scan_total() -> vec2<f32> {
  return bitcast<vec2<f32>>(scratch[WORKGROUP - 1u]);
}

// Hugging Face's rule: what was seen becomes less likely, once.
fn penalised(x: f32, id: u32) -> f32 {
  if (penalty != 1.0 && ((seen[first_word + id / 32u] >> (id % 32u)) & 1u) == 1u) {
    return select(x * penalty, x / penalty, x > 0.0);
  }
  return x;
}

fn key_of(x: f32, id: u32) -> u32 {
  if (id >= params.vocabulary || !is_finite(x) || x <= LEAST) {
    return LAST;
  }
  return min(u32(clamp((largest - penalised(x, id)) * scale, 0.0, f32(LAST))), LAST);
}

fn weight_of(key: u32) -> f32 {
  return select(0.0, exp(-f32(key) * STEP), key < LAST);
}

// Counts the tokens whose key starts with `prefix` by its next digit, the one above `shift` bits.
fn histogram(prefix: u32, shift: u32, quantum: f32, lane: u32) {
  let quads = (params.vocabulary + 3u) / 4u;
  for (var quad = lane; quad < quads; quad += WORKGROUP * UNROLL) {
    var x: array<vec4<f32>, UNROLL>;
    for (var k = 0u; k < UNROLL; k++) {
      x[k] = logits[first_quad + min(quad + k * WORKGROUP, quads - 1u)];
    }
    for (var k = 0u; k < UNROLL; k++) {
      for (var i = 0u; i < 4u; i++) {
        let key = key_of(x[k][i], 4u * (quad + k * WORKGROUP) + i);
        if (key < LAST && (key >> (shift + DIGIT)) == prefix) {
          let bin = (key >> shift) & (BINS - 1u);
          let y = f32(key & ((1u << shift) - 1u)) * STEP; // at most 1/16
          let loss = y * (1.0 - y / 2.0 * (1.0 - y / 3.0 * (1.0 - y / 4.0))); // 1 - exp(-y)
          atomicAdd(&counts[bin], 1u);
          atomicAdd(&losses[bin], u32(loss * quantum + 0.5));
        }
      }
    }
  }
}

// Count and mass of a bin.
fn bin_of(bin: u32, prefix: u32, shift: u32, quantum: f32) -> vec2<f32> {
  let count = f32(atomicLoad(&counts[bin]));
  let loss = f32(atomicLoad(&losses[bin])) / quantum;
  return vec2<f32>(count, (count - loss) * weight_of((prefix * BINS + bin) << shift));
}

// The shortest run of the most probable tokens that reaches a goal's count or mass; a negative mass is a share
// of all. All tokens where none does.
fn cut_at(goals: vec2<f32>, lane: u32) -> Cut {
  var goal = goals;
  var prefix = 0u;
  var before = vec2<f32>(0.0); // count and mass of what has smaller keys
  for (var shift = 2u * DIGIT; true; shift -= DIGIT) {
    // So that 2^18 losses do not overflow: a bin of the first digit is 1/16 wide.
    let quantum = select(268435456.0, 262144.0, shift == 2u * DIGIT);
    for (var bin = lane; bin < BINS; bin += WORKGROUP) {
      atomicStore(&counts[bin], 0u);
      atomicStore(&losses[bin], 0u);
    }
    if (lane == 0u) {
      atomicStore(&first[0], NONE);
    }
    workgroupBarrier();
    histogram(prefix, shift, quantum, lane);
    workgroupBarrier();

    var own = vec2<f32>(0.0);
    for (var i = 0u; i < PER_LANE; i++) {
      own += bin_of(lane * PER_LANE + i, prefix, shift, quantum);
    }
    var start = before + scan(own, lane);
    if (goal.y < 0.0) {
      goal.y *= -scan_total().y;
    }
    var own_bin = NONE;
    for (var i = 0u; i < PER_LANE && own_bin == NONE; i++) {
      let bin = lane * PER_LANE + i;
      let next = start + bin_of(bin, prefix, shift, quantum);
      if (next.x > start.x && (next.x >= goal.x || next.y >= goal.y)) {
        own_bin = bin;
        atomicMin(&first[0], bin);
      } else {
        start = next;
      }
    }
    workgroupBarrier();
    if (lane == 0u && atomicLoad(&first[0]) == NONE) {
      found = vec4<u32>(NONE, 0u, 0u, bitcast<u32>(scan_total().y));
    }
    if (own_bin != NONE && own_bin == atomicLoad(&first[0])) {
      let content = bin_of(own_bin, prefix, shift, quantum);
      let whole = content.x == 1.0 || start.x + content.x == goal.x;
      let bits = bitcast<vec3<u32>>(vec3<f32>(start, content.y));
      found = vec4<u32>(select(own_bin, own_bin | WHOLE, whole), bits);
    }
    let at = workgroupUniformLoad(&found);
    let mass = bitcast<f32>(at.w);
    if (at.x == NONE) { // at a later digit only where sums are rounded otherwise
      return Cut(((prefix + 1u) << (shift + DIGIT)) - 1u, ALL, before.y + mass);
    }
    prefix = prefix * BINS + (at.x & (BINS - 1u));
    before = bitcast<vec2<f32>>(at.yz);
    if (at.x >= WHOLE) {
      return Cut(((prefix + 1u) << shift) - 1u, ALL, before.y + mass);
    }
    if (shift == 0u) {
      let weight = weight_of(prefix);
      let ties = clamp(min(goal.x - before.x, ceil((goal.y - before.y) / weight)), 1.0, ALL);
      return Cut(prefix, ties, before.y + min(ties * weight, mass));
    }
  }
  return Cut(LAST, ALL, 0.0);
}

// The token that the share `u` of the kept tokens' weights, one after the other by their ids, falls on.
fn draw(cut: Cut, u: f32, lane: u32) -> u32 {
  let quads = (params.vocabulary + 3u) / 4u;
  let per_lane = (quads + WORKGROUP - 1u) / WORKGROUP;
  let end = min((lane + 1u) * per_lane, quads);
  let tie = weight_of(cut.key);
  var own = vec2<f32>(0.0); // ties, and the weight of smaller keys
  for (var quad = lane * per_lane; quad < end; quad++) {
    let x = logits[first_quad + quad];
    for (var i = 0u; i < 4u; i++) {
      let key = key_of(x[i], 4u * quad + i);
      own += vec2<f32>(f32(key == cut.key), select(0.0, weight_of(key), key < cut.key));
    }
  }
  if (lane == 0u) {
    found.x = 0u; // where no logit counts
  }
  let before = scan(own, lane);
  let all = scan_total();
  let goal = u * (all.y + min(all.x, cut.ties) * tie);
  var running = before.y + min(before.x, cut.ties) * tie;
  let weighs = own.y > 0.0 || (own.x > 0.0 && before.x < cut.ties && tie > 0.0);
  let chosen = reduce_max(select(0.0, f32(lane + 1u), weighs && running <= goal), lane);
  if (f32(lane + 1u) == chosen) {
    var token = 0u;
    var ties = before.x;
    for (var quad = lane * per_lane; quad < end; quad++) {
      let x = logits[first_quad + quad];
      for (var i = 0u; i < 4u; i++) {
        let key = key_of(x[i], 4u * quad + i);
        let weight = weight_of(key);
        let kept = key < cut.key || (key == cut.key && ties < cut.ties);
        ties += f32(key == cut.key);
        if (kept && weight > 0.0) {
          token = select(token, 4u * quad + i, running <= goal);
          running += weight;
        }
      }
    }
    found.x = token;
  }
  return workgroupUniformLoad(&found).x;
}
