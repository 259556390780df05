// Rows of f32 as f16 over a power of two, which brings the largest element to 2^14 .. 2^15; zeros behind the length.

struct Params { u32 rows, length, blocks, x_stride, x_offset; };

extern "C" __global__ void pack_rows(Params params, Grid grid, const float *x, u16 *y, float *scales) {
  u32 stride = params.blocks * 32u;
  EACH_BLOCK(row, params.rows) {
    const float *from = x + row * params.x_stride + params.x_offset;
    float largest = 0.0f; // biased exponent
    EACH_THREAD(i, params.length) largest = fmaxf(largest, (float)(__float_as_uint(from[i]) >> 23 & 255u));
    largest = block_max(largest);
    u32 e = (u32)fminf(fmaxf(largest, 15.0f), 254.0f);
    float factor = __uint_as_float((268u - e) << 23), scale = __uint_as_float((e - 14u) << 23);
    EACH_THREAD(i, stride) y[row * stride + i] = i < params.length ? f16_bits(from[i] * factor) : 0u;
    if (threadIdx.x == 0u) scales[row] = largest == 255.0f ? __uint_as_float(0x7fc00000u) : scale;
  }
}
