//! The structs and constants that C sees, field by field.
//!
//! cbindgen turns this file into `include/a2a.h`: every comment here is read by users. Fields are
//! only ever appended; the asserts at the end freeze what has been published.

use std::ffi::{c_char, c_void};

/// A call's outcome: one of the `A2A_*` status constants.
pub type a2a_status_t = i32;

/// The call did what it says.
pub const A2A_SUCCESS: a2a_status_t = 0;
/// Call: an argument is wrong; nothing happened.
pub const A2A_INVALID_ARGUMENT: a2a_status_t = 1;
/// Call: legal, but this build or host cannot do it; nothing happened.
pub const A2A_UNSUPPORTED: a2a_status_t = 2;
/// Call: another thread is inside a call on the same comm; nothing happened.
pub const A2A_BUSY: a2a_status_t = 3;
/// Call: memory, file descriptors or the configured memory limit do not suffice; nothing happened.
pub const A2A_OUT_OF_MEMORY: a2a_status_t = 4;
/// Call: a result does not fit into what was provided for it; nothing happened. From a dispatch whose rows exceed
/// max_recv_rows under A2A_OVERFLOW_ERROR: on every rank alike, nothing was received, the slot takes another dispatch.
pub const A2A_OVERFLOW: a2a_status_t = 5;
/// Call: the operating system refused something that set-up needs; nothing was created.
/// From `a2a_get_async_error`: it refused the watch over peers' processes; steps go on, deaths are noticed late.
pub const A2A_SYSTEM_ERROR: a2a_status_t = 6;
/// Step: a rank did not answer before the deadline. The step is void on every rank that has not completed it, its slot
/// closed.
pub const A2A_TIMEOUT: a2a_status_t = 16;
/// Step: a rank died, left or aborted before it sent what was due. The step is void, its slot closed.
pub const A2A_PEER_LOST: a2a_status_t = 17;
/// Step: ranks disagree on the operation, the bound or a row's shape. The step is void, its slot closed.
/// From `a2a_create`: the ranks' configs disagree; nothing was created.
pub const A2A_MISMATCH: a2a_status_t = 18;
/// Comm: a CUDA call failed. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
pub const A2A_CUDA_ERROR: a2a_status_t = 32;
/// Comm: an NCCL call failed. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
pub const A2A_NCCL_ERROR: a2a_status_t = 33;
/// Comm: a NIXL call failed. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
pub const A2A_NIXL_ERROR: a2a_status_t = 34;
/// Comm: a2a_abort was called on it. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
pub const A2A_ABORTED: a2a_status_t = 35;
/// Comm: a defect of the library was caught. Only a2a_get_async_error, a2a_get_history, a2a_abort and a2a_destroy remain.
pub const A2A_INTERNAL: a2a_status_t = 36;

/// The strategy that moves the rows. 0 lets the library choose.
pub type a2a_backend_t = i32;
/// The library chooses; a2a_explain says what and why.
pub const A2A_BACKEND_AUTO: a2a_backend_t = 0;
/// Every rank receives every token and computes what it owns; partial sums are added over ranks.
pub const A2A_BACKEND_ALLGATHER_REDUCESCATTER: a2a_backend_t = 1;
/// One copy per (token, destination rank), few SMs, rows ready for a grouped GEMM.
pub const A2A_BACKEND_HIGH_THROUGHPUT: a2a_backend_t = 2;
/// One row per (token, expert), fused quantisation, split phases.
pub const A2A_BACKEND_LOW_LATENCY: a2a_backend_t = 3;
/// Rows pushed into peers' windows, results pulled from them.
pub const A2A_BACKEND_NVLINK_ONE_SIDED: a2a_backend_t = 4;
/// Bounded FIFOs; memory independent of the number of tokens.
pub const A2A_BACKEND_NVLINK_TWO_SIDED: a2a_backend_t = 5;
/// Elastic membership over NIXL.
pub const A2A_BACKEND_NIXL_ELASTIC: a2a_backend_t = 6;
/// What a2a_backend_from_name returns for a name it does not know.
pub const A2A_BACKEND_UNKNOWN: a2a_backend_t = -1;

/// What carries the bytes. 0 lets the library choose.
pub type a2a_transport_t = i32;
/// The library chooses: windows; NCCL where ranks are on several hosts, and where nccl_comm is set.
pub const A2A_TRANSPORT_AUTO: a2a_transport_t = 0;
/// Memory that every rank addresses directly: shared memory, or CUDA memory over NVLink.
pub const A2A_TRANSPORT_WINDOW: a2a_transport_t = 1;
/// NCCL collectives, for A2A_BACKEND_ALLGATHER_REDUCESCATTER on CUDA memory, one GPU a rank, on one host or several. Every dispatch
/// needs rank_tokens or A2A_DISPATCH_UNIFORM (one with A2A_DISPATCH_REUSE has what it replays had); all ranks make their calls in
/// one order, whatever the slots; a2a_recover is UNSUPPORTED, and a captured graph is not to be replayed after a loss. NCCL 2.19 or
/// later is opened at run time: by the name in the environment's A2A_NCCL_LIB, else libnccl.so.2. max_sms of the config bounds its
/// kernels too, that of a call does not.
pub const A2A_TRANSPORT_NCCL: a2a_transport_t = 2;
/// NIXL (UCX: shared memory, TCP, InfiniBand, RoCE).
pub const A2A_TRANSPORT_NIXL: a2a_transport_t = 3;

/// How dispatched rows lie. R ranks, M the step's bound, K the top-k, H the hidden size, L the local experts.
pub type a2a_layout_t = i32;
/// The backend's first layout.
pub const A2A_LAYOUT_AUTO: a2a_layout_t = 0;
/// [sum of tokens, H]: every token of every rank; by rank, then token.
pub const A2A_LAYOUT_GATHERED: a2a_layout_t = 1;
/// [R, M, H]: a token with at least one expert here, once; by source rank, packed by token.
pub const A2A_LAYOUT_RANK_MAJOR: a2a_layout_t = 2;
/// [N, H], capacity R*M: the same rows without gaps; by rank, then token.
pub const A2A_LAYOUT_FLAT: a2a_layout_t = 3;
/// [L, R*M, H]: a (token, local expert) pair, packed at the front of each expert; by rank, then token.
pub const A2A_LAYOUT_EXPERT_PADDED: a2a_layout_t = 4;
/// [N', H]: the same rows; expert blocks start at multiples of expert_alignment.
pub const A2A_LAYOUT_EXPERT_CONTIGUOUS: a2a_layout_t = 5;

/// Where the windows and the caller's tensors lie; the values are DLPack's. 0 means CPU.
pub type a2a_device_t = i32;
/// Host memory.
pub const A2A_DEVICE_CPU: a2a_device_t = 1;
/// CUDA device memory.
pub const A2A_DEVICE_CUDA: a2a_device_t = 2;

/// An element type in the config; tensors carry DLPack's own codes.
pub type a2a_dtype_t = i32;
/// bfloat16.
pub const A2A_DTYPE_DEFAULT: a2a_dtype_t = 0;
/// bfloat16 (DLPack code 4, 16 bits).
pub const A2A_DTYPE_BF16: a2a_dtype_t = 1;
/// IEEE half precision (DLPack code 2, 16 bits).
pub const A2A_DTYPE_F16: a2a_dtype_t = 2;
/// IEEE single precision (DLPack code 2, 32 bits).
pub const A2A_DTYPE_F32: a2a_dtype_t = 3;
/// 8-bit float e4m3fn (DLPack code 10, 8 bits). Dispatch only.
pub const A2A_DTYPE_F8_E4M3: a2a_dtype_t = 4;
/// Opaque bytes (DLPack code 1, 8 bits), packed fp4 for instance. Dispatch only.
pub const A2A_DTYPE_U8: a2a_dtype_t = 5;

/// Quantisation inside dispatch.
pub type a2a_quant_t = i32;
/// None: rows travel as they are given; the caller's own scales may travel beside them.
pub const A2A_QUANT_NONE: a2a_quant_t = 0;
/// fp8 e4m3 per 1x128 columns, float32 scales.
pub const A2A_QUANT_FP8_F32_SCALES: a2a_quant_t = 1;
/// fp8 e4m3 per 1x128 columns, UE8M0 scales packed four to an int32.
pub const A2A_QUANT_FP8_UE8M0_SCALES: a2a_quant_t = 2;

/// How the scales that dispatch computes lie.
pub type a2a_scale_layout_t = i32;
/// [rows, S]: a row's scales are contiguous.
pub const A2A_SCALES_ROW: a2a_scale_layout_t = 0;
/// The token dimension is contiguous and padded to a multiple of 4.
pub const A2A_SCALES_COLUMN: a2a_scale_layout_t = 1;

/// Which rank owns which expert.
pub type a2a_placement_t = i32;
/// Consecutive blocks; the first num_experts % num_ranks ranks own one expert more.
pub const A2A_PLACEMENT_CONTIGUOUS: a2a_placement_t = 0;
/// expert_owner says it, expert by expert. A rank's local experts are its own in ascending order.
pub const A2A_PLACEMENT_TABLE: a2a_placement_t = 1;

/// What happens when more rows arrive than max_recv_rows.
pub type a2a_overflow_t = i32;
/// The step ends with a status that states the true demand.
pub const A2A_OVERFLOW_ERROR: a2a_overflow_t = 0;
/// The last rows are dropped and counted.
pub const A2A_OVERFLOW_DROP: a2a_overflow_t = 1;

/// How the ranks of a comm find each other.
pub type a2a_bootstrap_t = i32;
/// By config.unique_id.
pub const A2A_BOOTSTRAP_UNIQUE_ID: a2a_bootstrap_t = 0;
/// By config.allgather, which every rank of the group calls once inside a2a_create, a rank that is refused included.
pub const A2A_BOOTSTRAP_ALLGATHER: a2a_bootstrap_t = 1;

/// Config flag: the host of a2a_unique_id_from_address may be more than a loopback address. Without it a2a_create refuses
/// such an address, since whoever can reach it may knock, if not enter.
pub const A2A_CONFIG_REMOTE: u64 = 1;
/// Config flag, the same on all ranks, NIXL_ELASTIC on A2A_DEVICE_CPU: a step goes on without ranks that die, leave or do not come by its deadline,
/// and so do later ones, each rank for itself, until a2a_activate_ranks. Every status has A2A_STEP_DEGRADED and marks them, and
/// a2a_get_async_error has the first such loss. Their tokens are missing, and their experts' results in the sums, whose weights
/// stay as they are. max_recv_rows is 0. Without it such a step is void.
pub const A2A_CONFIG_DEGRADE: u64 = 2;

/// Which half of an operation a call performs.
pub type a2a_phase_t = i32;
/// Both halves.
pub const A2A_PHASE_BOTH: a2a_phase_t = 0;
/// Send only. Never waits for a peer, except that a dispatch that follows a dispatch without a combine
/// between them first waits until every rank has finished reading.
pub const A2A_PHASE_SEND: a2a_phase_t = 1;
/// Receive only: completes what SEND began.
pub const A2A_PHASE_RECV: a2a_phase_t = 2;

/// Dispatch flag: wait for the counts on the host and report num_rows.
pub const A2A_DISPATCH_HOST_COUNTS: u64 = 1;
/// Dispatch flag: rows past the counts hold zeros in every output instead of stale data.
pub const A2A_DISPATCH_ZERO_PADDING: u64 = 2;
/// Dispatch flag: every rank dispatches the same number of tokens in this step.
pub const A2A_DISPATCH_UNIFORM: u64 = 4;
/// Dispatch flag, of every rank or none: replay the routing's last received dispatch. No routing and no exchange of
/// counts: rows go where they went then. T and the bound are the same; topk_ids is NULL; absent topk_weights are
/// those the routing has, given ones replace them. Hidden size, type, scales and extras may differ.
pub const A2A_DISPATCH_REUSE: u64 = 8;

/// Combine flag: add to what `out.tokens` holds (added last, in float32, before the one rounding).
pub const A2A_COMBINE_ACCUMULATE: u64 = 1;
/// Combine flag, EXPERT_* layouts: sum without weights.
pub const A2A_COMBINE_NO_WEIGHTS: u64 = 2;
/// Combine flag, the same on all ranks: with A2A_TRANSPORT_NCCL the sum may be NCCL's (ncclReduceScatter where all ranks have as
/// many tokens, else ncclReduce), in the element type of the rows and in an order that is NCCL's to choose: bits then differ from
/// those of other transports. Rows of every rank are summed, so experts write zeroes for tokens that are none of theirs. With
/// row_weights, and in windows, it changes nothing.
pub const A2A_COMBINE_NCCL_SUM: u64 = 4;

/// Bit of `status[0]`: an expert id was outside [-1, num_experts); it counted as -1.
pub const A2A_STEP_BAD_ID: i32 = 1;
/// Bit of `status[0]`: rows were dropped because max_recv_rows was exceeded.
pub const A2A_STEP_DROPPED: i32 = 2;
/// Bit of `status[0]`: the step is void; ranks given up on are marked from `status[4]` on.
pub const A2A_STEP_VOID: i32 = 4;
/// Bit of `status[0]`: the step is void because max_recv_rows was exceeded under A2A_OVERFLOW_ERROR; the ranks that
/// would have received too many rows are marked from `status[4]` on.
pub const A2A_STEP_OVERFLOW: i32 = 8;
/// Bit of `status[0]`: the step went on without ranks, which are marked from `status[4]` on (A2A_CONFIG_DEGRADE). Of a combine
/// `status[2]` counts results that are missing for it beside those that were dropped.
pub const A2A_STEP_DEGRADED: i32 = 16;

/// Log level: something failed.
pub const A2A_LOG_ERROR: i32 = 1;
/// Log level: something is odd.
pub const A2A_LOG_WARN: i32 = 2;
/// Log level: set-up and tear-down.
pub const A2A_LOG_INFO: i32 = 3;
/// Log level: details of set-up.
pub const A2A_LOG_DEBUG: i32 = 4;

/// The number of extra row tensors that can travel beside the tokens.
pub const A2A_MAX_EXTRAS: usize = 8;
/// The largest top-k.
pub const A2A_MAX_TOPK: i32 = 32;
/// The largest number of ranks in a comm.
pub const A2A_MAX_RANKS: i32 = 1024;

/// One rank's membership of one expert-parallel group. Opaque.
pub struct a2a_comm_t {
    _private: [u8; 0],
}

/// Where the rows of one dispatch went. Opaque.
pub struct a2a_routing_t {
    _private: [u8; 0],
}

/// DLPack's DLDevice.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_tensor_device_t {
    /// DLPack device type: 1 CPU, 2 CUDA.
    pub device_type: i32,
    /// Device ordinal; 0 for the CPU.
    pub device_id: i32,
}

/// DLPack's DLDataType.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_tensor_dtype_t {
    /// 0 int, 1 uint, 2 float, 4 bfloat, 10 float8 e4m3fn; other codes travel as opaque rows.
    pub code: u8,
    /// Bits of one lane.
    pub bits: u8,
    /// Lanes; 1 for a scalar type.
    pub lanes: u16,
}

/// A strided tensor, laid out exactly as DLPack's DLTensor: a `DLTensor *` from torch, numpy, CuPy or JAX may
/// be cast and passed. The library never owns it and, unless it is an output, never writes it.
///
/// The last dimension is contiguous. Rows of tokens are multiples of 16 bytes, 16-byte aligned, any multiple of
/// 16 bytes apart. Rows of ids, weights, scales and extras have any size, aligned to their element.
///
/// An output whose `data` is NULL receives a view into the slot: the library reads no other field and fills them all;
/// shape and strides stay owned by the routing. An output with `data` is the caller's and is filled.
#[repr(C)]
pub struct a2a_tensor_t {
    /// First byte, before byte_offset.
    pub data: *mut c_void,
    /// Where data lies.
    pub device: a2a_tensor_device_t,
    /// Number of dimensions.
    pub ndim: i32,
    /// Element type.
    pub dtype: a2a_tensor_dtype_t,
    /// [ndim] sizes, in elements.
    pub shape: *mut i64,
    /// [ndim] strides, in elements; NULL means compact row-major.
    pub strides: *mut i64,
    /// Bytes from data to the first element.
    pub byte_offset: u64,
}

/// Names one group of ranks: an address and a 128-bit key. Made once by a2a_get_unique_id or
/// a2a_unique_id_from_address, copied to every rank by any means, used for one a2a_create on each. Plain bytes;
/// whoever has them can join, so treat them as a secret.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_unique_id_t {
    /// Opaque.
    pub bytes: [u8; 128],
}

/// The caller's all-gather for bootstrap, a collective over exactly the ranks of the group: concatenates `bytes` bytes
/// from `send` of every rank, rank ascending, into `recv` (num_ranks * bytes, host memory). `bytes` is the same on all
/// ranks. Returns 0 on success. Called once by a2a_create with num_ranks > 1 (three times if ranks are on several hosts), on its
/// thread; how long it waits is its own affair. What it carries holds the key of the group: whoever can read it can join.
pub type a2a_allgather_fn = Option<
    unsafe extern "C" fn(send: *const c_void, recv: *mut c_void, bytes: usize, user: *mut c_void) -> i32,
>;

/// Receives log lines: a level (`A2A_LOG_*`), a NUL-terminated UTF-8 line without a newline (valid during the
/// call), and the pointer given with the callback. Called on any thread that logs.
pub type a2a_log_fn = Option<unsafe extern "C" fn(level: i32, message: *const c_char, user: *mut c_void)>;

/// What a comm is made of. Fill it with a2a_config_init, then set fields; 0 means the default everywhere.
/// Fields marked (same) must be equal on every rank; a2a_create names the first that is not.
#[repr(C)]
pub struct a2a_config_t {
    /// sizeof(a2a_config_t) of the caller; set by a2a_config_init.
    pub struct_size: usize,
    /// This rank, 0 <= rank < num_ranks. With NIXL_ELASTIC below max_ranks: one from num_ranks on creates its comm alone, and
    /// takes part once others have taken it in (a2a_connect_ranks, a2a_activate_ranks).
    pub rank: i32,
    /// (same) Ranks in the group, 1 to A2A_MAX_RANKS. With NIXL_ELASTIC those that take part from the start, and 1 for a rank
    /// that comes later or in the place of another.
    pub num_ranks: i32,
    /// (same) Ranks the group may grow to; 0 = num_ranks. Larger values need NIXL_ELASTIC, whose experts, outputs and memory are
    /// those of max_ranks whoever takes part: R is max_ranks there.
    pub max_ranks: i32,
    /// (same) Ranks that share one GPU; 0 = 1. Means nothing on the CPU.
    pub ranks_per_device: i32,
    /// (same) Where tensors and windows lie; 0 = CPU.
    pub device: a2a_device_t,
    /// The CUDA device of this rank; 0 on the CPU.
    pub device_ordinal: i32,
    /// (same) Strategy; 0 = AUTO.
    pub backend: a2a_backend_t,
    /// (same) Transport; 0 = AUTO.
    pub transport: a2a_transport_t,
    /// (same) Row layout; 0 = the backend's first.
    pub layout: a2a_layout_t,
    /// (same) Physical experts in the group, at least 1. Need not be a multiple of num_ranks.
    pub num_experts: i32,
    /// (same) Which rank owns which expert.
    pub placement: a2a_placement_t,
    /// (same) Largest top-k of a step, 1 to A2A_MAX_TOPK.
    pub max_topk: i32,
    /// (same) Largest hidden size of a step, in elements of token_dtype.
    pub max_hidden: i32,
    /// (same) Largest number of tokens a rank dispatches in a step.
    pub max_tokens: i32,
    /// (same) Element type of dispatched tokens: sizes the windows. A step may dispatch any type whose rows are
    /// not larger. 0 = bf16.
    pub token_dtype: a2a_dtype_t,
    /// (same) Largest element type of the experts' output: BF16, F16 or F32. 0 = token_dtype if it is one of
    /// these, else BF16.
    pub combine_dtype: a2a_dtype_t,
    /// (same) Hidden size of the experts' output where it differs from the tokens' (packed fp4); 0 = the same.
    pub combine_hidden: i32,
    /// (same) Quantisation inside dispatch; tokens are then bf16, f16 or f32, or e4m3 with their scales.
    pub quant: a2a_quant_t,
    /// (same) Layout of the scales that quantisation makes; A2A_SCALES_COLUMN needs `quant`.
    pub scale_layout: a2a_scale_layout_t,
    /// (same) Largest row of the caller's `scales`, in bytes; 0 = no scales. Must be 0 with `quant`.
    pub max_scale_bytes: i32,
    /// (same) Largest row of each extra, in bytes; 0 = that extra is not used. NVLINK_TWO_SIDED on CUDA takes at most 12 KiB of
    /// ids, weights, scales and extras together, each rounded up to 16 bytes.
    pub extra_row_bytes: [i32; A2A_MAX_EXTRAS],
    /// (same) Dispatch/combine pairs that may be in flight at once; 0 = 1, at most 64.
    pub num_slots: i32,
    /// (same) Alignment of expert blocks, EXPERT_CONTIGUOUS only; 0 = 1.
    pub expert_alignment: i32,
    /// (same) What to do past max_recv_rows.
    pub overflow: a2a_overflow_t,
    /// SMs that kernels may use; 0 = the library's choice. On CUDA HIGH_THROUGHPUT, LOW_LATENCY
    /// and NIXL_ELASTIC (2 at least), and NVLINK_TWO_SIDED (3) keep to it, the others only take 0 yet. Means nothing on the CPU.
    pub max_sms: i32,
    /// (same) Rows a rank receives at most, which sizes its window; 0 = the layout's capacity. FLAT and
    /// EXPERT_CONTIGUOUS: rows of the outputs, alignment included; EXPERT_PADDED: rows of each expert. GATHERED and
    /// RANK_MAJOR, whose rows have fixed places, refuse it.
    pub max_recv_rows: i64,
    /// Milliseconds until a2a_create gives up on a rank; 0 = 300 000. Does not cover config.allgather.
    pub setup_timeout_ms: i64,
    /// Milliseconds that all waits of one call may take until the comm's first step has completed; 0 = 600 000
    /// (peers may be compiling).
    pub first_step_timeout_ms: i64,
    /// The same for every later call; 0 = 30 000.
    pub timeout_ms: i64,
    /// Bytes this rank may take, windows, private memory and num_slots routings together; 0 = no limit.
    pub memory_limit: u64,
    /// (same) A2A_CONFIG_*, or 0.
    pub flags: u64,
    /// (same) [num_experts] owner rank of each expert, host memory, read during the call. Only with
    /// A2A_PLACEMENT_TABLE.
    pub expert_owner: *const i32,
    /// How the ranks find each other.
    pub bootstrap: a2a_bootstrap_t,
    /// (same) Rows that each FIFO of NVLINK_TWO_SIDED holds, 2 to 65536; 0 = the library's choice. Other backends have
    /// none.
    pub fifo_rows: i32,
    /// The group's name; unused (all zero) when num_ranks is 1, all zero with A2A_BOOTSTRAP_ALLGATHER, and may be with nccl_comm.
    pub unique_id: a2a_unique_id_t,
    /// The all-gather of A2A_BOOTSTRAP_ALLGATHER; NULL otherwise.
    pub allgather: a2a_allgather_fn,
    /// Passed to allgather; must be NULL without it.
    pub allgather_user: *mut c_void,
    /// The caller's ncclComm_t of exactly these ranks and this device, or NULL. With it A2A_TRANSPORT_AUTO is NCCL. Communicators
    /// are split off it, a collective on it: nobody else uses it during a2a_create. It stays the caller's, and is never ended here;
    /// after a create that failed with TIMEOUT a call on it may still wait. unique_id may then be all zero: ranks meet over it.
    pub nccl_comm: *mut c_void,
}

/// What a2a_create and a2a_routing_create will allocate on this rank, in bytes. Small host objects (handles,
/// error texts, a few KiB) are not counted.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_memory_t {
    /// sizeof(a2a_memory_t) of the caller.
    pub struct_size: usize,
    /// The window that peers address, all slots together; taken by a2a_create.
    pub window_bytes: u64,
    /// Of it, flags and words.
    pub control_bytes: u64,
    /// Of it, one slot's rows.
    pub slot_bytes: u64,
    /// Private device memory taken by a2a_create.
    pub private_bytes: u64,
    /// Private device memory taken by each a2a_routing_create.
    pub routing_bytes: u64,
    /// window_bytes + private_bytes + num_slots * routing_bytes: what memory_limit is compared with.
    pub total_bytes: u64,
    /// Beside those, pinned host memory taken by a2a_create, which couriers carry from and to: NIXL_ELASTIC on A2A_DEVICE_CUDA; else 0.
    pub pinned_bytes: u64,
}

/// What a comm is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_info_t {
    /// sizeof(a2a_info_t) of the caller.
    pub struct_size: usize,
    pub rank: i32,
    /// With NIXL_ELASTIC max_ranks, whoever takes part.
    pub num_ranks: i32,
    pub max_ranks: i32,
    pub device: a2a_device_t,
    pub device_ordinal: i32,
    /// The strategy chosen, never AUTO.
    pub backend: a2a_backend_t,
    /// The transport chosen, never AUTO.
    pub transport: a2a_transport_t,
    /// The layout chosen, never AUTO.
    pub layout: a2a_layout_t,
    pub num_experts: i32,
    /// The lowest expert this rank owns; -1 if it owns none.
    pub first_expert: i32,
    /// L: the experts this rank owns.
    pub num_local_experts: i32,
    pub max_topk: i32,
    pub max_hidden: i32,
    pub max_tokens: i32,
    pub num_slots: i32,
    /// SMs in effect; 0 where there is no bound, and on the CPU.
    pub max_sms: i32,
    /// Rows of this rank's outputs in a full step: R*M for GATHERED, RANK_MAJOR and FLAT, L*R*M for EXPERT_PADDED,
    /// R*M*min(K,L) + L*(alignment-1) rounded up to the alignment for EXPERT_CONTIGUOUS; less under max_recv_rows.
    pub row_capacity: i64,
    /// Bytes of this rank's window.
    pub window_bytes: u64,
}

/// What a comm has done since a2a_create. Rows and bytes count payload (tokens, scales, ids, weights, sources,
/// extras), this rank's own rows included.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct a2a_stats_t {
    /// sizeof(a2a_stats_t) of the caller.
    pub struct_size: usize,
    /// Dispatches sent.
    pub dispatches: u64,
    /// Combines received.
    pub combines: u64,
    /// Rows this rank stored into windows in dispatch, its own included.
    pub rows_pushed: u64,
    pub bytes_pushed: u64,
    /// Rows this rank read from windows in combine, its own included.
    pub rows_pulled: u64,
    pub bytes_pulled: u64,
    /// Rows this rank read from every rank's window in a gathering dispatch, its own included.
    pub rows_gathered: u64,
    pub bytes_gathered: u64,
    /// Rows this rank sent through FIFOs, in dispatch and combine, to itself included.
    pub rows_fifo: u64,
    pub bytes_fifo: u64,
    /// Rows copied inside this rank: published, staged, moved to the caller's tensors.
    pub rows_copied: u64,
    pub bytes_copied: u64,
    /// Of the bytes pushed, pulled, gathered and through FIFOs, those that crossed to or from another rank.
    pub bytes_remote: u64,
    /// Times this rank waited for a word from every peer.
    pub hops: u64,
    /// Expert ids outside [-1, num_experts).
    pub bad_ids: u64,
    /// Steps that ended void.
    pub steps_lost: u64,
}

/// The first failure of a comm.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_error_info_t {
    /// sizeof(a2a_error_info_t) of the caller.
    pub struct_size: usize,
    /// A2A_SUCCESS if nothing failed; then the other fields are 0.
    pub status: a2a_status_t,
    /// 1 dispatch, 2 combine, 3 the words exchanged between two dispatches; 0 if the failure was no wait.
    pub operation: i32,
    pub slot: i32,
    /// This rank.
    pub rank: i32,
    /// The first rank that was waited for; -1 if the failure was no wait.
    pub peer: i32,
    /// Must be ignored.
    pub reserved: i32,
    /// Steps opened on the slot since a2a_create or the last a2a_recover, the failed one included.
    pub sequence: u64,
    /// The value waited for and the value found.
    pub expected: u64,
    pub seen: u64,
    /// Bit r % 64 of word r / 64: rank r was given up on.
    pub lost_ranks: [u64; 16],
    /// The sentence, NUL-terminated UTF-8. As far as there is room "; last: " and the last operations follow, newest first,
    /// by number as a2a_get_history has them.
    pub message: [c_char; 512],
}

/// How long a2a_recover waits. All zero, or NULL: the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_recover_in_t {
    /// sizeof(a2a_recover_in_t) of the caller.
    pub struct_size: usize,
    /// Milliseconds that ranks which nobody gave up on are waited for; 0 = the config's setup_timeout_ms. What the survivors
    /// then do has as much again; if one dies meanwhile they meet anew, unless this has passed: three times it ends a call.
    pub timeout_ms: i64,
    /// Milliseconds that ranks which were given up on, but whose process lives, are waited for once all others have come;
    /// 0 = 1000.
    pub patience_ms: i64,
}

/// What the survivors agreed on: the same on every one of them, but for whole_steps after a recovery that failed.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct a2a_recover_out_t {
    /// sizeof(a2a_recover_out_t) of the caller.
    pub struct_size: usize,
    /// 1 after a2a_create, one more with each recovery.
    pub generation: u64,
    /// Bit r % 64 of word r / 64: rank r takes part.
    pub members: [u64; 16],
    pub num_members: i32,
    /// 1 if the windows are other memory, at the same addresses; 0 if they were kept.
    pub replaced: i32,
    /// By slot: the last step, as a2a_error_info_t.sequence counts, that is whole on every member: its combine has
    /// returned, or another dispatch has followed it. What ranks have of later steps is not whole. From here on steps
    /// count from 1 again.
    pub whole_steps: [u64; 64],
}

/// What a rank dispatches. T tokens, K ids each; every tensor may be absent (NULL) where it says so.
///
/// NVLINK_TWO_SIDED moves rows in RECV: what SEND was given must stay as it is until the RECV has returned and, if
/// another slot of the comm is then between SEND and RECV, until that one's RECV has. Ranks may receive on slots in
/// different orders once all have sent on them. Everywhere else SEND is done with its tensors when it returns.
#[repr(C)]
pub struct a2a_dispatch_in_t {
    /// sizeof(a2a_dispatch_in_t) of the caller.
    pub struct_size: usize,
    /// [T, H], any element type (with `quant`: bf16, f16, f32, or e4m3 with scales). Needed in SEND and BOTH, also
    /// when T is 0.
    pub tokens: *const a2a_tensor_t,
    /// [T, K] int32 or int64 global expert ids; -1 = none. May be absent with GATHERED: then every token counts
    /// for every rank. NULL with A2A_DISPATCH_REUSE.
    pub topk_ids: *const a2a_tensor_t,
    /// [T, K] float32; absent = 1 each.
    pub topk_weights: *const a2a_tensor_t,
    /// [T, S] or [T], any element type: travels row by row beside the tokens. May be absent. NULL where dispatch
    /// quantises.
    pub scales: *const a2a_tensor_t,
    /// [T, *] or [T] each, any element type. Entry i needs extra_row_bytes[i]. May be absent.
    pub extras: [*const a2a_tensor_t; A2A_MAX_EXTRAS],
    /// [num_ranks] every rank's T, host memory, read during the call; NULL = not known. Makes GATHERED outputs
    /// exactly sized. A2A_TRANSPORT_NCCL needs it, or A2A_DISPATCH_UNIFORM or A2A_DISPATCH_REUSE.
    pub rank_tokens: *const i32,
    /// M: the bound on T in this step, the same on every rank; 0 = max_tokens.
    pub max_tokens: i32,
    /// Which half.
    pub phase: a2a_phase_t,
    /// A2A_DISPATCH_* bits.
    pub flags: u64,
    /// SMs this call may use, where the comm's bound is no lower; 0 = the comm's. On CUDA HIGH_THROUGHPUT, LOW_LATENCY
    /// and NIXL_ELASTIC (2 at least), and NVLINK_TWO_SIDED (3) keep to it, the others only take 0 yet. Means nothing on the CPU.
    pub max_sms: i32,
    /// Must be 0.
    pub reserved: i32,
}

/// What a rank receives. A NULL pointer: not wanted. A tensor without data: the library makes it a view.
/// Outputs are read and written in RECV and BOTH. A caller's tensor may have more rows than the step needs; too few
/// are A2A_OVERFLOW. `rows` is
///   GATHERED           [sum of tokens] where rank_tokens or UNIFORM make it known, else [R*M]
///   RANK_MAJOR         [R, M] (a caller's tensor may also be [R*M])
///   FLAT               [min(R*M, max_recv_rows)]
///   EXPERT_PADDED      [L, min(R*M, max_recv_rows)] (a caller's tensor may also have one dimension for both)
///   EXPERT_CONTIGUOUS  [min(R*M*min(K,L) + L*(alignment-1) rounded up to the alignment, max_recv_rows)]
/// Under HOST_COUNTS views of GATHERED, FLAT and EXPERT_CONTIGUOUS are cut to num_rows. NVLINK_TWO_SIDED keeps no
/// rows: those outputs must be the caller's.
#[repr(C)]
pub struct a2a_dispatch_out_t {
    /// sizeof(a2a_dispatch_out_t) of the caller.
    pub struct_size: usize,
    /// [rows, H], element type and H as dispatched; e4m3 with `quant`.
    pub tokens: *mut a2a_tensor_t,
    /// [rows, S], as dispatched. With `quant`, G = ceil(H / 128) groups: float32 [rows, G], or int32 [rows, ceil(G / 4)]
    /// with group 4j+b in byte b of word j. A2A_SCALES_COLUMN: strides [1, P], P the rows rounded up to 4;
    /// EXPERT_PADDED and RANK_MAJOR, whose rows have two dimensions: [S*P, 1, P], P from the second. A caller's
    /// tensor may have larger strides.
    pub scales: *mut a2a_tensor_t,
    /// [rows, K] global ids, int32 (a caller's tensor may be int64); -1 past the counts and for bad ids.
    /// EXPERT_CONTIGUOUS: [rows], the row's expert. EXPERT_PADDED has none: an expert's rows stand together.
    pub topk_ids: *mut a2a_tensor_t,
    /// [rows, K] float32; 0 past the counts. EXPERT_*: [rows], the sum of the token's weights for the expert.
    pub topk_weights: *mut a2a_tensor_t,
    /// [rows, *] each, as dispatched.
    pub extras: [*mut a2a_tensor_t; A2A_MAX_EXTRAS],
    /// [L] int32: distinct tokens that chose each local expert; rows that were dropped do not count.
    pub expert_counts: *mut a2a_tensor_t,
    /// [R] int32: rows from each rank.
    pub rank_counts: *mut a2a_tensor_t,
    /// [L+1] int32, EXPERT_* layouts only: where each expert's rows start, and where the last one's block ends.
    pub expert_offsets: *mut a2a_tensor_t,
    /// [rows, 2] int32: source rank and its token; -1 past the counts.
    pub row_source: *mut a2a_tensor_t,
    /// [L] int64, the caller's only: expert_counts is added to it.
    pub expert_stats: *mut a2a_tensor_t,
    /// [4 + R] int32: A2A_STEP_* bits; bad ids of this rank; rows dropped here; rows demanded, which is the
    /// max_recv_rows that this rank needed for the step; then 1 for each rank given up on.
    pub status: *mut a2a_tensor_t,
    /// Under A2A_DISPATCH_HOST_COUNTS N, the rows received (EXPERT_CONTIGUOUS: expert_offsets[L]); else -1.
    pub num_rows: i64,
}

/// What the experts of a rank computed. NVLINK_TWO_SIDED reads it in RECV, as it does a dispatch's tensors.
#[repr(C)]
pub struct a2a_combine_in_t {
    /// sizeof(a2a_combine_in_t) of the caller.
    pub struct_size: usize,
    /// The rows in the layout and shape that dispatch reported, bf16, f16 or f32. Either exactly what
    /// a2a_combine_buffer returned (nothing is copied) or any other tensor (staged). Needed in SEND and BOTH. Rows past
    /// the counts, and gathered rows whose token has no expert here, are not read.
    pub tokens: *const a2a_tensor_t,
    /// [T, K] float32, EXPERT_* layouts only: weights for this rank's own tokens instead of those given to dispatch.
    pub topk_weights: *const a2a_tensor_t,
    /// [rows, K] float32 (EXPERT_*: [rows]), of every rank or none: one value for each expert of each row, on its way
    /// back to the token's rank. The gradients of the weights, in training. Not with GATHERED without ids.
    pub row_weights: *const a2a_tensor_t,
    /// A2A_COMBINE_* bits.
    pub flags: u64,
    /// Which half.
    pub phase: a2a_phase_t,
    /// SMs this call may use, where the comm's bound is no lower; 0 = the comm's. On CUDA HIGH_THROUGHPUT, LOW_LATENCY
    /// and NIXL_ELASTIC (2 at least), and NVLINK_TWO_SIDED (3) keep to it, the others only take 0 yet. Means nothing on the CPU.
    pub max_sms: i32,
}

/// What a rank gets back.
#[repr(C)]
pub struct a2a_combine_out_t {
    /// sizeof(a2a_combine_out_t) of the caller.
    pub struct_size: usize,
    /// [T, H] bf16, f16 or f32, the caller's: row t is the sum for token t of this rank's dispatch. Needed in
    /// RECV and BOTH.
    pub tokens: *mut a2a_tensor_t,
    /// [T, K] float32, the caller's, where row_weights were sent: entry (t, k) is what the rank that owns expert
    /// topk_ids[t, k] sent for it; 0 for no expert, a bad id, a dropped row. May be NULL.
    pub topk_weights: *mut a2a_tensor_t,
    /// [4 + R] int32, as in a2a_dispatch_out_t, with the contributions that this rank's sums lack because their rows
    /// were dropped in place of dropped rows; may be NULL.
    pub status: *mut a2a_tensor_t,
}

// What has been published stays where it is (64-bit targets).
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<a2a_tensor_t>() == 48);
    assert!(offset_of!(a2a_tensor_t, device) == 8);
    assert!(offset_of!(a2a_tensor_t, ndim) == 16);
    assert!(offset_of!(a2a_tensor_t, dtype) == 20);
    assert!(offset_of!(a2a_tensor_t, shape) == 24);
    assert!(offset_of!(a2a_tensor_t, strides) == 32);
    assert!(offset_of!(a2a_tensor_t, byte_offset) == 40);
    assert!(size_of::<a2a_unique_id_t>() == 128);
    assert!(size_of::<a2a_config_t>() == 352);
    assert!(offset_of!(a2a_config_t, extra_row_bytes) == 88);
    assert!(offset_of!(a2a_config_t, max_recv_rows) == 136);
    assert!(offset_of!(a2a_config_t, expert_owner) == 184);
    assert!(offset_of!(a2a_config_t, unique_id) == 200);
    assert!(offset_of!(a2a_config_t, nccl_comm) == 344);
    assert!(size_of::<a2a_memory_t>() == 64);
    assert!(size_of::<a2a_info_t>() == 88);
    assert!(size_of::<a2a_stats_t>() == 136);
    assert!(size_of::<a2a_error_info_t>() == 696);
    assert!(size_of::<a2a_recover_in_t>() == 24);
    assert!(size_of::<a2a_recover_out_t>() == 664);
    assert!(size_of::<a2a_dispatch_in_t>() == 136);
    assert!(size_of::<a2a_dispatch_out_t>() == 160);
    assert!(size_of::<a2a_combine_in_t>() == 48);
    assert!(size_of::<a2a_combine_out_t>() == 32);
};
