// Outputs of a product, as f16: four at a time from a multiple of 4 on. What f16 does not hold becomes its largest.
// lib: epilogue_* (epilogue4).
// Of the kernel: binding `y`, an array of Four.

alias Four = vec2<u32>;

const LARGEST = 65504.0;

fn put(to: u32, count: u32, first: vec4<f32>, second: vec4<f32>) {
  let value = epilogue4(first, second, vec4<f32>(0.0));
  let held = select(value, sign(value) * LARGEST, abs(value) > vec4<f32>(LARGEST));
  y[to / 4u] = vec2<u32>(pack2x16float(held.xy), pack2x16float(held.zw));
}
