/*
 * include/a2a.hpp as a caller meets it: outcomes both ways, owners, structs, tensors, and every call on one rank and on two that are
 * threads. What calls mean is tests/c's and tests/conformance's; here each must reach the library and bring back what it says.
 *
 * no_exceptions.cpp is the other half of the program: the same header without exceptions and without RTTI.
 */
#include "no_exceptions.hpp"

#include <a2a.hpp>

#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <type_traits>
#include <vector>

// ---------------------------------------------------------------------------------------------- what holds when it compiles

static_assert(!std::is_copy_constructible_v<a2a::Comm> && !std::is_copy_assignable_v<a2a::Comm>);
static_assert(std::is_nothrow_move_constructible_v<a2a::Comm> && std::is_nothrow_move_assignable_v<a2a::Comm>);
static_assert(!std::is_copy_constructible_v<a2a::Routing> && !std::is_copy_assignable_v<a2a::Routing>);
static_assert(std::is_nothrow_move_constructible_v<a2a::Routing> && std::is_nothrow_move_assignable_v<a2a::Routing>);
// What is owned is a pointer and no more.
static_assert(sizeof(a2a::Comm) == sizeof(a2a_comm_t *) && sizeof(a2a::Routing) == sizeof(a2a_routing_t *));
// Structs are a2a.h's.
static_assert(sizeof(a2a::Config) == sizeof(a2a_config_t) && sizeof(a2a::DispatchOut) == sizeof(a2a_dispatch_out_t));
// Constant elements make no output.
static_assert(std::is_constructible_v<a2a::ConstTensor, const float *, const std::int64_t (&)[2]>);
static_assert(std::is_constructible_v<a2a::Tensor, float *, const std::int64_t (&)[2]>);
static_assert(!std::is_constructible_v<a2a::Tensor, const float *, const std::int64_t (&)[2]>);
static_assert(!std::is_constructible_v<a2a::Tensor, const void *, a2a::Dtype, const std::int64_t (&)[2]>);
static_assert(!std::is_constructible_v<a2a::Tensor, a2a::ConstTensor>);
static_assert(std::is_same_v<decltype(std::declval<const a2a::Tensor &>().get()), const a2a_tensor_t *>);
static_assert(std::is_same_v<decltype(std::declval<a2a::Tensor &>().get()), a2a_tensor_t *>);
static_assert(std::is_same_v<decltype(std::declval<const a2a::Tensor &>().data<float>()), const float *>);

/** Whether the C struct of a temporary can be had. */
template <class T, class = void>
inline constexpr bool dangles = false;
template <class T>
inline constexpr bool dangles<T, std::void_t<decltype(std::declval<T>().get())>> = true;
static_assert(!dangles<a2a::Tensor> && !dangles<a2a::ConstTensor> && dangles<a2a::Tensor &>);
// Nor does what a Result that is a temporary has.
static_assert(std::is_same_v<decltype(std::declval<a2a::Result<int>>().error()), a2a::Error>);
static_assert(std::is_same_v<decltype(std::declval<a2a::Result<void>>().error()), a2a::Error>);
static_assert(std::is_same_v<decltype(*std::declval<a2a::Result<int>>()), int>);
static_assert(std::is_same_v<decltype(std::declval<a2a::Error>().lost_ranks()), std::vector<std::int32_t>>);

/** An engine's own type of bf16, and its word for what it is. */
struct Bf16 {
    std::uint16_t bits;
};
template <>
inline constexpr a2a::Dtype a2a::dtype_of<Bf16> = a2a::bfloat16;

/** DLPack's, as dlpack.h has it. */
struct DLDevice {
    std::int32_t device_type, device_id;
};
struct DLDataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct DLTensor {
    void *data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

namespace {

// ---------------------------------------------------------------------------------------------------- what the tests use

bool test_failed;

#define CHECK(condition)                                               \
    do {                                                               \
        if (!(condition)) {                                            \
            std::printf("    line %d: not %s\n", __LINE__, #condition); \
            test_failed = true;                                        \
        }                                                              \
    } while (0)

constexpr std::int64_t num_tokens = 6, topk = 2, hidden = 64;
constexpr std::int32_t num_experts = 4;

a2a::Config config_of(std::int32_t rank, std::int32_t num_ranks)
{
    a2a::Config config;
    config.rank = rank;
    config.num_ranks = num_ranks;
    config.num_experts = num_experts;
    config.max_topk = topk;
    config.max_hidden = hidden;
    config.max_tokens = 8;
    config.token_dtype = A2A_DTYPE_F32;
    config.layout = A2A_LAYOUT_EXPERT_CONTIGUOUS;
    config.setup_timeout_ms = config.first_step_timeout_ms = config.timeout_ms = 20000;
    return config;
}

/** The elements of a step in which experts return their rows as they are: sums are the tokens, weights being halves. */
struct Elements {
    alignas(16) float tokens[num_tokens * hidden], sums[num_tokens * hidden];
    std::int32_t ids[num_tokens * topk];
    float weights[num_tokens * topk];

    explicit Elements(std::int32_t rank)
    {
        for (int i = 0; i < num_tokens * hidden; i++) tokens[i] = static_cast<float>(1000 * rank + i), sums[i] = -1;
        for (int i = 0; i < num_tokens * topk; i++) ids[i] = (i + i / 2 + rank) % num_experts, weights[i] = 0.5f;
    }

    void step(a2a::Comm &comm, a2a::Routing &routing)
    {
        const a2a::ConstTensor tokens_in(tokens, {num_tokens, hidden}), ids_in(ids, {num_tokens, topk}),
            weights_in(weights, {num_tokens, topk});
        a2a::Tensor rows, sums_out(sums, {num_tokens, hidden});
        a2a::DispatchIn in;
        in.tokens = tokens_in.get();
        in.topk_ids = ids_in.get();
        in.topk_weights = weights_in.get();
        a2a::DispatchOut out;
        out.tokens = rows.get();
        comm.dispatch(routing, in, &out).value();

        a2a::Tensor results = comm.combine_buffer(routing).value();
        CHECK(results.num_elements() == rows.num_elements());
        std::memcpy(results.data(), rows.data(), static_cast<std::size_t>(rows.num_elements()) * sizeof(float));
        a2a::CombineIn back;
        back.tokens = results.get();
        a2a::CombineOut end;
        end.tokens = sums_out.get();
        comm.combine(routing, back, &end).value();
        CHECK(std::memcmp(sums, tokens, sizeof sums) == 0);
    }
};

/** Runs the same on every rank, threads of their own. */
void on_ranks(std::int32_t num_ranks, const std::function<void(std::int32_t rank, const a2a::Config &config)> &work)
{
    const a2a::UniqueId id = a2a::get_unique_id().value();
    std::vector<std::thread> threads;
    for (std::int32_t rank = 0; rank < num_ranks; rank++) {
        threads.emplace_back([&, rank] {
            a2a::Config config = config_of(rank, num_ranks);
            config.unique_id = id;
            try {
                work(rank, config);
            } catch (const a2a::Error &error) {
                std::printf("    rank %d: %s: %s\n", rank, error.name(), error.what());
                test_failed = true;
            }
        });
    }
    for (auto &thread : threads) thread.join();
}

/** The status that a Result has is the error's, and the error has the sentence. */
template <class T>
bool is_refused(const a2a::Result<T> &result, a2a_status_t status, const char *word)
{
    if (!result && result.status() == status && result.error().status() == status && std::strstr(result.error().what(), word)) {
        return true;
    }
    std::printf("    %s, not %s: %s\n", a2a::status_name(result.status()), a2a::status_name(status), a2a::last_error());
    return false;
}

// --------------------------------------------------------------------------------------------------------------- outcomes

void test_a_refusal_is_a_result()
{
    a2a::Config config = config_of(0, 1);
    config.max_topk = 99;
    CHECK(is_refused(a2a::Comm::create(config), A2A_INVALID_ARGUMENT, "max_topk"));
    CHECK(is_refused(a2a::query_memory(config), A2A_INVALID_ARGUMENT, "max_topk"));
    CHECK(is_refused(a2a::explain(config), A2A_INVALID_ARGUMENT, "max_topk"));
    CHECK(is_refused(a2a::unique_id_from_address("nowhere", "key"), A2A_INVALID_ARGUMENT, "address"));
}

void test_a_refusal_is_an_exception()
{
    a2a::Config config = config_of(0, 1);
    config.max_topk = 99;
    bool thrown = false;
    try {
        a2a::Comm::create(config).value();
    } catch (const std::exception &error) {
        thrown = true;
        const auto *ours = dynamic_cast<const a2a::Error *>(&error);
        CHECK(ours && ours->status() == A2A_INVALID_ARGUMENT && ours->loss() == a2a::Loss::call && ours->lost_ranks().empty());
        CHECK(ours && std::strcmp(ours->name(), "A2A_INVALID_ARGUMENT") == 0);
        CHECK(std::strstr(error.what(), "max_topk"));
    }
    CHECK(thrown);
}

void test_the_sentence_outlives_other_calls()
{
    a2a::Config config = config_of(0, 1);
    config.max_topk = 99;
    const auto first = a2a::query_memory(config);
    config.max_topk = topk;
    config.num_experts = -5;
    const auto second = a2a::query_memory(config);
    CHECK(is_refused(first, A2A_INVALID_ARGUMENT, "max_topk"));
    CHECK(is_refused(second, A2A_INVALID_ARGUMENT, "num_experts"));
}

void test_every_status_has_its_loss()
{
    const a2a_status_t calls[] = {A2A_INVALID_ARGUMENT, A2A_UNSUPPORTED, A2A_BUSY, A2A_OUT_OF_MEMORY, A2A_OVERFLOW, A2A_SYSTEM_ERROR};
    const a2a_status_t steps[] = {A2A_TIMEOUT, A2A_PEER_LOST, A2A_MISMATCH};
    const a2a_status_t comms[] = {A2A_CUDA_ERROR, A2A_NCCL_ERROR, A2A_NIXL_ERROR, A2A_ABORTED, A2A_INTERNAL};
    for (a2a_status_t status : calls) CHECK(a2a::Error(status, "").loss() == a2a::Loss::call);
    for (a2a_status_t status : steps) CHECK(a2a::Error(status, "").loss() == a2a::Loss::step);
    for (a2a_status_t status : comms) CHECK(a2a::Error(status, "").loss() == a2a::Loss::comm);
}

void test_results_of_values()
{
    a2a::Result<std::vector<int>> good(std::vector<int>{1, 2}), bad(a2a::Error(A2A_BUSY, "busy"));
    CHECK(good && good->size() == 2 && (*good)[1] == 2 && good.status() == A2A_SUCCESS && good.value().size() == 2);
    CHECK(!bad && bad.status() == A2A_BUSY);
    const std::vector<int> moved = std::move(good).value();
    CHECK(moved.size() == 2);
    // One that can only be moved.
    a2a::Result<a2a::Comm> comm = a2a::Comm::create(config_of(0, 1));
    CHECK(comm && comm->get());
    a2a::Comm taken = std::move(*comm);
    CHECK(taken && !*comm);
}

void test_without_exceptions()
{
    CHECK(without_exceptions::refused(a2a::Config()) == A2A_INVALID_ARGUMENT);
    a2a::Result<a2a::Comm> comm = without_exceptions::create(config_of(0, 1));
    CHECK(comm && comm.value().get_info().value().num_experts == num_experts);
}

// ----------------------------------------------------------------------------------------------------------------- structs

template <class Struct, class C>
void check_struct()
{
    const Struct made;
    C wanted;
    std::memset(&wanted, 0, sizeof wanted);
    wanted.struct_size = sizeof(C);
    CHECK(std::memcmp(static_cast<const C *>(&made), &wanted, sizeof wanted) == 0);
}

void test_structs_are_zero_but_for_their_size()
{
    check_struct<a2a::Config, a2a_config_t>();
    check_struct<a2a::Memory, a2a_memory_t>();
    check_struct<a2a::Info, a2a_info_t>();
    check_struct<a2a::RecoverIn, a2a_recover_in_t>();
    check_struct<a2a::RecoverOut, a2a_recover_out_t>();
    check_struct<a2a::DispatchIn, a2a_dispatch_in_t>();
    check_struct<a2a::DispatchOut, a2a_dispatch_out_t>();
    check_struct<a2a::CombineIn, a2a_combine_in_t>();
    check_struct<a2a::CombineOut, a2a_combine_out_t>();
    check_struct<a2a::ErrorInfo, a2a_error_info_t>();
    check_struct<a2a::Stats, a2a_stats_t>();
}

void test_ranks_of_a_mask()
{
    const std::uint64_t none[16] = {}, some[16] = {1, 1ull << 63, 0, 5};
    CHECK(a2a::ranks_of(none).empty());
    CHECK((a2a::ranks_of(some) == std::vector<std::int32_t>{0, 127, 192, 194}));
}

// ----------------------------------------------------------------------------------------------------------------- tensors

void test_a_tensor_is_what_it_was_made_of()
{
    float elements[24] = {};
    const a2a::Tensor tensor(elements, {2, 3, 4});
    const a2a_tensor_t *c = tensor.get();
    CHECK(c->data == elements && c->ndim == 3 && c->device.device_type == A2A_DEVICE_CPU && c->byte_offset == 0);
    CHECK(c->dtype.code == 2 && c->dtype.bits == 32 && c->dtype.lanes == 1);
    CHECK(c->shape[0] == 2 && c->shape[1] == 3 && c->shape[2] == 4 && !c->strides);
    CHECK(tensor.size(2) == 4 && tensor.num_elements() == 24);
    CHECK(tensor.stride(0) == 12 && tensor.stride(1) == 4 && tensor.stride(2) == 1);

    const a2a::ConstTensor strided = a2a::ConstTensor::strided(elements, a2a::bfloat16, {2, 3}, {8, 1}, a2a::cuda(3));
    CHECK(strided.get()->strides[0] == 8 && strided.stride(0) == 8 && strided.stride(1) == 1);
    CHECK(strided.device().device_type == A2A_DEVICE_CUDA && strided.device().device_id == 3 && strided.dtype().code == 4);
    const a2a::Tensor written = a2a::Tensor::strided(elements, a2a::float32, {2, 3}, {8, 1});
    CHECK(written.stride(0) == 8 && written.data() == elements);
    // Two numbers in braces after the sizes are a device, whatever the sizes.
    const a2a::ConstTensor there(elements, a2a::float32, {2, 3}, {A2A_DEVICE_CUDA, 1});
    CHECK(!there.get()->strides && there.device().device_type == A2A_DEVICE_CUDA && there.device().device_id == 1);

    const Bf16 own[4] = {};
    CHECK(a2a::ConstTensor(own, {4}).dtype().code == 4 && a2a::ConstTensor(own, {4}).dtype().bits == 16);
    const a2a::Tensor view;
    CHECK(!view.get()->data && view.ndim() == 0 && view.data() == nullptr);
}

void test_copies_have_shapes_of_their_own()
{
    float elements[24] = {};
    std::vector<a2a::Tensor> tensors;
    {
        // As the library does with a view: data and arrays are somebody else's.
        std::int64_t shape[2] = {6, 4}, strides[2] = {4, 1};
        a2a::Tensor view;
        view.get()->data = elements;
        view.get()->ndim = 2;
        view.get()->dtype = a2a::float32;
        view.get()->shape = shape;
        view.get()->strides = strides;
        tensors.assign(3, view);
        shape[0] = strides[0] = 99;
    }
    tensors.resize(50, tensors[0]); // moves them
    for (const a2a::Tensor &tensor : tensors) {
        CHECK(tensor.size(0) == 6 && tensor.size(1) == 4 && tensor.stride(0) == 4 && tensor.data() == elements);
        const char *begin = reinterpret_cast<const char *>(&tensor), *shape = reinterpret_cast<const char *>(tensor.get()->shape);
        CHECK(shape > begin && shape < begin + sizeof tensor);
    }
    a2a::Tensor &self = tensors[0];
    self = *&self;
    CHECK(self.size(0) == 6);
    self = a2a::Tensor();
    CHECK(self.ndim() == 0 && !self.get()->data);
}

void test_rows_of_a_tensor()
{
    float elements[40] = {};
    const a2a::ConstTensor compact(elements, {10, 4});
    const a2a::ConstTensor strided = a2a::ConstTensor::strided(elements, a2a::float32, {5, 4}, {8, 1});
    CHECK(compact.rows(3, 2).data() == elements + 12 && compact.rows(3, 2).size(0) == 2 && compact.rows(3, 2).size(1) == 4);
    CHECK(strided.rows(3, 2).data() == elements + 24 && strided.rows(3, 2).stride(0) == 8);
    CHECK(compact.size(0) == 10);
    a2a::Tensor written = a2a::Tensor(elements, {10, 4}).rows(9, 1);
    written.data<float>()[0] = 7;
    CHECK(elements[36] == 7);
    CHECK(compact.rows(10, 0).num_elements() == 0);
    // An offset stays one.
    a2a::Tensor offset(elements, {9, 4});
    offset.get()->byte_offset = 16;
    CHECK(offset.data() == elements + 4 && offset.rows(1, 1).data() == elements + 8);
}

void test_dlpack()
{
    float elements[8] = {};
    std::int64_t shape[2] = {2, 4};
    DLTensor theirs{elements, {1, 0}, 2, {2, 32, 1}, shape, nullptr, 0};
    a2a_tensor_t *ours = a2a::from_dlpack(&theirs);
    CHECK(ours->data == elements && ours->device.device_type == A2A_DEVICE_CPU && ours->dtype.bits == 32 && ours->shape[1] == 4);
    const DLTensor &constant = theirs;
    static_assert(std::is_same_v<decltype(a2a::from_dlpack(&constant)), const a2a_tensor_t *>);
    CHECK(a2a::from_dlpack(&constant) == ours);

    a2a::Tensor tensor(elements, {2, 4});
    const auto *as_theirs = a2a::to_dlpack<DLTensor>(tensor.get());
    CHECK(as_theirs->data == elements && as_theirs->ndim == 2 && as_theirs->dtype.code == 2 && as_theirs->shape[1] == 4);
}

// ------------------------------------------------------------------------------------------------------------ without a comm

void test_calls_without_a_comm()
{
    const a2a::UniqueId one = a2a::get_unique_id().value(), other = a2a::get_unique_id().value();
    CHECK(std::memcmp(&one, &other, sizeof one) != 0);
    const a2a::UniqueId same = a2a::unique_id_from_address("127.0.0.1:5000", "key").value(),
                        again = a2a::unique_id_from_address("127.0.0.1:5000", "key").value();
    CHECK(std::memcmp(&same, &again, sizeof same) == 0);

    const std::string json = a2a::explain(config_of(0, 1)).value();
    CHECK(json.front() == '{' && json.back() == '}' && json.find("\"expert_contiguous\"") != std::string::npos);
    CHECK(a2a::query_memory(config_of(0, 1)).value().total_bytes > 0);
    CHECK(std::strcmp(a2a::version(), A2A_VERSION) == 0);
    CHECK(std::strcmp(a2a::status_name(A2A_TIMEOUT), "A2A_TIMEOUT") == 0);
    CHECK(a2a::backend_from_name("deepep_low_latency") == A2A_BACKEND_LOW_LATENCY);
    CHECK(a2a::backend_from_name("no such") == A2A_BACKEND_UNKNOWN);
    CHECK(a2a_version() == a2a::version() && a2a::last_error() != nullptr);
}

/** A text that is longer than expected, and grows while it is read. */
void test_texts_of_any_length()
{
    std::string whole(100, 'x');
    const auto read = a2a::detail::text(8, [&](char *buf, std::size_t len, std::size_t *needed) -> a2a_status_t {
        *needed = whole.size() + 1;
        if (len < *needed) {
            if (len == 8) whole += "y"; // longer the next time
            return A2A_OVERFLOW;
        }
        std::memcpy(buf, whole.c_str(), whole.size() + 1);
        return A2A_SUCCESS;
    });
    CHECK(read && *read == whole);
}

std::vector<std::string> logged;

void test_log_callback()
{
    int user = 0;
    a2a::set_log_callback([](std::int32_t, const char *line, void *at) { logged.emplace_back(line), ++*static_cast<int *>(at); }, &user)
        .value();
    a2a::Comm::create(config_of(0, 1)).value();
    a2a::set_log_callback(nullptr).value();
    CHECK(user > 0 && static_cast<int>(logged.size()) == user);
}

// ------------------------------------------------------------------------------------------------------------------ owners

void test_owners_move_and_end()
{
    a2a::Comm comm = a2a::Comm::create(config_of(0, 1)).value();
    a2a::Routing routing = a2a::Routing::create(comm).value();
    a2a_comm_t *const handle = comm.get();

    a2a::Comm moved = std::move(comm);
    CHECK(!comm && moved && moved.get() == handle);
    // An empty owner is refused by the library, by name.
    CHECK(is_refused(comm.get_info(), A2A_INVALID_ARGUMENT, "comm"));
    comm = std::move(moved);
    Elements(0).step(comm, routing);

    // A handle of C's is taken over, and given back.
    a2a::Comm adopted(comm.release());
    CHECK(!comm && adopted.get() == handle);
    CHECK(adopted.destroy() && !adopted);
    CHECK(is_refused(a2a::Comm(handle).get_info(), A2A_INVALID_ARGUMENT, "comm"));
    // The routing outlives its comm.
    CHECK(routing.destroy() && !routing);
    CHECK(routing.destroy());
    // Assignment ends what was there before.
    a2a::Comm first = a2a::Comm::create(config_of(0, 1)).value();
    a2a_comm_t *const ended = first.get();
    first = a2a::Comm::create(config_of(0, 1)).value();
    a2a_info_t info{};
    info.struct_size = sizeof info;
    CHECK(a2a_get_info(ended, &info) == A2A_INVALID_ARGUMENT && first.get_info());
}

void test_a_step_of_two_ranks()
{
    on_ranks(2, [](std::int32_t rank, const a2a::Config &config) {
        a2a::Comm comm = a2a::Comm::create(config).value();
        a2a::Routing routing = a2a::Routing::create(comm).value();
        const a2a::Comm &observed = comm;
        // The other cannot leave before this one's step.
        CHECK((observed.get_rank_mask().value() == std::vector<std::int32_t>{1, 1}));
        Elements(rank).step(comm, routing);

        const a2a::Info info = observed.get_info().value();
        CHECK(info.rank == rank && info.num_ranks == 2 && info.num_local_experts == 2 && info.layout == A2A_LAYOUT_EXPERT_CONTIGUOUS);
        const a2a::Stats stats = observed.get_stats().value();
        CHECK(stats.dispatches == 1 && stats.combines == 1);
        CHECK(observed.get_async_error().value().status == A2A_SUCCESS);
        const std::string history = observed.get_history().value();
        CHECK(history.find("\"dispatch\"") != std::string::npos && history.back() == '}');
        comm.set_timeout(10000, 10000).value();
        CHECK(is_refused(comm.set_timeout(-1, 0), A2A_INVALID_ARGUMENT, "timeout"));
        CHECK(is_refused(a2a::Routing::create(comm, 7), A2A_INVALID_ARGUMENT, "slot"));
    });
}

void test_members()
{
    on_ranks(2, [](std::int32_t rank, const a2a::Config &config) {
        a2a::Comm comm = a2a::Comm::create(config).value();
        a2a::Routing routing = a2a::Routing::create(comm).value();
        // Windows have the ranks that they were created with.
        CHECK(comm.connect_ranks({0, 1}));
        CHECK(is_refused(comm.connect_ranks({2}), A2A_INVALID_ARGUMENT, "2"));
        CHECK(is_refused(comm.disconnect_ranks({1 - rank}), A2A_INVALID_ARGUMENT, "takes part"));
        CHECK(is_refused(comm.set_rank_mask({1, 1}), A2A_UNSUPPORTED, "set_rank_mask"));
        CHECK(comm.activate_ranks({0, 1}).value() > 1);
        const a2a::RecoverOut recovered = comm.recover().value();
        CHECK(recovered.num_members == 2 && (a2a::ranks_of(recovered.members) == std::vector<std::int32_t>{0, 1}));
        Elements(rank).step(comm, routing);
    });
}

void test_a_lost_rank_is_named()
{
    on_ranks(3, [](std::int32_t rank, const a2a::Config &config) {
        a2a::Comm comm = a2a::Comm::create(config).value();
        a2a::Routing routing = a2a::Routing::create(comm).value();
        Elements elements(rank);
        elements.step(comm, routing);
        if (rank == 2) return; // and is gone
        bool thrown = false;
        try {
            elements.step(comm, routing);
        } catch (const a2a::Error &error) {
            thrown = true;
            CHECK(error.status() == A2A_PEER_LOST && error.loss() == a2a::Loss::step);
            CHECK((error.lost_ranks() == std::vector<std::int32_t>{2}));
            CHECK(std::strstr(error.what(), "rank 2"));
        }
        CHECK(thrown);
        const a2a::ErrorInfo info = comm.get_async_error().value();
        CHECK(info.status == A2A_PEER_LOST && (a2a::ranks_of(info.lost_ranks) == std::vector<std::int32_t>{2}));

        a2a::RecoverIn patience;
        patience.timeout_ms = 10000;
        const a2a::RecoverOut recovered = comm.recover(patience).value();
        CHECK((a2a::ranks_of(recovered.members) == std::vector<std::int32_t>{0, 1}));
    });
}

/** The comm keeps its first failure alone, and who was given up on then is nobody's of a second one. */
void test_a_second_loss_is_not_the_first_ones()
{
    on_ranks(3, [](std::int32_t rank, const a2a::Config &one_slot) {
        a2a::Config config = one_slot;
        config.num_slots = 2;
        a2a::Comm comm = a2a::Comm::create(config).value();
        a2a::Routing first = a2a::Routing::create(comm, 0).value(), second = a2a::Routing::create(comm, 1).value();
        Elements elements(rank);
        elements.step(comm, first);
        elements.step(comm, second);
        if (rank == 2) return; // and is gone
        for (a2a::Routing *routing : {&first, &second, &first}) {
            bool thrown = false;
            try {
                elements.step(comm, *routing);
            } catch (const a2a::Error &error) {
                thrown = true;
                CHECK(error.status() == A2A_PEER_LOST && std::strstr(error.what(), "rank 2"));
                CHECK(error.lost_ranks().size() == (routing == &first ? 1u : 0u));
            }
            CHECK(thrown);
        }
    });
}

void test_abort()
{
    a2a::Comm comm = a2a::Comm::create(config_of(0, 1)).value();
    a2a::Routing routing = a2a::Routing::create(comm).value();
    comm.abort().value();
    bool thrown = false;
    try {
        Elements(0).step(comm, routing);
    } catch (const a2a::Error &error) {
        thrown = true;
        CHECK(error.status() == A2A_ABORTED && error.loss() == a2a::Loss::comm && error.lost_ranks().empty());
    }
    CHECK(thrown);
}

struct Test {
    const char *name;
    void (*run)();
};

#define TEST(name) {#name, test_##name}
const Test tests[] = {
    TEST(a_refusal_is_a_result),
    TEST(a_refusal_is_an_exception),
    TEST(the_sentence_outlives_other_calls),
    TEST(every_status_has_its_loss),
    TEST(results_of_values),
    TEST(without_exceptions),
    TEST(structs_are_zero_but_for_their_size),
    TEST(ranks_of_a_mask),
    TEST(a_tensor_is_what_it_was_made_of),
    TEST(copies_have_shapes_of_their_own),
    TEST(rows_of_a_tensor),
    TEST(dlpack),
    TEST(calls_without_a_comm),
    TEST(texts_of_any_length),
    TEST(log_callback),
    TEST(owners_move_and_end),
    TEST(a_step_of_two_ranks),
    TEST(members),
    TEST(a_lost_rank_is_named),
    TEST(a_second_loss_is_not_the_first_ones),
    TEST(abort),
};

}  // namespace

int main()
{
    int passed = 0, failed = 0;
    for (const Test &test : tests) {
        test_failed = false;
        try {
            test.run();
        } catch (const std::exception &error) {
            std::printf("    %s\n", error.what());
            test_failed = true;
        }
        std::printf("%s %s\n", test.name, test_failed ? "FAIL" : "ok");
        test_failed ? failed++ : passed++;
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
