/*
 * liba2a: mixture-of-experts dispatch and combine between ranks.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Generated from src/abi by cbindgen; edit the comments there, then run `make header`.
 *
 * Conventions. Every call returns a status; results come through pointers, written on success only. Structs that
 * begin with struct_size may be shorter or longer than the library's: missing fields are 0, unknown fields must be.
 * A handle is destroyed once and never used afterwards (a stale one is refused, not followed). A comm and its routings
 * may be used from any thread, by one call at a time: a second gets A2A_BUSY; calls marked "at any time" are exempt.
 */

#ifndef A2A_H
#define A2A_H

#include <stddef.h>
#include <stdint.h>

/** The version of this header; a2a_version() is the library's. */
#define A2A_VERSION "0.1.0"
#define A2A_VERSION_MAJOR 0
#define A2A_VERSION_MINOR 1
#define A2A_VERSION_PATCH 0


/**
 * Config flag: the host of a2a_unique_id_from_address may be more than a loopback address. Without it a2a_create refuses
 * such an address, since whoever can reach it may knock, if not enter.
 */
#define A2A_CONFIG_REMOTE 1

/**
 * Config flag, the same on all ranks, NIXL_ELASTIC on A2A_DEVICE_CPU: a step goes on without ranks that die, leave or do not come by its deadline,
 * and so do later ones, each rank for itself, until a2a_activate_ranks. Every status has A2A_STEP_DEGRADED and marks them, and
 * a2a_get_async_error has the first such loss. Their tokens are missing, and their experts' results in the sums, whose weights
 * stay as they are. max_recv_rows is 0. Without it such a step is void.
 */
#define A2A_CONFIG_DEGRADE 2

/**
 * Dispatch flag: wait for the counts on the host and report num_rows.
 */
#define A2A_DISPATCH_HOST_COUNTS 1

/**
 * Dispatch flag: rows past the counts hold zeros in every output instead of stale data.
 */
#define A2A_DISPATCH_ZERO_PADDING 2

/**
 * Dispatch flag: every rank dispatches the same number of tokens in this step.
 */
#define A2A_DISPATCH_UNIFORM 4

/**
 * Dispatch flag, of every rank or none: replay the routing's last received dispatch. No routing and no exchange of
 * counts: rows go where they went then. T and the bound are the same; topk_ids is NULL; absent topk_weights are
 * those the routing has, given ones replace them. Hidden size, type, scales and extras may differ.
 */
#define A2A_DISPATCH_REUSE 8

/**
 * Combine flag: add to what `out.tokens` holds (added last, in float32, before the one rounding).
 */
#define A2A_COMBINE_ACCUMULATE 1

/**
 * Combine flag, EXPERT_* layouts: sum without weights.
 */
#define A2A_COMBINE_NO_WEIGHTS 2

/**
 * Combine flag, the same on all ranks: with A2A_TRANSPORT_NCCL the sum may be NCCL's (ncclReduceScatter where all ranks have as
 * many tokens, else ncclReduce), in the element type of the rows and in an order that is NCCL's to choose: bits then differ from
 * those of other transports. Rows of every rank are summed, so experts write zeroes for tokens that are none of theirs. With
 * row_weights, and in windows, it changes nothing.
 */
#define A2A_COMBINE_NCCL_SUM 4

/**
 * Bit of `status[0]`: an expert id was outside [-1, num_experts); it counted as -1.
 */
#define A2A_STEP_BAD_ID 1

/**
 * Bit of `status[0]`: rows were dropped because max_recv_rows was exceeded.
 */
#define A2A_STEP_DROPPED 2

/**
 * Bit of `status[0]`: the step is void; ranks given up on are marked from `status[4]` on.
 */
#define A2A_STEP_VOID 4

/**
 * Bit of `status[0]`: the step is void because max_recv_rows was exceeded under A2A_OVERFLOW_ERROR; the ranks that
 * would have received too many rows are marked from `status[4]` on.
 */
#define A2A_STEP_OVERFLOW 8

/**
 * Bit of `status[0]`: the step went on without ranks, which are marked from `status[4]` on (A2A_CONFIG_DEGRADE). Of a combine
 * `status[2]` counts results that are missing for it beside those that were dropped.
 */
#define A2A_STEP_DEGRADED 16

/**
 * Log level: something failed.
 */
#define A2A_LOG_ERROR 1

/**
 * Log level: something is odd.
 */
#define A2A_LOG_WARN 2

/**
 * Log level: set-up and tear-down.
 */
#define A2A_LOG_INFO 3

/**
 * Log level: details of set-up.
 */
#define A2A_LOG_DEBUG 4

/**
 * The number of extra row tensors that can travel beside the tokens.
 */
#define A2A_MAX_EXTRAS 8

/**
 * The largest top-k.
 */
#define A2A_MAX_TOPK 32

/**
 * The largest number of ranks in a comm.
 */
#define A2A_MAX_RANKS 1024

/**
 * One rank's membership of one expert-parallel group. Opaque.
 */
typedef struct a2a_comm_t a2a_comm_t;

/**
 * Where the rows of one dispatch went. Opaque.
 */
typedef struct a2a_routing_t a2a_routing_t;

/**
 * A call's outcome: one of the `A2A_*` status constants.
 */
typedef int32_t a2a_status_t;

/**
 * Names one group of ranks: an address and a 128-bit key. Made once by a2a_get_unique_id or
 * a2a_unique_id_from_address, copied to every rank by any means, used for one a2a_create on each. Plain bytes;
 * whoever has them can join, so treat them as a secret.
 */
typedef struct a2a_unique_id_t {
    /**
     * Opaque.
     */
    uint8_t bytes[128];
} a2a_unique_id_t;

/**
 * Where the windows and the caller's tensors lie; the values are DLPack's. 0 means CPU.
 */
typedef int32_t a2a_device_t;

/**
 * The strategy that moves the rows. 0 lets the library choose.
 */
typedef int32_t a2a_backend_t;

/**
 * What carries the bytes. 0 lets the library choose.
 */
typedef int32_t a2a_transport_t;

/**
 * How dispatched rows lie. R ranks, M the step's bound, K the top-k, H the hidden size, L the local experts.
 */
typedef int32_t a2a_layout_t;

/**
 * Which rank owns which expert.
 */
typedef int32_t a2a_placement_t;

/**
 * An element type in the config; tensors carry DLPack's own codes.
 */
typedef int32_t a2a_dtype_t;

/**
 * Quantisation inside dispatch.
 */
typedef int32_t a2a_quant_t;

/**
 * How the scales that dispatch computes lie.
 */
typedef int32_t a2a_scale_layout_t;

/**
 * What happens when more rows arrive than max_recv_rows.
 */
typedef int32_t a2a_overflow_t;

/**
 * How the ranks of a comm find each other.
 */
typedef int32_t a2a_bootstrap_t;

/**
 * The caller's all-gather for bootstrap, a collective over exactly the ranks of the group: concatenates `bytes` bytes
 * from `send` of every rank, rank ascending, into `recv` (num_ranks * bytes, host memory). `bytes` is the same on all
 * ranks. Returns 0 on success. Called once by a2a_create with num_ranks > 1 (three times if ranks are on several hosts), on its
 * thread; how long it waits is its own affair. What it carries holds the key of the group: whoever can read it can join.
 */
typedef int32_t (*a2a_allgather_fn)(const void *send, void *recv, size_t bytes, void *user);

/**
 * What a comm is made of. Fill it with a2a_config_init, then set fields; 0 means the default everywhere.
 * Fields marked (same) must be equal on every rank; a2a_create names the first that is not.
 */
typedef struct a2a_config_t {
    /**
     * sizeof(a2a_config_t) of the caller; set by a2a_config_init.
     */
    size_t struct_size;
    /**
     * This rank, 0 <= rank < num_ranks. With NIXL_ELASTIC below max_ranks: one from num_ranks on creates its comm alone, and
     * takes part once others have taken it in (a2a_connect_ranks, a2a_activate_ranks).
     */
    int32_t rank;
    /**
     * (same) Ranks in the group, 1 to A2A_MAX_RANKS. With NIXL_ELASTIC those that take part from the start, and 1 for a rank
     * that comes later or in the place of another.
     */
    int32_t num_ranks;
    /**
     * (same) Ranks the group may grow to; 0 = num_ranks. Larger values need NIXL_ELASTIC, whose experts, outputs and memory are
     * those of max_ranks whoever takes part: R is max_ranks there.
     */
    int32_t max_ranks;
    /**
     * (same) Ranks that share one GPU; 0 = 1. Means nothing on the CPU.
     */
    int32_t ranks_per_device;
    /**
     * (same) Where tensors and windows lie; 0 = CPU.
     */
    a2a_device_t device;
    /**
     * The CUDA device of this rank; 0 on the CPU.
     */
    int32_t device_ordinal;
    /**
     * (same) Strategy; 0 = AUTO.
     */
    a2a_backend_t backend;
    /**
     * (same) Transport; 0 = AUTO.
     */
    a2a_transport_t transport;
    /**
     * (same) Row layout; 0 = the backend's first.
     */
    a2a_layout_t layout;
    /**
     * (same) Physical experts in the group, at least 1. Need not be a multiple of num_ranks.
     */
    int32_t num_experts;
    /**
     * (same) Which rank owns which expert.
     */
    a2a_placement_t placement;
    /**
     * (same) Largest top-k of a step, 1 to A2A_MAX_TOPK.
     */
    int32_t max_topk;
    /**
     * (same) Largest hidden size of a step, in elements of token_dtype.
     */
    int32_t max_hidden;
    /**
     * (same) Largest number of tokens a rank dispatches in a step.
     */
    int32_t max_tokens;
    /**
     * (same) Element type of dispatched tokens: sizes the windows. A step may dispatch any type whose rows are
     * not larger. 0 = bf16.
     */
    a2a_dtype_t token_dtype;
    /**
     * (same) Largest element type of the experts' output: BF16, F16 or F32. 0 = token_dtype if it is one of
     * these, else BF16.
     */
    a2a_dtype_t combine_dtype;
    /**
     * (same) Hidden size of the experts' output where it differs from the tokens' (packed fp4); 0 = the same.
     */
    int32_t combine_hidden;
    /**
     * (same) Quantisation inside dispatch; tokens are then bf16, f16 or f32, or e4m3 with their scales.
     */
    a2a_quant_t quant;
    /**
     * (same) Layout of the scales that quantisation makes; A2A_SCALES_COLUMN needs `quant`.
     */
    a2a_scale_layout_t scale_layout;
    /**
     * (same) Largest row of the caller's `scales`, in bytes; 0 = no scales. Must be 0 with `quant`.
     */
    int32_t max_scale_bytes;
    /**
     * (same) Largest row of each extra, in bytes; 0 = that extra is not used. NVLINK_TWO_SIDED on CUDA takes at most 12 KiB of
     * ids, weights, scales and extras together, each rounded up to 16 bytes.
     */
    int32_t extra_row_bytes[A2A_MAX_EXTRAS];
    /**
     * (same) Dispatch/combine pairs that may be in flight at once; 0 = 1, at most 64.
     */
    int32_t num_slots;
    /**
     * (same) Alignment of expert blocks, EXPERT_CONTIGUOUS only; 0 = 1.
     */
    int32_t expert_alignment;
    /**
     * (same) What to do past max_recv_rows.
     */
    a2a_overflow_t overflow;
    /**
     * SMs that kernels may use; 0 = the library's choice. On CUDA HIGH_THROUGHPUT, LOW_LATENCY
     * and NIXL_ELASTIC (2 at least), and NVLINK_TWO_SIDED (3) keep to it, the others only take 0 yet. Means nothing on the CPU.
     */
    int32_t max_sms;
    /**
     * (same) Rows a rank receives at most, which sizes its window; 0 = the layout's capacity. FLAT and
     * EXPERT_CONTIGUOUS: rows of the outputs, alignment included; EXPERT_PADDED: rows of each expert. GATHERED and
     * RANK_MAJOR, whose rows have fixed places, refuse it.
     */
    int64_t max_recv_rows;
    /**
     * Milliseconds until a2a_create gives up on a rank; 0 = 300 000. Does not cover config.allgather.
     */
    int64_t setup_timeout_ms;
    /**
     * Milliseconds that all waits of one call may take until the comm's first step has completed; 0 = 600 000
     * (peers may be compiling).
     */
    int64_t first_step_timeout_ms;
    /**
     * The same for every later call; 0 = 30 000.
     */
    int64_t timeout_ms;
    /**
     * Bytes this rank may take, windows, private memory and num_slots routings together; 0 = no limit.
     */
    uint64_t memory_limit;
    /**
     * (same) A2A_CONFIG_*, or 0.
     */
    uint64_t flags;
    /**
     * (same) [num_experts] owner rank of each expert, host memory, read during the call. Only with
     * A2A_PLACEMENT_TABLE.
     */
    const int32_t *expert_owner;
    /**
     * How the ranks find each other.
     */
    a2a_bootstrap_t bootstrap;
    /**
     * (same) Rows that each FIFO of NVLINK_TWO_SIDED holds, 2 to 65536; 0 = the library's choice. Other backends have
     * none.
     */
    int32_t fifo_rows;
    /**
     * The group's name; unused (all zero) when num_ranks is 1, all zero with A2A_BOOTSTRAP_ALLGATHER, and may be with nccl_comm.
     */
    struct a2a_unique_id_t unique_id;
    /**
     * The all-gather of A2A_BOOTSTRAP_ALLGATHER; NULL otherwise.
     */
    a2a_allgather_fn allgather;
    /**
     * Passed to allgather; must be NULL without it.
     */
    void *allgather_user;
    /**
     * The caller's ncclComm_t of exactly these ranks and this device, or NULL. With it A2A_TRANSPORT_AUTO is NCCL. Communicators
     * are split off it, a collective on it: nobody else uses it during a2a_create. It stays the caller's, and is never ended here;
     * after a create that failed with TIMEOUT a call on it may still wait. unique_id may then be all zero: ranks meet over it.
     */
    void *nccl_comm;
} a2a_config_t;

/**
 * What a2a_create and a2a_routing_create will allocate on this rank, in bytes. Small host objects (handles,
 * error texts, a few KiB) are not counted.
 */
typedef struct a2a_memory_t {
    /**
     * sizeof(a2a_memory_t) of the caller.
     */
    size_t struct_size;
    /**
     * The window that peers address, all slots together; taken by a2a_create.
     */
    uint64_t window_bytes;
    /**
     * Of it, flags and words.
     */
    uint64_t control_bytes;
    /**
     * Of it, one slot's rows.
     */
    uint64_t slot_bytes;
    /**
     * Private device memory taken by a2a_create.
     */
    uint64_t private_bytes;
    /**
     * Private device memory taken by each a2a_routing_create.
     */
    uint64_t routing_bytes;
    /**
     * window_bytes + private_bytes + num_slots * routing_bytes: what memory_limit is compared with.
     */
    uint64_t total_bytes;
    /**
     * Beside those, pinned host memory taken by a2a_create, which couriers carry from and to: NIXL_ELASTIC on A2A_DEVICE_CUDA; else 0.
     */
    uint64_t pinned_bytes;
} a2a_memory_t;

/**
 * What a comm is.
 */
typedef struct a2a_info_t {
    /**
     * sizeof(a2a_info_t) of the caller.
     */
    size_t struct_size;
    int32_t rank;
    /**
     * With NIXL_ELASTIC max_ranks, whoever takes part.
     */
    int32_t num_ranks;
    int32_t max_ranks;
    a2a_device_t device;
    int32_t device_ordinal;
    /**
     * The strategy chosen, never AUTO.
     */
    a2a_backend_t backend;
    /**
     * The transport chosen, never AUTO.
     */
    a2a_transport_t transport;
    /**
     * The layout chosen, never AUTO.
     */
    a2a_layout_t layout;
    int32_t num_experts;
    /**
     * The lowest expert this rank owns; -1 if it owns none.
     */
    int32_t first_expert;
    /**
     * L: the experts this rank owns.
     */
    int32_t num_local_experts;
    int32_t max_topk;
    int32_t max_hidden;
    int32_t max_tokens;
    int32_t num_slots;
    /**
     * SMs in effect; 0 where there is no bound, and on the CPU.
     */
    int32_t max_sms;
    /**
     * Rows of this rank's outputs in a full step: R*M for GATHERED, RANK_MAJOR and FLAT, L*R*M for EXPERT_PADDED,
     * R*M*min(K,L) + L*(alignment-1) rounded up to the alignment for EXPERT_CONTIGUOUS; less under max_recv_rows.
     */
    int64_t row_capacity;
    /**
     * Bytes of this rank's window.
     */
    uint64_t window_bytes;
} a2a_info_t;

/**
 * How long a2a_recover waits. All zero, or NULL: the defaults.
 */
typedef struct a2a_recover_in_t {
    /**
     * sizeof(a2a_recover_in_t) of the caller.
     */
    size_t struct_size;
    /**
     * Milliseconds that ranks which nobody gave up on are waited for; 0 = the config's setup_timeout_ms. What the survivors
     * then do has as much again; if one dies meanwhile they meet anew, unless this has passed: three times it ends a call.
     */
    int64_t timeout_ms;
    /**
     * Milliseconds that ranks which were given up on, but whose process lives, are waited for once all others have come;
     * 0 = 1000.
     */
    int64_t patience_ms;
} a2a_recover_in_t;

/**
 * What the survivors agreed on: the same on every one of them, but for whole_steps after a recovery that failed.
 */
typedef struct a2a_recover_out_t {
    /**
     * sizeof(a2a_recover_out_t) of the caller.
     */
    size_t struct_size;
    /**
     * 1 after a2a_create, one more with each recovery.
     */
    uint64_t generation;
    /**
     * Bit r % 64 of word r / 64: rank r takes part.
     */
    uint64_t members[16];
    int32_t num_members;
    /**
     * 1 if the windows are other memory, at the same addresses; 0 if they were kept.
     */
    int32_t replaced;
    /**
     * By slot: the last step, as a2a_error_info_t.sequence counts, that is whole on every member: its combine has
     * returned, or another dispatch has followed it. What ranks have of later steps is not whole. From here on steps
     * count from 1 again.
     */
    uint64_t whole_steps[64];
} a2a_recover_out_t;

/**
 * DLPack's DLDevice.
 */
typedef struct a2a_tensor_device_t {
    /**
     * DLPack device type: 1 CPU, 2 CUDA.
     */
    int32_t device_type;
    /**
     * Device ordinal; 0 for the CPU.
     */
    int32_t device_id;
} a2a_tensor_device_t;

/**
 * DLPack's DLDataType.
 */
typedef struct a2a_tensor_dtype_t {
    /**
     * 0 int, 1 uint, 2 float, 4 bfloat, 10 float8 e4m3fn; other codes travel as opaque rows.
     */
    uint8_t code;
    /**
     * Bits of one lane.
     */
    uint8_t bits;
    /**
     * Lanes; 1 for a scalar type.
     */
    uint16_t lanes;
} a2a_tensor_dtype_t;

/**
 * A strided tensor, laid out exactly as DLPack's DLTensor: a `DLTensor *` from torch, numpy, CuPy or JAX may
 * be cast and passed. The library never owns it and, unless it is an output, never writes it.
 *
 * The last dimension is contiguous. Rows of tokens are multiples of 16 bytes, 16-byte aligned, any multiple of
 * 16 bytes apart. Rows of ids, weights, scales and extras have any size, aligned to their element.
 *
 * An output whose `data` is NULL receives a view into the slot: the library reads no other field and fills them all;
 * shape and strides stay owned by the routing. An output with `data` is the caller's and is filled.
 */
typedef struct a2a_tensor_t {
    /**
     * First byte, before byte_offset.
     */
    void *data;
    /**
     * Where data lies.
     */
    struct a2a_tensor_device_t device;
    /**
     * Number of dimensions.
     */
    int32_t ndim;
    /**
     * Element type.
     */
    struct a2a_tensor_dtype_t dtype;
    /**
     * [ndim] sizes, in elements.
     */
    int64_t *shape;
    /**
     * [ndim] strides, in elements; NULL means compact row-major.
     */
    int64_t *strides;
    /**
     * Bytes from data to the first element.
     */
    uint64_t byte_offset;
} a2a_tensor_t;

/**
 * Which half of an operation a call performs.
 */
typedef int32_t a2a_phase_t;

/**
 * What a rank dispatches. T tokens, K ids each; every tensor may be absent (NULL) where it says so.
 *
 * NVLINK_TWO_SIDED moves rows in RECV: what SEND was given must stay as it is until the RECV has returned and, if
 * another slot of the comm is then between SEND and RECV, until that one's RECV has. Ranks may receive on slots in
 * different orders once all have sent on them. Everywhere else SEND is done with its tensors when it returns.
 */
typedef struct a2a_dispatch_in_t {
    /**
     * sizeof(a2a_dispatch_in_t) of the caller.
     */
    size_t struct_size;
    /**
     * [T, H], any element type (with `quant`: bf16, f16, f32, or e4m3 with scales). Needed in SEND and BOTH, also
     * when T is 0.
     */
    const struct a2a_tensor_t *tokens;
    /**
     * [T, K] int32 or int64 global expert ids; -1 = none. May be absent with GATHERED: then every token counts
     * for every rank. NULL with A2A_DISPATCH_REUSE.
     */
    const struct a2a_tensor_t *topk_ids;
    /**
     * [T, K] float32; absent = 1 each.
     */
    const struct a2a_tensor_t *topk_weights;
    /**
     * [T, S] or [T], any element type: travels row by row beside the tokens. May be absent. NULL where dispatch
     * quantises.
     */
    const struct a2a_tensor_t *scales;
    /**
     * [T, *] or [T] each, any element type. Entry i needs extra_row_bytes[i]. May be absent.
     */
    const struct a2a_tensor_t *extras[A2A_MAX_EXTRAS];
    /**
     * [num_ranks] every rank's T, host memory, read during the call; NULL = not known. Makes GATHERED outputs
     * exactly sized. A2A_TRANSPORT_NCCL needs it, or A2A_DISPATCH_UNIFORM or A2A_DISPATCH_REUSE.
     */
    const int32_t *rank_tokens;
    /**
     * M: the bound on T in this step, the same on every rank; 0 = max_tokens.
     */
    int32_t max_tokens;
    /**
     * Which half.
     */
    a2a_phase_t phase;
    /**
     * A2A_DISPATCH_* bits.
     */
    uint64_t flags;
    /**
     * SMs this call may use, where the comm's bound is no lower; 0 = the comm's. On CUDA HIGH_THROUGHPUT, LOW_LATENCY
     * and NIXL_ELASTIC (2 at least), and NVLINK_TWO_SIDED (3) keep to it, the others only take 0 yet. Means nothing on the CPU.
     */
    int32_t max_sms;
    /**
     * Must be 0.
     */
    int32_t reserved;
} a2a_dispatch_in_t;

/**
 * What a rank receives. A NULL pointer: not wanted. A tensor without data: the library makes it a view.
 * Outputs are read and written in RECV and BOTH. A caller's tensor may have more rows than the step needs; too few
 * are A2A_OVERFLOW. `rows` is
 *   GATHERED           [sum of tokens] where rank_tokens or UNIFORM make it known, else [R*M]
 *   RANK_MAJOR         [R, M] (a caller's tensor may also be [R*M])
 *   FLAT               [min(R*M, max_recv_rows)]
 *   EXPERT_PADDED      [L, min(R*M, max_recv_rows)] (a caller's tensor may also have one dimension for both)
 *   EXPERT_CONTIGUOUS  [min(R*M*min(K,L) + L*(alignment-1) rounded up to the alignment, max_recv_rows)]
 * Under HOST_COUNTS views of GATHERED, FLAT and EXPERT_CONTIGUOUS are cut to num_rows. NVLINK_TWO_SIDED keeps no
 * rows: those outputs must be the caller's.
 */
typedef struct a2a_dispatch_out_t {
    /**
     * sizeof(a2a_dispatch_out_t) of the caller.
     */
    size_t struct_size;
    /**
     * [rows, H], element type and H as dispatched; e4m3 with `quant`.
     */
    struct a2a_tensor_t *tokens;
    /**
     * [rows, S], as dispatched. With `quant`, G = ceil(H / 128) groups: float32 [rows, G], or int32 [rows, ceil(G / 4)]
     * with group 4j+b in byte b of word j. A2A_SCALES_COLUMN: strides [1, P], P the rows rounded up to 4;
     * EXPERT_PADDED and RANK_MAJOR, whose rows have two dimensions: [S*P, 1, P], P from the second. A caller's
     * tensor may have larger strides.
     */
    struct a2a_tensor_t *scales;
    /**
     * [rows, K] global ids, int32 (a caller's tensor may be int64); -1 past the counts and for bad ids.
     * EXPERT_CONTIGUOUS: [rows], the row's expert. EXPERT_PADDED has none: an expert's rows stand together.
     */
    struct a2a_tensor_t *topk_ids;
    /**
     * [rows, K] float32; 0 past the counts. EXPERT_*: [rows], the sum of the token's weights for the expert.
     */
    struct a2a_tensor_t *topk_weights;
    /**
     * [rows, *] each, as dispatched.
     */
    struct a2a_tensor_t *extras[A2A_MAX_EXTRAS];
    /**
     * [L] int32: distinct tokens that chose each local expert; rows that were dropped do not count.
     */
    struct a2a_tensor_t *expert_counts;
    /**
     * [R] int32: rows from each rank.
     */
    struct a2a_tensor_t *rank_counts;
    /**
     * [L+1] int32, EXPERT_* layouts only: where each expert's rows start, and where the last one's block ends.
     */
    struct a2a_tensor_t *expert_offsets;
    /**
     * [rows, 2] int32: source rank and its token; -1 past the counts.
     */
    struct a2a_tensor_t *row_source;
    /**
     * [L] int64, the caller's only: expert_counts is added to it.
     */
    struct a2a_tensor_t *expert_stats;
    /**
     * [4 + R] int32: A2A_STEP_* bits; bad ids of this rank; rows dropped here; rows demanded, which is the
     * max_recv_rows that this rank needed for the step; then 1 for each rank given up on.
     */
    struct a2a_tensor_t *status;
    /**
     * Under A2A_DISPATCH_HOST_COUNTS N, the rows received (EXPERT_CONTIGUOUS: expert_offsets[L]); else -1.
     */
    int64_t num_rows;
} a2a_dispatch_out_t;

/**
 * What the experts of a rank computed. NVLINK_TWO_SIDED reads it in RECV, as it does a dispatch's tensors.
 */
typedef struct a2a_combine_in_t {
    /**
     * sizeof(a2a_combine_in_t) of the caller.
     */
    size_t struct_size;
    /**
     * The rows in the layout and shape that dispatch reported, bf16, f16 or f32. Either exactly what
     * a2a_combine_buffer returned (nothing is copied) or any other tensor (staged). Needed in SEND and BOTH. Rows past
     * the counts, and gathered rows whose token has no expert here, are not read.
     */
    const struct a2a_tensor_t *tokens;
    /**
     * [T, K] float32, EXPERT_* layouts only: weights for this rank's own tokens instead of those given to dispatch.
     */
    const struct a2a_tensor_t *topk_weights;
    /**
     * [rows, K] float32 (EXPERT_*: [rows]), of every rank or none: one value for each expert of each row, on its way
     * back to the token's rank. The gradients of the weights, in training. Not with GATHERED without ids.
     */
    const struct a2a_tensor_t *row_weights;
    /**
     * A2A_COMBINE_* bits.
     */
    uint64_t flags;
    /**
     * Which half.
     */
    a2a_phase_t phase;
    /**
     * SMs this call may use, where the comm's bound is no lower; 0 = the comm's. On CUDA HIGH_THROUGHPUT, LOW_LATENCY
     * and NIXL_ELASTIC (2 at least), and NVLINK_TWO_SIDED (3) keep to it, the others only take 0 yet. Means nothing on the CPU.
     */
    int32_t max_sms;
} a2a_combine_in_t;

/**
 * What a rank gets back.
 */
typedef struct a2a_combine_out_t {
    /**
     * sizeof(a2a_combine_out_t) of the caller.
     */
    size_t struct_size;
    /**
     * [T, H] bf16, f16 or f32, the caller's: row t is the sum for token t of this rank's dispatch. Needed in
     * RECV and BOTH.
     */
    struct a2a_tensor_t *tokens;
    /**
     * [T, K] float32, the caller's, where row_weights were sent: entry (t, k) is what the rank that owns expert
     * topk_ids[t, k] sent for it; 0 for no expert, a bad id, a dropped row. May be NULL.
     */
    struct a2a_tensor_t *topk_weights;
    /**
     * [4 + R] int32, as in a2a_dispatch_out_t, with the contributions that this rank's sums lack because their rows
     * were dropped in place of dropped rows; may be NULL.
     */
    struct a2a_tensor_t *status;
} a2a_combine_out_t;

/**
 * The first failure of a comm.
 */
typedef struct a2a_error_info_t {
    /**
     * sizeof(a2a_error_info_t) of the caller.
     */
    size_t struct_size;
    /**
     * A2A_SUCCESS if nothing failed; then the other fields are 0.
     */
    a2a_status_t status;
    /**
     * 1 dispatch, 2 combine, 3 the words exchanged between two dispatches; 0 if the failure was no wait.
     */
    int32_t operation;
    int32_t slot;
    /**
     * This rank.
     */
    int32_t rank;
    /**
     * The first rank that was waited for; -1 if the failure was no wait.
     */
    int32_t peer;
    /**
     * Must be ignored.
     */
    int32_t reserved;
    /**
     * Steps opened on the slot since a2a_create or the last a2a_recover, the failed one included.
     */
    uint64_t sequence;
    /**
     * The value waited for and the value found.
     */
    uint64_t expected;
    uint64_t seen;
    /**
     * Bit r % 64 of word r / 64: rank r was given up on.
     */
    uint64_t lost_ranks[16];
    /**
     * The sentence, NUL-terminated UTF-8. As far as there is room "; last: " and the last operations follow, newest first,
     * by number as a2a_get_history has them.
     */
    char message[512];
} a2a_error_info_t;

/**
 * What a comm has done since a2a_create. Rows and bytes count payload (tokens, scales, ids, weights, sources,
 * extras), this rank's own rows included.
 */
typedef struct a2a_stats_t {
    /**
     * sizeof(a2a_stats_t) of the caller.
     */
    size_t struct_size;
    /**
     * Dispatches sent.
     */
    uint64_t dispatches;
    /**
     * Combines received.
     */
    uint64_t combines;
    /**
     * Rows this rank stored into windows in dispatch, its own included.
     */
    uint64_t rows_pushed;
    uint64_t bytes_pushed;
    /**
     * Rows this rank read from windows in combine, its own included.
     */
    uint64_t rows_pulled;
    uint64_t bytes_pulled;
    /**
     * Rows this rank read from every rank's window in a gathering dispatch, its own included.
     */
    uint64_t rows_gathered;
    uint64_t bytes_gathered;
    /**
     * Rows this rank sent through FIFOs, in dispatch and combine, to itself included.
     */
    uint64_t rows_fifo;
    uint64_t bytes_fifo;
    /**
     * Rows copied inside this rank: published, staged, moved to the caller's tensors.
     */
    uint64_t rows_copied;
    uint64_t bytes_copied;
    /**
     * Of the bytes pushed, pulled, gathered and through FIFOs, those that crossed to or from another rank.
     */
    uint64_t bytes_remote;
    /**
     * Times this rank waited for a word from every peer.
     */
    uint64_t hops;
    /**
     * Expert ids outside [-1, num_experts).
     */
    uint64_t bad_ids;
    /**
     * Steps that ended void.
     */
    uint64_t steps_lost;
} a2a_stats_t;

/**
 * Receives log lines: a level (`A2A_LOG_*`), a NUL-terminated UTF-8 line without a newline (valid during the
 * call), and the pointer given with the callback. Called on any thread that logs.
 */
typedef void (*a2a_log_fn)(int32_t level, const char *message, void *user);

/**
 * The call did what it says.
 */
#define A2A_SUCCESS 0

/**
 * Call: an argument is wrong; nothing happened.
 */
#define A2A_INVALID_ARGUMENT 1

/**
 * Call: legal, but this build or host cannot do it; nothing happened.
 */
#define A2A_UNSUPPORTED 2

/**
 * Call: another thread is inside a call on the same comm; nothing happened.
 */
#define A2A_BUSY 3

/**
 * Call: memory, file descriptors or the configured memory limit do not suffice; nothing happened.
 */
#define A2A_OUT_OF_MEMORY 4

/**
 * Call: a result does not fit into what was provided for it; nothing happened. From a dispatch whose rows exceed
 * max_recv_rows under A2A_OVERFLOW_ERROR: on every rank alike, nothing was received, the slot takes another dispatch.
 */
#define A2A_OVERFLOW 5

/**
 * Call: the operating system refused something that set-up needs; nothing was created.
 * From `a2a_get_async_error`: it refused the watch over peers' processes; steps go on, deaths are noticed late.
 */
#define A2A_SYSTEM_ERROR 6

/**
 * Step: a rank did not answer before the deadline. The step is void on every rank that has not completed it, its slot
 * closed.
 */
#define A2A_TIMEOUT 16

/**
 * Step: a rank died, left or aborted before it sent what was due. The step is void, its slot closed.
 */
#define A2A_PEER_LOST 17

/**
 * Step: ranks disagree on the operation, the bound or a row's shape. The step is void, its slot closed.
 * From `a2a_create`: the ranks' configs disagree; nothing was created.
 */
#define A2A_MISMATCH 18

/**
 * Comm: a CUDA call failed. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
 */
#define A2A_CUDA_ERROR 32

/**
 * Comm: an NCCL call failed. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
 */
#define A2A_NCCL_ERROR 33

/**
 * Comm: a NIXL call failed. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
 */
#define A2A_NIXL_ERROR 34

/**
 * Comm: a2a_abort was called on it. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
 */
#define A2A_ABORTED 35

/**
 * Comm: a defect of the library was caught. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
 */
#define A2A_INTERNAL 36

/**
 * The library chooses; a2a_explain says what and why.
 */
#define A2A_BACKEND_AUTO 0

/**
 * Every rank receives every token and computes what it owns; partial sums are added over ranks.
 */
#define A2A_BACKEND_ALLGATHER_REDUCESCATTER 1

/**
 * One copy per (token, destination rank), few SMs, rows ready for a grouped GEMM.
 */
#define A2A_BACKEND_HIGH_THROUGHPUT 2

/**
 * One row per (token, expert), fused quantisation, split phases.
 */
#define A2A_BACKEND_LOW_LATENCY 3

/**
 * Rows pushed into peers' windows, results pulled from them.
 */
#define A2A_BACKEND_NVLINK_ONE_SIDED 4

/**
 * Bounded FIFOs; memory independent of the number of tokens.
 */
#define A2A_BACKEND_NVLINK_TWO_SIDED 5

/**
 * Elastic membership over NIXL.
 */
#define A2A_BACKEND_NIXL_ELASTIC 6

/**
 * What a2a_backend_from_name returns for a name it does not know.
 */
#define A2A_BACKEND_UNKNOWN -1

/**
 * The library chooses: windows; NCCL where ranks are on several hosts, and where nccl_comm is set.
 */
#define A2A_TRANSPORT_AUTO 0

/**
 * Memory that every rank addresses directly: shared memory, or CUDA memory over NVLink.
 */
#define A2A_TRANSPORT_WINDOW 1

/**
 * NCCL collectives, for A2A_BACKEND_ALLGATHER_REDUCESCATTER on CUDA memory, one GPU a rank, on one host or several. Every dispatch
 * needs rank_tokens or A2A_DISPATCH_UNIFORM (one with A2A_DISPATCH_REUSE has what it replays had); all ranks make their calls in
 * one order, whatever the slots; a2a_recover is UNSUPPORTED, and a captured graph is not to be replayed after a loss. NCCL 2.19 or
 * later is opened at run time: by the name in the environment's A2A_NCCL_LIB, else libnccl.so.2. max_sms of the config bounds its
 * kernels too, that of a call does not.
 */
#define A2A_TRANSPORT_NCCL 2

/**
 * NIXL (UCX: shared memory, TCP, InfiniBand, RoCE).
 */
#define A2A_TRANSPORT_NIXL 3

/**
 * The backend's first layout.
 */
#define A2A_LAYOUT_AUTO 0

/**
 * [sum of tokens, H]: every token of every rank; by rank, then token.
 */
#define A2A_LAYOUT_GATHERED 1

/**
 * [R, M, H]: a token with at least one expert here, once; by source rank, packed by token.
 */
#define A2A_LAYOUT_RANK_MAJOR 2

/**
 * [N, H], capacity R*M: the same rows without gaps; by rank, then token.
 */
#define A2A_LAYOUT_FLAT 3

/**
 * [L, R*M, H]: a (token, local expert) pair, packed at the front of each expert; by rank, then token.
 */
#define A2A_LAYOUT_EXPERT_PADDED 4

/**
 * [N', H]: the same rows; expert blocks start at multiples of expert_alignment.
 */
#define A2A_LAYOUT_EXPERT_CONTIGUOUS 5

/**
 * Host memory.
 */
#define A2A_DEVICE_CPU 1

/**
 * CUDA device memory.
 */
#define A2A_DEVICE_CUDA 2

/**
 * bfloat16.
 */
#define A2A_DTYPE_DEFAULT 0

/**
 * bfloat16 (DLPack code 4, 16 bits).
 */
#define A2A_DTYPE_BF16 1

/**
 * IEEE half precision (DLPack code 2, 16 bits).
 */
#define A2A_DTYPE_F16 2

/**
 * IEEE single precision (DLPack code 2, 32 bits).
 */
#define A2A_DTYPE_F32 3

/**
 * 8-bit float e4m3fn (DLPack code 10, 8 bits). Dispatch only.
 */
#define A2A_DTYPE_F8_E4M3 4

/**
 * Opaque bytes (DLPack code 1, 8 bits), packed fp4 for instance. Dispatch only.
 */
#define A2A_DTYPE_U8 5

/**
 * None: rows travel as they are given; the caller's own scales may travel beside them.
 */
#define A2A_QUANT_NONE 0

/**
 * fp8 e4m3 per 1x128 columns, float32 scales.
 */
#define A2A_QUANT_FP8_F32_SCALES 1

/**
 * fp8 e4m3 per 1x128 columns, UE8M0 scales packed four to an int32.
 */
#define A2A_QUANT_FP8_UE8M0_SCALES 2

/**
 * [rows, S]: a row's scales are contiguous.
 */
#define A2A_SCALES_ROW 0

/**
 * The token dimension is contiguous and padded to a multiple of 4.
 */
#define A2A_SCALES_COLUMN 1

/**
 * Consecutive blocks; the first num_experts % num_ranks ranks own one expert more.
 */
#define A2A_PLACEMENT_CONTIGUOUS 0

/**
 * expert_owner says it, expert by expert. A rank's local experts are its own in ascending order.
 */
#define A2A_PLACEMENT_TABLE 1

/**
 * The step ends with a status that states the true demand.
 */
#define A2A_OVERFLOW_ERROR 0

/**
 * The last rows are dropped and counted.
 */
#define A2A_OVERFLOW_DROP 1

/**
 * By config.unique_id.
 */
#define A2A_BOOTSTRAP_UNIQUE_ID 0

/**
 * By config.allgather, which every rank of the group calls once inside a2a_create, a rank that is refused included.
 */
#define A2A_BOOTSTRAP_ALLGATHER 1

/**
 * Both halves.
 */
#define A2A_PHASE_BOTH 0

/**
 * Send only. Never waits for a peer, except that a dispatch that follows a dispatch without a combine
 * between them first waits until every rank has finished reading.
 */
#define A2A_PHASE_SEND 1

/**
 * Receive only: completes what SEND began.
 */
#define A2A_PHASE_RECV 2

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Makes the name of a new group of ranks on this host: a random address for a Unix socket (abstract, nothing
 * on disk) and a random 128-bit key. Opens nothing; rank 0 listens during a2a_create.
 *
 * id: out, not NULL. Threads: any. Errors: INVALID_ARGUMENT, SYSTEM_ERROR (no randomness).
 */
a2a_status_t a2a_get_unique_id(struct a2a_unique_id_t *id);

/**
 * Makes the name of a group from an address and a key that all ranks already know: no exchange is needed, every
 * rank makes the same id. Rank 0 listens on the address during a2a_create. Windows reach no further than one host; over NCCL
 * ranks may be on several.
 *
 * address: "host:port", NUL-terminated, at most 80 bytes; an IPv6 host stands in brackets. key: NUL-terminated,
 * not empty, at most 4096 bytes; a secret. id: out, not NULL. Threads: any. Errors: INVALID_ARGUMENT.
 */
a2a_status_t a2a_unique_id_from_address(const char *address,
                                        const char *key,
                                        struct a2a_unique_id_t *id);

/**
 * Fills a config with the defaults and this library's version of the struct: all zero but struct_size. Then set
 * at least rank, num_ranks, num_experts, max_topk, max_hidden, max_tokens and unique_id.
 *
 * config: out, not NULL, `size` bytes. size: sizeof(a2a_config_t) of the caller. Threads: any.
 * Errors: INVALID_ARGUMENT.
 */
a2a_status_t a2a_config_init(struct a2a_config_t *config,
                             size_t size);

/**
 * Explains what a2a_create would do with this config on this host: which backend and layout and why, why not the
 * others, bytes per rank, limits in effect. Depends on the config and the host alone, creates nothing.
 *
 * buf: out, may be NULL with len 0; receives NUL-terminated JSON, cut off if it does not fit. needed: out, may be
 * NULL; the bytes the whole text needs, NUL included. Threads: any. Errors: INVALID_ARGUMENT for a config that
 * makes no sense; OVERFLOW if buf is given and too small (buf then holds the beginning). A config that is refused
 * as UNSUPPORTED is explained, not an error.
 */
a2a_status_t a2a_explain(const struct a2a_config_t *config,
                         char *buf,
                         size_t len,
                         size_t *needed);

/**
 * Says how many bytes a2a_create and a2a_routing_create will take with this config. Creates nothing.
 *
 * memory: out, its struct_size set by the caller. Threads: any. Errors: INVALID_ARGUMENT, UNSUPPORTED.
 */
a2a_status_t a2a_query_memory(const struct a2a_config_t *config, struct a2a_memory_t *memory);

/**
 * Creates this rank's membership of the group: agrees with every rank on version and config, takes the memory,
 * maps the peers' windows. Collective: returns when every rank has called it, or on every rank with an error that
 * names the rank and the reason, within setup_timeout_ms of rank 0's call (a rank whose rank 0 never comes: of its
 * own). A rank whose config is refused tells the others, for which it waits up to a second.
 *
 * config: read during the call. comm: out, written on success only; free with a2a_destroy. Ranks may be threads of
 * one process, processes, or both, all on one host; over A2A_TRANSPORT_NCCL, or A2A_TRANSPORT_AUTO where a config
 * allows that one, on several, which a connection to rank 0 then holds together as long as the comm lives.
 * Threads: any; ranks of one process must call from threads of their own. Capture: refused. Errors:
 * INVALID_ARGUMENT, UNSUPPORTED, OUT_OF_MEMORY, SYSTEM_ERROR, MISMATCH (the ranks' configs differ), TIMEOUT (a rank
 * did not come), PEER_LOST (a rank left or was refused memory).
 */
a2a_status_t a2a_create(const struct a2a_config_t *config,
                        struct a2a_comm_t **comm);

/**
 * Says what the comm is: what was chosen, the experts this rank owns, capacities.
 *
 * info: out, its struct_size set by the caller. Threads: any, at any time. Errors: INVALID_ARGUMENT.
 */
a2a_status_t a2a_get_info(struct a2a_comm_t *comm, struct a2a_info_t *info);

/**
 * Changes how long calls wait for peers, for every call that begins afterwards, on this rank alone.
 *
 * first_step_timeout_ms, timeout_ms: as in a2a_config_t; 0 leaves a value as it is. Threads: any, at any time.
 * Errors: INVALID_ARGUMENT.
 */
a2a_status_t a2a_set_timeout(struct a2a_comm_t *comm,
                             int64_t first_step_timeout_ms,
                             int64_t timeout_ms);

/**
 * After a loss: the survivors agree on who they are, and go on in the same comm, at the same addresses. Collective over
 * the survivors: every rank calls it whose call ended with TIMEOUT, PEER_LOST or MISMATCH, and every other that means
 * to go on, from any state of its slots; steps in flight are void. Returns when all have done their part; then every
 * slot is open and idle, routings can be dispatched afresh (not replayed: A2A_DISPATCH_REUSE is refused until they have
 * been), a2a_get_async_error says nothing, and what stood in views is gone.
 *
 * Whoever does not come is lost: ranks whose process has ended or whose comm was destroyed or aborted at once, others
 * as a2a_recover_in_t says. Experts of lost ranks get no rows: their ids count as -1 and as bad ids
 * (A2A_STEP_BAD_ID). A lost rank that turns up later gets PEER_LOST and can only destroy its comm; whatever it was at, it
 * changes nothing of the others' results: unless it is known to have ended, the windows have become other memory.
 *
 * in: may be NULL. out: may be NULL; written on success only. With another failure than INVALID_ARGUMENT or BUSY no step
 * can run until a later a2a_recover succeeds: one may die during a recovery too. Memory: while windows are replaced, as
 * much again as window_bytes of a2a_memory_t.
 *
 * CUDA memory: waits for all work on the device's primary context that this process has launched, and ends this rank's
 * kernels that wait for peers. Graphs captured before are replayed afterwards as before, their addresses are the same; a
 * replay of a dispatch with A2A_DISPATCH_REUSE must come after one that routes afresh. Ranks that are threads of one process
 * share their mappings of the windows: such a rank that takes no part must have destroyed its comm, else UNSUPPORTED.
 *
 * Threads: one call at a time on a comm. Capture: not inside one. Errors: INVALID_ARGUMENT, BUSY, UNSUPPORTED,
 * OUT_OF_MEMORY, SYSTEM_ERROR, TIMEOUT, PEER_LOST (a survivor died meanwhile; or the others went on without this rank),
 * ABORTED.
 */
a2a_status_t a2a_recover(struct a2a_comm_t *comm,
                         const struct a2a_recover_in_t *input,
                         struct a2a_recover_out_t *output);

/**
 * Connects to ranks, each of which calls this too and names this rank; those that are connected already stay so.
 * A rank that has been replaced is disconnected first. Connected ranks take no part in steps before a2a_activate_ranks, and steps
 * of those that do go on meanwhile. NIXL_ELASTIC; windows have the ranks that they were created with.
 *
 * ranks: [count] int32, in any order, this rank among them or not; below max_ranks. timeout_ms: 0 = the config's
 * setup_timeout_ms. On failure none of those that were new is connected. Memory: of a rank whose predecessor did not say goodbye
 * (a2a_destroy), two boxes more: what it was given may still be written to.
 *
 * Threads: any, also while another thread is inside a call on the comm; one at a time of the calls that connect and activate.
 * Errors: INVALID_ARGUMENT, UNSUPPORTED (another backend), TIMEOUT, MISMATCH (another config or version),
 * OUT_OF_MEMORY, SYSTEM_ERROR, NIXL_ERROR, ABORTED; or what a rank that cannot take part says.
 */
a2a_status_t a2a_connect_ranks(struct a2a_comm_t *comm,
                               const int32_t *ranks,
                               int32_t count,
                               int64_t timeout_ms);

/**
 * Agrees with ranks, all of which call this with the same ones, that from now on they take part, and nobody else: ranks join, and
 * others leave, by it. Windows: some of those that take part, or all; it is a2a_recover without those that are not named (what
 * is said there of memory and of CUDA holds here), and who is named and does not come is left out too: PEER_LOST. Every slot is idle or closed, and is idle afterwards; steps begin anew, routings of before are not
 * replayed (A2A_DISPATCH_REUSE). Experts of ranks that take no part get no rows: their ids count as bad ids.
 *
 * ranks: [count] int32, in any order, this rank among them, the others connected. timeout_ms: 0 = the config's
 * setup_timeout_ms. generation: out, may be NULL: the same on all, and higher than any of them has had. On failure all is as
 * before, but if others have succeeded meanwhile, steps end by their deadline.
 *
 * Threads: one call at a time on a comm. Errors: INVALID_ARGUMENT, UNSUPPORTED (another backend), BUSY, TIMEOUT (who did not agree),
 * PEER_LOST (who has gone meanwhile), ABORTED.
 */
a2a_status_t a2a_activate_ranks(struct a2a_comm_t *comm,
                                const int32_t *ranks,
                                int32_t count,
                                int64_t timeout_ms,
                                uint64_t *generation);

/**
 * Forgets ranks that take no part. Nothing is sent to them or heard of them any more, and what a rank that does not
 * know it writes is looked at by nobody. Those that are not connected are passed over.
 *
 * ranks: [count] int32, in any order. Threads: one call at a time on a comm. Errors: INVALID_ARGUMENT (a rank that takes part),
 * UNSUPPORTED (another backend), BUSY, ABORTED.
 */
a2a_status_t a2a_disconnect_ranks(struct a2a_comm_t *comm,
                                  const int32_t *ranks,
                                  int32_t count);

/**
 * NIXL_ELASTIC: lets this rank take steps alone, to warm up, and then goes on as before. Nobody agrees on it: no rank that takes part
 * begins a step while another is alone. Who takes part is changed by a2a_activate_ranks alone.
 *
 * mask: [count] int32, not 0 = takes part; count is max_ranks. It names this rank alone, or all that take part. Slots are idle
 * or closed. Threads: one call at a time on a comm. Errors: INVALID_ARGUMENT, UNSUPPORTED (another backend; on A2A_DEVICE_CUDA this
 * rank alone), BUSY, ABORTED.
 */
a2a_status_t a2a_set_rank_mask(struct a2a_comm_t *comm,
                               const int32_t *mask,
                               int32_t count);

/**
 * Says who takes part and, as far as this rank knows, lives.
 *
 * mask: out, [count] int32, 1 = member and alive; count at least num_ranks (max_ranks with NIXL_ELASTIC). Threads: any, at any time. Errors:
 * INVALID_ARGUMENT.
 */
a2a_status_t a2a_get_rank_mask(struct a2a_comm_t *comm,
                               int32_t *mask,
                               int32_t count);

/**
 * Ends every call in flight on the comm with A2A_ABORTED, and every later one. Peers that wait for something this
 * rank has not sent get A2A_PEER_LOST. Returns at once.
 *
 * Threads: any, at any time, also while another thread is inside a call. Errors: INVALID_ARGUMENT.
 */
a2a_status_t a2a_abort(struct a2a_comm_t *comm);

/**
 * Ends the comm and frees what it took, views included. Never waits for peers: those that still wait for this
 * rank get A2A_PEER_LOST, those that need nothing more from it notice nothing. A call in flight on another thread
 * is aborted first, and so is work on a CUDA stream that waits for a peer: synchronise the stream before if its results
 * are wanted. CUDA memory goes when the group's last rank in this process does. Routings of the comm stay valid objects
 * and are destroyed by a2a_routing_destroy.
 *
 * comm: NULL is accepted and does nothing. Threads: any. Errors: INVALID_ARGUMENT (not a live comm).
 */
a2a_status_t a2a_destroy(struct a2a_comm_t *comm);

/**
 * Makes a routing: private memory for where the rows of one dispatch went, bound to a slot. Local, not collective.
 * Any number may be bound to one slot (one per layer); one at a time is between dispatch SEND and combine RECV.
 *
 * slot: 0 to num_slots - 1. routing: out, written on success only; free with a2a_routing_destroy. Threads: one call
 * at a time on a comm. Capture: refused. Errors: INVALID_ARGUMENT, BUSY, OUT_OF_MEMORY, or the comm's own.
 */
a2a_status_t a2a_routing_create(struct a2a_comm_t *comm,
                                int32_t slot,
                                struct a2a_routing_t **routing);

/**
 * Frees a routing and the shape arrays of its views. Before or after its comm.
 *
 * routing: NULL is accepted and does nothing. Threads: any, not while a call uses it. Errors: INVALID_ARGUMENT
 * (not a live routing).
 */
a2a_status_t a2a_routing_destroy(struct a2a_routing_t *routing);

/**
 * Sends each token to the ranks that own its experts and receives what the others sent. Every rank takes part in
 * every step, with or without tokens, with the same bound and row shapes.
 *
 * routing: of this comm; its slot must be idle, or hold a received dispatch that is thereby given up.
 * in, out: see the structs; read and written during the call; out may be NULL in SEND. Fields of `in` but phase
 * and flags are ignored in RECV. Views are valid from RECV until this rank's combine SEND, or next dispatch, on
 * the slot. stream: the CUDA stream of the work (NULL: the legacy default stream), on the comm's device; ignored on the
 * CPU, where the call returns with the work done. On CUDA it returns with the work on the stream (HOST_COUNTS waits for
 * it); what kernels find stands in out.status and in a2a_get_async_error, and later calls on the slot return it.
 * Threads: one call at a time on a comm. Capture: always allowed, but for HOST_COUNTS. Never allocates.
 * Errors: INVALID_ARGUMENT (nothing happened), UNSUPPORTED, BUSY, OVERFLOW (an output is too small; or rows exceed
 * max_recv_rows on some rank, on every rank alike, and the slot takes another dispatch: on CUDA the call says so under
 * HOST_COUNTS alone, out.status always does); TIMEOUT, PEER_LOST, MISMATCH (the step is void on every rank that has not
 * completed it, and the slot closed: later calls on it return the same); ABORTED, INTERNAL.
 */
a2a_status_t a2a_dispatch(struct a2a_comm_t *comm,
                          struct a2a_routing_t *routing,
                          const struct a2a_dispatch_in_t *in,
                          struct a2a_dispatch_out_t *out,
                          void *stream);

/**
 * Brings the experts' output back and sums it, in float32, in a fixed order, rounding once. GATHERED, RANK_MAJOR,
 * FLAT: out[t] = sum over ranks r ascending of r's row for t, over the ranks that own one of t's experts (every
 * rank when GATHERED came without ids). EXPERT_*: out[t] = sum over k ascending of weight[t,k] * row.
 *
 * routing: the one of the slot's last dispatch, received and not yet combined. in, out: see the structs; out may
 * be NULL in SEND; fields of `in` but phase and flags are ignored in RECV. stream, threads, capture, errors: as
 * for a2a_dispatch.
 */
a2a_status_t a2a_combine(struct a2a_comm_t *comm,
                         struct a2a_routing_t *routing,
                         const struct a2a_combine_in_t *in,
                         struct a2a_combine_out_t *out,
                         void *stream);

/**
 * Says where the experts may write their output so that combine copies nothing: the slot's own buffer, shaped for
 * this routing's dispatch. May be called, and the buffer written, between dispatch RECV and combine SEND.
 *
 * tensor: out, not NULL; `dtype` may be preset to bf16, f16 or f32 (bits 0 = the config's combine_dtype), everything
 * else is overwritten; shape and strides stay owned by the routing. Threads: one call at a time on a comm.
 * Errors: INVALID_ARGUMENT (no received dispatch, or the type does not fit), UNSUPPORTED (NVLINK_TWO_SIDED, which keeps
 * no rows), BUSY, or the slot's or comm's own.
 */
a2a_status_t a2a_combine_buffer(struct a2a_comm_t *comm,
                                struct a2a_routing_t *routing,
                                struct a2a_tensor_t *tensor);

/**
 * Reports the comm's first failure: a lost step, an abort, a defect. Clears nothing. If none of these, SYSTEM_ERROR if
 * peers' processes cannot be watched any more: steps go on, but a rank that dies is noticed at the deadline alone.
 *
 * info: out, its struct_size set by the caller; info.status is A2A_SUCCESS if nothing failed. Threads: any, at any
 * time. Errors: INVALID_ARGUMENT.
 */
a2a_status_t a2a_get_async_error(struct a2a_comm_t *comm,
                                 struct a2a_error_info_t *info);

/**
 * Tells the comm's last 256 operations, the one in flight among them: where a rank that hangs is, and how it came
 * there. Waits for nothing that a call in flight holds.
 *
 * buf: out, may be NULL with len 0; receives NUL-terminated JSON, cut off if it does not fit. needed: out, may be NULL;
 * the bytes the whole text needs now, NUL included: calls on other threads make it longer; 128 KiB are enough at any time.
 * {"rank", "num_ranks", "version" of the library, "age_us" since a2a_create, "gone_ranks": whose comm was destroyed or whose
 * process has ended, "dead_ranks": of these, whose process is known to have ended (never one of this process),
 * "operations": oldest first, "async_error": the first failure's sentence, as a2a_get_async_error has it, or null}. Of an
 * operation
 *   number     counts the comm's operations, from 1; one that changes while it is read is left out
 *   begun_us   microseconds from a2a_create to the call
 *   took_us    microseconds in the call, so far if it is in flight
 *   operation  "dispatch" or "combine"
 *   half       "SEND", "RECV" or "BOTH"
 *   slot, routing   the routing by a number: the comm's first is 1
 *   sequence   steps opened on the slot, this one included once it has begun; null if the host cannot know
 *   tokens     T of the dispatch
 *   outcome    "in flight", "enqueued", or the name of the status that the call returned
 * On CUDA a call enqueues, unless it waits for HOST_COUNTS: "enqueued" says that the work is on the stream or in a graph,
 * and what becomes of it stands in out.status and in async_error. Replays of a captured graph are no calls and are not
 * told; once work on a slot was captured its sequence is null. Calls that were refused before they began (BUSY, a comm
 * that has failed, a struct that makes no sense) are not told either.
 *
 * Threads: any, at any time, also while another thread is inside a call, and after a failure or an abort. Errors:
 * INVALID_ARGUMENT; OVERFLOW if buf is given and too small (buf then holds the beginning).
 */
a2a_status_t a2a_get_history(struct a2a_comm_t *comm,
                             char *buf,
                             size_t len,
                             size_t *needed);

/**
 * Reports what the comm has moved since a2a_create.
 *
 * stats: out, its struct_size set by the caller. Threads: any, at any time. Errors: INVALID_ARGUMENT.
 */
a2a_status_t a2a_get_stats(struct a2a_comm_t *comm, struct a2a_stats_t *stats);

/**
 * Sends the library's log lines to a callback, for the whole process, which calls nothing of the library. Without one, the environment variable A2A_LOG
 * (error, warn, info, debug) sends them to standard error.
 *
 * callback: NULL restores the default. user: passed to it. Both must stay valid until replaced and until calls in
 * flight have returned. Threads: any. Errors: none.
 */
a2a_status_t a2a_set_log_callback(a2a_log_fn callback,
                                  void *user);

/**
 * The sentence that explains the last failure on this thread: function, rank, argument, value, limit. Empty if
 * nothing has failed. Owned by the library, valid until this thread's next call.
 */
const char *a2a_last_error(void);

/**
 * The name of a status, "A2A_TIMEOUT" for instance; "unknown status" for any other number. Static.
 */
const char *a2a_status_name(a2a_status_t status);

/**
 * The library's version, "0.1.0" for instance. Static. The header's is A2A_VERSION.
 */
const char *a2a_version(void);

/**
 * The backend of a name: "auto", the constants' own names in lower case ("nvlink_one_sided"), or vLLM's names
 * ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", "flashinfer_nvlink_one_sided",
 * "flashinfer_nvlink_two_sided", "flashinfer_all2allv", "nixl_ep"). A2A_BACKEND_UNKNOWN for any other, or NULL.
 */
a2a_backend_t a2a_backend_from_name(const char *name);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* A2A_H */
