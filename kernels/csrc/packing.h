/* How parameters and moments lie in memory: blocks of hidden units, each contiguous, the units innermost. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { UNITS = 32 }; /* hidden units of a block */
enum { LANES = 16 }; /* padding of every other innermost dimension: the widest vector, in floats */

/* A model: its sizes, how its steps are computed, and where its state lies. */
typedef struct {
    int64_t V, T, E, H;
    int64_t isa;  /* the number of an instruction set */
    int64_t form; /* of the first layer: FORM_AUTO, FORM_GATHER or FORM_TABLE */
    float *parameters, *exp_avg, *exp_avg_sq; /* packed arrays; the moments are for training only */
} mlp_model;

/* Packed parameters, or one of the moments. */
typedef struct {
    float *wte; /* (V, Ep)                 Ep: E padded to LANES */
    float *w1;  /* (blocks, T, E, UNITS) */
    float *b1;  /* (blocks, UNITS) */
    float *w2;  /* (blocks, V, UNITS) */
    float *b2;  /* (Vp)                    Vp: V padded to LANES; pads are -inf, 0 in moments */
} packed;

static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

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

/* The parts of a packed array; `floats` is set to the length of the array. */
static packed packed_at(const mlp_model *m, float *base, int64_t *floats) {
    int64_t blocks = padded(m->H, UNITS) / UNITS;
    arena a = {(char *)base, 0};
    packed p;
    p.wte = take_floats(&a, m->V * padded(m->E, LANES));
    p.w1 = take_floats(&a, blocks * m->T * m->E * UNITS);
    p.b1 = take_floats(&a, blocks * UNITS);
    p.w2 = take_floats(&a, blocks * m->V * UNITS);
    p.b2 = take_floats(&a, padded_vocab(m->V));
    if (floats) *floats = a.used / (int64_t)sizeof(float);
    return p;
}

/* Floats of a packed array of parameters or moments. */
EXPORT int64_t mlp_packed_floats(const mlp_model *m) {
    int64_t floats;
    packed_at(m, NULL, &floats);
    return floats;
}

/* Copies n floats of torch's into a packed array, or back. */
static inline void transfer(int64_t pack, float *packed, float *plain, int64_t n) {
    if (pack) memcpy(packed, plain, (size_t)n * sizeof(float));
    else memcpy(plain, packed, (size_t)n * sizeof(float));
}

/* Between a packed array and torch's layouts, wte (V, E), W1 (H, T*E), b1 (H), W2 (V, H), b2 (V).
 *
 * pack: to the array, which is 0 before; or else from it. Padding of the parameters' b2 becomes -inf. */
EXPORT void mlp_transfer(const mlp_model *m, int64_t pack, float *array, float *wte, float *w1, float *b1, float *w2,
                         float *b2) {
    int64_t V = m->V, E = m->E, TE = m->T * E, Ep = padded(E, LANES);
    packed p = packed_at(m, array, NULL);
    for (int64_t v = 0; v < V; v++) transfer(pack, p.wte + v * Ep, wte + v * E, E);
    for (int64_t u = 0; u < m->H; u++)
        for (int64_t k = 0; k < TE; k++)
            transfer(pack, p.w1 + (u / UNITS * TE + k) * UNITS + u % UNITS, w1 + u * TE + k, 1);
    transfer(pack, p.b1, b1, m->H);
    for (int64_t u = 0; u < m->H; u += UNITS)
        for (int64_t v = 0; v < V; v++)
            transfer(pack, p.w2 + (u / UNITS * V + v) * UNITS, w2 + v * m->H + u, min(UNITS, m->H - u));
    transfer(pack, p.b2, b2, V);
    for (int64_t v = V; array == m->parameters && v < padded_vocab(V); v++) p.b2[v] = -INFINITY;
}
