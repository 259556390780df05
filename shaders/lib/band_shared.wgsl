// Sums over a band, UNITS neighbouring lanes, through workgroup memory.
// Kernel: scratch, sums, UNITS, BANDS, VALUES. Constants: WORKGROUP.

const BAND_STRIDE = WORKGROUP + 1u;        // odd, so that neither writing nor reading meets in one bank
const BAND_SCRATCH = VALUES * BAND_STRIDE; // [VALUES, lanes]
const BAND_SUMS = BANDS * VALUES;          // [BANDS, VALUES]

// Leaves what this lane has of value `value`.
fn band_put(value: u32, product: f32, lane: u32) {
  scratch[value * BAND_STRIDE + lane] = product;
}

// Sums what all lanes have left; every invocation calls it.
fn band_meet(lane: u32) {
  workgroupBarrier();
  let band = lane / UNITS;
  for (var v = lane % UNITS; v < VALUES; v += UNITS) {
    var sum = 0.0;
    for (var i = 0u; i < UNITS; i++) {
      sum += scratch[v * BAND_STRIDE + band * UNITS + i];
    }
    sums[band * VALUES + v] = sum;
  }
  workgroupBarrier();
}

// Afterwards: the sum of value `value` over the lanes of this lane's band, which is `band`.
fn band_sum(value: u32, band: u32) -> f32 {
  return sums[band * VALUES + value];
}
