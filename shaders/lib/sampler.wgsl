// How a sequence's tokens are chosen, and what is read back of a choice; the Rust side is
// src/kernels/sample.rs.

struct Sampler {
  temperature: f32, // 0: greedy
  top_k: u32,       // 0: all
  top_p: f32,       // 1: all
  min_p: f32,       // 0: all
  repetition_penalty: f32, // 1: none
  unused: array<u32, 3>,
}

struct Record {
  token: u32,
  logprob: f32,
  non_finite: u32, // 1 where a logit is NaN or infinite
  top_tokens: array<u32, 5>,
  top_logprobs: array<f32, 5>,
  unused: array<u32, 3>,
}

// Philox-2x32-10 (Salmon et al. 2011): the first word of what the counter (position, 0) gives.
fn random(seed: u32, position: u32) -> u32 {
  var counter = vec2<u32>(position, 0u);
  var key = seed;
  for (var round = 0u; round < 10u; round++) {
    counter = vec2<u32>(multiply_high(0xd256d193u, counter.x) ^ key ^ counter.y, 0xd256d193u * counter.x);
    key += 0x9e3779b9u;
  }
  return counter.x;
}

// The upper 32 bits of a product.
fn multiply_high(a: u32, b: u32) -> u32 {
  let low = (a & 0xffffu) * (b & 0xffffu);
  let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u); // at most 2^32 - 2^16
  let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
  return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
}
