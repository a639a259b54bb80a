/* The MPI peer of a2a-perf: dispatch and combine of one mixture-of-experts layer as a program would write them with
 * MPI_Alltoallv, measured the way a2a-perf measures liba2a.
 *
 *   mpirun -np R mpi_alltoallv IDS TOKENS HIDDEN TOPK EXPERTS WARMUP ITERATIONS COLD
 *
 * IDS is a file of int32 [R][TOKENS][TOPK]; an id outside [0, EXPERTS) goes nowhere. Experts are owned in consecutive
 * blocks, the first EXPERTS % R ranks own one more. COLD is 1 to empty the caches before each timed operation, else 0.
 *
 * dispatch  counts the rows for each rank (one for each token and distinct rank that owns one of its experts),
 *           exchanges the counts, packs token + ids + weights, exchanges the rows, unpacks them into tokens [N,H],
 *           ids [N,K] and weights [N,K] in (source rank, token) order. All of that is in the time.
 * combine   sends the experts' rows back: they lie in (source rank, token) order, which is what MPI_Alltoallv wants,
 *           so nothing is packed; then out[t] is the sum over ranks, ascending, in float32, rounded once to bf16.
 *
 * Buffers stand before the first call and have exactly the size that this routing needs. Before anything is timed the
 * results are compared with what they mean; if they differ, no time is printed and the exit code is 1. Otherwise
 * rank 0 prints one line of JSON, microseconds of the slowest rank. */

#define _POSIX_C_SOURCE 200809L
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef uint16_t bf16;

static int rank, ranks, tokens, hidden, topk, experts;
static int *owner;          /* [experts] */
static const int32_t *ids;  /* [ranks][tokens][topk] */
static size_t row_bytes;    /* of a packed row: token, ids, weights */
static MPI_Datatype packed; /* such a row */
static MPI_Datatype plain;  /* a row of bf16 */

/* What this rank dispatches. */
static bf16 *x;        /* [tokens][hidden] */
static float *weights; /* [tokens][topk] */

/* Where the rows of the last dispatch went, which combine follows back. */
static int *send_count, *send_at, *recv_count, *recv_at; /* [ranks], rows */
static int *place;                                       /* [tokens][ranks]: row of the send buffer, or -1 */
static int received;

static char *send_rows, *recv_rows; /* packed */
static bf16 *back;                  /* [rows sent][hidden]: what the experts' ranks return */

/* What dispatch leaves. */
static bf16 *got_x;        /* [received][hidden] */
static int32_t *got_ids;   /* [received][topk] */
static float *got_weights; /* [received][topk] */

static bf16 *y;   /* [received][hidden]: the experts' output, weights applied */
static bf16 *out; /* [tokens][hidden] */

static void die(const char *what)
{
    fprintf(stderr, "mpi_alltoallv: rank %d: %s\n", rank, what);
    MPI_Abort(MPI_COMM_WORLD, 2);
    exit(2);
}

/* Written once, so that no page is first touched inside a timed part. */
static void *room(size_t count, size_t size)
{
    size_t bytes = (count * size + 63) / 64 * 64 + 64;
    void *at = aligned_alloc(64, bytes);
    if (!at)
        die("out of memory");
    memset(at, 1, bytes);
    return at;
}

static float widen(bf16 b)
{
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* To nearest, ties to even; a NaN stays one. */
static bf16 narrow(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (bf16)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

/* ------------------------------------------------------------------------------------------- what is measured */

static void dispatch(void)
{
    const int32_t *mine = ids + (size_t)rank * tokens * topk;

    memset(send_count, 0, ranks * sizeof *send_count);
    for (int t = 0; t < tokens; t++) {
        int *to = place + (size_t)t * ranks;
        for (int r = 0; r < ranks; r++)
            to[r] = -1;
        for (int k = 0; k < topk; k++) {
            int32_t id = mine[(size_t)t * topk + k];
            if (id >= 0 && id < experts && to[owner[id]] < 0)
                to[owner[id]] = send_count[owner[id]]++;
        }
    }
    MPI_Alltoall(send_count, 1, MPI_INT, recv_count, 1, MPI_INT, MPI_COMM_WORLD);
    int sent = 0;
    received = 0;
    for (int r = 0; r < ranks; r++) {
        send_at[r] = sent;
        recv_at[r] = received;
        sent += send_count[r];
        received += recv_count[r];
    }

    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ranks; r++) {
            int *to = place + (size_t)t * ranks + r;
            if (*to < 0)
                continue;
            *to += send_at[r];
            char *row = send_rows + (size_t)*to * row_bytes;
            memcpy(row, x + (size_t)t * hidden, hidden * sizeof *x);
            row += hidden * sizeof *x;
            memcpy(row, mine + (size_t)t * topk, topk * sizeof *mine);
            row += topk * sizeof *mine;
            memcpy(row, weights + (size_t)t * topk, topk * sizeof *weights);
        }

    MPI_Alltoallv(send_rows, send_count, send_at, packed, recv_rows, recv_count, recv_at, packed, MPI_COMM_WORLD);

    for (int n = 0; n < received; n++) {
        const char *row = recv_rows + (size_t)n * row_bytes;
        memcpy(got_x + (size_t)n * hidden, row, hidden * sizeof *x);
        row += hidden * sizeof *x;
        memcpy(got_ids + (size_t)n * topk, row, topk * sizeof *got_ids);
        row += topk * sizeof *got_ids;
        memcpy(got_weights + (size_t)n * topk, row, topk * sizeof *got_weights);
    }
}

static void combine(const bf16 *from)
{
    MPI_Alltoallv(from, recv_count, recv_at, plain, back, send_count, send_at, plain, MPI_COMM_WORLD);

    /* Partial sums of a stretch of columns stay in the first cache. */
    enum { STRETCH = 1024 };
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < hidden; h += STRETCH) {
            int width = hidden - h < STRETCH ? hidden - h : STRETCH;
            float sum[STRETCH];
            memset(sum, 0, sizeof sum);
            for (int r = 0; r < ranks; r++) {
                int at = place[(size_t)t * ranks + r];
                if (at < 0)
                    continue;
                const bf16 *restrict row = back + (size_t)at * hidden + h;
                for (int i = 0; i < width; i++)
                    sum[i] += widen(row[i]);
            }
            bf16 *restrict to = out + (size_t)t * hidden + h;
            for (int i = 0; i < width; i++)
                to[i] = narrow(sum[i]);
        }
}

/* -------------------------------------------------------------------------------------------- what it must mean */

/* Every rank knows every rank's inputs, so checking needs no messages. */
static uint32_t hash(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t h = a * 0x9e3779b1u ^ b * 0x85ebca77u ^ c * 0xc2b2ae3du;
    h = (h ^ (h >> 15)) * 0x2c1b3c6du;
    h = (h ^ (h >> 12)) * 0x297a2d39u;
    return h ^ (h >> 15);
}

static float input_x(int r, int t, int h)
{
    /* Eight bits of mantissa: a bf16 holds it. */
    return ((int)(hash(r, t, h) & 255) - 128) / 64.0f;
}

static float input_weight(int r, int t, int k)
{
    return (float)(hash(r + 1024, t, k) & 0xffff) / 65536.0f;
}

/* Not the rounding that is measured: of the two neighbours the nearer one, or the even one. */
static bf16 naive_narrow(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    bf16 low = (bf16)(u >> 16);
    bf16 high = (bf16)(low + 1);
    double below = (double)f - widen(low), above = (double)widen(high) - f;
    if (f < 0)
        below = -below, above = -above;
    if (below != above)
        return below < above ? low : high;
    return low % 2 ? high : low;
}

static int naive_goes(int source, int t, int to)
{
    for (int k = 0; k < topk; k++) {
        int32_t id = ids[((size_t)source * tokens + t) * topk + k];
        if (id >= 0 && id < experts && owner[id] == to)
            return 1;
    }
    return 0;
}

/* What the experts of `on` make of a token. Odd tokens: sums that show whether they are rounded more than once. Even
 * ones: of four ranks the first two cancel out, and the others are lost in any order of adding but the ascending one. */
static float expert_factor(int source, int t, int on)
{
    float all = 0, here = 0;
    for (int k = 0; k < topk; k++) {
        int32_t id = ids[((size_t)source * tokens + t) * topk + k];
        all += input_weight(source, t, k);
        if (id >= 0 && id < experts && owner[id] == on)
            here += input_weight(source, t, k) * (float)(id + 1);
    }
    if (t % 2)
        return here;
    float large = all * (float)(64 * (1 + on / 4));
    return on % 4 == 0 ? large : on % 4 == 1 ? -large : here / (1 << 20);
}

/* The first difference, as a sentence; NULL when there is none. */
static const char *check_dispatch(void)
{
    static char text[160];
    int n = 0;
    for (int s = 0; s < ranks; s++)
        for (int t = 0; t < tokens; t++) {
            if (!naive_goes(s, t, rank))
                continue;
            if (n == received)
                return "dispatch delivered too few rows";
            for (int h = 0; h < hidden; h++)
                if (widen(got_x[(size_t)n * hidden + h]) != input_x(s, t, h)) {
                    snprintf(text, sizeof text, "row %d, column %d is not that of token %d of rank %d", n, h, t, s);
                    return text;
                }
            for (int k = 0; k < topk; k++) {
                size_t at = (size_t)n * topk + k;
                if (got_ids[at] != ids[((size_t)s * tokens + t) * topk + k]
                    || got_weights[at] != input_weight(s, t, k)) {
                    snprintf(text, sizeof text, "id or weight %d of row %d is not that of token %d of rank %d", k, n, t,
                             s);
                    return text;
                }
            }
            n++;
        }
    return n < received ? "dispatch delivered too many rows" : NULL;
}

/* y, from the inputs and not from what arrived: an error of dispatch is not one of combine as well. */
static void run_experts(void)
{
    int n = 0;
    for (int s = 0; s < ranks; s++)
        for (int t = 0; t < tokens; t++) {
            if (!naive_goes(s, t, rank))
                continue;
            float factor = expert_factor(s, t, rank);
            for (int h = 0; h < hidden; h++)
                y[(size_t)n * hidden + h] = naive_narrow(input_x(s, t, h) * factor);
            n++;
        }
}

static const char *check_combine(void)
{
    static char text[160];
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < hidden; h++) {
            float sum = 0;
            for (int r = 0; r < ranks; r++)
                if (naive_goes(rank, t, r))
                    sum += widen(naive_narrow(input_x(rank, t, h) * expert_factor(rank, t, r)));
            bf16 want = naive_narrow(sum), is = out[(size_t)t * hidden + h];
            if (is != want) {
                snprintf(text, sizeof text, "combined token %d, column %d is %g, not %g", t, h, widen(is), widen(want));
                return text;
            }
        }
    return NULL;
}

/* Collective: a rank that found its dispatch wrong takes part in combine all the same. */
static int check(void)
{
    dispatch();
    const char *wrong = check_dispatch();
    run_experts();
    combine(y);
    if (!wrong)
        wrong = check_combine();
    if (wrong)
        fprintf(stderr, "mpi_alltoallv: rank %d: %s\n", rank, wrong);
    int mine = wrong == NULL, all;
    MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    return all;
}

/* ------------------------------------------------------------------------------------------------------- timing */

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void empty_caches(void)
{
    enum { BYTES = 64 << 20 };
    static volatile char *other;
    if (!other)
        other = room(BYTES, 1);
    for (size_t i = 0; i < BYTES; i += 64)
        other[i]++;
}

static void one_dispatch(void) { dispatch(); }
static void one_combine(void) { combine(y); }
/* The experts between the two do nothing: what was received goes back. */
static void one_pair(void)
{
    dispatch();
    combine(got_x);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The smallest time that `percent` of all are not above. */
static double percentile(const double *sorted, int count, int percent)
{
    return sorted[((size_t)count * percent + 99) / 100 - 1];
}

/* Fills `slowest` [iterations] on rank 0, sorted. */
static void measure(void (*operation)(void), int warmup, int iterations, int cold, double *slowest)
{
    double *mine = room(iterations, sizeof *mine);
    for (int i = -warmup; i < iterations; i++) {
        if (cold) {
            /* Not on a core that another rank needs to finish. */
            MPI_Barrier(MPI_COMM_WORLD);
            empty_caches();
        }
        MPI_Barrier(MPI_COMM_WORLD);
        double start = now_us();
        operation();
        double took = now_us() - start;
        if (i >= 0)
            mine[i] = took;
    }
    MPI_Reduce(mine, slowest, iterations, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    qsort(slowest, iterations, sizeof *slowest, ascending);
    free(mine);
}

/* -------------------------------------------------------------------------------------------------------- set-up */

static int number(const char *text, const char *name, int least)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*text == 0 || *end != 0 || value < least || value > 1 << 30) {
        char line[160];
        snprintf(line, sizeof line, "%s is %.40s; at least %d", name, text, least);
        die(line);
    }
    return (int)value;
}

static void read_ids(const char *path)
{
    size_t count = (size_t)ranks * tokens * topk;
    int32_t *all = room(count, sizeof *all);
    FILE *file = fopen(path, "rb");
    if (!file)
        die("cannot open the file of ids");
    if (fread(all, sizeof *all, count, file) != count || fgetc(file) != EOF)
        die("the file of ids is not int32 [ranks][tokens][topk]");
    fclose(file);
    ids = all;
}

static void set_up(void)
{
    owner = room(experts, sizeof *owner);
    for (int r = 0, e = 0; r < ranks; r++)
        for (int n = experts / ranks + (r < experts % ranks); n > 0; n--)
            owner[e++] = r;

    row_bytes = hidden * sizeof *x + topk * (sizeof *got_ids + sizeof *got_weights);
    MPI_Type_contiguous((int)row_bytes, MPI_BYTE, &packed);
    MPI_Type_commit(&packed);
    MPI_Type_contiguous((int)(hidden * sizeof *x), MPI_BYTE, &plain);
    MPI_Type_commit(&plain);

    size_t sends = 0, receives = 0;
    for (int r = 0; r < ranks; r++)
        for (int t = 0; t < tokens; t++) {
            sends += naive_goes(rank, t, r);
            receives += naive_goes(r, t, rank);
        }

    x = room((size_t)tokens * hidden, sizeof *x);
    weights = room((size_t)tokens * topk, sizeof *weights);
    for (int t = 0; t < tokens; t++) {
        for (int h = 0; h < hidden; h++)
            x[(size_t)t * hidden + h] = narrow(input_x(rank, t, h));
        for (int k = 0; k < topk; k++)
            weights[(size_t)t * topk + k] = input_weight(rank, t, k);
    }
    send_count = room(ranks, sizeof *send_count);
    send_at = room(ranks, sizeof *send_at);
    recv_count = room(ranks, sizeof *recv_count);
    recv_at = room(ranks, sizeof *recv_at);
    place = room((size_t)tokens * ranks, sizeof *place);
    send_rows = room(sends, row_bytes);
    recv_rows = room(receives, row_bytes);
    got_x = room(receives * hidden, sizeof *got_x);
    got_ids = room(receives * topk, sizeof *got_ids);
    got_weights = room(receives * topk, sizeof *got_weights);
    y = room(receives * hidden, sizeof *y);
    back = room(sends * hidden, sizeof *back);
    out = room((size_t)tokens * hidden, sizeof *out);
}

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (argc != 9)
        die("usage: mpi_alltoallv IDS TOKENS HIDDEN TOPK EXPERTS WARMUP ITERATIONS COLD");
    tokens = number(argv[2], "TOKENS", 0);
    hidden = number(argv[3], "HIDDEN", 1);
    topk = number(argv[4], "TOPK", 1);
    experts = number(argv[5], "EXPERTS", 1);
    int warmup = number(argv[6], "WARMUP", 0);
    int iterations = number(argv[7], "ITERATIONS", 1);
    int cold = number(argv[8], "COLD", 0);
    read_ids(argv[1]);
    set_up();

    if (!check()) {
        if (rank == 0)
            printf("{\"check\": false}\n");
        MPI_Finalize();
        return 1;
    }

    int sent = 0;
    for (int r = 0; r < ranks; r++)
        sent += send_count[r];
    long long rows = sent > received ? sent : received, busiest = 0;
    MPI_Reduce(&rows, &busiest, 1, MPI_LONG_LONG, MPI_MAX, 0, MPI_COMM_WORLD);

    double *times[3];
    void (*const operations[3])(void) = {one_dispatch, one_combine, one_pair};
    for (int o = 0; o < 3; o++) {
        times[o] = room(iterations, sizeof **times);
        measure(operations[o], warmup, iterations, cold, times[o]);
    }

    if (rank == 0) {
        static const char *const names[3] = {"dispatch", "combine", "pair"};
        /* Rows alone, and rows with ids and weights. */
        long long logical[3], wire[3];
        logical[0] = logical[1] = busiest * (long long)(hidden * sizeof *x);
        logical[2] = logical[0] + logical[1];
        wire[0] = busiest * (long long)row_bytes;
        wire[1] = logical[1];
        wire[2] = wire[0] + wire[1];

        char version[MPI_MAX_LIBRARY_VERSION_STRING];
        int length;
        MPI_Get_library_version(version, &length);
        for (char *c = version; *c; c++)
            if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ')
                *c = ' ';

        printf("{\"check\": true, \"version\": \"%s\", \"iterations\": %d, \"busiest_rows\": %lld", version, iterations,
               busiest);
        for (int o = 0; o < 3; o++)
            printf(", \"%s\": {\"p50_us\": %.3f, \"p99_us\": %.3f, \"logical_bytes\": %lld, \"wire_bytes\": %lld}", names[o],
                   percentile(times[o], iterations, 50), percentile(times[o], iterations, 99), logical[o], wire[o]);
        printf("}\n");
    }
    MPI_Finalize();
    return 0;
}
