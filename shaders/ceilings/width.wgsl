// How wide subgroups are in kernels on matrix units: each invocation writes its subgroup's width, and how many
// subgroups there are. The product is there so that drivers choose the width as for other kernels with one.
// Grid: one workgroup.
// lib: none.
// Constants: U rows and columns of a fragment; Rows, Tokens and Sums, fragments.

@group(0) @binding(0) var<storage, read_write> widths: array<vec2<u32>>; // [256]

var<workgroup> factors: array<f16, U * U>;
var<workgroup> products: array<f32, U * U>;

@compute @workgroup_size(256)
fn main(
  @builtin(local_invocation_index) lane: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_size) width: u32,
  @builtin(num_subgroups) count: u32,
) {
  for (var i = lane; i < U * U; i += 256u) {
    factors[i] = 1.0h;
  }
  workgroupBarrier();
  var sums: Sums;
  sums = coopMultiplyAdd(coopLoadT<Rows>(&factors[0], U), coopLoad<Tokens>(&factors[0], U), sums);
  for (var first = subgroup; first == 0u; first = 1u) {
    coopStoreT(sums, &products[0], U);
  }
  workgroupBarrier();
  widths[lane] = select(vec2<u32>(0u), vec2<u32>(width, count), products[lane % (U * U)] == f32(U));
}
