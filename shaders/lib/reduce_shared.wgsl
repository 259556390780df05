// Reductions over the whole workgroup of WORKGROUP invocations through workgroup memory. Every
// invocation calls them and gets the result; they may be called again at once.
// Constants: WORKGROUP, a multiple of 16.

// 16 lanes fold WORKGROUP / 16 values each, then every lane folds those 16: three barriers where
// a tree takes one a level.
const REDUCE_PARTS = 16u;
var<workgroup> reduce_scratch: array<f32, WORKGROUP>;

fn reduce_sum(value: f32, lane: u32) -> f32 {
  workgroupBarrier(); // the last call's readers are done
  reduce_scratch[lane] = value;
  workgroupBarrier();
  if (lane < REDUCE_PARTS) {
    var part = value;
    for (var i = lane + REDUCE_PARTS; i < WORKGROUP; i += REDUCE_PARTS) {
      part += reduce_scratch[i];
    }
    reduce_scratch[lane] = part; // no other lane reads this column
  }
  workgroupBarrier();
  var sum = 0.0;
  for (var i = 0u; i < REDUCE_PARTS; i++) {
    sum += reduce_scratch[i];
  }
  return sum;
}

fn reduce_max(value: f32, lane: u32) -> f32 {
  workgroupBarrier(); // the last call's readers are done
  reduce_scratch[lane] = value;
  workgroupBarrier();
  if (lane < REDUCE_PARTS) {
    var part = value;
    for (var i = lane + REDUCE_PARTS; i < WORKGROUP; i += REDUCE_PARTS) {
      part = max(part, reduce_scratch[i]);
    }
    reduce_scratch[lane] = part; // no other lane reads this column
  }
  workgroupBarrier();
  var largest = reduce_scratch[0];
  for (var i = 1u; i < REDUCE_PARTS; i++) {
    largest = max(largest, reduce_scratch[i]);
  }
  return largest;
}
