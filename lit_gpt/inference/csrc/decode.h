// The functions of a level: one linear layer, and all blocks of a GPT for the new tokens of each slot.
//
// Axes: B slots, T new tokens of each. Their rows are slot after slot, and a slot's in the order of their positions.

#pragma once

namespace {

long linear_scratch_bytes(const Linear *l, long B) { return LinearScratch(*l, B).bytes; }

// The parts of the scratch of `decode`, as offsets in bytes.
struct DecodeScratch {
    long h, qkv, hidden, scores, inputs, bytes;
    long n_scores;  // floats of `scores` for each thread

    // For B slots that hold `lengths` tokens and get T more.
    DecodeScratch(const Stack &s, const long *lengths, long B, long T, int threads) {
        long longest = 0, need = 0;
        const long rows = B * T;
        for (long b = 0; b < B; b++) longest = lengths[b] > longest ? lengths[b] : longest;
        for (long layer = 0; layer < s.n_layer; layer++) {
            const BlockLayout &block = s.blocks[layer];
            const Linear *layers[] = {&block.c_attn, &block.attn_c_proj, &block.c_fc, &block.c_gate, &block.mlp_c_proj};
            for (const Linear *l : layers) {
                long own = l->weight ? linear_scratch_bytes(l, rows) : 0;
                need = own > need ? own : need;
            }
        }
        n_scores = longest + T + TILE - 1;  // the new tokens, and what the last tile of keys has beyond them
        bytes = 0;
        h = reserve(rows * (s.H * s.D > s.C ? s.H * s.D : s.C));
        qkv = reserve(rows * (s.H + 2 * s.K) * s.D);
        hidden = reserve(rows * s.F);
        scores = reserve(threads * (T < FLOAT_ROWS ? 1 : FLOAT_ROWS) * n_scores);
        inputs = bytes;
        bytes += need;
    }

    long reserve(long floats) {
        long start = bytes;
        bytes += floats * sizeof(float);
        return start;
    }
};

long decode_scratch_bytes(const Stack *stack, const long *lengths, long B, long T, int threads) {
    return DecodeScratch(*stack, lengths, B, T, threads).bytes;
}

// x (B, I) → y (B, O). scratch: linear_scratch_bytes.
void linear_forward(const Linear *l, const float *x, float *y, uint8_t *scratch, long B, int threads) {
    const Output out = {y, l->O, Output::STORE, 0};
    run_on_threads(threads, [&](const Team &team) { linear(team, *l, x, scratch, B, out); });
}

// All blocks on x (B · T, C), in place: T new tokens for each of `slots`, which hold `lengths` tokens.
// scratch: decode_scratch_bytes.
void decode(const Stack *stack, const CacheLayout *cache, float *x, const long *slots, const long *lengths,
            uint8_t *scratch, long B, long T, int threads) {
    const Stack &s = *stack;
    const DecodeScratch parts(s, lengths, B, T, threads);
    const NewTokens tokens = {slots, lengths, B, T};
    const long C = s.C, F = s.F, n_scores = parts.n_scores, rows = tokens.rows();
    float *h = (float *)(scratch + parts.h), *qkv = (float *)(scratch + parts.qkv);
    float *hidden = (float *)(scratch + parts.hidden), *scores = (float *)(scratch + parts.scores);
    uint8_t *inputs = scratch + parts.inputs;
    const Output add_to_x = {x, C, Output::ADD, 0}, to_qkv = {qkv, (s.H + 2 * s.K) * s.D, Output::STORE, 0};
    const Output to_hidden = {hidden, F, Output::ACTIVATE, s.activation}, times_hidden = {hidden, F, Output::MULTIPLY, 0};
    run_on_threads(threads, [&](const Team &team) {
        for (long layer = 0; layer < s.n_layer; layer++) {
            const BlockLayout &block = s.blocks[layer];
            const auto norm = [&](const float *weight, const float *bias) {
                team.each(rows, [&](long row) { normalize(x + row * C, weight, bias, h + row * C, C, s.rmsnorm, s.eps); });
            };
            norm(block.ln_1, block.ln_1_bias);
            linear(team, block.c_attn, h, inputs, rows, to_qkv);
            if (cache->bf16)
                attention<Bf16>(team, s, layer, *cache, tokens, qkv, h, scores, n_scores);
            else
                attention<float>(team, s, layer, *cache, tokens, qkv, h, scores, n_scores);
            linear(team, block.attn_c_proj, h, inputs, rows, add_to_x);
            norm(block.ln_2, block.ln_2_bias);
            linear(team, block.c_gate.weight ? block.c_gate : block.c_fc, h, inputs, rows, to_hidden);
            if (block.c_gate.weight) linear(team, block.c_fc, h, inputs, rows, times_hidden);
            linear(team, block.mlp_c_proj, hidden, inputs, rows, add_to_x);
        }
    });
}

}  // namespace
