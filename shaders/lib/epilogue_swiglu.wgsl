// What becomes of a product's rows: gates (even rows) and ups (odd rows) are joined.
// lib: activation_* (activation).

const EPILOGUE_ROWS = 2u; // rows that make an output

fn epilogue(rows: array<f32, EPILOGUE_ROWS>, before: f32) -> f32 {
  return activation(vec4<f32>(rows[0])).x * rows[1];
}

fn epilogue4(first: vec4<f32>, second: vec4<f32>, before: vec4<f32>) -> vec4<f32> {
  return activation(first) * second;
}
