// The primitives that the loops of kernels.cpp are written in, for x86 with AVX-512 and VNNI.
//
// Another instruction set is another file with the same names. A Vector is 16 floats whatever the width of a register,
// and so is a tile of sums: those of up to 4 rows of x with 4 rows of W, the sums of row r in the r-th quarter.

#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own _mm512_undefined_epi32
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <stdint.h>

#define INLINE inline __attribute__((always_inline))

namespace {

const long LANES = 16;  // floats in a Vector
const long TILE = 4;    // rows of W in a tile, and rows of x

typedef __m512 Vector;
typedef __mmask16 Mask;     // lanes of a Vector
typedef __mmask8 TileMask;  // outputs of a tile, the same in each quarter
typedef uint16_t Bf16;      // the upper half of an fp32 number

// Sixteen floats ------------------------------------------------------------------------------------------------------

INLINE Mask first(long n) { return n < LANES ? (1u << n) - 1 : 0xffff; }
INLINE Vector splat(float x) { return _mm512_set1_ps(x); }
INLINE Vector zeros() { return _mm512_setzero_ps(); }
INLINE Vector load(const float *p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
INLINE Vector load(const Bf16 *p, Mask mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
INLINE void store(float *p, Mask mask, Vector v) { _mm512_mask_storeu_ps(p, mask, v); }

INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
INLINE Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
INLINE Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
INLINE Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }        // a · b + c
INLINE Vector negate_multiply_add(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a · b
INLINE Vector magnitude(Vector v) { return _mm512_abs_ps(v); }
INLINE Vector round_to_nearest(Vector v) { return _mm512_roundscale_ps(v, 0); }
INLINE Vector times_power_of_two(Vector v, Vector n) { return _mm512_scalef_ps(v, n); }  // v · 2ⁿ
// Where one of the two is not a number, these return b.
INLINE Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }
INLINE Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
INLINE Mask is_negative(Vector v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ); }
INLINE Vector select(Mask mask, Vector a, Vector b) { return _mm512_mask_blend_ps(mask, b, a); }  // a where mask is set

// a - b where mask is set; never joined with a product before it into one rounding, as `subtract` may be
INLINE Vector subtract_where(Mask mask, Vector a, Vector b, Vector elsewhere) {
    return _mm512_mask_sub_ps(elsewhere, mask, a, b);
}

INLINE float sum(Vector v) { return _mm512_reduce_add_ps(v); }
INLINE float largest(Vector v) { return _mm512_reduce_max_ps(v); }

// Rounded to integers, moved by 128 and clamped to what a byte without a sign holds.
INLINE void store_bytes(uint8_t *p, Mask mask, Vector v) {
    __m512i moved = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(128));
    _mm512_mask_cvtusepi32_storeu_epi8(p, mask, moved);
}

// The formats of a product --------------------------------------------------------------------------------------------

// How many elements of x and of W go into one step, and how these join the sums.

struct Fp32 {
    typedef float Input;
    typedef float Weight;
    typedef __m512 Elements;
    typedef __m512 Sums;
    static const long STEP = 16;
    static INLINE Elements load(const float *p) { return _mm512_loadu_ps(p); }
    static INLINE Elements load_first(long n, const float *p) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
    static INLINE Sums multiply_add(Elements x, Elements w, Sums s) { return _mm512_fmadd_ps(x, w, s); }
    static INLINE Sums add(Sums a, Sums b) { return _mm512_add_ps(a, b); }
    static INLINE __m512i bits(Sums v) { return _mm512_castps_si512(v); }
    static INLINE Sums value(__m512i v) { return _mm512_castsi512_ps(v); }
};

struct Int8 {
    typedef uint8_t Input;
    typedef int8_t Weight;
    typedef __m512i Elements;
    typedef __m512i Sums;
    static const long STEP = 64;
    static INLINE Elements load(const void *p) { return _mm512_loadu_si512(p); }
    static INLINE Elements load_first(long n, const void *p) { return _mm512_maskz_loadu_epi8((1ull << n) - 1, p); }
    static INLINE Sums multiply_add(Elements x, Elements w, Sums s) { return _mm512_dpbusd_epi32(s, x, w); }
    static INLINE Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    static INLINE __m512i bits(Sums v) { return v; }
    static INLINE Sums value(__m512i v) { return v; }
};

// Tiles of sums -------------------------------------------------------------------------------------------------------

// R · 4 vectors of partial sums, R at most 4 → a tile of their totals. `row` holds the quarters of each total.
template <typename Format, long R>
INLINE typename Format::Sums totals(const typename Format::Sums (*s)[TILE]) {
    auto fold = [](__m512i a, __m512i b) { return Format::add(Format::value(a), Format::value(b)); };
    __m512i row[TILE];
#pragma GCC unroll 4
    for (long r = 0; r < R; r++) {
        __m512i a = Format::bits(s[r][0]), b = Format::bits(s[r][1]);
        __m512i c = Format::bits(s[r][2]), d = Format::bits(s[r][3]);
        __m512i ab = Format::bits(fold(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)));
        __m512i cd = Format::bits(fold(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)));
        row[r] = Format::bits(fold(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
    }
    for (long r = R; r < TILE; r++) row[r] = row[0];
    auto halves = [&](__m512i a, __m512i b) {
        return Format::bits(fold(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee)));
    };
    __m512i low = halves(row[0], row[1]), high = halves(row[2], row[3]);
    return fold(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

// The same 4 values in each quarter; zeros for a null pointer.
INLINE Vector four_times(TileMask mask, const float *p) {
    return p ? _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(mask, p)) : _mm512_setzero_ps();
}
INLINE __m512i four_times(TileMask mask, const int32_t *p) {
    return _mm512_broadcast_i32x4(_mm_maskz_loadu_epi32(mask, p));
}

// The r-th of R values throughout the r-th quarter.
INLINE Vector one_each_quarter(long R, const float *p) {
    const __m512i quarters = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(quarters, _mm512_maskz_loadu_ps((1u << R) - 1, p));
}

INLINE Vector difference(__m512i a, __m512i b) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(a, b)); }

// A tile of R rows, 1 or 4, to y or from there, where rows are `stride` apart.
INLINE void store_tile(float *y, long R, long stride, TileMask mask, Vector v) {
    _mm_mask_storeu_ps(y, mask, _mm512_castps512_ps128(v));
    if (R == 1) return;
    _mm_mask_storeu_ps(y + stride, mask, _mm512_extractf32x4_ps(v, 1));
    _mm_mask_storeu_ps(y + 2 * stride, mask, _mm512_extractf32x4_ps(v, 2));
    _mm_mask_storeu_ps(y + 3 * stride, mask, _mm512_extractf32x4_ps(v, 3));
}

INLINE Vector load_tile(const float *y, long R, long stride, TileMask mask) {
    Vector v = _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, y));
    if (R == 1) return v;
    v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, y + stride), 1);
    v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, y + 2 * stride), 2);
    return _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, y + 3 * stride), 3);
}

INLINE void store_first_row(float *y, Vector v) { _mm_storeu_ps(y, _mm512_castps512_ps128(v)); }

}  // namespace
