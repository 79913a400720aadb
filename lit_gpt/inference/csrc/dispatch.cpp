// What native.py calls: the levels, which of them this CPU has, and the functions of the one that is used.
//
// Compiled for the least of CPUs: nothing here may need an instruction that must be asked for first.

#include <stddef.h>
#include <string.h>

#include "abi.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

OpenMP openmp;

extern const Level level_avx2, level_avx2_vnni, level_avx512, level_avx512_vnni, level_avx512_bf16;
extern const Level level_neon, level_neon_dotprod, level_neon_i8mm;

namespace {

#if defined(__x86_64__)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx2_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// The least first. The CPU is asked for the operating system's support of the registers too.
const struct {
    const char *name;
    bool (*is_here)();
    const Level *level;
} LEVELS[] = {
    {"avx2", has_avx2, &level_avx2},
    {"avx2_vnni", has_avx2_vnni, &level_avx2_vnni},
    {"avx512", has_avx512, &level_avx512},
    {"avx512_vnni", has_avx512_vnni, &level_avx512_vnni},
    {"avx512_bf16", has_avx512_bf16, &level_avx512_bf16},
};

#elif defined(__aarch64__)

const unsigned long DOTPROD = 1ul << 20, I8MM = 1ul << 13;  // HWCAP_ASIMDDP and HWCAP2_I8MM of <asm/hwcap.h>

bool has_neon() { return true; }
bool has_neon_dotprod() { return getauxval(AT_HWCAP) & DOTPROD; }
bool has_neon_i8mm() { return has_neon_dotprod() && (getauxval(AT_HWCAP2) & I8MM); }

const struct {
    const char *name;
    bool (*is_here)();
    const Level *level;
} LEVELS[] = {
    {"neon", has_neon, &level_neon},
    {"neon_dotprod", has_neon_dotprod, &level_neon_dotprod},
    {"neon_i8mm", has_neon_i8mm, &level_neon_i8mm},
};

#else
#error "there are no kernels for this kind of CPU"
#endif

const long N_LEVELS = sizeof LEVELS / sizeof LEVELS[0];
const Level *used;
long used_index = -1;

long index_of(const char *name, const char *const *names, long n) {
    for (long i = 0; i < n; i++)
        if (!strcmp(name, names[i])) return i;
    return -1;
}

}  // namespace

// The rest has no name outside of the library: it is compiled with -fvisibility=hidden.
#pragma GCC visibility push(default)

extern "C" {

int abi_version() { return ABI_VERSION; }

// The name of a level, from 0, the least, on; null beyond the last.
const char *level_name(long i) { return 0 <= i && i < N_LEVELS ? LEVELS[i].name : 0; }

// Whether this CPU has what the level needs.
int level_is_here(long i) { return LEVELS[i].is_here(); }

// Calls that follow go to this level, of those that are here. Weights are the same for all levels, scratch is not.
void use_level(long i) {
    used = LEVELS[i].level;
    used_index = i;
}

// Calls that follow use these functions of an OpenMP for their threads.
void use_openmp(const OpenMP *functions) { openmp = *functions; }

// The index of the level that is used; -1 before the first `use_level`.
long used_level() { return used_index; }

// The index of an activation in Stack, or of a format in Linear, or -1 for one that there is not.
long activation_index(const char *name) { return index_of(name, ACTIVATIONS, N_ACTIVATIONS); }
long format_index(const char *name) { return index_of(name, FORMATS, N_FORMATS); }

long linear_scratch_bytes(const Linear *l, long B) { return used->linear_scratch_bytes(l, B); }

long decode_scratch_bytes(const Stack *stack, const long *lengths, long B, long T, int threads) {
    return used->decode_scratch_bytes(stack, lengths, B, T, threads);
}

void linear_forward(const Linear *l, const float *x, float *y, uint8_t *scratch, long B, int threads) {
    used->linear_forward(l, x, y, scratch, B, threads);
}

void decode(const Stack *stack, const CacheLayout *cache, float *x, const long *slots, const long *lengths,
            uint8_t *scratch, long B, long T, int threads) {
    used->decode(stack, cache, x, slots, lengths, scratch, B, T, threads);
}

// The size of a struct ("Linear") or the offset of a field ("Linear.bias") in bytes; -1 for one that there is not.
long layout_bytes(const char *name) {
#define SIZE(type) {#type, sizeof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field)}
    static const struct {
        const char *name;
        long bytes;
    } layout[] = {
        SIZE(Linear), FIELD(Linear, weight), FIELD(Linear, scale), FIELD(Linear, offset), FIELD(Linear, bias),
        FIELD(Linear, I), FIELD(Linear, O), FIELD(Linear, format),
        SIZE(BlockLayout), FIELD(BlockLayout, ln_1), FIELD(BlockLayout, ln_1_bias), FIELD(BlockLayout, ln_2), FIELD(BlockLayout, ln_2_bias),
        FIELD(BlockLayout, q_norm), FIELD(BlockLayout, k_norm), FIELD(BlockLayout, c_attn), FIELD(BlockLayout, attn_c_proj),
        FIELD(BlockLayout, c_fc), FIELD(BlockLayout, c_gate), FIELD(BlockLayout, mlp_c_proj),
        SIZE(Stack), FIELD(Stack, blocks), FIELD(Stack, rotation), FIELD(Stack, n_layer), FIELD(Stack, C),
        FIELD(Stack, H), FIELD(Stack, K), FIELD(Stack, D), FIELD(Stack, F), FIELD(Stack, activation),
        FIELD(Stack, rmsnorm), FIELD(Stack, eps),
        SIZE(OpenMP), FIELD(OpenMP, parallel), FIELD(OpenMP, barrier), FIELD(OpenMP, thread_num), FIELD(OpenMP, num_threads),
        SIZE(CacheLayout), FIELD(CacheLayout, keys), FIELD(CacheLayout, values), FIELD(CacheLayout, layer_stride),
        FIELD(CacheLayout, slot_stride), FIELD(CacheLayout, head_stride), FIELD(CacheLayout, bf16),
    };
#undef SIZE
#undef FIELD
    for (const auto &entry : layout)
        if (!strcmp(name, entry.name)) return entry.bytes;
    return -1;
}

}  // extern "C"

#pragma GCC visibility pop
