// Attention of one new token in each slot over the keys and values of a cache.
//
// Axes: D head dimension, S keys, K kv heads.

#pragma once

namespace {

const long KEYS_AHEAD = 16;  // keys that are fetched before their turn

INLINE void write_cache(float *p, const float *x, long n) { memcpy(p, x, n * sizeof(float)); }
INLINE void write_cache(Bf16 *p, const float *x, long n) { write_bf16(p, x, n); }

// The products of q (D) with the first S keys (S, D) → scores, of which TILE - 1 more than S are written.
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

// One query (D) over the first S of the keys and values (S, D) → y (D). scores: S + TILE - 1 floats of scratch.
template <typename Element>
void attend(const float *q, const Element *keys, const Element *values, float *y, float *scores, long S, long D) {
    score_keys(q, keys, values, scores, S, D);
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
    const Vector share = splat(1 / sum(total));
    for (long from = 0; from < D; from += 4 * LANES) {
        Vector sums[4] = {zeros(), zeros(), zeros(), zeros()};
        for (long s = 0; s < S; s++)
#pragma GCC unroll 4
            for (long j = 0; j < 4; j++)
                if (long d = from + LANES * j; d < D)
                    sums[j] = multiply_add(splat(scores[s]), load(values + s * D + d, D - d), sums[j]);
        for (long j = 0; j < 4; j++)
            if (long d = from + LANES * j; d < D) store(y + d, multiply(sums[j], share), D - d);
    }
}

// The new tokens' keys and values into the cache, and their queries over all that is there: qkv (B, (H + 2K) · D) → y
// (B, H · D). scores: `n_scores` floats of scratch for each thread.
template <typename Element>
void attention(const Team &team, const Stack &s, long layer, const CacheLayout &cache, const long *slots,
               const long *lengths, float *qkv, float *y, float *scores, long n_scores, long B) {
    const BlockLayout &block = s.blocks[layer];
    const long D = s.D, group = s.H / s.K, width = (s.H + 2 * s.K) * D;
    team.each(B * s.K, [&](long i) {
        long b = i / s.K, head = i % s.K, position = lengths[b];
        const float *rotation = s.rotation ? s.rotation + position * D : 0;
        float *q = qkv + b * width + head * group * D, *k = qkv + b * width + (s.H + head) * D, *v = k + s.K * D;
        long start = layer * cache.layer_stride + slots[b] * cache.slot_stride + head * cache.head_stride;
        Element *keys = (Element *)cache.keys + start, *values = (Element *)cache.values + start;
        if (block.k_norm) normalize(k, block.k_norm, 0, k, D, true, s.eps);
        if (rotation) rotate(k, rotation, D);
        write_cache(keys + position * D, k, D);
        write_cache(values + position * D, v, D);
        for (long j = 0; j < group; j++, q += D) {
            if (block.q_norm) normalize(q, block.q_norm, 0, q, D, true, s.eps);
            if (rotation) rotate(q, rotation, D);
            float *own = scores + team.thread * n_scores;
            attend(q, keys, values, y + (b * s.H + head * group + j) * D, own, position + 1, D);
        }
    });
}

}  // namespace
