/*
 * liba2a for C++17: owners, results and tensors over a2a.h, which says what every call means. Nothing here adds to that.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Results. Every call that can fail returns an a2a::Result, which must be looked at, in one of two ways:
 *
 *     a2a::Comm comm = a2a::Comm::create(config).value();                // throws an a2a::Error
 *
 *     auto created = a2a::Comm::create(config);                          // throws nothing but std::bad_alloc
 *     if (!created) return report(created.error().status(), created.error().what());
 *     a2a::Comm comm = std::move(*created);
 *
 * -fno-exceptions and -fno-rtti have the second way alone, and may be linked with what has both.
 *
 * Structs. a2a::Config, a2a::DispatchIn and so on are the C structs with struct_size set and all else zero: their fields are
 * a2a.h's, and a C struct does as well wherever one is taken.
 *
 * Threads. As in a2a.h: one call at a time on a comm and its routings. Functions that are const, abort, set_timeout and
 * connect_ranks may be called at any time, by any thread.
 *
 * Memory. On success no call allocates here, but for those that return text or ranks.
 */

#ifndef A2A_HPP
#define A2A_HPP

#if __cplusplus < 201703L && (!defined(_MSVC_LANG) || _MSVC_LANG < 201703L)
#error "a2a.hpp needs C++17 or newer, as -std=c++17 has it"
#endif

#include <a2a.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if (defined(__cpp_exceptions) && defined(__cpp_rtti)) || (defined(_CPPUNWIND) && defined(_CPPRTTI))
#define A2A_HAS_EXCEPTIONS 1
#else
#define A2A_HAS_EXCEPTIONS 0
#endif

namespace a2a {

// ------------------------------------------------------------------------------------------------------------ outcomes

/**
 * What a failure has taken: the groups of a2a.h's statuses. (Whatever the group, of a create that failed nothing is there, and a
 * TIMEOUT of connect_ranks or activate_ranks leaves all as before.)
 */
enum class Loss {
    call, /**< Nothing happened: mend the argument and call again. */
    step, /**< The step is void and its slot closed: Comm::recover on the survivors, or a new comm. */
    comm, /**< Only get_async_error, get_history, abort and destruction remain. */
};

/**
 * A call that failed: its status, the library's sentence and, where ranks were given up on, which. Without virtual functions, so
 * that it is one class in programs of which parts have no RTTI.
 */
class Error {
public:
    Error(a2a_status_t status, std::string sentence, std::vector<std::int32_t> lost_ranks = {})
        : status_(status), sentence_(std::move(sentence)), lost_ranks_(std::move(lost_ranks))
    {
    }

    /** A2A_TIMEOUT for instance; never A2A_SUCCESS. */
    a2a_status_t status() const noexcept { return status_; }
    /** "A2A_TIMEOUT" for instance. Static. */
    const char *name() const noexcept { return a2a_status_name(status_); }
    /** Function, rank, argument, value and limit: what a2a_last_error said. Lives as long as this does. */
    const char *what() const noexcept { return sentence_.c_str(); }
    /** Of the comm's first step that was lost, the ranks that were given up on, ascending; of any other failure none. */
    const std::vector<std::int32_t> &lost_ranks() const & noexcept { return lost_ranks_; }
    std::vector<std::int32_t> lost_ranks() && noexcept { return std::move(lost_ranks_); }
    Loss loss() const noexcept
    {
        return status_ < A2A_TIMEOUT ? Loss::call : status_ < A2A_CUDA_ERROR ? Loss::step : Loss::comm;
    }

private:
    a2a_status_t status_;
    std::string sentence_;
    std::vector<std::int32_t> lost_ranks_;
};

#if A2A_HAS_EXCEPTIONS
/** What value() throws: catch it as an a2a::Error, or as any std::exception. */
class Exception : public std::exception, public Error {
public:
    explicit Exception(Error error) : Error(std::move(error)) {}
    const char *what() const noexcept override { return Error::what(); }
};
#endif

/** A value or the error in its place. T may be void: then success alone. */
template <class T>
class [[nodiscard]] Result {
public:
    Result(T value) : value_(std::move(value)) {}
    Result(Error error) : error_(std::move(error)) {}

    explicit operator bool() const noexcept { return value_.has_value(); }
    /** The value. Only if there is one. */
    T &operator*() & noexcept { return *value_; }
    const T &operator*() const & noexcept { return *value_; }
    T operator*() && noexcept { return std::move(*value_); }
    T *operator->() noexcept { return &*value_; }
    const T *operator->() const noexcept { return &*value_; }
    /** The error. Only if there is one. */
    const Error &error() const & noexcept { return *error_; }
    Error error() && noexcept { return std::move(*error_); }
    /** A2A_SUCCESS, or the error's status. */
    a2a_status_t status() const noexcept { return error_ ? error_->status() : A2A_SUCCESS; }
#if A2A_HAS_EXCEPTIONS
    /** The value; throws the error if there is none. */
    T &value() &
    {
        if (error_) throw Exception(*error_);
        return *value_;
    }
    const T &value() const &
    {
        if (error_) throw Exception(*error_);
        return *value_;
    }
    T value() &&
    {
        if (error_) throw Exception(std::move(*error_));
        return std::move(*value_);
    }
#endif

private:
    std::optional<T> value_;
    std::optional<Error> error_;
};

template <>
class [[nodiscard]] Result<void> {
public:
    Result() = default;
    Result(Error error) : error_(std::move(error)) {}

    explicit operator bool() const noexcept { return !error_; }
    /** The error. Only if there is one. */
    const Error &error() const & noexcept { return *error_; }
    Error error() && noexcept { return std::move(*error_); }
    /** A2A_SUCCESS, or the error's status. */
    a2a_status_t status() const noexcept { return error_ ? error_->status() : A2A_SUCCESS; }
#if A2A_HAS_EXCEPTIONS
    /** Throws the error if there is one. */
    void value() const
    {
        if (error_) throw Exception(*error_);
    }
#endif

private:
    std::optional<Error> error_;
};

// ------------------------------------------------------------------------------------------------------------- structs

/** A struct of a2a.h with struct_size set and every other field zero. */
template <class T>
struct Sized : T {
    Sized() noexcept : T() { this->struct_size = sizeof(T); }
};

using Memory = Sized<a2a_memory_t>;
using Info = Sized<a2a_info_t>;
using RecoverIn = Sized<a2a_recover_in_t>;
using RecoverOut = Sized<a2a_recover_out_t>;
using DispatchIn = Sized<a2a_dispatch_in_t>;
using DispatchOut = Sized<a2a_dispatch_out_t>;
using CombineIn = Sized<a2a_combine_in_t>;
using CombineOut = Sized<a2a_combine_out_t>;
using ErrorInfo = Sized<a2a_error_info_t>;
using Stats = Sized<a2a_stats_t>;
using UniqueId = a2a_unique_id_t;

/** What a comm is made of, with a2a_config_init's defaults. A library that refuses to fill it refuses it wherever it is used. */
struct Config : Sized<a2a_config_t> {
    Config() noexcept
    {
        if (a2a_config_init(this, sizeof(a2a_config_t)) != A2A_SUCCESS) static_cast<Sized &>(*this) = Sized();
    }
};

/** The ranks whose bit is set, ascending: of a2a_error_info_t.lost_ranks and a2a_recover_out_t.members. */
template <std::size_t Words>
std::vector<std::int32_t> ranks_of(const std::uint64_t (&mask)[Words])
{
    std::vector<std::int32_t> ranks;
    for (std::size_t rank = 0; rank < 64 * Words; rank++) {
        if (mask[rank / 64] >> rank % 64 & 1) ranks.push_back(static_cast<std::int32_t>(rank));
    }
    return ranks;
}

// ------------------------------------------------------------------------------------------------------------- tensors

/** Element types of tensors, DLPack's. */
using Dtype = a2a_tensor_dtype_t;
inline constexpr Dtype int32{0, 32, 1};
inline constexpr Dtype int64{0, 64, 1};
inline constexpr Dtype uint8{1, 8, 1};
inline constexpr Dtype float16{2, 16, 1};
inline constexpr Dtype float32{2, 32, 1};
inline constexpr Dtype bfloat16{4, 16, 1};
inline constexpr Dtype float8_e4m3{10, 8, 1};

/** Where a tensor lies. */
using Device = a2a_tensor_device_t;
inline constexpr Device cpu{A2A_DEVICE_CPU, 0};
constexpr Device cuda(std::int32_t ordinal) noexcept { return Device{A2A_DEVICE_CUDA, ordinal}; }

/** The element type of a C++ type. Specialise it for an engine's own, of bf16 for instance. */
template <class T>
inline constexpr Dtype dtype_of = T::no_dtype_of_this_type;
template <>
inline constexpr Dtype dtype_of<std::int32_t> = int32;
template <>
inline constexpr Dtype dtype_of<std::int64_t> = int64;
template <>
inline constexpr Dtype dtype_of<std::uint8_t> = uint8;
template <>
inline constexpr Dtype dtype_of<float> = float32;

/**
 * A tensor that is only read: pointer, device, element type, and its own arrays of sizes and strides. The elements stay their
 * owner's.
 */
class ConstTensor {
public:
    /** Dimensions a tensor of this class may have: one more than any of a2a.h's. */
    static constexpr std::size_t max_ndim = 4;

    /** Compact, row by row. data: on `device`, may be null if a size is 0. shape: in elements. */
    template <std::size_t N>
    ConstTensor(const void *data, Dtype dtype, const std::int64_t (&shape)[N], Device device = cpu) noexcept
        : ConstTensor(data, dtype, N, shape, nullptr, device)
    {
        static_assert(N <= max_ndim, "more dimensions than any tensor of a2a.h has");
    }
    /** The element type is that of the pointer. */
    template <class T, std::size_t N>
    ConstTensor(const T *data, const std::int64_t (&shape)[N], Device device = cpu) noexcept
        : ConstTensor(data, dtype_of<T>, shape, device)
    {
    }
    /** One whose rows lie apart. shape, strides: in elements. Of this name, for braces can be a device as well. */
    template <std::size_t N>
    static ConstTensor strided(const void *data, Dtype dtype, const std::int64_t (&shape)[N], const std::int64_t (&strides)[N],
                               Device device = cpu) noexcept
    {
        static_assert(N <= max_ndim, "more dimensions than any tensor of a2a.h has");
        return ConstTensor(data, dtype, N, shape, strides, device);
    }

    /** A copy refers to the same elements, and has sizes and strides of its own, whoever's they were. */
    ConstTensor(const ConstTensor &other) noexcept { copy(other.tensor_); }
    ConstTensor &operator=(const ConstTensor &other) noexcept
    {
        copy(other.tensor_);
        return *this;
    }

    /** The C struct, to give to a call or to store in a struct for one. Lives as long as this: not of a temporary. */
    const a2a_tensor_t *get() const & noexcept { return &tensor_; }
    const a2a_tensor_t *get() const && = delete;

    /** The first element, which byte_offset may move away from a2a_tensor_t.data. */
    const void *data() const noexcept { return static_cast<const char *>(tensor_.data) + tensor_.byte_offset; }
    template <class T>
    const T *data() const noexcept
    {
        return static_cast<const T *>(data());
    }
    Dtype dtype() const noexcept { return tensor_.dtype; }
    Device device() const noexcept { return tensor_.device; }
    std::int32_t ndim() const noexcept { return tensor_.ndim; }
    /** The size of a dimension, in elements. 0 <= dimension < ndim(). */
    std::int64_t size(std::int32_t dimension) const noexcept { return tensor_.shape[dimension]; }
    /** The elements from one index of a dimension to the next. 0 <= dimension < ndim(). */
    std::int64_t stride(std::int32_t dimension) const noexcept
    {
        if (tensor_.strides) return tensor_.strides[dimension];
        std::int64_t stride = 1;
        for (std::int32_t d = tensor_.ndim - 1; d > dimension; d--) stride *= tensor_.shape[d];
        return stride;
    }
    std::int64_t num_elements() const noexcept
    {
        std::int64_t product = 1;
        for (std::int32_t d = 0; d < tensor_.ndim; d++) product *= tensor_.shape[d];
        return product;
    }

    /** The tensor of `count` indices of the first dimension, from `first` on: a chunk of the tokens. */
    ConstTensor rows(std::int64_t first, std::int64_t count) const noexcept
    {
        ConstTensor part = *this;
        part.narrow(first, count);
        return part;
    }

protected:
    ConstTensor() noexcept = default;

    // The library reads inputs and writes outputs; only a Tensor can become one of the latter.
    ConstTensor(const void *data, Dtype dtype, std::size_t ndim, const std::int64_t *shape, const std::int64_t *strides,
                Device device) noexcept
    {
        tensor_.data = const_cast<void *>(data);
        tensor_.device = device;
        tensor_.ndim = static_cast<std::int32_t>(ndim);
        tensor_.dtype = dtype;
        own(shape, strides);
    }

    void copy(const a2a_tensor_t &other) noexcept
    {
        const std::int64_t *shape = other.shape, *strides = other.strides;
        tensor_ = other;
        own(shape, strides);
    }

    void narrow(std::int64_t first, std::int64_t count) noexcept
    {
        const std::int64_t bytes = tensor_.dtype.bits * tensor_.dtype.lanes / 8;
        tensor_.data = static_cast<char *>(tensor_.data) + first * stride(0) * bytes;
        tensor_.shape[0] = count;
    }

    a2a_tensor_t tensor_{};

private:
    void own(const std::int64_t *shape, const std::int64_t *strides) noexcept
    {
        // More dimensions are no tensor of a2a.h's: they stay whose they were, and the call that is given them says so.
        if (tensor_.ndim > static_cast<std::int32_t>(max_ndim)) return;
        for (std::int32_t d = 0; d < tensor_.ndim; d++) {
            shape_[d] = shape[d];
            if (strides) strides_[d] = strides[d];
        }
        tensor_.shape = shape_;
        tensor_.strides = strides ? strides_ : nullptr;
    }

    std::int64_t shape_[max_ndim]{};
    std::int64_t strides_[max_ndim]{};
};

/** A tensor that may be written as well, and so an output; or, made of nothing, an output that the library is to make a view. */
class Tensor : public ConstTensor {
public:
    /** No data: as an output it becomes a view into the slot, valid as a2a.h says; its sizes then are the routing's. */
    Tensor() noexcept = default;

    template <std::size_t N>
    Tensor(void *data, Dtype dtype, const std::int64_t (&shape)[N], Device device = cpu) noexcept
        : ConstTensor(data, dtype, shape, device)
    {
    }
    template <class T, std::size_t N, class = std::enable_if_t<!std::is_const_v<T>>>
    Tensor(T *data, const std::int64_t (&shape)[N], Device device = cpu) noexcept : ConstTensor(data, shape, device)
    {
    }
    template <std::size_t N>
    static Tensor strided(void *data, Dtype dtype, const std::int64_t (&shape)[N], const std::int64_t (&strides)[N],
                          Device device = cpu) noexcept
    {
        Tensor tensor;
        static_cast<ConstTensor &>(tensor) = ConstTensor::strided(data, dtype, shape, strides, device);
        return tensor;
    }

    Tensor rows(std::int64_t first, std::int64_t count) const noexcept
    {
        Tensor part = *this;
        part.narrow(first, count);
        return part;
    }

    using ConstTensor::get;
    a2a_tensor_t *get() & noexcept { return &tensor_; }

    using ConstTensor::data;
    void *data() noexcept { return static_cast<char *>(tensor_.data) + tensor_.byte_offset; }
    template <class T>
    T *data() noexcept
    {
        return static_cast<T *>(data());
    }
};

/** A DLTensor, of dlpack.h or of any framework's copy of it, as the tensor that it is: the same bytes, nothing is copied. */
template <class DLTensor>
const a2a_tensor_t *from_dlpack(const DLTensor *tensor) noexcept
{
    static_assert(sizeof(DLTensor) == sizeof(a2a_tensor_t) && alignof(DLTensor) == alignof(a2a_tensor_t),
                  "not laid out as DLPack's DLTensor");
    return reinterpret_cast<const a2a_tensor_t *>(tensor);
}
template <class DLTensor>
a2a_tensor_t *from_dlpack(DLTensor *tensor) noexcept
{
    return const_cast<a2a_tensor_t *>(from_dlpack(static_cast<const DLTensor *>(tensor)));
}

/** A tensor as a DLTensor: to_dlpack<DLTensor>(tensor). Lives as long as the tensor. */
template <class DLTensor>
DLTensor *to_dlpack(a2a_tensor_t *tensor) noexcept
{
    static_assert(sizeof(DLTensor) == sizeof(a2a_tensor_t) && alignof(DLTensor) == alignof(a2a_tensor_t),
                  "not laid out as DLPack's DLTensor");
    return reinterpret_cast<DLTensor *>(tensor);
}

// ----------------------------------------------------------------------------------------------------- without a comm

namespace detail {

/** What a status says of the call that returned it. The sentence is this thread's last. */
inline Result<void> outcome(a2a_status_t status)
{
    if (status == A2A_SUCCESS) return {};
    return Error(status, a2a_last_error());
}

template <class T>
Result<T> outcome(a2a_status_t status, T value)
{
    if (status == A2A_SUCCESS) return value;
    return Error(status, a2a_last_error());
}

/** The text that `write(buffer, length, needed)` gives, whatever its length, which may grow from one call to the next. */
template <class Write>
Result<std::string> text(std::size_t expected, Write write)
{
    std::string text(expected, '\0');
    std::size_t needed = 0;
    a2a_status_t status;
    while ((status = write(&text[0], text.size(), &needed)) == A2A_OVERFLOW && needed > text.size()) text.resize(needed);
    if (status != A2A_SUCCESS) return Error(status, a2a_last_error());
    text.resize(needed - 1);
    return text;
}

}  // namespace detail

/** a2a_get_unique_id: the name of a new group on this host, to be copied to every rank. */
inline Result<UniqueId> get_unique_id()
{
    UniqueId id{};
    const a2a_status_t status = a2a_get_unique_id(&id);
    return detail::outcome(status, id);
}

/** a2a_unique_id_from_address: the name of a group whose address "host:port" and secret every rank knows. */
inline Result<UniqueId> unique_id_from_address(const char *address, const char *key)
{
    UniqueId id{};
    const a2a_status_t status = a2a_unique_id_from_address(address, key, &id);
    return detail::outcome(status, id);
}

/** a2a_explain: JSON of what Comm::create would choose, and why; a config that is UNSUPPORTED is explained too. */
inline Result<std::string> explain(const a2a_config_t &config)
{
    return detail::text(
        4096, [&](char *buf, std::size_t len, std::size_t *needed) { return a2a_explain(&config, buf, len, needed); });
}

/** a2a_query_memory: the bytes that Comm::create and Routing::create will take. */
inline Result<Memory> query_memory(const a2a_config_t &config)
{
    Memory memory;
    const a2a_status_t status = a2a_query_memory(&config, &memory);
    return detail::outcome(status, memory);
}

/** a2a_set_log_callback: where the process's log lines go; null: where A2A_LOG says. */
inline Result<void> set_log_callback(a2a_log_fn callback, void *user = nullptr)
{
    return detail::outcome(a2a_set_log_callback(callback, user));
}

/** a2a_last_error: the sentence of this thread's last failure; Error has a copy of its own. */
inline const char *last_error() noexcept { return a2a_last_error(); }
/** a2a_status_name: "A2A_TIMEOUT" for instance. */
inline const char *status_name(a2a_status_t status) noexcept { return a2a_status_name(status); }
/** a2a_version: the library's; A2A_VERSION is the header's. */
inline const char *version() noexcept { return a2a_version(); }
/** a2a_backend_from_name: of "auto", "deepep_low_latency" and so on; A2A_BACKEND_UNKNOWN for any other. */
inline a2a_backend_t backend_from_name(const char *name) noexcept { return a2a_backend_from_name(name); }

// -------------------------------------------------------------------------------------------------------------- owners

class Comm;

/**
 * Where the rows of one dispatch went: an a2a_routing_t that is destroyed with this. Before or after its comm. Moves, is not copied;
 * empty after a move.
 */
class Routing {
public:
    /** a2a_routing_create: local, bound to a slot of the comm. */
    static Result<Routing> create(Comm &comm, std::int32_t slot = 0);

    /** Takes over a C handle, or none. */
    explicit Routing(a2a_routing_t *handle = nullptr) noexcept : handle_(handle) {}

    /** The C handle, which stays this one's. */
    a2a_routing_t *get() const noexcept { return handle_.get(); }
    /** The C handle, which is the caller's from now on. */
    a2a_routing_t *release() noexcept { return handle_.release(); }
    explicit operator bool() const noexcept { return handle_ != nullptr; }
    /** a2a_routing_destroy, for whoever wants its status. Empty afterwards. */
    Result<void> destroy() { return detail::outcome(a2a_routing_destroy(release())); }

private:
    struct Destroy {
        void operator()(a2a_routing_t *handle) const noexcept { static_cast<void>(a2a_routing_destroy(handle)); }
    };
    std::unique_ptr<a2a_routing_t, Destroy> handle_;
};

/**
 * One rank's membership of one expert-parallel group: an a2a_comm_t that is destroyed with this, which never waits for peers.
 * Moves, is not copied; empty after a move.
 */
class Comm {
public:
    /** a2a_create: collective, returns when every rank has called it. */
    static Result<Comm> create(const a2a_config_t &config)
    {
        a2a_comm_t *handle = nullptr;
        const a2a_status_t status = a2a_create(&config, &handle);
        if (status != A2A_SUCCESS) return Error(status, a2a_last_error());
        return Comm(handle);
    }

    /** Takes over a C handle, or none. */
    explicit Comm(a2a_comm_t *handle = nullptr) noexcept : handle_(handle) {}

    /** The C handle, which stays this one's. */
    a2a_comm_t *get() const noexcept { return handle_.get(); }
    /** The C handle, which is the caller's from now on. */
    a2a_comm_t *release() noexcept { return handle_.release(); }
    explicit operator bool() const noexcept { return handle_ != nullptr; }
    /** a2a_destroy, for whoever wants its status. Empty afterwards. */
    Result<void> destroy() { return detail::outcome(a2a_destroy(release())); }

    /** a2a_dispatch. out: may be null where in.phase is SEND. stream: the CUDA stream; nothing on the CPU. */
    Result<void> dispatch(Routing &routing, const a2a_dispatch_in_t &in, a2a_dispatch_out_t *out, void *stream = nullptr)
    {
        return of_step(a2a_dispatch(get(), routing.get(), &in, out, stream));
    }

    /** a2a_combine. out: may be null where in.phase is SEND. stream: the CUDA stream; nothing on the CPU. */
    Result<void> combine(Routing &routing, const a2a_combine_in_t &in, a2a_combine_out_t *out, void *stream = nullptr)
    {
        return of_step(a2a_combine(get(), routing.get(), &in, out, stream));
    }

    /** a2a_combine_buffer: where experts write so that combine copies nothing. dtype: of the rows; bits 0: combine_dtype's. */
    Result<Tensor> combine_buffer(Routing &routing, Dtype dtype = Dtype{})
    {
        Tensor tensor;
        tensor.get()->dtype = dtype;
        auto done = of_step(a2a_combine_buffer(get(), routing.get(), tensor.get()));
        if (!done) return done.error();
        return tensor;
    }

    /** a2a_get_info: what was chosen, the experts of this rank, capacities. */
    Result<Info> get_info() const
    {
        Info info;
        const a2a_status_t status = a2a_get_info(get(), &info);
        return detail::outcome(status, info);
    }

    /** a2a_get_async_error: the first failure; its status is A2A_SUCCESS if nothing failed. */
    Result<ErrorInfo> get_async_error() const
    {
        ErrorInfo info;
        const a2a_status_t status = a2a_get_async_error(get(), &info);
        return detail::outcome(status, info);
    }

    /** a2a_get_history: the last operations, as JSON. */
    Result<std::string> get_history() const
    {
        return detail::text(131072, [this](char *buf, std::size_t len, std::size_t *needed) {
            return a2a_get_history(get(), buf, len, needed);
        });
    }

    /** a2a_get_stats: what has been moved since create. */
    Result<Stats> get_stats() const
    {
        Stats stats;
        const a2a_status_t status = a2a_get_stats(get(), &stats);
        return detail::outcome(status, stats);
    }

    /** a2a_get_rank_mask: 1 for each rank that is a member and alive; max_ranks entries. */
    Result<std::vector<std::int32_t>> get_rank_mask() const
    {
        auto info = get_info();
        if (!info) return info.error();
        std::vector<std::int32_t> mask(static_cast<std::size_t>(info->max_ranks));
        const a2a_status_t status = a2a_get_rank_mask(get(), mask.data(), info->max_ranks);
        return detail::outcome(status, std::move(mask));
    }

    /** a2a_set_timeout: milliseconds of every later call; 0 leaves a value as it is. */
    Result<void> set_timeout(std::int64_t first_step_timeout_ms, std::int64_t timeout_ms)
    {
        return detail::outcome(a2a_set_timeout(get(), first_step_timeout_ms, timeout_ms));
    }

    /** a2a_abort: ends every call in flight, and every later one. Returns at once. */
    Result<void> abort() { return detail::outcome(a2a_abort(get())); }

    /** a2a_recover: after a loss, the survivors agree on who they are; every one of them calls it. */
    Result<RecoverOut> recover(const a2a_recover_in_t &in = RecoverIn())
    {
        RecoverOut out;
        auto done = detail::outcome(a2a_recover(get(), &in, &out));
        if (!done) return done.error();
        return out;
    }

    /** a2a_connect_ranks. timeout_ms: 0 = the config's setup_timeout_ms. */
    Result<void> connect_ranks(const std::vector<std::int32_t> &ranks, std::int64_t timeout_ms = 0)
    {
        return detail::outcome(a2a_connect_ranks(get(), ranks.data(), count(ranks), timeout_ms));
    }

    /** a2a_activate_ranks: from now on these take part and nobody else. The generation they have agreed on. */
    Result<std::uint64_t> activate_ranks(const std::vector<std::int32_t> &ranks, std::int64_t timeout_ms = 0)
    {
        std::uint64_t generation = 0;
        auto done = detail::outcome(a2a_activate_ranks(get(), ranks.data(), count(ranks), timeout_ms, &generation));
        if (!done) return done.error();
        return generation;
    }

    /** a2a_disconnect_ranks: forgets ranks that take no part. */
    Result<void> disconnect_ranks(const std::vector<std::int32_t> &ranks)
    {
        return detail::outcome(a2a_disconnect_ranks(get(), ranks.data(), count(ranks)));
    }

    /** a2a_set_rank_mask: this rank alone, or all that take part. mask: max_ranks entries. */
    Result<void> set_rank_mask(const std::vector<std::int32_t> &mask)
    {
        return detail::outcome(a2a_set_rank_mask(get(), mask.data(), count(mask)));
    }

private:
    static std::int32_t count(const std::vector<std::int32_t> &ranks) noexcept
    {
        return static_cast<std::int32_t>(ranks.size());
    }

    /**
     * As detail::outcome, with the ranks that the step was lost by. The comm has those of its first failure alone: they are this
     * call's if its sentence, which begins with the function's name, is the comm's, which is cut and has the last operations.
     */
    Result<void> of_step(a2a_status_t status)
    {
        auto done = detail::outcome(status);
        if (done || done.error().loss() != Loss::step) return done;
        auto first = get_async_error();
        if (!first || first->status != status) return done;
        const std::string_view sentence = done.error().what(), message = first->message;
        if (sentence.find(message.substr(0, message.find("; last: "))) == sentence.npos) return done;
        return Error(status, done.error().what(), ranks_of(first->lost_ranks));
    }

    struct Destroy {
        void operator()(a2a_comm_t *handle) const noexcept { static_cast<void>(a2a_destroy(handle)); }
    };
    std::unique_ptr<a2a_comm_t, Destroy> handle_;
};

inline Result<Routing> Routing::create(Comm &comm, std::int32_t slot)
{
    a2a_routing_t *handle = nullptr;
    const a2a_status_t status = a2a_routing_create(comm.get(), slot, &handle);
    if (status != A2A_SUCCESS) return Error(status, a2a_last_error());
    return Routing(handle);
}

}  // namespace a2a

#endif  /* A2A_HPP */
