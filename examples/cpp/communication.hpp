/*
 * How an inference engine may put liba2a behind its mixture-of-experts layers: one object a rank, which knows before it is made
 * whether it can be, cuts a long prefill into steps, and lets one step's rows travel while another's experts work.
 *
 *     feasible   which step size fits into this memory, and what the library would choose: nothing is created
 *     create     the comm, and a routing for each of two slots
 *     prepare    the steps of a batch, from every rank's number of tokens: the same number of steps on every rank
 *     dispatch, combine   one step, or one half of it
 *     run        all steps, one after the other
 *     run_overlapped      all steps, two in flight
 *     capture    either of them as a CUDA graph
 *
 * Experts get rows in their own blocks (layouts EXPERT_CONTIGUOUS and EXPERT_PADDED), as a grouped GEMM takes them.
 * On CUDA memory everything is enqueued on the caller's stream, and the host waits for nothing.
 */
#pragma once

#include "cuda.hpp"

#include <a2a.hpp>

#include <functional>
#include <string>
#include <vector>

namespace engine {

/** One rank's tokens, T of them: the engine's memory, on the comm's device. */
struct Batch {
    a2a::ConstTensor tokens;       /**< [T, H] of the config's token_dtype */
    a2a::ConstTensor topk_ids;     /**< [T, K] int32 or int64 */
    a2a::ConstTensor topk_weights; /**< [T, K] float32 */
    a2a::Tensor sums;              /**< [T, H], out: what combine makes of the experts' results */
};

/** What one step brought to this rank's experts: views, which end with the step's combine. */
struct Received {
    a2a::Tensor tokens;         /**< [rows, H], or [L, rows, H] with EXPERT_PADDED */
    a2a::Tensor expert_counts;  /**< [L] int32: rows of each expert */
    a2a::Tensor expert_offsets; /**< [L+1] int32: where they start, in rows */
};

/** Writes each expert's results to the places of its rows. On CUDA it enqueues that on the stream. Throws nothing. */
using Experts = std::function<a2a::Result<void>(const Received &received, a2a::Tensor &results, void *stream)>;

/** One dispatch and combine: on every rank at most `bound` tokens, on this one those from `first` on. */
struct Step {
    std::int64_t first;
    std::int32_t bound;
    std::vector<std::int32_t> rank_tokens;
};

/** What a comm would be. */
struct Feasibility {
    std::int32_t step_tokens;  /**< tokens a rank may have in a step: the config's max_tokens, or less to fit the memory */
    a2a::Memory memory;        /**< what it then takes */
    std::string explanation;   /**< a2a_explain's JSON, for the engine's log */
};

class Communication {
public:
    /** Two steps in flight: one travels while the other's experts work. */
    static constexpr std::int32_t num_slots = 2;

    /**
     * The largest step of at most config.max_tokens tokens that fits into config.memory_limit on every rank; an error says why there
     * is none. The same on every rank, if their configs are.
     */
    static a2a::Result<Feasibility> feasible(a2a::Config config);

    /** Collective. config: with num_slots slots, a layout by expert, and max_tokens as `feasible` says. */
    static a2a::Result<Communication> create(a2a::Config config);

    /** rank_tokens: every rank's T. No steps if nobody has a token. */
    std::vector<Step> prepare(const std::vector<std::int32_t> &rank_tokens) const;

    a2a::Result<void> dispatch(std::int32_t slot, const Batch &batch, const Step &step, a2a_phase_t phase, void *stream);
    a2a::Result<void> combine(std::int32_t slot, const Batch &batch, const Step &step, a2a_phase_t phase, void *stream);
    /** Between the two. */
    a2a::Result<void> compute(std::int32_t slot, const Experts &experts, void *stream);

    a2a::Result<void> run(const Batch &batch, const std::vector<Step> &steps, const Experts &experts, void *stream);
    a2a::Result<void> run_overlapped(const Batch &batch, const std::vector<Step> &steps, const Experts &experts, void *stream);

    /** run_overlapped as a graph: every launch is a step anew, with whatever then stands in the batch's memory. CUDA memory only. */
    a2a::Result<cuda::Graph> capture(const Batch &batch, const std::vector<Step> &steps, const Experts &experts, void *stream);

    const a2a::Info &info() const { return info_; }
    a2a::Comm &comm() { return comm_; }

private:
    struct Slot {
        a2a::Routing routing;
        Received received;
        a2a::Tensor results;
    };

    a2a::Comm comm_;
    a2a::Info info_;
    std::vector<Slot> slots_;
};

}  // namespace engine
