// The next token of each row of logits, a row a block. Sums over a vocabulary are in f64: the cases' draws leave
// room for 1e-6 alone.

struct Params { u32 rows, vocabulary, stride; };

struct Sampler {
  float temperature;
  u32 top_k;
  float top_p, min_p, penalty;
  u32 unused[3];
};

struct Record {
  u32 token;
  float logprob;
  u32 non_finite, top_tokens[5];
  float top_logprobs[5];
  u32 unused[3];
};

struct Best {
  double value;
  u32 id;
};

constexpr u32 NONE = 0xffffffffu;

// True where `a` goes before `b`: the greater value, of equal ones the lower id.
__device__ inline bool before(Best a, Best b) {
  if (a.id == NONE || b.id == NONE) return b.id == NONE && a.id != NONE;
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// An integer that grows with a number, both zeros alike.
__device__ inline u64 order_of(double value) {
  u64 bits = (u64)__double_as_longlong(value + 0.0);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// Philox-2x32-10: the first word of what the counter (position, 0) gives.
__device__ inline u32 philox(u32 key, u32 position) {
  u32 a = position, b = 0u;
  for (u32 round = 0u; round < 10u; round++) {
    u64 product = 0xd256d193ull * a;
    a = (u32)(product >> 32) ^ key ^ b;
    b = (u32)product;
    key += 0x9e3779b9u;
  }
  return a;
}

// A row's logits, and how they are filtered.
struct Logits {
  const float *raw;
  const u32 *seen;
  u32 vocabulary;
  double penalty, temperature, greatest; // the greatest after the penalty

  __device__ bool counts(u32 id) const { return is_finite(raw[id]) && raw[id] > -3.0e38f; }

  __device__ double penalised(u32 id) const {
    double x = raw[id];
    if (!(seen[id / 32u] >> id % 32u & 1u)) return x;
    return x > 0.0 ? x / penalty : x * penalty;
  }

  __device__ double weight(double value) const { return exp((value - greatest) / temperature); }
};

// Tokens whose order is above `order`, and the first `ties` of those with it.
struct Cut {
  u64 order;
  double ties, mass;
};

// The count and the mass of all tokens from an order on.
__device__ inline void from(const Logits &logits, u64 order, double *count, double *mass) {
  double own_count = 0.0, own_mass = 0.0;
  EACH_THREAD(id, logits.vocabulary) {
    if (!logits.counts(id)) continue;
    double value = logits.penalised(id);
    if (order_of(value) >= order) {
      own_count += 1.0;
      own_mass += logits.weight(value);
    }
  }
  *count = block_sum(own_count);
  *mass = block_sum(own_mass);
}

// The shortest run of the most probable tokens that reaches a count or a mass; all where none does.
__device__ inline Cut cut_at(const Logits &logits, double goal_count, double goal_mass) {
  u64 order = 0ull;
  double count, mass;
  goal_mass = fmax(goal_mass, 1e-300); // the greatest weighs 1: it is always kept
  for (int bit = 63; bit >= 0; bit--) {
    from(logits, order | 1ull << bit, &count, &mass);
    if (count >= goal_count || mass >= goal_mass) order |= 1ull << bit;
  }
  from(logits, order, &count, &mass);
  if (order == 0ull) return Cut{0ull, 1e9, mass};
  double all = mass;
  from(logits, order + 1ull, &count, &mass);
  u64 bits = order >> 63 ? order & ~(1ull << 63) : ~order;
  double weight = logits.weight(__longlong_as_double((long long)bits));
  double ties = fmax(1.0, fmin(goal_count - count, ceil((goal_mass - mass) / weight)));
  return Cut{order, ties, fmin(all, mass + ties * weight)};
}

extern "C" __global__ void sample(Params params, Grid grid, const Sequence *batch, const Row *rows,
                                  const Sampler *samplers, const float *all, u32 *all_seen, u32 *tokens,
                                  Record *records) {
  __shared__ u32 drawn;
  EACH_BLOCK(row, params.rows) {
    Sequence sequence = batch[rows[row].sequence];
    Sampler rule = samplers[sequence.slot];
    u32 *seen = all_seen + (u64)sequence.slot * ((params.vocabulary + 31u) / 32u);
    Logits logits = {all + row * params.stride, seen, params.vocabulary, rule.penalty, rule.temperature, 0.0};
    Record *record = records + row;
    auto best_of = [](Best a, Best b) { return before(a, b) ? a : b; };

    // The five most probable of the raw logits, and the greatest after the penalty.
    float broken = 0.0f;
    Best own = {0.0, NONE}, last = own, first = own;
    EACH_THREAD(id, params.vocabulary) {
      if (!is_finite(logits.raw[id])) broken = 1.0f;
      if (logits.counts(id)) own = best_of(own, Best{logits.penalised(id), id});
    }
    broken = block_max(broken);
    Best best = block_reduce(own, best_of);
    logits.greatest = best.value;
    double log_sum = 0.0;
    for (u32 k = 0u; k < 5u; k++) {
      own = Best{0.0, NONE};
      EACH_THREAD(id, params.vocabulary) {
        Best here = {logits.raw[id], id};
        if (logits.counts(id) && (k == 0u || (last.id != NONE && before(last, here)))) own = best_of(own, here);
      }
      last = block_reduce(own, best_of);
      if (k == 0u) {
        first = last;
        double sum = 0.0;
        EACH_THREAD(id, params.vocabulary) {
          if (logits.counts(id)) sum += exp((double)logits.raw[id] - first.value);
        }
        log_sum = first.value + log(block_sum(sum));
      }
      if (threadIdx.x == 0u) {
        record->top_tokens[k] = last.id == NONE ? params.vocabulary : last.id;
        record->top_logprobs[k] = last.id == NONE ? NOTHING : (float)(last.value - log_sum);
      }
    }

    u32 token = best.id == NONE ? 0u : best.id;
    if (best.id != NONE && rule.temperature > 0.0f && rule.top_k != 1u) {
      Cut cut = {0ull, 1e9, 0.0};
      double count;
      from(logits, 0ull, &count, &cut.mass);
      if (rule.top_k > 0u && rule.top_k < params.vocabulary) cut = cut_at(logits, rule.top_k, 1e300);
      if (rule.top_p < 1.0f) cut = cut_at(logits, 1e300, (double)rule.top_p * cut.mass);
      if (threadIdx.x == 0u) {
        double share = (philox(sequence.seed, rows[row].position) >> 8) / 16777216.0, kept = 0.0;
        for (int turn = 0; turn < 2; turn++) {
          double goal = share * kept, running = 0.0, ties = 0.0;
          for (u32 id = 0u; id < params.vocabulary; id++) {
            if (!logits.counts(id)) continue;
            double value = logits.penalised(id);
            u64 order = order_of(value);
            if (order < cut.order || (order == cut.order && ties++ >= cut.ties)) continue;
            double weight = logits.weight(value);
            if (weight < rule.min_p || weight == 0.0) continue;
            if (turn == 1 && running <= goal) drawn = id;
            running += weight;
          }
          kept = running;
        }
      }
      __syncthreads();
      token = drawn;
    }
    __syncthreads(); // nobody reads `seen` any more
    if (threadIdx.x == 0u) {
      tokens[row] = token;
      seen[token / 32u] |= 1u << token % 32u;
      record->token = token;
      record->logprob = first.id == NONE ? NOTHING : (float)((double)logits.raw[token] - log_sum);
      record->non_finite = broken > 0.0f;
    }
  }
}
