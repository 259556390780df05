// Multiply-adds of matrix units and nothing else: each subgroup multiplies 4 fragments of U rows with 2 of U
// columns, TURNS times, and writes the sum of the results.
// Grid: any number of workgroups.
// lib: none.
// Constants: WORKGROUP, TURNS, U rows and columns of a fragment, WIDTH of a subgroup; Rows, Tokens and Sums, fragments.

struct Params {
  subgroups: u32, // of a workgroup
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f16>;       // [6, U, U], what is multiplied: apart, or a compiler would multiply once
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [subgroups, U, U]

const AREA = U * U;

var<workgroup> scratch: array<f32, WORKGROUP / WIDTH * AREA>;

var<private> sums: array<f32, (AREA + WIDTH - 1u) / WIDTH>; // a lane's share of the fragments' sum

// Adds a fragment through memory: Metal has no sum of two.
fn take(fragment: Sums, here: u32, lane: u32) {
  coopStoreT(fragment, &scratch[here], U);
  subgroupBarrier();
  for (var i = lane; i < AREA; i += WIDTH) {
    sums[i / WIDTH] += scratch[here + i];
  }
  subgroupBarrier(); // the memory is free
}

@compute @workgroup_size(WORKGROUP)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let a0 = coopLoadT<Rows>(&x[0u], U);
  let a1 = coopLoadT<Rows>(&x[AREA], U);
  let a2 = coopLoadT<Rows>(&x[2u * AREA], U);
  let a3 = coopLoadT<Rows>(&x[3u * AREA], U);
  let b0 = coopLoadT<Tokens>(&x[4u * AREA], U);
  let b1 = coopLoadT<Tokens>(&x[5u * AREA], U);
  var s: array<Sums, 8>;
  for (var turn = 0u; turn < TURNS; turn++) {
    s[0] = coopMultiplyAdd(a0, b0, s[0]);
    s[1] = coopMultiplyAdd(a1, b0, s[1]);
    s[2] = coopMultiplyAdd(a2, b0, s[2]);
    s[3] = coopMultiplyAdd(a3, b0, s[3]);
    s[4] = coopMultiplyAdd(a0, b1, s[4]);
    s[5] = coopMultiplyAdd(a1, b1, s[5]);
    s[6] = coopMultiplyAdd(a2, b1, s[6]);
    s[7] = coopMultiplyAdd(a3, b1, s[7]);
  }
  let here = subgroup * AREA;
  take(s[0], here, lane);
  take(s[1], here, lane);
  take(s[2], here, lane);
  take(s[3], here, lane);
  take(s[4], here, lane);
  take(s[5], here, lane);
  take(s[6], here, lane);
  take(s[7], here, lane);
  for (var i = lane; i < AREA; i += WIDTH) {
    y[(group.x * params.subgroups + subgroup) * AREA + i] = sums[i / WIDTH];
  }
}
