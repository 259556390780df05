// Sums over a band, UNITS neighbouring lanes, by shuffles: subgroups are as wide or wider, and have their
// invocations in the order of the workgroup's. band_shared says what the functions are.
// Kernel: UNITS, VALUES.

const BAND_SCRATCH = 0u;
const BAND_SUMS = 0u;

var<private> band_values: array<f32, VALUES>;

fn band_put(value: u32, product: f32, lane: u32) {
  band_values[value] = product;
}

fn band_meet(lane: u32) {
  for (var step = 1u; step < UNITS; step *= 2u) {
    for (var v = 0u; v < VALUES; v++) {
      band_values[v] += subgroupShuffleXor(band_values[v], step);
    }
  }
}

fn band_sum(value: u32, band: u32) -> f32 {
  return band_values[value];
}
