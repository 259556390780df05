// Scores as they are, causal. Windows, sinks and soft caps are other files with this function.

const NOTHING = -3.0e38; // a score or log-sum-exp without a token

// The score of token `token` for a row that sees the tokens before `end`.
fn score(product: f32, token: u32, end: u32) -> f32 {
  return select(NOTHING, product, token < end);
}
