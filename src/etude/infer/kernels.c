// The engine's CPU kernels. kernels.py compiles this file and explains the arguments.
//
// One property holds everywhere: an output row's bits follow from its own inputs alone, whatever stands beside it and however
// work is cut among threads. So a sum over channels or positions has ONE order: the lanes of a fixed number of vectors, then
// a fixed tree. Blocking is over rows and outputs only. No contraction is left to the compiler (-ffp-contract=off): what is
// fused says so.
//
// `bf` is 1 for bfloat16 and 0 for fp32 tensors; functions that take it as a constant are inlined and exist twice.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#include <pthread.h>
#include <sched.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define VL 16
#elif defined(__AVX2__) && defined(__FMA__)
#define VL 8
#else
#define VL 4
#endif
// Rows (or queries) a block: ROWS x 4 accumulators, ROWS inputs and a weight fill the vector registers.
#if VL == 16 || defined(__ARM_NEON)
#define ROWS 4
#else
#define ROWS 2
#endif
typedef float vec __attribute__((vector_size(4 * VL)));
typedef int32_t vint __attribute__((vector_size(4 * VL)));
typedef uint32_t vuint __attribute__((vector_size(4 * VL)));
typedef uint16_t vhalf __attribute__((vector_size(2 * VL)));
typedef int8_t vbyte __attribute__((vector_size(VL)));
typedef float vec4 __attribute__((vector_size(16)));
typedef int64_t i64;

// ---------------------------------------------------------------------------------------------- vectors

INLINE vec splat(float a) { return a - (vec){0}; }
INLINE vec pick(vint mask, vec a, vec b) { return (vec)((mask & (vint)a) | (~mask & (vint)b)); }
INLINE vec larger(vec a, vec b) { return pick(b > a, b, a); }
INLINE vec load(const void *p) { vec v; memcpy(&v, p, sizeof v); return v; }

INLINE vec load_part(const void *p, i64 bytes) {  // zeros behind the first `bytes`
#if VL == 16
    return (vec)_mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, p);
#else
    vec v = {0};
    memcpy(&v, p, MIN(bytes, (i64)sizeof v));
    return v;
#endif
}

INLINE vec fma_(vec a, vec b, vec c) {  // a b + c
#if VL == 16
    return _mm512_fmadd_ps(a, b, c);
#elif VL == 8
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// acc += a b for fp32; for bf16 two products a lane.
INLINE vec mac(vec acc, vec a, vec b, const int bf) {
    if (!bf) return fma_(a, b, acc);
#if VL == 16 && defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const vuint high = (vuint){0} + 0xffff0000u;
    acc = fma_((vec)((vuint)a << 16), (vec)((vuint)b << 16), acc);
    return fma_((vec)((vuint)a & high), (vec)((vuint)b & high), acc);
#endif
}

// Nearest bf16, ties to even, in the upper half of each lane. NaN stays NaN.
INLINE vuint rounded(vec x) {
    vuint u = (vuint)x, up = u + 0x7fff + ((u >> 16) & 1);
    vint nan = (vint)((u & 0x7fffffff) > 0x7f800000);
    return (vuint)pick(nan, (vec)(u | 0x400000), (vec)up);
}

// VL channels from channel i on, as fp32, and back; `n` of them where fewer are left.
INLINE vec get(const void *p, i64 i, i64 n, const int bf) {
    if (!bf) return n >= VL ? load((const float *)p + i) : load_part((const float *)p + i, 4 * n);
    vhalf h = {0};
    if (n >= VL) memcpy(&h, (const uint16_t *)p + i, sizeof h);
    else memcpy(&h, (const uint16_t *)p + i, 2 * n);
    return (vec)(__builtin_convertvector(h, vuint) << 16);
}
INLINE void put(void *p, i64 i, i64 n, vec x, const int bf) {
    if (bf) {
        vhalf h = __builtin_convertvector(rounded(x) >> 16, vhalf);
        if (n >= VL) memcpy((uint16_t *)p + i, &h, sizeof h);
        else memcpy((uint16_t *)p + i, &h, 2 * n);
    } else if (n >= VL) memcpy((float *)p + i, &x, sizeof x);
    else memcpy((float *)p + i, &x, 4 * n);
}

#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint){__VA_ARGS__})
#endif
// The same four out of each 128 bits of a and b (those of b count from 0 as well, in r and s).
#if VL == 16
#define IN_FOURS(a, b, p, q, r, s) SHUFFLE(a, b, p, q, r, s, p + 4, q + 4, r + 4, s + 4, p + 8, q + 8, r + 8, s + 8, p + 12, q + 12, r + 12, s + 12)
#elif VL == 8
#define IN_FOURS(a, b, p, q, r, s) SHUFFLE(a, b, p, q, r, s, p + 4, q + 4, r + 4, s + 4)
#else
#define IN_FOURS(a, b, p, q, r, s) SHUFFLE(a, b, p, q, r, s)
#endif

// The sums of four vectors' lanes, each by the same tree.
INLINE vec4 sum4(const vec *a) {
    vec ab = IN_FOURS(a[0], a[1], 0, VL, 1, VL + 1) + IN_FOURS(a[0], a[1], 2, VL + 2, 3, VL + 3);
    vec cd = IN_FOURS(a[2], a[3], 0, VL, 1, VL + 1) + IN_FOURS(a[2], a[3], 2, VL + 2, 3, VL + 3);
    vec all = IN_FOURS(ab, cd, 0, 1, VL, VL + 1) + IN_FOURS(ab, cd, 2, 3, VL + 2, VL + 3);
    vec4 part[VL / 4];
    memcpy(part, &all, sizeof all);
#if VL == 16
    return (part[0] + part[2]) + (part[1] + part[3]);
#elif VL == 8
    return part[0] + part[1];
#else
    return part[0];
#endif
}
INLINE float sum(vec a) { vec four[4] = {a}; return sum4(four)[0]; }

// e^x: 2^n e^r with |r| <= ln(2)/2 and Taylor's polynomial; 0 or infinity a little before the normal numbers end, NaN stays
// NaN.
INLINE vec exp_(vec x) {
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    vint gone = x < -87.3f, beyond = x > 88.3f;
    x = pick(gone | beyond, splat(0), x);
    vec t = fma_(x, splat(1.44269504f), magic), n = t - magic;
    vec r = fma_(n, splat(-0.693145752f), x);
    r = fma_(n, splat(-1.42860677e-6f), r);
    vec y = splat(1 / 5040.0f);
    y = fma_(y, r, splat(1 / 720.0f));
    y = fma_(y, r, splat(1 / 120.0f));
    y = fma_(y, r, splat(1 / 24.0f));
    y = fma_(y, r, splat(1 / 6.0f));
    y = fma_(y, r, splat(0.5f));
    y = fma_(y, r, splat(1.0f));
    y = fma_(y, r, splat(1.0f));
    y *= (vec)(((vuint)t << 23) + 0x3f800000);
    return pick(gone, splat(0), pick(beyond, splat(INFINITY), y));
}

// The part [from, to) of n things in blocks that is piece number `piece` of `pieces`.
INLINE void share(i64 n, i64 block, i64 piece, i64 pieces, i64 *from, i64 *to) {
    i64 blocks = (n + block - 1) / block;
    *from = MIN(blocks * piece / pieces * block, n);
    *to = MIN(blocks * (piece + 1) / pieces * block, n);
}

// ---------------------------------------------------------------------------------------------- threads

// Work is cut into pieces that are taken one after another by whoever comes first. The caller takes pieces too and waits only
// for those that others hold, not for the others: on a machine with busy neighbours a thread that does not get its core
// costs nothing, where at OpenMP's barriers all would wait for it, a hundred times a token.
//
// The ticket is (job << 40 | pieces << 20 | next piece): what a thread takes belongs to the job that it was taken from, and the
// job's description stays until all its pieces are done. There is one caller at a time: Python's lock is held.
#define MOST 64
#define TICKET(t, shift) ((i64)((t) >> (shift)) & 0xfffff)
typedef void (*Part)(const void *job, i64 piece, i64 pieces, i64 who);
static uint64_t ticket, done;
static struct { Part part; const void *job; } job;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static i64 started, asleep;

static int take(i64 who) {  // one piece; -> whether there was one
    uint64_t t = __atomic_load_n(&ticket, __ATOMIC_ACQUIRE);
    if (TICKET(t, 0) >= TICKET(t, 20)) return 0;
    t = __atomic_fetch_add(&ticket, 1, __ATOMIC_ACQ_REL);
    if (TICKET(t, 0) >= TICKET(t, 20)) return 0;
    job.part(job.job, TICKET(t, 0), TICKET(t, 20), who);
    __atomic_fetch_add(&done, 1, __ATOMIC_RELEASE);
    return 1;
}

static void breathe(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void *work(void *who) {
    for (i64 idle = 0;;) {
        if (take((i64)(intptr_t)who)) { idle = 0; continue; }
        if (++idle < 3000) { breathe(); continue; }  // about as long as Python takes from one kernel to the next
        pthread_mutex_lock(&lock);
        __atomic_fetch_add(&asleep, 1, __ATOMIC_SEQ_CST);
        uint64_t t = __atomic_load_n(&ticket, __ATOMIC_SEQ_CST);
        if (TICKET(t, 0) >= TICKET(t, 20)) pthread_cond_wait(&more, &lock);
        __atomic_fetch_sub(&asleep, 1, __ATOMIC_SEQ_CST);
        pthread_mutex_unlock(&lock);
        idle = 0;
    }
    return 0;
}

static void forked(void) {  // a child process has no threads but its own
    started = asleep = 0;
    pthread_mutex_init(&lock, 0);
    pthread_cond_init(&more, 0);
}

// part(job, piece, pieces, who) for each of `pieces`; `who` is below places().
static void together(Part part, const void *what, i64 pieces, i64 threads) {
    if (threads < 2 || pieces < 2) {
        for (i64 i = 0; i < pieces; i++) part(what, i, pieces, 0);
        return;
    }
    static int prepared;
    if (!prepared) prepared = 1, pthread_atfork(0, 0, forked);
    while (started + 1 < MIN(threads, MOST)) {
        pthread_t thread;
        if (pthread_create(&thread, 0, work, (void *)(intptr_t)(started + 1))) break;
        pthread_detach(thread);
        started++;
    }
    job.part = part, job.job = what;
    __atomic_store_n(&done, 0, __ATOMIC_RELAXED);
    uint64_t t = __atomic_load_n(&ticket, __ATOMIC_RELAXED);
    __atomic_store_n(&ticket, ((t >> 40) + 1) << 40 | (uint64_t)pieces << 20, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&asleep, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&more);
        pthread_mutex_unlock(&lock);
    }
    while (take(0)) {}
    for (i64 i = 0; __atomic_load_n(&done, __ATOMIC_ACQUIRE) < (uint64_t)pieces; i++)
        if (i < 3000) breathe(); else sched_yield();
}

static i64 places(i64 threads) { return MAX(MAX(threads, started + 1), 1); }
static i64 evenly(i64 n, i64 threads) { return MAX(1, threads < 2 ? 1 : MIN(n, 4 * threads)); }

// ---------------------------------------------------------------------------------------------- linear layers

// acc[m * cols + n] = the lanes of the product of x[m] and w[n], `bytes` long. `ahead`: how many bytes to prefetch weights.
INLINE void dots(const int rows, const int cols, const int bf, const char *const *x, const char *const *w, i64 bytes,
                 i64 ahead, vec *acc) {
    vec sums[16];
    UNROLL for (int j = 0; j < rows * cols; j++) sums[j] = (vec){0};
    i64 i = 0;
    for (; i + (i64)sizeof(vec) <= bytes; i += sizeof(vec)) {
        vec a[ROWS];
        UNROLL for (int m = 0; m < rows; m++) a[m] = load(x[m] + i);
        UNROLL for (int n = 0; n < cols; n++) {
            if (ahead) __builtin_prefetch(w[n] + i + ahead);
            vec b = load(w[n] + i);
            UNROLL for (int m = 0; m < rows; m++) sums[m * cols + n] = mac(sums[m * cols + n], a[m], b, bf);
        }
    }
    if (i < bytes) UNROLL for (int n = 0; n < cols; n++) {
        vec b = load_part(w[n] + i, bytes - i);
        UNROLL for (int m = 0; m < rows; m++)
            sums[m * cols + n] = mac(sums[m * cols + n], load_part(x[m] + i, bytes - i), b, bf);
    }
    UNROLL for (int j = 0; j < rows * cols; j++) acc[j] = sums[j];
}

typedef struct {
    const char *x, *w, *bias;
    char *y;
    i64 bf, bias_bf, M, N, K, threads;
} Linear;

// y[m][n .. n + 16) for `rows` rows from m on (`have` of them are real, the others repeat the last one).
INLINE void linear_block(const Linear *a, const int rows, const int bf, i64 m, i64 have, i64 n, i64 ahead) {
    const i64 row = a->K * (bf ? 2 : 4);
    const int cols = rows == 1 ? 8 : 4;
    const char *x[ROWS], *w[8];
    float y[ROWS][16];
    vec acc[16];
    UNROLL for (int i = 0; i < rows; i++) x[i] = a->x + (m + MIN(i, have - 1)) * row;
    for (int c = 0; c < 16; c += cols) {
        UNROLL for (int j = 0; j < cols; j++) w[j] = a->w + MIN(n + c + j, a->N - 1) * row;
        // One row alone is as fast as memory without: the machine's own prefetching sees nothing but streams.
        if (ahead && rows > 1) dots(rows, cols, bf, x, w, row, cols * row, acc);
        else dots(rows, cols, bf, x, w, row, 0, acc);
        UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < cols; j += 4) {
            vec4 s = sum4(acc + i * cols + j);
            memcpy(&y[i][c + j], &s, sizeof s);
        }
    }
    for (int i = 0; i < have; i++) for (i64 j = 0, left = MIN(16, a->N - n); j < left; j += VL) {
        vec s = load(&y[i][j]);
        if (a->bias) s += get(a->bias, n + j, left - j, a->bias_bf);
        put(a->y, (m + i) * a->N + n + j, left - j, s, bf);
    }
}

INLINE void linear_part(const Linear *a, i64 piece, i64 pieces, const int bf) {
    i64 from, to, some = MAX(ROWS, (512 << 10) / (a->K * (bf ? 2 : 4) + 1) / ROWS * ROWS);  // rows of x that stay in L2
    share(a->N, 16, piece, pieces, &from, &to);
    for (i64 m0 = 0; m0 < a->M; m0 += some) for (i64 n = from; n < to; n += 16) {
        const i64 end = MIN(m0 + some, a->M);
        for (i64 m = m0; m < end; m += ROWS)
            if (end - m == 1) linear_block(a, 1, bf, m, 1, n, m == m0);
            else linear_block(a, ROWS, bf, m, MIN(ROWS, end - m), n, m == m0);
    }
}

static void linear_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const Linear *a = job;
    if (a->bf) linear_part(a, piece, pieces, 1); else linear_part(a, piece, pieces, 0);
}

int linear(const Linear *a) {  // pieces large enough to stream, small enough to be shared out evenly
    const i64 bytes = a->N * a->K * (a->bf ? 2 : 4);
    together(linear_piece, a, evenly((a->N + 15) / 16, MAX(a->threads, a->threads < 2 ? 1 : MIN(bytes >> 20, 1000))), a->threads);
    return 0;
}

// ---------------------------------------------------------------------------------------------- 8-bit linear layers

// Weights lie in panels of 16 outputs, four inputs of each side by side: w[panel][K / 4][16][4], uint8 = value + 128;
// scale[panel][K / GROUP][16] bf16. A row of x is quantised by the same groups: sum (w + 128) x = sum w x + 128 sum x, so
// the integer sum starts at -128 sum x. Integer sums are exact; the groups' sums add up in fp32, in order.
#ifndef GROUP
#define GROUP 32
#endif
#define PARTS (16 / VL)

typedef struct {
    const char *x;
    const uint8_t *w;
    const uint16_t *scale;
    const char *bias;
    char *y;
    i64 bf, bias_bf, M, N, K, threads;
} LinearInt8;

typedef struct {  // a row of x
    int8_t *q;
    float *scale;
    int32_t *start;
} Quantised;

INLINE vint dot4(vint acc, vec w, int32_t x) {  // acc[i] += sum of four w (unsigned) times four x (signed)
#if VL == 16 && defined(__AVX512VNNI__)
    return (vint)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif VL == 8 && defined(__AVXVNNI__)
    return (vint)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#else
    vint u = (vint)w;
    int8_t b[4];
    memcpy(b, &x, 4);
#if VL == 8  // pairs (0, 2) and (1, 3) as 16 bits
    const __m256i low = _mm256_set1_epi32(0x00ff00ff);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)u, low), _mm256_set1_epi32((b[0] & 0xffff) | ((uint32_t)b[2] << 16)));
    __m256i odd = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi32((__m256i)u, 8), low), _mm256_set1_epi32((b[1] & 0xffff) | ((uint32_t)b[3] << 16)));
    return acc + (vint)_mm256_add_epi32(even, odd);
#else
    for (int i = 0; i < 4; i++) acc += ((u >> (8 * i)) & 255) * b[i];
    return acc;
#endif
#endif
}

INLINE void quantise(const char *x, i64 K, Quantised to, const int bf) {
    for (i64 g = 0; g * GROUP < K; g++) {
        vec v[GROUP / VL];
        vuint top = {0};
        UNROLL for (int i = 0; i < GROUP / VL; i++) {
            i64 at = g * GROUP + i * VL;
            v[i] = at < K ? get(x, at, K - at, bf) : splat(0);
            vuint size = (vuint)v[i] & 0x7fffffff;  // as integers: infinities and NaN are the largest, and stay visible
            top = (vuint)pick((vint)(size > top), (vec)size, (vec)top);
        }
        uint32_t most = 0;
        for (int i = 0; i < VL; i++) most = MAX(most, top[i]);
        float amax, magic = 12582912.0f;
        memcpy(&amax, &most, 4);
        const float inverse = most ? 127 / amax : 0;
        vint all = {0};
        UNROLL for (int i = 0; i < GROUP / VL; i++) {
            vint q = (vint)(v[i] * inverse + magic) - 0x4b400000;
            all += q;
            vbyte bytes = __builtin_convertvector(q, vbyte);
            memcpy(to.q + g * GROUP + i * VL, &bytes, sizeof bytes);
        }
        int32_t total = 0;
        for (int i = 0; i < VL; i++) total += all[i];
        to.scale[g] = amax / 127;
        to.start[g] = -128 * total;
    }
}

INLINE void int8_block(const LinearInt8 *a, const int rows, const int panels, const int bf, const Quantised *x, i64 m,
                       i64 have, i64 panel, i64 groups, const int ahead) {
    vec acc[4 * 2 * PARTS] = {{0}};
    const uint8_t *w = a->w + panel * groups * GROUP * 16;
    const uint16_t *scale = a->scale + panel * groups * 16;
    for (i64 g = 0; g < groups; g++) {
        vint part[4 * 2 * PARTS];
        const int8_t *q[4];
        UNROLL for (int i = 0; i < rows; i++) {
            const Quantised *r = x + m + MIN(i, have - 1);
            q[i] = r->q + g * GROUP;
            UNROLL for (int p = 0; p < panels * PARTS; p++) part[i * panels * PARTS + p] = (vint){0} + r->start[g];
        }
        UNROLL for (int k = 0; k < GROUP; k += 4) {
            UNROLL for (int p = 0; p < panels * PARTS; p++) {
                const uint8_t *at = w + (p / PARTS) * groups * GROUP * 16 + (g * GROUP + k) * 16 + (p % PARTS) * VL * 4;
                if (ahead) __builtin_prefetch(at + panels * groups * GROUP * 16);  // in the panels that come next
                vec b = load(at);
                UNROLL for (int i = 0; i < rows; i++) {
                    int32_t four;
                    memcpy(&four, q[i] + k, 4);
                    part[i * panels * PARTS + p] = dot4(part[i * panels * PARTS + p], b, four);
                }
            }
        }
        UNROLL for (int p = 0; p < panels * PARTS; p++) {
            vec s = get(scale, (p / PARTS) * groups * 16 + g * 16 + (p % PARTS) * VL, VL, 1);
            UNROLL for (int i = 0; i < rows; i++) {
                int j = i * panels * PARTS + p;
                acc[j] = fma_(__builtin_convertvector(part[j], vec), s * x[m + MIN(i, have - 1)].scale[g], acc[j]);
            }
        }
    }
    for (int i = 0; i < have; i++) for (int p = 0; p < panels * PARTS; p++) {
        i64 n = panel * 16 + p * VL, left = a->N - n;
        if (left <= 0) break;
        vec s = acc[i * panels * PARTS + p];
        if (a->bias) s += get(a->bias, n, left, a->bias_bf);
        put(a->y, (m + i) * a->N + n, left, s, bf);
    }
}

typedef struct { const LinearInt8 *a; Quantised *x; } Int8Job;

static void quantise_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const LinearInt8 *a = ((const Int8Job *)job)->a;
    Quantised *x = ((const Int8Job *)job)->x;
    i64 from, to;
    share(a->M, 1, piece, pieces, &from, &to);
    for (i64 m = from; m < to; m++)
        if (a->bf) quantise(a->x + m * a->K * 2, a->K, x[m], 1); else quantise(a->x + m * a->K * 4, a->K, x[m], 0);
}

INLINE void int8_part(const LinearInt8 *a, i64 piece, i64 pieces, const int bf, const Quantised *x) {
    const i64 groups = (a->K + GROUP - 1) / GROUP, panels = (a->N + 15) / 16;
    i64 from, to, some = MAX(4, (256 << 10) / (a->K + 1) / 4 * 4);
    share(panels, 2, piece, pieces, &from, &to);
    for (i64 m0 = 0; m0 < a->M; m0 += some) for (i64 p = from; p < to;) {
        const i64 end = MIN(m0 + some, a->M), two = end - m0 > 1 && p + 1 < to;
        for (i64 m = m0; m < end; m += 4) {
            if (two && m == m0) int8_block(a, 4, 2, bf, x, m, MIN(4, end - m), p, groups, 1);
            else if (two) int8_block(a, 4, 2, bf, x, m, MIN(4, end - m), p, groups, 0);
            else if (end - m > 1) int8_block(a, 4, 1, bf, x, m, MIN(4, end - m), p, groups, 0);
            else int8_block(a, 1, 1, bf, x, m, 1, p, groups, 0);
        }
        p += 1 + two;
    }
}

static void int8_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const Int8Job *j = job;
    if (j->a->bf) int8_part(j->a, piece, pieces, 1, j->x); else int8_part(j->a, piece, pieces, 0, j->x);
}

int linear_int8(const LinearInt8 *a) {  // -> 0, or 1 if there is no memory
    const i64 groups = (a->K + GROUP - 1) / GROUP;
    char *room = malloc(a->M * (sizeof(Quantised) + groups * (GROUP + 8)) + 64);
    if (!room) return 1;
    Quantised *x = (Quantised *)room;
    int8_t *q = (int8_t *)(x + a->M);
    float *scale = (float *)(q + a->M * groups * GROUP);
    for (i64 m = 0; m < a->M; m++)
        x[m] = (Quantised){q + m * groups * GROUP, scale + 2 * m * groups, (int32_t *)(scale + (2 * m + 1) * groups)};
    const Int8Job job = {a, x};
    together(quantise_piece, &job, a->M < 4 ? 1 : evenly(a->M, a->threads), a->threads);
    together(int8_piece, &job, evenly((a->N + 31) / 32, MAX(a->threads, a->threads < 2 ? 1 : MIN(a->N * a->K >> 19, 1000))), a->threads);
    free(room);
    return 0;
}

// ---------------------------------------------------------------------------------------------- norm, rotation, gate

typedef struct {
    const char *x, *w;
    char *y;
    i64 bf, w_bf, M, D, H, row, head, threads;  // row m begins at channel m / H * row + m % H * head
    double eps;
} Norm;

INLINE void norm_part(const Norm *a, i64 piece, i64 pieces, const int bf, const int w_bf) {
    i64 from, to;
    share(a->M, 1, piece, pieces, &from, &to);
    for (i64 m = from; m < to; m++) {
        const char *in = a->x + (m / a->H * a->row + m % a->H * a->head) * (bf ? 2 : 4);
        vec squares = {0};
        for (i64 i = 0; i < a->D; i += VL) {
            vec x = get(in, i, a->D - i, bf);
            squares = fma_(x, x, squares);
        }
        const float r = 1 / sqrtf(sum(squares) / a->D + (float)a->eps);
        for (i64 i = 0; i < a->D; i += VL) {
            i64 n = a->D - i;
            put(a->y, m * a->D + i, n, get(in, i, n, bf) * r * get(a->w, i, n, w_bf), bf);
        }
    }
}

static void norm_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const Norm *a = job;
    if (a->bf && a->w_bf) norm_part(a, piece, pieces, 1, 1);
    else if (a->bf) norm_part(a, piece, pieces, 1, 0);
    else if (a->w_bf) norm_part(a, piece, pieces, 0, 1);
    else norm_part(a, piece, pieces, 0, 0);
}

int rms_norm(const Norm *a) { return together(norm_piece, a, evenly(a->M, a->threads), a->threads), 0; }

typedef struct {
    const char *x;
    const float *cos, *sin;
    char *y;
    i64 bf, M, H, D, turned, half, row, head, threads;
} Rope;

INLINE void rope_part(const Rope *a, i64 piece, i64 pieces, const int bf) {
    const i64 size = bf ? 2 : 4, T = a->turned, pair = a->half ? T / 2 : T;
    i64 from, to;
    share(a->M, 1, piece, pieces, &from, &to);
    for (i64 m = from; m < to; m++) for (i64 h = 0; h < a->H; h++) {
        const char *x = a->x + (m * a->row + h * a->head) * size;
        char *y = a->y + (m * a->H + h) * a->D * size;
        const float *cos = a->cos + m * T, *sin = a->sin + m * T;
        for (i64 i = 0; i < pair; i += VL) {
            const i64 n = pair - i;
            vec left = get(x, i, n, bf), c = get(cos, i, n, 0), s = get(sin, i, n, 0);
            if (a->half) {
                vec right = get(x, i + pair, n, bf);
                put(y, i, n, fma_(right, s, left * c), bf);
                put(y, i + pair, n, fma_(left, get(sin, i + pair, n, 0), right * get(cos, i + pair, n, 0)), bf);
            } else put(y, i, n, fma_(IN_FOURS(left, left, 1, 0, 3, 2), s, left * c), bf);
        }
        memcpy(y + T * size, x + T * size, (a->D - T) * size);
    }
}

static void rope_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const Rope *a = job;
    if (a->bf) rope_part(a, piece, pieces, 1); else rope_part(a, piece, pieces, 0);
}

int rope(const Rope *a) { return together(rope_piece, a, evenly(a->M, a->threads), a->threads), 0; }

typedef struct {
    const char *x;
    char *y;
    i64 bf, M, H, activation, threads;
} Gate;

INLINE vec activate(vec x, const int which) {
    if (which == 0) return x / (1 + exp_(-x));                        // silu
    if (which == 1) {                                                 // gelu; erfc by Abramowitz & Stegun 7.1.26
        vec z = (vec)((vuint)x & 0x7fffffff) * 0.70710678f, t = 1 / fma_(z, splat(0.3275911f), splat(1));
        vec e = fma_(t, splat(1.061405429f), splat(-1.453152027f));
        e = fma_(e, t, splat(1.421413741f));
        e = fma_(e, t, splat(-0.284496736f));
        e = fma_(e, t, splat(0.254829592f)) * t * 0.5f * exp_(-z * z);
        return x * pick(x < 0, e, 1 - e);
    }
    if (which == 2) {                                                 // gelu_tanh: (1 + tanh u) / 2 = 1 / (1 + e^-2u)
        vec u = x * fma_(x * x, splat(0.044715f), splat(1)) * 0.79788456f;
        return x / (1 + exp_(-2 * u));
    }
    x = pick(x < 0, splat(0), x);
    return which == 3 ? x : x * x;                                    // relu, relu2
}

INLINE void gate_part(const Gate *a, i64 piece, i64 pieces, const int bf, const int which) {
    i64 from, to;
    share(a->M, 1, piece, pieces, &from, &to);
    for (i64 m = from; m < to; m++) for (i64 i = 0; i < a->H; i += VL) {
        const i64 n = a->H - i;
        vec g = activate(get(a->x, 2 * m * a->H + i, n, bf), which);
        put(a->y, m * a->H + i, n, g * get(a->x, (2 * m + 1) * a->H + i, n, bf), bf);
    }
}

static void gate_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const Gate *a = job;
    switch (a->activation * 2 + a->bf) {
#define CASE(which)                                                     \
    case 2 * which: gate_part(a, piece, pieces, 0, which); break;       \
    case 2 * which + 1: gate_part(a, piece, pieces, 1, which); break;
        CASE(0) CASE(1) CASE(2) CASE(3) CASE(4)
    }
}

int glu(const Gate *a) { return together(gate_piece, a, evenly(a->M, a->threads), a->threads), 0; }

// ---------------------------------------------------------------------------------------------- paged attention

// Positions are attended in chunks that begin at multiples of CHUNK. A chunk's result for one row and head is its largest
// score, the sum of e^(score - largest) and the values weighted by that; the results of a row's chunks are merged in order.
// So a chunk may be computed by anyone, for one row or for many at once.
#define CHUNK 256
#define STATES 64  // queries of a task whose running results are kept while it goes through the chunks

typedef struct {
    const char *q, *k, *v;
    char *k_cache, *v_cache, *out;
    const i64 *slots;
    const int32_t *positions, *partials, *rows, *tasks, *tables;
    float *scratch;
    i64 bf, N, H, H_kv, Dk, Dv, q_row, q_head, k_row, k_head, v_row, v_head, k_slot, k_cache_head, v_slot, v_cache_head;
    i64 n_tasks, n_pages, page_size, window, stored_v, threads;
    double scale;
} Attend;

typedef struct {  // rows[first .. first + n), which see the same pages, those of `sequence`, in chunks [from, to)
    int32_t first, n, sequence, from, to;
} Task;

typedef struct {  // results of one query: Dv channels, in the order of `weigh`, filled up with zeros
    float top, total, pad[14], values[];
} Result;

INLINE i64 room(const Attend *a) { return 16 + (a->Dv + 63) / 64 * 64; }  // floats of a Result
INLINE Result *result(const Attend *a, float *base, i64 i) { return (Result *)(base + i * room(a)); }
INLINE i64 first_seen(const Attend *a, i64 row) { return MAX(0, a->positions[row] + 1 - a->window); }

// to[query] += sum over positions [from, to) of p[query][j] times the values' channels in `pieces` vectors from byte `at` on.
// The lanes of a bf16 vector become two vectors: channels 0, 2, 4, .. and 1, 3, 5, ..
INLINE void weigh(const int queries, const int pieces, const int bf, const float (*p)[CHUNK], const char *const *v, i64 at,
                  i64 bytes, i64 from, i64 to, float *const *sums) {
    const int n = bf ? 2 * pieces : pieces;
    const vuint high = (vuint){0} + 0xffff0000u;
    vec acc[16], b[4];
    UNROLL for (int i = 0; i < queries; i++) UNROLL for (int j = 0; j < n; j++) acc[i * n + j] = load(sums[i] + j * VL);
    for (i64 k = from; k < to; k++) {
        UNROLL for (int j = 0; j < pieces; j++) {
            vec raw = bytes >= (i64)sizeof(vec) ? load(v[k] + at + j * sizeof(vec)) : load_part(v[k] + at, bytes);
            if (bf) {
                b[2 * j] = (vec)((vuint)raw << 16);
                b[2 * j + 1] = (vec)((vuint)raw & high);
            } else b[j] = raw;
        }
        UNROLL for (int i = 0; i < queries; i++) {
            vec weight = splat(p[i][k]);
            UNROLL for (int j = 0; j < n; j++) acc[i * n + j] = fma_(weight, b[j], acc[i * n + j]);
        }
    }
    UNROLL for (int i = 0; i < queries; i++) UNROLL for (int j = 0; j < n; j++)
        memcpy(sums[i] + j * VL, &acc[i * n + j], sizeof(vec));
}

// One chunk for up to ROWS queries of a kv head. k and v point at the chunk's keys and values; query i sees positions
// [from[i], to[i]) of it, at least one.
INLINE void chunk(const Attend *a, const int queries, const int bf, const char *const *q, const char *const *k,
                  const char *const *v, const i64 *from, const i64 *to, int cold, Result *const *out) {
    const int cols = queries == 1 ? 8 : 4;
    const i64 size = bf ? 2 : 4, bytes = a->Dv * size;
    float p[ROWS][CHUNK] __attribute__((aligned(64)));
    i64 first = from[0], last = to[0], common = from[0], end = to[0];
    for (int i = 1; i < queries; i++) {
        first = MIN(first, from[i]), last = MAX(last, to[i]);
        common = MAX(common, from[i]), end = MIN(end, to[i]);
    }
    for (i64 j = first / cols * cols; j < last; j += cols) {
        const char *some[8];
        vec acc[16];
        UNROLL for (int i = 0; i < cols; i++) some[i] = k[MIN(MAX(j + i, first), last - 1)];
        if (cold) for (int i = 0; i < cols; i++) {  // the values are next; pages are too short for the machine to guess
            for (i64 at = 0; at < bytes; at += 64) __builtin_prefetch(v[MIN(j + i, last - 1)] + at);
            for (i64 at = 0; at < a->Dk * size; at += 64) __builtin_prefetch(k[MIN(j + i + 16, last - 1)] + at);
        }
        dots(queries, cols, bf, q, some, a->Dk * size, 0, acc);
        UNROLL for (int i = 0; i < queries; i++) UNROLL for (int n = 0; n < cols; n += 4) {
            vec4 s = sum4(acc + i * cols + n) * (float)a->scale;
            memcpy(&p[i][j + n], &s, sizeof s);
        }
    }
    float *sums[ROWS];
    for (int i = 0; i < queries; i++) {
        const i64 low = from[i] / VL * VL, high = (to[i] + VL - 1) / VL * VL;
        for (i64 j = low; j < from[i]; j++) p[i][j] = -INFINITY;
        for (i64 j = to[i]; j < high; j++) p[i][j] = -INFINITY;
        vec most = splat(-INFINITY), total = {0};
        for (i64 j = low; j < high; j += VL) most = larger(most, load(&p[i][j]));
        float top = most[0];
        for (int j = 1; j < VL; j++) top = MAX(top, most[j]);
        for (i64 j = low; j < high; j += VL) {
            vec e = exp_(load(&p[i][j]) - top);
            total += e;
            memcpy(&p[i][j], &e, sizeof e);
        }
        out[i]->top = top, out[i]->total = sum(total);
        memset(out[i]->values, 0, (room(a) - 16) * sizeof(float));
    }
    // Positions that only some of the queries see are added for each alone, never as a zero weight: a NaN in a later row's
    // values is not this row's.
    if (common >= end) common = end = first;
    for (i64 at = 0; at < bytes;) {
        const int whole = bytes - at >= (bf ? 2 : 4) * (i64)sizeof(vec);
        for (int i = 0; i < queries; i++) sums[i] = out[i]->values + at / size;
        for (int i = 0; i < queries; i++) {
            const i64 stop = common < end ? common : to[i];
            if (from[i] < stop) for (int b = 0; b < (whole ? bf ? 2 : 4 : 1); b++)
                weigh(1, 1, bf, p + i, v, at + b * sizeof(vec), bytes - at - b * sizeof(vec), from[i], stop, (float *[]){sums[i] + b * sizeof(vec) / size});
        }
        if (common < end) {
            if (whole) weigh(queries, bf ? 2 : 4, bf, p, v, at, sizeof(vec), common, end, sums);
            else weigh(queries, 1, bf, p, v, at, bytes - at, common, end, sums);
            for (int i = 0; i < queries; i++) if (end < to[i]) for (int b = 0; b < (whole ? bf ? 2 : 4 : 1); b++)
                weigh(1, 1, bf, p + i, v, at + b * sizeof(vec), bytes - at - b * sizeof(vec), end, to[i], (float *[]){sums[i] + b * sizeof(vec) / size});
        }
        at += (whole ? bf ? 2 : 4 : 1) * sizeof(vec);
    }
}

INLINE void merge(const Attend *a, Result *all, const Result *next) {  // `next` follows `all`
    const float top = MAX(all->top, next->top);
    const vec old = exp_(splat(all->top - top)), new = exp_(splat(next->top - top));
    all->top = top;
    all->total = all->total * old[0] + next->total * new[0];
    for (i64 i = 0; i < room(a) - 16; i += VL) {
        vec sum = fma_(load(next->values + i), new, load(all->values + i) * old);
        memcpy(all->values + i, &sum, sizeof sum);
    }
}

INLINE void finish(const Attend *a, const int bf, const Result *r, i64 row, i64 head) {
    char *out = a->out + (row * a->H + head) * a->Dv * (bf ? 2 : 4);
    if (!bf) for (i64 i = 0; i < a->Dv; i += VL) put(out, i, a->Dv - i, load(r->values + i) / r->total, 0);
    else for (i64 i = 0; i < a->Dv; i += 2 * VL) {
        vuint even = rounded(load(r->values + i) / r->total), odd = rounded(load(r->values + i + VL) / r->total);
        vuint both = even >> 16 | (odd & 0xffff0000u);
        memcpy(out + 2 * i, &both, MIN((i64)sizeof both, 2 * (a->Dv - i)));
    }
}

// A task's queries for kv head h. Its chunks' results are merged here if it has all chunks of its rows, else left in scratch.
INLINE void attend_task(const Attend *a, const Task *t, const int bf, i64 h, float *states) {
    const i64 G = a->H / a->H_kv, size = bf ? 2 : 4;
    const int32_t *rows = a->rows + t->first, *pages = a->tables + t->sequence * a->n_pages;
    i64 first = INT64_MAX, last = -1;  // positions that rows of the task see
    for (i64 i = 0; i < t->n; i++) first = MIN(first, first_seen(a, rows[i])), last = MAX(last, a->positions[rows[i]]);
    for (i64 q0 = 0; q0 < t->n * G; q0 += STATES) for (i64 c = MAX(t->from, first / CHUNK); c < t->to; c++) {
        const char *k[CHUNK], *v[CHUNK];
        for (i64 j = c * CHUNK; j < (c + 1) * CHUNK && j <= last;) {
            i64 slot = (i64)pages[j / a->page_size] * a->page_size + j % a->page_size;
            for (i64 end = MIN(MIN((j / a->page_size + 1) * a->page_size, (c + 1) * CHUNK), last + 1); j < end; j++, slot++) {
                k[j % CHUNK] = a->k_cache + (slot * a->k_slot + h * a->k_cache_head) * size;
                v[j % CHUNK] = a->v_cache + (slot * a->v_slot + h * a->v_cache_head) * size;
            }
        }
        for (i64 b = q0; b < MIN(q0 + STATES, t->n * G);) {
            const char *q[ROWS];
            i64 from[ROWS], to[ROWS], of[ROWS];
            Result *out[ROWS];
            int n = 0, cold = b == q0;
            for (; n < ROWS && b < MIN(q0 + STATES, t->n * G); b++) {
                const i64 row = rows[b / G], head = h * G + b % G, p = a->positions[row];
                from[n] = MAX(first_seen(a, row) - c * CHUNK, 0), to[n] = MIN(p + 1 - c * CHUNK, CHUNK);
                if (a->slots[row] < 0 || from[n] >= to[n]) continue;
                q[n] = a->q + (row * a->q_row + head * a->q_head) * size;
                of[n] = b - q0;
                i64 where = a->partials[row];
                if (where >= 0) out[n] = result(a, a->scratch, (where + c) * a->H + head);
                else out[n] = result(a, states, first_seen(a, row) / CHUNK == c ? of[n] : STATES + n);
                n++;
            }
            switch (n) {
            case 1: chunk(a, 1, bf, q, k, v, from, to, cold, out); break;
            case 2: chunk(a, 2, bf, q, k, v, from, to, cold, out); break;
#if ROWS == 4
            case 3: chunk(a, 3, bf, q, k, v, from, to, cold, out); break;
            case 4: chunk(a, 4, bf, q, k, v, from, to, cold, out); break;
#endif
            }
            for (int i = 0; i < n; i++) {
                const i64 row = rows[(q0 + of[i]) / G], head = h * G + (q0 + of[i]) % G;
                if (a->partials[row] >= 0) continue;
                Result *state = result(a, states, of[i]);
                if (out[i] != state) merge(a, state, out[i]);
                if (a->positions[row] / CHUNK == c) finish(a, bf, state, row, head);
            }
        }
    }
}

static void store(const Attend *a, i64 row) {
    const i64 size = a->bf ? 2 : 4, slot = a->slots[row];
    for (i64 h = 0; slot >= 0 && h < a->H_kv; h++) {
        memcpy(a->k_cache + (slot * a->k_slot + h * a->k_cache_head) * size, a->k + (row * a->k_row + h * a->k_head) * size, a->Dk * size);
        if (a->stored_v) memcpy(a->v_cache + (slot * a->v_slot + h * a->v_cache_head) * size, a->v + (row * a->v_row + h * a->v_head) * size, a->Dv * size);
    }
    if (slot < 0) memset(a->out + row * a->H * a->Dv * size, 0, a->H * a->Dv * size);
}

typedef struct { const Attend *a; float *states; } AttendJob;

static void store_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    i64 from, to;
    share(((const AttendJob *)job)->a->N, 1, piece, pieces, &from, &to);
    for (i64 i = from; i < to; i++) store(((const AttendJob *)job)->a, i);
}

static void attend_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const Attend *a = ((const AttendJob *)job)->a;
    float *mine = ((const AttendJob *)job)->states + who * (STATES + ROWS) * room(a);
    const Task *t = (const Task *)a->tasks + piece / a->H_kv;
    if (a->bf) attend_task(a, t, 1, piece % a->H_kv, mine); else attend_task(a, t, 0, piece % a->H_kv, mine);
}

static void merge_piece(const void *job, i64 piece, i64 pieces, i64 who) {
    const Attend *a = ((const AttendJob *)job)->a;
    i64 from, to;
    share(a->N * a->H, 1, piece, pieces, &from, &to);
    for (i64 i = from; i < to; i++) {
        const i64 row = i / a->H, head = i % a->H, where = a->partials[row];
        if (where < 0 || a->slots[row] < 0) continue;
        const i64 c = first_seen(a, row) / CHUNK;
        Result *all = result(a, a->scratch, (where + c) * a->H + head);
        for (i64 d = c + 1; d <= a->positions[row] / CHUNK; d++) merge(a, all, result(a, a->scratch, (where + d) * a->H + head));
        if (a->bf) finish(a, 1, all, row, head); else finish(a, 0, all, row, head);
    }
}

int attend(const Attend *a) {  // -> 0, or 1 if there is no memory
    float *states = malloc(places(a->threads) * (STATES + ROWS) * room(a) * sizeof(float));
    if (!states) return 1;
    const AttendJob job = {a, states};
    together(store_piece, &job, a->N < 64 ? 1 : evenly(a->N, a->threads), a->threads);
    together(attend_piece, &job, a->n_tasks * a->H_kv, a->threads);
    together(merge_piece, &job, evenly(a->N * a->H / 16, a->threads), a->threads);
    free(states);
    return 0;
}

// ---------------------------------------------------------------------------------------------- sums, and whole forwards

typedef struct {
    const char *x, *y;
    char *sum;
    i64 bf, n;
    double factor;
} Add;

int add(const Add *a) {  // x + factor * y, rounded once
    const vec r = splat((float)a->factor);
    for (i64 i = 0; i < a->n; i += VL) {
        const i64 left = a->n - i;
        if (a->bf) put(a->sum, i, left, fma_(get(a->y, i, left, 1), r, get(a->x, i, left, 1)), 1);
        else put(a->sum, i, left, fma_(get(a->y, i, left, 0), r, get(a->x, i, left, 0)), 0);
    }
    return 0;
}

typedef struct {
    int (*function)(const void *);
    const void *arguments;
} Call;

int replay(const Call *calls) {  // one after another, up to one without a function; -> how many failed
    int failed = 0;
    for (; calls->function; calls++) failed += calls->function(calls->arguments) != 0;
    return failed;
}
