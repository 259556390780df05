// Records of the latent cache (src/num/record.rs): W values, the latent (R), the rope key (P), zeros.

#if defined(CACHE_FP8) || defined(APPEND_FP8) || defined(RECORD_FP8) || defined(STAGED_FP8)

constexpr u32 SCALES = (R + 127u) / 128u; // one for 128 codes
constexpr u32 RECORD = (R + 4u * SCALES + 2u * P + 15u) / 16u * 16u;

__device__ inline float record_value(const u8 *record, u32 i) {
  if (i < R) return e4m3_value(record[i]) * ((const float *)(record + R))[i / 128u];
  return i < R + P ? f16_value(((const u16 *)(record + R + 4u * SCALES))[i - R]) : 0.0f;
}

__device__ inline void write_record(u8 *record, const float *values) {
  for (u32 i = 0u; i < RECORD; i++) record[i] = 0;
  for (u32 block = 0u; block < SCALES; block++) {
    u32 end = least(128u * block + 128u, R);
    float largest = 0.0f;
    for (u32 i = 128u * block; i < end; i++) largest = fmaxf(largest, fabsf(values[i]));
    // The least power of two with largest <= 448 scale, at least 2^-64; 448 is 1.75 * 2^8.
    float scale = ldexpf(1.0f, -64);
    while (448.0f * scale < largest) scale *= 2.0f;
    ((float *)(record + R))[block] = scale;
    for (u32 i = 128u * block; i < end; i++) record[i] = e4m3_bits(values[i] / scale);
  }
  for (u32 i = 0u; i < P; i++) ((u16 *)(record + R + 4u * SCALES))[i] = f16_bits(values[R + i]);
}

#elif defined(CACHE_F32) || defined(APPEND_F32)

constexpr u32 RECORD = 4u * W;

__device__ inline float record_value(const u8 *record, u32 i) { return ((const float *)record)[i]; }

__device__ inline void write_record(u8 *record, const float *values) {
  for (u32 i = 0u; i < W; i++) ((float *)record)[i] = values[i];
}

#else

constexpr u32 RECORD = 2u * W;

__device__ inline float record_value(const u8 *record, u32 i) { return f16_value(((const u16 *)record)[i]); }

__device__ inline void write_record(u8 *record, const float *values) {
  for (u32 i = 0u; i < W; i++) ((u16 *)record)[i] = f16_bits(values[i]);
}

#endif
