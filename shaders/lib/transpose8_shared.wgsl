// Sums of eight values over eight neighbouring invocations, each invocation left with one of them,
// through workgroup memory. Every invocation calls it.
// lib: fold (scratch). Constants: WORKGROUP, TILE; SCRATCH is at least 8 (WORKGROUP + 1).

const TRANSPOSE_STRIDE = WORKGROUP + 1u; // odd, so that neither writing nor reading meets in one bank

// With k = lane % 8: the sum over the eight lanes of value k, of low (0 to 3) and high (4 to 7).
fn transpose8(low: vec4<f32>, high: vec4<f32>, lane: u32) -> f32 {
  if (TILE > 4u) {
    workgroupBarrier(); // the last call's readers are done; with one call a tile other barriers see to it
  }
  scratch[lane] = low.x;
  scratch[TRANSPOSE_STRIDE + lane] = low.y;
  scratch[2u * TRANSPOSE_STRIDE + lane] = low.z;
  scratch[3u * TRANSPOSE_STRIDE + lane] = low.w;
  scratch[4u * TRANSPOSE_STRIDE + lane] = high.x;
  scratch[5u * TRANSPOSE_STRIDE + lane] = high.y;
  scratch[6u * TRANSPOSE_STRIDE + lane] = high.z;
  scratch[7u * TRANSPOSE_STRIDE + lane] = high.w;
  workgroupBarrier();
  let at = lane % 8u * TRANSPOSE_STRIDE + lane / 8u * 8u;
  var sum = 0.0;
  for (var i = 0u; i < 8u; i++) {
    sum += scratch[at + i];
  }
  return sum;
}
