/* The floating-point code of train_step.c, for one instruction set.
 *
 * ISA             suffix of all names
 * W               floats in a vector
 * ROWS, WIDEST    rows and vectors of a register tile, at most: as many sums as the registers hold
 * VMIN, VMAX      the instructions for a < b ? a : b and a > b ? a : b, where C has a name for them
 * RSQRT           1 / sqrt(a) to 14 bits, where that and a step of Newton's are faster than a square root
 * FIX_SQRT        puts such a root right where a is 0 or infinite
 *
 * Two products do all the work, with B's rows as vectors and A's elements broadcast. `rows` lists where A's rows
 * begin, so that a row can be a token's embedding:
 *
 *     gemm_rows   C[r, :] = sum_k A[rows[r] + k] B[k, :]     tables, logits, dh, dwte
 *     gemm_cols   C[r, :] = sum_k A[rows[k] + r] B[k, :]     dW2, dW1
 *
 * Long sums are cut into strips that are summed by themselves: rounding errors grow with the strip, not with the sum.
 */

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef float F(mem) __attribute__((vector_size(4 * W), aligned(4), may_alias));

INLINE vec F(load)(const float *p) { return *(const F(mem) *)p; }
INLINE void F(store)(float *p, vec x) { *(F(mem) *)p = x; }
INLINE vec F(broadcast)(float x) { return x - (vec){0}; }
INLINE vec F(select)(ivec which, vec yes, vec no) {
    return (vec)((which & (ivec)yes) | (~which & (ivec)no));
}

/* a < b ? a : b: b where one is NaN. */
INLINE vec F(min)(vec a, vec b) {
#ifdef VMIN
    return (vec)VMIN(a, b);
#else
    return F(select)(a < b, a, b);
#endif
}

/* a > b ? a : b: b where one is NaN. */
INLINE vec F(max)(vec a, vec b) {
#ifdef VMAX
    return (vec)VMAX(a, b);
#else
    return F(select)(a > b, a, b);
#endif
}

/* f(lane, s) for every lane. */
#if W == 16
#define LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s), f(8, s), f(9, s), \
                   f(10, s), f(11, s), f(12, s), f(13, s), f(14, s), f(15, s)
#elif W == 8
#define LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s), f(4, s), f(5, s), f(6, s), f(7, s)
#else
#define LIST(f, s) f(0, s), f(1, s), f(2, s), f(3, s)
#endif

INLINE vec F(add)(vec a, vec b) { return a + b; }

/* The sum of all lanes, in every lane. */
INLINE vec F(reduce_sum)(vec x) {
    REDUCE(x, F(add))
    return x;
}

/* The maximum of all lanes, in every lane; where one is NaN, anything. */
INLINE vec F(reduce_max)(vec x) {
    REDUCE(x, F(max))
    return x;
}

/* x = tanh x for two vectors, x P(x^2) / Q(x^2), of relative error 3.5e-8 on |x| <= 9.02, beyond which tanh rounds to
 * 1. The coefficients were fitted to pre-activations of a run, one after another rounded to fp32 and the others fitted
 * anew, so that the mean error, which would shift all of h, is below 0.01 ulp. All are positive: no cancellation, and
 * tiny x keep their relative accuracy. The two share a division, 1 / (Q0 Q1), which would take as long as everything
 * else. NaN stays NaN, and spreads to the other vector: both belong to the same window, whose logits are NaN in any
 * case. */
INLINE void F(tanh)(vec *x) {
    const vec end = F(broadcast)(9.02f), one = F(broadcast)(1.0f);
    vec xp[2], q[2];
    UNROLL for (int i = 0; i < 2; i++) {
        vec c = F(max)(-end, F(min)(end, x[i])), y = c * c;
        xp[i] = c * ((((1.405279093091849e-08f * y + 2.114020571752917e-05f) * y + 3.5290291998535395e-03f) * y +
                      1.3409551978111267e-01f) * y + 1.0f);
        q[i] = (((8.070361445788876e-07f * y + 3.3395117498002946e-04f) * y + 2.6005366817116737e-02f) * y +
                4.674288332462311e-01f) * y + 1.0f;
    }
    vec r = 1.0f / (q[0] * q[1]);
    UNROLL for (int i = 0; i < 2; i++) x[i] = F(max)(-one, F(min)(one, xp[i] * (q[1 - i] * r)));
}

/* y = tanh x, element by element, n a multiple of UNITS; y may be x. */
static void F(tanh_array)(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += 2 * W) {
        vec t[2] = {F(load)(x + i), F(load)(x + i + W)};
        F(tanh)(t);
        F(store)(y + i, t[0]);
        F(store)(y + i + W, t[1]);
    }
}

/* exp x for x <= 88: 2^n e^r with |r| <= ln 2 / 2, e^r = 1 + r + r^2 q(r), q a minimax fit of relative error 3e-9.
 * Below -87, where floats are about to lose digits, it is 0. NaN stays NaN. */
INLINE vec F(exp)(vec x) {
    const vec magic = F(broadcast)(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, left in the low bits */
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact in a product with n */
    vec q = (((1.3814467238262296e-03f * r + 8.368780836462975e-03f) * r + 4.166839271783829e-02f) * r +
             1.666651964187622e-01f) * r + 4.999999403953552e-01f;
    vec e = (r * r) * q + r + 1.0f;
    e = (vec)((uvec)e + ((uvec)shifted << 23));
    return F(select)(x < F(broadcast)(-87.0f), F(broadcast)(0.0f), e);
}

/* Square roots; those from RSQRT are right to a rounding or two, of subnormal numbers to 14 bits. */
INLINE vec F(sqrt)(vec x) {
#ifdef RSQRT
    vec y = (vec)RSQRT(x), root = x * y;
    root += (x - root * root) * (0.5f * y);
    return (vec)FIX_SQRT(root, x);
#else
    vec root = x;
    UNROLL for (int i = 0; i < W; i++) root[i] = __builtin_sqrtf(x[i]);
    return root;
#endif
}

/* ---- products -------------------------------------------------------------------------------------------------- */

/* One register tile of R rows and N vectors of a product; they and COLS are constants where this is inlined. */
INLINE void F(gemm_tile)(const int R, const int N, const int COLS, const float *A, const int64_t *rows, int64_t K,
                         const float *B, int64_t ldb, float *C, int64_t ldc, int accumulate, const float *h,
                         int64_t parts, int64_t a_step) {
    vec c[ROWS][WIDEST];
    const float *a[ROWS];
    UNROLL for (int r = 0; r < R; r++) {
        if (!COLS) a[r] = A + rows[r];
        UNROLL for (int j = 0; j < N; j++) c[r][j] = (vec){0};
    }
    for (;;) {
        for (int64_t k = 0; k < K; k++) {
            const float *ak = COLS ? A + rows[k] : NULL;
            vec b[WIDEST];
            UNROLL for (int j = 0; j < N; j++) b[j] = F(load)(B + k * ldb + j * W);
            /* C[r, :] += A[rows[r] + k] B[k, :], or A[rows[k] + r] B[k, :] */
            UNROLL for (int r = 0; r < R; r++) {
                vec x = F(broadcast)(COLS ? ak[r] : a[r][k]);
                UNROLL for (int j = 0; j < N; j++) c[r][j] += x * b[j];
            }
        }
        if (COLS || --parts <= 0) break;
        UNROLL for (int r = 0; r < R; r++) a[r] += a_step;
        B += K * ldb;
    }
    if (accumulate)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < N; j++) c[r][j] += F(load)(C + r * ldc + j * W);
    if (!COLS && h)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < N; j++) {
                vec x = F(load)(h + r * ldc + j * W);
                /* C = C (1 - h^2) */
                c[r][j] *= 1.0f - x * x;
            }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < N; j++) F(store)(C + r * ldc + j * W, c[r][j]);
}

#define CASE(R)                                                                                            \
    case R:                                                                                                \
        if (R <= ROWS)                                                                                     \
            F(gemm_tile)(R <= ROWS ? R : 1, N, COLS, A, rows, K, B, ldb, C, ldc, accumulate, h, parts, a_step); \
        return;
#define TILES(name, N_, COLS_)                                                                                   \
    static __attribute__((noinline)) void F(name)(int64_t R, const float *A, const int64_t *rows, int64_t K,    \
                                                  const float *B, int64_t ldb, float *C, int64_t ldc,           \
                                                  int accumulate, const float *h, int64_t parts, int64_t a_step) { \
        enum { N = N_, COLS = COLS_ };                                                                           \
        switch (R) {                                                                                             \
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9)                              \
        }                                                                                                        \
    }
_Static_assert(ROWS <= 9 && ROWS <= MAX_ROWS, "TILES lists them, and scratch.tile holds them");
_Static_assert(LANES % W == 0 && UNITS % (2 * W) == 0, "no vector is cut");
TILES(rows_1, 1, 0)
TILES(rows_2, 2, 0)
TILES(rows_widest, WIDEST, 0) /* unused where WIDEST is 2 */
TILES(cols_2, 2, 1)
#undef TILES
#undef CASE

/* Tiles of at most ROWS rows, as equal as can be, that n rows are cut into. */
INLINE int64_t F(tiles)(int64_t n) { return (n + ROWS - 1) / ROWS; }

static void F(gemm_rows)(const product p) {
    int64_t tiles = F(tiles)(p.n), least = p.n / tiles, more = p.n % tiles, vectors = p.width / W, N;
    for (int64_t j = 0; j < vectors; j += N) {
        int64_t left = vectors - j;
        N = min(2, left);
        if (WIDEST > 2 && (left == 3 || left >= 5)) N = 3;
        for (int64_t i = 0, r = 0, R; i < tiles; i++, r += R) {
            R = least + (i < more);
            int64_t at = r * p.ldc + j * W;
            (N == 1 ? F(rows_1) : WIDEST > 2 && N == WIDEST ? F(rows_widest) : F(rows_2))(
                R, p.A, p.rows + r, p.K, p.B + j * W, p.ldb, p.C + at, p.ldc, p.accumulate, p.h ? p.h + at : NULL,
                p.parts, p.a_step);
        }
    }
}

/* Only rows r0 .. r1-1 of a product. */
static void F(gemm_some_rows)(product p, int64_t r0, int64_t r1) {
    if (r0 == r1) return;
    p.n = r1 - r0;
    p.rows += r0;
    p.C += r0 * p.ldc;
    if (p.h) p.h += r0 * p.ldc;
    F(gemm_rows)(p);
}

/* C (R, UNITS) = A^T B, one tile of rows. */
static void F(gemm_cols)(int64_t R, const float *A, const int64_t *rows, int64_t K, const float *B, float *C) {
    for (int64_t j = 0; j < UNITS; j += 2 * W)
        for (int64_t k = 0; k < K; k += STRIP)
            F(cols_2)(R, A, rows + k, min(STRIP, K - k), B + k * UNITS + j, UNITS, C + j, UNITS, k > 0, NULL, 1, 0);
}

/* The sum of the rows of x (n, W), ld floats apart. */
INLINE vec F(sum_rows)(const float *x, int64_t n, int64_t ld) {
    vec sum = {0};
    for (int64_t first = 0; first < n; first += 16) {
        vec part = {0};
        for (int64_t r = first; r < min(n, first + 16); r++) part += F(load)(x + r * ld);
        sum += part;
    }
    return sum;
}

/* to[c, r] = from[r, c]: `from` (n, UNITS) with n padded by zeros to a multiple of LANES; `to` (UNITS, ld). */
static void F(transpose)(const float *from, int64_t n, float *to, int64_t ld) {
    for (int64_t r = 0; r < n; r += W)
        for (int64_t c = 0; c < UNITS; c += W) {
            vec x[W];
            UNROLL for (int i = 0; i < W; i++) x[i] = r + i < n ? F(load)(from + (r + i) * UNITS + c) : (vec){0};
            /* Swap bit s of the row with bit s of the column, for every s. */
#define STAGE(s)                                                  \
    UNROLL for (int i = 0; i < W; i++) if (!(i & (s))) {          \
        vec low = SHUFFLE(x[i], x[i + (s)], LOW, s);              \
        vec high = SHUFFLE(x[i], x[i + (s)], HIGH, s);            \
        x[i] = low;                                               \
        x[i + (s)] = high;                                        \
    }
#if W >= 16
            STAGE(8)
#endif
#if W >= 8
            STAGE(4)
#endif
            STAGE(2)
            STAGE(1)
#undef STAGE
            UNROLL for (int i = 0; i < W; i++) F(store)(to + (c + i) * ld + r, x[i]);
        }
    for (int64_t r = (n + W - 1) / W * W; r % LANES != 0; r += W)
        for (int64_t c = 0; c < UNITS; c++) F(store)(to + c * ld + r, (vec){0});
}

/* ---- AdamW ----------------------------------------------------------------------------------------------------- */

/* x, rounded: no compiler joins the operation that made it with the one that uses it. The empty instruction says that
 * it may change x, so x must be in a register, as a float, before it. */
INLINE vec F(rounded)(vec x) {
#if defined(__x86_64__)
    __asm__("" : "+v"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#else
    __asm__("" : "+m"(x));
#endif
    return x;
}

/* Loshchilov and Hutter 2019, in the order of torch.optim.AdamW:
 *
 *     m = m + (g - m) (1 - beta1);  v = v beta2 + (1 - beta2) g^2
 *     p = p (1 - lr wd) - lr / (1 - beta1^s) m / (sqrt(v) / sqrt(1 - beta2^s) + eps)
 *
 * p * decay is a result of its own: decay is 1 - 7e-8, in fp32 one unit in the last place below 1, so rounding the
 * product takes one whole unit off p, and that is the weight decay. fma(p, decay, -update) would leave the rounding
 * out, and decay p by less (docs/numerics.md). */
INLINE void F(adamw_vector)(const adamw_rates rates, float *p, float *exp_avg, float *exp_avg_sq, vec g) {
    vec p0 = F(load)(p), m = F(load)(exp_avg), v = F(load)(exp_avg_sq);
    /* m = m + (g - m) (1 - beta1);  v = v beta2 + (1 - beta2) g^2 */
    m += (g - m) * (float)(1 - BETA1);
    v = F(rounded)(v * (float)BETA2) + (float)(1 - BETA2) * g * g;
    /* p = p decay - step_size m / (sqrt(v) / sqrt(1 - beta2^s) + eps) */
    vec sqrt_v = F(sqrt)(v);
    F(store)(exp_avg, m);
    F(store)(exp_avg_sq, v);
    F(store)(p, F(rounded)(p0 * rates.decay) - rates.step_size * m / (sqrt_v * rates.rsqrt_bias2 + EPS));
}

/* AdamW on n numbers, a multiple of LANES. */
static void F(adamw)(const adamw_rates rates, float *p, float *exp_avg, float *exp_avg_sq, const float *g, int64_t n) {
    for (int64_t i = 0; i < n; i += W)
        F(adamw_vector)(rates, p + i, exp_avg + i, exp_avg_sq + i, F(load)(g + i));
}

/* ---- forward --------------------------------------------------------------------------------------------------- */

/* h[r] = b1 + sum_t P[t, index[t, r]] over the next POSITIONS tables; h itself in place of b1 where that is NULL, and
 * tanh of it all after the last. */
INLINE void F(add_rows)(const int POSITIONS, const float *table, int64_t n, int64_t U, const int32_t *index,
                        const float *b1, float *h, int last) {
    for (int64_t r = 0; r < n; r++, h += UNITS) {
        vec x[UNITS / W];
        UNROLL for (int j = 0; j < UNITS / W; j++) x[j] = F(load)((b1 ? b1 : h) + j * W);
        UNROLL for (int t = 0; t < POSITIONS; t++) {
            const float *row = table + (t * U + index[t * n + r]) * UNITS;
            UNROLL for (int j = 0; j < UNITS / W; j++) x[j] += F(load)(row + j * W);
        }
        if (last) UNROLL for (int j = 0; j < UNITS / W; j += 2) F(tanh)(x + j);
        UNROLL for (int j = 0; j < UNITS / W; j++) F(store)(h + j * W, x[j]);
    }
}

/* h of a thread's blocks of units, for all windows of the batch. */
static void F(forward_hidden)(const workspace *ws, const share *me, const batch *b) {
    int64_t T = ws->model.T, E = ws->model.E, n = b->rows, U = b->U;
    int64_t held = ws->held;
    for (int64_t block = me->block0; block < me->block1; block++) {
        const float *w1 = ws->p.w1 + block * T * E * UNITS, *b1 = ws->p.b1 + block * UNITS;
        float *h = ws->h + block * ws->max_rows * UNITS;
        if (b->table) {
            /* P[t] = wte W1[:, t]^T   (U, UNITS);   h = tanh(b1 + sum_t P[t, index[t]]) */
            for (int64_t t0 = 0; t0 < T; t0 += held) {
                int64_t positions = min(held, T - t0);
                for (int64_t t = 0; t < positions; t++)
                    F(gemm_rows)((product){.n = U, .width = UNITS, .A = ws->p.wte, .rows = b->wte_row, .K = E,
                                           .B = w1 + (t0 + t) * E * UNITS, .ldb = UNITS,
                                           .C = me->table + t * U * UNITS, .ldc = UNITS});
                FOR_POSITIONS(positions, F(add_rows), me->table, n, U, b->index + t0 * n, t0 == 0 ? b1 : NULL, h,
                          t0 + held >= T)
            }
        } else {
            /* h = tanh(b1 + sum_t wte[x_t] W1[:, t]^T)   (n, UNITS) */
            for (int64_t r = 0; r < n; r++) memcpy(h + r * UNITS, b1, UNITS * sizeof(float));
            for (int64_t t = 0; t < T; t++)
                F(gemm_rows)((product){.n = n, .width = UNITS, .A = ws->p.wte, .rows = b->gathered + t * n,
                                       .K = E, .B = w1 + t * E * UNITS, .ldb = UNITS, .C = h, .ldc = UNITS,
                                       .accumulate = 1});
            F(tanh_array)(h, h, n * UNITS);
        }
    }
}

/* to += from along edges of the reduction tree, for partial sums of so many floats, `stride` floats apart. */
static void F(reduce_edges)(const edges *p, float *parts, int64_t stride, int64_t floats) {
    for (int64_t i = 0; i < p->n; i++) {
        float *to = parts + p->to[i] * stride, *from = parts + p->from[i] * stride;
        for (int64_t j = 0; j < floats; j += W) F(store)(to + j, F(load)(to + j) + F(load)(from + j));
    }
}

/* The sum over all groups, given the edges ACROSS threads. */
INLINE vec F(reduce_across)(const edges *p, float *parts, int64_t stride) {
    for (int64_t i = 0; i < p->n - 1; i++) {
        float *to = parts + p->to[i] * stride;
        F(store)(to, F(load)(to) + F(load)(parts + p->from[i] * stride));
    }
    vec sum = F(load)(parts);
    return p->n > 0 ? sum + F(load)(parts + p->from[p->n - 1] * stride) : sum;
}

/* The logits without b2 of windows first .. first+n-1: of all tokens and this thread's groups, a partial sum each,
 * added within this thread; or of this thread's tokens and all units. Returns the barrier's generation for await().
 *
 * Of partial sums, rows r0 .. r1-1, which this thread adds up itself, come last: no other waits for them. */
static int F(partial_logits)(workspace *ws, const share *me, int64_t first, int64_t n, int64_t r0, int64_t r1) {
    int64_t V = ws->model.V, Vp = ws->Vp, tiles = (Vp + UNITS - 1) / UNITS, groups = ws->by_vocab ? 1 : ws->groups;
    int64_t tile0 = ws->by_vocab ? shard_begin(tiles, me->thread, me->threads) : 0;
    int64_t tile1 = ws->by_vocab ? shard_begin(tiles, me->thread + 1, me->threads) : tiles;
    int64_t group0 = ws->by_vocab ? 0 : me->group0, group1 = ws->by_vocab ? 1 : me->group1;
    int64_t stride = ws->chunk * Vp;
    const edges within = edges_of(groups, me->threads, me->thread);
    int generation = 0;
    for (int64_t group = group0; group < group1; group++)
        for (int64_t v = tile0 * UNITS; v < min(Vp, tile1 * UNITS); v += UNITS) {
            int64_t block0 = shard_begin(ws->blocks, group, groups);
            int64_t block1 = shard_begin(ws->blocks, group + 1, groups);
            for (int64_t block = block0; block < block1; block += STRIP_BLOCKS) {
                int64_t width = min(UNITS, Vp - v), blocks = min(STRIP_BLOCKS, block1 - block);
                if (V - v < width) memset(me->w2t, 0, (size_t)(blocks * UNITS * UNITS) * sizeof(float));
                for (int64_t i = 0; i < blocks; i++)
                    F(transpose)(ws->p.w2 + ((block + i) * V + v) * UNITS, max(0, min(UNITS, V - v)),
                                 me->w2t + i * UNITS * UNITS, UNITS);
                /* logits[:, v:] += h[:, block] W2[v:, block]^T   (n, width) */
                product p = {.width = width, .A = ws->h + (block * ws->max_rows + first) * UNITS,
                             .rows = ws->row_units, .parts = blocks, .a_step = ws->max_rows * UNITS, .K = UNITS,
                             .B = me->w2t, .ldb = UNITS, .C = ws->logits + group * stride + v, .ldc = Vp,
                             .accumulate = block > block0};
                F(gemm_some_rows)(p, 0, r0);
                F(gemm_some_rows)(p, r1, n);
                int last = group == group1 - 1 && v + UNITS >= Vp && block + STRIP_BLOCKS >= block1;
                if (last && !ws->by_vocab) {
                    F(reduce_edges)(&within, ws->logits, stride, r0 * Vp);
                    F(reduce_edges)(&within, ws->logits + r1 * Vp, stride, (n - r1) * Vp);
                    generation = arrive(&ws->sync, me->threads);
                }
                F(gemm_some_rows)(p, r0, r1);
            }
        }
    if (ws->by_vocab) return arrive(&ws->sync, me->threads);
    F(reduce_edges)(&within, ws->logits + r0 * Vp, stride, (r1 - r0) * Vp);
    return generation;
}

/* logits[r] = b2 + the sum of the groups' partial logits; returns their maximum, in every lane. */
INLINE vec F(reduce_row)(const workspace *ws, float *row, const edges *across) {
    vec max_logit = F(broadcast)(-INFINITY);
    for (int64_t v = 0; v < ws->Vp; v += W) {
        vec x = F(reduce_across)(across, row + v, ws->chunk * ws->Vp) + F(load)(ws->p.b2 + v);
        F(store)(row + v, x);
        max_logit = F(max)(max_logit, x);
    }
    return F(reduce_max)(max_logit);
}

/* row = exp(row - max_logit); returns the sum over all tokens but one, in every lane. */
INLINE vec F(exp_row)(float *row, int64_t Vp, vec max_logit, int32_t but) {
    ivec lane = {0};
    UNROLL for (int i = 0; i < W; i++) lane[i] = i - but;
    vec sum = {0};
    for (int64_t v = 0; v < Vp; v += W) {
        vec e = F(exp)(F(load)(row + v) - max_logit);
        F(store)(row + v, e);
        sum += F(select)(lane == 0, (vec){0}, e);
        lane += W;
    }
    return F(reduce_sum)(sum);
}

/* Partial logits to dlogits, for rows r0 .. r1-1 of the chunk that begins at window `first`; losses to ws->losses.
 *
 * With s the sum of exponentials, e that of the target, and o = s - e summed by itself, the target's dlogits is -o / s
 * rather than e / s - 1, and the loss uses e + o in float64: a model that is nearly sure keeps its digits. */
static void F(softmax_rows)(const workspace *ws, const batch *b, const edges *across, int64_t first, int64_t r0,
                            int64_t r1) {
    double loss = 0, sums = 1;
    for (int64_t r = r0; r < r1; r++) {
        float *row = ws->logits + r * ws->Vp;
        int32_t target = b->target[first + r];
        for (int64_t i = 0; i < across->n && r + AHEAD < r1; i++) /* from the other cores' caches */
            for (int64_t v = 0; v < ws->Vp; v += LANES)
                __builtin_prefetch(ws->logits + (across->from[i] * ws->chunk + r + AHEAD) * ws->Vp + v);
        vec max_logit = F(reduce_row)(ws, row, across);
        float at_target = row[target], others = F(exp_row)(row, ws->Vp, max_logit, target)[0];
        /* softmax = exp(logits - max) / sum;  dlogits = (softmax - onehot) / B */
        double sum = (double)others + (double)row[target];
        float factor = (float)(1 / (sum * (double)b->rows));
        for (int64_t v = 0; v < ws->Vp; v += W) F(store)(row + v, F(load)(row + v) * factor);
        row[target] = -others * factor;
        /* The logarithm of a product in place of a sum of logarithms; 1 <= sum <= 2^31, so 32 factors fit a double. */
        loss += (double)max_logit[0] - (double)at_target; /* loss = max - logits[target] + log(sum) */
        sums *= sum;
        if (r % LOSS_ROWS == LOSS_ROWS - 1 || r == r1 - 1) {
            ws->losses[(first + r) / LOSS_ROWS] = loss + log(sums);
            loss = 0, sums = 1;
        }
    }
}
_Static_assert(LOSS_ROWS <= 32, "see the product of sums");

/* ---- backward -------------------------------------------------------------------------------------------------- */

/* dpre = (dlogits @ W2) (1 - h^2) of windows first+r0 .. first+r1-1 in a block of units, to me->dpre from row `first`
 * on. */
static void F(backward_hidden)(const workspace *ws, const share *me, int64_t block, int64_t first, int64_t r0,
                               int64_t r1) {
    int64_t V = ws->model.V;
    for (int64_t v = 0; v < V; v += STRIP)
        F(gemm_some_rows)((product){.width = UNITS, .A = ws->logits + v, .rows = ws->row_vocab,
                                    .K = min(STRIP, V - v), .B = ws->p.w2 + (block * V + v) * UNITS,
                                    .ldb = UNITS, .C = me->dpre + first * UNITS, .ldc = UNITS, .accumulate = v > 0,
                                    .h = v + STRIP < V ? NULL : ws->h + (block * ws->max_rows + first) * UNITS},
                          r0, r1);
}

/* dW2 = dlogits^T @ h of a block from windows first .. first+n-1: straight into AdamW, or added to ws->dw2. */
static void F(backward_w2)(const workspace *ws, const share *me, const batch *b, int64_t block, int64_t first,
                           int64_t n, int add) {
    int64_t V = ws->model.V, tiles = F(tiles)(V);
    const float *h = ws->h + (block * ws->max_rows + first) * UNITS;
    for (int64_t i = 0; i < tiles; i++) {
        int64_t v = i * V / tiles, R = (i + 1) * V / tiles - v, at = (block * V + v) * UNITS;
        F(gemm_cols)(R, ws->logits + v, ws->row_vocab, n, h, me->tile);
        if (!add) {
            F(adamw)(b->rates, ws->p.w2 + at, ws->exp_avg.w2 + at, ws->exp_avg_sq.w2 + at, me->tile, R * UNITS);
            continue;
        }
        for (int64_t j = 0; j < R * UNITS; j += W) {
            vec x = F(load)(me->tile + j);
            F(store)(ws->dw2 + at + j, first > 0 ? F(load)(ws->dw2 + at + j) + x : x);
        }
    }
}

/* dP[t, u] = sum of dpre[r] over the windows r with index[t, r] = u, in their order, for the next POSITIONS positions
 * t. Several at a time, since a row must wait for the last one of the same token. */
INLINE void F(sum_by_token)(const int POSITIONS, const float *dpre, int64_t n, int64_t U, const int32_t *index,
                            float *to) {
    memset(to, 0, (size_t)(POSITIONS * U * UNITS) * sizeof(float));
    for (int64_t r = 0; r < n; r++) {
        vec x[UNITS / W];
        UNROLL for (int j = 0; j < UNITS / W; j++) x[j] = F(load)(dpre + r * UNITS + j * W);
        UNROLL for (int t = 0; t < POSITIONS; t++) {
            float *sum = to + (t * U + index[t * n + r]) * UNITS;
            UNROLL for (int j = 0; j < UNITS / W; j++) F(store)(sum + j * W, F(load)(sum + j * W) + x[j]);
        }
    }
}

/* From dpre (rows, UNITS) of a block: db1 = sum_r dpre[r] and dW1[:, t] = dP[t]^T @ wte into AdamW; dP[t] @ W1[:, t]
 * added to its group's partial sum of dwte. */
static void F(backward_input)(const workspace *ws, const share *me, const batch *b, const float *dpre,
                              int64_t block) {
    float *dwte = ws->dwte + shard_of(ws->blocks, block, ws->groups) * ws->max_U * ws->Ep;
    int64_t T = ws->model.T, E = ws->model.E, Ep = ws->Ep, n = b->rows, U = b->U, tiles = F(tiles)(E);
    int64_t held = ws->held;
    for (int64_t t = 0; t < T; t++) {
        int64_t w1 = (block * T + t) * E * UNITS;
        const int32_t *index = b->index + t * n;
        float *dtable = me->table + t % held * U * UNITS;
        if (b->table && t % held == 0) FOR_POSITIONS(min(held, T - t), F(sum_by_token), dpre, n, U, index, me->table)
        if (t == 0) UNROLL for (int j = 0; j < UNITS; j += W) {
            int64_t at = block * UNITS + j;
            /* db1 = sum_r dpre[r] = sum_u dP[0, u], for every window has one token at t = 0 */
            vec db1 = b->table ? F(sum_rows)(dtable + j, U, UNITS) : F(sum_rows)(dpre + j, n, UNITS);
            F(adamw_vector)(b->rates, ws->p.b1 + at, ws->exp_avg.b1 + at, ws->exp_avg_sq.b1 + at, db1);
        }
        F(transpose)(ws->p.w1 + w1, E, me->w1t, Ep);
        /* dwte[u] += dP[t, u] W1[:, t], or dwte[index[t, r]] += dpre[r] W1[:, t]   (U, Ep) */
        if (b->table) {
            F(gemm_rows)((product){.n = U, .width = Ep, .A = dtable, .rows = ws->row_units, .K = UNITS,
                                   .B = me->w1t, .ldb = Ep, .C = dwte, .ldc = Ep, .accumulate = 1});
        } else {
            int64_t parts = F(tiles)(n);
            for (int64_t e = 0; e < Ep; e += UNITS)
                for (int64_t i = 0; i < parts; i++) {
                    int64_t r0 = i * n / parts, r1 = (i + 1) * n / parts, width = min(UNITS, Ep - e);
                    F(gemm_rows)((product){.n = r1 - r0, .width = width, .A = dpre, .rows = ws->row_units + r0,
                                           .K = UNITS, .B = me->w1t + e, .ldb = Ep, .C = me->tile, .ldc = UNITS});
                    for (int64_t r = r0; r < r1; r++)
                        for (int64_t j = 0; j < width; j += W) {
                            float *to = dwte + index[r] * Ep + e + j;
                            F(store)(to, F(load)(to) + F(load)(me->tile + (r - r0) * UNITS + j));
                        }
                }
        }
        for (int64_t i = 0; i < tiles; i++) {
            int64_t e = i * E / tiles, R = (i + 1) * E / tiles - e, at = w1 + e * UNITS;
            /* dW1[:, t] = dP[t]^T wte, or dpre^T wte[x_t]; kept transposed, (E, UNITS) */
            if (b->table) F(gemm_cols)(R, ws->p.wte + e, b->wte_row, U, dtable, me->tile);
            else F(gemm_cols)(R, ws->p.wte + e, b->gathered + t * n, n, dpre, me->tile);
            F(adamw)(b->rates, ws->p.w1 + at, ws->exp_avg.w1 + at, ws->exp_avg_sq.w1 + at, me->tile, R * UNITS);
        }
    }
}

/* AdamW on a thread's rows of wte. A token that the batch lacks has gradient 0, but decays and moves on all the
 * same. */
static void F(update_wte)(const workspace *ws, const share *me, const batch *b, const edges *across) {
    int64_t V = ws->model.V, Ep = ws->Ep, last = shard_begin(V, me->thread + 1, me->threads);
    for (int64_t v = shard_begin(V, me->thread, me->threads); v < last; v++) {
        int32_t u = b->index_of[v];
        for (int64_t j = 0; j < Ep; j += W) {
            vec g = u < 0 ? (vec){0} : F(reduce_across)(across, ws->dwte + u * Ep + j, ws->max_U * Ep);
            int64_t at = v * Ep + j;
            F(adamw_vector)(b->rates, ws->p.wte + at, ws->exp_avg.wte + at, ws->exp_avg_sq.wte + at, g);
        }
    }
}

/* ---- a thread's work ------------------------------------------------------------------------------------------- */

static void F(train)(workspace *ws, const void *argument, int64_t thread, int64_t threads) {
    const train_args *run = argument;
    const share me = share_of(ws, thread, threads);
    const int64_t B = run->batch_size, V = ws->model.V, Vp = ws->Vp, Ep = ws->Ep;
    const int64_t groups = ws->groups, dwte_floats = ws->max_U * Ep;
    const edges within = edges_of(groups, threads, thread), across = edges_of(groups, threads, ACROSS);
    const edges across_logits = edges_of(ws->by_vocab ? 1 : groups, threads, ACROSS);
    const int cut = ws->chunk < B;
    for (int64_t i = 0; i < run->steps; i++) {
        const int64_t step = run->first_step + i;
        const batch *b = &ws->batches[step & 1];
        F(forward_hidden)(ws, &me, b);
        if (ws->by_vocab) barrier_wait(&ws->sync, threads);
        for (int64_t group = me.group0; group < me.group1; group++)
            memset(ws->dwte + group * dwte_floats, 0, (size_t)(b->U * Ep) * sizeof(float));
        for (int64_t first = 0; first < B; first += ws->chunk) {
            int64_t n = min(ws->chunk, B - first);
            int64_t r0 = first_row(n, thread, threads), r1 = first_row(n, thread + 1, threads);
            await(&ws->sync, F(partial_logits)(ws, &me, first, n, r0, r1));
            F(softmax_rows)(ws, b, &across_logits, first, r0, r1);
            int generation = arrive(&ws->sync, threads);
            F(backward_hidden)(ws, &me, me.block0, first, r0, r1);
            await(&ws->sync, generation); /* for the rows of the others */
            F(backward_hidden)(ws, &me, me.block0, first, 0, r0);
            F(backward_hidden)(ws, &me, me.block0, first, r1, n);
            for (int64_t block = me.block0; block < me.block1; block++) {
                if (block > me.block0) F(backward_hidden)(ws, &me, block, first, 0, n);
                F(backward_w2)(ws, &me, b, block, first, n, cut);
                if (cut) /* h of these windows is not needed any more */
                    memcpy(ws->h + (block * ws->max_rows + first) * UNITS, me.dpre + first * UNITS,
                           (size_t)(n * UNITS) * sizeof(float));
                else F(backward_input)(ws, &me, b, me.dpre, block);
            }
            for (int64_t v = 0; thread == threads - 1 && v < Vp; v += W) {
                /* db2 = sum_b dlogits[b] */
                vec db2 = F(sum_rows)(ws->logits + v, n, Vp);
                F(store)(ws->db2 + v, first > 0 ? F(load)(ws->db2 + v) + db2 : db2);
            }
            if (first + n < B) barrier_wait(&ws->sync, threads); /* for the logits of the next chunk */
        }
        for (int64_t block = me.block0; cut && block < me.block1; block++) {
            int64_t at = block * V * UNITS;
            F(adamw)(b->rates, ws->p.w2 + at, ws->exp_avg.w2 + at, ws->exp_avg_sq.w2 + at, ws->dw2 + at, V * UNITS);
            F(backward_input)(ws, &me, b, ws->h + block * ws->max_rows * UNITS, block);
        }
        F(reduce_edges)(&within, ws->dwte, dwte_floats, b->U * Ep);
        int generation = arrive(&ws->sync, threads);
        if (thread == threads - 1) {
            F(adamw)(b->rates, ws->p.b2, ws->exp_avg.b2, ws->exp_avg_sq.b2, ws->db2, Vp);
            /* A decay factor of 0 or less, which is allowed, makes them NaN or +inf. */
            for (int64_t v = V; v < Vp; v++) ws->p.b2[v] = -INFINITY;
        }
        /* In place of the batch of the step before this one, which all have done with. */
        if (thread == 0 && i + 1 < run->steps) prepare_step(ws, &ws->batches[(step + 1) & 1], run, step + 1);
        await(&ws->sync, generation);
        F(update_wte)(ws, &me, b, &across);
        if (thread == 0) {
            double loss = 0;
            for (int64_t r = 0; r < B; r += LOSS_ROWS) loss += ws->losses[r / LOSS_ROWS];
            run->losses[i] = loss / (double)B;
            *run->step = step + 1;
            int64_t lost = atomic_load_explicit(&ws->sync.lost, memory_order_relaxed);
            ws->oversubscribed = lost > OVERSUBSCRIBED_NANOSECONDS;
        }
        barrier_wait(&ws->sync, threads);
        if (ws->oversubscribed) break;
    }
}

static void F(forward)(workspace *ws, const void *argument, int64_t thread, int64_t threads) {
    const forward_args *run = argument;
    int64_t begin = 0, end = run->windows.count;
    if (run->workspaces > 1) {
        begin = run->windows.count * thread / threads;
        end = run->windows.count * (thread + 1) / threads;
        ws = (workspace *)((char *)ws + thread * run->workspace_bytes);
        thread = 0;
        threads = 1;
    }
    const share me = share_of(ws, thread, threads);
    const int64_t V = ws->model.V, Vp = ws->Vp;
    const edges across = edges_of(ws->by_vocab ? 1 : ws->groups, threads, ACROSS);
    batch *b = &ws->batches[0];
    for (; begin < end; begin += ws->max_rows) {
        int64_t rows = min(ws->max_rows, end - begin);
        if (thread == 0) index_windows(ws, b, &run->windows, begin, rows);
        barrier_wait(&ws->sync, threads);
        F(forward_hidden)(ws, &me, b);
        if (ws->by_vocab) barrier_wait(&ws->sync, threads);
        for (int64_t first = 0; first < rows; first += ws->chunk) {
            int64_t n = min(ws->chunk, rows - first);
            int64_t r0 = n * thread / threads, r1 = n * (thread + 1) / threads;
            await(&ws->sync, F(partial_logits)(ws, &me, first, n, r0, r1));
            for (int64_t r = r0; r < r1; r++) {
                float *row = ws->logits + r * Vp;
                vec max_logit = F(reduce_row)(ws, row, &across);
                int64_t window = begin + first + r;
                if (run->logits) {
                    memcpy(run->logits + window * V, row, (size_t)V * sizeof(float));
                    continue;
                }
                /* The first target stands for all: what matters is that the largest exponential is added in float64. */
                double weight = 0, loss = 0;
                int32_t target = run->pair_target[run->pair_start[window]];
                for (int64_t i = run->pair_start[window]; i < run->pair_start[window + 1]; i++) {
                    weight += run->pair_weight[i];
                    loss += run->pair_weight[i] * ((double)max_logit[0] - (double)row[run->pair_target[i]]);
                }
                double others = F(exp_row)(row, Vp, max_logit, target)[0];
                run->losses[window] = loss + weight * log(others + (double)row[target]);
            }
            barrier_wait(&ws->sync, threads);
        }
    }
}

/* y = exp x, element by element, n a multiple of W */
static void F(exp_array)(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += W) F(store)(y + i, F(exp)(F(load)(x + i)));
}

#undef ISA
#undef W
#undef WIDEST
#undef ROWS
#undef VMIN
#undef VMAX
#undef RSQRT
#undef FIX_SQRT
#undef LIST
