// The TOP_K experts of a token with their weights, then SHARED ones: one thread a token.

struct Params {
  u32 tokens, stride;
  float scale, shared_weight;
};

constexpr u32 GROUP = EXPERTS / GROUPS; // experts of a group
constexpr u32 NONE = 0xffffffffu;

// The greatest of `count` values behind value `last` in the order of falling values and rising indices.
__device__ inline u32 next_best(const float *values, u32 count, u32 last) {
  u32 best = NONE;
  for (u32 i = 0u; i < count; i++) {
    bool behind = last == NONE || values[i] < values[last] || (values[i] == values[last] && i > last);
    if (behind && (best == NONE || values[i] > values[best])) best = i;
  }
  return best;
}

extern "C" __global__ void moe_route(Params params, Grid grid, const float *logits, const float *bias, Route *routes) {
  const float infinity = __uint_as_float(0x7f800000u);
  EACH(token, params.tokens) {
    const float *own = logits + token * params.stride;
    Route *to = routes + token * (TOP_K + SHARED);
    float scores[EXPERTS], choices[EXPERTS];
    float largest = -infinity;
    double sum = 0.0; // of up to 1,024 terms one after the other, where f32 would lose what the cases allow
    bool broken = false;
    for (u32 e = 0u; e < EXPERTS; e++) {
      broken |= !is_finite(own[e]) || (BIAS && !is_finite(bias[e]));
      largest = fmaxf(largest, own[e]);
    }
    for (u32 k = 0u; k < SHARED; k++) to[TOP_K + k] = Route{EXPERTS + k, params.shared_weight};
    if (broken) { // NaN has no order
      for (u32 k = 0u; k < TOP_K; k++) to[k] = Route{k, __uint_as_float(0x7fc00000u)};
      continue;
    }
    for (u32 e = 0u; e < EXPERTS; e++) sum += expf(own[e] - largest);
    for (u32 e = 0u; e < EXPERTS; e++) {
      scores[e] = SOFTMAX ? expf(own[e] - largest) / (float)sum : 1.0f / (1.0f + expf(-own[e]));
      choices[e] = scores[e] + (BIAS ? bias[e] : 0.0f);
    }
    if (GROUPS > 1u) {
      float of_groups[GROUPS];
      bool kept[GROUPS];
      for (u32 g = 0u; g < GROUPS; g++) {
        const float *members = choices + g * GROUP;
        u32 best = next_best(members, GROUP, NONE);
        of_groups[g] = members[best];
        if (GROUP_BEST == 2u) of_groups[g] += members[next_best(members, GROUP, best)];
        kept[g] = false;
      }
      for (u32 k = 0u, last = NONE; k < KEPT; k++) kept[last = next_best(of_groups, GROUPS, last)] = true;
      for (u32 e = 0u; e < EXPERTS; e++) {
        if (kept[e / GROUP]) continue;
        choices[e] = ZERO_CHOICE ? 0.0f : -infinity;
        if (ZERO_SCORE) scores[e] = 0.0f;
      }
    }
    float chosen = 1e-20f;
    for (u32 k = 0u, last = NONE; k < TOP_K; k++) {
      last = next_best(choices, EXPERTS, last);
      to[k] = Route{last, scores[last]};
      chosen += scores[last];
    }
    for (u32 k = 0u; k < TOP_K; k++) to[k].weight = to[k].weight / (RENORMALISE ? chosen : 1.0f) * params.scale;
  }
}
