// x * sigmoid(x). The bound keeps exp finite; beyond it the result is 0 to f32's last place.

fn activation(x: vec4<f32>) -> vec4<f32> {
  return x / (1.0 + exp(min(-x, vec4<f32>(88.0))));
}
