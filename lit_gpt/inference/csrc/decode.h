// The functions of a level: one linear layer, and all blocks of a GPT for one new token in each slot.

#pragma once

namespace {

long linear_scratch_bytes(const Linear *l, long B) { return LinearScratch(*l, B).bytes; }

// The parts of the scratch of `decode`, as offsets in bytes.
struct DecodeScratch {
    long h, qkv, hidden, scores, inputs, bytes;
    long n_scores;  // floats of `scores` for each thread

    // For B slots that hold `lengths` tokens.
    DecodeScratch(const Stack &s, const long *lengths, long B, int threads) {
        long longest = 0, need = 0;
        for (long b = 0; b < B; b++) longest = lengths[b] > longest ? lengths[b] : longest;
        for (long layer = 0; layer < s.n_layer; layer++) {
            const BlockLayout &block = s.blocks[layer];
            const Linear *layers[] = {&block.c_attn, &block.attn_c_proj, &block.c_fc, &block.c_gate, &block.mlp_c_proj};
            for (const Linear *l : layers) {
                long own = l->weight ? linear_scratch_bytes(l, B) : 0;
                need = own > need ? own : need;
            }
        }
        n_scores = longest + 1 + TILE - 1;  // the new token, and what the last tile of keys has beyond it
        bytes = 0;
        h = reserve(B * (s.H * s.D > s.C ? s.H * s.D : s.C));
        qkv = reserve(B * (s.H + 2 * s.K) * s.D);
        hidden = reserve(B * s.F);
        scores = reserve(threads * n_scores);
        inputs = bytes;
        bytes += need;
    }

    long reserve(long floats) {
        long start = bytes;
        bytes += floats * sizeof(float);
        return start;
    }
};

long decode_scratch_bytes(const Stack *stack, const long *lengths, long B, int threads) {
    return DecodeScratch(*stack, lengths, B, threads).bytes;
}

// x (B, I) → y (B, O). scratch: linear_scratch_bytes.
void linear_forward(const Linear *l, const float *x, float *y, uint8_t *scratch, long B, int threads) {
    const Output out = {y, l->O, Output::STORE, 0};
    run_on_threads(threads, [&](const Team &team) { linear(team, *l, x, scratch, B, out); });
}

// All blocks on x (B, C), in place: one new token for each of `slots`, which hold `lengths` tokens.
// scratch: decode_scratch_bytes.
void decode(const Stack *stack, const CacheLayout *cache, float *x, const long *slots, const long *lengths,
            uint8_t *scratch, long B, int threads) {
    const Stack &s = *stack;
    const DecodeScratch parts(s, lengths, B, threads);
    const long C = s.C, F = s.F, n_scores = parts.n_scores;
    float *h = (float *)(scratch + parts.h), *qkv = (float *)(scratch + parts.qkv);
    float *hidden = (float *)(scratch + parts.hidden), *scores = (float *)(scratch + parts.scores);
    uint8_t *inputs = scratch + parts.inputs;
    const Output add_to_x = {x, C, Output::ADD, 0}, to_qkv = {qkv, (s.H + 2 * s.K) * s.D, Output::STORE, 0};
    const Output to_hidden = {hidden, F, Output::ACTIVATE, s.activation}, times_hidden = {hidden, F, Output::MULTIPLY, 0};
    run_on_threads(threads, [&](const Team &team) {
        for (long layer = 0; layer < s.n_layer; layer++) {
            const BlockLayout &block = s.blocks[layer];
            team.each(B, [&](long b) { normalize(x + b * C, block.ln_1, block.ln_1_bias, h + b * C, C, s.rmsnorm, s.eps); });
            linear(team, block.c_attn, h, inputs, B, to_qkv);
            if (cache->bf16)
                attention<Bf16>(team, s, layer, *cache, slots, lengths, qkv, h, scores, n_scores, B);
            else
                attention<float>(team, s, layer, *cache, slots, lengths, qkv, h, scores, n_scores, B);
            linear(team, block.attn_c_proj, h, inputs, B, add_to_x);
            team.each(B, [&](long b) { normalize(x + b * C, block.ln_2, block.ln_2_bias, h + b * C, C, s.rmsnorm, s.eps); });
            linear(team, block.c_gate.weight ? block.c_gate : block.c_fc, h, inputs, B, to_hidden);
            if (block.c_gate.weight) linear(team, block.c_fc, h, inputs, B, times_hidden);
            linear(team, block.mlp_c_proj, hidden, inputs, B, add_to_x);
        }
    });
}

}  // namespace
