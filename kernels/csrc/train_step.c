/* The whole training step of the n-gram MLP for the CPU, many steps in one call.
 *
 *     P[t, u]  = wte[tok_u] @ W1[:, t]^T              first layer, factored: a row per distinct token of the batch
 *     h[b]     = tanh(b1 + sum_t P[t, x_bt])
 *     logits   = h @ W2^T + b2;   loss = mean cross-entropy, in nats
 *     dlogits  = (softmax(logits) - onehot(y)) / B
 *     dW2 = dlogits^T @ h;  db2 = sum_b dlogits;  dpre = (dlogits @ W2) (1 - h^2);  db1 = sum_b dpre
 *     dP[t, u] = sum of dpre[b] over the b with x_bt = tok_u
 *     dW1[:, t] = dP[t]^T @ wte;  dwte = sum_t dP[t] @ W1[:, t];   then AdamW on every parameter
 *
 * Two forms of the first layer, the same function with its additions in another order:
 *
 *     table    the one above: U*T*E*H multiply-adds, U the number of distinct tokens in the batch
 *     gather   a row per window in place of one per token (P[t, b], dP = dpre): B*T*E*H multiply-adds, no sums over rows
 *     auto     table while 4 U <= 3 B, decided batch by batch
 *
 * Work is split by hidden units: a thread owns whole blocks of UNITS = 32 of them, with their rows of W1 and b1, their
 * columns of W2, and the moments of all these, which therefore never leave its core's cache. Two sums cross threads, the
 * logits (B, V) and dwte (U, E). Blocks form groups, as many as the sizes of the model say; each group has a partial sum
 * of its own, and these are added in pairs, pairs of pairs, and so on. A thread owns whole groups and adds what pairs it
 * has both parts of, so the bits do not depend on the number of threads. Where one (B, V) buffer per group would outgrow
 * the hidden layer (groups * V > H), the logits are split by vocabulary instead; where even one outgrows the
 * parameters, the batch is cut into chunks. Training takes memory of O(parameters + B (H + T)). An evaluation divides
 * the windows instead, where the model is small enough: see divide(). Its sums are the same in both forms and however
 * many windows come together, so it can be cut into calls of any length.
 *
 * Parameters and moments live in packed arrays, each block of units contiguous and the units innermost, padded with
 * zeros; mlp_pack and mlp_unpack convert. The floating-point code is in train_step_simd.h, compiled once for every
 * instruction set below and chosen at run time.
 *
 * Callers check all arguments; nothing here does. No function allocates memory.
 */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)

enum { UNITS = 32 };              /* hidden units of a block */
enum { LANES = 16 };              /* padding of every other innermost dimension: the widest vector, in floats */
enum { STRIP = 512 };             /* terms of a product summed at a time: 64 KB of its second operand */
enum { STRIP_BLOCKS = 4 };        /* blocks of units, likewise: 16 KB of W2 transposed */
enum { FORM_AUTO, FORM_GATHER, FORM_TABLE };
enum { TABLE_FLOATS = 1 << 15 };  /* slots whose tables are held at once: as many as fit, at least one, */
enum { MAX_SLOTS = 4 };           /* at most these */
enum { GROUP_BLOCKS = 2 };        /* blocks of a group, */
enum { FEW_GROUPS = 4, MAX_GROUPS = 32 }; /* unless these were fewer groups than so many, or more */
enum { AHEAD = 16 };              /* rows of logits that are fetched from other cores ahead of their use */
enum { SPIN_NANOSECONDS = 10000 };   /* how long a thread that waits for others keeps its core, */
enum { YIELD_NANOSECONDS = 200000 }; /* and how long it offers it to them before it sleeps */
enum { TAKEN_NANOSECONDS = 20000 };  /* an offer that took so long was accepted, */
enum { CROWDED_NANOSECONDS = 4000000 }; /* and so much lost in one call is too much */
enum { LOSS_ROWS = 16 };             /* windows whose losses are summed together, by one thread */
#ifndef CHUNK_FLOATS              /* tests make these smaller */
#define CHUNK_FLOATS (1 << 20)    /* a logits buffer of this size is never cut */
#define FORWARD_ROWS 512          /* windows of one pass of an evaluation */
#define APART_WEIGHTS (1 << 22)   /* the most weights that every thread may as well read by itself, */
#define APART_ROWS 64             /* and the windows that are worth it */
#endif

static const double BETA1 = 0.9, BETA2 = 0.999;
static const float EPS = 1e-8f;

/* Sizes of a model. */
typedef struct {
    int64_t V, T, E, H;
} mlp_shape;

/* Windows of tokens in memory: window i begins at element i * stride; windows repeat after `count` of them. */
typedef struct {
    const void *tokens;
    int64_t token_bytes; /* 1 (unsigned), 2, 4 or 8 (signed, not negative) */
    int64_t stride;      /* 1: windows slide over a tape; T or T + 1: rows of a matrix */
    int64_t count;
    int64_t has_target; /* whether element T of a window is its target */
} mlp_windows;

/* Packed parameters, or one of the moments. */
typedef struct {
    float *wte; /* (V, Ep)                 Ep: E padded to LANES */
    float *w1;  /* (blocks, T, E, UNITS) */
    float *b1;  /* (blocks, UNITS) */
    float *w2;  /* (blocks, V, UNITS) */
    float *b2;  /* (Vp)                    Vp: V padded to LANES; pads are -inf, 0 in moments */
} packed;

/* What AdamW does at a step: 1 - lr wd, lr / (1 - beta1^s), 1 / sqrt(1 - beta2^s). */
typedef struct {
    float decay, step_size, root;
} adamw_rates;

/* What a step needs to know about its batch; made by one thread at the end of the step before. */
typedef struct {
    int64_t rows;       /* windows */
    int64_t U;          /* distinct tokens */
    int64_t table;      /* whether the table form is used */
    int32_t *token;     /* (U)        the distinct tokens, in order of appearance */
    int64_t *wte_row;   /* (U)        where their embeddings begin in wte */
    int32_t *slot;      /* (V)        token -> its place among them, or -1 */
    int32_t *place;     /* (T, rows)  place of the token of every window and slot */
    int64_t *gathered;  /* (T, rows)  where its embedding begins in wte; gather form only */
    int32_t *target;    /* (rows) */
    adamw_rates rates;
} batch;

typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int round;
    atomic_int sleepers;
    _Alignas(64) atomic_llong lost; /* nanoseconds for which other work had the cores of waiting threads */
    int64_t threads; /* 0 until it is known */
    pthread_mutex_t mutex;
    pthread_cond_t next_round;
} barrier;

typedef struct worker worker;

/* Partial sums to add: number `from` to number `to`, in this order. */
typedef struct {
    int64_t n, to[MAX_GROUPS], from[MAX_GROUPS];
} pairs;

typedef struct {
    mlp_shape shape;
    int64_t Ep, Vp, blocks;
    int64_t groups;  /* of blocks; each has partial sums of its own */
    int64_t threads; /* at most one per group */
    int64_t max_rows; /* windows of a batch */
    int64_t max_U;    /* distinct tokens of a batch, at most */
    int64_t chunk;    /* windows whose logits are held at once */
    int64_t by_vocab; /* logits split by vocabulary (1) or by hidden units (0) */
    int64_t backward; /* whether there is memory for the second batch and all that only a backward pass needs */
    int64_t form;
    int crowded; /* whether the threads lack cores, and had better be fewer */
    packed p, m, v;
    batch batches[2];
    float *h;           /* (blocks, max_rows, UNITS) */
    float *logits;      /* (groups or 1, chunk, Vp): partial sums; the first becomes dlogits */
    float *dw2;         /* (blocks, V, UNITS), where the batch is cut into chunks */
    float *db2;         /* (Vp) */
    float *dwte;        /* (groups, max_U, Ep) partial sums */
    int64_t *row_units; /* 0, UNITS, 2 UNITS, ...: rows of a matrix as gemm_* want them */
    int64_t *row_vocab; /* 0, Vp, 2 Vp, ... */
    float *scratch;     /* (threads, scratch_floats) */
    int64_t scratch_floats;
    double *losses;     /* (max_rows / LOSS_ROWS, rounded up): sums over so many windows */
    barrier sync;
    worker *workers; /* (threads) */
} workspace;

/* One thread's part of a piece of work; `run` is what the work is told. */
typedef void work(workspace *ws, const void *run, int64_t thread, int64_t threads);

/* A thread's own buffers. */
typedef struct {
    float *table; /* (slots held, U, UNITS), U at most max_U: P of a block, and later dP */
    float *dpre;  /* (max_rows, UNITS) */
    float *w1t;   /* (UNITS, Ep): W1 of a block and slot, transposed */
    float *w2t;   /* (STRIP_BLOCKS, UNITS, UNITS): W2 of some blocks and a tile of tokens, each transposed */
    float *tile;  /* (MAX_ROWS, UNITS) */
} scratch;

/* C (n, width) (+)= A B, and then, with h, laid out as C: C *= 1 - h^2.
 *
 * Row r of A begins at A[rows[r]], so that it can be a token's embedding. A may lie in several parts of K columns,
 * a_step floats apart, such as the blocks of h; the rows of B follow one another all the same. */
typedef struct {
    int64_t n, width; /* width: a multiple of LANES */
    const float *A;
    const int64_t *rows;
    int64_t K, parts, a_step; /* parts: 0 is 1 */
    const float *B;
    int64_t ldb;
    float *C;
    int64_t ldc;
    int accumulate;
    const float *h;
} product;

enum { MAX_ROWS = 16 }; /* rows of a register tile, at most */

static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* Things are dealt out in order: part i of n things in `parts` begins at begin_of(n, i, parts), and thing k belongs to
 * part_of(n, k, parts). */
static int64_t begin_of(int64_t n, int64_t i, int64_t parts) { return n * i / parts; }
static int64_t part_of(int64_t n, int64_t k, int64_t parts) { return ((k + 1) * parts - 1) / n; }

/* The first of a thread's share of n windows: a multiple of LOSS_ROWS, or n. */
static int64_t first_row(int64_t n, int64_t thread, int64_t threads) {
    return at_most(n, begin_of(padded(n, LOSS_ROWS) / LOSS_ROWS, thread, threads) * LOSS_ROWS);
}

enum { ACROSS = -1 };

/* The pairs of partial sums that a thread adds by itself, because it owns all groups in both; or those that remain,
 * ACROSS threads: the last pair of all among them, and last. */
static pairs pairs_of(int64_t groups, int64_t threads, int64_t thread) {
    pairs p = {0};
    for (int64_t s = 1; s < groups; s *= 2)
        for (int64_t i = 0; i + s < groups; i += 2 * s) {
            int64_t first = part_of(groups, i, threads), last = part_of(groups, at_most(i + 2 * s, groups) - 1, threads);
            if ((first == last && 2 * s < groups ? first : ACROSS) == thread) {
                p.to[p.n] = i;
                p.from[p.n++] = i + s;
            }
        }
    return p;
}

/* ---- threads --------------------------------------------------------------------------------------------------- */

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

enum { ALONE = -1 };

/* Says that this thread has come so far, and returns the round for await(): in between it can do what needs no other
 * thread. */
static int arrive(barrier *b, int64_t threads) {
    if (threads == 1) return ALONE;
    int round = atomic_load_explicit(&b->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&b->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&b->arrived, 0, memory_order_relaxed);
        atomic_store(&b->round, round + 1);
        if (atomic_load(&b->sleepers) > 0) { /* either this sees the sleeper, or the sleeper the new round */
            pthread_mutex_lock(&b->mutex);
            pthread_cond_broadcast(&b->next_round);
            pthread_mutex_unlock(&b->mutex);
        }
    }
    return round;
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Waits until all threads have arrived. A step is a hundred microseconds long or more, so waiting spins; soon it offers
 * its core to others, among whom may be the thread that is waited for; and when that has more to do, it sleeps. (Sleeping
 * after a quarter of the time cost a tenth of a step of two threads: waking up takes longer than most waits.) */
static void await(barrier *b, int round) {
    if (round == ALONE) return;
    int64_t start = 0, waited;
    do {
        for (int spins = 0; spins < 64; spins++) { /* a pause takes 10 to 140 cycles, a look at the clock about 80 */
            if (atomic_load_explicit(&b->round, memory_order_acquire) != round) return;
            relax();
        }
        int64_t now = nanoseconds();
        if (start == 0) start = now;
        waited = now - start;
        if (waited < SPIN_NANOSECONDS) continue;
        sched_yield();
        int64_t taken = nanoseconds() - now;
        if (taken > TAKEN_NANOSECONDS) atomic_fetch_add_explicit(&b->lost, taken, memory_order_relaxed);
    } while (waited < YIELD_NANOSECONDS);
    pthread_mutex_lock(&b->mutex);
    atomic_fetch_add(&b->sleepers, 1);
    while (atomic_load(&b->round) == round) pthread_cond_wait(&b->next_round, &b->mutex);
    atomic_fetch_sub(&b->sleepers, 1);
    pthread_mutex_unlock(&b->mutex);
}

static void wait_for_all(barrier *b, int64_t threads) { await(b, arrive(b, threads)); }

struct worker {
    pthread_t handle;
    work *work;
    workspace *ws;
    const void *run;
    int64_t thread;
};

/* A worker begins when it is known how many there are. */
static void *begin_work(void *argument) {
    worker *self = argument;
    barrier *b = &self->ws->sync;
    pthread_mutex_lock(&b->mutex);
    while (b->threads == 0) pthread_cond_wait(&b->next_round, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
    self->work(self->ws, self->run, self->thread, b->threads);
    return NULL;
}

/* Runs work on some threads, the caller among them, or on as many as the system grants. They are made for each call: a
 * call is worth many times the tens of microseconds that this takes, and no thread is left behind to spin, or to be
 * missed in a forked child. */
static void run_threads(workspace *ws, work *work, const void *run, int64_t wanted, worker *workers) {
    barrier *b = &ws->sync;
    int64_t threads = 1;
    atomic_init(&b->arrived, 0);
    atomic_init(&b->round, 0);
    atomic_init(&b->sleepers, 0);
    atomic_init(&b->lost, 0);
    b->threads = 0;
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->next_round, NULL);
    for (; threads < wanted; threads++) {
        worker *w = &workers[threads];
        *w = (worker){.work = work, .ws = ws, .run = run, .thread = threads};
        if (pthread_create(&w->handle, NULL, begin_work, w) != 0) break;
    }
    pthread_mutex_lock(&b->mutex);
    b->threads = threads;
    pthread_cond_broadcast(&b->next_round);
    pthread_mutex_unlock(&b->mutex);
    work(ws, run, 0, threads);
    for (int64_t i = 1; i < threads; i++) pthread_join(workers[i].handle, NULL);
    pthread_cond_destroy(&b->next_round);
    pthread_mutex_destroy(&b->mutex);
}

/* ---- batches --------------------------------------------------------------------------------------------------- */

static inline int64_t token_at(const mlp_windows *w, int64_t i) {
    switch (w->token_bytes) {
    case 1: return ((const uint8_t *)w->tokens)[i];
    case 2: return ((const int16_t *)w->tokens)[i];
    case 4: return ((const int32_t *)w->tokens)[i];
    default: return ((const int64_t *)w->tokens)[i];
    }
}

/* Lists the distinct tokens of `rows` windows from window `first` on, and where each window finds its own. */
static void index_windows(const workspace *ws, batch *b, const mlp_windows *w, int64_t first, int64_t rows) {
    int64_t T = ws->shape.T, U = 0, window = first % w->count;
    for (int64_t u = 0; u < b->U; u++) b->slot[b->token[u]] = -1;
    for (int64_t r = 0; r < rows; r++) {
        int64_t base = window * w->stride, t = 0;
        /* A window that follows the last one shares all its tokens but one. */
        if (w->stride == 1 && r > 0 && window > 0)
            for (; t < T - 1; t++) b->place[t * rows + r] = b->place[(t + 1) * rows + r - 1];
        for (; t < T; t++) {
            int64_t token = token_at(w, base + t);
            int32_t u = b->slot[token];
            if (u < 0) {
                u = b->slot[token] = (int32_t)U;
                b->token[U] = (int32_t)token;
                b->wte_row[U] = token * ws->Ep;
                U++;
            }
            b->place[t * rows + r] = u;
        }
        if (w->has_target) b->target[r] = (int32_t)token_at(w, base + T);
        if (++window == w->count) window = 0;
    }
    b->rows = rows;
    b->U = U;
    b->table = ws->form == FORM_TABLE || (ws->form == FORM_AUTO && 4 * U <= 3 * rows);
    for (int64_t i = 0; !b->table && i < T * rows; i++) b->gathered[i] = b->wte_row[b->place[i]];
}

typedef struct {
    mlp_windows windows;
    int64_t batch_size, first_step, steps, num_steps;
    int64_t *step; /* counts every finished step */
    double learning_rate, weight_decay;
    double *losses; /* (steps) */
} training;

static void prepare_step(const workspace *ws, batch *b, const training *run, int64_t step) {
    index_windows(ws, b, &run->windows, step * run->batch_size % run->windows.count, run->batch_size);
    double lr = run->learning_rate * 0.5 * (1 + cos(3.14159265358979323846 * (double)step / (double)run->num_steps));
    b->rates.decay = (float)(1 - lr * run->weight_decay);
    b->rates.step_size = (float)(lr / (1 - pow(BETA1, (double)(step + 1))));
    b->rates.root = (float)(1 / sqrt(1 - pow(BETA2, (double)(step + 1))));
}

/* What a forward pass over windows is for. */
typedef struct {
    mlp_windows windows;
    float *logits;             /* (count, V), or NULL: */
    const int64_t *pair_start; /* (count + 1) window i is continued by pairs pair_start[i] .. pair_start[i+1]-1 */
    const int32_t *pair_target;
    const double *pair_weight;
    double *losses; /* (count) of every window, summed over its pairs */
    int64_t apart;  /* bytes of a workspace of one thread, where every thread has one; or 0 */
} forwarding;

/* ---- the floating-point code, once per instruction set ---------------------------------------------------------- */

typedef struct {
    const char *name;
    int (*supported)(void);
    work *train;   /* a training */
    work *forward; /* a forwarding */
    /* Element by element, for tests. */
    void (*tanh)(const float *, float *, int64_t);
    void (*exp)(const float *, float *, int64_t);
    void (*adamw)(const adamw_rates, float *, float *, float *, const float *, int64_t);
} instruction_set;

static int64_t slots_held(const mlp_shape *s, int64_t max_U);
static workspace *workspace_of(void *memory, int64_t bytes, int64_t thread);
static scratch thread_scratch(const workspace *ws, int64_t thread);

#if defined(__x86_64__)

#define ISA v4
#define W 16
#define LEAST(a, b) _mm512_min_ps((__m512)(a), (__m512)(b))
#define MOST(a, b) _mm512_max_ps((__m512)(a), (__m512)(b))
#define RSQRT(a) _mm512_rsqrt14_ps((__m512)(a))
/* The root, or a itself where it is 0 (class 2) or infinite (class 5). */
#define ROOT_OF_LIMITS(root, a) \
    _mm512_fixupimm_ps((__m512)(root), (__m512)(a), _mm512_set1_epi32(1 << 4 * 2 | 1 << 4 * 5), 0)
#define WIDEST 3
#define ROWS 9
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,fma,avx2"))), apply_to = function)
#else
#pragma GCC push_options
/* Before the loop of a register tile gcc would compute more addresses than there are registers, and keep them in
 * memory. */
#pragma GCC optimize("no-ivopts", "no-tree-loop-im")
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,fma,avx2")
#endif
#include "train_step_simd.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define ISA v3
#define W 8
#define LEAST(a, b) _mm256_min_ps((__m256)(a), (__m256)(b))
#define MOST(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#define WIDEST 2
#define ROWS 6
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("fma,avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("fma,avx2")
#endif
#include "train_step_simd.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static int supported_v4(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
}
static int supported_v3(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#endif

#define ISA base
#define W 4
#if defined(__x86_64__)
#define LEAST(a, b) _mm_min_ps((__m128)(a), (__m128)(b))
#define MOST(a, b) _mm_max_ps((__m128)(a), (__m128)(b))
#endif
#if defined(__aarch64__)
#define WIDEST 3
#define ROWS 9
#else
#define WIDEST 2
#define ROWS 6
#endif
#include "train_step_simd.h"

static int supported_base(void) { return 1; }

/* The best first. */
static const instruction_set SETS[] = {
#if defined(__x86_64__)
    {"avx512", supported_v4, train_v4, forward_v4, tanh_array_v4, exp_array_v4, adamw_v4},
    {"avx2", supported_v3, train_v3, forward_v3, tanh_array_v3, exp_array_v3, adamw_v3},
#endif
    {"baseline", supported_base, train_base, forward_base, tanh_array_base, exp_array_base, adamw_base},
};

/* ---- memory ---------------------------------------------------------------------------------------------------- */

#ifndef REDZONE /* tests poison this many bytes after every piece of memory */
#define REDZONE 0
#define POISON(address, bytes) ((void)0)
#endif

/* Hands out aligned pieces of a block of memory; with base NULL it only measures. */
typedef struct {
    char *base;
    int64_t used;
} arena;

static void *take(arena *a, int64_t bytes) {
    char *piece = a->base ? a->base + a->used : NULL;
    int64_t reserved = padded(bytes, 64) + REDZONE;
    if (piece) POISON(piece + bytes, reserved - bytes);
    a->used += reserved;
    return piece;
}

static float *take_floats(arena *a, int64_t n) { return take(a, n * (int64_t)sizeof(float)); }

/* Rows of a matrix of Vp columns lie a whole number of pages apart if Vp is a multiple of 1024: they would share cache
 * sets. */
static int64_t padded_vocab(int64_t V) {
    int64_t Vp = padded(V, LANES);
    return Vp % 512 == 0 ? Vp + LANES : Vp;
}

static packed packed_at(const mlp_shape *s, float *base, int64_t *floats) {
    int64_t blocks = padded(s->H, UNITS) / UNITS;
    arena a = {(char *)base, 0};
    packed p;
    p.wte = take_floats(&a, s->V * padded(s->E, LANES));
    p.w1 = take_floats(&a, blocks * s->T * s->E * UNITS);
    p.b1 = take_floats(&a, blocks * UNITS);
    p.w2 = take_floats(&a, blocks * s->V * UNITS);
    p.b2 = take_floats(&a, padded_vocab(s->V));
    if (floats) *floats = a.used / (int64_t)sizeof(float);
    return p;
}

static int64_t slots_held(const mlp_shape *s, int64_t max_U) {
    return at_least(1, at_most(at_most(s->T, MAX_SLOTS), TABLE_FLOATS / (max_U * UNITS)));
}

/* The piece of every buffer in a thread's scratch, and how much that is. */
static scratch scratch_at(const workspace *ws, float *base, int64_t *floats) {
    arena a = {(char *)base, 0};
    scratch s;
    s.table = take_floats(&a, slots_held(&ws->shape, ws->max_U) * ws->max_U * UNITS);
    s.w2t = take_floats(&a, STRIP_BLOCKS * UNITS * UNITS);
    s.dpre = take_floats(&a, ws->backward * ws->max_rows * UNITS);
    s.w1t = take_floats(&a, ws->backward * UNITS * ws->Ep);
    s.tile = take_floats(&a, ws->backward * MAX_ROWS * UNITS);
    if (floats) *floats = a.used / (int64_t)sizeof(float);
    return s;
}

static scratch thread_scratch(const workspace *ws, int64_t thread) {
    return scratch_at(ws, ws->scratch + thread * ws->scratch_floats, NULL);
}

/* Groups of blocks of units: fewer where their partial sums of dwte would take more than twice the parameters' memory. */
static int64_t groups_of(const mlp_shape *s) {
    int64_t blocks = padded(s->H, UNITS) / UNITS, wte = s->V * padded(s->E, LANES);
    int64_t parameters = blocks * UNITS * (s->T * s->E + s->V) + wte;
    int64_t groups = at_most(MAX_GROUPS, at_least(blocks / GROUP_BLOCKS, at_most(blocks, FEW_GROUPS)));
    return at_most(groups, 2 * parameters / wte);
}

/* Lays a workspace out in memory (NULL: only measures) and returns the bytes it takes, itself included. */
static int64_t lay_out(workspace *ws, char *base, const mlp_shape *s, int64_t rows, int64_t groups, int64_t threads,
                       int backward) {
    arena a = {base, 0};
    take(&a, (int64_t)sizeof(workspace));
    ws->shape = *s;
    ws->Ep = padded(s->E, LANES);
    ws->Vp = padded_vocab(s->V);
    ws->blocks = padded(s->H, UNITS) / UNITS;
    ws->groups = groups;
    ws->threads = at_most(threads, groups);
    ws->max_rows = rows;
    ws->max_U = at_most(s->V, rows * s->T);
    ws->backward = backward;
    ws->by_vocab = groups > 1 && groups * ws->Vp > ws->blocks * UNITS;
    int64_t parameters = ws->blocks * UNITS * (s->T * s->E + s->V) + s->V * ws->Ep;
    int64_t held = at_least(CHUNK_FLOATS, at_least(parameters, rows * ws->blocks * UNITS));
    ws->chunk = at_most(rows, at_least(1, held / ws->Vp / LOSS_ROWS) * LOSS_ROWS);
    for (int i = 0; i < 1 + backward; i++) {
        batch *b = &ws->batches[i];
        b->rows = b->U = 0;
        b->token = take(&a, ws->max_U * 4);
        b->wte_row = take(&a, ws->max_U * 8);
        b->slot = take(&a, s->V * 4);
        b->place = take(&a, s->T * rows * 4);
        b->gathered = take(&a, s->T * rows * 8);
        b->target = take(&a, rows * 4);
        if (base) memset(b->slot, -1, (size_t)s->V * 4);
    }
    ws->h = take_floats(&a, ws->blocks * rows * UNITS);
    ws->logits = take_floats(&a, (ws->by_vocab ? 1 : groups) * ws->chunk * ws->Vp);
    ws->dw2 = take_floats(&a, backward && ws->chunk < rows ? ws->blocks * s->V * UNITS : 0);
    ws->db2 = take_floats(&a, backward * ws->Vp);
    ws->dwte = take_floats(&a, backward * groups * ws->max_U * ws->Ep);
    int64_t n = backward ? at_least(rows, ws->max_U) : rows;
    ws->row_units = take(&a, n * 8);
    ws->row_vocab = take(&a, backward * ws->chunk * 8);
    scratch_at(ws, NULL, &ws->scratch_floats);
    ws->scratch = take_floats(&a, ws->threads * ws->scratch_floats);
    ws->losses = take(&a, backward * padded(rows, LOSS_ROWS) / LOSS_ROWS * 8);
    ws->workers = take(&a, ws->threads * (int64_t)sizeof(worker));
    if (base) {
        for (int64_t i = 0; i < n; i++) ws->row_units[i] = i * UNITS;
        for (int64_t i = 0; backward && i < ws->chunk; i++) ws->row_vocab[i] = i * ws->Vp;
    }
    return a.used;
}

#ifndef SOURCE_CRC
#define SOURCE_CRC 0
#endif

/* ---- what Python calls ------------------------------------------------------------------------------------------ */

/* Checksum of the source this was built from, so that a library older than its callers is recognised. */
EXPORT int64_t mlp_source_crc(void) { return SOURCE_CRC; }

/* The number of instruction sets compiled in. */
EXPORT int64_t mlp_isa_count(void) { return (int64_t)(sizeof SETS / sizeof SETS[0]); }

/* The name of one, the best first. */
EXPORT const char *mlp_isa_name(int64_t isa) { return SETS[isa].name; }

/* Whether this processor has it. */
EXPORT int64_t mlp_isa_supported(int64_t isa) { return SETS[isa].supported(); }

/* Floats of a packed array of parameters or moments. */
EXPORT int64_t mlp_packed_floats(const mlp_shape *shape) {
    int64_t floats;
    packed_at(shape, NULL, &floats);
    return floats;
}

/* Bytes of memory for training on batches of `rows` windows. */
EXPORT int64_t mlp_workspace_bytes(const mlp_shape *shape, int64_t rows, int64_t threads) {
    workspace ws;
    return lay_out(&ws, NULL, shape, rows, groups_of(shape), threads, 1);
}

/* torch's layouts, wte (V, E), W1 (H, T*E), b1 (H), W2 (V, H), b2 (V), to a packed array; b2_pad fills b2's padding. */
EXPORT void mlp_pack(const mlp_shape *s, float *array, const float *wte, const float *w1, const float *b1,
                     const float *w2, const float *b2, float b2_pad) {
    int64_t TE = s->T * s->E, Ep = padded(s->E, LANES), Vp = padded_vocab(s->V), Hp = padded(s->H, UNITS);
    packed p = packed_at(s, array, NULL);
    memset(p.wte, 0, (size_t)(s->V * Ep) * sizeof(float));
    memset(p.w1, 0, (size_t)(TE * Hp) * sizeof(float));
    memset(p.b1, 0, (size_t)Hp * sizeof(float));
    memset(p.w2, 0, (size_t)(s->V * Hp) * sizeof(float));
    for (int64_t v = 0; v < s->V; v++)
        memcpy(p.wte + v * Ep, wte + v * s->E, (size_t)s->E * sizeof(float));
    for (int64_t u = 0; u < s->H; u++) {
        float *to = p.w1 + u / UNITS * TE * UNITS + u % UNITS;
        for (int64_t k = 0; k < TE; k++) to[k * UNITS] = w1[u * TE + k];
        p.b1[u] = b1[u];
    }
    for (int64_t first = 0; first < s->H; first += UNITS) {
        size_t bytes = (size_t)at_most(UNITS, s->H - first) * sizeof(float);
        for (int64_t v = 0; v < s->V; v++)
            memcpy(p.w2 + (first / UNITS * s->V + v) * UNITS, w2 + v * s->H + first, bytes);
    }
    for (int64_t v = 0; v < Vp; v++) p.b2[v] = v < s->V ? b2[v] : b2_pad;
}

/* A packed array to torch's layouts. */
EXPORT void mlp_unpack(const mlp_shape *s, float *array, float *wte, float *w1, float *b1, float *w2, float *b2) {
    int64_t TE = s->T * s->E, Ep = padded(s->E, LANES);
    packed p = packed_at(s, array, NULL);
    for (int64_t v = 0; v < s->V; v++)
        memcpy(wte + v * s->E, p.wte + v * Ep, (size_t)s->E * sizeof(float));
    for (int64_t u = 0; u < s->H; u++) {
        const float *from = p.w1 + u / UNITS * TE * UNITS + u % UNITS;
        for (int64_t k = 0; k < TE; k++) w1[u * TE + k] = from[k * UNITS];
        b1[u] = p.b1[u];
    }
    for (int64_t first = 0; first < s->H; first += UNITS) {
        size_t bytes = (size_t)at_most(UNITS, s->H - first) * sizeof(float);
        for (int64_t v = 0; v < s->V; v++)
            memcpy(w2 + v * s->H + first, p.w2 + (first / UNITS * s->V + v) * UNITS, bytes);
    }
    memcpy(b2, p.b2, (size_t)s->V * sizeof(float));
}

/* Trains: `steps` steps from number *step on, of num_steps, on the windows of a tape; fewer, but at least one, where the
 * threads wait for cores that other work has.
 *
 * step: the number of steps done, counted up with every step, so that it always agrees with the state. parameters,
 * exp_avg, exp_avg_sq: packed, updated in place. memory: mlp_workspace_bytes() of it, 64-byte aligned.
 * losses (steps): the mean cross-entropy of every batch, before its update. */
EXPORT void mlp_train(int64_t isa, const mlp_shape *shape, float *parameters, float *exp_avg, float *exp_avg_sq,
                      void *memory, const mlp_windows *tape, int64_t batch_size, int64_t *step, int64_t steps,
                      int64_t num_steps, double learning_rate, double weight_decay, int64_t threads, int64_t form,
                      double *losses) {
    workspace *ws = memory;
    training run = {*tape, batch_size, *step, steps, num_steps, step, learning_rate, weight_decay, losses};
    if (steps == 0) return;
    lay_out(ws, memory, shape, batch_size, groups_of(shape), threads, 1);
    ws->form = form;
    ws->p = packed_at(shape, parameters, NULL);
    ws->m = packed_at(shape, exp_avg, NULL);
    ws->v = packed_at(shape, exp_avg_sq, NULL);
    prepare_step(ws, &ws->batches[*step & 1], &run, *step);
    run_threads(ws, SETS[isa].train, &run, ws->threads, ws->workers);
}

/* How a forward pass over `count` windows is divided among threads. While a model is small, every thread takes windows of
 * its own, in a workspace of its own, and none waits for another; beyond, the threads work on the same windows, as in
 * training. */
typedef struct {
    int64_t apart;   /* as in a forwarding */
    int64_t rows;    /* windows of one pass */
    int64_t threads; /* of one workspace, or with a workspace each */
} division;

static division divide(const mlp_shape *s, int64_t count, int64_t threads) {
    workspace ws;
    int64_t Hp = padded(s->H, UNITS), widest = at_least(at_least(padded_vocab(s->V), Hp), 2 * s->T);
    division d = {0, at_most(FORWARD_ROWS, count), threads};
    if (FORWARD_ROWS * widest > CHUNK_FLOATS || Hp * (s->T * s->E + s->V) > APART_WEIGHTS) return d;
    d.threads = at_most(threads, (count + APART_ROWS - 1) / APART_ROWS);
    d.rows = at_most(FORWARD_ROWS, (count + d.threads - 1) / d.threads);
    d.apart = lay_out(&ws, NULL, s, d.rows, 1, 1, 0);
    return d;
}

/* The workspace of a thread, where every one has its own of so many bytes. */
static workspace *workspace_of(void *memory, int64_t bytes, int64_t thread) {
    return (workspace *)((char *)memory + thread * bytes);
}

/* Bytes of memory for a forward pass over `count` windows, at least one. */
EXPORT int64_t mlp_forward_bytes(const mlp_shape *shape, int64_t count, int64_t threads) {
    workspace ws;
    division d = divide(shape, count, threads);
    if (d.apart == 0) return lay_out(&ws, NULL, shape, d.rows, groups_of(shape), d.threads, 0);
    return d.threads * (d.apart + (int64_t)sizeof(worker));
}

static void run_forward(int64_t isa, const mlp_shape *shape, float *parameters, void *memory, forwarding *run,
                        int64_t threads, int64_t form) {
    division d = divide(shape, run->windows.count, threads);
    workspace *first = memory;
    run->apart = d.apart;
    for (int64_t i = 0; i < (d.apart == 0 ? 1 : d.threads); i++) {
        workspace *ws = workspace_of(memory, d.apart, i);
        if (d.apart == 0) lay_out(ws, (char *)ws, shape, d.rows, groups_of(shape), d.threads, 0);
        else lay_out(ws, (char *)ws, shape, d.rows, 1, 1, 0);
        ws->form = form;
        ws->p = packed_at(shape, parameters, NULL);
    }
    if (d.apart == 0) run_threads(first, SETS[isa].forward, run, first->threads, first->workers);
    else run_threads(first, SETS[isa].forward, run, d.threads, (worker *)workspace_of(memory, d.apart, d.threads));
}

/* Logits (count, V) of windows. memory: mlp_forward_bytes() of it, 64-byte aligned. */
EXPORT void mlp_logits(int64_t isa, const mlp_shape *shape, float *parameters, void *memory, const mlp_windows *windows,
                       int64_t threads, int64_t form, float *logits) {
    forwarding run = {.windows = *windows, .logits = logits};
    run_forward(isa, shape, parameters, memory, &run, threads, form);
}

/* The cross-entropies of contexts and their continuations, in nats, weighted and summed by context: losses (count).
 *
 * Context i is continued by pairs pair_start[i] .. pair_start[i+1]-1; a pair is a target and a weight. */
EXPORT void mlp_losses(int64_t isa, const mlp_shape *shape, float *parameters, void *memory, const mlp_windows *contexts,
                       const int64_t *pair_start, const int32_t *pair_target, const double *pair_weight,
                       int64_t threads, int64_t form, double *losses) {
    forwarding run = {.windows = *contexts, .pair_start = pair_start, .pair_target = pair_target,
                      .pair_weight = pair_weight, .losses = losses};
    run_forward(isa, shape, parameters, memory, &run, threads, form);
}

/* Draws `count` tokens one after another: xorshift64* uniforms, and for each the token at which the cumulative softmax
 * first exceeds it; the last token where rounding leaves the sum below.
 *
 * context (T): where to go on; overwritten with the last T tokens. state: the generator's. memory: mlp_forward_bytes()
 * of it for one window. logits (V): scratch. drawn (count). */
EXPORT void mlp_sample(int64_t isa, const mlp_shape *shape, float *parameters, void *memory, int64_t *context,
                       uint64_t *state, int64_t count, float *logits, int64_t *drawn) {
    mlp_windows windows = {context, 8, 1, 1, 0};
    int64_t T = shape->T, V = shape->V;
    for (int64_t i = 0; i < count; i++) {
        mlp_logits(isa, shape, parameters, memory, &windows, 1, FORM_GATHER, logits);
        uint64_t x = *state;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        *state = x;
        double uniform = (double)((uint32_t)(x * UINT64_C(0x2545F4914F6CDD1D) >> 32) >> 8) / 16777216.0;
        float largest = logits[0];
        for (int64_t v = 1; v < V; v++) largest = logits[v] > largest ? logits[v] : largest;
        double sum = 0, cumulative = 0;
        for (int64_t v = 0; v < V; v++) sum += logits[v] = expf(logits[v] - largest);
        int64_t token = 0;
        for (; token < V - 1; token++) {
            cumulative += logits[token] / sum;
            if (uniform < cumulative) break;
        }
        memmove(context, context + 1, (size_t)(T - 1) * sizeof(int64_t));
        context[T - 1] = drawn[i] = token;
    }
}

/* tanh, exp and AdamW as the kernels compute them, element by element; n is a multiple of UNITS. */
EXPORT void mlp_tanh(int64_t isa, const float *x, float *y, int64_t n) { SETS[isa].tanh(x, y, n); }
EXPORT void mlp_exp(int64_t isa, const float *x, float *y, int64_t n) { SETS[isa].exp(x, y, n); }
EXPORT void mlp_adamw(int64_t isa, double decay, double step_size, double root, float *p, float *m, float *v,
                      const float *g, int64_t n) {
    SETS[isa].adamw((adamw_rates){(float)decay, (float)step_size, (float)(1 / root)}, p, m, v, g, n);
}
