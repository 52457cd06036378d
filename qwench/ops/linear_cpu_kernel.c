/* A linear layer of a few bf16 tokens: RMSNorm, product with the weight, bias, SwiGLU, residual. Not for many tokens.

   Such a product is bound by reading the weight, so each of its rows is read once, for all tokens together, and
   fetched ahead. A bf16 number is the upper half of an fp32 number: a vector of 2 * LANES weights becomes two vectors
   of LANES fp32 weights, the even and the odd ones, by a shift and by a mask, and x is laid out to match. Products and
   sums are fp32; a result depends on its token and weight row alone, not on how many tokens there are or on threads.

   Written with the vector types of GCC and Clang for a little-endian processor; `linear_cpu_native.py` compiles it and
   sets LANES (a power of two from 4 to 16). */
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

enum {
    PAIR = 2 * LANES,     /* inputs that one vector of weights holds */
    TOKENS = 8,           /* most tokens: their sums are held in registers */
    ROWS = 4,             /* most rows of the weight at a time */
    AHEAD = 4096,         /* bytes: a page of 4 KiB, at whose end the processor's own prefetching stops */
    SHORTEST = 16 << 10,  /* bytes of weight that a thread takes at least */
    SMALLEST = 256 << 10, /* bytes of weight below which waking other threads costs more than it saves */
};

typedef struct {
    const uint16_t *weight, *bias, *residual; /* [N, K], [N] or null, [T, outputs] or null */
    const float *x;                           /* [T, blocks, 2, LANES]: even and odd inputs, zeros behind the last */
    uint16_t *y;                              /* [T, outputs] */
    int64_t num_tokens, K, N, blocks;
    int64_t outputs; /* N, or N / 2 with SwiGLU */
    int64_t shortest; /* outputs that a thread takes at least, a multiple of ROWS */
    int swiglu, num_threads;
    atomic_llong next;
} Job;

static float to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even. */
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE words load(const void *from) {
    words out;
    memcpy(&out, from, sizeof out);
    return out;
}

INLINE float sum(floats value) {
    typedef float fours __attribute__((vector_size(16)));
    fours parts[LANES / 4];
    memcpy(parts, &value, sizeof parts);
    UNROLL for (int half = LANES / 8; half > 0; half /= 2)
        UNROLL for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* Add PAIR inputs of R rows and T tokens; `stride` lies between the tokens' inputs. */
INLINE void add(floats (*acc)[TOKENS], const uint16_t *const *rows, const float *x, int64_t stride, int R, int T) {
    UNROLL for (int i = 0; i < R; i++) {
        const words pair = load(rows[i]);
        const floats even = (floats)(pair << 16), odd = (floats)(pair & 0xffff0000u);
        UNROLL for (int t = 0; t < T; t++) {
            acc[i][t] += even * (floats)load(x + t * stride);
            acc[i][t] += odd * (floats)load(x + t * stride + LANES);
        }
    }
}

/* To the nearest bf16 number, ties to even, as an fp32 number. */
INLINE floats rounded(floats value) {
    const words bits = (words)value, up = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    const words number = (words)(value == value);
    return (floats)((up & number) | (bits & ~number));
}

/* sums[i][t] = row i of the weight times token t, for R rows and T tokens, which are constants where it is inlined. */
INLINE void multiply(
    const Job *job, const uint16_t *const *rows, const float *x, float (*sums)[TOKENS], const int R, const int T) {
    floats acc[ROWS][TOKENS];
    const uint16_t *at[ROWS];
    UNROLL for (int i = 0; i < R; i++) {
        at[i] = rows[i];
        UNROLL for (int t = 0; t < T; t++) acc[i][t] = (floats){0};
    }
    const int64_t stride = job->blocks * PAIR, rest = job->K % PAIR;
    const float *end = x + (job->K - rest);
    for (; x < end; x += PAIR) {
        UNROLL for (int i = 0; i < R; i++) __builtin_prefetch((const void *)((uintptr_t)at[i] + AHEAD));
        add(acc, at, x, stride, R, T);
        UNROLL for (int i = 0; i < R; i++) at[i] += PAIR;
    }
    if (rest) {
        uint16_t padded[ROWS][PAIR] = {{0}};
        UNROLL for (int i = 0; i < R; i++) {
            memcpy(padded[i], at[i], rest * sizeof padded[i][0]);
            at[i] = padded[i];
        }
        add(acc, at, x, stride, R, T);
    }
    UNROLL for (int i = 0; i < R; i++)
        UNROLL for (int t = 0; t < T; t++) sums[i][t] = sum(acc[i][t]);
}

#define MULTIPLY(T, R)                                                                                       \
    static __attribute__((noinline)) void multiply_##T(                                                      \
        const Job *job, const uint16_t *const *rows, const float *x, float (*sums)[TOKENS]) {                \
        multiply(job, rows, x, sums, R, T);                                                                  \
    }
MULTIPLY(1, 4)
MULTIPLY(2, 4)
MULTIPLY(3, 4)
MULTIPLY(4, 4)
MULTIPLY(5, 2)
MULTIPLY(6, 2)
MULTIPLY(7, 2)
MULTIPLY(8, 2)
typedef void (*Multiply)(const Job *, const uint16_t *const *, const float *, float (*)[TOKENS]);
static const Multiply multiplies[TOKENS] = {multiply_1, multiply_2, multiply_3, multiply_4,
                                            multiply_5, multiply_6, multiply_7, multiply_8};

static void finish(const Job *job, int64_t token, int64_t output, float value, float up) {
    if (job->bias) {
        value += to_float(job->bias[output]);
        if (job->swiglu) up += to_float(job->bias[output + job->outputs]);
    }
    if (job->swiglu) value = value / (1 + expf(-value)) * up;
    const int64_t place = token * job->outputs + output;
    if (job->residual) value += to_float(job->residual[place]);
    job->y[place] = to_bf16(value);
}

static void compute(const Job *job, int64_t start, int64_t stop) {
    const int T = (int)job->num_tokens, num_rows = T <= 4 ? 4 : 2;
    const int num_outputs = job->swiglu ? num_rows / 2 : num_rows; /* of a row of gates and a row of ups each */
    for (int64_t output = start; output < stop; output += num_outputs) {
        const uint16_t *rows[ROWS];
        for (int i = 0; i < num_outputs; i++) {
            const int64_t row = output + i < stop ? output + i : stop - 1; /* rows too many are not used */
            rows[i] = job->weight + row * job->K;
            if (job->swiglu) rows[num_outputs + i] = rows[i] + job->outputs * job->K;
        }
        float sums[ROWS][TOKENS];
        multiplies[T - 1](job, rows, job->x, sums);
        for (int i = 0; i < num_outputs && output + i < stop; i++)
            for (int t = 0; t < T; t++)
                finish(job, t, output + i, sums[i][t], job->swiglu ? sums[num_outputs + i][t] : 0);
    }
}

/* Take outputs until none is left: long runs first, as reading is fastest in a row, and short ones at the end, so that
   the threads finish together whatever else the processor does. */
static void work(void *argument) {
    Job *job = argument;
    long long start = atomic_load(&job->next);
    while (start < job->outputs) {
        const int64_t share = (job->outputs - start) / (2 * job->num_threads) / ROWS * ROWS;
        int64_t stop = start + (share > job->shortest ? share : job->shortest);
        if (stop > job->outputs) stop = job->outputs;
        if (!atomic_compare_exchange_weak(&job->next, &start, stop)) continue;
        compute(job, start, stop);
        start = atomic_load(&job->next);
    }
}

/* x as `Job` wants it. With a norm, rounded where `ops.norm` rounds: the normed value, and its product with the weight. */
static void prepare(const uint16_t *from, float *to, int64_t K, const uint16_t *norm, float eps) {
    floats squares = {0};
    for (int64_t k = 0; k < K; k += PAIR) {
        words pair = {0};
        memcpy(&pair, from + k, (K - k < PAIR ? K - k : PAIR) * sizeof *from);
        const floats even = (floats)(pair << 16), odd = (floats)(pair & 0xffff0000u);
        squares += even * even + odd * odd;
        memcpy(to + k, &even, sizeof even);
        memcpy(to + k + LANES, &odd, sizeof odd);
    }
    if (!norm) return;
    const float scale = 1 / sqrtf(sum(squares) / (float)K + eps);
    for (int64_t k = 0; k < K; k += PAIR) {
        words pair = {0};
        memcpy(&pair, norm + k, (K - k < PAIR ? K - k : PAIR) * sizeof *norm);
        for (int half = 0; half < 2; half++) {
            float *place = to + k + half * LANES;
            const floats weight = (floats)(half ? pair & 0xffff0000u : pair << 16);
            const floats normed = rounded(rounded((floats)load(place) * scale) * weight);
            memcpy(place, &normed, sizeof normed);
        }
    }
}

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

/* y [T, N], or [T, N / 2] with SwiGLU, from x [T, K], all contiguous bf16, 1 <= T <= TOKENS. `norm` [K], `bias` [N] and `residual` (of y's
   shape) may be null. `parallel` is OpenMP's GOMP_parallel, of the pool that torch itself uses: threads of our own would
   compete with torch's, which spin for a while after each of its operations. Returns 0, or 1 where memory has run out. */
int qwench_linear(
    const uint16_t *x, const uint16_t *weight, const uint16_t *bias, const uint16_t *norm, float eps,
    const uint16_t *residual, uint16_t *y, int64_t num_tokens, int64_t K, int64_t N, int swiglu, int num_threads,
    Parallel parallel) {
    const int64_t blocks = (K + PAIR - 1) / PAIR, outputs = swiglu ? N / 2 : N;
    float *laid_out = aligned_alloc(64, (num_tokens * blocks * PAIR * sizeof *laid_out + 63) / 64 * 64);
    if (!laid_out) return 1;
    for (int64_t t = 0; t < num_tokens; t++) prepare(x + t * K, laid_out + t * blocks * PAIR, K, norm, eps);
    const int64_t shortest = SHORTEST / (K * 2) / ROWS * ROWS;
    Job job = {
        .weight = weight, .bias = bias, .residual = residual, .x = laid_out, .y = y, .num_tokens = num_tokens, .K = K,
        .N = N, .blocks = blocks, .outputs = outputs, .shortest = shortest < ROWS ? ROWS : shortest, .swiglu = swiglu,
        .num_threads = num_threads,
    };
    if (num_threads < 2 || N * K * 2 < SMALLEST)
        work(&job);
    else
        parallel(work, &job, num_threads, 0);
    free(laid_out);
    return 0;
}
