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
 *     gather   a row per window in place of one per token (P[t, b], dP = dpre): B*T*E*H multiply-adds, no row sums
 *     auto     table while 4 U <= 3 B, decided batch by batch
 *
 * Work is split by hidden units: a thread owns whole blocks of UNITS = 32 of them, with their rows of W1 and b1, their
 * columns of W2, and the moments of all these, which therefore never leave its core's cache (tensor parallel). Two sums
 * cross threads, the logits (B, V) and dwte (U, E). Blocks form groups, as many as the sizes of the model say; each
 * group has a partial sum of its own, and a binary tree reduces them. A thread owns whole groups and adds the subtrees
 * that lie within them, so the bits do not depend on the number of threads. Where one (B, V) buffer per group would
 * outgrow the hidden layer (groups * V > H), the logits are split by vocabulary instead; where even one outgrows the
 * parameters, the batch is cut into chunks. Training takes memory of O(parameters + B (H + T)). An evaluation divides
 * the windows instead, where the model is small enough: see plan_forward(). Its sums are the same in both forms and
 * however many windows come together, so it can be cut into calls of any length.
 *
 * Parameters and moments live in packed arrays (packing.h), and threads meet at barriers (barrier.h). The
 * floating-point code is in train_step_simd.h, compiled once for every instruction set below and chosen at run time.
 *
 * Callers check all arguments; nothing here does. No function allocates memory.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "barrier.h"
#include "packing.h"

enum { FORM_AUTO, FORM_GATHER, FORM_TABLE };
/* Products: terms that are summed at a time, so that 64 KB of the second operand are in use; the same in blocks of
 * units, 16 KB of W2 transposed; and the rows of a register tile, at most. */
enum { STRIP = 512, STRIP_BLOCKS = 4, MAX_ROWS = 16 };
/* First layer: the tables of as many positions as fit are held at once, at least one and at most MAX_POSITIONS. */
enum { TABLE_FLOATS = 1 << 15, MAX_POSITIONS = 4 };
/* Groups have GROUP_BLOCKS blocks, or fewer where there would be fewer than FEW_GROUPS, or more beyond MAX_GROUPS. */
enum { GROUP_BLOCKS = 2, FEW_GROUPS = 4, MAX_GROUPS = 32 };
enum { MAX_THREADS = 1024 };      /* of a call */
enum { OVERSUBSCRIBED_NANOSECONDS = 4000000 }; /* cores lost to other work for so long in a call: too many threads */
enum { LOSS_ROWS = 16 };          /* windows whose losses are summed together, by one thread */
enum { AHEAD = 16 };              /* rows of logits that are prefetched from other cores ahead of their use */
#ifndef CHUNK_FLOATS              /* tests make these smaller */
#define CHUNK_FLOATS (1 << 20)    /* a logits buffer of this size is never cut */
#define FORWARD_ROWS 512          /* windows of one pass of an evaluation */
#define PRIVATE_WEIGHTS (1 << 22) /* the most weights that every thread may as well read by itself, */
#define PRIVATE_ROWS 64           /* and the windows that are worth it */
#endif

static const double BETA1 = 0.9, BETA2 = 0.999;
static const float EPS = 1e-8f;

/* Windows of tokens in memory: window i begins at element i * stride; windows repeat after `count` of them. */
typedef struct {
    const void *tokens;
    int64_t token_bytes; /* 1 (unsigned), 2, 4 or 8 (signed, not negative) */
    int64_t stride;      /* 1: windows slide over a tape; T or T + 1: rows of a matrix */
    int64_t count;
    int64_t has_target; /* whether element T of a window is its target */
} mlp_windows;

/* AdamW's scalars of update s. */
typedef struct {
    float decay;       /* 1 - lr weight_decay */
    float step_size;   /* lr / (1 - beta1^s) */
    float rsqrt_bias2; /* 1 / sqrt(1 - beta2^s) */
} adamw_rates;

/* What a step needs to know about its batch; made by one thread at the end of the step before. */
typedef struct {
    int64_t rows;       /* windows */
    int64_t U;          /* distinct tokens */
    int64_t table;      /* whether the table form is used */
    int32_t *token;     /* (U)        the distinct tokens, in order of appearance */
    int64_t *wte_row;   /* (U)        where their embeddings begin in wte */
    int32_t *index_of;  /* (V)        token -> its index among them, or -1 */
    int32_t *index;     /* (T, rows)  the index of the token at every position of every window */
    int64_t *gathered;  /* (T, rows)  where its embedding begins in wte; gather form only */
    int32_t *target;    /* (rows) */
    adamw_rates rates;
} batch;

/* Edges of the tree that reduces the groups' partial sums: to += from, in this order. */
typedef struct {
    int64_t n, to[MAX_GROUPS], from[MAX_GROUPS];
} edges;

typedef struct {
    mlp_model model;
    int64_t Ep, Vp, blocks;
    int64_t groups;  /* of blocks; each has partial sums of its own */
    int64_t threads; /* at most one per group */
    int64_t max_rows; /* windows of a batch */
    int64_t max_U;    /* distinct tokens of a batch, at most */
    int64_t held;     /* positions whose tables are held at once */
    int64_t chunk;    /* windows whose logits are held at once */
    int64_t by_vocab; /* logits split by vocabulary (1) or by hidden units (0) */
    int64_t backward; /* whether there is memory for the second batch and all that only a backward pass needs */
    int oversubscribed; /* whether other work holds the threads' cores: a call with fewer would be faster */
    packed p, exp_avg, exp_avg_sq;
    batch batches[2];
    float *h;           /* (blocks, max_rows, UNITS) */
    float *logits;      /* (groups or 1, chunk, Vp): partial sums; the first becomes dlogits */
    float *dw2;         /* (blocks, V, UNITS), where the batch is cut into chunks */
    float *db2;         /* (Vp) */
    float *dwte;        /* (groups, max_U, Ep) partial sums */
    int64_t *row_units; /* 0, UNITS, 2 UNITS, ...: rows of a matrix as gemm_* want them */
    int64_t *row_vocab; /* 0, Vp, 2 Vp, ... */
    char *scratch;      /* (threads, scratch_bytes): the buffers of the shares */
    int64_t scratch_bytes;
    double *losses;     /* (max_rows / LOSS_ROWS, rounded up): sums over so many windows */
    barrier sync;
} workspace;

/* One thread's part of a piece of work; `run` are the arguments of the work. */
typedef void work(workspace *ws, const void *run, int64_t thread, int64_t threads);

/* A thread's share of the work, and its buffers. */
typedef struct {
    int64_t thread, threads;
    int64_t group0, group1; /* groups of blocks of units, */
    int64_t block0, block1; /* and their blocks */
    float *table; /* (positions held, U, UNITS), U at most max_U: P of a block, and later dP */
    float *w2t;   /* (STRIP_BLOCKS, UNITS, UNITS): W2 of some blocks and a tile of tokens, each transposed */
    float *dpre;  /* (max_rows, UNITS) */
    float *w1t;   /* (UNITS, Ep): W1 of a block and position, transposed */
    float *tile;  /* (MAX_ROWS, UNITS) */
} share;

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

/* n items in order, divided into shards: shard i begins at item shard_begin(n, i, shards), and item k belongs to shard
 * shard_of(n, k, shards). */
static int64_t shard_begin(int64_t n, int64_t i, int64_t shards) { return n * i / shards; }
static int64_t shard_of(int64_t n, int64_t k, int64_t shards) { return ((k + 1) * shards - 1) / n; }

/* The first window of a thread's shard of n: a multiple of LOSS_ROWS, or n. */
static int64_t first_row(int64_t n, int64_t thread, int64_t threads) {
    return min(n, shard_begin(padded(n, LOSS_ROWS) / LOSS_ROWS, thread, threads) * LOSS_ROWS);
}

enum { ACROSS = -1 };

/* The edges of the reduction tree that a thread adds by itself, because it owns all groups below them; or, for ACROSS,
 * those between threads: the root of the tree among them, and last. */
static edges edges_of(int64_t groups, int64_t threads, int64_t thread) {
    edges e = {0};
    for (int64_t s = 1; s < groups; s *= 2)
        for (int64_t i = 0; i + s < groups; i += 2 * s) {
            int64_t first = shard_of(groups, i, threads), last = shard_of(groups, min(i + 2 * s, groups) - 1, threads);
            if ((first == last && 2 * s < groups ? first : ACROSS) == thread) {
                e.to[e.n] = i;
                e.from[e.n++] = i + s;
            }
        }
    return e;
}

/* ---- threads --------------------------------------------------------------------------------------------------- */

typedef struct {
    pthread_t handle;
    work *work;
    workspace *ws;
    const void *run;
    int64_t thread;
} worker;

/* A worker begins when it is known how many there are. */
static void *begin_work(void *argument) {
    worker *self = argument;
    barrier *b = &self->ws->sync;
    pthread_mutex_lock(&b->mutex);
    while (b->threads == 0) pthread_cond_wait(&b->next_generation, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
    self->work(self->ws, self->run, self->thread, b->threads);
    return NULL;
}

/* Runs work on some threads, at most MAX_THREADS, the caller among them, or on as many as the system grants. They are
 * made for each call: a call is worth many times the tens of microseconds that this takes, and no thread is left behind
 * to spin, or to be missed in a forked child. */
static void run_threads(workspace *ws, work *work, const void *run, int64_t wanted) {
    worker workers[MAX_THREADS];
    barrier *b = &ws->sync;
    int64_t threads = 1;
    barrier_init(b);
    for (; threads < wanted; threads++) {
        worker *w = &workers[threads];
        *w = (worker){.work = work, .ws = ws, .run = run, .thread = threads};
        if (pthread_create(&w->handle, NULL, begin_work, w) != 0) break;
    }
    pthread_mutex_lock(&b->mutex);
    b->threads = threads;
    pthread_cond_broadcast(&b->next_generation);
    pthread_mutex_unlock(&b->mutex);
    work(ws, run, 0, threads);
    for (int64_t i = 1; i < threads; i++) pthread_join(workers[i].handle, NULL);
    barrier_destroy(b);
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
    int64_t T = ws->model.T, form = ws->model.form, U = 0, window = first % w->count;
    for (int64_t u = 0; u < b->U; u++) b->index_of[b->token[u]] = -1;
    for (int64_t r = 0; r < rows; r++) {
        int64_t base = window * w->stride, t = 0;
        /* A window that follows the last one shares all its tokens but one. */
        if (w->stride == 1 && r > 0 && window > 0)
            for (; t < T - 1; t++) b->index[t * rows + r] = b->index[(t + 1) * rows + r - 1];
        for (; t < T; t++) {
            int64_t token = token_at(w, base + t);
            int32_t u = b->index_of[token];
            if (u < 0) {
                u = b->index_of[token] = (int32_t)U;
                b->token[U] = (int32_t)token;
                b->wte_row[U] = token * ws->Ep;
                U++;
            }
            b->index[t * rows + r] = u;
        }
        if (w->has_target) b->target[r] = (int32_t)token_at(w, base + T);
        if (++window == w->count) window = 0;
    }
    b->rows = rows;
    b->U = U;
    b->table = form == FORM_TABLE || (form == FORM_AUTO && 4 * U <= 3 * rows);
    for (int64_t i = 0; !b->table && i < T * rows; i++) b->gathered[i] = b->wte_row[b->index[i]];
}

typedef struct {
    mlp_windows windows;
    int64_t batch_size, first_step, steps, num_steps;
    int64_t *step; /* counts every finished step */
    double learning_rate, weight_decay;
    double *losses; /* (steps) */
} train_args;

static void prepare_step(const workspace *ws, batch *b, const train_args *run, int64_t step) {
    index_windows(ws, b, &run->windows, step * run->batch_size % run->windows.count, run->batch_size);
    /* lr(s) = lr0 (1 + cos(pi s / num_steps)) / 2 */
    double lr = run->learning_rate * 0.5 * (1 + cos(3.14159265358979323846 * (double)step / (double)run->num_steps));
    b->rates.decay = (float)(1 - lr * run->weight_decay);
    b->rates.step_size = (float)(lr / (1 - pow(BETA1, (double)(step + 1))));
    b->rates.rsqrt_bias2 = (float)(1 / sqrt(1 - pow(BETA2, (double)(step + 1))));
}

/* What a forward pass over windows is for. */
typedef struct {
    mlp_windows windows;
    float *logits;             /* (count, V), or NULL: */
    const int64_t *pair_start; /* (count + 1) window i is continued by pairs pair_start[i] .. pair_start[i+1]-1 */
    const int32_t *pair_target;
    const double *pair_weight;
    double *losses; /* (count) of every window, summed over its pairs */
    int64_t workspaces, workspace_bytes; /* one for all threads, or one for each */
} forward_args;

/* ---- the floating-point code, once per instruction set ---------------------------------------------------------- */

typedef struct {
    const char *name;
    int (*supported)(void);
    work *train;   /* its argument: train_args */
    work *forward; /* forward_args */
    /* Element by element, for tests. */
    void (*tanh)(const float *, float *, int64_t);
    void (*exp)(const float *, float *, int64_t);
    void (*adamw)(const adamw_rates, float *, float *, float *, const float *, int64_t);
} instruction_set;

static share share_of(const workspace *ws, int64_t thread, int64_t threads);

/* F(name) is the name of what an instruction set has of its own. */
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define F(name) PASTE(name, ISA)
#define vec F(vec)
#define ivec F(ivec)
#define uvec F(uvec)

#define INLINE static inline __attribute__((always_inline))
#define PRAGMA(tokens) _Pragma(#tokens)
#if defined(__clang__)
#define TARGET_BEGIN(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#define UNROLL PRAGMA(clang loop unroll(full))
/* Lane l is element f(l, s) of a and b one after the other. */
#define SHUFFLE(a, b, f, s) __builtin_shufflevector(a, b, LIST(f, s))
#else
#define TARGET_BEGIN(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define TARGET_END PRAGMA(GCC pop_options)
#define UNROLL PRAGMA(GCC unroll 32)
#define SHUFFLE(a, b, f, s) __builtin_shuffle(a, b, (ivec){LIST(f, s)}) /* gcc has clang's name only since version 12 */
#endif
#define LOW(l, s) (((l) & (s)) ? W + (l) - (s) : (l))
#define HIGH(l, s) (((l) & (s)) ? W + (l) : (l) + (s))
#define BUTTERFLY(l, s) ((l) ^ (s))
/* x = f(x, x with its halves, quarters, ... exchanged): all lanes of x together, in every lane. */
#define REDUCE(x, f)                                                \
    {                                                               \
        if (W > 8) x = f(x, SHUFFLE(x, x, BUTTERFLY, 8 & (W - 1))); \
        if (W > 4) x = f(x, SHUFFLE(x, x, BUTTERFLY, 4 & (W - 1))); \
        x = f(x, SHUFFLE(x, x, BUTTERFLY, 2));                      \
        x = f(x, SHUFFLE(x, x, BUTTERFLY, 1));                      \
    }

/* f(POSITIONS, ...) for a number of positions that is a constant in it. */
#define FOR_POSITIONS(positions, f, ...)               \
    switch (positions) {                               \
    case 1: f(1, __VA_ARGS__); break;                  \
    case 2: f(2, __VA_ARGS__); break;                  \
    case 3: f(3, __VA_ARGS__); break;                  \
    default: f(MAX_POSITIONS, __VA_ARGS__); break;     \
    }
_Static_assert(MAX_POSITIONS == 4, "FOR_POSITIONS lists them");

#if defined(__x86_64__)

#define ISA v4
#define W 16
#define VMIN(a, b) _mm512_min_ps((__m512)(a), (__m512)(b))
#define VMAX(a, b) _mm512_max_ps((__m512)(a), (__m512)(b))
#define RSQRT(a) _mm512_rsqrt14_ps((__m512)(a))
/* The root, or a itself where it is 0 (class 2) or infinite (class 5). */
#define FIX_SQRT(root, a) \
    _mm512_fixupimm_ps((__m512)(root), (__m512)(a), _mm512_set1_epi32(1 << 4 * 2 | 1 << 4 * 5), 0)
#define WIDEST 3
#define ROWS 9
TARGET_BEGIN("avx512f,avx512vl,avx512dq,avx512bw,fma,avx2")
#if !defined(__clang__)
/* Before the loop of a register tile gcc would compute more addresses than there are registers, and keep them in
 * memory. */
#pragma GCC optimize("no-ivopts", "no-tree-loop-im")
#endif
#include "train_step_simd.h"
TARGET_END

#define ISA v3
#define W 8
#define VMIN(a, b) _mm256_min_ps((__m256)(a), (__m256)(b))
#define VMAX(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#define WIDEST 2
#define ROWS 6
TARGET_BEGIN("fma,avx2")
#include "train_step_simd.h"
TARGET_END

static int supported_v4(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
}
static int supported_v3(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#endif

#define ISA base
#define W 4
#if defined(__x86_64__)
#define VMIN(a, b) _mm_min_ps((__m128)(a), (__m128)(b))
#define VMAX(a, b) _mm_max_ps((__m128)(a), (__m128)(b))
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

/* The buffers of a share, from `a` on. */
static void take_buffers(const workspace *ws, arena *a, share *me) {
    me->table = take_floats(a, ws->held * ws->max_U * UNITS);
    me->w2t = take_floats(a, STRIP_BLOCKS * UNITS * UNITS);
    me->dpre = take_floats(a, ws->backward * ws->max_rows * UNITS);
    me->w1t = take_floats(a, ws->backward * UNITS * ws->Ep);
    me->tile = take_floats(a, ws->backward * MAX_ROWS * UNITS);
}

static share share_of(const workspace *ws, int64_t thread, int64_t threads) {
    share me = {.thread = thread, .threads = threads};
    arena a = {ws->scratch + thread * ws->scratch_bytes, 0};
    me.group0 = shard_begin(ws->groups, thread, threads);
    me.group1 = shard_begin(ws->groups, thread + 1, threads);
    me.block0 = shard_begin(ws->blocks, me.group0, ws->groups);
    me.block1 = shard_begin(ws->blocks, me.group1, ws->groups);
    take_buffers(ws, &a, &me);
    return me;
}

/* Groups of blocks of units: fewer where their partial sums of dwte would take more than twice the parameters'
 * memory. */
static int64_t groups_of(const mlp_model *m) {
    int64_t blocks = padded(m->H, UNITS) / UNITS, wte = m->V * padded(m->E, LANES);
    int64_t parameters = blocks * UNITS * (m->T * m->E + m->V) + wte;
    int64_t groups = min(MAX_GROUPS, max(blocks / GROUP_BLOCKS, min(blocks, FEW_GROUPS)));
    return min(groups, 2 * parameters / wte);
}

/* Lays a workspace out in memory (NULL: only measures) and returns the bytes it takes, itself included. */
static int64_t lay_out(workspace *ws, void *base, const mlp_model *m, int64_t rows, int64_t groups, int64_t threads,
                       int backward) {
    arena a = {base, 0};
    take(&a, (int64_t)sizeof(workspace));
    ws->model = *m;
    ws->Ep = padded(m->E, LANES);
    ws->Vp = padded_vocab(m->V);
    ws->blocks = padded(m->H, UNITS) / UNITS;
    ws->groups = groups;
    ws->threads = min(threads, groups);
    ws->max_rows = rows;
    ws->max_U = min(m->V, rows * m->T);
    ws->backward = backward;
    ws->held = max(1, min(min(m->T, MAX_POSITIONS), TABLE_FLOATS / (ws->max_U * UNITS)));
    ws->by_vocab = groups > 1 && groups * ws->Vp > ws->blocks * UNITS;
    int64_t parameters = ws->blocks * UNITS * (m->T * m->E + m->V) + m->V * ws->Ep;
    int64_t most = max(CHUNK_FLOATS, max(parameters, rows * ws->blocks * UNITS)); /* floats of logits */
    ws->chunk = min(rows, max(1, most / ws->Vp / LOSS_ROWS) * LOSS_ROWS);
    for (int i = 0; i < 1 + backward; i++) {
        batch *b = &ws->batches[i];
        b->rows = b->U = 0;
        b->token = take(&a, ws->max_U * 4);
        b->wte_row = take(&a, ws->max_U * 8);
        b->index_of = take(&a, m->V * 4);
        b->index = take(&a, m->T * rows * 4);
        b->gathered = take(&a, m->T * rows * 8);
        b->target = take(&a, rows * 4);
        if (base) memset(b->index_of, -1, (size_t)m->V * 4);
    }
    ws->h = take_floats(&a, ws->blocks * rows * UNITS);
    ws->logits = take_floats(&a, (ws->by_vocab ? 1 : groups) * ws->chunk * ws->Vp);
    ws->dw2 = take_floats(&a, backward && ws->chunk < rows ? ws->blocks * m->V * UNITS : 0);
    ws->db2 = take_floats(&a, backward * ws->Vp);
    ws->dwte = take_floats(&a, backward * groups * ws->max_U * ws->Ep);
    int64_t n = backward ? max(rows, ws->max_U) : rows;
    ws->row_units = take(&a, n * 8);
    ws->row_vocab = take(&a, backward * ws->chunk * 8);
    arena of_a_thread = {NULL, 0};
    take_buffers(ws, &of_a_thread, &(share){0});
    ws->scratch_bytes = of_a_thread.used;
    ws->scratch = take(&a, ws->threads * ws->scratch_bytes);
    ws->losses = take(&a, backward * padded(rows, LOSS_ROWS) / LOSS_ROWS * 8);
    if (base == NULL) return a.used;
    for (int64_t i = 0; i < n; i++) ws->row_units[i] = i * UNITS;
    for (int64_t i = 0; backward && i < ws->chunk; i++) ws->row_vocab[i] = i * ws->Vp;
    ws->p = packed_at(m, m->parameters, NULL);
    if (backward) {
        ws->exp_avg = packed_at(m, m->exp_avg, NULL);
        ws->exp_avg_sq = packed_at(m, m->exp_avg_sq, NULL);
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

/* Bytes of memory for training on batches of `rows` windows. */
EXPORT int64_t mlp_workspace_bytes(const mlp_model *model, int64_t rows, int64_t threads) {
    workspace ws;
    return lay_out(&ws, NULL, model, rows, groups_of(model), threads, 1);
}

/* Trains: `steps` steps from number *step on, of num_steps, on the windows of a tape; fewer, but at least one, where
 * the threads wait for cores that other work has.
 *
 * memory: mlp_workspace_bytes() of it, 64-byte aligned. step: the number of steps done, counted up with every step, so
 * that it always agrees with the state. losses (steps): the mean cross-entropy of every batch, before its update. */
EXPORT void mlp_train(const mlp_model *model, void *memory, const mlp_windows *tape, int64_t batch_size, int64_t *step,
                      int64_t steps, int64_t num_steps, double learning_rate, double weight_decay, int64_t threads,
                      double *losses) {
    workspace *ws = memory;
    train_args run = {*tape, batch_size, *step, steps, num_steps, step, learning_rate, weight_decay, losses};
    lay_out(ws, memory, model, batch_size, groups_of(model), threads, 1);
    prepare_step(ws, &ws->batches[*step & 1], &run, *step);
    run_threads(ws, SETS[model->isa].train, &run, ws->threads);
}

/* How threads divide a forward pass over windows: where a model is small, by windows (data parallel), each thread in a
 * workspace of its own and none waiting for another; beyond, by hidden units, as in training. */
typedef struct {
    int64_t workspaces, threads; /* one workspace, or as many as threads */
    int64_t rows, groups, bytes; /* of a workspace: windows of a pass, groups of blocks, its memory */
} forward_plan;

static forward_plan plan_forward(const mlp_model *m, int64_t count, int64_t threads) {
    workspace ws;
    int64_t Hp = padded(m->H, UNITS), widest = max(max(padded_vocab(m->V), Hp), 2 * m->T);
    forward_plan plan = {1, min(threads, MAX_GROUPS), min(FORWARD_ROWS, count), groups_of(m), 0};
    if (FORWARD_ROWS * widest <= CHUNK_FLOATS && Hp * (m->T * m->E + m->V) <= PRIVATE_WEIGHTS) {
        plan.threads = min(min(threads, MAX_THREADS), (count + PRIVATE_ROWS - 1) / PRIVATE_ROWS);
        plan.workspaces = plan.threads;
        plan.rows = min(FORWARD_ROWS, (count + plan.threads - 1) / plan.threads);
        plan.groups = 1;
    }
    plan.bytes = lay_out(&ws, NULL, m, plan.rows, plan.groups, plan.threads / plan.workspaces, 0);
    plan.threads = min(plan.threads, plan.workspaces * plan.groups);
    return plan;
}

/* Bytes of memory for a forward pass over `count` windows, at least one. */
EXPORT int64_t mlp_forward_bytes(const mlp_model *model, int64_t count, int64_t threads) {
    forward_plan plan = plan_forward(model, count, threads);
    return plan.workspaces * plan.bytes;
}

static void run_forward(const mlp_model *model, void *memory, int64_t threads, forward_args run) {
    forward_plan plan = plan_forward(model, run.windows.count, threads);
    run.workspaces = plan.workspaces;
    run.workspace_bytes = plan.bytes;
    for (int64_t i = 0; i < plan.workspaces; i++) {
        void *at = (char *)memory + i * plan.bytes;
        lay_out(at, at, model, plan.rows, plan.groups, plan.threads / plan.workspaces, 0);
    }
    run_threads(memory, SETS[model->isa].forward, &run, plan.threads);
}

/* Logits (count, V) of windows. memory: mlp_forward_bytes() of it, 64-byte aligned. */
EXPORT void mlp_logits(const mlp_model *model, void *memory, const mlp_windows *windows, int64_t threads,
                       float *logits) {
    run_forward(model, memory, threads, (forward_args){.windows = *windows, .logits = logits});
}

/* The cross-entropies of contexts and their continuations, in nats, weighted and summed by context: losses (count).
 *
 * Context i is continued by pairs pair_start[i] .. pair_start[i+1]-1; a pair is a target and a weight. */
EXPORT void mlp_losses(const mlp_model *model, void *memory, const mlp_windows *contexts, int64_t threads,
                       double *losses, const int64_t *pair_start, const int32_t *pair_target,
                       const double *pair_weight) {
    run_forward(model, memory, threads, (forward_args){.windows = *contexts, .losses = losses, .pair_start = pair_start,
                                                       .pair_target = pair_target, .pair_weight = pair_weight});
}

/* Draws `count` tokens one after another: xorshift64* uniforms, and for each the token at which the cumulative softmax
 * first exceeds it; the last token where rounding leaves the sum below.
 *
 * context (T): where to go on; overwritten with the last T tokens. state: the generator's. memory: mlp_forward_bytes()
 * of it for one window. logits (V): scratch. drawn (count). */
EXPORT void mlp_sample(const mlp_model *model, void *memory, int64_t *context, uint64_t *state, int64_t count,
                       float *logits, int64_t *drawn) {
    mlp_windows windows = {context, 8, 1, 1, 0};
    int64_t T = model->T, V = model->V;
    for (int64_t i = 0; i < count; i++) {
        mlp_logits(model, memory, &windows, 1, logits);
        uint64_t x = *state;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        *state = x;
        double uniform = (double)((uint32_t)(x * UINT64_C(0x2545F4914F6CDD1D) >> 32) >> 8) / 16777216.0;
        float max_logit = logits[0];
        for (int64_t v = 1; v < V; v++) max_logit = logits[v] > max_logit ? logits[v] : max_logit;
        double sum = 0, cumulative = 0; /* softmax, and its running sum */
        for (int64_t v = 0; v < V; v++) sum += logits[v] = expf(logits[v] - max_logit);
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
EXPORT void mlp_adamw(int64_t isa, double decay, double step_size, double sqrt_bias2, float *p, float *exp_avg,
                      float *exp_avg_sq, const float *g, int64_t n) {
    adamw_rates rates = {(float)decay, (float)step_size, (float)(1 / sqrt_bias2)};
    SETS[isa].adamw(rates, p, exp_avg, exp_avg_sq, g, n);
}
