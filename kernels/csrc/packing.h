/* How parameters and moments lie in memory: blocks of hidden units, each contiguous, the units innermost. */

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { UNITS = 32 }; /* hidden units of a block */
enum { LANES = 16 }; /* padding of every other innermost dimension: the widest vector, in floats */

/* Sizes of a model. */
typedef struct {
    int64_t V, T, E, H;
} mlp_shape;

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

/* Floats of a packed array of parameters or moments. */
EXPORT int64_t mlp_packed_floats(const mlp_shape *shape) {
    int64_t floats;
    packed_at(shape, NULL, &floats);
    return floats;
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
        size_t bytes = (size_t)min(UNITS, s->H - first) * sizeof(float);
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
        size_t bytes = (size_t)min(UNITS, s->H - first) * sizeof(float);
        for (int64_t v = 0; v < s->V; v++)
            memcpy(w2 + v * s->H + first, p.w2 + (first / UNITS * s->V + v) * UNITS, bytes);
    }
    memcpy(b2, p.b2, (size_t)s->V * sizeof(float));
}
