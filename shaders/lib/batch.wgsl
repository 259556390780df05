// The facts of a step's sequences and rows; the Rust side is src/kernels/batch.rs.

struct Sequence {
  position: u32,   // tokens in its cache before this step
  tokens: u32,     // new tokens in this step
  first_row: u32,  // row of its first new token
  pages: u32,      // start of its block table, in entries
  slot: u32,
  seed: u32,
  first_partial: u32, // row in `partials`, in tokens, of its first split's first token
  splits: u32,        // splits of its context
}

struct Row {
  sequence: u32,
  position: u32,
}

struct Split {
  sequence: u32,
  begin: u32,    // first token of the context
  end: u32,      // one past the last
  partial: u32,  // row in `partials`, in tokens, of its first token
}

struct Span {
  sequence: u32,
  begin: u32, // position of the first key
  end: u32,   // one past the last
  row: u32,   // of the first key in the expanded keys
}
