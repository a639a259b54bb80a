//! What host and kernels share: twins of the structs in kernels/window.cuh, which says what the fields are. Both sides
//! assert sizes and offsets.

use std::mem::offset_of;

use crate::device::mail;

pub const MAX_RANKS: usize = 1024;
pub const SHAPE_WORDS: usize = 16;
pub const TOLD_RANKS: usize = 64;
/// Up to so many ranks' tokens are told in a kernel's own parameters. In a jitter build small groups go the other way too.
pub const TOLD_DIRECTLY: usize = if cfg!(feature = "jitter") { 2 } else { TOLD_RANKS };
pub const SIDES: usize = 9;
pub const OUTS: usize = 4 + SIDES;
pub const TELL: usize = 512;
pub const SMS: usize = 256;
pub const NEAR_RANKS: usize = 16;
/// Tokens that a block of a2a_push has room to count.
pub const MOST_COUNTED: u32 = 512;

const SEAT: usize = 80 + 8 * NEAR_RANKS;
const ROUTE: usize = 152;
const RECEIVE: usize = 400;
const SIDE: usize = 48;
const PUSH: usize = SEAT + ROUTE + 128 + SIDE * SIDES;
const PLACE: usize = SEAT + ROUTE + 64;
const FINISH: usize = SEAT + ROUTE + RECEIVE + 24;
const OFFER: usize = ROUTE + 72 + SIDE * SIDES + 16;
const FIFOS: usize = 104;
const STREAM: usize = FINISH + PLACE + FIFOS + OFFER + 72;
const SETTLE: usize = SEAT + 96 + SIDE * SIDES;
const PAIRS: usize = SEAT + ROUTE + RECEIVE + 184;
const MEET: usize = SEAT + 96;
const ORDER: usize = SEAT + 72;

/// Addresses in device memory, or 0.
pub type Address = u64;

/// Declares a twin: `repr(C)`, zero as its default, its size and the offset of its last field asserted.
macro_rules! twins {
    ($($(#[$doc:meta])* $name:ident: $size:expr, $last:ident at $offset:expr => {
        $($field:ident: $ty:ty),+ $(,)?
    })+) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name { $(pub $field: $ty),+ }
        const _: () = assert!(size_of::<$name>() == $size && offset_of!($name, $last) == $offset);
        impl Default for $name {
            fn default() -> $name {
                // SAFETY: integers, and arrays and structs of them.
                unsafe { std::mem::zeroed() }
            }
        }
    )+};
}

twins! {
    /// Pinned, one a comm, written by the host.
    Control: 24 + 4 * MAX_RANKS, dead at 24 => {
        aborted: u32, reserved: u32, first_step_ns: u64, step_ns: u64, dead: [u32; MAX_RANKS],
    }
    /// Pinned, two a slot, written by kernels: why it is closed; what its state did not allow.
    Record: 64 + MAX_RANKS / 8, lost at 64 => {
        valid: u32, order: u32, status: u32, cause: u32, operation: u32, peer: u32, detail: u32, origin: u32,
        sequence: u64, expected: u64, seen: u64, aux: u64, lost: [u32; MAX_RANKS / 32],
    }
    /// Device memory, one a slot.
    Slot: 80 + MAX_RANKS / 8, lost at 80 => {
        state: u32, epoch: u32, sequence: u64, routing: u64, started: u64, closed: u32, absent: u32, bad_ids: u32,
        whole: u32, placed: u64, taken: u64, arrived: u32, begun: u32, operation: u64, lost: [u32; MAX_RANKS / 32],
    }
    /// Device memory, one a comm; the counters in the order of `Stats`.
    Shared: 280 + 4 * SMS, absent at 148 + 4 * SMS => {
        counters: [u64; 16], first_step_done: u32, records: u32, most_sms: u32, sms: u32, on_sm: [u32; SMS], pending: u32,
        absent: [u32; 1 + MAX_RANKS / 32],
    }
    Seat: SEAT, near at 80 => {
        windows: Address, control: Address, record: Address, slot: Address, shared: Address, mailboxes: u64,
        loss_masks: u64, routing: u64, rank: u32, ranks: u32, bound: u32, replays: u32,
        near: [Address; NEAR_RANKS],
    }
    Owners: 40, quotient at 36 => {
        owner: Address, place: Address, experts: u32, larger: u32, split: u32, reciprocal_larger: u32,
        reciprocal: u32, quotient: u32,
    }
    Route: ROUTE, flags at 148 => {
        owners: Owners, ids_in: Address, weights_in: Address, ids_stride: u64, weights_stride: u64, ids: Address,
        weights: Address, target_ranks: Address, target_rows: Address, rows_for: Address, pair_rows: Address, absent: Address, tokens: u32,
        topk: u32, fanout: u32, fours: u32, reciprocal: u32, flags: u32,
    }
    Blocks: 32, reserved at 28 => {
        firsts: Address, tokens: u64, topk: u32, alignment: u32, limit: u32, reserved: u32,
    }
    Side: SIDE, pitch at 40 => {
        from: Address, stride: u64, to: u64, bank: u64, bytes: u32, unit: u32, pitch: u32, reserved: u32,
    }
    Receive: RECEIVE, marks at 392 => {
        status: Address, rank_counts: Address, kept_counts: Address, expert_counts: Address, local: u32, flags: u32,
        wire_bytes: u64, rows: Address, digest: u32, tokens: u32, shape: [u32; SHAPE_WORDS], told: [i32; TOLD_RANKS],
        told_more: Address, marks: Address,
    }
    OpenParams: SEAT + 8, flags at SEAT => { seat: Seat, flags: u32, reserved: u32 }
    RouteParams: ROUTE + 16, flags at ROUTE + 12 => { route: Route, slot: Address, ranks: u32, flags: u32 }
    PushParams: PUSH, side at SEAT + ROUTE + 128 => {
        seat: Seat, route: Route, tokens: Address, token_stride: u64, to_tokens: u64, to_ids: u64, to_weights: u64,
        to_source: u64, row_base: u64, vectors: u32, piece: u32, jobs: u32, counted: u32, sides: u32, flags: u32,
        bank_rows: Address, to_places: u64, blocks: Blocks, side: [Side; SIDES],
    }
    FinishParams: FINISH, flags at SEAT + ROUTE + RECEIVE + 20 => {
        seat: Seat, route: Route, receive: Receive, summary: Address, demands: Address, limit: u32, flags: u32,
    }
    DispatchParams: PUSH + RECEIVE + 8, flags at PUSH + RECEIVE => {
        push: PushParams, receive: Receive, flags: u32, reserved: u32,
    }
    AnnounceParams: PUSH + RECEIVE + 8, its_box at PUSH + RECEIVE => { push: PushParams, receive: Receive, its_box: u64 }
    ReceiveParams: SEAT + RECEIVE + 48, vectors at SEAT + RECEIVE + 44 => {
        seat: Seat, receive: Receive, boxes: u64, box_bytes: u64, ids: Address, weights: Address, beside_bytes: u32,
        weights_at: u32, rows: u32, vectors: u32,
    }
    Counts: 16, stride at 8 => { region: u64, stride: u64 }
    PlaceParams: PLACE, flags at SEAT + ROUTE + 56 => {
        seat: Seat, route: Route, counts: Counts, kept_counts: Address, received: Address, summary: Address,
        demands: Address, room: u32, limit: u32, flags: u32, reserved: u32,
    }
    SettleParams: SETTLE, side at SEAT + 96 => {
        seat: Seat, kept_counts: Address, to_tokens: u64, to_ids: u64, to_weights: u64, to_source: u64,
        bank_tokens: u64, bank_ids: u64, bank_weights: u64, bank_source: u64, rows: u64, vectors: u32, topk: u32,
        sides: u32, flags: u32, side: [Side; SIDES],
    }
    PlaceExpertsParams: PLACE + 32 + 56, reserved at PLACE + 32 + 52 => {
        place: PlaceParams, blocks: Blocks, ends: Address, starts: Address, pairs_for: Address,
        bank_rows: Address, parts: Address, num_parts: u32, topk_bits: u32, warps: u32, reserved: u32,
    }
    SpreadParams: SETTLE + 112, reserved at SETTLE + 108 => {
        settle: SettleParams, owners: Owners, bank_places: u64, starts: Address, block_counts: Address, summary: Address,
        expert_counts: Address, expert_offsets: Address, expert_stats: Address, local: u32, topk_bits: u32, warps: u32,
        reserved: u32,
    }
    PairsParams: PAIRS + SIDE * SIDES, side at PAIRS => {
        seat: Seat, route: Route, receive: Receive, counts: Counts, tokens: Address, token_stride: u64,
        to_tokens: u64, to_weights: u64, to_source: u64, to_scales: u64, bank_tokens: u64, bank_ids: u64,
        bank_weights: u64, bank_source: u64, bank_scales: u64, own: Address, expert_stats: Address,
        expert_offsets: Address, block_counts: Address, summary: Address, bank_bytes: u64, block: u32, limit: u32, vectors: u32,
        topk_bits: u32, scale_words: u32, scale_pitch: u32, sides: u32, flags: u32, side: [Side; SIDES],
    }
    Plane: 16, unit at 12 => { bank: u64, bytes: u32, unit: u32 }
    FetchParams: SEAT + 48 + 16 * OUTS, plane at SEAT + 48 => {
        seat: Seat, counts: Counts, inboxes: Address, counts_at: u64, rows_at: u64, parts: u32, planes: u32,
        plane: [Plane; OUTS],
    }
    OrderParams: ORDER, starts at ORDER - 8 => {
        seat: Seat, owners: Owners, counts: Counts, firsts: Address, starts: Address,
    }
    ReturnParams: SEAT + 120, spread at SEAT + 116 => {
        seat: Seat, counts: Counts, firsts: Address, starts: Address, own: Address, rows: Address, stride: u64,
        weights: Address, weights_stride: u64, results: u64, brought: u64, brought_weights: u64, room: u64, local: u32,
        block: u32, vectors: u32, spread: u32,
    }
    BringParams: ORDER + 80, has_weights at ORDER + 76 => {
        order: OrderParams, inboxes: Address, results: u64, brought: u64, brought_weights: u64, ids: Address,
        pair_rows: Address, result_rows: Address, tokens: u32, topk: u32, block: u32, vectors: u32, parts: u32,
        has_weights: u32,
    }
    Out: 56, kind at 52 => {
        region: u64, to: Address, stride: u64, bytes: u32, unit: u32, pitch: u64, block_stride: u64, from_pitch: u32,
        kind: u32,
    }
    LandParams: SEAT + 112 + 56 * OUTS, out at SEAT + 112 => {
        seat: Seat, owners: Owners, kept_counts: Address, ids_region: u64, expert_counts: Address,
        expert_stats: Address, starts: Address, rows: u64, block: u32, topk: u32, outs: u32, flags: u32, splits: u32,
        blocks: u32,
        out: [Out; OUTS],
    }
    StageParams: SEAT + 88, spread at SEAT + 80 => {
        seat: Seat, kept_counts: Address, starts: Address, rows: Address, stride: u64, to_rows: u64, weights: Address,
        weights_stride: u64, to_weights: u64, vectors: u32, weight_bytes: u32, flags: u32, block: u32,
        spread: u32, units: u32,
    }
    MeetParams: MEET, marks at MEET - 8 => {
        seat: Seat, status: Address, rows_for: Address, kept_counts: Address, summary: Address, result_bytes: u64,
        staged_bytes: u64, weight_bytes: u64, shape: [u32; 4], digest: u32, tokens: u32, flags: u32, reserved: u32,
        marks: Address,
    }
    ReduceParams: MEET + 184, own at MEET + 176 => {
        meet: MeetParams, owners: Owners, target_ranks: Address, target_rows: Address, kept_counts: Address, ids: Address,
        pair_rows: Address, weights: Address, weights_stride: u64, from_rows: u64, from_weights: u64, out: Address, out_stride: u64, out_weights: Address,
        out_weights_stride: u64, row_bytes: u64, tokens: u32, fanout: u32, topk: u32, vectors: u32, splits: u32,
        flags: u32, own: Address,
    }
    Offer: OFFER, ready at OFFER - 4 => {
        route: Route, rows: Address, stride: u64, rows_for: Address, room: u32, limit: u32, vectors: u32, piece: u32,
        pieces: u32, flags: u32, ids_at: u32, weights_at: u32, source_at: u32, sides: u32, side: [Side; SIDES],
        bound: u32, beside: u32, sequences: u32, epoch: u32, live: u32, ready: u32,
    }
    Fifos: FIFOS, cursors at FIFOS - 4 => {
        states: Address, state_bytes: u64, all: Address, entries: u64, words: u64, slot_bytes: u64, entry_bytes: u64,
        counts: Counts, rows: u32, words_each: u32, slots: u32, slot: u32, stage: u32, stages: u32, senders: u32,
        cursors: u32,
    }
    StreamParams: STREAM + 56 * OUTS, out at STREAM => {
        finish: FinishParams, place: PlaceParams, fifos: Fifos, offer: Offer, owners: Owners, expert_counts: Address,
        expert_stats: Address, rows: u64, outs: u32, flags: u32, out: [Out; OUTS],
    }
    StreamResultsParams: MEET + FIFOS + OFFER + 128, reserved at MEET + FIFOS + OFFER + 124 => {
        meet: MeetParams, fifos: Fifos, offer: Offer, owners: Owners, target_ranks: Address, target_rows: Address,
        rows_for: Address, ids: Address, out: Address, out_stride: u64, out_weights: Address, out_weights_stride: u64,
        tokens: u32, fanout: u32, topk: u32, flags: u32, weights_at: u32, reserved: u32,
    }
    MarkParams: 16, marks at 8 => { slot: Address, marks: Address }
    TellParams: 16 + 4 * TELL, values at 16 => { to: Address, first: u32, count: u32, values: [i32; TELL] }
    QuantParams: 48, flags at 44 => {
        from: Address, stride: u64, to: Address, scales: Address, tokens: u32, hidden: u32, scale_bytes: u32,
        flags: u32,
    }
}

#[cfg(feature = "jitter")]
twins! {
    PoisonParams: 40, word at 36 => {
        slot: Address, to: Address, vectors: u64, routing: u64, states: u32, word: u32,
    }
}

/// Flags of the parameters, as window.cuh names them.
pub mod flag {
    pub const IDS_ARE_64: u32 = 1;
    pub const IDS_ARE_VECTORS: u32 = 2;
    pub const HAS_WEIGHTS: u32 = 4;
    pub const HAS_IDS: u32 = 8;

    pub const UNIFORM: u32 = 1;
    pub const TOLD: u32 = 2;
    pub const GATHERS: u32 = 4;

    pub const ALONE: u32 = 1;

    pub const FOLLOWS: u32 = 1;
    pub const PUBLISHES: u32 = 2;
    pub const ROUTED: u32 = 4;
    pub const PACKED: u32 = 8;

    pub const RAISES: u32 = 1;
    pub const WAITS: u32 = 2;
    pub const COUNTS: u32 = 4;
    pub const BANKED: u32 = 8;
    pub const ENDS: u32 = 16;

    pub const PAD_IDS: u32 = 1;
    pub const PAD_WEIGHTS: u32 = 2;
    pub const PAD_SOURCE: u32 = 4;

    pub const BANKS: u32 = 4;
    pub const AFTER_OPEN: u32 = 8;
    pub const FROM_ZERO: u32 = 16;
    pub const PADS_WEIGHTS: u32 = 16;
    pub const PADS_SOURCE: u32 = 32;
    pub const PAIR_POWERS: u32 = 64;
    pub const POSTED: u32 = 128;

    pub const GATHERED: u32 = 1;
    pub const ZERO_PADDING: u32 = 2;
    pub const WIDE_IDS: u32 = 4;
    pub const TOGETHER: u32 = 8;

    pub const SENDS: u32 = 1;
    pub const MEET_WAITS: u32 = 2;
    pub const EVERYONE: u32 = 4;
    pub const STAGED: u32 = 8;
    pub const SETTLES: u32 = 16;
    pub const THROUGH_FIFOS: u32 = 32;
    pub const RESULTS_POSTED: u32 = 64;

    pub const HAS_CHOICES: u32 = 1;

    pub const REDUCE_GATHERED: u32 = 1;
    pub const REDUCE_EVERYONE: u32 = 2;
    pub const ACCUMULATE: u32 = 4;
    pub const REDUCE_PACKED: u32 = 8;
    pub const REDUCE_BROUGHT: u32 = 16;
    pub const REDUCE_SUMMED: u32 = 32;

    pub const UE8M0: u32 = 4;
}

/// Of the word for a host that waits: too many rows for the rank in bits 32 to 62, which would be as bits 0 to 31 say.
pub const TOO_MANY: u64 = 1 << 63;

/// Kinds of outputs that kernels treat apart.
pub mod kind {
    pub const OTHER: u32 = 0;
    pub const TOKENS: u32 = 1;
    pub const IDS: u32 = 2;
    pub const WEIGHTS: u32 = 3;
    pub const SOURCE: u32 = 4;
    pub const IN_PLACE: u32 = 8;
}

// The mailbox that kernels know is the one of mail.rs.
const _: () = {
    assert!(
        mail::BYTES == 256 && mail::DISPATCH_PAIR == 224 && mail::COMBINE_FLAG == 8 && mail::READ_FLAG == 16
    );
    assert!(
        mail::PROGRESS == 24
            && mail::LOSS == 32
            && mail::COUNTS_FLAG == 40
            && mail::LOSS_ORIGIN == 48
            && mail::DISPATCH_SHAPE == 64
    );
    assert!(mail::COMBINE_SHAPE == 128 && mail::TOKENS == 192 && mail::REPLAYS == 196);
};
