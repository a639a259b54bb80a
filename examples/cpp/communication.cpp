#include "communication.hpp"

#include <algorithm>
#include <utility>

namespace engine {

namespace {

/** The tokens of this rank in a step. */
std::int32_t tokens_of(const Step &step, const a2a::Info &info)
{
    return step.rank_tokens[static_cast<std::size_t>(info.rank)];
}

/** This engine's experts take rows in blocks of their own. The same on every rank, so that none waits for one that is refused. */
a2a::Result<void> check(const a2a::Config &config)
{
    if (config.layout == A2A_LAYOUT_EXPERT_CONTIGUOUS || config.layout == A2A_LAYOUT_EXPERT_PADDED) return {};
    return a2a::Error(A2A_UNSUPPORTED, "rank " + std::to_string(config.rank) + ": layout is " + std::to_string(config.layout) +
                                           ", this engine's experts take EXPERT_PADDED (4) and EXPERT_CONTIGUOUS (5)");
}

}  // namespace

a2a::Result<Feasibility> Communication::feasible(a2a::Config config)
{
    if (auto done = check(config); !done) return done.error();
    config.num_slots = num_slots;
    const std::uint64_t limit = std::exchange(config.memory_limit, 0);
    // The memory of a rank grows with its experts: of contiguous blocks the first rank has the largest.
    config.rank = 0;
    for (;;) {
        auto memory = a2a::query_memory(config);
        if (!memory) return memory.error();
        if (limit == 0 || memory->total_bytes <= limit) {
            auto explanation = a2a::explain(config);
            if (!explanation) return explanation.error();
            return Feasibility{config.max_tokens, *memory, std::move(*explanation)};
        }
        if (config.max_tokens == 1) {
            return a2a::Error(A2A_OUT_OF_MEMORY, "steps of 1 token take " + std::to_string(memory->total_bytes) +
                                                     " bytes a rank, memory_limit is " + std::to_string(limit));
        }
        config.max_tokens /= 2;
    }
}

a2a::Result<Communication> Communication::create(a2a::Config config)
{
    if (auto done = check(config); !done) return done.error();
    config.num_slots = num_slots;
    Communication made;
    auto comm = a2a::Comm::create(config);
    if (!comm) return comm.error();
    made.comm_ = std::move(*comm);

    auto info = made.comm_.get_info();
    if (!info) return info.error();
    made.info_ = *info;
    for (std::int32_t slot = 0; slot < num_slots; slot++) {
        auto routing = a2a::Routing::create(made.comm_, slot);
        if (!routing) return routing.error();
        made.slots_.push_back(Slot{std::move(*routing), {}, {}});
    }
    return made;
}

std::vector<Step> Communication::prepare(const std::vector<std::int32_t> &rank_tokens) const
{
    // Ranks that have no tokens left take part all the same.
    std::vector<Step> steps;
    const std::int32_t most = *std::max_element(rank_tokens.begin(), rank_tokens.end());
    for (std::int32_t first = 0; first < most; first += info_.max_tokens) {
        Step step{first, 0, {}};
        for (std::int32_t tokens : rank_tokens) {
            step.rank_tokens.push_back(std::clamp(tokens - first, 0, info_.max_tokens));
            step.bound = std::max(step.bound, step.rank_tokens.back());
        }
        // A rank that has run out of tokens dispatches none from where its own end.
        step.first = std::min(first, rank_tokens[static_cast<std::size_t>(info_.rank)]);
        steps.push_back(std::move(step));
    }
    return steps;
}

a2a::Result<void> Communication::dispatch(std::int32_t slot, const Batch &batch, const Step &step, a2a_phase_t phase, void *stream)
{
    auto &[routing, received, results] = slots_[static_cast<std::size_t>(slot)];
    const auto tokens = batch.tokens.rows(step.first, tokens_of(step, info_));
    const auto ids = batch.topk_ids.rows(step.first, tokens_of(step, info_));
    const auto weights = batch.topk_weights.rows(step.first, tokens_of(step, info_));
    a2a::DispatchIn in;
    in.tokens = tokens.get();
    in.topk_ids = ids.get();
    in.topk_weights = weights.get();
    in.rank_tokens = step.rank_tokens.data();
    in.max_tokens = step.bound;
    in.phase = phase;

    received = Received();
    a2a::DispatchOut out;
    out.tokens = received.tokens.get();
    out.expert_counts = received.expert_counts.get();
    out.expert_offsets = received.expert_offsets.get();
    return comm_.dispatch(routing, in, &out, stream);
}

a2a::Result<void> Communication::compute(std::int32_t slot, const Experts &experts, void *stream)
{
    auto &[routing, received, results] = slots_[static_cast<std::size_t>(slot)];
    auto buffer = comm_.combine_buffer(routing);
    if (!buffer) return buffer.error();
    results = *buffer;
    return experts(received, results, stream);
}

a2a::Result<void> Communication::combine(std::int32_t slot, const Batch &batch, const Step &step, a2a_phase_t phase, void *stream)
{
    auto &[routing, received, results] = slots_[static_cast<std::size_t>(slot)];
    a2a::Tensor sums = batch.sums.rows(step.first, tokens_of(step, info_));
    a2a::CombineIn in;
    in.tokens = results.get();
    in.phase = phase;
    a2a::CombineOut out;
    out.tokens = sums.get();
    return comm_.combine(routing, in, &out, stream);
}

a2a::Result<void> Communication::run(const Batch &batch, const std::vector<Step> &steps, const Experts &experts, void *stream)
{
    for (const Step &step : steps) {
        if (auto done = dispatch(0, batch, step, A2A_PHASE_BOTH, stream); !done) return done;
        if (auto done = compute(0, experts, stream); !done) return done;
        if (auto done = combine(0, batch, step, A2A_PHASE_BOTH, stream); !done) return done;
    }
    return {};
}

a2a::Result<void> Communication::run_overlapped(const Batch &batch, const std::vector<Step> &steps, const Experts &experts,
                                                void *stream)
{
    const auto count = static_cast<std::int32_t>(steps.size());
    const auto step = [&](std::int32_t number) -> const Step & { return steps[static_cast<std::size_t>(number)]; };
    // A step takes over the slot of the one before the last, whose sums must be here first.
    const auto begin = [&](std::int32_t number) -> a2a::Result<void> {
        const std::int32_t slot = number % num_slots, before = number - num_slots;
        if (before >= 0) {
            if (auto done = combine(slot, batch, step(before), A2A_PHASE_RECV, stream); !done) return done;
        }
        return dispatch(slot, batch, step(number), A2A_PHASE_SEND, stream);
    };

    for (std::int32_t number = 0, begun = 0; number < count; number++) {
        // Rows of the next step leave before this one's experts begin.
        for (; begun < std::min(count, number + num_slots); begun++) {
            if (auto done = begin(begun); !done) return done;
        }
        const std::int32_t slot = number % num_slots;
        if (auto done = dispatch(slot, batch, step(number), A2A_PHASE_RECV, stream); !done) return done;
        if (auto done = compute(slot, experts, stream); !done) return done;
        if (auto done = combine(slot, batch, step(number), A2A_PHASE_SEND, stream); !done) return done;
    }
    for (std::int32_t number = std::max(0, count - num_slots); number < count; number++) {
        if (auto done = combine(number % num_slots, batch, step(number), A2A_PHASE_RECV, stream); !done) return done;
    }
    return {};
}

a2a::Result<cuda::Graph> Communication::capture(const Batch &batch, const std::vector<Step> &steps, const Experts &experts,
                                                void *stream)
{
    return cuda::Graph::capture(stream, [&] { return run_overlapped(batch, steps, experts, stream); });
}

}  // namespace engine
