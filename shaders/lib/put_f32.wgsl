// Outputs of a product, as f32.
// lib: epilogue_* (epilogue4).
// Of the kernel: binding `y`, an array of Four.

alias Four = vec4<f32>;

// Writes `count` outputs, at most 4, from element `to` of y on.
fn put(to: u32, count: u32, first: vec4<f32>, second: vec4<f32>) {
  if (count == 4u && to % 4u == 0u) {
    y[to / 4u] = epilogue4(first, second, y[to / 4u]);
  } else {
    for (var i = 0u; i < count; i++) {
      let at = to + i;
      y[at / 4u][at % 4u] = epilogue4(first, second, vec4<f32>(y[at / 4u][at % 4u]))[i];
    }
  }
}
