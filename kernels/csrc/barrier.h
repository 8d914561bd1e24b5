/* A split barrier for the threads of one call: arrive(), then await(). Threads spin, then yield, then sleep. */

#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum { SPIN_NANOSECONDS = 10000 };   /* how long a thread that waits keeps its core, */
enum { YIELD_NANOSECONDS = 200000 }; /* and how long it yields it before it sleeps */
enum { TAKEN_NANOSECONDS = 20000 };  /* a yield that took so long gave the core to other work */

typedef struct {
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int generation;
    atomic_int sleepers;
    _Alignas(64) atomic_llong lost; /* nanoseconds for which other work had the cores of waiting threads */
    int64_t threads; /* 0 until it is known how many take part */
    pthread_mutex_t mutex;
    pthread_cond_t next_generation;
} barrier;

static void barrier_init(barrier *b) {
    atomic_init(&b->arrived, 0);
    atomic_init(&b->generation, 0);
    atomic_init(&b->sleepers, 0);
    atomic_init(&b->lost, 0);
    b->threads = 0;
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->next_generation, NULL);
}

static void barrier_destroy(barrier *b) {
    pthread_cond_destroy(&b->next_generation);
    pthread_mutex_destroy(&b->mutex);
}

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

enum { ALONE = -1 };

/* Split barrier, first half: signal arrival, return the generation that await() takes. In between a thread can do what
 * needs no other thread. */
static int arrive(barrier *b, int64_t threads) {
    if (threads == 1) return ALONE;
    int generation = atomic_load_explicit(&b->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&b->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&b->arrived, 0, memory_order_relaxed);
        atomic_store(&b->generation, generation + 1);
        if (atomic_load(&b->sleepers) > 0) { /* either this sees the sleeper, or the sleeper the new generation */
            pthread_mutex_lock(&b->mutex);
            pthread_cond_broadcast(&b->next_generation);
            pthread_mutex_unlock(&b->mutex);
        }
    }
    return generation;
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Split barrier, second half: wait until all threads have arrived in that generation. A step is a hundred microseconds
 * long or more, so waiting spins; soon it yields its core, for the thread that is waited for may need it; and when that
 * has more to do, it sleeps. (Sleeping after a quarter of the time cost a tenth of a step of two threads: waking up
 * takes longer than most waits.) */
static void await(barrier *b, int generation) {
    if (generation == ALONE) return;
    int64_t start = 0, waited;
    do {
        for (int spins = 0; spins < 64; spins++) { /* a pause takes 10 to 140 cycles, a look at the clock about 80 */
            if (atomic_load_explicit(&b->generation, memory_order_acquire) != generation) return;
            cpu_relax();
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
    while (atomic_load(&b->generation) == generation) pthread_cond_wait(&b->next_generation, &b->mutex);
    atomic_fetch_sub(&b->sleepers, 1);
    pthread_mutex_unlock(&b->mutex);
}

static void barrier_wait(barrier *b, int64_t threads) { await(b, arrive(b, threads)); }
