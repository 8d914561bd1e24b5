/* Runs the C kernel over odd sizes on exactly sized buffers, for the sanitizers: no Python, one file, one command. */

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define REDZONE 64
#define POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define REDZONE 64
#define POISON(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#endif
#endif

#define CHUNK_FLOATS 1024
#define FORWARD_ROWS 3
#define PRIVATE_WEIGHTS 4096
#define PRIVATE_ROWS 2
#include "../../kernels/csrc/train_step.c"

#include <stdio.h>
#include <stdlib.h>

static uint32_t random_state;

static uint32_t next_random(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

static float *random_floats(int64_t n, float scale) {
    float *x = malloc((size_t)n * sizeof(float));
    for (int64_t i = 0; i < n; i++) x[i] = scale * ((float)(next_random() % 2001) / 1000.0f - 1.0f);
    return x;
}

static void *aligned(int64_t bytes) {
    void *memory = NULL;
    if (posix_memalign(&memory, 64, (size_t)bytes) != 0) exit(3);
    return memory;
}

static void expect(int holds, const char *what, const mlp_model *s, int64_t B, int64_t threads) {
    if (holds) return;
    fprintf(stderr, "%s: V=%d T=%d E=%d H=%d B=%d %s threads=%d form=%d\n", what, (int)s->V, (int)s->T, (int)s->E,
            (int)s->H, (int)B, mlp_isa_name(s->isa), (int)threads, (int)s->form);
    exit(1);
}

/* Every entry point once; returns the loss after three steps. The model gets its packed arrays here. */
static double exercise(mlp_model *s, int64_t B, int64_t n, int64_t threads) {
    random_state = 12345;
    int64_t V = s->V, T = s->T, E = s->E, H = s->H, floats = mlp_packed_floats(s), step = 0;
    float *tensors[5] = {random_floats(V * E, 1), random_floats(H * T * E, 0.3f), random_floats(H, 0.3f),
                         random_floats(V * H, 0.3f), random_floats(V, 0.3f)};
    float *zeros[5], *state[3];
    int64_t sizes[5] = {V * E, H * T * E, H, V * H, V};
    for (int i = 0; i < 5; i++) zeros[i] = calloc((size_t)sizes[i], sizeof(float));
    for (int i = 0; i < 3; i++) {
        float **from = i == 0 ? tensors : zeros;
        state[i] = aligned(floats * (int64_t)sizeof(float));
        memset(state[i], 0, (size_t)floats * sizeof(float));
        if (i == 0) s->parameters = state[0];
        mlp_transfer(s, 1, state[i], from[0], from[1], from[2], from[3], from[4]);
    }
    s->exp_avg = state[1];
    s->exp_avg_sq = state[2];

    uint8_t *narrow = malloc((size_t)n);
    int32_t *wide = malloc((size_t)n * sizeof(int32_t));
    for (int64_t i = 0; i < n; i++) {
        wide[i] = (int32_t)(next_random() % (uint32_t)V);
        narrow[i] = (uint8_t)wide[i];
    }
    mlp_windows tape = {V <= 256 ? (void *)narrow : (void *)wide, V <= 256 ? 1 : 4, 1, n - T, 1};
    void *memory = aligned(mlp_workspace_bytes(s, B, threads));
    double *losses = malloc(3 * sizeof(double));
    for (int64_t before = -1, end = 2; end <= 3; end++) /* it may do fewer steps than asked for, but at least one */
        while (step < end) {
            expect(step > before, "no step done", s, B, threads);
            before = step;
            mlp_train(s, memory, &tape, B, &step, end - step, 10, 1e-3, 1e-2, threads, losses + step);
        }
    expect(step == 3, "wrong step", s, B, threads);
    for (int i = 0; i < 3; i++) expect(losses[i] >= 0 && losses[i] < 100, "strange loss", s, B, threads);
    double last = losses[2];

    int64_t rows = min(11, n - T);
    int64_t *contexts = malloc((size_t)(rows * T) * sizeof(int64_t)), *starts = malloc((size_t)(rows + 1) * sizeof(int64_t));
    int32_t *targets = malloc((size_t)(2 * rows) * sizeof(int32_t));
    double *weights = malloc((size_t)(2 * rows) * sizeof(double));
    for (int64_t i = 0; i < rows * T; i++) contexts[i] = wide[i / T + i % T];
    for (int64_t i = 0; i <= rows; i++) starts[i] = 2 * i;
    for (int64_t i = 0; i < 2 * rows; i++) {
        targets[i] = (int32_t)(next_random() % (uint32_t)V);
        weights[i] = 1 + (double)(i % 3);
    }
    mlp_windows matrix = {contexts, 8, T, rows, 0};
    float *logits = malloc((size_t)(rows * V) * sizeof(float));
    void *forward = aligned(mlp_forward_bytes(s, rows, threads));
    mlp_logits(s, forward, &matrix, threads, logits);
    double *entropies = malloc((size_t)rows * sizeof(double));
    mlp_losses(s, forward, &matrix, threads, entropies, starts, targets, weights);
    for (int64_t i = 0; i < rows; i++) {
        double sum = 0, wanted = 0;
        for (int64_t v = 0; v < V; v++) sum += exp((double)logits[i * V + v]);
        for (int64_t j = starts[i]; j < starts[i + 1]; j++)
            wanted += weights[j] * (log(sum) - (double)logits[i * V + targets[j]]);
        expect(fabs(entropies[i] - wanted) < 1e-4 * (1 + fabs(wanted)), "losses", s, B, threads);
    }

    uint64_t random = 42;
    int64_t *context = malloc((size_t)T * sizeof(int64_t)), drawn[7];
    memcpy(context, contexts, (size_t)T * sizeof(int64_t));
    void *single = aligned(mlp_forward_bytes(s, 1, 1));
    mlp_sample(s, single, context, &random, 7, logits, drawn);
    for (int i = 0; i < 7; i++) expect(drawn[i] >= 0 && drawn[i] < V, "drawn token", s, B, threads);
    mlp_transfer(s, 0, state[0], zeros[0], zeros[1], zeros[2], zeros[3], zeros[4]);

    void *all[] = {narrow, wide, memory, losses, contexts, starts, targets, weights, entropies, logits, forward,
                   context, single};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    for (int i = 0; i < 5; i++) free(tensors[i]), free(zeros[i]);
    for (int i = 0; i < 3; i++) free(state[i]);
    return last;
}

/* "races", for ThreadSanitizer: several threads only, and the best instruction set only. A number: so many sizes only,
 * for emulators. */
int main(int argc, char **argv) {
    int races = argc > 1 && strcmp(argv[1], "races") == 0;
    /* V, T, E, H, B, tokens of the tape */
    static const int64_t cases[][6] = {
        {27, 3, 48, 64, 128, 300}, {1, 1, 1, 1, 1, 2},     {5, 2, 3, 7, 127, 40},  {33, 4, 31, 65, 2, 9},
        {300, 8, 17, 33, 129, 500}, {65, 1, 16, 100, 1, 2}, {17, 3, 50, 96, 40, 4}, {600, 2, 8, 40, 129, 900},
        {5, 2, 3, 700, 40, 90},     {600, 1, 4, 300, 30, 700},
    };
    int runs = 0;
    size_t all = sizeof cases / sizeof cases[0], count = argc > 1 && !races ? strtoul(argv[1], NULL, 10) : all;
    for (size_t i = 0; i < count && i < all; i++)
        for (int64_t isa = 0; isa < mlp_isa_count(); isa++) {
            if (!mlp_isa_supported(isa) || (races && isa > 0 && mlp_isa_supported(isa - 1))) continue;
            for (int64_t form = FORM_AUTO; form <= FORM_TABLE; form++) {
                double loss = 0;
                for (int64_t threads = races ? 2 : 1; threads <= 3; threads++, runs++) {
                    mlp_model s = {cases[i][0], cases[i][1], cases[i][2], cases[i][3], .isa = isa, .form = form};
                    double got = exercise(&s, cases[i][4], cases[i][5], threads);
                    if (loss == 0) loss = got;
                    expect(got == loss, "another loss", &s, cases[i][4], threads);
                }
            }
        }
    printf("%d runs\n", runs);
    return 0;
}
