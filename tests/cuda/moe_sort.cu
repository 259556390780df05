// For each expert its pairs, in order, and these cut into tiles: a counting sort, by one thread.

struct Params { u32 pairs, tiles; };
struct Tile { u32 expert, first, count, unused; };

extern "C" __global__ void moe_sort(Params params, Grid grid, const Route *routes, u32 *order, Tile *tiles) {
  if (blockIdx.x != 0u || threadIdx.x != 0u) return;
  u32 next[EXPERTS]; // at first counts, then where an expert's next pair goes
  for (u32 e = 0u; e < EXPERTS; e++) next[e] = 0u;
  for (u32 pair = 0u; pair < params.pairs; pair++) {
    if (routes[pair].expert < EXPERTS) next[routes[pair].expert]++;
  }
  u32 first = 0u, used = 0u;
  for (u32 e = 0u; e < EXPERTS; e++) {
    u32 count = next[e];
    for (u32 i = 0u; i < count && used < params.tiles; i += TILE) {
      tiles[used++] = Tile{e, first + i, least(TILE, count - i), 0u};
    }
    next[e] = first;
    first += count;
  }
  while (used < params.tiles) tiles[used++] = Tile{0u, 0u, 0u, 0u};
  for (u32 pair = 0u; pair < params.pairs; pair++) {
    if (routes[pair].expert < EXPERTS) order[next[routes[pair].expert]++] = pair;
  }
}
