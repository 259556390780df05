// Where a token's record stands: in the page that the block table names. A later way of finding rows,
// such as a list of the best ones, is another file with this function.
// Needs: block_table: array<u32>, params.first_page and params.page_bits, the logarithm of a page's tokens.

// The record of token `token` in the bound chunk, for a sequence whose block table starts at `pages`.
fn record_of(pages: u32, token: u32) -> u32 {
  let page = block_table[pages + (token >> params.page_bits)] - params.first_page;
  return (page << params.page_bits) + (token & ((1u << params.page_bits) - 1u));
}
