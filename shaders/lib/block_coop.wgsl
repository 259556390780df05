// What the ways of mla_decode_coop for blocks of 16 and of 64 rows have in common.
// lib: rows_* (record_of), score_* (score), record_* (Part, fetch, quad_at, query_of). The kernel's: queries, tile.
// Constants: R latent width, W record values, STEPS = W / 64 rounded up, COLUMNS = R / 128 rounded up.

alias Rows = coop_mat16x16<f16, A>;
alias Tokens = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

const PITCH = 16u * STEPS + 2u; // vec4<f16> of a tile's row: 16 bytes more, for the banks
const MOST = 15.0;              // weights are at most 2^MOST: f16 holds them
const FRESH = 7.0;              // and 2^FRESH where a maximum has just moved
const LOWEST = -1.0e30;         // below every score
const NEVER = 0xffffffffu;

// Loads this lane's part of token `token`'s record. Behind the end the last one's: numbers, that weigh 0.
fn fetch_token(pages: u32, token: u32, end: u32, lane: u32) -> Part {
  return fetch(record_of(pages, min(token, end - 1u)), lane);
}

// Puts query row `first` + lane / 16 to that row of the tile, by 16 lanes; `start` is the sequence's first.
fn keep_queries(start: u32, first: u32, last: u32, lane: u32) {
  let row = start + min(first + lane / 16u, last);
  for (var i = 0u; i < STEPS; i++) {
    let place = lane % 16u + 16u * i;
    let quad = quad_at(place);
    var value = vec4<f32>(0.0);
    if (quad < W / 4u) {
      value = query_of(quad, queries[row * (W / 4u) + quad]);
    }
    tile[lane / 16u * PITCH + place] = vec4<f16>(value);
  }
}

// A fragment of 16 rows of queries, from vec4 `start` of the tile on.
fn queries_of(start: u32, step: u32) -> Rows {
  return coopLoadT<Rows>(&tile[start + 4u * step], PITCH);
}

// A fragment of a tile's records, for scores.
fn key_of(keys: u32, step: u32) -> Tokens {
  return coopLoad<Tokens>(&tile[keys + 4u * step], PITCH);
}

// A fragment of a tile's records, for outputs: the subgroup's j-th of 16 columns, of those that there are.
fn value_of(tokens: u32, subgroup: u32, j: u32) -> Tokens {
  let fragment = select(min(subgroup * COLUMNS + j, R / 16u - 1u), subgroup * COLUMNS + j, R % 128u == 0u);
  return coopLoadT<Tokens>(&tile[tokens + 4u * fragment], PITCH);
}

fn add(a: Rows, b: Tokens, sums: Sums) -> Sums {
  return coopMultiplyAdd(a, b, sums);
}

// A row's scores of four tokens from `token` on: sums over the record, masked behind `end`.
fn seen(sums: vec4<f32>, token: u32, end: u32) -> vec4<f32> {
  let low = vec2<f32>(score(sums.x, token, end), score(sums.y, token + 1u, end));
  return vec4<f32>(low, score(sums.z, token + 2u, end), score(sums.w, token + 3u, end));
}

// The largest of four lanes' scores, of one row.
fn largest_of(score: vec4<f32>) -> f32 {
  var largest = max(max(score.x, score.y), max(score.z, score.w));
  largest = max(largest, subgroupShuffleXor(largest, 1u));
  return max(largest, subgroupShuffleXor(largest, 2u));
}
