// The primitives that the loops are written in, for 64-bit Arm: NEON, with dotprod and i8mm where these are compiled for.
//
// See primitives_avx512.h. Compared with other levels to the last bit in an emulator, and not yet timed.

#pragma once

#include <arm_neon.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

namespace {

const long PART = 4;
const long TILE = 4;
const long FLOAT_ROWS = 4;
const long FLOAT_CHUNK = 768;
const long VALUE_VECTORS = 1;
const long FETCH_AHEAD = 1024;

typedef float32x4_t Part;
typedef int32x4_t IntPart;
typedef uint16_t Bf16;

// All bits of the first n of 4 lanes.
INLINE uint32x4_t lanes(long n) {
    const int32_t order[] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(order), vdupq_n_s32(n < PART ? (int)n : PART));
}
INLINE Part splat_part(float x) { return vdupq_n_f32(x); }
INLINE Part load_part(const float *p) { return vld1q_f32(p); }
INLINE Part load_part(const Bf16 *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
template <typename Element>
INLINE Part load_part(const Element *p, long n) {
    if (n >= PART) return load_part(p);
    Element some[PART] = {};
    if (n > 0) memcpy(some, p, n * sizeof(Element));
    return load_part(some);
}
INLINE void store_part(float *p, Part v) { vst1q_f32(p, v); }
INLINE void store_part(float *p, Part v, long n) {
    float some[PART];
    store_part(some, v);
    if (n > 0) memcpy(p, some, (n < PART ? n : PART) * sizeof(float));
}
INLINE Part first(long n, Part v, Part other) { return vbslq_f32(lanes(n), v, other); }

INLINE Part add(Part a, Part b) { return vaddq_f32(a, b); }
INLINE Part subtract(Part a, Part b) { return vsubq_f32(a, b); }
INLINE Part multiply(Part a, Part b) { return vmulq_f32(a, b); }
INLINE Part divide(Part a, Part b) { return vdivq_f32(a, b); }
INLINE Part multiply_add(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }
INLINE Part negate_multiply_add(Part a, Part b, Part c) { return vfmsq_f32(c, a, b); }
INLINE Part magnitude(Part v) { return vabsq_f32(v); }
INLINE Part round_to_nearest(Part v) { return vrndnq_f32(v); }
INLINE Part times_power_of_two(Part v, Part n) {
    int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
INLINE Part smaller(Part a, Part b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE Part larger(Part a, Part b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE Part flip_sign(Part v, Part by) {
    uint32x4_t sign = vandq_u32(vreinterpretq_u32_f32(by), vdupq_n_u32(0x80000000u));
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(v), sign));
}
INLINE float sum(const Part *v) {
    float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float largest(const Part *v) {
    float all[4 * PART];
    for (long k = 0; k < 4; k++) store_part(all + k * PART, v[k]);
    float peak = all[0];
    for (float x : all) peak = peak > x ? peak : x;
    return peak;
}

INLINE Part load_halfs_part(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE IntPart load_ints_part(const int32_t *p, long n) {
    int32_t some[PART] = {};
    if (n > 0) memcpy(some, p, (n < PART ? n : PART) * sizeof(int32_t));
    return vld1q_s32(some);
}
INLINE IntPart splat_ints_part(int32_t x) { return vdupq_n_s32(x); }
INLINE IntPart add_ints(IntPart a, IntPart b) { return vaddq_s32(a, b); }
INLINE IntPart subtract_ints(IntPart a, IntPart b) { return vsubq_s32(a, b); }
INLINE Part to_floats(IntPart v) { return vcvtq_f32_s32(v); }

// See primitives_avx512.h for the order.
INLINE void store_totals(float *y, const Part (*s)[4]) {
    Part quarters[4];
    for (long k = 0; k < 4; k++) {
        Part a = s[0][k], b = s[1][k], c = s[2][k], d = s[3][k];
        Part ab = vaddq_f32(vzip1q_f32(a, b), vzip2q_f32(a, b)), cd = vaddq_f32(vzip1q_f32(c, d), vzip2q_f32(c, d));
        float64x2_t left = vreinterpretq_f64_f32(ab), right = vreinterpretq_f64_f32(cd);
        quarters[k] = vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(left, right)),
                                vreinterpretq_f32_f64(vzip2q_f64(left, right)));
    }
    vst1q_f32(y, vaddq_f32(vaddq_f32(quarters[0], quarters[2]), vaddq_f32(quarters[1], quarters[3])));
}

template <typename Element>
struct Widened;
typedef Widened<Bf16> Bf16Format;

// int8 and int4 -------------------------------------------------------------------------------------------------------

// Bytes: 4 outputs · 4 inputs in each register.
struct Quarters {
    int8x16_t quarter[4];
};

// Of integers, two for each output where there is no dotprod.
#if defined(__ARM_FEATURE_DOTPROD)
struct Quads {
    int32x4_t quarter[4];
};
#else
struct Quads {
    int32x4_t eighth[8];
};
#endif

INLINE Quarters load_quarters(const int8_t *p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
}

INLINE int8x16_t splat_bytes(const int8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

INLINE void store_bytes(int8_t *p, Part v, long n) {
    int16x4_t shorts = vqmovn_s32(vcvtnq_s32_f32(v));
    int8_t bytes[8];
    vst1_s8(bytes, vqmovn_s16(vcombine_s16(shorts, shorts)));
    if (n > 0) memcpy(p, bytes, n < PART ? n : PART);
}

INLINE Quads dot_bytes(int8x16_t x, Quarters w, Quads s) {
#if defined(__ARM_FEATURE_DOTPROD)
    for (long k = 0; k < 4; k++) s.quarter[k] = vdotq_s32(s.quarter[k], w.quarter[k], x);
#else
    for (long k = 0; k < 4; k++) {
        s.eighth[2 * k] = vpadalq_s16(s.eighth[2 * k], vmull_s8(vget_low_s8(w.quarter[k]), vget_low_s8(x)));
        s.eighth[2 * k + 1] = vpadalq_s16(s.eighth[2 * k + 1], vmull_high_s8(w.quarter[k], x));
    }
#endif
    return s;
}

INLINE void total_of_quads(Quads s, IntPart *parts) {
#if defined(__ARM_FEATURE_DOTPROD)
    for (long k = 0; k < 4; k++) parts[k] = s.quarter[k];
#else
    for (long k = 0; k < 4; k++) parts[k] = vpaddq_s32(s.eighth[2 * k], s.eighth[2 * k + 1]);
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Eight inputs of the rows a and b, of which the last 4 are there if `is_whole`, against two quads of W. Each sum has
// those of a with two outputs, and then those of b.
INLINE void multiply_pairs(const int8_t *a, const int8_t *b, const int8_t *w, bool is_whole, int32x4_t *sums) {
    int8_t inputs[16] = {};
    memcpy(inputs, a, is_whole ? 8 : 4);
    memcpy(inputs + 8, b, is_whole ? 8 : 4);
    const int8x16_t x = vld1q_s8(inputs);
#pragma GCC unroll 4
    for (long k = 0; k < 4; k++) {
        int32x4_t first = vreinterpretq_s32_s8(vld1q_s8(w + 16 * k));
        int32x4_t second = is_whole ? vreinterpretq_s32_s8(vld1q_s8(w + 64 + 16 * k)) : vdupq_n_s32(0);
        sums[2 * k] = vmmlaq_s32(sums[2 * k], x, vreinterpretq_s8_s32(vzip1q_s32(first, second)));
        sums[2 * k + 1] = vmmlaq_s32(sums[2 * k + 1], x, vreinterpretq_s8_s32(vzip2q_s32(first, second)));
    }
}

INLINE void totals_of_pairs(const int32x4_t *sums, IntPart *a, IntPart *b) {
#pragma GCC unroll 4
    for (long k = 0; k < 4; k++) {
        a[k] = vcombine_s32(vget_low_s32(sums[2 * k]), vget_low_s32(sums[2 * k + 1]));
        b[k] = vcombine_s32(vget_high_s32(sums[2 * k]), vget_high_s32(sums[2 * k + 1]));
    }
}

const long INT8_ROWS = 2;
#else
const long INT8_ROWS = 4;
#endif

struct Int8 {
    typedef int8_t Input;
    typedef int8x16_t Inputs;
    typedef Quarters Weights;
    typedef Quads Sums;
    static const long ROWS = INT8_ROWS, COLUMNS = 1;
    static const bool IS_MOVED = false;
    static INLINE void store(Input *p, Part v, long n) { store_bytes(p, v, n); }
    static INLINE Inputs input(const Input *p) { return splat_bytes(p); }
    static INLINE Weights weights(const int8_t *p) { return load_quarters(p); }
    static INLINE Sums dot(Inputs x, Weights w, Sums s) { return dot_bytes(x, w, s); }
    static INLINE void total(Sums s, IntPart *parts) { total_of_quads(s, parts); }
};

struct Int4 {
    typedef int8_t Input;
    typedef int8x16_t Inputs;
    typedef Quarters Weights;
    typedef Quads Sums;
    static const long ROWS = 4, COLUMNS = 1;
    static INLINE void store(Input *p, Part v, long n) { store_bytes(p, v, n); }
    static INLINE Inputs input(const Input *p) { return splat_bytes(p); }
    static INLINE Weights low(const uint8_t *p) {
        Weights w = load_quarters((const int8_t *)p);
        for (long k = 0; k < 4; k++) w.quarter[k] = vandq_s8(w.quarter[k], vdupq_n_s8(15));
        return w;
    }
    static INLINE Weights high(const uint8_t *p) {
        Weights w;
        for (long k = 0; k < 4; k++) w.quarter[k] = vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(p + 16 * k), 4));
        return w;
    }
    static INLINE Sums dot(Inputs x, Weights w, Sums s) { return dot_bytes(x, w, s); }
    static INLINE void total(Sums s, IntPart *parts) { total_of_quads(s, parts); }
};

}  // namespace
