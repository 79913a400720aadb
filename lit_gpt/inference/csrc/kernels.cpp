// Linear layers, and a GPT's blocks for one new token in each row, where what takes the time is reading the weights.
// For x86 with AVX-512 and VNNI.
//
// W is (N, K) and x is (M, K), both with K contiguous, so a product is a dot product of two streams, and W is read once
// and in order. A tile of 4 rows of x by 4 of W keeps 16 sums in registers. What a row of x gives depends on no other
// row: a sum runs over K in the same order whatever the tile.
//
// Functions that are not called by Python run on all threads at once and share the work; where they end, all threads
// have ended.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#define INLINE inline __attribute__((always_inline))

extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

namespace {

const long TILE = 4;    // rows of W in a tile, and rows of x
const long BLOCK = 64;  // rows of x that stay in the second-level cache while W passes by
const long AHEAD = 16;  // keys that are fetched before their turn

// A format: how many elements fill a vector, and how a vector of x times one of W joins a sum.

struct Float {
    typedef float Input;
    typedef float Weight;
    typedef __m512 Vector;
    static const long STEP = 16;
    static INLINE Vector load(const float *p) { return _mm512_loadu_ps(p); }
    static INLINE Vector load_first(long n, const float *p) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
    static INLINE Vector multiply_add(Vector x, Vector w, Vector sum) { return _mm512_fmadd_ps(x, w, sum); }
    static INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
    static INLINE __m512i bits(__m512 v) { return _mm512_castps_si512(v); }
    static INLINE __m512 value(__m512i v) { return _mm512_castsi512_ps(v); }
};

struct Bytes {
    typedef uint8_t Input;
    typedef int8_t Weight;
    typedef __m512i Vector;
    static const long STEP = 64;
    static INLINE Vector load(const void *p) { return _mm512_loadu_si512(p); }
    static INLINE Vector load_first(long n, const void *p) { return _mm512_maskz_loadu_epi8((1ull << n) - 1, p); }
    static INLINE Vector multiply_add(Vector x, Vector w, Vector sum) { return _mm512_dpbusd_epi32(sum, x, w); }
    static INLINE Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
    static INLINE __m512i bits(__m512i v) { return v; }
    static INLINE __m512i value(__m512i v) { return v; }
};

// The totals of R · 4 sums, R at most 4: those of row i stand in the i-th quarter.
template <typename F, long R>
INLINE typename F::Vector totals(const typename F::Vector (*s)[TILE]) {
    auto fold = [](__m512i a, __m512i b) { return F::add(F::value(a), F::value(b)); };
    __m512i row[TILE];
#pragma GCC unroll 4
    for (long i = 0; i < R; i++) {
        __m512i a = F::bits(s[i][0]), b = F::bits(s[i][1]), c = F::bits(s[i][2]), d = F::bits(s[i][3]);
        __m512i ab = F::bits(fold(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)));
        __m512i cd = F::bits(fold(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)));
        row[i] = F::bits(fold(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));  // quarters of each total
    }
    for (long i = R; i < TILE; i++) row[i] = row[0];
    __m512i low = F::bits(fold(_mm512_shuffle_i32x4(row[0], row[1], 0x44), _mm512_shuffle_i32x4(row[0], row[1], 0xee)));
    __m512i high =
        F::bits(fold(_mm512_shuffle_i32x4(row[2], row[3], 0x44), _mm512_shuffle_i32x4(row[2], row[3], 0xee)));
    return fold(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

// R rows of x against TILE rows of W; meanwhile the rows of W that follow come nearer.
template <typename F, long R>
INLINE typename F::Vector tile(const typename F::Input *x, const typename F::Weight *const *w, long K, bool first) {
    typename F::Vector sum[R][TILE] = {};
    long k = 0;
    for (; k + F::STEP <= K; k += F::STEP) {
        typename F::Vector v[TILE];
#pragma GCC unroll 4
        for (long j = 0; j < TILE; j++) {
            v[j] = F::load(w[j] + k);
            if (first) __builtin_prefetch(w[j] + TILE * K + k);
        }
#pragma GCC unroll 4
        for (long i = 0; i < R; i++) {
            typename F::Vector u = F::load(x + i * K + k);
#pragma GCC unroll 4
            for (long j = 0; j < TILE; j++) sum[i][j] = F::multiply_add(u, v[j], sum[i][j]);
        }
    }
    if (k < K)
        for (long i = 0; i < R; i++)
            for (long j = 0; j < TILE; j++) {
                typename F::Vector u = F::load_first(K - k, x + i * K + k);
                sum[i][j] = F::multiply_add(u, F::load_first(K - k, w[j] + k), sum[i][j]);
            }
    return totals<F, R>(sum);
}

// M rows of x against this thread's share of the N rows of W; `finish(n, mask)` gives what takes the outputs from n on.
template <typename F, typename Finish>
INLINE void product(const typename F::Input *x, const typename F::Weight *W, long M, long K, long N, Finish finish) {
    long thread = omp_get_thread_num(), n_thread = omp_get_num_threads(), tiles = (N + TILE - 1) / TILE;
    long end = tiles * (thread + 1) / n_thread * TILE;
    for (long n = tiles * thread / n_thread * TILE; n < end; n += TILE) {
        const typename F::Weight *w[TILE];
        for (long j = 0; j < TILE; j++) w[j] = W + (n + j < N ? n + j : N - 1) * K;
        auto put = finish(n, N - n < TILE ? (1u << (N - n)) - 1 : 0xf);
        long m = 0;
        for (; m + TILE <= M; m += TILE) put(m, TILE, tile<F, TILE>(x + m * K, w, K, m == 0));
        for (; m < M; m++) put(m, 1, tile<F, 1>(x + m * K, w, K, m == 0));
    }
}

INLINE __m512 four_times(__mmask8 mask, const float *p) {
    return p ? _mm512_broadcast_f32x4(_mm_maskz_loadu_ps(mask, p)) : _mm512_setzero_ps();
}

INLINE __mmask16 first(long n) { return n < 16 ? (1u << n) - 1 : 0xffff; }

// K floats to bytes around 128, and what one unit of them is worth: not a number if there is one that is not.
float to_bytes(const float *x, uint8_t *q, long K) {
    __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
    for (long k = 0; k < K; k += 16) {
        __m512 v = _mm512_maskz_loadu_ps(first(K - k), x + k);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
        poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison);
    }
    float peak = _mm512_reduce_max_ps(largest);
    __m512 factor = _mm512_set1_ps(peak > 0 ? 127 / peak : 0);
    for (long k = 0; k < K; k += 16) {
        __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first(K - k), x + k), factor));
        _mm512_mask_cvtusepi32_storeu_epi8(q + k, first(K - k), _mm512_add_epi32(v, _mm512_set1_epi32(128)));
    }
    return peak / 127 + _mm512_reduce_add_ps(poison);
}

}  // namespace

// W (N, K) in int8 has scale (N), what a unit of each row is worth, and offset (N), 128 times the row's sum; W in fp32
// has null there. bias (N) may be null.
struct Linear {
    const void *W;
    const float *scale;
    const int32_t *offset;
    const float *bias;
    long K, N;
};

namespace {

// x (M, K) times W, with the bias; `put(m, R, n, mask, v)` takes outputs n … of R rows from m on, one in each quarter of
// v. bytes: room for M · (K + 4) of them.
template <typename Put>
INLINE void linear(const Linear &l, const float *x, uint8_t *bytes, long M, Put put) {
    const long K = l.K;
    float *unit = (float *)bytes;
    uint8_t *q = bytes + 4 * M;
    if (l.scale) {
#pragma omp for
        for (long m = 0; m < M; m++) unit[m] = to_bytes(x + m * K, q + m * K, K);
    }
    for (long from = 0; from < M; from += BLOCK) {
        long rows = M - from < BLOCK ? M - from : BLOCK;
        if (!l.scale) {
            product<Float>(x + from * K, (const float *)l.W, rows, K, l.N, [=, &l](long n, __mmask8 mask) {
                __m512 bias = four_times(mask, l.bias ? l.bias + n : 0);
                return [=](long m, long R, __m512 v) { put(from + m, R, n, mask, _mm512_add_ps(v, bias)); };
            });
            continue;
        }
        product<Bytes>(q + from * K, (const int8_t *)l.W, rows, K, l.N, [=, &l](long n, __mmask8 mask) {
            __m512 weight_unit = four_times(mask, l.scale + n), bias = four_times(mask, l.bias ? l.bias + n : 0);
            __m512i moved = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi32(mask, l.offset + n));
            return [=](long m, long R, __m512i v) {
                const __m512i quarters = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
                __m512 units = _mm512_maskz_loadu_ps((1u << R) - 1, unit + from + m);
                units = _mm512_mul_ps(weight_unit, _mm512_permutexvar_ps(quarters, units));
                __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(v, moved));
                put(from + m, R, n, mask, _mm512_fmadd_ps(sum, units, bias));
            };
        });
    }
#pragma omp barrier
}

// R · 4 outputs to y, whose rows are N apart, or with them.
INLINE void store(float *y, long R, long N, __mmask8 mask, __m512 v) {
    _mm_mask_storeu_ps(y, mask, _mm512_castps512_ps128(v));
    if (R == 1) return;
    _mm_mask_storeu_ps(y + N, mask, _mm512_extractf32x4_ps(v, 1));
    _mm_mask_storeu_ps(y + 2 * N, mask, _mm512_extractf32x4_ps(v, 2));
    _mm_mask_storeu_ps(y + 3 * N, mask, _mm512_extractf32x4_ps(v, 3));
}

INLINE __m512 load(const float *y, long R, long N, __mmask8 mask) {
    __m512 v = _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, y));
    if (R == 1) return v;
    v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, y + N), 1);
    v = _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, y + 2 * N), 2);
    return _mm512_insertf32x4(v, _mm_maskz_loadu_ps(mask, y + 3 * N), 3);
}

// eˣ, to 2 units in the last place: x = n · ln 2 + r, and a polynomial for r (the coefficients of Cephes' expf).
INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88), _mm512_max_ps(_mm512_set1_ps(-87), x));  // in this order a NaN stays one
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(p, n);
}

enum Activation { GELU, GELU_TANH, RELU, RELU2, SILU };

INLINE __m512 activated(int kind, __m512 x) {
    const __m512 one = _mm512_set1_ps(1), half = _mm512_set1_ps(0.5f);
    if (kind == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x);
    if (kind == RELU2) {
        x = _mm512_max_ps(_mm512_setzero_ps(), x);
        return _mm512_mul_ps(x, x);
    }
    if (kind == SILU) return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
    if (kind == GELU_TANH) {  // 0.5 (1 + tanh u) is 1 / (1 + e⁻²ᵘ)
        __m512 u = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), one);
        u = _mm512_mul_ps(_mm512_mul_ps(u, x), _mm512_set1_ps(-2 * 0.7978845608f));
        return _mm512_div_ps(x, _mm512_add_ps(one, exponential(u)));
    }
    // erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26)
    __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.7071067812f));
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), z, one)), p = _mm512_set1_ps(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
        p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c));
    p = _mm512_mul_ps(_mm512_mul_ps(p, t), exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z))));
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    __m512 erf = _mm512_mask_sub_ps(_mm512_sub_ps(one, p), negative, p, one);
    return _mm512_mul_ps(_mm512_mul_ps(half, x), _mm512_add_ps(one, erf));
}

INLINE float sum_of_squares(const float *x, float mean, long n) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < n; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(first(n - i), x + i);
        v = _mm512_maskz_sub_ps(first(n - i), v, _mm512_set1_ps(mean));
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// LayerNorm, or RMSNorm, of n floats.
void normalize(const float *x, const float *weight, const float *bias, float *y, long n, bool rms, float eps) {
    float mean = 0;
    if (!rms) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first(n - i), x + i));
        mean = _mm512_reduce_add_ps(sum) / n;
    }
    float factor = 1 / sqrtf(sum_of_squares(x, mean, n) / n + eps);
    for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0);
}

// Dimension i goes with i + D / 2. rotation: D / 2 cosines, D / 2 sines.
void rotate(float *x, const float *rotation, long D) {
    for (long i = 0; i < D / 2; i++) {
        float a = x[i], b = x[i + D / 2], c = rotation[i], s = rotation[i + D / 2];
        x[i] = a * c - b * s;
        x[i + D / 2] = b * c + a * s;
    }
}

INLINE __m512 cached(const float *p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
INLINE void keep(float *p, const float *x, long n) { memcpy(p, x, n * sizeof(float)); }

// bf16, the upper half of an fp32 number
INLINE __m512 cached(const uint16_t *p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
INLINE void keep(uint16_t *p, const float *x, long n) {
    for (long i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        p[i] = x[i] == x[i] ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;  // to the nearest, ties to even
    }
}

// One query (D) over the first S of the keys and values (S, D) → y (D). weight: room for S + 3 floats.
template <typename T>
void attend(const float *q, const T *keys, const T *values, float *y, float *weight, long S, long D) {
    const float scale = 1 / sqrtf(D);
    __m512 peak = _mm512_set1_ps(-INFINITY);
    for (long s = 0; s < S; s += TILE) {
        __m512 sum[1][TILE] = {};
        for (long d = 0; d < D; d += 16) {
            __m512 u = _mm512_maskz_loadu_ps(first(D - d), q + d);
            for (long j = 0; j < TILE; j++) {
                __builtin_prefetch(keys + (s + j + AHEAD) * D + d);
                __builtin_prefetch(values + (s + j) * D + d);
                const T *key = keys + (s + j < S ? s + j : S - 1) * D;
                sum[0][j] = _mm512_fmadd_ps(u, cached(key + d, first(D - d)), sum[0][j]);
            }
        }
        __m512 score = _mm512_mul_ps(totals<Float, 1>(sum), _mm512_set1_ps(scale));
        _mm_storeu_ps(weight + s, _mm512_castps512_ps128(score));
        peak = _mm512_max_ps(peak, score);
    }
    float top = _mm512_reduce_max_ps(peak);
    __m512 total = _mm512_setzero_ps();
    for (long s = 0; s < S; s += 16) {
        __mmask16 mask = first(S - s);
        __m512 e = exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, weight + s), _mm512_set1_ps(top)));
        _mm512_mask_storeu_ps(weight + s, mask, e);
        total = _mm512_mask_add_ps(total, mask, total, e);
    }
    const __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
    for (long from = 0; from < D; from += 64) {
        __m512 sum[4] = {};
        for (long s = 0; s < S; s++)
#pragma GCC unroll 4
            for (long j = 0; j < 4; j++)
                if (long d = from + 16 * j; d < D)
                    sum[j] = _mm512_fmadd_ps(_mm512_set1_ps(weight[s]), cached(values + s * D + d, first(D - d)), sum[j]);
        for (long j = 0; j < 4; j++)
            if (long d = from + 16 * j; d < D) _mm512_mask_storeu_ps(y + d, first(D - d), _mm512_mul_ps(sum[j], share));
    }
}

}  // namespace

struct Layer {
    const float *ln_1, *ln_1_bias, *ln_2, *ln_2_bias;  // (C), biases may be null
    const float *q_norm, *k_norm;                      // (D) or null
    Linear attn, attn_proj, fc, gate, mlp_proj;        // gate.W may be null
};

// C width, H query heads, K kv heads, D head dimension, F width of the MLP
struct Stack {
    const Layer *layers;
    const float *rotation;  // (positions, 2, D / 2), or null
    long n_layer, C, H, K, D, F, activation, rms;
    float eps;
};

// Keys and values: the strides of layers, rows and heads in elements; a head's (S, D) are contiguous. bf16 or fp32.
struct Cache {
    void *keys, *values;
    long layer, row, head, bf16;
};

namespace {

// This token's keys and values into the cache, and its queries over all that is there: qkv (M, (H + 2K) · D) → y
// (M, H · D). weight: room for `weights` floats for each thread, 4 more than the longest row has tokens.
template <typename T>
INLINE void attention(const Stack &s, const Layer &l, long layer, const Cache &cache, const long *rows,
                      const long *lengths, float *qkv, float *y, float *weight, long weights, long M) {
    const long D = s.D, group = s.H / s.K, width = (s.H + 2 * s.K) * D;
#pragma omp for
    for (long i = 0; i < M * s.K; i++) {
        long m = i / s.K, head = i % s.K, place = lengths[m];
        const float *rotation = s.rotation ? s.rotation + place * D : 0;
        float *q = qkv + m * width + head * group * D, *k = qkv + m * width + (s.H + head) * D, *v = k + s.K * D;
        T *keys = (T *)cache.keys + layer * cache.layer + rows[m] * cache.row + head * cache.head;
        T *values = (T *)cache.values + layer * cache.layer + rows[m] * cache.row + head * cache.head;
        if (l.k_norm) normalize(k, l.k_norm, 0, k, D, true, s.eps);
        if (rotation) rotate(k, rotation, D);
        keep(keys + place * D, k, D);
        keep(values + place * D, v, D);
        for (long j = 0; j < group; j++, q += D) {
            if (l.q_norm) normalize(q, l.q_norm, 0, q, D, true, s.eps);
            if (rotation) rotate(q, rotation, D);
            float *room = weight + omp_get_thread_num() * weights;
            attend(q, keys, values, y + (m * s.H + head * group + j) * D, room, place + 1, D);
        }
    }
}

}  // namespace

// x (M, K) → y (M, N). bytes: room for M · (K + 4) of them, if W is in int8.
extern "C" void linear_layer(const Linear *l, const float *x, float *y, uint8_t *bytes, long M, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    linear(*l, x, bytes, M, [=](long m, long R, long n, __mmask8 mask, __m512 v) {
        store(y + m * l->N + n, R, l->N, mask, v);
    });
}

// All blocks on x (M, C), in place: one new token for each row of the cache in `rows`, which hold `lengths` tokens.
// room: floats, see `BlockDecoder` in packed.py.
extern "C" void decode(const Stack *stack, const Cache *cache, float *x, const long *rows, const long *lengths,
                       float *room, long weights, long M, int threads) {
    const Stack &s = *stack;
    const long C = s.C, F = s.F, width = (s.H + 2 * s.K) * s.D, widest = s.H * s.D > C ? s.H * s.D : C;
    float *h = room, *qkv = h + M * widest, *hidden = qkv + M * width, *weight = hidden + M * F;
    uint8_t *bytes = (uint8_t *)(weight + threads * weights);
    auto add = [=](long m, long R, long n, __mmask8 mask, __m512 v) {
        float *y = x + m * C + n;
        store(y, R, C, mask, _mm512_add_ps(v, load(y, R, C, mask)));
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long layer = 0; layer < s.n_layer; layer++) {
        const Layer &l = s.layers[layer];
#pragma omp for
        for (long m = 0; m < M; m++) normalize(x + m * C, l.ln_1, l.ln_1_bias, h + m * C, C, s.rms, s.eps);
        linear(l.attn, h, bytes, M, [=](long m, long R, long n, __mmask8 mask, __m512 v) {
            store(qkv + m * width + n, R, width, mask, v);
        });
        if (cache->bf16)
            attention<uint16_t>(s, l, layer, *cache, rows, lengths, qkv, h, weight, weights, M);
        else
            attention<float>(s, l, layer, *cache, rows, lengths, qkv, h, weight, weights, M);
        linear(l.attn_proj, h, bytes, M, add);
#pragma omp for
        for (long m = 0; m < M; m++) normalize(x + m * C, l.ln_2, l.ln_2_bias, h + m * C, C, s.rms, s.eps);
        const Linear &inner = l.gate.W ? l.gate : l.fc;
        linear(inner, h, bytes, M, [=, &s](long m, long R, long n, __mmask8 mask, __m512 v) {
            store(hidden + m * F + n, R, F, mask, activated(s.activation, v));
        });
        if (l.gate.W)
            linear(l.fc, h, bytes, M, [=](long m, long R, long n, __mmask8 mask, __m512 v) {
                float *y = hidden + m * F + n;
                store(y, R, F, mask, _mm512_mul_ps(v, load(y, R, F, mask)));
            });
        linear(l.mlp_proj, hidden, bytes, M, add);
    }
}
