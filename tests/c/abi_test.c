/*
 * The C ABI as a caller meets it: every function, every struct, every refusal, on one rank and on two that are
 * threads. What the library computes is tests/conformance's; here each call must do what a2a.h says or refuse with
 * a status and a sentence that names the argument.
 *
 * Compiled as C11 and as C++17. Prints each test's name and "ok" or "FAIL"; the exit status is 0 if all passed.
 */
#define _POSIX_C_SOURCE 200809L

#include <a2a.h>
#include <arpa/inet.h>
#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------ what tests use */

static int test_failed;

#define CHECK(condition)                                             \
    do {                                                             \
        if (!(condition)) {                                          \
            printf("    line %d: not %s\n", __LINE__, #condition);   \
            test_failed = 1;                                         \
        }                                                            \
    } while (0)

/* The call succeeds. */
#define OK(call) expect((call), A2A_SUCCESS, NULL, #call, __LINE__)
/* The call is refused with this status and a sentence that holds this word. */
#define REFUSED(call, status, word) expect((call), (status), (word), #call, __LINE__)

static void expect(a2a_status_t got, a2a_status_t wanted, const char *word, const char *call, int line)
{
    const char *text = got == A2A_SUCCESS ? "" : a2a_last_error();
    if (got == wanted && (word == NULL || strstr(text, word) != NULL)) return;
    printf("    line %d: %s\n        is %s (%s)\n        not %s%s%s\n", line, call, a2a_status_name(got), text,
           a2a_status_name(wanted), word ? ", naming " : "", word ? word : "");
    test_failed = 1;
}

static double now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

static void sleep_ms(long ms)
{
    struct timespec pause;
    pause.tv_sec = ms / 1000;
    pause.tv_nsec = ms % 1000 * 1000000;
    nanosleep(&pause, NULL);
}

/* Two experts a token, four experts, float32 rows of 64. */
enum { TOKENS = 6, MAX_TOKENS = 8, TOPK = 2, EXPERTS = 4, HIDDEN = 64 };

static a2a_config_t config_of(int32_t rank, int32_t num_ranks)
{
    a2a_config_t config;
    OK(a2a_config_init(&config, sizeof config));
    config.rank = rank;
    config.num_ranks = num_ranks;
    config.num_experts = EXPERTS;
    config.max_topk = TOPK;
    config.max_hidden = HIDDEN;
    config.max_tokens = MAX_TOKENS;
    config.token_dtype = A2A_DTYPE_F32;
    config.setup_timeout_ms = config.first_step_timeout_ms = config.timeout_ms = 20000;
    return config;
}

/* A dense tensor of at most two dimensions. */
struct matrix {
    a2a_tensor_t tensor;
    int64_t shape[2];
};

static void matrix_of(struct matrix *matrix, void *data, uint8_t code, uint8_t bits, int64_t rows, int64_t columns)
{
    memset(matrix, 0, sizeof *matrix);
    matrix->shape[0] = rows;
    matrix->shape[1] = columns;
    matrix->tensor.data = data;
    matrix->tensor.device.device_type = A2A_DEVICE_CPU;
    matrix->tensor.ndim = 2;
    matrix->tensor.dtype.code = code;
    matrix->tensor.dtype.bits = bits;
    matrix->tensor.dtype.lanes = 1;
    matrix->tensor.shape = matrix->shape;
}

/* One rank with a routing, and the arguments of a step that works. */
struct rank {
    a2a_config_t config;
    a2a_comm_t *comm;
    a2a_routing_t *routing;
    float *tokens, *sums; /* [TOKENS][HIDDEN] */
    int32_t ids[TOKENS][TOPK];
    float weights[TOKENS][TOPK];
    struct matrix tokens_matrix, ids_matrix, weights_matrix, sums_matrix;
    a2a_info_t info;
    a2a_tensor_t rows; /* the view that dispatch gives */
    float *own_rows;   /* what NVLINK_TWO_SIDED has instead: [row_capacity][HIDDEN], ours */
    struct matrix own_matrix;
    a2a_tensor_t buffer;
    a2a_dispatch_in_t dispatch_in;
    a2a_dispatch_out_t dispatch_out;
    a2a_combine_in_t combine_in;
    a2a_combine_out_t combine_out;
    a2a_status_t status; /* of what its thread did */
    char error[1024];
    double ms;
};

static struct rank *rank_of(const a2a_config_t *config)
{
    struct rank *rank = (struct rank *)calloc(1, sizeof *rank);
    rank->config = *config;
    rank->tokens = (float *)aligned_alloc(64, TOKENS * HIDDEN * sizeof(float));
    rank->sums = (float *)aligned_alloc(64, TOKENS * HIDDEN * sizeof(float));
    for (int i = 0; i < TOKENS * HIDDEN; i++) rank->tokens[i] = (float)(1000 * config->rank + i);
    for (int t = 0; t < TOKENS; t++) {
        for (int k = 0; k < TOPK; k++) {
            rank->ids[t][k] = (t + k) % EXPERTS;
            rank->weights[t][k] = 0.5f;
        }
    }
    matrix_of(&rank->tokens_matrix, rank->tokens, 2, 32, TOKENS, HIDDEN);
    matrix_of(&rank->ids_matrix, rank->ids, 0, 32, TOKENS, TOPK);
    matrix_of(&rank->weights_matrix, rank->weights, 2, 32, TOKENS, TOPK);
    matrix_of(&rank->sums_matrix, rank->sums, 2, 32, TOKENS, HIDDEN);

    rank->dispatch_in.struct_size = sizeof rank->dispatch_in;
    rank->dispatch_in.tokens = &rank->tokens_matrix.tensor;
    rank->dispatch_in.topk_ids = &rank->ids_matrix.tensor;
    rank->dispatch_in.topk_weights = &rank->weights_matrix.tensor;
    rank->dispatch_out.struct_size = sizeof rank->dispatch_out;
    rank->dispatch_out.tokens = &rank->rows;
    rank->combine_in.struct_size = sizeof rank->combine_in;
    rank->combine_in.tokens = &rank->buffer;
    rank->combine_out.struct_size = sizeof rank->combine_out;
    rank->combine_out.tokens = &rank->sums_matrix.tensor;
    return rank;
}

static a2a_status_t open_rank(struct rank *rank)
{
    a2a_status_t status = a2a_create(&rank->config, &rank->comm);
    if (status == A2A_SUCCESS) status = a2a_routing_create(rank->comm, 0, &rank->routing);
    if (status != A2A_SUCCESS) return status;
    rank->info.struct_size = sizeof rank->info;
    status = a2a_get_info(rank->comm, &rank->info);
    if (rank->info.backend == A2A_BACKEND_NVLINK_TWO_SIDED) {
        size_t rows = (size_t)rank->info.row_capacity;
        rank->own_rows = (float *)aligned_alloc(64, rows * HIDDEN * sizeof(float));
        matrix_of(&rank->own_matrix, rank->own_rows, 2, 32, (int64_t)rows, HIDDEN);
        rank->dispatch_out.tokens = &rank->own_matrix.tensor;
        rank->combine_in.tokens = &rank->own_matrix.tensor;
    }
    return status;
}

static void close_rank(struct rank *rank)
{
    OK(a2a_destroy(rank->comm));
    OK(a2a_routing_destroy(rank->routing));
    free(rank->tokens);
    free(rank->sums);
    free(rank->own_rows);
    free(rank);
}

static struct rank *open_with(const a2a_config_t *config)
{
    struct rank *rank = rank_of(config);
    OK(open_rank(rank));
    return rank;
}

static struct rank *open_alone(void)
{
    a2a_config_t config = config_of(0, 1);
    return open_with(&config);
}

/* Every backend with every layout that it offers. */
static const struct pair {
    a2a_backend_t backend;
    a2a_layout_t layout;
    int64_t capacity; /* rows that one rank alone may receive */
} PAIRS[] = {
    {A2A_BACKEND_ALLGATHER_REDUCESCATTER, A2A_LAYOUT_GATHERED, MAX_TOKENS},
    {A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_RANK_MAJOR, MAX_TOKENS},
    {A2A_BACKEND_NVLINK_TWO_SIDED, A2A_LAYOUT_FLAT, MAX_TOKENS},
    {A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT, MAX_TOKENS},
    {A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_CONTIGUOUS, TOPK * MAX_TOKENS},
    {A2A_BACKEND_LOW_LATENCY, A2A_LAYOUT_EXPERT_PADDED, EXPERTS * MAX_TOKENS},
};
enum { NUM_PAIRS = sizeof PAIRS / sizeof PAIRS[0] };

static a2a_config_t config_of_pair(const struct pair *pair)
{
    a2a_config_t config = config_of(0, 1);
    config.backend = pair->backend;
    config.layout = pair->layout;
    return config;
}

static int is_by_expert(a2a_layout_t layout)
{
    return layout == A2A_LAYOUT_EXPERT_PADDED || layout == A2A_LAYOUT_EXPERT_CONTIGUOUS;
}

static a2a_status_t dispatch(struct rank *rank)
{
    a2a_tensor_t before = rank->rows;
    a2a_status_t status;
    memset(&rank->rows, 0, sizeof rank->rows);
    status = a2a_dispatch(rank->comm, rank->routing, &rank->dispatch_in, &rank->dispatch_out, NULL);
    if (status != A2A_SUCCESS) {
        CHECK(rank->rows.data == NULL && rank->rows.shape == NULL); /* results are written on success only */
        rank->rows = before;
    }
    return status;
}

static float *row_of(const a2a_tensor_t *view, int64_t row)
{
    int64_t element = row * view->strides[0];
    if (view->ndim == 3) element = row / view->shape[1] * view->strides[0] + row % view->shape[1] * view->strides[1];
    return (float *)(void *)((char *)view->data + view->byte_offset) + element;
}

/* Experts that give their rows back as they came. */
static a2a_status_t combine(struct rank *rank)
{
    a2a_status_t status;
    int64_t rows;
    if (rank->own_rows != NULL) {
        return a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL);
    }
    memset(&rank->buffer, 0, sizeof rank->buffer);
    status = a2a_combine_buffer(rank->comm, rank->routing, &rank->buffer);
    if (status != A2A_SUCCESS) return status;
    rows = rank->buffer.ndim == 3 ? rank->buffer.shape[0] * rank->buffer.shape[1] : rank->buffer.shape[0];
    for (int64_t row = 0; row < rows; row++) {
        memcpy(row_of(&rank->buffer, row), row_of(&rank->rows, row), HIDDEN * sizeof(float));
    }
    return a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL);
}

/* Runs a step's half or whole in a thread of its own; the status and the sentence are kept. */
static void *create_thread(void *argument)
{
    struct rank *rank = (struct rank *)argument;
    rank->status = open_rank(rank);
    snprintf(rank->error, sizeof rank->error, "%s", rank->status ? a2a_last_error() : "");
    return NULL;
}

static void *dispatch_thread(void *argument)
{
    struct rank *rank = (struct rank *)argument;
    double start = now_ms();
    do { /* the thread that watches for BUSY may itself be in the way for a moment */
        rank->status = dispatch(rank);
    } while (rank->status == A2A_BUSY);
    rank->ms = now_ms() - start;
    snprintf(rank->error, sizeof rank->error, "%s", rank->status ? a2a_last_error() : "");
    return NULL;
}

static void *step_thread(void *argument)
{
    struct rank *rank = (struct rank *)argument;
    dispatch_thread(rank);
    if (rank->status == A2A_SUCCESS) {
        rank->status = combine(rank);
        snprintf(rank->error, sizeof rank->error, "%s", rank->status ? a2a_last_error() : "");
    }
    return NULL;
}

/* A step in its four halves. */
static void *halves_thread(void *argument)
{
    struct rank *rank = (struct rank *)argument;
    rank->dispatch_in.phase = rank->combine_in.phase = A2A_PHASE_SEND;
    rank->status = a2a_dispatch(rank->comm, rank->routing, &rank->dispatch_in, NULL, NULL);
    rank->dispatch_in.phase = A2A_PHASE_RECV;
    if (rank->status == A2A_SUCCESS) rank->status = dispatch(rank);
    if (rank->status == A2A_SUCCESS) rank->status = combine(rank);
    rank->combine_in.phase = A2A_PHASE_RECV;
    if (rank->status == A2A_SUCCESS) {
        rank->status = a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL);
    }
    rank->dispatch_in.phase = rank->combine_in.phase = A2A_PHASE_BOTH;
    snprintf(rank->error, sizeof rank->error, "%s", rank->status ? a2a_last_error() : "");
    return NULL;
}

static pthread_t start(void *(*body)(void *), struct rank *rank)
{
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, body, rank) == 0);
    return thread;
}

/* The thread's work is done; it succeeded. */
static void join_ok(pthread_t thread, struct rank *rank)
{
    pthread_join(thread, NULL);
    if (rank->status != A2A_SUCCESS) printf("    rank %d: %s\n", rank->config.rank, rank->error);
    CHECK(rank->status == A2A_SUCCESS);
}

static void open_two(struct rank *ranks[2], const a2a_unique_id_t *id, a2a_backend_t backend, a2a_layout_t layout)
{
    pthread_t threads[2];
    for (int r = 0; r < 2; r++) {
        a2a_config_t config = config_of(r, 2);
        config.unique_id = *id;
        config.backend = backend;
        config.layout = layout;
        ranks[r] = rank_of(&config);
        threads[r] = start(create_thread, ranks[r]);
    }
    for (int r = 0; r < 2; r++) join_ok(threads[r], ranks[r]);
}

static void open_pair(struct rank *ranks[2])
{
    a2a_unique_id_t id;
    OK(a2a_get_unique_id(&id));
    open_two(ranks, &id, A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_RANK_MAJOR);
}

/* A step of two ranks whose experts do nothing gives each token once per rank that owns one of its experts; EXPERT_*
 * layouts weight and sum: half and half is the token. Each rank runs a body of its own. */
static void run_two(struct rank *ranks[2], void *(*first)(void *), void *(*second)(void *))
{
    pthread_t threads[2];
    for (int r = 0; r < 2; r++) memset(ranks[r]->sums, 0, TOKENS * HIDDEN * sizeof(float));
    threads[0] = start(first, ranks[0]);
    threads[1] = start(second, ranks[1]);
    for (int r = 0; r < 2; r++) join_ok(threads[r], ranks[r]);
    for (int r = 0; r < 2; r++) {
        for (int t = 0; t < TOKENS; t++) {
            float owners = ranks[r]->ids[t][0] / 2 == ranks[r]->ids[t][1] / 2 ? 1 : 2;
            if (is_by_expert(ranks[r]->info.layout)) owners = 1;
            CHECK(ranks[r]->sums[t * HIDDEN + 5] == owners * ranks[r]->tokens[t * HIDDEN + 5]);
        }
    }
}

static void step_of_two(struct rank *ranks[2])
{
    run_two(ranks, step_thread, step_thread);
}

static void wait_until_busy(struct rank *rank)
{
    double deadline = now_ms() + 10000;
    a2a_status_t status = A2A_SUCCESS;
    while (status == A2A_SUCCESS && now_ms() < deadline) {
        a2a_routing_t *probe = NULL;
        status = a2a_routing_create(rank->comm, 0, &probe);
        if (status == A2A_SUCCESS) OK(a2a_routing_destroy(probe));
        sleep_ms(1);
    }
    CHECK(status == A2A_BUSY);
}

/* ---------------------------------------------------------------------------------------------------------- texts */

static void test_version(void)
{
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", A2A_VERSION_MAJOR, A2A_VERSION_MINOR, A2A_VERSION_PATCH);
    CHECK(strcmp(version, A2A_VERSION) == 0);
    CHECK(strcmp(a2a_version(), A2A_VERSION) == 0);
}

static void test_status_names(void)
{
#define NAMED(status) CHECK(strcmp(a2a_status_name(status), #status) == 0)
    NAMED(A2A_SUCCESS);
    NAMED(A2A_INVALID_ARGUMENT);
    NAMED(A2A_UNSUPPORTED);
    NAMED(A2A_BUSY);
    NAMED(A2A_OUT_OF_MEMORY);
    NAMED(A2A_OVERFLOW);
    NAMED(A2A_SYSTEM_ERROR);
    NAMED(A2A_TIMEOUT);
    NAMED(A2A_PEER_LOST);
    NAMED(A2A_MISMATCH);
    NAMED(A2A_CUDA_ERROR);
    NAMED(A2A_NCCL_ERROR);
    NAMED(A2A_NIXL_ERROR);
    NAMED(A2A_ABORTED);
    NAMED(A2A_INTERNAL);
    CHECK(strcmp(a2a_status_name(-1), "unknown status") == 0);
    CHECK(strcmp(a2a_status_name(7), "unknown status") == 0);
    CHECK(strcmp(a2a_status_name(INT32_MAX), "unknown status") == 0);
}

static void test_backend_names(void)
{
    static const struct {
        const char *name;
        a2a_backend_t backend;
    } names[] = {
        {"auto", A2A_BACKEND_AUTO},
        {"allgather_reducescatter", A2A_BACKEND_ALLGATHER_REDUCESCATTER},
        {"deepep_high_throughput", A2A_BACKEND_HIGH_THROUGHPUT},
        {"high_throughput", A2A_BACKEND_HIGH_THROUGHPUT},
        {"deepep_low_latency", A2A_BACKEND_LOW_LATENCY},
        {"low_latency", A2A_BACKEND_LOW_LATENCY},
        {"flashinfer_nvlink_one_sided", A2A_BACKEND_NVLINK_ONE_SIDED},
        {"nvlink_one_sided", A2A_BACKEND_NVLINK_ONE_SIDED},
        {"flashinfer_nvlink_two_sided", A2A_BACKEND_NVLINK_TWO_SIDED},
        {"flashinfer_all2allv", A2A_BACKEND_NVLINK_TWO_SIDED},
        {"nvlink_two_sided", A2A_BACKEND_NVLINK_TWO_SIDED},
        {"nixl_ep", A2A_BACKEND_NIXL_ELASTIC},
        {"nixl_elastic", A2A_BACKEND_NIXL_ELASTIC},
        {"", A2A_BACKEND_UNKNOWN},
        {"AUTO", A2A_BACKEND_UNKNOWN},
        {"nixl", A2A_BACKEND_UNKNOWN},
        {"\xff\xfe", A2A_BACKEND_UNKNOWN},
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (a2a_backend_from_name(names[i].name) != names[i].backend) printf("    %s\n", names[i].name);
        CHECK(a2a_backend_from_name(names[i].name) == names[i].backend);
    }
    CHECK(a2a_backend_from_name(NULL) == A2A_BACKEND_UNKNOWN);
}

/* Each thread has its own sentence. */
static void *silent_thread(void *argument)
{
    CHECK(strcmp(a2a_last_error(), "") == 0);
    return argument;
}

static void test_last_error_is_per_thread(void)
{
    pthread_t thread;
    REFUSED(a2a_get_unique_id(NULL), A2A_INVALID_ARGUMENT, "a2a_get_unique_id: ");
    CHECK(pthread_create(&thread, NULL, silent_thread, NULL) == 0);
    pthread_join(thread, NULL);
    CHECK(strstr(a2a_last_error(), "NULL") != NULL);
}

static int error_lines;
static char error_line[1024];

static void count_line(int32_t level, const char *message, void *user)
{
    CHECK(user == &error_lines);
    CHECK(level >= A2A_LOG_ERROR && level <= A2A_LOG_DEBUG);
    CHECK(strchr(message, '\n') == NULL);
    if (level != A2A_LOG_ERROR) return;
    error_lines++;
    snprintf(error_line, sizeof error_line, "%s", message);
}

static void test_log_callback(void)
{
    error_lines = 0;
    OK(a2a_set_log_callback(count_line, &error_lines));
    REFUSED(a2a_get_unique_id(NULL), A2A_INVALID_ARGUMENT, "NULL");
    CHECK(error_lines == 1);
    CHECK(strstr(error_line, "a2a_get_unique_id") != NULL);
    OK(a2a_set_log_callback(NULL, NULL));
    REFUSED(a2a_get_unique_id(NULL), A2A_INVALID_ARGUMENT, "NULL");
    CHECK(error_lines == 1);
}

/* -------------------------------------------------------------------------------------------------------- structs */

/* DLPack's own declarations, which a2a_tensor_t must equal byte for byte. */
typedef struct {
    int32_t device_type;
    int32_t device_id;
} DLDevice;
typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} DLDataType;
typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
} DLTensor;

#ifdef __cplusplus
#define STATIC_CHECK(condition) static_assert(condition, #condition)
#else
#define STATIC_CHECK(condition) _Static_assert(condition, #condition)
#endif
#define SAME_PLACE(field)                                                         \
    STATIC_CHECK(offsetof(DLTensor, field) == offsetof(a2a_tensor_t, field));     \
    STATIC_CHECK(sizeof ((DLTensor *)0)->field == sizeof ((a2a_tensor_t *)0)->field)

SAME_PLACE(data);
SAME_PLACE(device);
SAME_PLACE(ndim);
SAME_PLACE(dtype);
SAME_PLACE(shape);
SAME_PLACE(strides);
SAME_PLACE(byte_offset);
STATIC_CHECK(sizeof(DLTensor) == sizeof(a2a_tensor_t));
STATIC_CHECK(offsetof(a2a_tensor_dtype_t, code) == 0 && offsetof(a2a_tensor_dtype_t, bits) == 1);
STATIC_CHECK(offsetof(a2a_tensor_dtype_t, lanes) == 2 && sizeof(a2a_tensor_dtype_t) == 4);
STATIC_CHECK(offsetof(a2a_tensor_device_t, device_id) == 4 && sizeof(a2a_tensor_device_t) == 8);
STATIC_CHECK(sizeof(a2a_unique_id_t) == 128);
STATIC_CHECK(sizeof(a2a_status_t) == 4 && sizeof(a2a_backend_t) == 4 && sizeof(a2a_phase_t) == 4);

static void test_config_init(void)
{
    unsigned char bytes[sizeof(a2a_config_t) + 64];
    size_t size;
    memset(bytes, 0xa5, sizeof bytes);
    OK(a2a_config_init((a2a_config_t *)(void *)bytes, sizeof(a2a_config_t)));
    memcpy(&size, bytes, sizeof size);
    CHECK(size == sizeof(a2a_config_t));
    for (size_t i = sizeof size; i < sizeof(a2a_config_t); i++) CHECK(bytes[i] == 0);
    for (size_t i = sizeof(a2a_config_t); i < sizeof bytes; i++) CHECK(bytes[i] == 0xa5);
    /* A caller compiled against a longer struct gets all of it zeroed. */
    OK(a2a_config_init((a2a_config_t *)(void *)bytes, sizeof bytes));
    memcpy(&size, bytes, sizeof size);
    CHECK(size == sizeof bytes);
    for (size_t i = sizeof size; i < sizeof bytes; i++) CHECK(bytes[i] == 0);

    REFUSED(a2a_config_init((a2a_config_t *)(void *)bytes, 0), A2A_INVALID_ARGUMENT, "size is 0");
    REFUSED(a2a_config_init((a2a_config_t *)(void *)bytes, sizeof(a2a_config_t) - 1), A2A_INVALID_ARGUMENT, "size is");
    REFUSED(a2a_config_init((a2a_config_t *)(void *)bytes, SIZE_MAX), A2A_INVALID_ARGUMENT, "size is");
}

/* Each struct, as the argument of a call that succeeds when it is right. */
static struct rank *alone;

static a2a_status_t memory_with_config(void *bytes)
{
    a2a_memory_t memory;
    memory.struct_size = sizeof memory;
    return a2a_query_memory((a2a_config_t *)bytes, &memory);
}
static a2a_status_t explain_with_config(void *bytes)
{
    return a2a_explain((a2a_config_t *)bytes, NULL, 0, NULL);
}
static a2a_status_t create_with_config(void *bytes)
{
    a2a_comm_t *comm = NULL;
    a2a_status_t status = a2a_create((a2a_config_t *)bytes, &comm);
    if (status == A2A_SUCCESS) OK(a2a_destroy(comm));
    return status;
}
static a2a_status_t dispatch_with_in(void *bytes)
{
    memset(&alone->rows, 0, sizeof alone->rows);
    return a2a_dispatch(alone->comm, alone->routing, (a2a_dispatch_in_t *)bytes, &alone->dispatch_out, NULL);
}
static a2a_status_t dispatch_with_out(void *bytes)
{
    memset(&alone->rows, 0, sizeof alone->rows);
    return a2a_dispatch(alone->comm, alone->routing, &alone->dispatch_in, (a2a_dispatch_out_t *)bytes, NULL);
}
static a2a_status_t combine_with_in(void *bytes)
{
    OK(dispatch(alone));
    memset(&alone->buffer, 0, sizeof alone->buffer);
    OK(a2a_combine_buffer(alone->comm, alone->routing, &alone->buffer));
    return a2a_combine(alone->comm, alone->routing, (a2a_combine_in_t *)bytes, &alone->combine_out, NULL);
}
static a2a_status_t combine_with_out(void *bytes)
{
    OK(dispatch(alone));
    memset(&alone->buffer, 0, sizeof alone->buffer);
    OK(a2a_combine_buffer(alone->comm, alone->routing, &alone->buffer));
    return a2a_combine(alone->comm, alone->routing, &alone->combine_in, (a2a_combine_out_t *)bytes, NULL);
}
static a2a_status_t query_into(void *bytes)
{
    return a2a_query_memory(&alone->config, (a2a_memory_t *)bytes);
}
static a2a_status_t info_into(void *bytes)
{
    return a2a_get_info(alone->comm, (a2a_info_t *)bytes);
}
static a2a_status_t stats_into(void *bytes)
{
    return a2a_get_stats(alone->comm, (a2a_stats_t *)bytes);
}
static a2a_status_t error_into(void *bytes)
{
    return a2a_get_async_error(alone->comm, (a2a_error_info_t *)bytes);
}

struct subject {
    const char *name;
    size_t size;
    size_t least; /* the smallest struct_size that is taken */
    a2a_status_t (*call)(void *bytes);
    const void *good; /* a struct that works; NULL: a result, any bytes do */
};

enum { MORE = 40 }; /* bytes that a newer caller's struct has beyond the library's */

static void check_sizes(const struct subject *subject)
{
    const size_t hostile[] = {0, 1, 7, 8, 15, subject->least - 1, 65537, SIZE_MAX};
    unsigned char *bytes = (unsigned char *)calloc(1, subject->size + MORE);
    char word[64];
    size_t larger = subject->size + MORE;

    if (subject->good) memcpy(bytes, subject->good, subject->size);
    for (size_t i = 0; i < sizeof hostile / sizeof hostile[0]; i++) {
        memcpy(bytes, &hostile[i], sizeof(size_t));
        snprintf(word, sizeof word, "%s.struct_size is %zu", subject->name, hostile[i]);
        REFUSED(subject->call(bytes), A2A_INVALID_ARGUMENT, word);
    }
    memcpy(bytes, &subject->size, sizeof(size_t));
    OK(subject->call(bytes));
    memcpy(bytes, &larger, sizeof(size_t));
    OK(subject->call(bytes));
    bytes[subject->size + 13] = 1;
    snprintf(word, sizeof word, "byte %zu is not zero", subject->size + 13);
    REFUSED(subject->call(bytes), A2A_INVALID_ARGUMENT, word);
    REFUSED(subject->call(bytes), A2A_INVALID_ARGUMENT, subject->name);
    REFUSED(subject->call(bytes + 1), A2A_INVALID_ARGUMENT, "aligned");
    REFUSED(subject->call(NULL), A2A_INVALID_ARGUMENT, subject->name);
    free(bytes);
}

static void test_sizes_of_arguments(void)
{
    alone = open_alone();
    const struct subject subjects[] = {
        {"a2a_config_t", sizeof(a2a_config_t), sizeof(a2a_config_t), memory_with_config, &alone->config},
        {"a2a_config_t", sizeof(a2a_config_t), sizeof(a2a_config_t), explain_with_config, &alone->config},
        {"a2a_config_t", sizeof(a2a_config_t), sizeof(a2a_config_t), create_with_config, &alone->config},
        {"a2a_dispatch_in_t", sizeof(a2a_dispatch_in_t), sizeof(a2a_dispatch_in_t), dispatch_with_in,
         &alone->dispatch_in},
        {"a2a_dispatch_out_t", sizeof(a2a_dispatch_out_t), sizeof(a2a_dispatch_out_t), dispatch_with_out,
         &alone->dispatch_out},
        {"a2a_combine_in_t", sizeof(a2a_combine_in_t), sizeof(a2a_combine_in_t), combine_with_in, &alone->combine_in},
        {"a2a_combine_out_t", sizeof(a2a_combine_out_t), sizeof(a2a_combine_out_t), combine_with_out,
         &alone->combine_out},
    };
    for (size_t i = 0; i < sizeof subjects / sizeof subjects[0]; i++) check_sizes(&subjects[i]);
    close_rank(alone);
}

/* A result is written as far as the caller's struct_size says and not a byte further. */
static void check_canary(const struct subject *subject)
{
    const size_t sizes[] = {16, 24, subject->size, subject->size + MORE};
    unsigned char *whole = (unsigned char *)calloc(1, subject->size);
    memcpy(whole, &subject->size, sizeof(size_t));
    OK(subject->call(whole));
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        unsigned char *bytes = (unsigned char *)malloc(subject->size + MORE);
        size_t size = sizes[i], written = size < subject->size ? size : subject->size, kept;
        memset(bytes, 0xa5, subject->size + MORE);
        if (size > subject->size) memset(bytes + subject->size, 0, MORE); /* an unknown tail must be zero */
        memcpy(bytes, &size, sizeof size);
        OK(subject->call(bytes));
        memcpy(&kept, bytes, sizeof kept);
        CHECK(kept == size);
        CHECK(memcmp(bytes + sizeof size, whole + sizeof size, written - sizeof size) == 0);
        for (size_t b = written; b < subject->size + MORE; b++) CHECK(bytes[b] == (size > subject->size ? 0 : 0xa5));
        free(bytes);
    }
    free(whole);
}

static void test_sizes_of_results(void)
{
    alone = open_alone();
    const struct subject subjects[] = {
        {"a2a_memory_t", sizeof(a2a_memory_t), 16, query_into, NULL},
        {"a2a_info_t", sizeof(a2a_info_t), 16, info_into, NULL},
        {"a2a_stats_t", sizeof(a2a_stats_t), 16, stats_into, NULL},
        {"a2a_error_info_t", sizeof(a2a_error_info_t), 16, error_into, NULL},
    };
    for (size_t i = 0; i < sizeof subjects / sizeof subjects[0]; i++) {
        check_sizes(&subjects[i]);
        check_canary(&subjects[i]);
    }
    close_rank(alone);
}

/* --------------------------------------------------------------------------------------------------- the config */

/* All three calls that take a config refuse it alike. */
static void refused_config(const a2a_config_t *config, a2a_status_t status, const char *word)
{
    a2a_config_t copy = *config;
    REFUSED(memory_with_config(&copy), status, word);
    REFUSED(create_with_config(&copy), status, word);
    if (status == A2A_UNSUPPORTED) OK(explain_with_config(&copy));
    else REFUSED(explain_with_config(&copy), status, word);
}

#define WITH(field, value, status, word)       \
    do {                                       \
        a2a_config_t config = config_of(0, 1); \
        config.field = value;                  \
        refused_config(&config, status, word); \
    } while (0)

static void test_unknown_constants(void)
{
    static const int32_t unknown[] = {-1, 99, INT32_MIN, INT32_MAX};
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        WITH(device, unknown[i], A2A_INVALID_ARGUMENT, "device");
        WITH(backend, unknown[i], A2A_INVALID_ARGUMENT, "backend");
        WITH(transport, unknown[i], A2A_INVALID_ARGUMENT, "transport");
        WITH(layout, unknown[i], A2A_INVALID_ARGUMENT, "layout");
        WITH(placement, unknown[i], A2A_INVALID_ARGUMENT, "placement");
        WITH(token_dtype, unknown[i], A2A_INVALID_ARGUMENT, "token_dtype");
        WITH(combine_dtype, unknown[i], A2A_INVALID_ARGUMENT, "combine_dtype");
        WITH(quant, unknown[i], A2A_INVALID_ARGUMENT, "quant");
        WITH(scale_layout, unknown[i], A2A_INVALID_ARGUMENT, "scale_layout");
        WITH(overflow, unknown[i], A2A_INVALID_ARGUMENT, "overflow");
        WITH(bootstrap, unknown[i], A2A_INVALID_ARGUMENT, "bootstrap");
    }
    WITH(combine_dtype, A2A_DTYPE_U8, A2A_INVALID_ARGUMENT, "combine_dtype");
    WITH(combine_dtype, A2A_DTYPE_F8_E4M3, A2A_INVALID_ARGUMENT, "combine_dtype");

    struct rank *rank = open_alone();
    for (size_t i = 0; i < sizeof unknown / sizeof unknown[0]; i++) {
        rank->dispatch_in.phase = unknown[i];
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "phase");
        rank->dispatch_in.phase = A2A_PHASE_BOTH;
        OK(dispatch(rank));
        rank->combine_in.phase = unknown[i];
        REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "phase");
        rank->combine_in.phase = A2A_PHASE_BOTH;
        OK(combine(rank));
    }
    close_rank(rank);
}

static int32_t no_allgather(const void *send, void *recv, size_t bytes, void *user)
{
    (void)send, (void)recv, (void)bytes, (void)user;
    return 1;
}

/* On a host that can, a comm on CUDA memory is made; on any other all calls say alike that CUDA is what is missing. */
static void test_cuda_or_why_not(void)
{
    a2a_config_t config = config_of(0, 1), copy = config;
    config.device = copy.device = A2A_DEVICE_CUDA;
    if (memory_with_config(&copy) == A2A_SUCCESS) {
        OK(create_with_config(&config));
        config.backend = A2A_BACKEND_NVLINK_ONE_SIDED, config.max_sms = 8;
        refused_config(&config, A2A_UNSUPPORTED, "max_sms");
    } else {
        refused_config(&config, A2A_UNSUPPORTED, "cuda");
    }
}

/* A rank alone: what a2a_recover takes and says; with others it is tests/faults/recovery.rs. */
static void test_recover(void)
{
    struct rank *rank = open_alone();
    int32_t mask[2] = {7, 7};
    a2a_recover_in_t in;
    union {
        a2a_recover_out_t out;
        unsigned char bytes[sizeof(a2a_recover_out_t)];
    } it;

    OK(dispatch(rank));
    OK(a2a_recover(rank->comm, NULL, NULL));
    REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "combine SEND on slot 0 is out of order");
    OK(dispatch(rank));
    OK(combine(rank));

    memset(&in, 0, sizeof in);
    memset(&it, 0, sizeof it);
    REFUSED(a2a_recover(rank->comm, &in, NULL), A2A_INVALID_ARGUMENT, "a2a_recover_in_t.struct_size is 0");
    in.struct_size = sizeof in;
    REFUSED(a2a_recover(rank->comm, &in, &it.out), A2A_INVALID_ARGUMENT, "a2a_recover_out_t.struct_size is 0");
    it.out.struct_size = sizeof it.out;
    in.timeout_ms = -1;
    REFUSED(a2a_recover(rank->comm, &in, &it.out), A2A_INVALID_ARGUMENT, "timeout_ms is -1");
    in.timeout_ms = 0, in.patience_ms = INT64_MAX;
    REFUSED(a2a_recover(rank->comm, &in, &it.out), A2A_INVALID_ARGUMENT, "patience_ms is 9223372036854775807");
    in.patience_ms = 0;
    OK(a2a_recover(rank->comm, &in, &it.out));
    CHECK(it.out.generation == 3 && it.out.members[0] == 1 && it.out.num_members == 1 && it.out.replaced == 0);
    CHECK(it.out.whole_steps[0] == 1 && it.out.whole_steps[1] == 0);

    /* An older caller's struct ends after the generation. */
    memset(&it, 0xa5, sizeof it);
    it.out.struct_size = 16;
    OK(a2a_recover(rank->comm, NULL, &it.out));
    CHECK(it.out.generation == 4);
    for (size_t i = 16; i < sizeof it; i++) CHECK(it.bytes[i] == 0xa5);
    OK(dispatch(rank));
    OK(combine(rank));

    REFUSED(a2a_get_rank_mask(rank->comm, NULL, 1), A2A_INVALID_ARGUMENT, "mask is NULL");
    REFUSED(a2a_get_rank_mask(rank->comm, mask, 0), A2A_INVALID_ARGUMENT, "count is 0, num_ranks is 1");
    OK(a2a_get_rank_mask(rank->comm, mask, 2));
    CHECK(mask[0] == 1 && mask[1] == 7);
    REFUSED(a2a_recover(NULL, NULL, NULL), A2A_INVALID_ARGUMENT, "a2a_comm_t");
    REFUSED(a2a_get_rank_mask(NULL, mask, 2), A2A_INVALID_ARGUMENT, "a2a_comm_t");

    OK(a2a_abort(rank->comm));
    REFUSED(a2a_recover(rank->comm, NULL, NULL), A2A_ABORTED, "aborted");
    close_rank(rank);
}

static void test_how_ranks_meet(void)
{
    int something;
    WITH(bootstrap, A2A_BOOTSTRAP_ALLGATHER, A2A_INVALID_ARGUMENT, "allgather is NULL");
    WITH(allgather, no_allgather, A2A_INVALID_ARGUMENT, "bootstrap is unique_id (0)");
    WITH(allgather_user, &something, A2A_INVALID_ARGUMENT, "allgather_user");
    a2a_config_t config = config_of(0, 1);
    config.bootstrap = A2A_BOOTSTRAP_ALLGATHER, config.allgather = no_allgather;
    OK(a2a_get_unique_id(&config.unique_id));
    refused_config(&config, A2A_INVALID_ARGUMENT, "unique_id is set");
    /* A rank alone needs nobody. */
    config = config_of(0, 1);
    config.bootstrap = A2A_BOOTSTRAP_ALLGATHER, config.allgather = no_allgather;
    OK(create_with_config(&config));
}

static void test_features_not_in_this_build(void)
{
    int something;
    WITH(nccl_comm, &something, A2A_UNSUPPORTED, "nccl_comm");
    /* As on a machine without it. */
    setenv("A2A_NIXL_LIB", "/nowhere/libnixl_capi.so", 1);
    WITH(backend, A2A_BACKEND_NIXL_ELASTIC, A2A_UNSUPPORTED, "nixl_elastic");
    WITH(transport, A2A_TRANSPORT_NCCL, A2A_UNSUPPORTED, "device is cpu");
    WITH(transport, A2A_TRANSPORT_NIXL, A2A_UNSUPPORTED, "nixl");
    WITH(max_ranks, 2, A2A_UNSUPPORTED, "max_ranks");

    WITH(flags, A2A_CONFIG_DEGRADE, A2A_UNSUPPORTED, "A2A_CONFIG_DEGRADE");
    WITH(flags, 4, A2A_INVALID_ARGUMENT, "flags");

    struct rank *rank = open_alone();
    OK(dispatch(rank));
    rank->dispatch_in.flags = 1u << 31;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "flags");
    rank->dispatch_in.flags = 0;
    rank->dispatch_in.reserved = 1;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "reserved");
    rank->dispatch_in.reserved = 0;
    OK(dispatch(rank));

    rank->combine_in.flags = 1u << 31;
    REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "flags");
    rank->combine_in.flags = 0;
    OK(combine(rank));
    close_rank(rank);
}

static void test_config_ranges(void)
{
    static const int32_t owners[EXPERTS] = {0, 0, 0, 1};
    WITH(rank, -1, A2A_INVALID_ARGUMENT, "rank");
    WITH(rank, 1, A2A_INVALID_ARGUMENT, "rank");
    WITH(num_ranks, 0, A2A_INVALID_ARGUMENT, "num_ranks");
    WITH(num_ranks, -3, A2A_INVALID_ARGUMENT, "num_ranks");
    WITH(num_ranks, A2A_MAX_RANKS + 1, A2A_INVALID_ARGUMENT, "num_ranks");
    WITH(max_ranks, -1, A2A_INVALID_ARGUMENT, "max_ranks");
    WITH(ranks_per_device, -1, A2A_INVALID_ARGUMENT, "ranks_per_device");
    WITH(num_experts, 0, A2A_INVALID_ARGUMENT, "num_experts");
    WITH(num_experts, -1, A2A_INVALID_ARGUMENT, "num_experts");
    WITH(max_topk, 0, A2A_INVALID_ARGUMENT, "max_topk");
    WITH(max_topk, A2A_MAX_TOPK + 1, A2A_INVALID_ARGUMENT, "max_topk");
    WITH(max_hidden, 0, A2A_INVALID_ARGUMENT, "max_hidden");
    WITH(max_hidden, -64, A2A_INVALID_ARGUMENT, "max_hidden");
    WITH(max_hidden, 63, A2A_INVALID_ARGUMENT, "max_hidden");
    WITH(max_tokens, 0, A2A_INVALID_ARGUMENT, "max_tokens");
    WITH(max_tokens, -1, A2A_INVALID_ARGUMENT, "max_tokens");
    WITH(combine_hidden, -1, A2A_INVALID_ARGUMENT, "combine_hidden");
    WITH(max_scale_bytes, -1, A2A_INVALID_ARGUMENT, "max_scale_bytes");
    WITH(extra_row_bytes[3], -1, A2A_INVALID_ARGUMENT, "extra_row_bytes[3]");
    WITH(num_slots, -1, A2A_INVALID_ARGUMENT, "num_slots");
    WITH(num_slots, 65, A2A_INVALID_ARGUMENT, "num_slots");
    WITH(expert_alignment, -1, A2A_INVALID_ARGUMENT, "expert_alignment");
    WITH(max_sms, -1, A2A_INVALID_ARGUMENT, "max_sms");
    WITH(max_recv_rows, -1, A2A_INVALID_ARGUMENT, "max_recv_rows");
    WITH(setup_timeout_ms, -1, A2A_INVALID_ARGUMENT, "setup_timeout_ms");
    WITH(first_step_timeout_ms, -1, A2A_INVALID_ARGUMENT, "first_step_timeout_ms");
    WITH(timeout_ms, -1, A2A_INVALID_ARGUMENT, "timeout_ms");
    WITH(placement, A2A_PLACEMENT_TABLE, A2A_INVALID_ARGUMENT, "expert_owner");
    WITH(expert_owner, owners, A2A_INVALID_ARGUMENT, "expert_owner");

    a2a_config_t config = config_of(0, 1);
    config.placement = A2A_PLACEMENT_TABLE;
    config.expert_owner = owners; /* expert 3 is given to rank 1 of 1 */
    refused_config(&config, A2A_INVALID_ARGUMENT, "expert_owner[3]");

    config = config_of(0, 2); /* the group has no name */
    REFUSED(create_with_config(&config), A2A_INVALID_ARGUMENT, "unique_id");
    memset(config.unique_id.bytes, 7, sizeof config.unique_id.bytes);
    REFUSED(create_with_config(&config), A2A_INVALID_ARGUMENT, "unique_id");
}

/* Values that are in range but do not go together: what needs a plan is refused. */
static void refused_plan(const a2a_config_t *config, const char *word)
{
    a2a_config_t copy = *config;
    REFUSED(memory_with_config(&copy), A2A_INVALID_ARGUMENT, word);
    REFUSED(create_with_config(&copy), A2A_INVALID_ARGUMENT, word);
}

/* All three calls take the config. */
static void accepted(const a2a_config_t *config)
{
    a2a_config_t copy = *config;
    OK(memory_with_config(&copy));
    OK(create_with_config(&copy));
    OK(explain_with_config(&copy));
}

static void test_layouts(void)
{
    for (a2a_backend_t backend = A2A_BACKEND_AUTO; backend <= A2A_BACKEND_NVLINK_TWO_SIDED; backend++) {
        for (a2a_layout_t layout = A2A_LAYOUT_AUTO; layout <= A2A_LAYOUT_EXPERT_CONTIGUOUS; layout++) {
            a2a_config_t config = config_of(0, 1);
            int offered = backend == A2A_BACKEND_AUTO || layout == A2A_LAYOUT_AUTO;
            config.backend = backend;
            config.layout = layout;
            for (int i = 0; i < NUM_PAIRS; i++) offered |= PAIRS[i].backend == backend && PAIRS[i].layout == layout;
            if (offered) accepted(&config);
            else refused_config(&config, A2A_UNSUPPORTED, "layout");
        }
    }
}

/* Options that only some backends or layouts know. */
static void test_options_of_layouts(void)
{
    static const int32_t no_fifo[] = {-1, 1, 65537, INT32_MIN, INT32_MAX};
    for (int i = 0; i < NUM_PAIRS; i++) {
        a2a_config_t config = config_of_pair(&PAIRS[i]);
        a2a_memory_t all, half;
        all.struct_size = half.struct_size = sizeof all;

        for (size_t n = 0; n < sizeof no_fifo / sizeof no_fifo[0]; n++) {
            config.fifo_rows = no_fifo[n];
            refused_config(&config, A2A_INVALID_ARGUMENT, "fifo_rows");
        }
        config.fifo_rows = 2;
        accepted(&config);
        config.fifo_rows = 65536; /* the largest there is; its memory need not be taken */
        OK(memory_with_config(&config));
        config.fifo_rows = 0;

        /* Only expert blocks can be aligned. */
        config.expert_alignment = 1;
        accepted(&config);
        config.expert_alignment = 16;
        if (PAIRS[i].layout == A2A_LAYOUT_EXPERT_CONTIGUOUS) accepted(&config);
        else refused_plan(&config, "expert_alignment");
        config.expert_alignment = 65537;
        refused_config(&config, A2A_INVALID_ARGUMENT, "expert_alignment");
        config.expert_alignment = 0;

        /* Rows with fixed places cannot be fewer. */
        for (a2a_overflow_t overflow = A2A_OVERFLOW_ERROR; overflow <= A2A_OVERFLOW_DROP; overflow++) {
            config.overflow = overflow;
            config.max_recv_rows = 4;
            if (PAIRS[i].layout == A2A_LAYOUT_GATHERED || PAIRS[i].layout == A2A_LAYOUT_RANK_MAJOR) {
                refused_config(&config, A2A_UNSUPPORTED, "max_recv_rows");
                continue;
            }
            accepted(&config);
            struct rank *rank = open_with(&config);
            CHECK(rank->info.row_capacity == (PAIRS[i].layout == A2A_LAYOUT_EXPERT_PADDED ? 4 * EXPERTS : 4));
            close_rank(rank);
            config.max_recv_rows = 1000000; /* more than may come: the layout's capacity */
            rank = open_with(&config);
            CHECK(rank->info.row_capacity == PAIRS[i].capacity);
            close_rank(rank);
            if (PAIRS[i].backend == A2A_BACKEND_NVLINK_TWO_SIDED) continue; /* has no rows to save */
            config.max_tokens = 1000;
            OK(a2a_query_memory(&config, &all));
            config.max_recv_rows = 500;
            OK(a2a_query_memory(&config, &half));
            CHECK(half.slot_bytes < all.slot_bytes);
            config.max_tokens = MAX_TOKENS;
        }
        config.overflow = A2A_OVERFLOW_ERROR;
        config.max_recv_rows = 0;

        /* Scales that dispatch makes, and those that the caller brings. */
        config.scale_layout = A2A_SCALES_COLUMN;
        refused_plan(&config, "scale_layout");
        for (a2a_quant_t quant = A2A_QUANT_FP8_F32_SCALES; quant <= A2A_QUANT_FP8_UE8M0_SCALES; quant++) {
            config.quant = quant;
            config.scale_layout = A2A_SCALES_COLUMN;
            accepted(&config);
            config.scale_layout = A2A_SCALES_ROW;
            accepted(&config);
            config.max_scale_bytes = 4;
            refused_plan(&config, "max_scale_bytes");
            config.max_scale_bytes = 0;
        }
    }
}

static void test_explain(void)
{
    a2a_config_t config = config_of(0, 1);
    char *text;
    char small[16];
    size_t needed = 0, again = 0;

    OK(a2a_explain(&config, NULL, 0, &needed));
    CHECK(needed > 64);
    text = (char *)malloc(needed);
    OK(a2a_explain(&config, text, needed, &again));
    CHECK(again == needed && strlen(text) + 1 == needed);
    CHECK(text[0] == '{' && strchr("}\n", text[needed - 2]) != NULL);
    CHECK(strstr(text, "backend") != NULL && strstr(text, "layout") != NULL);
    OK(a2a_explain(&config, text, needed, NULL));

    memset(small, 'x', sizeof small);
    again = 0;
    REFUSED(a2a_explain(&config, small, sizeof small, &again), A2A_OVERFLOW, "len is 16");
    CHECK(again == needed && small[15] == 0 && strncmp(small, text, 15) == 0);
    REFUSED(a2a_explain(&config, text, needed - 1, NULL), A2A_OVERFLOW, "len");
    REFUSED(a2a_explain(&config, small, 0, NULL), A2A_OVERFLOW, "len is 0");
    REFUSED(a2a_explain(&config, NULL, 8, NULL), A2A_INVALID_ARGUMENT, "buf is NULL");
    OK(a2a_explain(&config, NULL, 0, NULL));
    free(text);

    /* What is refused is explained. */
    setenv("A2A_NIXL_LIB", "/nowhere/libnixl_capi.so", 1);
    config.backend = A2A_BACKEND_NIXL_ELASTIC;
    OK(a2a_explain(&config, NULL, 0, &needed));
    text = (char *)malloc(needed);
    OK(a2a_explain(&config, text, needed, NULL));
    CHECK(strstr(text, "/nowhere/libnixl_capi.so") != NULL);
    free(text);
}

static void test_memory(void)
{
    a2a_config_t config = config_of(0, 1);
    a2a_memory_t memory, three;
    a2a_comm_t *comm = NULL;
    a2a_info_t info;

    memory.struct_size = three.struct_size = sizeof memory;
    info.struct_size = sizeof info;
    OK(a2a_query_memory(&config, &memory));
    CHECK(memory.window_bytes >= memory.control_bytes + memory.slot_bytes);
    CHECK(memory.slot_bytes >= (uint64_t)MAX_TOKENS * HIDDEN * sizeof(float));
    CHECK(memory.total_bytes == memory.window_bytes + memory.private_bytes + memory.routing_bytes);
    config.num_slots = 3;
    OK(a2a_query_memory(&config, &three));
    CHECK(three.slot_bytes == memory.slot_bytes && three.routing_bytes == memory.routing_bytes);
    CHECK(three.total_bytes == three.window_bytes + three.private_bytes + 3 * three.routing_bytes);
    CHECK(three.window_bytes >= three.control_bytes + 3 * three.slot_bytes);

    config.memory_limit = three.total_bytes;
    OK(a2a_create(&config, &comm));
    OK(a2a_get_info(comm, &info));
    CHECK(info.window_bytes == three.window_bytes && info.num_slots == 3);
    OK(a2a_destroy(comm));

    comm = (a2a_comm_t *)(void *)&config;
    config.memory_limit = three.total_bytes - 1;
    REFUSED(a2a_create(&config, &comm), A2A_OUT_OF_MEMORY, "memory_limit");
    CHECK(comm == (a2a_comm_t *)(void *)&config); /* written on success only */
}

/* -------------------------------------------------------------------------------------------------- NULL, handles */

static void test_nulls(void)
{
    struct rank *rank = open_alone();
    a2a_unique_id_t id;
    a2a_info_t info;
    a2a_routing_t *routing = NULL;
    a2a_memory_t memory;
    a2a_tensor_t tensor;
    memset(&tensor, 0, sizeof tensor);
    info.struct_size = sizeof info;
    memory.struct_size = sizeof memory;

    REFUSED(a2a_get_unique_id(NULL), A2A_INVALID_ARGUMENT, "id");
    REFUSED(a2a_unique_id_from_address(NULL, "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address("localhost:1", NULL, &id), A2A_INVALID_ARGUMENT, "key");
    REFUSED(a2a_unique_id_from_address("localhost:1", "key", NULL), A2A_INVALID_ARGUMENT, "id");
    REFUSED(a2a_config_init(NULL, sizeof(a2a_config_t)), A2A_INVALID_ARGUMENT, "config");
    REFUSED(a2a_explain(NULL, NULL, 0, NULL), A2A_INVALID_ARGUMENT, "config");
    REFUSED(a2a_query_memory(NULL, &memory), A2A_INVALID_ARGUMENT, "config");
    REFUSED(a2a_query_memory(&rank->config, NULL), A2A_INVALID_ARGUMENT, "memory");
    REFUSED(a2a_create(NULL, &rank->comm), A2A_INVALID_ARGUMENT, "config");
    REFUSED(a2a_create(&rank->config, NULL), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_get_info(NULL, &info), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_get_info(rank->comm, NULL), A2A_INVALID_ARGUMENT, "info");
    REFUSED(a2a_set_timeout(NULL, 1, 1), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_abort(NULL), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_routing_create(NULL, 0, &routing), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_routing_create(rank->comm, 0, NULL), A2A_INVALID_ARGUMENT, "routing");
    REFUSED(a2a_dispatch(NULL, rank->routing, &rank->dispatch_in, &rank->dispatch_out, NULL), A2A_INVALID_ARGUMENT,
            "comm");
    REFUSED(a2a_dispatch(rank->comm, NULL, &rank->dispatch_in, &rank->dispatch_out, NULL), A2A_INVALID_ARGUMENT,
            "routing");
    REFUSED(a2a_dispatch(rank->comm, rank->routing, NULL, &rank->dispatch_out, NULL), A2A_INVALID_ARGUMENT,
            "dispatch_in");
    REFUSED(a2a_dispatch(rank->comm, rank->routing, &rank->dispatch_in, NULL, NULL), A2A_INVALID_ARGUMENT,
            "dispatch_out");
    rank->dispatch_in.tokens = NULL;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "tokens");
    rank->dispatch_in.tokens = &rank->tokens_matrix.tensor;
    rank->dispatch_in.topk_ids = NULL; /* only GATHERED does without */
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "topk_ids");
    rank->dispatch_in.topk_ids = &rank->ids_matrix.tensor;
    rank->tokens_matrix.tensor.data = NULL;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "tokens");
    rank->tokens_matrix.tensor.data = rank->tokens;
    rank->tokens_matrix.tensor.shape = NULL;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "tokens");
    rank->tokens_matrix.tensor.shape = rank->tokens_matrix.shape;

    REFUSED(a2a_combine_buffer(NULL, rank->routing, &tensor), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_combine_buffer(rank->comm, NULL, &tensor), A2A_INVALID_ARGUMENT, "routing");
    OK(dispatch(rank));
    REFUSED(a2a_combine_buffer(rank->comm, rank->routing, NULL), A2A_INVALID_ARGUMENT, "tensor");
    OK(a2a_combine_buffer(rank->comm, rank->routing, &rank->buffer));
    REFUSED(a2a_combine(NULL, rank->routing, &rank->combine_in, &rank->combine_out, NULL), A2A_INVALID_ARGUMENT,
            "comm");
    REFUSED(a2a_combine(rank->comm, NULL, &rank->combine_in, &rank->combine_out, NULL), A2A_INVALID_ARGUMENT,
            "routing");
    REFUSED(a2a_combine(rank->comm, rank->routing, NULL, &rank->combine_out, NULL), A2A_INVALID_ARGUMENT,
            "combine_in");
    REFUSED(a2a_combine(rank->comm, rank->routing, &rank->combine_in, NULL, NULL), A2A_INVALID_ARGUMENT,
            "combine_out");
    rank->combine_in.tokens = NULL;
    REFUSED(a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL),
            A2A_INVALID_ARGUMENT, "tokens");
    rank->combine_in.tokens = &rank->buffer;
    rank->combine_out.tokens = NULL;
    REFUSED(a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL),
            A2A_INVALID_ARGUMENT, "tokens");
    rank->combine_out.tokens = &rank->sums_matrix.tensor;
    rank->sums_matrix.tensor.data = NULL; /* combine's output is the caller's */
    REFUSED(a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL),
            A2A_INVALID_ARGUMENT, "tokens");
    rank->sums_matrix.tensor.data = rank->sums;
    OK(combine(rank)); /* and after all that, nothing has happened */

    REFUSED(a2a_get_async_error(NULL, NULL), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_get_async_error(rank->comm, NULL), A2A_INVALID_ARGUMENT, "error_info");
    REFUSED(a2a_get_stats(NULL, NULL), A2A_INVALID_ARGUMENT, "comm");
    REFUSED(a2a_get_stats(rank->comm, NULL), A2A_INVALID_ARGUMENT, "stats");
    OK(a2a_destroy(NULL));
    OK(a2a_routing_destroy(NULL));
    close_rank(rank);
}

static void test_handles(void)
{
    struct rank *rank = open_alone(), *other = open_alone();
    a2a_comm_t *comm = rank->comm;
    a2a_routing_t *routing = rank->routing, *extra = NULL;
    a2a_info_t info;
    info.struct_size = sizeof info;

    /* Invented, confused, or another comm's. */
    REFUSED(a2a_get_info((a2a_comm_t *)(void *)&info, &info), A2A_INVALID_ARGUMENT, "not a live a2a_comm_t");
    REFUSED(a2a_get_info((a2a_comm_t *)(void *)routing, &info), A2A_INVALID_ARGUMENT, "not a live a2a_comm_t");
    REFUSED(a2a_routing_destroy((a2a_routing_t *)(void *)comm), A2A_INVALID_ARGUMENT, "not a live a2a_routing_t");
    REFUSED(a2a_dispatch(other->comm, routing, &rank->dispatch_in, &rank->dispatch_out, NULL), A2A_INVALID_ARGUMENT,
            "routing");
    REFUSED(a2a_routing_create(comm, -1, &extra), A2A_INVALID_ARGUMENT, "slot");
    REFUSED(a2a_routing_create(comm, 1, &extra), A2A_INVALID_ARGUMENT, "slot");

    /* A routing ends before its comm, or after it. */
    OK(a2a_routing_create(comm, 0, &extra));
    OK(a2a_routing_destroy(extra));
    REFUSED(a2a_routing_destroy(extra), A2A_INVALID_ARGUMENT, "not a live a2a_routing_t");
    REFUSED(a2a_dispatch(comm, extra, &rank->dispatch_in, &rank->dispatch_out, NULL), A2A_INVALID_ARGUMENT,
            "not a live a2a_routing_t");
    OK(dispatch(rank)); /* destroyed with a dispatch in flight */
    OK(a2a_destroy(comm));
    REFUSED(a2a_destroy(comm), A2A_INVALID_ARGUMENT, "not a live a2a_comm_t");
    REFUSED(a2a_get_info(comm, &info), A2A_INVALID_ARGUMENT, "not a live a2a_comm_t");
    REFUSED(a2a_abort(comm), A2A_INVALID_ARGUMENT, "not a live a2a_comm_t");
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "not a live a2a_comm_t");
    OK(a2a_routing_destroy(routing));
    REFUSED(a2a_routing_destroy(routing), A2A_INVALID_ARGUMENT, "not a live a2a_routing_t");

    rank->comm = NULL;
    rank->routing = NULL;
    close_rank(rank);
    close_rank(other);
}

/* ---------------------------------------------------------------------------------------------------------- steps */

static void test_one_rank(void)
{
    for (int i = -1; i < NUM_PAIRS; i++) { /* first AUTO */
        a2a_config_t config = i < 0 ? config_of(0, 1) : config_of_pair(&PAIRS[i]);
        a2a_info_t info;
        a2a_stats_t stats;
        a2a_error_info_t error;
        struct rank *rank = open_with(&config);
        for (int step = 0; step < 3; step++) {
            memset(rank->sums, 0, TOKENS * HIDDEN * sizeof(float));
            OK(dispatch(rank));
            OK(combine(rank));
            CHECK(memcmp(rank->sums, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
        }
        info.struct_size = sizeof info;
        stats.struct_size = sizeof stats;
        error.struct_size = sizeof error;
        OK(a2a_get_info(rank->comm, &info));
        CHECK(info.backend != A2A_BACKEND_AUTO && info.layout != A2A_LAYOUT_AUTO);
        CHECK(i < 0 || (info.backend == PAIRS[i].backend && info.layout == PAIRS[i].layout));
        CHECK(info.transport == A2A_TRANSPORT_WINDOW && info.device == A2A_DEVICE_CPU);
        CHECK(info.num_local_experts == EXPERTS && info.first_expert == 0 && info.max_sms == 0);
        CHECK(info.row_capacity == (i < 0 ? (int64_t)MAX_TOKENS : PAIRS[i].capacity));
        CHECK(info.max_hidden == HIDDEN && info.max_topk == TOPK);
        OK(a2a_get_stats(rank->comm, &stats));
        CHECK(stats.dispatches == 3 && stats.combines == 3 && stats.bytes_remote == 0 && stats.steps_lost == 0);
        OK(a2a_get_async_error(rank->comm, &error));
        CHECK(error.status == A2A_SUCCESS && error.message[0] == 0);
        close_rank(rank);
    }
}

static void test_history(void)
{
    enum { ENOUGH = 128 << 10 }; /* by a2a.h */
    struct rank *rank = open_alone();
    a2a_comm_t *comm = rank->comm;
    char *text = (char *)malloc(ENOUGH), *again = (char *)malloc(ENOUGH);
    char small[16];
    size_t needed = 0, length = 0;

    /* Nothing has been called yet. */
    OK(a2a_get_history(comm, text, ENOUGH, &needed));
    CHECK(strlen(text) + 1 == needed && text[0] == '{' && text[needed - 2] == '}');
    CHECK(strstr(text, "\"operations\":[]") != NULL && strstr(text, "\"async_error\":null") != NULL);
    CHECK(strstr(text, "\"version\":\"" A2A_VERSION "\"") != NULL);
    CHECK(strstr(text, "\"rank\":0,\"num_ranks\":1") != NULL);
    CHECK(strstr(text, "\"gone_ranks\":[],\"dead_ranks\":[]") != NULL);

    OK(dispatch(rank));
    OK(combine(rank));
    REFUSED(a2a_combine(comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL), A2A_INVALID_ARGUMENT,
            "out of order");
    OK(a2a_get_history(comm, NULL, 0, &needed));
    OK(a2a_get_history(comm, text, ENOUGH, NULL));
    CHECK(strstr(text, "\"number\":1,") != NULL && strstr(text, "\"number\":3,") != NULL);
    CHECK(strstr(text, "\"number\":4,") == NULL);
    CHECK(strstr(text, "\"operation\":\"dispatch\",\"half\":\"BOTH\",\"slot\":0,\"sequence\":1,") != NULL);
    CHECK(strstr(text, "\"tokens\":6,\"outcome\":\"A2A_SUCCESS\"") != NULL);
    CHECK(strstr(text, "\"outcome\":\"A2A_INVALID_ARGUMENT\"}]") != NULL); /* the last one */

    /* The rules are a2a_explain's. */
    memset(small, 'x', sizeof small);
    REFUSED(a2a_get_history(comm, small, sizeof small, &length), A2A_OVERFLOW, "len is 16");
    CHECK(length > sizeof small && small[15] == 0 && strncmp(small, text, 15) == 0);
    REFUSED(a2a_get_history(comm, small, 0, NULL), A2A_OVERFLOW, "len is 0");
    REFUSED(a2a_get_history(comm, NULL, 8, NULL), A2A_INVALID_ARGUMENT, "buf is NULL");
    OK(a2a_get_history(comm, NULL, 0, NULL));
    REFUSED(a2a_get_history(NULL, text, ENOUGH, NULL), A2A_INVALID_ARGUMENT, "comm");

    /* It outlives the comm's use, not the comm; what is refused since the abort is not told. */
    OK(a2a_abort(comm));
    REFUSED(dispatch(rank), A2A_ABORTED, NULL);
    OK(a2a_get_history(comm, again, ENOUGH, NULL));
    CHECK(strstr(again, "\"number\":3,") != NULL && strstr(again, "\"number\":4,") == NULL);
    CHECK(strstr(again, "a2a_abort") != NULL);
    close_rank(rank);
    REFUSED(a2a_get_history(comm, text, ENOUGH, NULL), A2A_INVALID_ARGUMENT, "not a live a2a_comm_t");
    free(text);
    free(again);
}

static void test_order_of_calls(void)
{
    struct rank *rank = open_alone();
    REFUSED(a2a_combine_buffer(rank->comm, rank->routing, &rank->buffer), A2A_INVALID_ARGUMENT, "dispatch");
    rank->combine_in.tokens = &rank->sums_matrix.tensor;
    REFUSED(a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL),
            A2A_INVALID_ARGUMENT, "out of order");
    rank->combine_in.tokens = &rank->buffer;
    rank->dispatch_in.phase = A2A_PHASE_RECV;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "out of order");
    rank->dispatch_in.phase = A2A_PHASE_BOTH;

    OK(dispatch(rank));
    OK(dispatch(rank)); /* gives the first one up */
    OK(combine(rank));
    REFUSED(a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL),
            A2A_INVALID_ARGUMENT, "out of order");

    /* In halves. */
    rank->dispatch_in.phase = A2A_PHASE_SEND;
    OK(a2a_dispatch(rank->comm, rank->routing, &rank->dispatch_in, NULL, NULL));
    REFUSED(a2a_combine_buffer(rank->comm, rank->routing, &rank->buffer), A2A_INVALID_ARGUMENT, "dispatch");
    REFUSED(a2a_dispatch(rank->comm, rank->routing, &rank->dispatch_in, NULL, NULL),
            A2A_INVALID_ARGUMENT, "out of order");
    rank->dispatch_in.phase = A2A_PHASE_RECV;
    OK(dispatch(rank));
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "out of order");
    rank->dispatch_in.phase = A2A_PHASE_BOTH;
    rank->combine_in.phase = A2A_PHASE_SEND;
    OK(combine(rank));
    rank->combine_in.phase = A2A_PHASE_RECV;
    memset(rank->sums, 0, TOKENS * HIDDEN * sizeof(float));
    OK(a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL));
    CHECK(memcmp(rank->sums, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
    close_rank(rank);
}

/* Tensors that are not what the step needs are refused, and the slot is as before. */
static void test_tensors(void)
{
    static int64_t wide[2] = {HIDDEN, 2}, odd[2] = {HIDDEN + 1, 1};
    struct rank *rank = open_alone();
    a2a_tensor_t *tokens = &rank->tokens_matrix.tensor, *ids = &rank->ids_matrix.tensor;
    a2a_tensor_t *weights = &rank->weights_matrix.tensor, *sums = &rank->sums_matrix.tensor;

#define TRY(tensor, change, word)                            \
    do {                                                     \
        a2a_tensor_t kept = *(tensor);                       \
        change;                                              \
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, word); \
        *(tensor) = kept;                                    \
    } while (0)
    TRY(tokens, tokens->ndim = 1, "tokens");
    TRY(tokens, tokens->ndim = -1, "tokens");
    TRY(tokens, tokens->ndim = INT32_MAX, "tokens");
    TRY(tokens, tokens->dtype.bits = 0, "tokens");
    TRY(tokens, tokens->dtype.lanes = 0, "tokens");
    TRY(tokens, tokens->strides = wide, "tokens");
    TRY(tokens, tokens->strides = odd, "tokens");
    TRY(tokens, tokens->byte_offset = 4, "tokens");
    TRY(tokens, tokens->data = (char *)tokens->data + 8, "tokens");
    TRY(tokens, tokens->device.device_type = A2A_DEVICE_CUDA, "tokens");
    TRY(ids, ids->dtype.code = 2, "topk_ids");
    TRY(ids, ids->dtype.bits = 16, "topk_ids");
    TRY(ids, ids->device.device_type = 99, "topk_ids");
    TRY(weights, weights->dtype.bits = 16, "topk_weights");

#define TRY_SHAPE(matrix, at, value, word)                   \
    do {                                                     \
        int64_t kept = (matrix)->shape[at];                  \
        (matrix)->shape[at] = value;                         \
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, word); \
        (matrix)->shape[at] = kept;                          \
    } while (0)
    TRY_SHAPE(&rank->tokens_matrix, 0, MAX_TOKENS + 1, "tokens");
    TRY_SHAPE(&rank->tokens_matrix, 0, -1, "tokens");
    TRY_SHAPE(&rank->tokens_matrix, 1, HIDDEN + 16, "tokens");
    TRY_SHAPE(&rank->tokens_matrix, 1, HIDDEN - 1, "tokens");
    TRY_SHAPE(&rank->tokens_matrix, 1, INT64_MAX, "tokens");
    TRY_SHAPE(&rank->ids_matrix, 0, TOKENS - 1, "topk_ids");
    TRY_SHAPE(&rank->ids_matrix, 1, TOPK + 1, "topk_ids");
    TRY_SHAPE(&rank->weights_matrix, 1, TOPK - 1, "topk_weights");

    rank->dispatch_in.max_tokens = MAX_TOKENS + 1;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "max_tokens");
    rank->dispatch_in.max_tokens = TOKENS - 1;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "max_tokens");
    rank->dispatch_in.max_tokens = 0;
    rank->dispatch_in.scales = weights; /* the config has room for none */
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "scales");
    rank->dispatch_in.scales = NULL;
    rank->dispatch_in.extras[2] = weights;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "extras[2]");
    rank->dispatch_in.extras[2] = NULL;

    /* Outputs: of the wrong kind, and too small. */
    struct matrix counts;
    int32_t few[EXPERTS];
    matrix_of(&counts, few, 0, 32, EXPERTS - 1, 1);
    rank->dispatch_out.expert_counts = &counts.tensor;
    REFUSED(dispatch(rank), A2A_OVERFLOW, "expert_counts");
    rank->dispatch_out.expert_counts = NULL;
    rank->dispatch_out.topk_weights = &counts.tensor;
    counts.tensor.ndim = -1;
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "topk_weights");
    rank->dispatch_out.topk_weights = NULL;
    rank->dispatch_out.topk_ids = ids;
    REFUSED(dispatch(rank), A2A_OVERFLOW, "topk_ids"); /* TOKENS rows, and MAX_TOKENS may come */
    rank->dispatch_out.topk_ids = NULL;
    rank->dispatch_out.expert_offsets = &counts.tensor; /* EXPERT_* layouts only */
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "expert_offsets");
    rank->dispatch_out.expert_offsets = NULL;
    memset(&counts.tensor, 0, sizeof counts.tensor);
    rank->dispatch_out.expert_stats = &counts.tensor; /* never a view */
    REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "expert_stats");
    rank->dispatch_out.expert_stats = NULL;

    OK(dispatch(rank));
    rank->sums_matrix.shape[0] = TOKENS - 1;
    REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "tokens");
    rank->sums_matrix.shape[0] = TOKENS;
    sums->dtype.code = 0;
    REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "tokens");
    sums->dtype.code = 2;
    OK(combine(rank));
    CHECK(memcmp(rank->sums, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
    close_rank(rank);
}

/* A rank without tokens: no data, and whatever strides a framework gives to an empty array. */
static void test_no_tokens(void)
{
    static int64_t zeros[2] = {0, 0};
    struct rank *rank = open_alone();
    struct matrix *const empty[] = {&rank->tokens_matrix, &rank->ids_matrix, &rank->weights_matrix,
                                    &rank->sums_matrix};
    for (int form = 0; form < 3; form++) {
        for (int i = 0; i < 4; i++) {
            empty[i]->shape[0] = 0;
            if (form >= 1) empty[i]->tensor.data = NULL;
            if (form >= 2) empty[i]->tensor.strides = zeros;
        }
        OK(dispatch(rank));
        OK(combine(rank));
    }
    close_rank(rank);
}

/* A tensor without data is a view whatever its other fields say: a step without rows left its shape there, or nobody did. */
static void test_views_made_anew(void)
{
    a2a_config_t config = config_of(0, 1);
    config.layout = A2A_LAYOUT_FLAT; /* whose views HOST_COUNTS cuts */
    struct rank *rank = open_with(&config);
    rank->dispatch_in.flags = A2A_DISPATCH_HOST_COUNTS;
    rank->tokens_matrix.shape[0] = rank->ids_matrix.shape[0] = rank->weights_matrix.shape[0] = 0;
    OK(a2a_dispatch(rank->comm, rank->routing, &rank->dispatch_in, &rank->dispatch_out, NULL));
    CHECK(rank->rows.shape != NULL && rank->rows.shape[0] == 0);
    rank->tokens_matrix.shape[0] = rank->ids_matrix.shape[0] = rank->weights_matrix.shape[0] = TOKENS;
    for (int form = 0; form < 3; form++) {
        rank->rows.data = NULL;
        if (form >= 1) rank->rows.ndim = form == 1 ? INT32_MAX : 3;
        if (form >= 2) rank->rows.shape = (int64_t *)(uintptr_t)8; /* of a routing that is gone, for one */
        OK(a2a_dispatch(rank->comm, rank->routing, &rank->dispatch_in, &rank->dispatch_out, NULL));
        CHECK(rank->dispatch_out.num_rows == TOKENS && rank->rows.data != NULL);
        if (test_failed) return;
        CHECK(memcmp(row_of(&rank->rows, TOKENS - 1), rank->tokens + (TOKENS - 1) * HIDDEN, HIDDEN * 4) == 0);
    }
    close_rank(rank);
}

/* NVLINK_TWO_SIDED has no rows of its own. */
static void test_rows_that_are_not_kept(void)
{
    int32_t ids[MAX_TOKENS][TOPK], source[MAX_TOKENS][2];
    float weights[MAX_TOKENS][TOPK];
    struct matrix matrices[3];
    a2a_config_t config = config_of(0, 1);
    config.backend = A2A_BACKEND_NVLINK_TWO_SIDED;
    struct rank *rank = open_with(&config);
    a2a_tensor_t view, small[3];
    a2a_tensor_t **const outputs[] = {&rank->dispatch_out.tokens, &rank->dispatch_out.topk_ids,
                                      &rank->dispatch_out.topk_weights, &rank->dispatch_out.row_source};
    for (int i = 0; i < 4; i++) {
        a2a_tensor_t *kept = *outputs[i];
        memset(&view, 0, sizeof view);
        *outputs[i] = &view;
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "keeps no rows");
        CHECK(view.shape == NULL);
        *outputs[i] = kept;
    }
    if (test_failed) return; /* what follows looks into outputs */
    matrix_of(&matrices[0], ids, 0, 32, MAX_TOKENS, TOPK);
    matrix_of(&matrices[1], weights, 2, 32, MAX_TOKENS, TOPK);
    matrix_of(&matrices[2], source, 0, 32, MAX_TOKENS, 2);
    for (int i = 0; i < 3; i++) *outputs[i + 1] = &matrices[i].tensor;
    memset(small, 0, sizeof small); /* these may be views */
    rank->dispatch_out.expert_counts = &small[0];
    rank->dispatch_out.rank_counts = &small[1];
    rank->dispatch_out.status = &small[2];
    rank->own_matrix.shape[0] = MAX_TOKENS - 1;
    REFUSED(dispatch(rank), A2A_OVERFLOW, "tokens");
    rank->own_matrix.shape[0] = MAX_TOKENS;
    OK(dispatch(rank));
    CHECK(memcmp(rank->own_rows, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
    CHECK(memcmp(ids, rank->ids, sizeof rank->ids) == 0 && memcmp(weights, rank->weights, sizeof rank->weights) == 0);
    CHECK(source[TOKENS - 1][1] == TOKENS - 1 && source[TOKENS][1] == -1 && ids[TOKENS][0] == -1);
    CHECK(((int32_t *)small[1].data)[0] == TOKENS && ((int32_t *)small[2].data)[0] == 0);
    REFUSED(a2a_combine_buffer(rank->comm, rank->routing, &rank->buffer), A2A_UNSUPPORTED, "nvlink_two_sided");
    OK(combine(rank));
    CHECK(memcmp(rank->sums, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
    close_rank(rank);
}

/* What dispatch tells of expert blocks. */
static void test_expert_outputs(void)
{
    for (int i = 0; i < NUM_PAIRS; i++) {
        a2a_config_t config = config_of_pair(&PAIRS[i]);
        int contiguous = PAIRS[i].layout == A2A_LAYOUT_EXPERT_CONTIGUOUS;
        if (contiguous) config.expert_alignment = 4;
        struct rank *rank = open_with(&config);
        a2a_tensor_t offsets, counts, weights, ids;
        memset(&offsets, 0, sizeof offsets);
        memset(&counts, 0, sizeof counts);
        memset(&weights, 0, sizeof weights);
        memset(&ids, 0, sizeof ids);
        rank->dispatch_out.expert_offsets = &offsets;
        rank->dispatch_out.expert_counts = &counts;
        if (!is_by_expert(PAIRS[i].layout)) {
            REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "expert_offsets");
            close_rank(rank);
            continue;
        }
        rank->dispatch_out.topk_weights = &weights;
        rank->dispatch_out.topk_ids = &ids;
        if (contiguous) {
            OK(dispatch(rank));
            CHECK(ids.ndim == 1 && weights.ndim == 1 && rank->rows.ndim == 2);
        } else {
            REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "topk_ids"); /* an expert's rows stand together */
            rank->dispatch_out.topk_ids = NULL;
            OK(dispatch(rank));
            CHECK(weights.ndim == 2 && weights.shape[1] == MAX_TOKENS);
            CHECK(rank->rows.ndim == 3 && rank->rows.shape[0] == EXPERTS && rank->rows.shape[1] == MAX_TOKENS);
        }
        if (test_failed) return;
        CHECK(offsets.ndim == 1 && offsets.shape[0] == EXPERTS + 1 && counts.shape[0] == EXPERTS);
        int32_t end = 0;
        for (int e = 0; e < EXPERTS; e++) {
            int32_t count = 0, start = ((int32_t *)offsets.data)[e];
            CHECK(start == (contiguous ? end : e * MAX_TOKENS));
            for (int t = 0; t < TOKENS; t++) {
                if (rank->ids[t][0] != e && rank->ids[t][1] != e) continue;
                CHECK(row_of(&rank->rows, start + count)[7] == rank->tokens[t * HIDDEN + 7]);
                CHECK(row_of(&weights, 0)[start + count] == 0.5f);
                if (contiguous) CHECK(((int32_t *)ids.data)[start + count] == e);
                count++;
            }
            CHECK(((int32_t *)counts.data)[e] == count);
            end = start + (count + 3) / 4 * 4;
        }
        CHECK(((int32_t *)offsets.data)[EXPERTS] == (contiguous ? end : EXPERTS * MAX_TOKENS));
        OK(combine(rank));
        CHECK(memcmp(rank->sums, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
        close_rank(rank);
    }
}

/* Weights that combine is given, those it leaves out, and values that rows bring back. */
static void test_weights_of_combine(void)
{
    for (int i = 0; i < NUM_PAIRS; i++) {
        a2a_config_t config = config_of_pair(&PAIRS[i]);
        struct rank *rank = open_with(&config);
        int by_expert = is_by_expert(PAIRS[i].layout);
        int64_t rows = rank->info.row_capacity, columns = by_expert ? 1 : TOPK;
        float given[TOKENS][TOPK], back[TOKENS][TOPK];
        float *values = (float *)calloc((size_t)(rows * columns), sizeof *values);
        int32_t *source = (int32_t *)calloc((size_t)rows * 2, sizeof *source);
        struct matrix given_matrix, back_matrix, values_matrix, source_matrix;
        for (int t = 0; t < TOKENS; t++) given[t][0] = 2, given[t][1] = 1;
        matrix_of(&given_matrix, given, 2, 32, TOKENS, TOPK);
        matrix_of(&back_matrix, back, 2, 32, TOKENS, TOPK);
        matrix_of(&values_matrix, values, 2, 32, rows, columns);
        matrix_of(&source_matrix, source, 0, 32, rows, 2);
        if (by_expert) values_matrix.tensor.ndim = 1; /* [rows] */
        rank->dispatch_out.row_source = &source_matrix.tensor;

        OK(dispatch(rank));
        rank->combine_in.topk_weights = &given_matrix.tensor;
        if (by_expert) {
            rank->combine_in.flags = A2A_COMBINE_NO_WEIGHTS;
            REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "topk_weights");
            rank->combine_in.flags = 0;
            given_matrix.shape[1] = TOPK - 1;
            REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "topk_weights");
            given_matrix.shape[1] = TOPK;
            given_matrix.tensor.dtype.code = 0;
            REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "topk_weights");
            given_matrix.tensor.dtype.code = 2;
            OK(combine(rank));
            CHECK(rank->sums[HIDDEN + 3] == 3 * rank->tokens[HIDDEN + 3]);
            rank->combine_in.topk_weights = NULL;
            OK(dispatch(rank));
            rank->combine_in.flags = A2A_COMBINE_NO_WEIGHTS;
            OK(combine(rank));
            CHECK(rank->sums[HIDDEN + 3] == 2 * rank->tokens[HIDDEN + 3]);
        } else {
            REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "topk_weights");
            rank->combine_in.topk_weights = NULL;
            rank->combine_in.flags = A2A_COMBINE_NO_WEIGHTS;
            REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "NO_WEIGHTS");
            rank->combine_in.flags = 0;
            OK(combine(rank));
        }
        rank->combine_in.topk_weights = NULL;
        rank->combine_in.flags = 0;

        OK(dispatch(rank));
        rank->combine_out.topk_weights = &back_matrix.tensor;
        REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "topk_weights"); /* nothing brings it */
        rank->combine_in.row_weights = &values_matrix.tensor;
        back_matrix.tensor.data = NULL; /* never a view */
        REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "topk_weights");
        back_matrix.tensor.data = back;
        back_matrix.shape[1] = TOPK + 1;
        REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "topk_weights");
        back_matrix.shape[1] = TOPK;
        values_matrix.shape[0] = rows - 1;
        REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "row_weights");
        values_matrix.shape[0] = rows;
        values_matrix.tensor.dtype.bits = 16;
        REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "row_weights");
        values_matrix.tensor.dtype.bits = 32;
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t k = 0; k < columns; k++) values[row * columns + k] = (float)source[2 * row + 1] + 0.5f;
        }
        memset(back, 0, sizeof back);
        OK(combine(rank));
        for (int t = 0; t < TOKENS; t++) CHECK(back[t][0] == (float)t + 0.5f && back[t][1] == (float)t + 0.5f);

        OK(dispatch(rank)); /* and nobody has to take them */
        rank->combine_out.topk_weights = NULL;
        OK(combine(rank));
        CHECK(memcmp(rank->sums, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
        close_rank(rank);
        free(values);
        free(source);
    }

    /* Without ids no row has values to bring. */
    a2a_config_t config = config_of_pair(&PAIRS[0]);
    struct rank *rank = open_with(&config);
    float values[MAX_TOKENS][TOPK] = {{0}};
    struct matrix values_matrix;
    matrix_of(&values_matrix, values, 2, 32, MAX_TOKENS, TOPK);
    rank->dispatch_in.topk_ids = rank->dispatch_in.topk_weights = NULL;
    OK(dispatch(rank));
    rank->combine_in.row_weights = &values_matrix.tensor;
    REFUSED(combine(rank), A2A_INVALID_ARGUMENT, "row_weights");
    rank->combine_in.row_weights = NULL;
    OK(combine(rank));
    close_rank(rank);
}

static void test_reuse(void)
{
    for (int i = 0; i < NUM_PAIRS; i++) {
        a2a_config_t config = config_of_pair(&PAIRS[i]);
        struct rank *rank = open_with(&config);
        const a2a_tensor_t *ids = rank->dispatch_in.topk_ids, *weights = rank->dispatch_in.topk_weights;
        rank->dispatch_in.topk_ids = rank->dispatch_in.topk_weights = NULL;
        rank->dispatch_in.flags = A2A_DISPATCH_REUSE;
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "routing"); /* nothing to replay */
        rank->dispatch_in.flags = 0;
        rank->dispatch_in.topk_ids = ids;
        rank->dispatch_in.topk_weights = weights;
        OK(dispatch(rank));
        OK(combine(rank));

        rank->dispatch_in.flags = A2A_DISPATCH_REUSE;
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "topk_ids");
        rank->dispatch_in.topk_ids = NULL;
        rank->dispatch_in.max_tokens = MAX_TOKENS - 1; /* it was dispatched with the default, MAX_TOKENS */
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "max_tokens");
        rank->dispatch_in.max_tokens = MAX_TOKENS;
        OK(dispatch(rank));
        OK(combine(rank));
        rank->dispatch_in.max_tokens = 0;
        rank->dispatch_in.topk_weights = NULL;
        rank->tokens_matrix.shape[0] = TOKENS - 1;
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "tokens");
        rank->tokens_matrix.shape[0] = TOKENS;
        for (int n = 0; n < TOKENS * HIDDEN; n++) rank->tokens[n] += 7;
        OK(dispatch(rank));
        OK(combine(rank));
        CHECK(memcmp(rank->sums, rank->tokens, TOKENS * HIDDEN * sizeof(float)) == 0);
        close_rank(rank);
    }
}

/* More rows than a rank takes. */
static void test_overflow(void)
{
    for (int i = 0; i < NUM_PAIRS; i++) {
        a2a_layout_t layout = PAIRS[i].layout;
        if (layout == A2A_LAYOUT_GATHERED || layout == A2A_LAYOUT_RANK_MAJOR) continue;
        /* 6 tokens; experts 0 to 3 have 3, 4, 3 and 2 of them. */
        int32_t demand = layout == A2A_LAYOUT_FLAT ? 6 : layout == A2A_LAYOUT_EXPERT_PADDED ? 4 : 12;
        int32_t status[5];
        struct matrix status_matrix;
        a2a_config_t config = config_of_pair(&PAIRS[i]);
        matrix_of(&status_matrix, status, 0, 32, 5, 1);
        status_matrix.tensor.ndim = 1;
        config.max_recv_rows = demand - 1;

        struct rank *rank = open_with(&config);
        const a2a_tensor_t *ids = rank->dispatch_in.topk_ids, *weights = rank->dispatch_in.topk_weights;
        rank->dispatch_out.status = rank->combine_out.status = &status_matrix.tensor;
        for (int twice = 0; twice < 2; twice++) {
            memset(status, 0x77, sizeof status);
            REFUSED(dispatch(rank), A2A_OVERFLOW, "max_recv_rows");
            CHECK(status[0] == (A2A_STEP_VOID | A2A_STEP_OVERFLOW) && status[3] == demand && status[4] == 1);
            REFUSED(a2a_combine(rank->comm, rank->routing, &rank->combine_in, &rank->combine_out, NULL),
                    A2A_INVALID_ARGUMENT, NULL);
            rank->dispatch_in.flags = A2A_DISPATCH_REUSE;
            rank->dispatch_in.topk_ids = rank->dispatch_in.topk_weights = NULL;
            REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "routing");
            rank->dispatch_in.flags = 0;
            rank->dispatch_in.topk_ids = ids;
            rank->dispatch_in.topk_weights = weights;
            /* The slot takes the next one: a token less, which is the last of experts 1 and 2. */
            rank->tokens_matrix.shape[0] = rank->ids_matrix.shape[0] = rank->weights_matrix.shape[0] = TOKENS - 1;
            OK(dispatch(rank));
            CHECK(status[0] == 0 && status[2] == 0 && status[3] <= demand - 1);
            OK(combine(rank));
            rank->tokens_matrix.shape[0] = rank->ids_matrix.shape[0] = rank->weights_matrix.shape[0] = TOKENS;
        }
        close_rank(rank);

        config.overflow = A2A_OVERFLOW_DROP;
        rank = open_with(&config);
        rank->dispatch_out.status = rank->combine_out.status = &status_matrix.tensor;
        OK(dispatch(rank));
        CHECK(status[0] == A2A_STEP_DROPPED && status[2] == 1 && status[3] == demand && status[4] == 0);
        OK(combine(rank));
        CHECK(status[0] == A2A_STEP_DROPPED && status[2] == 1 && status[4] == 0);
        /* One row is missing: in FLAT the last token's, else one of the two that make a token. */
        int wrong = 0;
        for (int t = 0; t < TOKENS; t++) wrong += rank->sums[t * HIDDEN + 1] != rank->tokens[t * HIDDEN + 1];
        CHECK(wrong == 1);
        if (layout == A2A_LAYOUT_FLAT) CHECK(rank->sums[(TOKENS - 1) * HIDDEN + 1] == 0);
        close_rank(rank);
    }
}

/* Dispatch makes e4m3 of float32, with a scale a row: 64 columns are half a group. */
static void test_quantised(void)
{
    a2a_config_t config = config_of(0, 1);
    config.backend = A2A_BACKEND_HIGH_THROUGHPUT;
    config.quant = A2A_QUANT_FP8_F32_SCALES;
    for (int column = 0; column < 2; column++) {
        config.scale_layout = column ? A2A_SCALES_COLUMN : A2A_SCALES_ROW;
        struct rank *rank = open_with(&config);
        a2a_tensor_t scales;
        memset(&scales, 0, sizeof scales);
        rank->dispatch_out.scales = &scales;
        rank->dispatch_in.scales = &rank->weights_matrix.tensor; /* float32 tokens bring none */
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "scales");
        rank->dispatch_in.scales = NULL;
        rank->tokens_matrix.shape[1] = HIDDEN - 8; /* 56 bytes of e4m3 are no multiple of 16 */
        REFUSED(dispatch(rank), A2A_INVALID_ARGUMENT, "tokens");
        rank->tokens_matrix.shape[1] = HIDDEN;
        OK(dispatch(rank));
        if (test_failed) return;
        CHECK(rank->rows.dtype.code == 10 && rank->rows.dtype.bits == 8 && rank->rows.shape[1] == HIDDEN);
        CHECK(scales.dtype.code == 2 && scales.dtype.bits == 32 && scales.ndim == 2);
        CHECK(scales.shape[0] == MAX_TOKENS && scales.shape[1] == 1);
        CHECK(scales.strides[0] == 1 && scales.strides[1] == (column ? MAX_TOKENS : 1));
        for (int t = 0; t < TOKENS; t++) {
            const uint8_t *row = (const uint8_t *)rank->rows.data + t * rank->rows.strides[0];
            /* A token's last column is its largest, and the first token's first is 0. */
            CHECK(row_of(&scales, t)[0] == rank->tokens[t * HIDDEN + HIDDEN - 1] / 448.0f);
            CHECK(row[HIDDEN - 1] == 0x7e);
            if (t == 0) CHECK(row[0] == 0);
        }
        close_rank(rank);
    }
}

static void test_two_ranks(void)
{
    for (int i = 0; i < NUM_PAIRS; i++) {
        struct rank *ranks[2];
        a2a_unique_id_t id;
        OK(a2a_get_unique_id(&id));
        open_two(ranks, &id, PAIRS[i].backend, PAIRS[i].layout);
        for (int step = 0; step < 3; step++) step_of_two(ranks);
        run_two(ranks, halves_thread, halves_thread);
        run_two(ranks, halves_thread, step_thread); /* each rank as it likes */
        for (int r = 0; r < 2; r++) close_rank(ranks[r]);
    }
}

static void test_address(void)
{
    char address[64], longer[128], key[4098];
    a2a_unique_id_t id, same, other;
    struct rank *ranks[2];
    struct sockaddr_in any;
    socklen_t length = sizeof any;
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    /* A port that was free a moment ago. */
    memset(&any, 0, sizeof any);
    any.sin_family = AF_INET;
    any.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(listener, (struct sockaddr *)&any, sizeof any) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&any, &length) == 0);
    close(listener);
    snprintf(address, sizeof address, "127.0.0.1:%d", ntohs(any.sin_port));

    OK(a2a_unique_id_from_address(address, "a shared secret", &id));
    OK(a2a_unique_id_from_address(address, "a shared secret", &same));
    OK(a2a_unique_id_from_address(address, "another secret", &other));
    CHECK(memcmp(&id, &same, sizeof id) == 0);
    CHECK(memcmp(&id, &other, sizeof id) != 0);
    for (size_t i = 0; i + 6 <= sizeof id.bytes; i++) CHECK(memcmp(id.bytes + i, "secret", 6) != 0);
    open_two(ranks, &id, A2A_BACKEND_AUTO, A2A_LAYOUT_AUTO);
    step_of_two(ranks);
    for (int r = 0; r < 2; r++) close_rank(ranks[r]);

    memset(longer, 'h', sizeof longer);
    memcpy(longer + 90, ":80", 4);
    memset(key, 'k', sizeof key - 1);
    key[sizeof key - 1] = 0;
    REFUSED(a2a_unique_id_from_address("nohost", "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address("", "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address(":80", "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address("host:0", "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address("host:65536", "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address("host:1x", "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address(longer, "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address("\xff:80", "key", &id), A2A_INVALID_ARGUMENT, "address");
    REFUSED(a2a_unique_id_from_address("host:80", "", &id), A2A_INVALID_ARGUMENT, "key");
    REFUSED(a2a_unique_id_from_address("host:80", key, &id), A2A_INVALID_ARGUMENT, "key");
    OK(a2a_unique_id_from_address("[::1]:80", "key", &id));

    OK(a2a_get_unique_id(&id));
    OK(a2a_get_unique_id(&other));
    CHECK(memcmp(&id, &other, sizeof id) != 0);
}

static int entries(const char *directory)
{
    int count = 0;
    DIR *open = opendir(directory);
    while (readdir(open) != NULL) count++;
    closedir(open);
    return count;
}

static int lines(const char *path)
{
    int count = 0, c;
    FILE *file = fopen(path, "r");
    while ((c = fgetc(file)) != EOF) count += c == '\n';
    fclose(file);
    return count;
}

/* Comms that come and go, also those that fail, leave no descriptor, thread or mapping behind. */
static void test_nothing_stays(void)
{
    int descriptors = 0, threads = 0, mappings = 0;
    for (int round = 0; round < 40; round++) {
        struct rank *ranks[2];
        open_pair(ranks);
        step_of_two(ranks);
        if (round % 2) OK(a2a_abort(ranks[0]->comm));
        for (int r = 0; r < 2; r++) close_rank(ranks[r]);
        a2a_config_t config = config_of(0, 2);
        OK(a2a_get_unique_id(&config.unique_id));
        config.setup_timeout_ms = 1;
        REFUSED(create_with_config(&config), A2A_TIMEOUT, NULL);
        if (round != 9) continue; /* the first rounds fill caches */
        descriptors = entries("/proc/self/fd");
        threads = entries("/proc/self/task");
        mappings = lines("/proc/self/maps");
    }
    CHECK(entries("/proc/self/fd") == descriptors);
    CHECK(entries("/proc/self/task") <= threads);
    CHECK(lines("/proc/self/maps") <= mappings + 10); /* the allocator may take a few */
}

/* ------------------------------------------------------------------------------------------------ waits that end */

static void test_busy(void)
{
    struct rank *ranks[2];
    a2a_info_t info;
    a2a_stats_t stats;
    a2a_error_info_t error;
    char history[1024];
    pthread_t waiting;
    open_pair(ranks);
    info.struct_size = sizeof info;
    stats.struct_size = sizeof stats;
    error.struct_size = sizeof error;

    waiting = start(dispatch_thread, ranks[0]); /* rank 1 does not come yet */
    wait_until_busy(ranks[0]);
    ranks[0]->combine_in.tokens = &ranks[0]->tokens_matrix.tensor;
    REFUSED(a2a_combine(ranks[0]->comm, ranks[0]->routing, &ranks[0]->combine_in, &ranks[0]->combine_out, NULL),
            A2A_BUSY, "a2a_combine");
    ranks[0]->combine_in.tokens = &ranks[0]->buffer;
    REFUSED(a2a_combine_buffer(ranks[0]->comm, ranks[0]->routing, &ranks[0]->buffer), A2A_BUSY, NULL);
    REFUSED(a2a_dispatch(ranks[0]->comm, ranks[0]->routing, &ranks[0]->dispatch_in, &ranks[0]->dispatch_out, NULL),
            A2A_BUSY, NULL);
    /* At any time. */
    OK(a2a_get_info(ranks[0]->comm, &info));
    OK(a2a_get_stats(ranks[0]->comm, &stats));
    OK(a2a_get_async_error(ranks[0]->comm, &error));
    CHECK(error.status == A2A_SUCCESS);
    OK(a2a_get_history(ranks[0]->comm, history, sizeof history, NULL));
    CHECK(strstr(history, "\"number\":1,") != NULL && strstr(history, "\"outcome\":\"in flight\"}]") != NULL);
    OK(a2a_set_timeout(ranks[0]->comm, 0, 25000));
    REFUSED(a2a_set_timeout(ranks[0]->comm, -1, 0), A2A_INVALID_ARGUMENT, "timeout");

    OK(dispatch(ranks[1]));
    join_ok(waiting, ranks[0]);
    waiting = start(step_thread, ranks[0]); /* the pair goes on as if nothing had been */
    OK(dispatch(ranks[1]));
    OK(combine(ranks[1]));
    join_ok(waiting, ranks[0]);
    for (int r = 0; r < 2; r++) close_rank(ranks[r]);
}

static void test_abort(void)
{
    struct rank *ranks[2];
    a2a_error_info_t error;
    pthread_t waiting;
    double before;
    open_pair(ranks);
    error.struct_size = sizeof error;

    waiting = start(dispatch_thread, ranks[0]);
    wait_until_busy(ranks[0]);
    before = now_ms();
    OK(a2a_abort(ranks[0]->comm));
    CHECK(now_ms() - before < 1000);
    pthread_join(waiting, NULL);
    CHECK(now_ms() - before < 2000);
    CHECK(ranks[0]->status == A2A_ABORTED);
    CHECK(strstr(ranks[0]->error, "a2a_abort") != NULL);

    /* What is left of the comm. */
    REFUSED(dispatch(ranks[0]), A2A_ABORTED, NULL);
    REFUSED(a2a_routing_create(ranks[0]->comm, 0, &ranks[0]->routing), A2A_ABORTED, NULL);
    OK(a2a_abort(ranks[0]->comm));
    OK(a2a_get_async_error(ranks[0]->comm, &error));
    CHECK(error.status == A2A_ABORTED && error.message[0] != 0 && error.rank == 0);

    /* The peer has all of rank 0's dispatch, which it waited in; what it misses is the combine. */
    before = now_ms();
    OK(dispatch(ranks[1]));
    REFUSED(combine(ranks[1]), A2A_PEER_LOST, "rank 0");
    CHECK(now_ms() - before < 2000);
    OK(a2a_get_async_error(ranks[1]->comm, &error));
    CHECK(error.status == A2A_PEER_LOST && error.rank == 1 && error.peer == 0 && error.operation == 2);
    CHECK(error.lost_ranks[0] == 1);
    for (int r = 0; r < 2; r++) close_rank(ranks[r]);
}

static void test_timeout(void)
{
    struct rank *ranks[2];
    a2a_error_info_t error;
    a2a_stats_t stats;
    double before;
    open_pair(ranks);
    error.struct_size = sizeof error;
    stats.struct_size = sizeof stats;

    OK(a2a_set_timeout(ranks[0]->comm, 200, 200));
    before = now_ms();
    REFUSED(dispatch(ranks[0]), A2A_TIMEOUT, "rank 1");
    CHECK(now_ms() - before >= 195 && now_ms() - before < 3000);
    before = now_ms();
    REFUSED(dispatch(ranks[0]), A2A_TIMEOUT, NULL); /* the slot is closed: no second wait */
    CHECK(now_ms() - before < 150);
    OK(a2a_get_async_error(ranks[0]->comm, &error));
    CHECK(error.status == A2A_TIMEOUT && error.operation == 1 && error.slot == 0);
    CHECK(error.rank == 0 && error.peer == 1 && error.sequence == 1 && error.lost_ranks[0] == 2);
    CHECK(error.expected != error.seen && strstr(error.message, "rank 1") != NULL);
    /* Both calls follow the sentence, the last one first. */
    CHECK(strstr(error.message, "; last: #2 dispatch BOTH slot 0 timeout after ") != NULL);
    CHECK(strstr(error.message, " ms, #1 dispatch BOTH slot 0 timeout after 2") != NULL);
    OK(a2a_get_stats(ranks[0]->comm, &stats));
    CHECK(stats.steps_lost == 1);
    for (int r = 0; r < 2; r++) close_rank(ranks[r]);
}

static void test_destroyed_peer(void)
{
    struct rank *ranks[2];
    pthread_t waiting;
    double before;
    open_pair(ranks);
    waiting = start(dispatch_thread, ranks[0]);
    wait_until_busy(ranks[0]);
    before = now_ms();
    close_rank(ranks[1]);
    CHECK(now_ms() - before < 1000); /* never waits for peers */
    pthread_join(waiting, NULL);
    CHECK(ranks[0]->status == A2A_PEER_LOST && strstr(ranks[0]->error, "rank 1") != NULL);
    close_rank(ranks[0]);

    /* A comm destroyed under a call of another thread ends that call. */
    open_pair(ranks);
    waiting = start(dispatch_thread, ranks[0]);
    wait_until_busy(ranks[0]);
    before = now_ms();
    OK(a2a_destroy(ranks[0]->comm));
    pthread_join(waiting, NULL);
    CHECK(now_ms() - before < 2000);
    CHECK(ranks[0]->status == A2A_ABORTED);
    ranks[0]->comm = NULL;
    for (int r = 0; r < 2; r++) close_rank(ranks[r]);
}

static void test_mismatch(void)
{
    struct rank *ranks[2];
    pthread_t threads[2];
    a2a_unique_id_t id;
    OK(a2a_get_unique_id(&id));
    for (int r = 0; r < 2; r++) {
        a2a_config_t config = config_of(r, 2);
        config.unique_id = id;
        config.max_tokens += r;
        ranks[r] = rank_of(&config);
        threads[r] = start(create_thread, ranks[r]);
    }
    for (int r = 0; r < 2; r++) {
        pthread_join(threads[r], NULL);
        CHECK(ranks[r]->status == A2A_MISMATCH && ranks[r]->comm == NULL);
        CHECK(strstr(ranks[r]->error, "max_tokens") != NULL);
        close_rank(ranks[r]);
    }

    /* A rank that does not come. */
    a2a_config_t config = config_of(0, 2);
    OK(a2a_get_unique_id(&config.unique_id));
    config.setup_timeout_ms = 300;
    double before = now_ms();
    REFUSED(create_with_config(&config), A2A_TIMEOUT, "ranks 1 of 2");
    CHECK(now_ms() - before < 3000);
}

/* ----------------------------------------------------------------------------------------------------------- main */

#define TEST(name) {#name, test_##name}

static const struct {
    const char *name;
    void (*body)(void);
} TESTS[] = {
    TEST(version),
    TEST(status_names),
    TEST(backend_names),
    TEST(last_error_is_per_thread),
    TEST(log_callback),
    TEST(config_init),
    TEST(sizes_of_arguments),
    TEST(sizes_of_results),
    TEST(unknown_constants),
    TEST(cuda_or_why_not),
    TEST(recover),
    TEST(how_ranks_meet),
    TEST(features_not_in_this_build),
    TEST(config_ranges),
    TEST(layouts),
    TEST(options_of_layouts),
    TEST(explain),
    TEST(memory),
    TEST(nulls),
    TEST(handles),
    TEST(one_rank),
    TEST(history),
    TEST(order_of_calls),
    TEST(tensors),
    TEST(no_tokens),
    TEST(views_made_anew),
    TEST(rows_that_are_not_kept),
    TEST(expert_outputs),
    TEST(weights_of_combine),
    TEST(reuse),
    TEST(overflow),
    TEST(quantised),
    TEST(two_ranks),
    TEST(address),
    TEST(nothing_stays),
    TEST(busy),
    TEST(abort),
    TEST(timeout),
    TEST(destroyed_peer),
    TEST(mismatch),
};

int main(int argc, char **argv)
{
    int passed = 0, failed = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(180); /* a hang is a failure, not a wait */
    for (size_t i = 0; i < sizeof TESTS / sizeof TESTS[0]; i++) {
        if (argc > 1 && strcmp(argv[1], TESTS[i].name) != 0) continue;
        test_failed = 0;
        TESTS[i].body();
        printf("%s %s\n", TESTS[i].name, test_failed ? "FAIL" : "ok");
        passed += !test_failed;
        failed += test_failed;
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
