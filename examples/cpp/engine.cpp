/*
 * An engine in small: four ranks, threads of this process, run a prefill of very different lengths through one
 * mixture-of-experts layer with Communication (communication.hpp), and compare what they get, bit for bit, with one that runs alone.
 *
 *     engine [--device cpu|cuda] [--explain]
 *
 * On CPU memory experts scale their rows, each by a number of its own. On CUDA memory, where this example has no kernel, they return
 * them as they are; the layer is then captured as a graph as well, and replayed with other tokens. All ranks share GPU 0.
 */
#include "communication.hpp"
#include "cuda.hpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using engine::Communication;
using engine::cuda::Driver;
using engine::cuda::Graph;

constexpr std::int32_t num_ranks = 4, num_experts = 10, topk = 4, hidden = 256;
constexpr std::int32_t wanted_step = 1024;                     // tokens of a rank
constexpr std::uint64_t memory_limit = 8 << 20;                // bytes of a rank: fewer tokens a step
const std::vector<std::int32_t> prefill = {300, 70, 0, 613};   // tokens of each rank

/** An array of the engine's, on the device. */
class Array {
public:
    Array(const Driver *cuda, std::size_t bytes) : cuda_(cuda), bytes_(bytes)
    {
        // Rows are read 16 bytes at a time. No array is empty: a rank without tokens has its arrays too.
        bytes = (bytes / 64 + 1) * 64;
        if (cuda) {
            Driver::Address address = 0;
            cuda->check(cuda->cuMemAlloc_v2(&address, bytes), "cuMemAlloc").value();
            data_ = reinterpret_cast<void *>(address);
        } else if (!(data_ = std::aligned_alloc(64, bytes))) {
            throw std::bad_alloc();
        }
    }
    Array(const Array &) = delete;
    ~Array()
    {
        if (cuda_) cuda_->cuMemFree_v2(address());
        else std::free(data_);
    }

    template <class T>
    void put(const std::vector<T> &from)
    {
        if (cuda_) cuda_->check(cuda_->cuMemcpyHtoD_v2(address(), from.data(), bytes_), "cuMemcpyHtoD").value();
        else if (bytes_) std::memcpy(data_, from.data(), bytes_);
    }
    template <class T>
    void get(std::vector<T> &to) const
    {
        if (cuda_) cuda_->check(cuda_->cuMemcpyDtoH_v2(to.data(), address(), bytes_), "cuMemcpyDtoH").value();
        else if (bytes_) std::memcpy(to.data(), data_, bytes_);
    }
    void *data() const { return data_; }

private:
    Driver::Address address() const { return reinterpret_cast<Driver::Address>(data_); }

    const Driver *cuda_;
    std::size_t bytes_;
    void *data_ = nullptr;
};

/** What a rank's tokens are, on the host. */
struct Tokens {
    std::vector<float> values, weights, sums;
    std::vector<std::int32_t> ids;

    Tokens(std::int32_t count, unsigned seed)
        : values(static_cast<std::size_t>(count * hidden)), weights(static_cast<std::size_t>(count * topk)),
          sums(values.size()), ids(weights.size())
    {
        std::mt19937 random(seed);
        std::uniform_real_distribution<float> value(-1, 1), weight(0, 1);
        std::uniform_int_distribution<std::int32_t> expert(-1, num_experts - 1); // -1: none; one may come twice
        for (float &x : values) x = value(random);
        for (float &w : weights) w = weight(random);
        for (std::int32_t &id : ids) id = expert(random);
    }
};

float gain_of(std::int32_t expert, bool on_cuda) { return on_cuda ? 1.0f : 0.5f + 0.25f * static_cast<float>(expert); }

/** The layer without any ranks: sum over k of weight * expert(token), in float32, in that order. */
std::vector<float> alone(const Tokens &tokens, bool on_cuda)
{
    std::vector<float> sums(tokens.sums.size(), 0.0f);
    for (std::size_t t = 0; t * hidden < sums.size(); t++) {
        for (std::size_t k = 0; k < topk; k++) {
            const std::int32_t expert = tokens.ids[t * topk + k];
            if (expert < 0) continue;
            for (std::size_t h = 0; h < hidden; h++) {
                const float result = gain_of(expert, on_cuda) * tokens.values[t * hidden + h];
                sums[t * hidden + h] += tokens.weights[t * topk + k] * result;
            }
        }
    }
    return sums;
}

/** Row `row` of a view whose rows have one dimension or, expert by expert, two. */
template <class View>
auto *row_of(View &view, std::int64_t row)
{
    const std::int64_t element = view.ndim() == 2 ? row * view.stride(0)
                                                  : row / view.size(1) * view.stride(0) + row % view.size(1) * view.stride(1);
    return view.template data<float>() + element;
}

void experts_on_cpu(std::int32_t first_expert, const engine::Received &received, a2a::Tensor &results)
{
    const auto *counts = received.expert_counts.data<std::int32_t>();
    const auto *offsets = received.expert_offsets.data<std::int32_t>();
    for (std::int32_t local = 0; local < received.expert_counts.size(0); local++) {
        for (std::int64_t row = offsets[local]; row < offsets[local] + counts[local]; row++) {
            const float *token = row_of(received.tokens, row);
            float *result = row_of(results, row);
            for (std::int32_t h = 0; h < hidden; h++) result[h] = gain_of(first_expert + local, false) * token[h];
        }
    }
}

/** One rank of the engine. */
struct Rank {
    const std::int32_t number;
    const Driver *const cuda;
    Tokens tokens;
    Array values, ids, weights, sums;
    void *stream = nullptr;
    std::optional<Communication> communication;
    std::vector<engine::Step> steps;
    std::optional<Graph> graph;
    std::string failure;

    Rank(std::int32_t rank, const Driver *driver)
        : number(rank), cuda(driver), tokens(prefill[static_cast<std::size_t>(rank)], static_cast<unsigned>(rank)),
          values(cuda, bytes_of(tokens.values)), ids(cuda, bytes_of(tokens.ids)), weights(cuda, bytes_of(tokens.weights)),
          sums(cuda, bytes_of(tokens.sums))
    {
        constexpr unsigned non_blocking = 1;
        if (cuda) cuda->check(cuda->cuStreamCreate(&stream, non_blocking), "cuStreamCreate").value();
        put();
    }
    ~Rank()
    {
        graph.reset();
        communication.reset();
        if (stream) cuda->cuStreamDestroy_v2(stream);
    }

    template <class T>
    static std::size_t bytes_of(const std::vector<T> &values)
    {
        return values.size() * sizeof(T);
    }

    void put()
    {
        values.put(tokens.values);
        ids.put(tokens.ids);
        weights.put(tokens.weights);
    }

    engine::Batch batch() const
    {
        const std::int64_t count = prefill[static_cast<std::size_t>(number)];
        const a2a::Device device = cuda ? a2a::cuda(0) : a2a::cpu;
        return {a2a::ConstTensor(values.data(), a2a::float32, {count, hidden}, device),
                a2a::ConstTensor(ids.data(), a2a::int32, {count, topk}, device),
                a2a::ConstTensor(weights.data(), a2a::float32, {count, topk}, device),
                a2a::Tensor(sums.data(), a2a::float32, {count, hidden}, device)};
    }

    engine::Experts experts() const
    {
        if (!cuda) {
            return [first = communication->info().first_expert](const engine::Received &received, a2a::Tensor &results, void *) {
                experts_on_cpu(first, received, results);
                return a2a::Result<void>();
            };
        }
        return [this](const engine::Received &received, a2a::Tensor &results, void *on) {
            const auto bytes = static_cast<std::size_t>(results.num_elements()) * sizeof(float);
            const auto to = reinterpret_cast<Driver::Address>(results.data());
            const auto from = reinterpret_cast<Driver::Address>(received.tokens.data());
            return cuda->check(cuda->cuMemcpyDtoDAsync_v2(to, from, bytes, on), "cuMemcpyDtoDAsync");
        };
    }

    void synchronize() const
    {
        if (cuda) cuda->check(cuda->cuStreamSynchronize(stream), "cuStreamSynchronize").value();
    }

    /** Throws unless the sums are those of one that runs alone. */
    void compare()
    {
        sums.get(tokens.sums);
        const std::vector<float> wanted = alone(tokens, cuda != nullptr);
        if (!wanted.empty() && std::memcmp(wanted.data(), tokens.sums.data(), bytes_of(wanted)) != 0) {
            throw std::runtime_error("sums differ from one process's");
        }
        sums.put(std::vector<float>(tokens.sums.size(), -1.0f)); // so that the next comparison is not of these
    }
};

using Ranks = std::vector<std::unique_ptr<Rank>>;

/** Runs `work` on every rank, on threads of their own, and returns when all have ended. A rank that fails takes the others with it. */
void on_every(Ranks &ranks, const std::function<void(Rank &)> &work)
{
    std::vector<std::thread> threads;
    for (auto &rank : ranks) {
        threads.emplace_back([&work, &rank = *rank] {
            try {
                if (rank.cuda) rank.cuda->use(0).value();
                work(rank);
            } catch (const std::exception &error) {
                rank.failure = error.what();
                if (rank.communication) static_cast<void>(rank.communication->comm().abort());
            }
        });
    }
    for (auto &thread : threads) thread.join();
    for (auto &rank : ranks) {
        if (!rank->failure.empty()) throw std::runtime_error("rank " + std::to_string(rank->number) + ": " + rank->failure);
    }
}

/** The same, of a layer whose sums are then compared. Prints how long it took. */
void layer(Ranks &ranks, const char *what, const std::function<void(Rank &)> &work)
{
    const auto begin = std::chrono::steady_clock::now();
    on_every(ranks, [&](Rank &rank) {
        work(rank);
        rank.synchronize();
    });
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    on_every(ranks, [](Rank &rank) { rank.compare(); });
    std::printf("  %-24s %7.1f ms, the bits of one process\n", what, took.count());
}

a2a::Config config_of(a2a_backend_t backend, bool on_cuda)
{
    a2a::Config config;
    config.num_ranks = num_ranks;
    config.device = on_cuda ? A2A_DEVICE_CUDA : A2A_DEVICE_CPU;
    config.ranks_per_device = on_cuda ? num_ranks : 0;
    config.backend = backend;
    config.layout = backend == A2A_BACKEND_LOW_LATENCY ? A2A_LAYOUT_EXPERT_PADDED : A2A_LAYOUT_EXPERT_CONTIGUOUS;
    config.num_experts = num_experts;
    config.max_topk = topk;
    config.max_hidden = hidden;
    config.max_tokens = wanted_step;
    config.token_dtype = A2A_DTYPE_F32;
    config.memory_limit = memory_limit;
    return config;
}

void run(const char *name, const Driver *cuda, bool explain)
{
    a2a::Config config = config_of(a2a::backend_from_name(name), cuda != nullptr);
    auto possible = Communication::feasible(config).value();
    std::printf("%s: of %d tokens a step, %d fit into %.0f MiB a rank: %.1f MiB\n", name, wanted_step, possible.step_tokens,
                static_cast<double>(memory_limit) / 1048576, static_cast<double>(possible.memory.total_bytes) / 1048576);
    if (explain) std::printf("%s\n", possible.explanation.c_str());
    config.max_tokens = possible.step_tokens;
    config.unique_id = a2a::get_unique_id().value();

    Ranks ranks;
    for (std::int32_t rank = 0; rank < num_ranks; rank++) ranks.push_back(std::make_unique<Rank>(rank, cuda));
    on_every(ranks, [&](Rank &rank) {
        a2a::Config own = config;
        own.rank = rank.number;
        rank.communication = Communication::create(own).value();
        rank.steps = rank.communication->prepare(prefill);
    });
    std::printf("  %d %d %d %d tokens: %zu steps\n", prefill[0], prefill[1], prefill[2], prefill[3], ranks[0]->steps.size());

    layer(ranks, "run", [](Rank &rank) { rank.communication->run(rank.batch(), rank.steps, rank.experts(), rank.stream).value(); });
    layer(ranks, "run_overlapped", [](Rank &rank) {
        rank.communication->run_overlapped(rank.batch(), rank.steps, rank.experts(), rank.stream).value();
    });
    if (!cuda) return;

    // What takes memory of the GPU that ranks share stands where none of them waits for another.
    on_every(ranks, [](Rank &rank) {
        rank.graph = rank.communication->capture(rank.batch(), rank.steps, rank.experts(), rank.stream).value();
    });
    for (unsigned replay = 1; replay <= 2; replay++) {
        on_every(ranks, [&](Rank &rank) {
            rank.tokens = Tokens(prefill[static_cast<std::size_t>(rank.number)], 100 * replay + static_cast<unsigned>(rank.number));
            rank.put();
        });
        layer(ranks, "graph, other tokens", [](Rank &rank) { rank.graph->launch(rank.stream).value(); });
    }
}

}  // namespace

int main(int argc, char **argv)
{
    bool on_cuda = false, explain = false;
    for (int i = 1; i < argc; i++) {
        const std::string word = argv[i], next = i + 1 < argc ? argv[i + 1] : "";
        if (word == "--explain") {
            explain = true;
        } else if (word == "--device" && (next == "cpu" || next == "cuda")) {
            on_cuda = next == "cuda";
            i++;
        } else {
            std::fprintf(stderr, "usage: engine [--device cpu|cuda] [--explain]\n");
            return 2;
        }
    }
    try {
        const Driver *cuda = nullptr;
        if (on_cuda) {
            setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0); // streams of ranks that share a GPU do not queue behind each other
            cuda = Driver::open().value();
            cuda->use(0).value();
        }
        std::printf("liba2a %s: %d ranks, threads, on %s memory; %d experts, top-%d, hidden %d, float32\n", a2a::version(),
                    num_ranks, on_cuda ? "CUDA" : "CPU", num_experts, topk, hidden);
        for (const char *name : {"deepep_high_throughput", "deepep_low_latency"}) run(name, cuda, explain);
        if (!on_cuda) std::printf("graphs: not run, they need --device cuda\n");
        std::printf("PASS\n");
        return 0;
    } catch (const std::exception &error) {
        std::printf("FAIL: %s\n", error.what());
        return 1;
    }
}
