/*
 * A mixture-of-experts layer spread over 8 rank processes, through liba2a's C ABI.
 *
 * The parent starts 8 processes of itself. Each is one rank: it holds an eighth of the tokens and an eighth of the
 * experts, and runs
 *
 *     a2a_dispatch -> its own experts on the rows that came -> a2a_combine
 *
 * Then it computes the same tokens again, alone, with every expert and without liba2a, and compares. Each strategy
 * runs the same layer, in each layout that it offers. The routings are recorded ones (tests/data/README.md). The rank's
 * part, run_rank(), is what an engine does.
 *
 *     moe_layer [--quick] [directory of the recordings]
 *
 * The last line is "PASS: ..." or "FAIL: ...". Linux, little-endian.
 */
#define _POSIX_C_SOURCE 200809L

#include <a2a.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 8, HIDDEN = 256, FFN = 32, STEPS = 21, QUICK_STEPS = 3 };

/* Tokens are bf16 on both sides and results float32, so all that may differ from the layer computed alone is the
 * order in which at most 8 expert outputs are added: a few times 2^-24 of a row's largest element. Losing, doubling
 * or misplacing a single row shows as an error of 1e-2 or more. */
#define LIMIT 1e-5

/* Where dispatch quantises, an element of a token comes off by up to 1/16 of itself: e4m3 has 3 bits of mantissa, and
 * rounding errs by half of 2^-3. That is 2.5% in the mean (root mean square), independent from element to element, so
 * it is 2.5% of the gate and of the up projection too; their product makes it about 4% of a result's typical element.
 * An error is the worst of a row relative to the row's largest, each some three times the typical: 4% again, and twice
 * that in the worst of a thousand rows. A token with another's scales, or scales with another's columns, is off by
 * more; that rows go where they belong is for the layers with the limit above to show. */
#define FP8_LIMIT 0.15

/* No process outlives this, whatever happens. */
enum { PROCESS_SECONDS = 60, CALL_MS = 10000 };

/* A recording, and how its 1024 tokens are split over the ranks. */
struct load {
    const char *name;
    const char *file;
    int tokens[RANKS];
};

#define EVEN {128, 128, 128, 128, 128, 128, 128, 128}
#define UNEVEN {250, 0, 180, 130, 97, 200, 127, 40}

static const struct load LOADS[] = {
    {"mixtral", "mixtral.a2ar", EVEN},         {"qwen3_moe, uneven", "qwen3_moe.a2ar", UNEVEN},
    {"qwen3_moe", "qwen3_moe.a2ar", EVEN},     {"gaussian", "gaussian.a2ar", EVEN},
    {"deepseek_v3", "deepseek_v3.a2ar", EVEN}, {"worst", "worst.a2ar", EVEN},
};
enum { ALL_LOADS = sizeof LOADS / sizeof LOADS[0], QUICK_LOADS = 2 };

/* Each strategy with each layout that it offers, and one that quantises the tokens on their way. */
struct strategy {
    const char *backend;
    a2a_layout_t layout;
    a2a_quant_t quant;
};

static const struct strategy STRATEGIES[] = {
    {"allgather_reducescatter", A2A_LAYOUT_GATHERED, A2A_QUANT_NONE},
    {"flashinfer_nvlink_one_sided", A2A_LAYOUT_RANK_MAJOR, A2A_QUANT_NONE},
    {"flashinfer_nvlink_two_sided", A2A_LAYOUT_FLAT, A2A_QUANT_NONE},
    {"deepep_high_throughput", A2A_LAYOUT_FLAT, A2A_QUANT_NONE},
    {"deepep_high_throughput", A2A_LAYOUT_EXPERT_CONTIGUOUS, A2A_QUANT_NONE},
    {"deepep_low_latency", A2A_LAYOUT_EXPERT_PADDED, A2A_QUANT_NONE},
    {"deepep_low_latency", A2A_LAYOUT_EXPERT_PADDED, A2A_QUANT_FP8_F32_SCALES},
};
enum { NUM_STRATEGIES = sizeof STRATEGIES / sizeof STRATEGIES[0] };

/* Expert blocks start at multiples of this, as the tiles of a grouped GEMM want it. EXPERT_CONTIGUOUS only. */
enum { ALIGNMENT = 16 };

/* What a rank process tells the parent: one of these, through its standard output. */
struct report {
    int failed;
    char message[1000];
    double dispatch_us, combine_us; /* medians over the steps */
    uint64_t moved, remote;         /* bytes of one step */
    double error;                   /* worst of this rank's tokens */
};

/* ---------------------------------------------------------------------------------------------- a rank's failures */

static void send_report(const struct report *report)
{
    if (write(STDOUT_FILENO, report, sizeof *report) != (ssize_t)sizeof *report) _exit(2);
}

static void fail(const char *format, ...)
{
    struct report report;
    va_list arguments;
    memset(&report, 0, sizeof report);
    report.failed = 1;
    va_start(arguments, format);
    vsnprintf(report.message, sizeof report.message, format, arguments);
    va_end(arguments);
    send_report(&report);
    exit(1);
}

/* Every liba2a call returns a status, and a2a_last_error() holds the sentence that explains it. */
#define CHECK(call)                                                                          \
    do {                                                                                     \
        a2a_status_t status_ = (call);                                                       \
        if (status_ != A2A_SUCCESS) fail("%s: %s", a2a_status_name(status_), a2a_last_error()); \
    } while (0)

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size); /* aligned to 16 bytes, as rows of tokens must be */
    if (memory == NULL) fail("no memory for %zu times %zu bytes", count, size);
    return memory;
}

/* ------------------------------------------------------------------------------------------------------- numbers */

static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* round to nearest even */
}

static float from_bf16(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* e4m3: a sign, 4 bits of exponent (bias 7, 0 for subnormals), 3 of mantissa. */
static float from_e4m3(uint8_t value)
{
    int exponent = (value >> 3) & 15, mantissa = value & 7;
    float size = exponent == 0 ? ldexpf((float)mantissa, -9) : ldexpf((float)(8 + mantissa), exponent - 10);
    return value & 0x80 ? -size : size;
}

/* Uniform in [-1, 1): the same seed gives the same numbers in every process. */
static float uniform(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (float)(int32_t)((z ^ (z >> 31)) >> 32) / 2147483648.0f;
}

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof *values, by_value);
    return values[count / 2];
}

/* ------------------------------------------------------------------------------------------------------- routing */

/* The part of a recording that belongs to one rank. */
struct routing {
    int topk, num_experts;
    int32_t *ids;   /* [tokens][topk] global expert ids */
    float *weights; /* [tokens][topk] */
};

static struct routing read_routing(const char *directory, const char *name, int first, int tokens)
{
    char path[4096], head[56];
    int32_t recorded, topk, num_experts;
    struct routing routing;
    size_t count;
    int16_t *ids;
    FILE *file;

    snprintf(path, sizeof path, "%s/%s", directory, name);
    if ((file = fopen(path, "rb")) == NULL) fail("%s: %s", path, strerror(errno));
    if (fread(head, sizeof head, 1, file) != 1 || memcmp(head, "A2AROUT1", 8) != 0) fail("%s is no recording", path);
    memcpy(&recorded, head + 8, 4);
    memcpy(&topk, head + 12, 4);
    memcpy(&num_experts, head + 16, 4);
    if (topk < 1 || num_experts < 1 || first + tokens > recorded) {
        fail("%s has %d tokens, top-k %d, %d experts; token %d is asked for", path, recorded, topk, num_experts,
             first + tokens);
    }

    count = (size_t)tokens * (size_t)topk;
    ids = allocate(count, sizeof *ids);
    routing.topk = topk;
    routing.num_experts = num_experts;
    routing.ids = allocate(count, sizeof *routing.ids);
    routing.weights = allocate(count, sizeof *routing.weights);
    if (fseek(file, 56 + 2L * first * topk, SEEK_SET) != 0 || fread(ids, 2, count, file) != count ||
        fseek(file, 56 + 2L * recorded * topk + 4L * first * topk, SEEK_SET) != 0 ||
        fread(routing.weights, 4, count, file) != count) {
        fail("%s is cut off", path);
    }
    for (size_t i = 0; i < count; i++) routing.ids[i] = ids[i];
    free(ids);
    fclose(file);
    return routing;
}

/* ------------------------------------------------------------------------------------------------------- experts */

/* A SwiGLU expert. Its weights follow from its number alone, so any process can make it. */
struct expert {
    float gate[HIDDEN][FFN], up[HIDDEN][FFN], down[FFN][HIDDEN];
};

static void make_expert(struct expert *expert, int number)
{
    uint64_t state = 1000u + (uint64_t)number;
    for (int i = 0; i < HIDDEN; i++) {
        for (int j = 0; j < FFN; j++) {
            expert->gate[i][j] = uniform(&state) * 0.125f;
            expert->up[i][j] = uniform(&state) * 0.125f;
            expert->down[j][i] = uniform(&state) * 0.25f;
        }
    }
}

static void apply_expert(const struct expert *expert, const float token[HIDDEN], float result[HIDDEN])
{
    float gate[FFN] = {0}, up[FFN] = {0};
    for (int i = 0; i < HIDDEN; i++) {
        for (int j = 0; j < FFN; j++) gate[j] += token[i] * expert->gate[i][j];
        for (int j = 0; j < FFN; j++) up[j] += token[i] * expert->up[i][j];
    }
    memset(result, 0, HIDDEN * sizeof *result);
    for (int j = 0; j < FFN; j++) {
        float h = gate[j] / (1.0f + expf(-gate[j])) * up[j];
        for (int i = 0; i < HIDDEN; i++) result[i] += h * expert->down[j][i];
    }
}

/* The layer without liba2a: every expert that some token chose is made, used and forgotten. Sums in double. */
static void compute_alone(const uint16_t *tokens, int count, const struct routing *routing, double *result)
{
    struct expert *expert = allocate(1, sizeof *expert);
    float x[HIDDEN], y[HIDDEN];
    memset(result, 0, (size_t)count * HIDDEN * sizeof *result);
    for (int number = 0; number < routing->num_experts; number++) {
        int made = 0;
        for (int choice = 0; choice < count * routing->topk; choice++) {
            int token = choice / routing->topk;
            if (routing->ids[choice] != number) continue;
            if (!made) make_expert(expert, number);
            made = 1;
            for (int i = 0; i < HIDDEN; i++) x[i] = from_bf16(tokens[token * HIDDEN + i]);
            apply_expert(expert, x, y);
            for (int i = 0; i < HIDDEN; i++) {
                result[token * HIDDEN + i] += (double)routing->weights[choice] * (double)y[i];
            }
        }
    }
    free(expert);
}

/* The worst row: its largest difference, relative to its largest element. */
static double compare(const float *got, const double *wanted, int tokens)
{
    double worst = 0;
    for (int token = 0; token < tokens; token++) {
        double difference = 0, largest = 1e-30;
        for (int i = token * HIDDEN; i < (token + 1) * HIDDEN; i++) {
            if (!isfinite(got[i])) return INFINITY;
            difference = fmax(difference, fabs((double)got[i] - wanted[i]));
            largest = fmax(largest, fabs(wanted[i]));
        }
        worst = fmax(worst, difference / largest);
    }
    return worst;
}

/* ------------------------------------------------------------------------------------------------------- tensors */

static const a2a_tensor_dtype_t BF16 = {4, 16, 1}, F32 = {2, 32, 1}, INT32 = {0, 32, 1}; /* DLPack's codes */

/* An output without data: liba2a makes it a view of what arrived, and nothing is copied. */
static const a2a_tensor_t VIEW;

/* A dense [rows, columns] matrix of ours, as liba2a takes it. */
struct matrix {
    a2a_tensor_t tensor;
    int64_t shape[2], strides[2];
};

static void matrix_of(struct matrix *matrix, void *data, a2a_tensor_dtype_t dtype, int64_t rows, int64_t columns)
{
    memset(matrix, 0, sizeof *matrix);
    matrix->shape[0] = rows;
    matrix->shape[1] = matrix->strides[0] = columns;
    matrix->strides[1] = 1;
    matrix->tensor.data = data;
    matrix->tensor.device.device_type = A2A_DEVICE_CPU;
    matrix->tensor.ndim = 2;
    matrix->tensor.dtype = dtype;
    matrix->tensor.shape = matrix->shape;
    matrix->tensor.strides = matrix->strides;
}

/* Views that liba2a hands out are [rows, n], or [blocks, rows of a block, n] where the layout has a block for each rank
 * (RANK_MAJOR) or expert (EXPERT_PADDED), and may be strided. */
static int64_t rows_of(const a2a_tensor_t *view)
{
    return view->ndim == 3 ? view->shape[0] * view->shape[1] : view->shape[0];
}

static void *row_of(const a2a_tensor_t *view, int64_t row)
{
    int64_t element = row * view->strides[0];
    if (view->ndim == 3) {
        element = row / view->shape[1] * view->strides[0] + row % view->shape[1] * view->strides[1];
    }
    return (char *)view->data + view->byte_offset + element * (view->dtype.bits / 8);
}

/* ---------------------------------------------------------------------------------------------------- the rank */

/* Rows that stand together. */
struct block {
    int64_t first, rows;
};

static int is_by_expert(a2a_layout_t layout)
{
    return layout == A2A_LAYOUT_EXPERT_PADDED || layout == A2A_LAYOUT_EXPERT_CONTIGUOUS;
}

/* What a rank received: a block for each of its experts, or one with all rows. Returns how many. */
static int blocks_of(const a2a_info_t *info, const a2a_dispatch_out_t *got, struct block *blocks)
{
    if (!is_by_expert(info->layout)) {
        blocks[0].first = 0;
        blocks[0].rows = rows_of(got->tokens);
        return 1;
    }
    for (int local = 0; local < info->num_local_experts; local++) {
        blocks[local].first = *(int32_t *)row_of(got->expert_offsets, local);
        blocks[local].rows = *(int32_t *)row_of(got->expert_counts, local);
    }
    return info->num_local_experts;
}

/* A token as it arrived: bf16, or e4m3 with a scale for each 128 columns. */
static void read_token(const a2a_dispatch_out_t *got, int64_t row, float x[HIDDEN])
{
    if (got->scales == NULL) {
        const uint16_t *token = row_of(got->tokens, row);
        for (int i = 0; i < HIDDEN; i++) x[i] = from_bf16(token[i]);
    } else {
        const uint8_t *token = row_of(got->tokens, row);
        const float *scales = row_of(got->scales, row);
        for (int i = 0; i < HIDDEN; i++) x[i] = from_e4m3(token[i]) * scales[i / 128];
    }
}

/* EXPERT_* layouts: each expert has its own rows. Combine applies the weights. */
static void run_by_expert(const struct expert *experts, const a2a_dispatch_out_t *got, const struct block *blocks,
                          int count, const a2a_tensor_t *results)
{
    float x[HIDDEN];
    for (int local = 0; local < count; local++) {
        for (int64_t row = blocks[local].first; row < blocks[local].first + blocks[local].rows; row++) {
            read_token(got, row, x);
            apply_expert(&experts[local], x, row_of(results, row));
        }
    }
}

/* The other layouts: a row lists all its token's experts, and the rank sums over its own, weighted; those of other
 * ranks are theirs to compute. Rows with none of ours (past the counts, or gathered for others) are not read by combine
 * and need not be written. */
static void run_by_row(const struct expert *experts, const a2a_info_t *info, const a2a_dispatch_out_t *got,
                       const a2a_tensor_t *results)
{
    int64_t topk = got->topk_ids->shape[got->topk_ids->ndim - 1];
    float x[HIDDEN], y[HIDDEN], sum[HIDDEN];
    for (int64_t row = 0; row < rows_of(got->tokens); row++) {
        const int32_t *ids = row_of(got->topk_ids, row);
        const float *weights = row_of(got->topk_weights, row);
        int ours = 0;
        memset(sum, 0, sizeof sum);
        for (int64_t k = 0; k < topk; k++) {
            int local = ids[k] - info->first_expert;
            if (ids[k] < 0 || local < 0 || local >= info->num_local_experts) continue;
            if (!ours) read_token(got, row, x);
            ours = 1;
            apply_expert(&experts[local], x, y);
            for (int i = 0; i < HIDDEN; i++) sum[i] += weights[k] * y[i];
        }
        if (ours) memcpy(row_of(results, row), sum, sizeof sum);
    }
}

static void run_rank(int rank, const struct load *load, const struct strategy *strategy, int steps,
                     const a2a_unique_id_t *id, const char *directory)
{
    int tokens = load->tokens[rank], first = 0, max_tokens = 0;
    double dispatch_us[STEPS], combine_us[STEPS];
    struct report report;
    memset(&report, 0, sizeof report);

    for (int r = 0; r < RANKS; r++) {
        if (r < rank) first += load->tokens[r];
        if (load->tokens[r] > max_tokens) max_tokens = load->tokens[r];
    }

    /* The model's side: routing, tokens, room for the results. */
    struct routing routed = read_routing(directory, load->file, first, tokens);
    size_t elements = (size_t)tokens * HIDDEN;
    uint16_t *x = allocate(elements, sizeof *x);
    float *y = allocate(elements, sizeof *y), *y_first = allocate(elements, sizeof *y_first);
    uint64_t seed = 7u + (uint64_t)first * HIDDEN;
    for (size_t i = 0; i < elements; i++) x[i] = to_bf16(uniform(&seed));

    /* Once per engine: the comm, and one routing per layer. */
    a2a_config_t config;
    CHECK(a2a_config_init(&config, sizeof config));
    config.rank = rank;
    config.num_ranks = RANKS;
    config.backend = a2a_backend_from_name(strategy->backend);
    config.layout = strategy->layout;
    config.quant = strategy->quant;
    if (strategy->layout == A2A_LAYOUT_EXPERT_CONTIGUOUS) config.expert_alignment = ALIGNMENT;
    config.num_experts = routed.num_experts;
    config.max_topk = routed.topk;
    config.max_hidden = HIDDEN;
    config.max_tokens = max_tokens;
    config.token_dtype = A2A_DTYPE_BF16;
    config.combine_dtype = A2A_DTYPE_F32;
    config.setup_timeout_ms = config.first_step_timeout_ms = config.timeout_ms = CALL_MS;
    config.unique_id = *id;

    a2a_comm_t *comm;
    a2a_routing_t *routing;
    a2a_info_t info;
    CHECK(a2a_create(&config, &comm));
    CHECK(a2a_routing_create(comm, 0, &routing));
    info.struct_size = sizeof info;
    CHECK(a2a_get_info(comm, &info));

    struct expert *experts = allocate((size_t)info.num_local_experts, sizeof *experts);
    for (int i = 0; i < info.num_local_experts; i++) make_expert(&experts[i], info.first_expert + i);

    struct matrix x_matrix, ids_matrix, weights_matrix, y_matrix;
    matrix_of(&x_matrix, x, BF16, tokens, HIDDEN);
    matrix_of(&ids_matrix, routed.ids, INT32, tokens, routed.topk);
    matrix_of(&weights_matrix, routed.weights, F32, tokens, routed.topk);
    matrix_of(&y_matrix, y, F32, tokens, HIDDEN);

    /* NVLINK_TWO_SIDED keeps no rows: they go to tensors of ours, with room for all that may come. The other strategies
     * have them in their windows and show them as views. */
    int ours = info.backend == A2A_BACKEND_NVLINK_TWO_SIDED;
    struct matrix our_tokens, our_ids, our_weights, our_results;
    if (ours) {
        size_t rows = (size_t)info.row_capacity, topk = (size_t)routed.topk;
        matrix_of(&our_tokens, allocate(rows * HIDDEN, sizeof *x), BF16, info.row_capacity, HIDDEN);
        matrix_of(&our_ids, allocate(rows * topk, sizeof(int32_t)), INT32, info.row_capacity, routed.topk);
        matrix_of(&our_weights, allocate(rows * topk, sizeof(float)), F32, info.row_capacity, routed.topk);
        matrix_of(&our_results, allocate(rows * HIDDEN, sizeof(float)), F32, info.row_capacity, HIDDEN);
    }

    /* The first step is the checked one. The others replay its expert outputs, so that the times hold the moving of
     * rows and not the waiting for the rank with most work, and must give the same bits. */
    float *kept = NULL;
    struct block *blocks = allocate((size_t)info.num_local_experts + 1, sizeof *blocks);
    for (int step = 0; step < steps; step++) {
        a2a_tensor_t tokens_view = VIEW, scales_view = VIEW, ids_view = VIEW, weights_view = VIEW;
        a2a_tensor_t counts_view = VIEW, offsets_view = VIEW, results_view = VIEW;

        a2a_dispatch_in_t in;
        memset(&in, 0, sizeof in);
        in.struct_size = sizeof in;
        in.tokens = &x_matrix.tensor;
        in.topk_ids = &ids_matrix.tensor;
        in.topk_weights = &weights_matrix.tensor;

        /* What is not wanted stays NULL. */
        a2a_dispatch_out_t got;
        memset(&got, 0, sizeof got);
        got.struct_size = sizeof got;
        got.tokens = ours ? &our_tokens.tensor : &tokens_view;
        if (strategy->quant != A2A_QUANT_NONE) got.scales = &scales_view;
        if (is_by_expert(info.layout)) {
            got.expert_counts = &counts_view;
            got.expert_offsets = &offsets_view;
        } else {
            got.topk_ids = ours ? &our_ids.tensor : &ids_view;
            got.topk_weights = ours ? &our_weights.tensor : &weights_view;
        }

        double start = now_us();
        CHECK(a2a_dispatch(comm, routing, &in, &got, NULL));
        dispatch_us[step] = now_us() - start;

        /* The experts write where combine reads: nothing is copied here either. */
        const a2a_tensor_t *results = ours ? &our_results.tensor : &results_view;
        if (!ours) CHECK(a2a_combine_buffer(comm, routing, &results_view));
        int count = blocks_of(&info, &got, blocks);
        if (step == 0) {
            if (is_by_expert(info.layout)) run_by_expert(experts, &got, blocks, count, results);
            else run_by_row(experts, &info, &got, results);
            kept = allocate((size_t)rows_of(results) * HIDDEN, sizeof *kept);
        }
        for (int b = 0; b < count; b++) {
            for (int64_t row = blocks[b].first; row < blocks[b].first + blocks[b].rows; row++) {
                float *result = row_of(results, row), *copy = kept + row * HIDDEN;
                memcpy(step == 0 ? copy : result, step == 0 ? result : copy, HIDDEN * sizeof(float));
            }
        }

        a2a_combine_in_t combine_in;
        memset(&combine_in, 0, sizeof combine_in);
        combine_in.struct_size = sizeof combine_in;
        combine_in.tokens = results;

        a2a_combine_out_t combine_out;
        memset(&combine_out, 0, sizeof combine_out);
        combine_out.struct_size = sizeof combine_out;
        combine_out.tokens = &y_matrix.tensor;

        start = now_us();
        CHECK(a2a_combine(comm, routing, &combine_in, &combine_out, NULL));
        combine_us[step] = now_us() - start;

        if (step == 0) {
            a2a_stats_t stats;
            stats.struct_size = sizeof stats;
            CHECK(a2a_get_stats(comm, &stats));
            report.moved = stats.bytes_pushed + stats.bytes_pulled + stats.bytes_gathered + stats.bytes_fifo;
            report.remote = stats.bytes_remote;
            memcpy(y_first, y, elements * sizeof *y);
        } else if (memcmp(y_first, y, elements * sizeof *y) != 0) {
            fail("step %d gave other bits than the first", step);
        }
    }
    CHECK(a2a_routing_destroy(routing));
    CHECK(a2a_destroy(comm));

    double *wanted = allocate(elements, sizeof *wanted);
    compute_alone(x, tokens, &routed, wanted);
    report.error = compare(y_first, wanted, tokens);
    report.dispatch_us = median(dispatch_us, steps);
    report.combine_us = median(combine_us, steps);
    send_report(&report);

    if (ours) {
        free(our_tokens.tensor.data), free(our_ids.tensor.data), free(our_weights.tensor.data);
        free(our_results.tensor.data);
    }
    free(wanted), free(blocks), free(kept), free(experts), free(y_first), free(y), free(x);
    free(routed.ids), free(routed.weights);
}

/* --------------------------------------------------------------------------------------------------- the parent */

static void give_up(const char *what)
{
    fflush(stderr);
    printf("FAIL: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* Starts this program again as one rank. Its standard output becomes the pipe whose reading end is returned. */
static pid_t start_rank(int rank, int load, int strategy, int steps, const char *directory, int *from)
{
    extern char **environ;
    char numbers[4][12];
    int ends[2], error;
    posix_spawn_file_actions_t actions;
    pid_t pid;

    snprintf(numbers[0], sizeof numbers[0], "%d", rank);
    snprintf(numbers[1], sizeof numbers[1], "%d", load);
    snprintf(numbers[2], sizeof numbers[2], "%d", strategy);
    snprintf(numbers[3], sizeof numbers[3], "%d", steps);
    char *const arguments[] = {"moe_layer", "--rank",   numbers[0], numbers[1], numbers[2],
                               numbers[3],  (char *)directory, NULL};

    if (pipe(ends) != 0) give_up("pipe");
    /* No other rank may hold this pipe open: its end of file is how a death shows. */
    fcntl(ends[0], F_SETFD, FD_CLOEXEC);
    fcntl(ends[1], F_SETFD, FD_CLOEXEC);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    if ((error = posix_spawn(&pid, "/proc/self/exe", &actions, NULL, arguments, environ)) != 0) {
        errno = error;
        give_up("posix_spawn");
    }
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    *from = ends[0];
    return pid;
}

/* The ranks that run. */
static pid_t pids[RANKS];

/* Waits for a rank's report and its end. */
static void await_rank(int rank, int from, struct report *report)
{
    size_t have = 0;
    ssize_t got;
    int status;
    memset(report, 0, sizeof *report);
    while (have < sizeof *report && (got = read(from, (char *)report + have, sizeof *report - have)) != 0) {
        if (got > 0) have += (size_t)got;
        else if (errno != EINTR) break;
    }
    close(from);
    while (waitpid(pids[rank], &status, 0) < 0 && errno == EINTR) continue;
    pids[rank] = 0;
    if (have == sizeof *report && report->failed) return;
    if (WIFSIGNALED(status)) {
        snprintf(report->message, sizeof report->message, "killed by signal %d", WTERMSIG(status));
    } else if (WEXITSTATUS(status) != 0 || have < sizeof *report) {
        snprintf(report->message, sizeof report->message, "ended with status %d, no report", WEXITSTATUS(status));
    } else {
        return;
    }
    report->failed = 1;
}

static const char *layout_name(a2a_layout_t layout)
{
    static const char *const names[] = {"AUTO", "GATHERED",      "RANK_MAJOR",
                                        "FLAT", "EXPERT_PADDED", "EXPERT_CONTIGUOUS"};
    return names[layout];
}

static double limit_of(const struct strategy *strategy)
{
    return strategy->quant == A2A_QUANT_NONE ? LIMIT : FP8_LIMIT;
}

/* Runs one layer on RANKS processes and prints its line of the table. Returns its worst error, or -1. */
static double run_layer(int load, int number, int steps, const char *directory)
{
    const struct strategy *strategy = &STRATEGIES[number];
    struct report reports[RANKS], all;
    a2a_unique_id_t id;
    char hex[2 * sizeof id.bytes + 1];
    int pipes[RANKS], tokens = 0;

    /* The id names the group: one process makes it, every rank gets a copy by any means. It is a secret, so not by
     * the command line, which every user of the host can read. */
    if (a2a_get_unique_id(&id) != A2A_SUCCESS) {
        printf("FAIL: %s\n", a2a_last_error());
        exit(1);
    }
    for (size_t i = 0; i < sizeof id.bytes; i++) snprintf(hex + 2 * i, 3, "%02x", id.bytes[i]);
    setenv("MOE_LAYER_ID", hex, 1);

    for (int rank = 0; rank < RANKS; rank++) {
        pids[rank] = start_rank(rank, load, number, steps, directory, &pipes[rank]);
    }
    memset(&all, 0, sizeof all);
    for (int rank = 0; rank < RANKS; rank++) {
        struct report *report = &reports[rank];
        await_rank(rank, pipes[rank], report);
        if (report->failed) {
            printf("%s on %s, rank %d: %s\n", LOADS[load].name, strategy->backend, rank, report->message);
        }
        all.failed |= report->failed;
        all.dispatch_us = fmax(all.dispatch_us, report->dispatch_us);
        all.combine_us = fmax(all.combine_us, report->combine_us);
        all.error = fmax(all.error, report->error);
        all.moved += report->moved;
        all.remote += report->remote;
        tokens += LOADS[load].tokens[rank];
    }
    if (all.failed) return -1;
    printf("%-18s %-28s %-18s %-5s %6d %9.0f %9.0f %8.2f %8.2f   %.1e%s\n", LOADS[load].name, strategy->backend,
           layout_name(strategy->layout), strategy->quant == A2A_QUANT_NONE ? "bf16" : "fp8", tokens,
           all.dispatch_us, all.combine_us, (double)all.moved / 1048576, (double)all.remote / 1048576, all.error,
           all.error <= limit_of(strategy) ? "" : "  WRONG");
    fflush(stdout);
    return all.error;
}

static void out_of_time(int signal)
{
    static const char text[] = "FAIL: the ranks did not end in time\n";
    (void)signal;
    for (int rank = 0; rank < RANKS; rank++) {
        if (pids[rank] > 0) kill(pids[rank], SIGKILL);
    }
    if (write(STDOUT_FILENO, text, sizeof text - 1) < 0) _exit(2);
    _exit(1);
}

static void read_id(const char *hex, a2a_unique_id_t *id)
{
    for (size_t i = 0; i < sizeof id->bytes; i++) {
        unsigned byte;
        if (hex == NULL || sscanf(hex + 2 * i, "%2x", &byte) != 1) fail("MOE_LAYER_ID is not a unique id");
        id->bytes[i] = (uint8_t)byte;
    }
}

int main(int argc, char **argv)
{
    if (argc == 7 && strcmp(argv[1], "--rank") == 0) {
        a2a_unique_id_t id;
        alarm(PROCESS_SECONDS);
        read_id(getenv("MOE_LAYER_ID"), &id);
        run_rank(atoi(argv[2]), &LOADS[atoi(argv[3])], &STRATEGIES[atoi(argv[4])], atoi(argv[5]), &id, argv[6]);
        return 0;
    }

    int quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    const char *directory = argc > 1 + quick ? argv[1 + quick] : "tests/data";
    int loads = quick ? QUICK_LOADS : ALL_LOADS, steps = quick ? QUICK_STEPS : STEPS;
    int layers = 0, wrong = 0, lost = 0;
    double worst[2] = {0, 0}; /* bf16, fp8 */
    char summary[128];

    signal(SIGALRM, out_of_time);
    printf("liba2a %s: a mixture-of-experts layer over %d rank processes on %ld CPUs, against one process\n"
           "hidden %d, bf16 tokens (wire fp8: dispatch quantises them), float32 results;\n"
           "times: median of %d steps, slowest rank;\n"
           "MiB: rows of one step, all ranks (remote: those that crossed between ranks)\n\n",
           a2a_version(), RANKS, sysconf(_SC_NPROCESSORS_ONLN), HIDDEN, steps);
    printf("%-18s %-28s %-18s %-5s %6s %9s %9s %8s %8s   %s\n", "load", "backend", "layout", "wire", "tokens",
           "disp. us", "comb. us", "MiB", "remote", "error");

    for (int load = 0; load < loads; load++) {
        for (int number = 0; number < NUM_STRATEGIES && !lost; number++) {
            int is_fp8 = STRATEGIES[number].quant != A2A_QUANT_NONE;
            alarm(PROCESS_SECONDS + 10);
            double error = run_layer(load, number, steps, directory);
            layers++;
            lost = error < 0; /* the next layers would only say the same */
            wrong += error > limit_of(&STRATEGIES[number]);
            worst[is_fp8] = fmax(worst[is_fp8], error);
        }
    }

    snprintf(summary, sizeof summary, "worst error %.1e, limit %.0e; fp8 %.1e, limit %.1e", worst[0], LIMIT, worst[1],
             FP8_LIMIT);
    if (lost) {
        printf("\nFAIL: layer %d ended with a failed rank\n", layers);
    } else if (wrong) {
        printf("\nFAIL: %d of %d layers differ from one process (%s)\n", wrong, layers, summary);
    } else {
        printf("\nPASS: %d layers over %d rank processes agree with one process (%s)\n", layers, RANKS, summary);
    }
    return lost || wrong;
}
