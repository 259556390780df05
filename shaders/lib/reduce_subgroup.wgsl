// Reductions over the whole workgroup of WORKGROUP invocations, within subgroups first. Every
// invocation calls them and gets the result; they may be called again at once.
// Constants: WORKGROUP, a multiple of 16.
//
// Nothing is assumed of the subgroups' width or of which lanes share one: each subgroup leaves its
// result at its first lane's place and the neutral value at the others, and each folds all of it.

var<workgroup> reduce_scratch: array<f32, WORKGROUP>;

fn reduce_sum(value: f32, lane: u32) -> f32 {
  let part = subgroupAdd(value);
  workgroupBarrier(); // the last call's readers are done
  reduce_scratch[lane] = select(0.0, part, subgroupBroadcastFirst(lane) == lane);
  workgroupBarrier();
  let width = subgroupAdd(1u);
  let rank = subgroupExclusiveAdd(1u);
  var sum = 0.0;
  for (var i = rank; i < WORKGROUP; i += width) {
    sum += reduce_scratch[i];
  }
  return subgroupAdd(sum);
}

fn reduce_max(value: f32, lane: u32) -> f32 {
  let part = subgroupMax(value);
  workgroupBarrier(); // the last call's readers are done
  reduce_scratch[lane] = part; // a lane's own maximum again changes nothing
  workgroupBarrier();
  let width = subgroupAdd(1u);
  let rank = subgroupExclusiveAdd(1u);
  var largest = part;
  for (var i = rank; i < WORKGROUP; i += width) {
    largest = max(largest, reduce_scratch[i]);
  }
  return subgroupMax(largest);
}
