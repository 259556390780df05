// What becomes of a product's rows: each is an output.

const EPILOGUE_ROWS = 1u; // rows that make an output

fn epilogue(rows: array<f32, EPILOGUE_ROWS>, before: f32) -> f32 {
  return rows[0];
}

fn epilogue4(first: vec4<f32>, second: vec4<f32>, before: vec4<f32>) -> vec4<f32> {
  return first;
}
