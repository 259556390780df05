// What the CUDA kernels share. tests/cuda.rs puts the constants of the WGSL shader (R, P, N ...) and the names of
// its modules (CACHE_F16, ROPE_HALF ...) in front of this text, and a kernel's own file behind it. A kernel takes
// the shader's Params, the workgroups of its dispatch and its bindings in the shader's order. They are written to
// be read, one output a thread, a warp or a block, and give the same for any number of blocks.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef THREADS
#define THREADS 128u // of a block
#define WARP 32u
#endif

// Every index below `count` for one thread, one warp (all its lanes), one block (all its threads) of the grid.
#define EACH(i, count) \
  for (u64 i = blockIdx.x * THREADS + threadIdx.x; i < (count); i += (u64)gridDim.x * THREADS)
#define EACH_WARP(i, count) \
  for (u64 i = (blockIdx.x * THREADS + threadIdx.x) / WARP; i < (count); i += (u64)gridDim.x * (THREADS / WARP))
#define EACH_BLOCK(i, count) for (u64 i = blockIdx.x; i < (count); i += gridDim.x)
// Every index below `count` for one thread of this block.
#define EACH_THREAD(i, count) for (u32 i = threadIdx.x; i < (count); i += THREADS)

constexpr float NOTHING = -3.0e38f; // a log-sum-exp without a token
constexpr float LN_2 = 0.6931471805599453f;

// Workgroups of the WGSL dispatch.
struct Grid { u32 x, y, z; };

struct Sequence { u32 position, tokens, first_row, pages, slot, seed, first_partial, splits; };
struct Row { u32 sequence, position; };
struct Split { u32 sequence, begin, end, partial; };
struct Span { u32 sequence, begin, end, row; };
struct Route { u32 expert; float weight; };

__device__ inline u32 least(u32 a, u32 b) { return a < b ? a : b; }

__device__ inline bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Number formats.

__device__ inline float f16_value(u16 bits) {
  u32 magnitude = (bits & 0x7fffu) << 13;
  // Times 2^112, which also normalises what is subnormal; infinity and NaN keep their exponent.
  float value = (bits & 0x7c00u) == 0x7c00u ? __uint_as_float(magnitude | 0x7f800000u)
                                            : __uint_as_float(magnitude) * 5.192296858534828e33f;
  return bits & 0x8000u ? -value : value;
}

__device__ inline u16 f16_bits(float value) {
  u32 sign = __float_as_uint(value) >> 16 & 0x8000u, bits = __float_as_uint(value) & 0x7fffffffu;
  float magnitude = __uint_as_float(bits);
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  if (magnitude < 6.103515625e-5f) return sign | (u32)rintf(magnitude * 16777216.0f); // subnormals count 2^-24
  return sign | ((bits + 0xfffu + (bits >> 13 & 1u)) >> 13) - (112u << 10);           // to nearest even
}

__device__ inline float bf16_value(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ inline float e4m3_value(u8 code) {
  u32 magnitude = code & 0x7fu;
  float value = magnitude < 8u ? magnitude * 0.001953125f : __uint_as_float((magnitude << 20) + (120u << 23));
  return code & 0x80u ? -value : value;
}

__device__ inline u8 e4m3_bits(float value) {
  float magnitude = fminf(fabsf(value), 448.0f);
  u32 sign = __float_as_uint(value) >> 24 & 0x80u, bits = __float_as_uint(magnitude);
  if (magnitude < 0.015625f) return sign | (u32)rintf(magnitude * 512.0f); // codes below the normal ones count 2^-9
  return sign | ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
}

// An element of a matrix.
__device__ inline float weight(const void *weights, u64 i) {
#if defined(WEIGHTS_F16) || defined(UNPACK4_F16) || defined(PRODUCT_COOP)
  return f16_value(((const u16 *)weights)[i]);
#elif defined(WEIGHTS_BF16) || defined(UNPACK4_BF16)
  return bf16_value(((const u16 *)weights)[i]);
#else
  return ((const float *)weights)[i];
#endif
}

// x * sigmoid(x).
__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// Rope: element `i` of a slice of 2 `pairs`, turned to `position` by the table of src/num/rope.rs.
__device__ inline float turned(const float *slice, u32 i, u32 position, const float *table, u32 pairs) {
#if defined(ROPE_HALF)
  u32 pair = i % pairs, first = pair, second = pair + pairs;
#else
  u32 pair = i / 2u, first = 2u * pair, second = 2u * pair + 1u;
#endif
  const float *fine = table + 2u * ((position % 256u) * pairs + pair);
  const float *coarse = table + 2u * ((256u + position / 256u) * pairs + pair);
  float cos = fine[0] * coarse[0] - fine[1] * coarse[1], sin = fine[1] * coarse[0] + fine[0] * coarse[1];
  float a = slice[first], b = slice[second];
  return i == first ? a * cos - b * sin : b * cos + a * sin;
}

// By how much a query at `position` grows.
__device__ inline float growth(u32 position, float beta, u32 length) {
  return 1.0f + beta * logf(1.0f + (float)(position / (length > 0u ? length : 1u)));
}

// Sums and maxima: every lane or thread gets the result.

__device__ inline float warp_sum(float value) {
  for (u32 step = WARP / 2u; step > 0u; step /= 2u) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T, class Join> __device__ T block_reduce(T value, Join join) {
  __shared__ T parts[THREADS];
  __syncthreads(); // the last call's readers are done
  parts[threadIdx.x] = value;
  for (u32 step = THREADS / 2u; step > 0u; step /= 2u) {
    __syncthreads();
    if (threadIdx.x < step) parts[threadIdx.x] = join(parts[threadIdx.x], parts[threadIdx.x + step]);
  }
  __syncthreads();
  return parts[0];
}

template <class T> __device__ T block_sum(T value) {
  return block_reduce(value, [](T a, T b) { return a + b; });
}

__device__ inline float block_max(float value) {
  return block_reduce(value, [](float a, float b) { return fmaxf(a, b); });
}
