// The primitives that the loops are written in, for x86 with AVX-512; with VNNI and BF16 where these are compiled for.
//
// Another instruction set is another file with the same names. A Part is the floats of one register.

#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own _mm512_undefined_epi32
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

namespace {

const long PART = 16;
const long TILE = 4;           // rows of W in a tile of fp32 or bf16
const long FLOAT_ROWS = 4;     // rows of x in such a tile: 16 sums
const long FLOAT_CHUNK = 768; // inputs of such a tile that stay in the first-level cache
const long VALUE_VECTORS = 4;  // of an attention's values, summed for FLOAT_ROWS queries at once
const long FETCH_AHEAD = 256;  // bytes: the processor's own prefetching does the rest

typedef __m512 Part;
typedef __m512i IntPart;
typedef uint16_t Bf16;  // the upper half of an fp32 number

INLINE __mmask16 lanes(long n) { return n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }
INLINE Part splat_part(float x) { return _mm512_set1_ps(x); }
INLINE Part load_part(const float *p) { return _mm512_loadu_ps(p); }
INLINE Part load_part(const float *p, long n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
INLINE Part widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
INLINE Part load_part(const Bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE Part load_part(const Bf16 *p, long n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
INLINE void store_part(float *p, Part v) { _mm512_storeu_ps(p, v); }
INLINE void store_part(float *p, Part v, long n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
INLINE Part first(long n, Part v, Part other) { return _mm512_mask_blend_ps(lanes(n), other, v); }

INLINE Part add(Part a, Part b) { return _mm512_add_ps(a, b); }
INLINE Part subtract(Part a, Part b) { return _mm512_sub_ps(a, b); }
INLINE Part multiply(Part a, Part b) { return _mm512_mul_ps(a, b); }
INLINE Part divide(Part a, Part b) { return _mm512_div_ps(a, b); }
INLINE Part multiply_add(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Part negate_multiply_add(Part a, Part b, Part c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE Part magnitude(Part v) { return _mm512_abs_ps(v); }
INLINE Part round_to_nearest(Part v) { return _mm512_roundscale_ps(v, 0); }
INLINE Part times_power_of_two(Part v, Part n) { return _mm512_scalef_ps(v, n); }
INLINE Part smaller(Part a, Part b) { return _mm512_min_ps(a, b); }
INLINE Part larger(Part a, Part b) { return _mm512_max_ps(a, b); }
INLINE Part flip_sign(Part v, Part by) { return _mm512_xor_ps(v, _mm512_and_ps(by, _mm512_set1_ps(-0.0f))); }
INLINE float sum(const Part *v) { return _mm512_reduce_add_ps(*v); }
INLINE float largest(const Part *v) { return _mm512_reduce_max_ps(*v); }

INLINE Part load_halfs_part(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE IntPart load_ints_part(const int32_t *p, long n) { return _mm512_maskz_loadu_epi32(lanes(n), p); }
INLINE IntPart splat_ints_part(int32_t x) { return _mm512_set1_epi32(x); }
INLINE IntPart add_ints(IntPart a, IntPart b) { return _mm512_add_epi32(a, b); }
INLINE IntPart subtract_ints(IntPart a, IntPart b) { return _mm512_sub_epi32(a, b); }
INLINE Part to_floats(IntPart v) { return _mm512_cvtepi32_ps(v); }

// The totals of 4 sums in 16 lanes each → y. With q for a quarter and e for a lane in it, a total is
// ((q0 + q2) + (q1 + q3)) of ((e0 + e2) + (e1 + e3)).
INLINE void store_totals(float *y, const Part (*s)[1]) {
    Part a = s[0][0], b = s[1][0], c = s[2][0], d = s[3][0];
    Part ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    Part cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    Part quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

// bf16 ----------------------------------------------------------------------------------------------------------------

template <typename Element>
struct Widened;

#if defined(__AVX512BF16__)
struct Bf16Format {  // pairs of products at once; rows of x are rounded to bf16
    typedef Bf16 Input;
    typedef Bf16 Weight;
    typedef __m512i Elements;
    static const long STEP = 32;
    static INLINE Elements load(const Bf16 *p) { return _mm512_loadu_si512(p); }
    static INLINE Elements load(const Bf16 *p, long n) { return _mm512_maskz_loadu_epi16((1u << n) - 1, p); }
    static INLINE Part multiply_add(Elements x, Elements w, Part s) {
        return _mm512_dpbf16_ps(s, (__m512bh)x, (__m512bh)w);
    }
};
#else
typedef Widened<Bf16> Bf16Format;
#endif

// int8 and int4 -------------------------------------------------------------------------------------------------------

INLINE __m512i splat_bytes(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

struct Int8 {  // one operand of these products has no sign: inputs are moved by 128
    typedef uint8_t Input;
    typedef __m512i Inputs;
    typedef __m512i Weights;
    typedef __m512i Sums;
    static const long ROWS = 4, COLUMNS = 4;
    static const bool IS_MOVED = true;
    static INLINE void store(Input *p, Part v, long n) {
        __m512i moved = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(128));
        _mm512_mask_cvtusepi32_storeu_epi8(p, lanes(n), moved);
    }
    static INLINE Inputs input(const Input *p) { return splat_bytes(p); }
    static INLINE Weights weights(const int8_t *p) { return _mm512_loadu_si512(p); }
#if defined(__AVX512VNNI__)
    static INLINE Sums dot(Inputs x, Weights w, Sums s) { return _mm512_dpbusd_epi32(s, x, w); }
#else
    // Two products are added in 16 bits, which hold them: see quantize_rows.
    static INLINE Sums dot(Inputs x, Weights w, Sums s) {
        __m512i pairs = _mm512_maddubs_epi16(x, w);
        return _mm512_add_epi32(s, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
#endif
    static INLINE void total(Sums s, IntPart *parts) { *parts = s; }
};

struct Int4 {
    typedef int8_t Input;
    typedef __m512i Inputs;
    typedef __m512i Weights;
    typedef __m512i Sums;
    static const long ROWS = 4, COLUMNS = 2;
    static INLINE void store(Input *p, Part v, long n) {
        _mm512_mask_cvtsepi32_storeu_epi8(p, lanes(n), _mm512_cvtps_epi32(v));
    }
    static INLINE Inputs input(const Input *p) { return splat_bytes(p); }
    static INLINE Weights low(const uint8_t *p) {
        return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15));
    }
    static INLINE Weights high(const uint8_t *p) {
        return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
    }
#if defined(__AVX512VNNI__)
    static INLINE Sums dot(Inputs x, Weights w, Sums s) { return _mm512_dpbusd_epi32(s, w, x); }
    static INLINE void total(Sums s, IntPart *parts) { *parts = s; }
#else
    // Two sums of 16 bits for each output, of 16 products each: at most 16 · 15 · 127
    static INLINE Sums dot(Inputs x, Weights w, Sums s) { return _mm512_add_epi16(s, _mm512_maddubs_epi16(w, x)); }
    static INLINE void total(Sums s, IntPart *parts) { *parts = _mm512_madd_epi16(s, _mm512_set1_epi16(1)); }
#endif
};

}  // namespace
