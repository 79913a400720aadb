// Prints one line for each level that this CPU has and each case: a hash of the bits that the kernels compute.
//
//   hashes THREADS [LEVEL]
//
// Linked with the kernels, for this machine or another: the lines of all levels, machines and numbers of threads must agree.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "abi.h"

extern "C" {
const char *level_name(long i);
int level_is_here(long i);
void use_level(long i);
void use_openmp(const OpenMP *functions);
long linear_scratch_bytes(const Linear *l, long B);
long decode_scratch_bytes(const Stack *stack, const long *lengths, long B, long T, int threads);
void linear_forward(const Linear *l, const float *x, float *y, uint8_t *scratch, long B, int threads);
void decode(const Stack *stack, const CacheLayout *cache, float *x, const long *slots, const long *lengths,
            uint8_t *scratch, long B, long T, int threads);
}

#ifdef _OPENMP
extern "C" {
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_thread_num();
int omp_get_num_threads();
}
#endif

static int threads;
static uint32_t state;
static uint32_t random_bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
static float random_float() { return (float)(int)(random_bits() & 0xffff) / 32768.0f - 1; }

static std::vector<float> floats(long n, float scale = 1) {
    std::vector<float> v(n);
    for (float &x : v) x = scale * random_float();
    return v;
}

static uint64_t hash(const void *p, long n) {
    uint64_t h = 14695981039346656037ull;
    for (long i = 0; i < n; i++) h = (h ^ ((const uint8_t *)p)[i]) * 1099511628211ull;
    return h;
}

// A layer with random weights, and the memory that it points to.
struct Layer {
    std::vector<uint8_t> weight, scale;
    std::vector<int32_t> offset;
    std::vector<float> bias;
    Linear layout;

    Layer(long I, long O, long format) {
        const long blocks = (O + 15) / 16, quads = (I + 3) / 4;
        state = 1000 * I + O;
        bias = floats(O);
        offset.assign(blocks * 16, 0);
        if (format == FP32 || format == BF16) {
            std::vector<float> rows = floats(I * O);
            for (float x : rows)
                for (long byte = format == FP32 ? 0 : 2; byte < 4; byte++) weight.push_back(((const uint8_t *)&x)[byte]);
        } else {
            weight.resize(format == INT8 ? blocks * quads * 64 : blocks * (I / 32) * 256);
            for (long i = 0; i < (long)weight.size(); i++) {
                const int most = i % 2 ? 128 - abs((int8_t)weight[i - 1]) : 127;  // of inputs 2i and 2i + 1: see abi.h
                weight[i] = format == INT8 ? (int)(random_bits() % (2 * most + 1)) - most : random_bits();
                const long quad = i / 64 % quads, input = quad * 4 + i % 4, output = i / 64 / quads * 16 + i / 4 % 16;
                if (format == INT8 && (input >= I || output >= O)) weight[i] = 0;
                if (format == INT8) offset[output] += 128 * (int8_t)weight[i];
            }
            std::vector<float> units = floats(blocks * 16, 0.01f);
            std::vector<uint16_t> halfs(blocks * (I / 32) * 16);
            for (uint16_t &x : halfs) x = 0x2000 + random_bits() % 0x400;
            const uint8_t *from = format == INT8 ? (const uint8_t *)units.data() : (const uint8_t *)halfs.data();
            scale.assign(from, from + (format == INT8 ? units.size() * 4 : halfs.size() * 2));
        }
        layout = {weight.data(), scale.data(), offset.data(), bias.data(), I, O, format};
    }
};

static void linear_case(const Layer &layer, long B) {
    const Linear &l = layer.layout;
    state = 1;
    std::vector<float> x = floats(B * l.I, 3), y(B * l.O);
    std::vector<uint8_t> scratch(linear_scratch_bytes(&l, B) + 1);
    linear_forward(&l, x.data(), y.data(), scratch.data(), B, threads);
    printf("%s %ldx%ldx%ld %016llx\n", FORMATS[l.format], B, l.I, l.O, (unsigned long long)hash(y.data(), y.size() * 4));
}

static const long C = 64, H = 4, K = 2, D = 32, F = 96;

// The layers of a block. To make weights takes longer than to use them once, so all cases of a format share them.
struct Layers {
    Layer c_attn, attn, fc, proj;

    explicit Layers(long format)
        : c_attn(C, (H + 2 * K) * D, format), attn(H * D, C, format), fc(C, F, format), proj(F, C, format) {}
};

// T new tokens in each of three slots.
static void decode_case(const Layers &layers, long activation, bool bf16_cache, long T) {
    const long B = 3, S = 40 + T - 1;
    state = 2;
    std::vector<float> norm = floats(C), bias = floats(C), head = floats(D), rotation = floats(S * D), x = floats(B * T * C);
    BlockLayout block = {norm.data(), bias.data(), norm.data(), 0, head.data(), head.data(),
                         layers.c_attn.layout, layers.attn.layout, layers.fc.layout, {}, layers.proj.layout};
    if (activation == SWIGLU) block.c_gate = block.c_fc;
    const BlockLayout blocks[] = {block, block};
    const Stack stack = {blocks, rotation.data(), 2, C, H, K, D, F, activation, activation % 2, 1e-5f};
    std::vector<float> keys = floats(2 * B * K * S * D), values = floats(2 * B * K * S * D);
    std::vector<uint16_t> half_keys(keys.size(), 0x3f80), half_values(keys.size(), 0xbf12);
    const long strides[] = {B * K * S * D, K * S * D, S * D}, slots[] = {2, 0, 1}, lengths[] = {0, 17, 39};
    CacheLayout cache = {keys.data(), values.data(), strides[0], strides[1], strides[2], bf16_cache};
    if (bf16_cache) cache.keys = half_keys.data(), cache.values = half_values.data();
    std::vector<uint8_t> scratch(decode_scratch_bytes(&stack, lengths, B, T, threads));
    decode(&stack, &cache, x.data(), slots, lengths, scratch.data(), B, T, threads);
    printf("decode %ld %s %s %d %016llx\n", T, ACTIVATIONS[activation], FORMATS[layers.fc.layout.format], bf16_cache,
           (unsigned long long)hash(x.data(), x.size() * 4));
}

int main(int count, char **arguments) {
    threads = atoi(arguments[1]);
#ifdef _OPENMP
    const OpenMP functions = {GOMP_parallel, GOMP_barrier, omp_get_thread_num, omp_get_num_threads};
    use_openmp(&functions);
#endif
    for (long level = 0; level_name(level); level++) {
        if (!level_is_here(level) || (count > 2 && strcmp(arguments[2], level_name(level)))) continue;
        printf("level %s\n", level_name(level));
        use_level(level);
        for (long format = 0; format < N_FORMATS; format++) {
            for (long I : {32, 96, 1056}) {
                const Layer layer(format == INT4 ? I : I + 5, 50, format);
                for (long B : {1, 2, 7, 70})
                    if (B * I < 10000) linear_case(layer, B);
            }
            const Layers layers(format);
            for (long activation = 0; activation < N_ACTIVATIONS; activation++)
                for (bool bf16_cache : {false, true})
                    for (long T : {1, 7}) decode_case(layers, activation, bf16_cache, T);
        }
    }
}
