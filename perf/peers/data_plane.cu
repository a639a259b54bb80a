// The bare data plane: the copies that a dispatch, and the sums that a combine, cannot do without, on one GPU. Where
// rows go is known beforehand; no ids, no counts, no flags, no peer is waited for. What a library takes beyond these
// times is its protocol.
//
//   data_plane RANKS TOKENS HIDDEN bf16|f8 TOPK EXPERTS WARMUP ITERATIONS [IDS [GPU [rank|expert [SMS]]]]
//
// A rank is a stream and a window; TOKENS are each rank's. f8: a row is HIDDEN e4m3 numbers with a float32 for each
// 128 of them, as one piece. Results are bf16 always. IDS is a file of int32 [RANKS][TOKENS][TOPK]; without it tokens
// choose by the keyed hash that a2a-perf uses, with seed 1. Experts lie in consecutive blocks.
//   rank, expert  a token has a row for each rank that it goes to (the default), or for each of its experts
//   SMS     (IDS may then be '-': none) on so many multiprocessors for each rank, dispatch alone, by bulk copies
//
// Everything that is timed is checked first. Prints CSV; every line that is not of the table begins with '#'.
//   kernel  split: a row over blocks of 128 threads, one 16-byte piece each; block: a row to a block of 256 threads;
//           bulk: half a row to a warp, by bulk copies through shared memory
//   scope   all: every rank's kernel at once; rank0: its kernel alone
// Dispatch and combine are timed in turn, as a step has them: either finds the cache full of what the other wrote.
// Times are of device events behind a kernel that spins until the host has put everything on the streams.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#define CUDA(call)                                                                                  \
    do {                                                                                            \
        cudaError_t error = (call);                                                                 \
        if (error != cudaSuccess) {                                                                 \
            fprintf(stderr, "data_plane: %s: %s\n", #call, cudaGetErrorString(error));              \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)

// What one rank's kernels work on. A place is a rank's window and a row of it.
struct Job {
    int rank, tokens, width;
    int token_vectors, result_vectors;  // 16-byte pieces of a row
    const int *count;                   // [tokens] places of each token
    const int2 *places;                 // [tokens][width]
    const uint4 *input;                 // [tokens][token_vectors]
    uint4 *const *windows;              // [ranks] of rows of token_vectors
    const uint4 *const *results;        // [ranks] of rows of result_vectors
    uint4 *sums;                        // [tokens][result_vectors]
};

constexpr int SPLIT = 128, BLOCK = 256;

// ------------------------------------------------------------------------------------------------------- the kernels

// N bounds the places of a token. All addresses are known before the first store: a store could change what is read.
template <int N> struct Targets {
    uint4 *row[N];
    int count;
    __device__ Targets(const Job &job, int token) : count(job.count[token]) {
        const int2 *places = job.places + (size_t)token * job.width;
#pragma unroll
        for (int n = 0; n < N; n++) {
            row[n] = nullptr;
            if (n < count) row[n] = job.windows[places[n].x] + (size_t)places[n].y * job.token_vectors;
        }
    }
    __device__ void store(int at, uint4 value) const {
#pragma unroll
        for (int n = 0; n < N; n++)
            if (n < count) row[n][at] = value;
    }
};

template <int N> struct Sources {
    const uint4 *row[N];
    int count;
    __device__ Sources(const Job &job, int token) : count(job.count[token]) {
        const int2 *places = job.places + (size_t)token * job.width;
#pragma unroll
        for (int n = 0; n < N; n++) {
            row[n] = nullptr;
            if (n < count) row[n] = job.results[places[n].x] + (size_t)places[n].y * job.result_vectors;
        }
    }
    // Eight columns: all rows are on their way before the first is added, in float32, from +0, in order.
    __device__ uint4 sum(int at) const {
        uint4 value[N];
#pragma unroll
        for (int n = 0; n < N; n++)
            if (n < count) value[n] = row[n][at];
        float low[4] = {}, high[4] = {};
#pragma unroll
        for (int n = 0; n < N; n++) {
            if (n >= count) continue;
            const unsigned word[4] = {value[n].x, value[n].y, value[n].z, value[n].w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                low[i] = __fadd_rn(low[i], __uint_as_float(word[i] << 16));
                high[i] = __fadd_rn(high[i], __uint_as_float(word[i] & 0xffff0000u));
            }
        }
        unsigned out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            __nv_bfloat162 both = __floats2bfloat162_rn(low[i], high[i]);
            memcpy(&out[i], &both, 4);
        }
        return make_uint4(out[0], out[1], out[2], out[3]);
    }
};

template <int N> __global__ void __launch_bounds__(SPLIT) dispatch_split(Job job, int pieces) {
    int token = blockIdx.x / pieces, at = blockIdx.x % pieces * SPLIT + threadIdx.x;
    if (at >= job.token_vectors) return;
    uint4 value = __ldg(job.input + (size_t)token * job.token_vectors + at);
    Targets<N>(job, token).store(at, value);
}

template <int N> __global__ void __launch_bounds__(BLOCK) dispatch_block(Job job) {
    int token = blockIdx.x;
    const uint4 *from = job.input + (size_t)token * job.token_vectors;
    Targets<N> to(job, token);
#pragma unroll 4
    for (int at = threadIdx.x; at < job.token_vectors; at += BLOCK) to.store(at, __ldg(from + at));
}

// A warp takes pieces of rows by turns, two of which have room in shared memory: one is brought while another is stored.
constexpr int BULK = 448, STAGES = 2, MOST_PIECE = 448;
__device__ inline unsigned shared_address(const void *at) { return (unsigned)__cvta_generic_to_shared(at); }
__global__ void __launch_bounds__(BULK, 1) dispatch_bulk(Job job, int piece) {
    extern __shared__ __align__(128) uint4 stages[];
    __shared__ unsigned long long barriers[BULK / 32][STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = (job.token_vectors + piece - 1) / piece;
    const int items = job.tokens * pieces, first = warp * gridDim.x + blockIdx.x, step = gridDim.x * (BULK / 32);
    auto bytes = [&](int item) { return min(piece, job.token_vectors - item % pieces * piece) * 16; };
    auto load = [&](int turn) {
        const int item = first + turn * step;
        if (item >= items || lane) return;
        const unsigned barrier = shared_address(&barriers[warp][turn % STAGES]);
        const uint4 *from = job.input + (size_t)(item / pieces) * job.token_vectors + item % pieces * piece;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes(item)) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(stages + (warp * STAGES + turn % STAGES) * piece)),
                     "l"(from), "r"(bytes(item)), "r"(barrier)
                     : "memory");
    };
    if (lane < STAGES) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&barriers[warp][lane])));
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    load(0);
    for (int turn = 0, item = first; item < items; turn++, item += step) {
        const int token = item / pieces;
        const unsigned barrier = shared_address(&barriers[warp][turn % STAGES]);
        const int2 place = lane < job.count[token] ? job.places[(size_t)token * job.width + lane] : make_int2(-1, 0);
        asm volatile("{\n\t.reg .pred done;\nagain:\n\tmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
                     "@!done bra again;\n\t}" ::"r"(barrier), "r"(turn / STAGES % 2) : "memory");
        if (place.x >= 0) {
            uint4 *to = job.windows[place.x] + (size_t)place.y * job.token_vectors + item % pieces * piece;
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(
                             shared_address(stages + (warp * STAGES + turn % STAGES) * piece)),
                         "r"(bytes(item)) : "memory");
        }
        asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 1;" ::: "memory");
        __syncwarp();
        load(turn + 1);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <int N> __global__ void __launch_bounds__(SPLIT) combine_split(Job job, int pieces) {
    int token = blockIdx.x / pieces, at = blockIdx.x % pieces * SPLIT + threadIdx.x;
    if (at >= job.result_vectors) return;
    job.sums[(size_t)token * job.result_vectors + at] = Sources<N>(job, token).sum(at);
}

template <int N> __global__ void __launch_bounds__(BLOCK) combine_block(Job job) {
    int token = blockIdx.x;
    Sources<N> from(job, token);
    uint4 *to = job.sums + (size_t)token * job.result_vectors;
    for (int at = threadIdx.x; at < job.result_vectors; at += BLOCK) to[at] = from.sum(at);
}

// ----------------------------------------------------------------------------------------------------------- checking

__host__ __device__ inline unsigned token_word(int rank, int token, int word) {
    return (rank * 0x9e3779b9u + token * 0x85ebca6bu + word) * 0xc2b2ae35u ^ 0x5bd1e995u;
}
// Sixteenths that bf16 holds exactly, as do their sums of 32 in float32.
__host__ __device__ inline float result_number(int rank, int row, int column) {
    return (float)((rank * 37 + row * 11 + column * 3) % 251 - 125) / 16.0f;
}

__global__ void fill_tokens(uint4 *rows, int rank, int vectors) {
    unsigned *words = (unsigned *)(rows + (size_t)blockIdx.x * vectors);
    for (int at = threadIdx.x; at < vectors * 4; at += blockDim.x) words[at] = token_word(rank, blockIdx.x, at);
}
__global__ void fill_results(uint4 *rows, int rank, int vectors) {
    __nv_bfloat16 *numbers = (__nv_bfloat16 *)(rows + (size_t)blockIdx.x * vectors);
    for (int at = threadIdx.x; at < vectors * 8; at += blockDim.x)
        numbers[at] = __float2bfloat16_rn(result_number(rank, blockIdx.x, at));
}
__global__ void check_dispatch(Job job, unsigned long long *wrong) {
    int token = blockIdx.x;
    for (int n = 0; n < job.count[token]; n++) {
        int2 place = job.places[(size_t)token * job.width + n];
        const unsigned *words = (const unsigned *)(job.windows[place.x] + (size_t)place.y * job.token_vectors);
        for (int at = threadIdx.x; at < job.token_vectors * 4; at += blockDim.x)
            if (words[at] != token_word(job.rank, token, at)) atomicAdd(wrong, 1ull);
    }
}
__global__ void check_combine(Job job, unsigned long long *wrong) {
    int token = blockIdx.x;
    const __nv_bfloat16 *got = (const __nv_bfloat16 *)(job.sums + (size_t)token * job.result_vectors);
    for (int at = threadIdx.x; at < job.result_vectors * 8; at += blockDim.x) {
        float sum = 0;
        for (int n = 0; n < job.count[token]; n++) {
            int2 place = job.places[(size_t)token * job.width + n];
            sum = __fadd_rn(sum, result_number(place.x, place.y, at));
        }
        if (__bfloat162float(got[at]) != __bfloat162float(__float2bfloat16_rn(sum))) atomicAdd(wrong, 1ull);
    }
}

// ------------------------------------------------------------------------------------------------------------- timing

__global__ void gate(const volatile unsigned *open) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    // Opens by itself after 10 s: a process that dies leaves no kernel behind.
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (!*open && now - start < 10000000000ull);
}

struct Clock {
    cudaStream_t main;
    std::vector<cudaStream_t> streams;
    std::vector<cudaEvent_t> done;
    cudaEvent_t start, end;
    volatile unsigned *open;

    explicit Clock(int ranks) : streams(ranks), done(ranks) {
        CUDA(cudaStreamCreateWithFlags(&main, cudaStreamNonBlocking));
        for (auto &stream : streams) CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        for (auto &event : done) CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        CUDA(cudaEventCreate(&start));
        CUDA(cudaEventCreate(&end));
        void *word;
        CUDA(cudaHostAlloc(&word, sizeof(unsigned), cudaHostAllocPortable | cudaHostAllocMapped));
        open = (volatile unsigned *)word;
    }

    double behind_gate(cudaStream_t stream, const std::function<void()> &put) {
        *open = 0;
        auto shut = std::chrono::steady_clock::now();
        gate<<<1, 1, 0, stream>>>(open);
        CUDA(cudaGetLastError());
        CUDA(cudaEventRecord(start, stream));
        put();
        CUDA(cudaEventRecord(end, stream));
        // What the host has called reaches the device's queues a little later.
        while (std::chrono::steady_clock::now() - shut < std::chrono::microseconds(50)) {}
        *open = 1;
        CUDA(cudaDeviceSynchronize());
        float milliseconds;
        CUDA(cudaEventElapsedTime(&milliseconds, start, end));
        return milliseconds * 1e3;
    }
    double all(const std::function<void(int, cudaStream_t)> &put) {
        return behind_gate(main, [&] {
            for (auto stream : streams) CUDA(cudaStreamWaitEvent(stream, start, 0));
            for (size_t rank = 0; rank < streams.size(); rank++) put((int)rank, streams[rank]);
            for (size_t rank = 0; rank < streams.size(); rank++) {
                CUDA(cudaEventRecord(done[rank], streams[rank]));
                CUDA(cudaStreamWaitEvent(main, done[rank], 0));
            }
        });
    }
    double first(const std::function<void(int, cudaStream_t)> &put) {
        return behind_gate(streams[0], [&] { put(0, streams[0]); });
    }
};

double percentile(const std::vector<double> &sorted, size_t percent) {
    return sorted[std::max<size_t>((sorted.size() * percent + 99) / 100, 1) - 1];
}

// ------------------------------------------------------------------------------------------------------------ routing

uint64_t mixed(std::initializer_list<uint64_t> words) {
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (uint64_t word : words) {
        state = (state + word) * 0xbf58476d1ce4e5b9u;
        state = (state ^ state >> 30) * 0xbf58476d1ce4e5b9u;
        state = (state ^ state >> 27) * 0x94d049bb133111ebu;
        state ^= state >> 31;
    }
    return state;
}

std::vector<int32_t> hashed_ids(int ranks, int tokens, int topk, int experts) {
    std::vector<int32_t> ids;
    for (int rank = 0; rank < ranks; rank++)
        for (int token = 0; token < tokens; token++) {
            size_t start = ids.size();
            for (uint64_t draw = 0; ids.size() < start + topk; draw++) {
                int32_t id = (int32_t)(mixed({1, (uint64_t)rank, (uint64_t)token, draw}) % experts);
                if (std::find(ids.begin() + start, ids.end(), id) == ids.end()) ids.push_back(id);
            }
        }
    return ids;
}

int owner(int id, int experts, int ranks) {
    int each = experts / ranks, longer = experts % ranks;
    return id < longer * (each + 1) ? id / (each + 1) : longer + (id - longer * (each + 1)) / each;
}

// The ranks that a token's rows lie on, in order: each once, or once for each of its experts there.
std::vector<int> destinations(const int32_t *ids, int topk, int experts, int ranks, bool by_expert) {
    std::vector<int> to;
    std::copy_if(ids, ids + topk, std::back_inserter(to), [=](int32_t id) { return id >= 0 && id < experts; });
    std::sort(to.begin(), to.end());
    to.erase(std::unique(to.begin(), to.end()), to.end());
    for (int &id : to) id = owner(id, experts, ranks);
    if (!by_expert) to.erase(std::unique(to.begin(), to.end()), to.end());
    return to;
}

template <class T> T *on_device(const std::vector<T> &from) {
    T *to;
    CUDA(cudaMalloc(&to, std::max<size_t>(from.size(), 1) * sizeof(T)));
    CUDA(cudaMemcpy(to, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    return to;
}

uint4 *rows_on_device(size_t rows, int vectors) {
    uint4 *to;
    CUDA(cudaMalloc(&to, std::max<size_t>(rows * vectors, 1) * sizeof(uint4)));
    return to;
}

// --------------------------------------------------------------------------------------------------------------- main

// Both operations in one shape of grid.
struct Kernels {
    const char *name;
    std::function<void(const Job &, cudaStream_t)> dispatch, combine;
};

Kernels bulk_kernels(int sms) {
    const int most = BULK / 32 * STAGES * MOST_PIECE * 16;
    CUDA(cudaFuncSetAttribute(dispatch_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    return {"bulk",
            [=](const Job &job, cudaStream_t stream) {
                int pieces = (job.token_vectors + MOST_PIECE - 1) / MOST_PIECE;
                int piece = (job.token_vectors + pieces - 1) / pieces;
                dispatch_bulk<<<sms, BULK, BULK / 32 * STAGES * piece * 16, stream>>>(job, piece);
            },
            nullptr};
}

template <int N> std::vector<Kernels> kernels() {
    auto pieces = [](int vectors) { return (vectors + SPLIT - 1) / SPLIT; };
    return {
        {"split",
         [=](const Job &job, cudaStream_t stream) {
             int n = pieces(job.token_vectors);
             dispatch_split<N><<<job.tokens * n, SPLIT, 0, stream>>>(job, n);
         },
         [=](const Job &job, cudaStream_t stream) {
             int n = pieces(job.result_vectors);
             combine_split<N><<<job.tokens * n, SPLIT, 0, stream>>>(job, n);
         }},
        {"block",
         [](const Job &job, cudaStream_t stream) { dispatch_block<N><<<job.tokens, BLOCK, 0, stream>>>(job); },
         [](const Job &job, cudaStream_t stream) { combine_block<N><<<job.tokens, BLOCK, 0, stream>>>(job); }},
    };
}

[[noreturn]] void usage(const char *why) {
    fprintf(stderr, "data_plane: %s\nusage: data_plane RANKS TOKENS HIDDEN bf16|f8 TOPK EXPERTS WARMUP ITERATIONS "
                    "[IDS [GPU [rank|expert [SMS]]]]\n", why);
    exit(2);
}

int main(int argc, char **argv) {
    if (argc < 9 || argc > 13) usage("wrong number of arguments");
    auto number = [&](int at, int least) {
        char *end;
        long value = strtol(argv[at], &end, 10);
        if (*end || value < least || value > 1 << 24) usage(argv[at]);
        return (int)value;
    };
    const int ranks = number(1, 1), tokens = number(2, 1), hidden = number(3, 1), topk = number(5, 1);
    const int experts = number(6, 1), warmup = number(7, 0), iterations = number(8, 1);
    const bool f8 = !strcmp(argv[4], "f8");
    if (!f8 && strcmp(argv[4], "bf16")) usage(argv[4]);
    if (topk > 32 || topk > experts || experts < ranks) usage("top-k is at most 32 and the experts, experts at least the ranks");
    const bool by_expert = argc > 11 && !strcmp(argv[11], "expert");
    if (argc > 11 && !by_expert && strcmp(argv[11], "rank")) usage(argv[11]);
    const int sms = argc > 12 ? number(12, 1) : 0;
    const int token_bytes = f8 ? hidden + (hidden + 127) / 128 * 4 : hidden * 2, result_bytes = hidden * 2;
    if (token_bytes % 16 || result_bytes % 16) usage("rows are no multiple of 16 bytes");
    const int token_vectors = token_bytes / 16, result_vectors = result_bytes / 16;

    std::vector<int32_t> ids;
    if (argc > 9 && strcmp(argv[9], "-")) {
        ids.resize((size_t)ranks * tokens * topk);
        FILE *file = fopen(argv[9], "rb");
        if (!file || fread(ids.data(), sizeof(int32_t), ids.size(), file) != ids.size()) usage(argv[9]);
        fclose(file);
    } else {
        ids = hashed_ids(ranks, tokens, topk, experts);
    }

    // Ranks must not share a hardware queue, and no kernel may be loaded while the gate's runs.
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    const int gpu = argc > 10 ? number(10, 0) : 0;
    cudaDeviceProp device;
    CUDA(cudaSetDevice(gpu));
    CUDA(cudaGetDeviceProperties(&device, gpu));
    printf("# %s, %d ranks share it: not NVLink timings\n", device.name, ranks);

    // Where each rank's rows go: the window, and how many rows of the same source lie before.
    const int width = by_expert ? topk : std::min(topk, ranks);
    std::vector<std::vector<int>> counts(ranks, std::vector<int>(tokens));
    std::vector<std::vector<int2>> places(ranks, std::vector<int2>((size_t)tokens * width));
    std::vector<size_t> rows(ranks);
    int from_source = tokens;
    for (int rank = 0; rank < ranks; rank++) {
        std::vector<int> taken(ranks);
        for (int token = 0; token < tokens; token++) {
            int &count = counts[rank][token];
            const int32_t *chosen = &ids[((size_t)rank * tokens + token) * topk];
            for (int to : destinations(chosen, topk, experts, ranks, by_expert))
                places[rank][(size_t)token * width + count++] = make_int2(to, taken[to]++);
            rows[rank] += count;
        }
        from_source = std::max(from_source, *std::max_element(taken.begin(), taken.end()));
    }

    // Windows are [ranks][tokens] rows, packed by source; wider where rows for experts are more than tokens.
    const size_t window_rows = (size_t)ranks * from_source;
    std::vector<uint4 *> windows, results;
    for (int rank = 0; rank < ranks; rank++) {
        windows.push_back(rows_on_device(window_rows, token_vectors));
        results.push_back(rows_on_device(window_rows, result_vectors));
        fill_results<<<(unsigned)window_rows, 256>>>(results[rank], rank, result_vectors);
    }
    uint4 **device_windows = on_device(windows), **device_results = on_device(results);

    std::vector<Job> jobs;
    for (int rank = 0; rank < ranks; rank++) {
        for (int2 &place : places[rank]) place.y += rank * from_source;
        Job job{rank, tokens, width, token_vectors, result_vectors};
        job.count = on_device(counts[rank]);
        job.places = on_device(places[rank]);
        uint4 *input = rows_on_device(tokens, token_vectors);
        fill_tokens<<<tokens, 256>>>(input, rank, token_vectors);
        job.input = input;
        job.windows = device_windows;
        job.results = (const uint4 *const *)device_results;
        job.sums = rows_on_device(tokens, result_vectors);
        jobs.push_back(job);
    }
    unsigned long long *wrong;
    CUDA(cudaMalloc(&wrong, sizeof *wrong));
    CUDA(cudaMemset(wrong, 0, sizeof *wrong));
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());

    size_t all_rows = 0;
    for (size_t count : rows) all_rows += count;
    Clock clock(ranks);
    printf("operation,kernel,scope,rows,memory_bytes,p10_us,p50_us,p90_us,p99_us\n");
    const auto tried = sms ? std::vector<Kernels>{bulk_kernels(sms)} : width <= 8 ? kernels<8>() : kernels<32>();
    for (const Kernels &kernel : tried) {
        auto dispatch = [&](int rank, cudaStream_t stream) {
            kernel.dispatch(jobs[rank], stream);
            CUDA(cudaGetLastError());
        };
        auto combine = [&](int rank, cudaStream_t stream) {
            if (!kernel.combine) return;
            kernel.combine(jobs[rank], stream);
            CUDA(cudaGetLastError());
        };
        // Nothing that another kernel wrote may pass for this one's.
        for (int rank = 0; rank < ranks; rank++) {
            CUDA(cudaMemset(windows[rank], 0xa5, window_rows * token_bytes));
            CUDA(cudaMemset(jobs[rank].sums, 0xa5, (size_t)tokens * result_bytes));
        }
        CUDA(cudaDeviceSynchronize());
        for (int rank = 0; rank < ranks; rank++) dispatch(rank, clock.streams[rank]), combine(rank, clock.streams[rank]);
        CUDA(cudaDeviceSynchronize());
        for (const Job &job : jobs) {
            check_dispatch<<<tokens, 256>>>(job, wrong);
            if (kernel.combine) check_combine<<<tokens, 256>>>(job, wrong);
        }
        unsigned long long count;
        CUDA(cudaMemcpy(&count, wrong, sizeof count, cudaMemcpyDeviceToHost));
        if (count) {
            fprintf(stderr, "data_plane: %s is wrong in %llu places\n", kernel.name, count);
            return 1;
        }
        for (const char *scope : {"all", "rank0"}) {
            const bool all = !strcmp(scope, "all");
            std::vector<double> times[2];
            for (int i = 0; i < warmup + iterations; i++) {
                double dispatched = all ? clock.all(dispatch) : clock.first(dispatch);
                if (kernel.combine == nullptr) {
                    if (i >= warmup) times[0].push_back(dispatched);
                    continue;
                }
                double combined = all ? clock.all(combine) : clock.first(combine);
                if (i >= warmup) times[0].push_back(dispatched), times[1].push_back(combined);
            }
            const size_t moved = all ? all_rows : rows[0], own = (size_t)tokens * (all ? ranks : 1);
            for (int i = 0; i < (kernel.combine ? 2 : 1); i++) {
                std::sort(times[i].begin(), times[i].end());
                printf("%s,%s,%s,%zu,%zu,%.3f,%.3f,%.3f,%.3f\n", i ? "combine" : "dispatch", kernel.name, scope, moved,
                       (moved + own) * (i ? result_bytes : token_bytes), percentile(times[i], 10),
                       percentile(times[i], 50), percentile(times[i], 90), percentile(times[i], 99));
            }
        }
    }
    return 0;
}
