// A program in C++ that uses an installed liba2a: one rank's tokens to its own experts and back, through a2a.hpp.
#include <a2a.hpp>

#include <cstdio>
#include <vector>

int main()
try {
    a2a::Config config;
    config.num_ranks = 1;
    config.num_experts = 4;
    config.max_topk = 1;
    config.max_hidden = 64;
    config.max_tokens = 8;
    config.token_dtype = A2A_DTYPE_F32;
    config.layout = A2A_LAYOUT_EXPERT_CONTIGUOUS;
    a2a::Comm comm = a2a::Comm::create(config).value();
    a2a::Routing routing = a2a::Routing::create(comm).value();

    struct alignas(16) Row {
        float values[64];
    };
    std::vector<Row> tokens(8), sums(8);
    std::vector<std::int32_t> ids(8);
    for (int t = 0; t < 8; t++) {
        ids[static_cast<std::size_t>(t)] = t % 4;
        for (float &value : tokens[static_cast<std::size_t>(t)].values) value = static_cast<float>(t + 1);
    }
    const a2a::ConstTensor tokens_in(tokens[0].values, {8, 64}), ids_in(ids.data(), {8, 1});
    a2a::Tensor rows, sums_out(sums[0].values, {8, 64});

    a2a::DispatchIn in;
    in.tokens = tokens_in.get();
    in.topk_ids = ids_in.get();
    a2a::DispatchOut out;
    out.tokens = rows.get();
    comm.dispatch(routing, in, &out).value();

    a2a::CombineIn results;
    results.tokens = rows.get();
    a2a::CombineOut back;
    back.tokens = sums_out.get();
    comm.combine(routing, results, &back).value();
    for (int t = 0; t < 8; t++) {
        if (sums[static_cast<std::size_t>(t)].values[63] != static_cast<float>(t + 1)) return 1;
    }
    return 0;
} catch (const a2a::Error &error) {
    std::printf("%s: %s\n", error.name(), error.what());
    return 1;
}
