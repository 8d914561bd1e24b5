/* The machine's peak of fp32 multiply-adds: independent chains of FMAs on registers, no memory.

   fma_peak THREADS -> prints floating-point operations per second, two per multiply-add; the best of several runs. */

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

/* Enough chains to cover latency times pipes (4 x 2 on x86, 4 x 4 on Arm), few enough to stay in registers. */
#if defined(__aarch64__)
#define CHAINS 24
#else
#define CHAINS 12
#endif

typedef float vector __attribute__((vector_size(4 * WIDTH)));

static float chains(long rounds) {
    vector sum[CHAINS], factor, addend;
    for (int i = 0; i < WIDTH; i++) {
        factor[i] = 0.999f + 1e-4f * i;
        addend[i] = 1e-3f;
    }
    for (int c = 0; c < CHAINS; c++)
        for (int i = 0; i < WIDTH; i++) sum[c][i] = (float)c + i;
    for (long r = 0; r < rounds; r++)
#pragma GCC unroll 32
        for (int c = 0; c < CHAINS; c++) sum[c] = sum[c] * factor + addend;
    float total = 0;
    for (int c = 0; c < CHAINS; c++)
        for (int i = 0; i < WIDTH; i++) total += sum[c][i];
    return total;
}

int main(int argc, char **argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    const long rounds = 2000000; /* some milliseconds: less than what a busy system leaves a thread alone for */
    double best = 0;
    volatile float sink;
    for (int run = 0; run < 25; run++) {
        float total = 0;
        double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : total)
        total += chains(rounds);
        double rate = 2.0 * threads * rounds * CHAINS * WIDTH / (omp_get_wtime() - start);
        if (rate > best) best = rate;
        sink = total;
    }
    (void)sink;
    printf("%.6e\n", best);
    return 0;
}
