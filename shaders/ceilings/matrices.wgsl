// Multiply-adds of matrix units and nothing else: each subgroup multiplies 4 fragments of 16 rows with 2 of 16
// columns, TURNS times, and writes the sum of the results.
// Grid: any number of workgroups.
// lib: none.
// Constants: WORKGROUP, TURNS.

struct Params {
  subgroups: u32, // of a workgroup
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f16>;       // [6, 16, 16], what is multiplied: apart, or a compiler would multiply once
@group(0) @binding(2) var<storage, read_write> y: array<f32>; // [subgroups, 16, 16]

alias Rows = coop_mat16x16<f16, A>;
alias Columns = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

@compute @workgroup_size(WORKGROUP)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_id) subgroup: u32) {
  let a0 = coopLoadT<Rows>(&x[0u], 16u);
  let a1 = coopLoadT<Rows>(&x[256u], 16u);
  let a2 = coopLoadT<Rows>(&x[512u], 16u);
  let a3 = coopLoadT<Rows>(&x[768u], 16u);
  let b0 = coopLoadT<Columns>(&x[1024u], 16u);
  let b1 = coopLoadT<Columns>(&x[1280u], 16u);
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
  let sum = s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
  coopStoreT(sum, &y[(group.x * params.subgroups + subgroup) * 256u], 16u);
}
