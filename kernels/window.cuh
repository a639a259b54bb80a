// What host and kernels share: the words of a mailbox, the state of a slot, the failure record, the parameters of
// every kernel. Twin of src/device/mail.rs (mailboxes) and src/device/cuda/params.rs (all else); both sides assert
// sizes and offsets.
//
// Who writes what: a mailbox is written by its source rank alone, in every rank's window, or by the window's rank if the
// source takes part no more (wait.cuh, for_absent), or by a collective and what follows it (carried.cu); a flag comes last, with release. Control is written by the
// host and read by waiting kernels; a record is written by the kernel that gives a step up and read by the host.
#pragma once
#include <cstddef>
#include <cstdint>

namespace a2a {

constexpr uint32_t kMaxRanks = 1024;
constexpr uint32_t kMaxTopk = 32;
constexpr uint32_t kShapeWords = 16;
constexpr uint32_t kToldRanks = 64;
constexpr uint32_t kSides = 9;
// Tokens that a block of a2a_route places, and blocks of a cluster that share the work.
constexpr uint32_t kRouteTokens = 512;
constexpr uint32_t kRouteBlocks = 8;
// Windows that a kernel finds in its own parameters; a look into memory costs more than most kernels' arithmetic.
constexpr uint32_t kNearRanks = 16;

// Byte offsets inside a mailbox (mail.rs).
constexpr uint32_t kMailBytes = 256;
constexpr uint32_t kCombineFlag = 8;
constexpr uint32_t kReadFlag = 16;
constexpr uint32_t kProgress = 24;
constexpr uint32_t kLoss = 32;
constexpr uint32_t kCountsFlag = 40;
constexpr uint32_t kLossOrigin = 48;
constexpr uint32_t kDispatchShape = 64;
constexpr uint32_t kCombineShape = 128;
constexpr uint32_t kTokens = 192;
constexpr uint32_t kReplays = 196;
// The dispatch flag {epoch, rows}, and beside it {epoch, digest of shape and replay}: one 16-byte load sees both.
constexpr uint32_t kDispatchPair = 224;

// Operations, in progress words and records.
constexpr uint32_t kDispatch = 1, kCombine = 2, kRead = 3, kReplay = 4;

// In loss words, so that zero is none. Words of former members do not outlast a recovery.
constexpr uint64_t kGeneration = 1;

// States of a slot.
constexpr uint32_t kIdle = 0, kDispatchSent = 1, kDispatched = 2, kCombineSent = 3;
// A dispatch follows a dispatch, and every rank has read the former one.
constexpr uint32_t kOpened = 4;
// The dispatch was void on every rank because some would receive too many rows.
constexpr uint32_t kOverflowed = 5;

// Statuses that a kernel can find (error.rs).
constexpr uint32_t kInvalidArgument = 1, kTimeout = 16, kPeerLost = 17, kMismatch = 18, kAborted = 35;

// Bits of status[0].
constexpr int32_t kStepBadId = 1, kStepDropped = 2, kStepVoid = 4, kStepOverflow = 8;

// Why a step was given up; the host makes the sentence.
enum Cause : uint32_t {
  kCauseNone = 0,
  kCauseBound = 1,         // expected, seen: max_tokens here and there
  kCauseElsewhere = 2,     // expected, seen: operations; aux: steps ahead
  kCauseGaveUp = 3,        // origin: the rank that gave up first
  kCauseGone = 4,          // detail: 1 destroyed its comm, 2 aborted, 3 its process ended, 4 went on without this rank,
                           // 5 one of the first three, where no window tells which
  kCauseLate = 5,          // aux: the deadline in ns
  kCauseDispatchShape = 6, // detail: the word
  kCauseCombineShape = 7,  // detail: the word
  kCauseReplay = 8,        // expected, seen: REUSE here and there
  kCauseTold = 9,          // expected, seen: tokens as told, as dispatched
  kCauseOrder = 10,        // detail: the state the slot was in
};

// Pinned, one a comm. dead[r]: why rank r sends nothing more (kCauseGone), or 0.
struct Control {
  uint32_t aborted;
  uint32_t reserved;
  uint64_t first_step_ns;
  uint64_t step_ns;
  uint32_t dead[kMaxRanks];
};
static_assert(sizeof(Control) == 24 + 4 * kMaxRanks);

// Pinned, two a slot: why it is closed; what its state did not allow.
struct Record {
  uint32_t valid;
  // Among the comm's records.
  uint32_t order;
  uint32_t status;
  uint32_t cause;
  uint32_t operation;
  uint32_t peer;
  uint32_t detail;
  uint32_t origin;
  uint64_t sequence;
  uint64_t expected;
  uint64_t seen;
  uint64_t aux;
  uint32_t lost[kMaxRanks / 32];
};
static_assert(sizeof(Record) == 64 + kMaxRanks / 8);

// Device memory, one a slot.
struct Slot {
  uint32_t state;
  // Of the current step, as flags carry it.
  uint32_t epoch;
  uint64_t sequence;
  uint64_t routing;
  // When the call's first wait began.
  uint64_t started;
  // The status of the loss that closed the slot.
  uint32_t closed;
  // Some ranks take part no more: Shared says which. Beside `closed`, for both are read before anything else.
  uint32_t absent;
  uint32_t bad_ids;
  // The half before this kernel went through: what follows it may hand out or sum.
  uint32_t whole;
  // Where the rows of a half on its own go, {epoch, kInPlace or kInBanks}, once that is decided; + kAddedUp: the half has
  // heard everybody's counts, and the routing has what they come to.
  uint64_t placed;
  // Of the rows at work, pieces that warps have taken beside their first ones.
  unsigned long long taken;
  // Blocks of the kernel at work that have stored all that they had to.
  uint32_t arrived;
  // When the collective of the last half that went did begin: %globaltimer / 2^20.
  uint32_t begun;
  // Of the collective that began last, as the host is told it (wait.cuh, mark_begin).
  uint64_t operation;
  uint32_t lost[kMaxRanks / 32];
};
constexpr uint32_t kInPlace = 1, kInBanks = 2, kAddedUp = 4;
static_assert(sizeof(Slot) == 80 + kMaxRanks / 8);

constexpr uint32_t kSms = 256;

// Device memory, one a comm. The counters are those of a2a_stats_t, in its order.
enum Counter : uint32_t {
  kDispatches,
  kCombines,
  kRowsPushed,
  kBytesPushed,
  kRowsPulled,
  kBytesPulled,
  kRowsGathered,
  kBytesGathered,
  kRowsFifo,
  kBytesFifo,
  kRowsCopied,
  kBytesCopied,
  kBytesRemote,
  kHops,
  kBadIds,
  kStepsLost,
  kCounters
};
// Ranks that take part no more (a2a_recover): if there are any, and a bit for each.
struct Absent {
  uint32_t any;
  uint32_t ranks[kMaxRanks / 32];
#ifdef __CUDACC__
  __device__ bool has(uint32_t rank) const { return ranks[rank / 32] >> rank % 32 & 1; }
#endif
};
struct Shared {
  uint64_t counters[kCounters];
  uint32_t first_step_done;
  uint32_t records;
  // In a build for tests: multiprocessors that kernels were on at a time, at most; that they are on; blocks by multiprocessor.
  uint32_t most_sms;
  uint32_t sms;
  uint32_t on_sm[kSms];
  // First halves whose second half has not yet received what it waits for.
  uint32_t pending;
  Absent absent;
};
static_assert(sizeof(Shared) == 8 * kCounters + 20 + 4 * kSms + sizeof(Absent));

// Who runs a kernel, and what it can reach.
struct Seat {
  // [ranks]
  uint8_t* const* windows;
  const Control* control;
  // Of the slot.
  Record* record;
  Slot* slot;
  Shared* shared;
  // Offsets in every window, of the slot.
  uint64_t mailboxes;
  uint64_t loss_masks;
  uint64_t routing;
  uint32_t rank;
  uint32_t ranks;
  // M of the step.
  uint32_t bound;
  // REUSE. 1: rows go to their places; 2: couriers carry them, and everything is told anew.
  uint32_t replays;
  uint8_t* near[kNearRanks];
};
static_assert(sizeof(Seat) == 80 + 8 * kNearRanks);

// Which rank owns an expert: by division where experts are contiguous and few, else by a table.
struct Owners {
  // [experts]: the owner; the place among the owner's.
  const int32_t* owner;
  const int32_t* place;
  uint32_t experts;
  // The first `larger` ranks own `quotient + 1` experts. Reciprocals are ceil(2^32 / n); 0: use the table.
  uint32_t larger;
  uint32_t split;
  uint32_t reciprocal_larger;
  uint32_t reciprocal;
  uint32_t quotient;
};
static_assert(sizeof(Owners) == 40);

// The routing of a step: the caller's ids and weights, and the routing's private memory.
struct Route {
  Owners owners;
  // [tokens, topk] int32 or int64, rows ids_stride bytes apart. Null in a replay.
  const uint8_t* ids_in;
  const uint8_t* weights_in;
  uint64_t ids_stride;
  uint64_t weights_stride;
  // Lists of RoutingMap.
  int32_t* ids;
  float* weights;
  int32_t* target_ranks;
  int32_t* target_rows;
  int32_t* rows_for;
  // [tokens, topk]: where rows are (token, expert) pairs, a choice's row at its expert's owner, or -1.
  int32_t* pair_rows;
  // Ids of their experts count as none.
  const Absent* absent;
  uint32_t tokens;
  uint32_t topk;
  uint32_t fanout;
  // Fours of a token's choices, the last perhaps not whole, and ceil(2^32 / fours), or 0 for one.
  uint32_t fours;
  uint32_t reciprocal;
  // 1: int64 ids; 2: ids are read in 16-byte vectors; 4: weights are the caller's; 8: ids are the caller's.
  uint32_t flags;
};
constexpr uint32_t kIdsAre64 = 1, kIdsAreVectors = 2, kHasWeights = 4, kHasIds = 8;
static_assert(sizeof(Route) == 152);

// No expert, no row, no rank.
constexpr uint32_t kNone = ~0u;

// What says how many rows a rank has room for, where they are (token, expert) pairs in one list.
struct Blocks {
  // [ranks + 1]: the number of a rank's first expert, where they are numbered rank after rank; or null.
  const int32_t* firsts;
  // Tokens of all ranks, at most.
  uint64_t tokens;
  uint32_t topk;
  uint32_t alignment;
  // max_recv_rows, or 0.
  uint32_t limit;
  uint32_t reserved;
};
static_assert(sizeof(Blocks) == 32);

// A plane of rows beside the tokens.
struct Side {
  const uint8_t* from;
  uint64_t stride;
  // Where the plane's region starts in a window; where that of the banks does.
  uint64_t to;
  uint64_t bank;
  uint32_t bytes;
  // The widest access that every row allows: 16, 8, 4, 2 or 1.
  uint32_t unit;
  // Not 0: rows from column to column, each of 4-byte elements.
  uint32_t pitch;
  uint32_t reserved;
};
static_assert(sizeof(Side) == 48);

// What the end of a dispatch hands out.
struct Receive {
  // [4 + ranks], or null.
  int32_t* status;
  // [ranks]: the caller's (or null), and the routing's.
  int32_t* rank_counts;
  int32_t* kept_counts;
  // [local experts], to be zeroed for the kernel that counts, or null.
  int32_t* expert_counts;
  uint32_t local;
  // 1: every rank has this rank's number of tokens; 2: told is set; 4: rows are published, not pushed.
  uint32_t flags;
  // The rows of a dispatch as a copy moves them; bytes of all planes.
  uint64_t wire_bytes;
  // Received rows, for a host that waits: pinned, or null.
  uint64_t* rows;
  // Of `shape` and of the replay.
  uint32_t digest;
  uint32_t tokens;
  uint32_t shape[kShapeWords];
  int32_t told[kToldRanks];
  // [ranks], for more ranks than `told` has room for, or null.
  const int32_t* told_more;
  // Where collectives carry rows and flags, in the place of windows that peers address, words of the pinned memory: the
  // operation of the slot that began last, that ended last, and one that the host has ended. Else null.
  uint64_t* marks;
};
constexpr uint32_t kUniform = 1, kTold = 2, kGathers = 4;
// In `rows`: the step is void because a rank (bits 32 to 62) would receive too many rows (bits 0 to 31).
constexpr uint64_t kTooMany = 1ull << 63;
static_assert(sizeof(Receive) == 64 + 64 + 256 + 16);

// a2a_mark: that a collective has ended whose second half comes later.
struct MarkParams {
  const Slot* slot;
  uint64_t* marks;
};
static_assert(sizeof(MarkParams) == 16);

// a2a_open: the "rows read" words of a dispatch that follows a dispatch.
struct OpenParams {
  Seat seat;
  // 1: no peer touches this rank's window, and none is waited for.
  uint32_t flags;
  uint32_t reserved;
};
constexpr uint32_t kAlone = 1;
static_assert(sizeof(OpenParams) == sizeof(Seat) + 8);

// a2a_route: where each token's rows go, where tokens are many.
struct RouteParams {
  Route route;
  const Slot* slot;
  uint32_t ranks;
  // 1: follows a2a_open.
  uint32_t flags;
};
constexpr uint32_t kFollows = 1;
static_assert(sizeof(RouteParams) == sizeof(Route) + 16);

// a2a_push: rows into peers' windows (or the own one, when they are published), and padding.
struct PushParams {
  Seat seat;
  Route route;
  const uint8_t* tokens;
  uint64_t token_stride;
  // Regions in a window.
  uint64_t to_tokens;
  uint64_t to_ids;
  uint64_t to_weights;
  uint64_t to_source;
  // The first row of this rank's, in any window.
  uint64_t row_base;
  // 16-byte vectors of a token, and of a piece of it, which is a warp's job.
  uint32_t vectors;
  uint32_t piece;
  // Jobs of a token: its pieces, then what travels beside its row.
  uint32_t jobs;
  // The first so many tokens' blocks find out for themselves where rows go.
  uint32_t counted;
  uint32_t sides;
  // 1: follows a2a_open; 2: into the own window, at a token's number; 4: follows a2a_route, for which
  // the other blocks wait; 8: rows are those of one list, whoever's they are.
  uint32_t flags;
  // [tokens, fanout]: rows of ids, weights and source, where they are not the token's; or null.
  const int32_t* bank_rows;
  // A region: the rows of a token's choices, beside its ids in a bank, if there are `bank_rows`.
  uint64_t to_places;
  // Columns at a rank are as long as its rows are many.
  Blocks blocks;
  Side side[kSides];
};
constexpr uint32_t kPublishes = 2, kRouted = 4, kPacked = 8;
// Tokens that a block can count.
constexpr uint32_t kMostCounted = 512;
static_assert(sizeof(PushParams) == sizeof(Seat) + sizeof(Route) + 56 + 24 + 48 + sizeof(Side) * kSides);

// a2a_finish: the end of a dispatch, or of either half.
struct FinishParams {
  Seat seat;
  Route route;
  Receive receive;
  // Lists that a2a_place made, or null: {demanded, dropped here, dropped elsewhere, where the last block ends}; [ranks] rows
  // that each is to receive.
  const int32_t* summary;
  const int32_t* demands;
  // Rows of a rank that are too many, or 0.
  uint32_t limit;
  // 1: raises this rank's flags, once the kernel before it is done; 2: waits for the peers'; 4: counts tokens itself;
  // 8: this rank's rows are in banks; 16: rows are those up to the last block's end.
  uint32_t flags;
};
constexpr uint32_t kRaises = 1, kWaits = 2, kCounts = 4, kBanked = 8, kEnds = 16;
static_assert(sizeof(FinishParams) == sizeof(Seat) + sizeof(Route) + sizeof(Receive) + 24);

// a2a_dispatch: all of it by one block, where tokens are very few.
struct DispatchParams {
  PushParams push;
  Receive receive;
  // As FinishParams has it.
  uint32_t flags;
  uint32_t reserved;
};
static_assert(sizeof(DispatchParams) == sizeof(PushParams) + sizeof(Receive) + 8);

// a2a_announce: what a collective carries of a dispatch beside the tokens.
struct AnnounceParams {
  PushParams push;
  Receive receive;
  // Of this rank's words, in its own window.
  uint64_t box;
};
static_assert(sizeof(AnnounceParams) == sizeof(PushParams) + sizeof(Receive) + 8);

// a2a_receive: what came of it.
struct ReceiveParams {
  Seat seat;
  Receive receive;
  // Of every rank's words, in the own window, so many bytes apart.
  uint64_t boxes;
  uint64_t box_bytes;
  // [ranks, beside_bytes]: where ids and weights go that are in the boxes, as int32 and float32.
  uint8_t* ids;
  uint8_t* weights;
  // Bytes of a rank's ids, which are behind its words, and of its weights; 0: they are elsewhere.
  uint32_t beside_bytes;
  // From a box to its weights.
  uint32_t weights_at;
  // Of all ranks.
  uint32_t rows;
  // 1: those bytes, and where they go, are multiples of 16.
  uint32_t vectors;
};
static_assert(sizeof(ReceiveParams) == sizeof(Seat) + sizeof(Receive) + 48);

// Everybody's rows by expert, or by rank: [ranks, keys] words {epoch, rows} in every window, a source's `stride` bytes apart.
struct Counts {
  uint64_t region;
  uint64_t stride;
};

// a2a_place: where rows without gaps go and lie, by everybody's counts.
struct PlaceParams {
  Seat seat;
  Route route;
  Counts counts;
  // Lists of RoutingMap: [ranks] rows from each; [1] rows received; {demanded, dropped here, dropped elsewhere};
  // [ranks] rows that each is to receive.
  int32_t* kept_counts;
  int32_t* received;
  int32_t* summary;
  int32_t* demands;
  // Rows that a rank has room for, and that are too many (0: none are).
  uint32_t room;
  uint32_t limit;
  // As FinishParams has it, for counts and not for flags, and: 8: follows a2a_open; 16: rows go through FIFOs, and each rank's
  // are numbered from 0.
  uint32_t flags;
  uint32_t reserved;
};
constexpr uint32_t kFromZero = 16;
static_assert(sizeof(PlaceParams) == sizeof(Seat) + sizeof(Route) + 16 + 48);

// a2a_settle: rows without gaps from the banks to their places, and the padding behind them.
struct SettleParams {
  Seat seat;
  const int32_t* kept_counts;
  // Regions in the own window: received rows, and the banks.
  uint64_t to_tokens;
  uint64_t to_ids;
  uint64_t to_weights;
  uint64_t to_source;
  uint64_t bank_tokens;
  uint64_t bank_ids;
  uint64_t bank_weights;
  uint64_t bank_source;
  // Rows of the outputs.
  uint64_t rows;
  uint32_t vectors;
  uint32_t topk;
  uint32_t sides;
  // Padding that is written: 1: ids; 2: weights; 4: sources.
  uint32_t flags;
  Side side[kSides];
};
constexpr uint32_t kPadIds = 1, kPadWeights = 2, kPadSource = 4;
static_assert(sizeof(SettleParams) == sizeof(Seat) + 96 + sizeof(Side) * kSides);

// a2a_place_experts: the same as a2a_place where rows are (token, expert) pairs in one list.
struct PlaceExpertsParams {
  // `received`: [local experts] rows of each.
  PlaceParams place;
  Blocks blocks;
  // Lists of RoutingMap: [experts] where their rows start, by their numbers; [local experts] the same of this rank's;
  // [ranks] this rank's rows at each; [tokens, fanout] rows in banks.
  int32_t* ends;
  int32_t* starts;
  int32_t* pairs_for;
  int32_t* bank_rows;
  // [parts, ranks + experts] words, and how many blocks count and place, a part of the tokens each; 0: this block does.
  uint32_t* parts;
  uint32_t num_parts;
  uint32_t topk_bits;
  // That count, by what there is of shared memory.
  uint32_t warps;
  uint32_t reserved;
};
static_assert(sizeof(PlaceExpertsParams) == sizeof(PlaceParams) + sizeof(Blocks) + 56);

// a2a_spread: tokens from the first of their rows to the others, or from the banks to all, and what else a rank's rows have.
struct SpreadParams {
  // `kept_counts` is not looked at.
  SettleParams settle;
  Owners owners;
  // The rows that sources have found for the ids in their banks.
  uint64_t bank_places;
  // Lists of RoutingMap: [local experts] where rows start, and how many they are; as FinishParams has it.
  const int32_t* starts;
  const int32_t* block_counts;
  const int32_t* summary;
  // [local experts], [local experts + 1], [local experts] added to; or null.
  int32_t* expert_counts;
  int32_t* expert_offsets;
  unsigned long long* expert_stats;
  uint32_t local;
  uint32_t topk_bits;
  // That count, by what there is of shared memory.
  uint32_t warps;
  uint32_t reserved;
};
static_assert(sizeof(SpreadParams) == sizeof(SettleParams) + 40 + 72);

// a2a_pairs_*: a dispatch whose rows are (token, expert) pairs, or either half of it.
struct PairsParams {
  Seat seat;
  Route route;
  Receive receive;
  Counts counts;
  const uint8_t* tokens;
  uint64_t token_stride;
  // Regions in a window: received rows, and the banks.
  uint64_t to_tokens;
  uint64_t to_weights;
  uint64_t to_source;
  uint64_t to_scales;
  uint64_t bank_tokens;
  uint64_t bank_ids;
  uint64_t bank_weights;
  uint64_t bank_source;
  uint64_t bank_scales;
  // [local experts]: the experts by their places; the caller's, added to, or null.
  const int32_t* own;
  unsigned long long* expert_stats;
  // [local experts + 1], or null.
  int32_t* expert_offsets;
  // Lists of RoutingMap: [local experts] rows of each; {demanded, dropped here, dropped elsewhere}.
  int32_t* block_counts;
  int32_t* summary;
  // What a row in a bank takes of the link; receive.wire_bytes: one in place.
  uint64_t bank_bytes;
  // Rows of a block, which is an expert's.
  uint32_t block;
  // Rows of a block that are too many, or 0.
  uint32_t limit;
  // 16-byte vectors of a token as it travels.
  uint32_t vectors;
  // 2^n is the first power not below top-k.
  uint32_t topk_bits;
  // Of scales that are made on the way: 4-byte words of a row, rows from column to column (0: they lie by row).
  uint32_t scale_words;
  uint32_t scale_pitch;
  uint32_t sides;
  // As FinishParams has it, and: 4: into the banks, if counts are late; 8: follows a2a_open; 16: padding gets weights; 32: and sources;
  // 64: UE8M0 scales; 128: into the banks, which couriers carry, and the counts.
  uint32_t flags;
  Side side[kSides];
};
constexpr uint32_t kBanks = 4, kAfterOpen = 8, kPadsWeights = 16, kPadsSource = 32, kPairPowers = 64, kPosted = 128;
static_assert(sizeof(PairsParams) == sizeof(Seat) + sizeof(Route) + sizeof(Receive) + 16 + 136 + 32 + sizeof(Side) * kSides);

// A plane of rows that a courier has brought: its bank, the bytes of a row, the widest access that all rows allow.
struct Plane {
  uint64_t bank;
  uint32_t bytes;
  uint32_t unit;
};
static_assert(sizeof(Plane) == 16);

// a2a_fetch: a dispatch's counts and rows from inboxes to where peers store them that address this rank's window.
struct FetchParams {
  Seat seat;
  Counts counts;
  // [ranks]; in each, where counts and rows of the slot start.
  const uint8_t* const* inboxes;
  uint64_t counts_at;
  uint64_t rows_at;
  // Blocks that share a source's.
  uint32_t parts;
  uint32_t planes;
  Plane plane[4 + kSides];
};
static_assert(sizeof(FetchParams) == sizeof(Seat) + 16 + 32 + sizeof(Plane) * (4 + kSides));

// a2a_order: where this rank's results of each expert start.
struct OrderParams {
  Seat seat;
  Owners owners;
  Counts counts;
  // [ranks + 1]: the number of a rank's first expert, where they are numbered rank after rank.
  const int32_t* firsts;
  // [experts + 1], by those numbers: a list of RoutingMap.
  uint32_t* starts;
};
static_assert(sizeof(OrderParams) == sizeof(Seat) + sizeof(Owners) + 32);

// a2a_return: results to the desks of the ranks whose tokens they are of, and this rank's own to where they are summed.
struct ReturnParams {
  Seat seat;
  Counts counts;
  const int32_t* firsts;
  const uint32_t* starts;
  // [local experts]: the experts by their places.
  const int32_t* own;
  const uint8_t* rows;
  uint64_t stride;
  // Beside each row a float32, or null.
  const uint8_t* weights;
  uint64_t weights_stride;
  // Where a peer's results start, from what is its window here; and in the own window, where they are brought.
  uint64_t results;
  uint64_t brought;
  uint64_t brought_weights;
  // Results that a rank can have of this one.
  uint64_t room;
  uint32_t local;
  // Rows of an expert's block.
  uint32_t block;
  uint32_t vectors;
  // Blocks that share a run of rows.
  uint32_t spread;
};
static_assert(sizeof(ReturnParams) == sizeof(Seat) + 16 + 88 + 16);

// a2a_bring: results from inboxes to where they are summed, and which of them is whose.
struct BringParams {
  OrderParams order;
  // As in FetchParams; in each, where results start.
  const uint8_t* const* inboxes;
  uint64_t results;
  uint64_t brought;
  uint64_t brought_weights;
  const int32_t* ids;
  const int32_t* pair_rows;
  // [tokens, topk]: a result's number among all that are brought, or -1: a list of RoutingMap.
  int32_t* result_rows;
  uint32_t tokens;
  uint32_t topk;
  uint32_t block;
  uint32_t vectors;
  uint32_t parts;
  uint32_t has_weights;
};
static_assert(sizeof(BringParams) == sizeof(OrderParams) + 80);

// A plane as it is handed out.
struct Out {
  // The region in a window (pulled), or in this rank's own (landed).
  uint64_t region;
  uint8_t* to;
  uint64_t stride;
  uint32_t bytes;
  uint32_t unit;
  // Columns at the destination: 4-byte elements, rows from column to column, block to block; 0: rows.
  uint64_t pitch;
  uint64_t block_stride;
  // The same of the source, which has rows if it is 0.
  uint32_t from_pitch;
  // 1 tokens, 2 ids, 3 weights, 4 source, 0 else; + 8: rows are in place, only padding is written.
  uint32_t kind;
};
static_assert(sizeof(Out) == 56);

// a2a_land: rows from where they arrived (or from the peers, gathered) to where they are wanted, padding, experts
// counted.
struct LandParams {
  Seat seat;
  Owners owners;
  // Rows by source, or by block where blocks are experts'.
  const int32_t* kept_counts;
  // The ids' region, for counting.
  uint64_t ids_region;
  int32_t* expert_counts;
  unsigned long long* expert_stats;
  // [blocks]: where blocks start, if not at multiples of `block`; or null.
  const int32_t* starts;
  // Rows of the outputs, and of a block of them.
  uint64_t rows;
  uint32_t block;
  uint32_t topk;
  uint32_t outs;
  // 1: gathered; 2: zeroes padding; 4: ids are wanted as int64; 8: gathered rows lie together, in this rank's own window, and
  // the kernel may be there before the one that it follows is done
  uint32_t flags;
  uint32_t splits;
  uint32_t blocks;
  Out out[4 + kSides];
};
constexpr uint32_t kGathered = 1, kZeroPadding = 2, kWideIds = 4, kTogether = 8;
constexpr uint32_t kOutOther = 0, kOutTokens = 1, kOutIds = 2, kOutWeights = 3, kOutSource = 4,
                   kOutInPlace = 8;
static_assert(sizeof(LandParams) == sizeof(Seat) + 40 + 48 + 24 + 56 * (4 + kSides));

// a2a_stage: the experts' rows to where peers can read them.
struct StageParams {
  Seat seat;
  // Rows by source, or by block where blocks are experts'; where blocks start, if not at multiples of `block`.
  const int32_t* kept_counts;
  const int32_t* starts;
  const uint8_t* rows;
  uint64_t stride;
  uint64_t to_rows;
  const uint8_t* weights;
  uint64_t weights_stride;
  uint64_t to_weights;
  uint32_t vectors;
  uint32_t weight_bytes;
  // 1: gathered
  uint32_t flags;
  // Rows of a block, and blocks of the grid that share them.
  uint32_t block;
  uint32_t spread;
  // Blocks that do it, if they are not fewer.
  uint32_t units;
};
static_assert(sizeof(StageParams) == sizeof(Seat) + 88);

// a2a_meet: the flags of a combine, out and in.
struct MeetParams {
  Seat seat;
  int32_t* status;
  const int32_t* rows_for;
  const int32_t* kept_counts;
  // {demanded, dropped here, dropped elsewhere}, or null.
  const int32_t* summary;
  // Bytes of a result; of a row that is staged; of the values beside a result.
  uint64_t result_bytes;
  uint64_t staged_bytes;
  uint64_t weight_bytes;
  uint32_t shape[4];
  // The shape in 32 bits, none lost: what a combine flag carries as its number.
  uint32_t digest;
  uint32_t tokens;
  // 1: sends; 2: waits; 4: every rank has a result for every token; 8: follows a2a_stage; 16: nothing sums behind it; 32:
  // results go through FIFOs; 64: couriers carry them
  uint32_t flags;
  uint32_t reserved;
  // As in Receive.
  uint64_t* marks;
};
constexpr uint32_t kSends = 1, kMeetWaits = 2, kEveryone = 4, kStaged = 8, kSettles = 16, kThroughFifos = 32,
                   kResultsPosted = 64;
static_assert(sizeof(MeetParams) == sizeof(Seat) + 96);

// a2a_reduce_*, a2a_weigh_*: each token's results, summed, or weighted and summed.
struct ReduceParams {
  // Where few blocks sum, each waits for itself and nothing goes before.
  MeetParams meet;
  Owners owners;
  const int32_t* target_ranks;
  const int32_t* target_rows;
  const int32_t* kept_counts;
  const int32_t* ids;
  // Of (token, expert) pairs: rows at the owners; weights, rows a stride apart, or null.
  const int32_t* pair_rows;
  const uint8_t* weights;
  uint64_t weights_stride;
  uint64_t from_rows;
  uint64_t from_weights;
  uint8_t* out;
  uint64_t out_stride;
  // [tokens, topk] float32, or null.
  uint8_t* out_weights;
  uint64_t out_weights_stride;
  uint64_t row_bytes;
  uint32_t tokens;
  uint32_t fanout;
  uint32_t topk;
  // 16-byte vectors of a result.
  uint32_t vectors;
  uint32_t splits;
  // 1: gathered; 2: every rank has a result; 4: adds what stands in out; 8: rows are those of one list; 16: results were
  // brought into this rank's own window, `bound` rows of each rank; 32: their sums were
  uint32_t flags;
  // Where this rank's own results for its tokens are, if those were brought; or the sums.
  const uint8_t* own;
};
constexpr uint32_t kReduceGathered = 1, kReduceEveryone = 2, kAccumulate = 4, kReducePacked = 8, kReduceBrought = 16,
                   kReduceSummed = 32;
static_assert(sizeof(ReduceParams) == sizeof(MeetParams) + 40 + 112 + 24 + 8);

// What a rank has on offer, to be sent through FIFOs: rows of a dispatch, or results.
struct Offer {
  // Ids and weights of a dispatch.
  Route route;
  // Tokens, or results, rows a stride apart.
  const uint8_t* rows;
  uint64_t stride;
  // [ranks]: rows for each, or null: as many as there is room for, by the counts of `epoch`.
  const int32_t* rows_for;
  uint32_t room;
  // Rows of a rank that are too many, or 0.
  uint32_t limit;
  // Of a row: 16-byte vectors, and of a piece; pieces.
  uint32_t vectors;
  uint32_t piece;
  uint32_t pieces;
  // 1: rows are tokens, with ids, weights and sources, here in an entry; else results, rank after rank.
  uint32_t flags;
  uint32_t ids_at;
  uint32_t weights_at;
  uint32_t source_at;
  uint32_t sides;
  // Other planes; `to` is where in an entry.
  Side side[kSides];
  // M of the step.
  uint32_t bound;
  // Bytes of an entry behind a row's vectors, a multiple of 16: they are with its last piece.
  uint32_t beside;
  // What it is cut into, for each rank.
  uint32_t sequences;
  // Written by kernels: whose counts it waits for; there is an offer; its rows' numbers are known.
  uint32_t epoch;
  uint32_t live;
  uint32_t ready;
};
constexpr uint32_t kHasChoices = 1;
static_assert(sizeof(Offer) == sizeof(Route) + 72 + sizeof(Side) * kSides + 16);

// A dispatch's, a combine's.
constexpr uint32_t kOffers = 2;

// Where FIFOs, and what a rank knows of them, are; of all slots.
struct Fifos {
  // Private, `state_bytes` a slot: FifoState and lists behind it (fifo.cuh).
  uint8_t* states;
  uint64_t state_bytes;
  const Slot* all;
  // In every window, of the first slot, and from one slot to the next: entries, words.
  uint64_t entries;
  uint64_t words;
  uint64_t slot_bytes;
  uint64_t entry_bytes;
  // Of the first slot.
  Counts counts;
  // Entries of a FIFO; words of an entry: pieces of a row at most.
  uint32_t rows;
  uint32_t words_each;
  uint32_t slots;
  uint32_t slot;
  // Of a block's shared memory: bytes of a stage, and stages. Warps of it that send tokens.
  uint32_t stage;
  uint32_t stages;
  uint32_t senders;
  // Words of an offer's list of how far its sequences are.
  uint32_t cursors;
};
static_assert(sizeof(Fifos) == 104);

// a2a_stream: a dispatch through FIFOs, or either half of it.
struct StreamParams {
  FinishParams finish;
  PlaceParams place;
  Fifos fifos;
  Offer offer;
  Owners owners;
  int32_t* expert_counts;
  unsigned long long* expert_stats;
  // Rows of the outputs.
  uint64_t rows;
  uint32_t outs;
  // As LandParams has it.
  uint32_t flags;
  // `region` is where in an entry.
  Out out[4 + kSides];
};
static_assert(sizeof(StreamParams) == sizeof(FinishParams) + sizeof(PlaceParams) + sizeof(Fifos) + sizeof(Offer) + 40 + 32 + 56 * (4 + kSides));

// a2a_stream_*: a combine through FIFOs, or either half of it.
struct StreamResultsParams {
  MeetParams meet;
  Fifos fifos;
  Offer offer;
  Owners owners;
  const int32_t* target_ranks;
  const int32_t* target_rows;
  const int32_t* rows_for;
  const int32_t* ids;
  uint8_t* out;
  uint64_t out_stride;
  uint8_t* out_weights;
  uint64_t out_weights_stride;
  uint32_t tokens;
  uint32_t fanout;
  uint32_t topk;
  // As ReduceParams has it.
  uint32_t flags;
  uint32_t weights_at;
  uint32_t reserved;
};
static_assert(sizeof(StreamResultsParams) == sizeof(MeetParams) + sizeof(Fifos) + sizeof(Offer) + 40 + 88);

// a2a_tell: every rank's tokens as the host was told, where they do not fit into a kernel's own parameters.
struct TellParams {
  int32_t* to;
  uint32_t first;
  uint32_t count;
  int32_t values[512];
};
static_assert(sizeof(TellParams) == 16 + 2048);

// a2a_quantise: tokens to e4m3 with scales, in private memory.
struct QuantParams {
  const uint8_t* from;
  uint64_t stride;
  uint8_t* to;
  uint8_t* scales;
  uint32_t tokens;
  uint32_t hidden;
  uint32_t scale_bytes;
  // 0 bf16, 1 f16, 2 f32; 4: UE8M0 scales
  uint32_t flags;
};
constexpr uint32_t kPowers = 4;
static_assert(sizeof(QuantParams) == 48);

// a2a_poison, of a jitter build.
struct PoisonParams {
  const Slot* slot;
  uint8_t* to;
  uint64_t vectors;
  // The routing that the slot must be at, or 0 for any.
  uint64_t routing;
  // A bit for each state in which nobody uses the memory.
  uint32_t states;
  uint32_t word;
};
static_assert(sizeof(PoisonParams) == 40);

}  // namespace a2a
