// The primitives that the loops are written in, for x86 with AVX2, FMA and F16C; with AVX-VNNI where that is compiled for.
//
// See primitives_avx512.h.

#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

namespace {

const long PART = 8;
const long TILE = 4;
const long FLOAT_ROWS = 3;  // 12 sums, and 4 registers for what they are made of
const long FLOAT_CHUNK = 768;
const long VALUE_VECTORS = 2;
const long FETCH_AHEAD = 256;

typedef __m256 Part;
typedef __m256i IntPart;
typedef uint16_t Bf16;

// All bits of the first n of 8 lanes.
INLINE __m256i lanes(long n) {
    const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < PART ? (int)n : PART), order);
}
INLINE Part splat_part(float x) { return _mm256_set1_ps(x); }
INLINE Part load_part(const float *p) { return _mm256_loadu_ps(p); }
INLINE Part load_part(const float *p, long n) {
    return n >= PART ? load_part(p) : n > 0 ? _mm256_maskload_ps(p, lanes(n)) : splat_part(0);
}
INLINE Part load_part(const Bf16 *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE Part load_part(const Bf16 *p, long n) {
    if (n >= PART) return load_part(p);
    Bf16 some[PART] = {};
    if (n > 0) memcpy(some, p, n * sizeof(Bf16));
    return load_part(some);
}
INLINE void store_part(float *p, Part v) { _mm256_storeu_ps(p, v); }
INLINE void store_part(float *p, Part v, long n) {
    if (n >= PART)
        store_part(p, v);
    else if (n > 0)
        _mm256_maskstore_ps(p, lanes(n), v);
}
INLINE Part first(long n, Part v, Part other) { return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(lanes(n))); }

INLINE Part add(Part a, Part b) { return _mm256_add_ps(a, b); }
INLINE Part subtract(Part a, Part b) { return _mm256_sub_ps(a, b); }
INLINE Part multiply(Part a, Part b) { return _mm256_mul_ps(a, b); }
INLINE Part divide(Part a, Part b) { return _mm256_div_ps(a, b); }
INLINE Part multiply_add(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Part negate_multiply_add(Part a, Part b, Part c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE Part magnitude(Part v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
INLINE Part round_to_nearest(Part v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Part times_power_of_two(Part v, Part n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
INLINE Part smaller(Part a, Part b) { return _mm256_min_ps(a, b); }
INLINE Part larger(Part a, Part b) { return _mm256_max_ps(a, b); }
INLINE Part flip_sign(Part v, Part by) { return _mm256_xor_ps(v, _mm256_and_ps(by, _mm256_set1_ps(-0.0f))); }

INLINE float sum(const Part *v) {
    Part eight = _mm256_add_ps(v[0], v[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest(const Part *v) {
    Part eight = _mm256_max_ps(v[0], v[1]);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE Part load_halfs_part(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE IntPart load_ints_part(const int32_t *p, long n) {
    return n > 0 ? _mm256_maskload_epi32(p, lanes(n)) : _mm256_setzero_si256();
}
INLINE IntPart splat_ints_part(int32_t x) { return _mm256_set1_epi32(x); }
INLINE IntPart add_ints(IntPart a, IntPart b) { return _mm256_add_epi32(a, b); }
INLINE IntPart subtract_ints(IntPart a, IntPart b) { return _mm256_sub_epi32(a, b); }
INLINE Part to_floats(IntPart v) { return _mm256_cvtepi32_ps(v); }

// See primitives_avx512.h for the order.
INLINE void store_totals(float *y, const Part (*s)[2]) {
    Part quarters[2];
    for (long k = 0; k < 2; k++) {
        Part a = s[0][k], b = s[1][k], c = s[2][k], d = s[3][k];
        Part ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        Part cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        __m256d low = _mm256_unpacklo_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        __m256d high = _mm256_unpackhi_pd(_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        quarters[k] = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
    }
    Part halves = _mm256_add_ps(quarters[0], quarters[1]);
    _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

template <typename Element>
struct Widened;
typedef Widened<Bf16> Bf16Format;

// int8 and int4 -------------------------------------------------------------------------------------------------------

INLINE __m256i splat_bytes(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

INLINE __m256i load_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

// Rounded to integers, of 16 bits, moved by `by`.
INLINE __m128i to_shorts(Part v, int by) {
    __m256i moved = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(by));
    return _mm_packs_epi32(_mm256_castsi256_si128(moved), _mm256_extracti128_si256(moved, 1));
}

// The first n of 8 elements of `size` bytes.
INLINE void store_integers(void *p, __m128i v, long n, long size) {
    if (n >= PART && size == 2)
        _mm_storeu_si128((__m128i *)p, v);
    else if (n >= PART)
        _mm_storel_epi64((__m128i *)p, v);
    else if (n > 0)
        memcpy(p, &v, n * size);
}

struct Halves {  // of 16 outputs
    __m256i half[2];
};

struct Int8 {  // one operand of these products has no sign: inputs are moved by 128
    typedef uint8_t Input;
    typedef __m256i Inputs;
    typedef Halves Weights;
    typedef Halves Sums;
#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
    static const long ROWS = 6, COLUMNS = 1;
    static INLINE __m256i dot(Inputs x, __m256i w, __m256i s) { return _mm256_dpbusd_epi32(s, x, w); }
#else
    static const long ROWS = 2, COLUMNS = 1;
    // Two products are added in 16 bits, which hold them: see quantize_rows.
    static INLINE __m256i dot(Inputs x, __m256i w, __m256i s) {
        __m256i pairs = _mm256_maddubs_epi16(x, w);
        return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#endif
    static const bool IS_MOVED = true;
    static INLINE void store(Input *p, Part v, long n) {
        __m128i shorts = to_shorts(v, 128);
        store_integers(p, _mm_packus_epi16(shorts, shorts), n, 1);
    }
    static INLINE Inputs input(const Input *p) { return splat_bytes(p); }
    static INLINE Weights weights(const int8_t *p) { return {{load_bytes(p), load_bytes(p + 32)}}; }
    static INLINE Sums dot(Inputs x, Weights w, Sums s) {
        return {{dot(x, w.half[0], s.half[0]), dot(x, w.half[1], s.half[1])}};
    }
    static INLINE void total(Sums s, IntPart *parts) { parts[0] = s.half[0], parts[1] = s.half[1]; }
};

struct Int4 {
    typedef int8_t Input;
    typedef __m256i Inputs;
    typedef Halves Weights;
    typedef Halves Sums;
    static const long ROWS = 2, COLUMNS = 1;
    static INLINE void store(Input *p, Part v, long n) {
        __m128i shorts = to_shorts(v, 0);
        store_integers(p, _mm_packs_epi16(shorts, shorts), n, 1);
    }
    static INLINE Inputs input(const Input *p) { return splat_bytes(p); }
    static INLINE Weights low(const uint8_t *p) {
        const __m256i bits = _mm256_set1_epi8(15);
        return {{_mm256_and_si256(load_bytes(p), bits), _mm256_and_si256(load_bytes(p + 32), bits)}};
    }
    static INLINE Weights high(const uint8_t *p) {
        const __m256i bits = _mm256_set1_epi8(15);
        return {{_mm256_and_si256(_mm256_srli_epi16(load_bytes(p), 4), bits),
                 _mm256_and_si256(_mm256_srli_epi16(load_bytes(p + 32), 4), bits)}};
    }
#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
    static INLINE Sums dot(Inputs x, Weights w, Sums s) {
        s.half[0] = _mm256_dpbusd_epi32(s.half[0], w.half[0], x);
        s.half[1] = _mm256_dpbusd_epi32(s.half[1], w.half[1], x);
        return s;
    }
    static INLINE void total(Sums s, IntPart *parts) { parts[0] = s.half[0], parts[1] = s.half[1]; }
#else
    // Two sums of 16 bits for each output, of 16 products each: at most 16 · 15 · 127
    static INLINE Sums dot(Inputs x, Weights w, Sums s) {
        s.half[0] = _mm256_add_epi16(s.half[0], _mm256_maddubs_epi16(w.half[0], x));
        s.half[1] = _mm256_add_epi16(s.half[1], _mm256_maddubs_epi16(w.half[1], x));
        return s;
    }
    static INLINE void total(Sums s, IntPart *parts) {
        const __m256i ones = _mm256_set1_epi16(1);
        parts[0] = _mm256_madd_epi16(s.half[0], ones), parts[1] = _mm256_madd_epi16(s.half[1], ones);
    }
#endif
};

}  // namespace
