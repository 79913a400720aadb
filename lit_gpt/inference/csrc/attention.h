// Attention of new tokens over the keys and values of a cache.
//
// Axes: D head dimension, S keys, K kv heads, T new tokens of a slot, R queries in a tile.
//
// FLOAT_ROWS successive tokens of a slot are computed at once where it has so many, which read each key and value once. The
// result for a query is the same alone: a sum has the same order whatever the tile, and keys after its own are left out.

#pragma once

namespace {

// T new tokens for each of B slots, which hold `lengths` tokens.
struct NewTokens {
    const long *slots, *lengths;
    long B, T;
    INLINE long rows() const { return B * T; }
    INLINE long position(long row) const { return lengths[row / T] + row % T; }
};

const long KEYS_AHEAD = 16;  // keys that are fetched before their turn

INLINE void write_cache(float *p, const float *x, long n) { memcpy(p, x, n * sizeof(float)); }
INLINE void write_cache(Bf16 *p, const float *x, long n) { write_bf16(p, x, n); }

// The products of a query (D) with the first S keys (S, D) → scores, of which TILE - 1 more than S are written.
template <typename Element>
INLINE void score_keys(const float *q, const Element *keys, const Element *values, float *scores, long S, long D) {
    for (long s = 0; s < S; s += TILE) {
        Part sums[TILE][PARTS];
        for (long j = 0; j < TILE; j++) EACH_PART sums[j][k] = splat_part(0);
        for (long d = 0; d < D; d += LANES) {
            Vector u = load(q + d, D - d);
#pragma GCC unroll 4
            for (long j = 0; j < TILE; j++) {
                __builtin_prefetch(keys + (s + j + KEYS_AHEAD) * D + d);
                __builtin_prefetch(values + (s + j) * D + d);
                Vector v = load(keys + (s + j < S ? s + j : S - 1) * D + d, D - d);
                EACH_PART sums[j][k] = multiply_add(u.part[k], v.part[k], sums[j][k]);
            }
        }
        store_totals(scores + s, sums);
    }
}

// The products of R queries (R, D), which are `stride` apart, with the first S keys → scores (R, n_scores). All sums of a
// tile stay in registers, part by part of the lanes.
template <typename Element, long R>
INLINE void score_keys_of_tile(const float *q, long stride, const Element *keys, float *scores, long n_scores, long S,
                               long D) {
    for (long s = 0; s < S; s += TILE) {
        Part sums[R][TILE][PARTS];
        EACH_PART {
            Part t[R][TILE];
#pragma GCC unroll 4
            for (long r = 0; r < R; r++)
#pragma GCC unroll 4
                for (long j = 0; j < TILE; j++) t[r][j] = splat_part(0);
            for (long d = k * PART; d < D; d += LANES) {
                const bool whole = d + PART <= D;
                Part u[R];
#pragma GCC unroll 4
                for (long r = 0; r < R; r++)
                    u[r] = whole ? load_part(q + r * stride + d) : load_part(q + r * stride + d, D - d);
#pragma GCC unroll 4
                for (long j = 0; j < TILE; j++) {
                    const Element *key = keys + (s + j < S ? s + j : S - 1) * D + d;
                    const Part v = whole ? load_part(key) : load_part(key, D - d);
#pragma GCC unroll 4
                    for (long r = 0; r < R; r++) t[r][j] = multiply_add(u[r], v, t[r][j]);
                }
            }
#pragma GCC unroll 4
            for (long r = 0; r < R; r++)
#pragma GCC unroll 4
                for (long j = 0; j < TILE; j++) sums[r][j][k] = t[r][j];
        }
        for (long r = 0; r < R; r++) store_totals(scores + r * n_scores + s, sums[r]);
    }
}

// The scores of S keys → their weights before these are divided by their sum; returns that.
INLINE float weigh(float *scores, long S, long D) {
    const Vector scale = splat(1 / sqrtf(D)), lowest = splat(-INFINITY);
    Vector peaks = lowest;
    for (long s = 0; s < S; s += LANES) {
        Vector v = multiply(load(scores + s, S - s), scale);
        store(scores + s, v, S - s);
        peaks = larger(peaks, first(S - s, v, lowest));
    }
    const Vector peak = splat(largest(peaks));
    Vector total = zeros();
    for (long s = 0; s < S; s += LANES) {
        Vector e = exponential(subtract(load(scores + s, S - s), peak));
        store(scores + s, e, S - s);
        total = add(total, first(S - s, e, zeros()));
    }
    return sum(total);
}

// The sums of N vectors of values from dimension d on (S, D), weighted for R queries, the first of which has S keys and
// each of the others one more → y (R, D), `stride` apart.
template <typename Element, long R, long N>
INLINE void sum_values(const float *weights, long n_scores, const float *totals, const Element *values, float *y,
                       long stride, long S, long D, long d) {
    Vector sums[R][N];
    for (long r = 0; r < R; r++)
        for (long j = 0; j < N; j++) sums[r][j] = zeros();
    for (long s = 0; s < S; s++)
#pragma GCC unroll 4
        for (long j = 0; j < N; j++) {
            const Vector v = load(values + s * D + d + j * LANES, D - d - j * LANES);
#pragma GCC unroll 4
            for (long r = 0; r < R; r++)
                sums[r][j] = multiply_add(splat(weights[r * n_scores + s]), v, sums[r][j]);
        }
    for (long r = 0; r < R; r++) {
        const Vector share = splat(1 / totals[r]);
        for (long j = 0; j < N; j++) {
            const long at = d + j * LANES;
            for (long s = S; s < S + r; s++)
                sums[r][j] =
                    multiply_add(splat(weights[r * n_scores + s]), load(values + s * D + at, D - at), sums[r][j]);
            store(y + r * stride + at, multiply(sums[r][j], share), D - at);
        }
    }
}

// R queries (R, D) over the keys and values (S, D): the first over S of them, each of the others over one more → y (R, D).
// scores: R rows of n_scores floats of scratch.
template <typename Element, long R>
void attend(const float *q, long q_stride, const Element *keys, const Element *values, float *y, long y_stride,
            float *scores, long n_scores, long S, long D) {
    if constexpr (R == 1)
        score_keys(q, keys, values, scores, S, D);
    else
        score_keys_of_tile<Element, R>(q, q_stride, keys, scores, n_scores, S + R - 1, D);
    float totals[R];
    for (long r = 0; r < R; r++) totals[r] = weigh(scores + r * n_scores, S + r, D);
    const long N = R == 1 ? 4 : VALUE_VECTORS;
    long d = 0;
    for (; d + N * LANES <= D; d += N * LANES)
        sum_values<Element, R, N>(scores, n_scores, totals, values, y, y_stride, S, D, d);
    for (; d < D; d += LANES) sum_values<Element, R, 1>(scores, n_scores, totals, values, y, y_stride, S, D, d);
}

// The new tokens' keys and values, from qkv (B · T, (H + 2K) · D), into the cache. Queries and keys are normalised and
// rotated before, in place.
template <typename Element>
void write_new_keys(const Team &team, const Stack &s, long layer, const CacheLayout &cache, const NewTokens &tokens,
                    float *qkv) {
    const BlockLayout &block = s.blocks[layer];
    const long D = s.D, group = s.H / s.K, width = (s.H + 2 * s.K) * D;
    team.each(tokens.rows() * s.K, [&](long i) {
        const long row = i / s.K, head = i % s.K, slot = row / tokens.T, position = tokens.position(row);
        const float *rotation = s.rotation ? s.rotation + position * D : 0;
        float *q = qkv + row * width + head * group * D, *k = qkv + row * width + (s.H + head) * D, *v = k + s.K * D;
        const long start = cache.start(layer, tokens.slots[slot], head);
        if (block.k_norm) normalize(k, block.k_norm, 0, k, D, true, s.eps);
        if (rotation) rotate(k, rotation, D);
        write_cache((Element *)cache.keys + start + position * D, k, D);
        write_cache((Element *)cache.values + start + position * D, v, D);
        for (long j = 0; j < group; j++, q += D) {
            if (block.q_norm) normalize(q, block.q_norm, 0, q, D, true, s.eps);
            if (rotation) rotate(q, rotation, D);
        }
    });
}

// Attention of the new tokens, whose queries are in qkv (B · T, (H + 2K) · D), over what the cache has then
// → y (B · T, H · D). scores: scratch for each thread, FLOAT_ROWS rows of `n_scores` floats, or one where T is less.
template <typename Element>
void attention(const Team &team, const Stack &s, long layer, const CacheLayout &cache, const NewTokens &tokens, float *qkv,
               float *y, float *scores, long n_scores) {
    write_new_keys<Element>(team, s, layer, cache, tokens, qkv);
    const long D = s.D, T = tokens.T, group = s.H / s.K, tiles = (T + FLOAT_ROWS - 1) / FLOAT_ROWS;
    const long q_stride = (s.H + 2 * s.K) * D, y_stride = s.H * D;
    float *own = scores + team.thread * (T < FLOAT_ROWS ? 1 : FLOAT_ROWS) * n_scores;
    team.each_in_turn(tokens.B * s.H * tiles, [&](long i) {
        const long slot = i / tiles / s.H, head = i / tiles % s.H, t = i % tiles * FLOAT_ROWS, row = slot * T + t;
        const long start = cache.start(layer, tokens.slots[slot], head / group), S = tokens.position(row) + 1;
        const Element *keys = (Element *)cache.keys + start, *values = (Element *)cache.values + start;
        const float *q = qkv + row * q_stride + head * D;
        float *to = y + row * y_stride + head * D;
        if (t + FLOAT_ROWS <= T)
            return attend<Element, FLOAT_ROWS>(q, q_stride, keys, values, to, y_stride, own, n_scores, S, D);
        for (long r = 0; r < T - t; r++, q += q_stride, to += y_stride)
            attend<Element, 1>(q, q_stride, keys, values, to, y_stride, own, n_scores, S + r, D);
    });
}

}  // namespace
