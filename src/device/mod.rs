//! The ops that strategies are made of, behind one trait: `host` runs them on CPU memory.
//!
//! An op names what happens to rows and words, never how a strategy uses it; a backend is an order of ops. Ops of
//! one call run in the order given and see each other's results; a device that launches work may fuse them until
//! `close`. What a device decides from (sequence, state, deadlines) it keeps itself.

pub mod cuda;
pub mod grid;
pub mod host;
mod loss;
mod mail;
pub mod map;
pub mod members;
mod note;
mod order;
mod protocol;

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::config::{OverflowKind, QuantKind};
use crate::error::{Error, Result};
use grid::Grid;
pub use loss::list;
use map::{COLUMN_PAD, List, PLANES, received_bytes};
use members::Members;
use protocol::Vitals;

/// Rows in memory that the device can address, `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    ptr: *mut u8,
    rows: usize,
    row_bytes: usize,
    stride: usize,
}

// SAFETY: a plain description; whoever made it vouches for the memory during the call it is used in.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// # Safety
    /// `rows` rows of `row_bytes` bytes, `stride` apart, stay readable (and writable, for an output) until the call
    /// they are passed to returns. Overlapping outputs are the caller's loss, not a memory error.
    pub unsafe fn new(ptr: *mut u8, rows: usize, row_bytes: usize, stride: usize) -> Rows {
        Rows { ptr, rows, row_bytes, stride }
    }
    pub fn rows(&self) -> usize {
        self.rows
    }
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }
    pub fn address(&self) -> usize {
        self.ptr as usize
    }
    /// Bytes from the first row's start to the last one's end.
    pub fn span(&self) -> usize {
        self.rows.checked_sub(1).map_or(0, |last| last * self.stride + self.row_bytes)
    }
    /// Compact rows as `parts` times as many shorter ones.
    pub fn split(&self, parts: usize) -> Option<Rows> {
        let part = self.row_bytes.checked_div(parts)?;
        (self.is_compact() && part * parts == self.row_bytes).then_some(Rows {
            ptr: self.ptr,
            rows: self.rows * parts,
            row_bytes: part,
            stride: part,
        })
    }
    pub fn is_compact(&self) -> bool {
        self.stride == self.row_bytes || self.rows <= 1
    }
    /// The address of a row.
    #[inline]
    fn row(&self, row: usize) -> *mut u8 {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // Wrapping, because the offset was checked against what `new` was promised.
        self.ptr.wrapping_add(row * self.stride)
    }
}

/// Rows of 4-byte elements in memory that the device can address, the elements of a column side by side, in blocks.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    ptr: *mut u8,
    rows: usize,
    elements: usize,
    /// Rows of a block.
    block: usize,
    /// Bytes from one block, and from one column, to the next.
    block_stride: usize,
    column_stride: usize,
}

// SAFETY: a plain description, as `Rows`.
unsafe impl Send for Columns {}
// SAFETY: as above.
unsafe impl Sync for Columns {}

impl Columns {
    /// # Safety
    /// As `Rows::new`, of `blocks * block` rows of `elements` 4-byte elements.
    pub unsafe fn new(
        ptr: *mut u8,
        (blocks, block, elements): (usize, usize, usize),
        block_stride: usize,
        column_stride: usize,
    ) -> Columns {
        Columns { ptr, rows: blocks * block, elements, block: block.max(1), block_stride, column_stride }
    }
    pub fn rows(&self) -> usize {
        self.rows
    }
    pub fn elements(&self) -> usize {
        self.elements
    }
    pub fn address(&self) -> usize {
        self.ptr as usize
    }
    /// Bytes from the first element's start to the last one's end.
    pub fn span(&self) -> usize {
        match (self.rows / self.block, self.elements) {
            (0, _) | (_, 0) => 0,
            (blocks, n) => (blocks - 1) * self.block_stride + (n - 1) * self.column_stride + self.block * 4,
        }
    }
    #[inline]
    fn cell(&self, row: usize, element: usize) -> *mut u8 {
        assert!(row < self.rows && element < self.elements, "row {row} of {}", self.rows);
        let (block, row) = (row / self.block, row % self.block);
        self.ptr.wrapping_add(block * self.block_stride + element * self.column_stride + row * 4)
    }
}

/// Where the windows of all ranks lie in this process, and what keeps them there.
#[derive(Clone)]
pub struct Bases {
    windows: Vec<(*mut u8, u64)>,
    /// Ranks that are threads of this process and use the same mappings.
    local: Members,
    boxes: Option<Arc<Boxes>>,
    _keep: Arc<dyn Any + Send + Sync>,
}

/// Where couriers bring what others send to a rank, and fetch what it sends: behind the windows, as offsets have it, memory apart for
/// each peer. The other ranks' windows are its own idea of them: of what is written there, couriers carry what its peers are
/// to have.
pub struct Boxes {
    rank: u32,
    /// Where inboxes begin as offsets have it, and the bytes of each.
    start: u64,
    bytes: u64,
    /// By rank: what it sends to this one; what this one sends to it.
    inboxes: Vec<AtomicPtr<u8>>,
    outboxes: Vec<AtomicPtr<u8>>,
}

// SAFETY: memory that who made it keeps; a call has it to itself but for what couriers bring before their notes.
unsafe impl Send for Boxes {}
// SAFETY: as above.
unsafe impl Sync for Boxes {}

impl Boxes {
    /// # Safety
    /// By rank, so many bytes each, readable, writable and 128-byte aligned, for as long as what keeps the windows lives. A rank's
    /// own outbox is its inbox.
    pub unsafe fn new(
        rank: u32,
        (start, bytes): (u64, u64),
        inboxes: Vec<*mut u8>,
        outboxes: Vec<*mut u8>,
    ) -> Boxes {
        let words = |all: Vec<*mut u8>| all.into_iter().map(AtomicPtr::new).collect();
        Boxes { rank, start, bytes, inboxes: words(inboxes), outboxes: words(outboxes) }
    }
    /// Other boxes for a peer that does not take part.
    ///
    /// # Safety
    /// As `new`.
    pub unsafe fn renew(&self, peer: u32, inbox: *mut u8, outbox: *mut u8) {
        self.inboxes[peer as usize].store(inbox, Ordering::Release);
        self.outboxes[peer as usize].store(outbox, Ordering::Release);
    }
    /// A peer's, as they are: in, out.
    pub fn of(&self, peer: u32) -> (u64, u64) {
        let at = |all: &[AtomicPtr<u8>]| all[peer as usize].load(Ordering::Acquire) as u64;
        (at(&self.inboxes), at(&self.outboxes))
    }
    #[inline]
    fn at(&self, rank: u32, offset: u64, bytes: u64) -> *mut u8 {
        let (source, within) = ((offset - self.start) / self.bytes, (offset - self.start) % self.bytes);
        assert!(within + bytes <= self.bytes, "{bytes} bytes at {within} of a box of {}", self.bytes);
        let base = if rank == self.rank {
            self.inboxes[source as usize].load(Ordering::Acquire)
        } else {
            assert!(source == self.rank as u64, "rank {rank}'s inbox of rank {source}");
            self.outboxes[rank as usize].load(Ordering::Acquire)
        };
        base.wrapping_add(within as usize)
    }
}

// SAFETY: shared memory that `_keep` keeps mapped; accesses go through atomics or the protocol.
unsafe impl Send for Bases {}
// SAFETY: as above.
unsafe impl Sync for Bases {}

impl Bases {
    /// # Safety
    /// Each window is mapped, readable and writable, 128-byte aligned, for as long as `keep` lives: by the CPU if `host`
    /// runs the ops, by the GPU alone if `cuda` does, which takes addresses of it and never looks behind them.
    pub unsafe fn new(windows: Vec<(*mut u8, u64)>, keep: Arc<dyn Any + Send + Sync>) -> Bases {
        Bases { windows, local: Members::none(), boxes: None, _keep: keep }
    }
    pub fn with_boxes(self, boxes: Arc<Boxes>) -> Bases {
        Bases { boxes: Some(boxes), ..self }
    }
    pub fn shared_with(self, local: Members) -> Bases {
        Bases { local, ..self }
    }
    /// The address of `bytes` bytes at an offset of a rank's window.
    #[inline]
    fn at(&self, rank: u32, offset: u64, bytes: u64) -> *mut u8 {
        let (base, size) = self.windows[rank as usize];
        if let Some(boxes) = &self.boxes
            && offset >= boxes.start
        {
            return boxes.at(rank, offset, bytes);
        }
        assert!(offset + bytes <= size, "{bytes} bytes at {offset} of a window of {size}");
        base.wrapping_add(offset as usize)
    }
    #[inline]
    fn word(&self, rank: u32, offset: u64) -> &AtomicU64 {
        // SAFETY: in bounds, aligned (map.rs aligns words), and mapped as long as self.
        unsafe { AtomicU64::from_ptr(self.at(rank, offset, 8) as *mut u64) }
    }
    #[inline]
    fn half(&self, rank: u32, offset: u64) -> &AtomicU32 {
        // SAFETY: as `word`.
        unsafe { AtomicU32::from_ptr(self.at(rank, offset, 4) as *mut u32) }
    }
}

/// What threads beside the calling one tell a waiting device, and who may count on what of a peer.
pub struct Health {
    vitals: Vitals,
    /// Of the ranks that are gone, the ones with proof that they are dead.
    proven: Box<[AtomicBool]>,
    /// Why nobody watches the peers any more.
    blind: OnceLock<Error>,
    /// The same where kernels can see it.
    mirror: OnceLock<Mirror>,
}

/// Of a rank that is gone: its process has ended, for all that is known (`loss::why_gone`).
const ENDED: u32 = 3;

/// Words that kernels read: not 0 is true.
struct Mirror {
    aborted: *const AtomicU32,
    /// One a rank, which says why.
    dead: *const AtomicU32,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: atomics, kept by `_keep`.
unsafe impl Send for Mirror {}
// SAFETY: as above.
unsafe impl Sync for Mirror {}

impl Health {
    pub fn new(ranks: u32) -> Health {
        Health {
            vitals: Vitals::new(ranks),
            proven: (0..ranks).map(|_| AtomicBool::new(false)).collect(),
            blind: OnceLock::new(),
            mirror: OnceLock::new(),
        }
    }
    /// The user aborted this comm.
    pub fn is_aborted(&self) -> bool {
        self.vitals.is_aborted()
    }
    /// A rank is gone or dead: it takes part no more. That ends waits for it, and is no more than that: its last call may
    /// still be under way, a kernel of a destroyed comm for instance, and still write into windows.
    pub fn is_dead(&self, rank: u32) -> bool {
        self.vitals.is_dead(rank)
    }
    /// A rank's process has ended: no instruction of it will run on this machine's CPUs again. What GPUs still do for it
    /// is another matter.
    pub fn is_proven_dead(&self, rank: u32) -> bool {
        self.proven[rank as usize].load(Ordering::Acquire)
    }
    /// Why deaths of peers are no longer noticed, if they are not.
    pub fn blind(&self) -> Option<&Error> {
        self.blind.get()
    }
    pub fn abort(&self) {
        self.vitals.abort();
        self.reflect(|mirror| mirror.aborted, 1);
    }
    /// From now on nobody watches the peers.
    pub fn blinded(&self, error: Error) {
        let _ = self.blind.set(error);
    }
    /// A rank's process is proven to have ended. True if it was not known.
    pub fn died(&self, rank: u32) -> bool {
        // Who sees the proof sees the rank gone.
        self.left(rank);
        !self.proven[rank as usize].swap(true, Ordering::SeqCst)
    }
    /// A rank is there in another incarnation.
    pub fn returned(&self, rank: u32) {
        self.reflect(|mirror| mirror.dead.wrapping_add(rank as usize), 0);
        self.proven[rank as usize].store(false, Ordering::SeqCst);
        self.vitals.returned(rank);
    }
    /// A rank takes part no more. True if it was not known.
    pub fn left(&self, rank: u32) -> bool {
        self.left_because(rank, ENDED)
    }
    /// The same, for what its gone word would say.
    pub fn left_because(&self, rank: u32, why: u32) -> bool {
        let is_new = self.vitals.died(rank);
        self.reflect(|mirror| mirror.dead.wrapping_add(rank as usize), why);
        is_new
    }
    fn reflect(&self, word: impl Fn(&Mirror) -> *const AtomicU32, value: u32) {
        if let Some(mirror) = self.mirror.get() {
            // SAFETY: kept, and as many as there are ranks.
            unsafe { (*word(mirror)).store(value, Ordering::SeqCst) };
        }
    }

    /// From now on the words say the same.
    ///
    /// # Safety
    /// A word, and one for each rank, that live as long as `keep`.
    unsafe fn mirror(
        &self,
        aborted: *const AtomicU32,
        dead: *const AtomicU32,
        keep: Arc<dyn Any + Send + Sync>,
    ) {
        let _ = self.mirror.set(Mirror { aborted, dead, _keep: keep });
        // What happened before; what happens now is reflected by who does it.
        let Vitals { aborted, dead } = &self.vitals;
        if aborted.load(Ordering::SeqCst) {
            self.reflect(|mirror| mirror.aborted, 1);
        }
        for rank in (0..dead.len()).filter(|rank| dead[*rank].load(Ordering::SeqCst)) {
            self.reflect(|mirror| mirror.dead.wrapping_add(rank), ENDED);
        }
    }
}

macro_rules! stats {
    ($($name:ident),+ $(,)?) => {
        /// What a comm has moved; the fields are those of the ABI's a2a_stats_t.
        #[derive(Default)]
        pub struct Stats { $(pub $name: AtomicU64),+ }

        impl Stats {
            /// All of them, in this order.
            fn all(&self) -> impl Iterator<Item = &AtomicU64> {
                [$(&self.$name),+].into_iter()
            }
        }
    };
}
stats!(
    dispatches,
    combines,
    rows_pushed,
    bytes_pushed,
    rows_pulled,
    bytes_pulled,
    rows_gathered,
    bytes_gathered,
    rows_fifo,
    bytes_fifo,
    rows_copied,
    bytes_copied,
    bytes_remote,
    hops,
    bad_ids,
    steps_lost,
);

/// Who takes part, and for the how manieth time that has been agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership {
    pub generation: u64,
    pub members: Members,
}

impl Membership {
    /// Of a new comm.
    pub fn first(ranks: u32) -> Membership {
        Membership { generation: 1, members: Members::all(ranks) }
    }
    /// Of a rank that is alone until others take it in.
    pub fn alone(rank: u32) -> Membership {
        Membership { generation: 0, members: [rank].into_iter().collect() }
    }
}

/// How a rank stands when it is to recover.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Ranks that were given up on, by this one or by who told it.
    pub given_up: Members,
    /// By slot: the last step that is whole on this rank.
    pub whole: Vec<u64>,
}

/// The four halves of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    DispatchSend,
    DispatchRecv,
    CombineSend,
    CombineRecv,
}

impl Half {
    pub fn operation(self) -> &'static str {
        match self {
            Half::DispatchSend | Half::DispatchRecv => "dispatch",
            Half::CombineSend | Half::CombineRecv => "combine",
        }
    }
}

/// A CUDA stream, as the caller has it; means nothing on the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Stream(*mut std::ffi::c_void);

// SAFETY: a handle; whoever made it vouches for it during the call.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// # Safety
    /// NULL (the legacy default stream), or a stream of the comm's device that lives until the work of the calls it is
    /// passed to has ended. Anything if the comm is on the CPU.
    pub unsafe fn new(handle: *mut std::ffi::c_void) -> Stream {
        Stream(handle)
    }
    /// For what launches nothing.
    pub fn none() -> Stream {
        Stream(std::ptr::null_mut())
    }
    pub fn raw(self) -> *mut std::ffi::c_void {
        self.0
    }
}

/// One call's use of a slot.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub slot: u32,
    pub stream: Stream,
    /// The host waits for the call's outcome.
    pub host_waits: bool,
    /// Multiprocessors that its kernels may use; 0: all.
    pub max_sms: u32,
    /// The routing, by a number that is never used twice.
    pub routing: u64,
    /// One deadline covers all waits of a call.
    pub started: Instant,
    pub budget: Duration,
}

/// The row shapes of a dispatch: equal on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Shape {
    pub bound: u32,
    /// 0: no ids.
    pub topk: u32,
    /// DLPack type of the tokens: code | bits << 8 | lanes << 16.
    pub token_type: u32,
    pub plane_bytes: [u32; PLANES],
}

impl Shape {
    pub const WORDS: usize = 3 + PLANES;

    fn words(&self) -> [u32; Shape::WORDS] {
        let mut words = [0; Shape::WORDS];
        words[0] = self.bound;
        words[1] = self.topk;
        words[2] = self.token_type;
        words[3..].copy_from_slice(&self.plane_bytes);
        words
    }
    /// The user's name for a word.
    fn name(word: usize) -> String {
        match word {
            0 => "max_tokens (the step's bound)".into(),
            1 => "top-k".into(),
            2 => "the element type of tokens (DLPack code | bits << 8 | lanes << 16)".into(),
            3 => "the row bytes of tokens".into(),
            4 => "the row bytes of topk_ids".into(),
            5 => "the row bytes of topk_weights".into(),
            7 => "the row bytes of scales".into(),
            _ => format!("the row bytes of extras[{}]", word.saturating_sub(8)),
        }
    }
}

/// Element types that combine sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    Bf16,
    F16,
    F32,
}

impl Float {
    pub fn bytes(self) -> usize {
        if self == Float::F32 { 4 } else { 2 }
    }
}

/// Where received rows of a plane go.
#[derive(Clone, Copy, Debug, Default)]
pub enum Target {
    /// Not wanted.
    #[default]
    Nothing,
    /// They stay in the slot.
    View,
    /// Into the caller's tensor.
    Into(Rows),
    /// Into the caller's tensor of scales that lie by column.
    Columns(Columns),
}

impl Target {
    pub fn is_callers(&self) -> bool {
        matches!(self, Target::Into(_) | Target::Columns(_))
    }
}

/// What a rank sends in a dispatch.
#[derive(Clone, Copy)]
pub struct Outbound {
    pub shape: Shape,
    pub tokens: u32,
    /// This rank's rows; absent weights are ones. Ids and weights are read by `route` alone.
    pub planes: [Option<Rows>; PLANES],
    /// Tokens of this type are quantised on their way.
    pub quant: Option<(Float, QuantKind)>,
}

impl Outbound {
    /// Bytes of a token's row on its way, all planes together.
    pub fn wire_bytes(&self) -> u64 {
        self.shape.plane_bytes.iter().map(|bytes| *bytes as u64).sum()
    }
}

/// A dispatch, both halves.
pub struct Dispatch<'a> {
    pub call: Call,
    pub memory: &'a Arc<Block>,
    pub grid: Grid,
    pub overflow: OverflowKind,
    /// SEND must not wait: the halves are calls of their own.
    pub split: bool,
    /// The routing is as its last dispatch left it.
    pub reuse: bool,
    pub send: Outbound,
    pub ids_are_64: bool,
    /// Every rank's tokens, as this rank was told.
    pub rank_tokens: Option<&'a [i32]>,
    pub uniform: bool,
    pub recv: [Target; PLANES],
    pub ids_out_are_64: bool,
    /// Scales lie by column.
    pub columns: bool,
    pub expert_counts: Target,
    pub expert_offsets: Target,
    pub rank_counts: Target,
    pub status: Target,
    /// int64, added to.
    pub expert_stats: Option<Rows>,
    /// Rows of the outputs, padding included.
    pub capacity: u32,
    pub zero_padding: bool,
}

impl Dispatch<'_> {
    /// Bytes of a row of the outputs.
    pub fn row_bytes(&self, plane: usize) -> usize {
        received_bytes(self.grid.layout, plane, self.send.shape.plane_bytes[plane]) as usize
    }
}

/// How scales lie by column in the outputs of a rank: (blocks, rows of each, rows from column to column).
pub fn column_shape(grid: &Grid, local: u32, capacity: u64) -> (u64, u64, u64) {
    let (blocks, block) = match grid.block() {
        Some(block) => (grid.blocks(local) as u64, block),
        None => (1, capacity),
    };
    (blocks, block, block.next_multiple_of(COLUMN_PAD))
}

/// Whose weights a combine multiplies with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weighting {
    /// Nobody's.
    #[default]
    None,
    /// Those of the dispatch.
    Dispatched,
    /// Those given to the combine.
    Given,
}

/// A combine, both halves.
pub struct Combine<'a> {
    pub call: Call,
    pub memory: &'a Arc<Block>,
    /// The halves are calls of their own.
    pub split: bool,
    /// Of the dispatch.
    pub grid: Grid,
    pub tokens: u32,
    /// Gathered without ids: every rank has a result for every token.
    pub everyone: bool,
    /// Every rank's tokens, as this rank was told.
    pub rank_tokens: Option<&'a [i32]>,
    /// The experts' rows; `None` if they stand in the combine rows already.
    pub send: Option<Rows>,
    pub send_type: Float,
    pub hidden: u32,
    pub weighting: Weighting,
    /// [T, K] float32.
    pub weights: Option<Rows>,
    /// One float32 for each expert of each row, on its way back.
    pub row_weights: Option<Rows>,
    /// Every rank sends such values.
    pub has_row_weights: bool,
    pub out: Option<Rows>,
    pub out_type: Float,
    /// [T, K] float32: where the values that came back go.
    pub out_weights: Option<Rows>,
    pub accumulate: bool,
    /// What carries the rows may sum them, in its own way.
    pub wire_sums: bool,
    pub status: Target,
}

impl Combine<'_> {
    /// Bytes of a row of `row_weights`.
    pub fn weight_bytes(&self) -> usize {
        if self.grid.layout.by_expert() { 4 } else { self.grid.topk as usize * 4 }
    }
}

/// Private device memory.
pub struct Block {
    ptr: *mut u8,
    bytes: usize,
    /// Frees it, or owns what does; runs once, on drop.
    free: Option<Box<dyn FnOnce(*mut u8, usize) + Send + Sync>>,
}

// SAFETY: owned memory; access is serialised by the comm's lock.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// The address of a list.
    #[inline]
    fn list(&self, list: List) -> *mut i32 {
        assert!(list.offset as usize + list.len * 4 <= self.bytes);
        self.ptr.wrapping_add(list.offset as usize) as *mut i32
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(free) = self.free.take() {
            free(self.ptr, self.bytes);
        }
    }
}

/// Bytes that collectives move, the same kinds in the same order on every rank.
#[derive(Clone, Copy, Debug)]
pub enum Move {
    /// This rank's rows to all, which have every rank's, one behind the other.
    Gather { from: u64, to: u64, row_bytes: u64 },
    /// This rank's words, and what lies behind them, to all: in place, rank after rank.
    Words { at: u64, bytes: u64 },
    /// The same, by a message to each.
    Tell { at: u64, bytes: u64 },
    /// To each rank the rows that are its own, of rows of all ranks, one behind the other; from each this rank's, `apart` bytes
    /// from one rank's to the next's. `own`: this rank's too.
    Scatter { from: u64, to: u64, row_bytes: u64, apart: u64, own: bool },
    /// To each rank the sums of the rows that are its own, of everybody's rows of all ranks, one behind the other.
    Sum { from: u64, to: u64, row_bytes: u64, float: Float },
}

/// How many rows each rank has.
#[derive(Clone, Copy, Debug)]
pub enum Counts<'a> {
    Equal(u32),
    Each(&'a [i32]),
}

impl Counts<'_> {
    pub fn of(&self, rank: u32) -> u64 {
        match self {
            Counts::Equal(rows) => *rows as u64,
            Counts::Each(rows) => rows[rank as usize] as u64,
        }
    }
    /// The rows of each, if they are as many.
    pub fn equal(&self) -> Option<u64> {
        match self {
            Counts::Equal(rows) => Some(*rows as u64),
            Counts::Each(rows) => rows.iter().all(|count| *count == rows[0]).then(|| rows[0] as u64),
        }
    }
    /// The most that any has.
    pub fn most(&self) -> u64 {
        match self {
            Counts::Equal(rows) => *rows as u64,
            Counts::Each(rows) => rows.iter().copied().max().unwrap_or(0) as u64,
        }
    }
    pub fn own(&self) -> OwnCounts {
        match self {
            Counts::Equal(rows) => OwnCounts::Equal(*rows),
            Counts::Each(rows) => OwnCounts::Each(rows.to_vec()),
        }
    }
    /// The rows of the ranks before one.
    pub fn before(&self, rank: u32) -> u64 {
        match self {
            Counts::Equal(rows) => *rows as u64 * rank as u64,
            Counts::Each(rows) => rows[..rank as usize].iter().map(|rows| *rows as u64).sum(),
        }
    }
}

/// The same, for who outlasts the call.
pub enum OwnCounts {
    Equal(u32),
    Each(Vec<i32>),
}

impl OwnCounts {
    pub fn lent(&self) -> Counts<'_> {
        match self {
            OwnCounts::Equal(rows) => Counts::Equal(*rows),
            OwnCounts::Each(rows) => Counts::Each(rows),
        }
    }
}

/// What carries rows where no window reaches.
pub trait Wire: Send + Sync {
    /// Puts one operation of all moves on the stream, whose context is current. Where peers have to connect for it, it waits for
    /// them, no longer than the deadline.
    fn carry(
        &self,
        slot: u32,
        moves: &[Move],
        counts: Counts,
        stream: Stream,
        deadline: Instant,
    ) -> Result<()>;
    /// Why it carries no more, where the slots' records do not say it.
    fn failure(&self) -> Option<Error>;
    /// Carries nothing more: what is under way ends without its peers.
    fn cut(&self);
}

/// What a rank hears of the others.
pub enum Heard<'a> {
    Note(u32, &'a [u8]),
    /// It can be reached no more.
    Lost(u32),
}

/// What became of a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    Now,
    /// It is of a later generation: it is to be handed over again.
    Later,
}

/// Bytes of this rank's memory, and where they go in its inbox at a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parcel {
    pub from: u64,
    pub within: u64,
    pub bytes: u64,
}

/// What carries bytes and notes to peers whose windows nobody here addresses.
pub trait Post: Send + Sync {
    /// Starts to carry parcels to a peer, and a note behind them. A lane carries one thing at a time. To a rank that is lost
    /// nothing is carried.
    fn send(&self, peer: u32, lane: u32, parcels: &[Parcel], note: &[u8]) -> Result<()>;
    /// What is under way to a rank is not told of any more: what it reads may change.
    fn abandon(&self, peer: u32);
    /// Sends a note to a rank once all else that was sent to it has been delivered.
    fn send_last(&self, peer: u32, note: &[u8]);
    /// Drives what is under way, and hands over what has been heard.
    fn poll(&self, hear: &mut dyn FnMut(Heard) -> Taken) -> Result<()>;
    /// True if what was sent last on a lane may still be read, or has not been told of.
    fn is_under_way(&self, peer: u32, lane: u32) -> bool;
    /// The rank is elsewhere until it calls again: what is under way goes on by itself.
    fn rest(&self);
}

/// The ops.
pub trait Device: Send + Sync {
    /// Private memory for a routing of a slot, zeroed when it is first used.
    fn alloc(&self, slot: u32, bytes: u64) -> Result<Block>;
    /// The address of the slot's received rows, small outputs and combine rows, for views.
    fn view(&self, slot: u32, region: Region) -> usize;

    /// True if any of the bytes lie in this rank's own window.
    fn is_inside(&self, address: usize, bytes: usize) -> bool;

    /// What `open` would refuse, without beginning anything: asked before a call's other arguments are looked at.
    fn check(&self, call: &Call, half: Half) -> Result<()>;
    /// Begins a half of a step: refuses one that the slot's state does not allow, or a closed slot. A dispatch that
    /// follows a dispatch first waits until every rank has read the former one.
    fn open(&self, call: &Call, half: Half) -> Result<()>;
    /// True if the host sees every step of the slot: none of them was captured, to be replayed without it.
    fn sees_steps(&self, slot: u32) -> bool;
    /// Ends a half that `open` began.
    fn close(&self, call: &Call, half: Half);
    /// Ends a half that failed after `open` began it: what other slots count on is done.
    fn fail(&self, call: &Call);

    /// Decides for each token which ranks (and experts) get it and at which position among this rank's rows there.
    fn route(&self, d: &Dispatch) -> Result<()>;
    /// For a routing that is replayed: keeps new weights, if they came.
    fn renew(&self, d: &Dispatch) -> Result<()>;
    /// Tells every rank how many rows this rank has for each key.
    fn tell_counts(&self, d: &Dispatch) -> Result<()>;
    /// Waits until every rank has told its counts.
    fn wait_counts(&self, d: &Dispatch) -> Result<()>;
    /// Makes places of everybody's counts: where this rank's rows go, where the received ones lie. Refuses the step on
    /// every rank alike if any would receive too many and none may be dropped.
    fn place_rows(&self, d: &Dispatch) -> Result<()>;
    /// Stores each row into the window of its rank, in its place.
    fn push_rows(&self, d: &Dispatch) -> Result<()>;
    /// Stores each token once into the window of each of its ranks, in the place of the first of its rows there; what
    /// the others are made of goes into this rank's bank.
    fn push_first_rows(&self, d: &Dispatch) -> Result<()>;
    /// Stores each token once into this rank's bank in the window of each of its ranks.
    fn push_banks(&self, d: &Dispatch) -> Result<()>;
    /// Copies this rank's rows to where every rank can read them.
    fn publish_rows(&self, d: &Dispatch) -> Result<()>;
    /// Keeps in mind which rows to send through the FIFOs.
    fn offer_rows(&self, d: &Dispatch) -> Result<()>;
    /// Tells every rank that this rank's rows (and how many for it) are in place, or in its bank, or on offer.
    fn signal_dispatch(&self, d: &Dispatch) -> Result<()>;
    /// Waits until every rank has signalled its dispatch, checks that shapes agree.
    fn wait_dispatch(&self, d: &Dispatch) -> Result<()>;
    /// Brings pushed rows to their places and into the caller's tensors, as far as they are not there.
    fn land_rows(&self, d: &Dispatch) -> Result<()>;
    /// Reads every rank's published rows, in rank order.
    fn gather_rows(&self, d: &Dispatch) -> Result<()>;
    /// Sends this rank's rows through the FIFOs while it takes the others' out of them.
    fn stream_rows(&self, d: &Dispatch) -> Result<()>;
    /// Writes the padding and the small outputs.
    fn settle_rows(&self, d: &Dispatch) -> Result<()>;

    /// Stores each of the experts' rows for the rank whose token it is, and keeps the weights that were given.
    fn return_rows(&self, c: &Combine) -> Result<()>;
    /// Copies the experts' rows to where every rank can read them, and keeps the weights that were given.
    fn stage_rows(&self, c: &Combine) -> Result<()>;
    /// Keeps in mind which results to send through the FIFOs.
    fn offer_results(&self, c: &Combine) -> Result<()>;
    /// Tells every rank that results are in place or on offer, and that the dispatched rows have been read.
    fn signal_combine(&self, c: &Combine) -> Result<()>;
    /// Waits until every rank has signalled its combine, checks that shapes agree.
    fn wait_combine(&self, c: &Combine) -> Result<()>;
    /// Sums each token's results, rank or k ascending.
    fn reduce_rows(&self, c: &Combine) -> Result<()>;
    /// Sends this rank's results through the FIFOs while it takes the others' out of them and sums them.
    fn stream_results(&self, c: &Combine) -> Result<()>;

    /// The rows a received dispatch brought: the one op that the host waits for.
    fn received_rows(&self, d: &Dispatch) -> Result<u64>;
    /// Writes the status of a void step.
    fn void_status(&self, target: Target, slot: u32, lost: &[u32]);

    /// The first failure of any step.
    fn async_error(&self) -> Option<Error>;
    fn stats(&self) -> &Stats;
    /// How long calls wait for peers from now on.
    fn set_timeout(&self, first_step: Duration, step: Duration);
    /// Tells every peer that this rank takes part no more. Never waits.
    fn leave(&self, aborted: bool);

    fn membership(&self) -> Membership;
    /// A slot in the middle of a step, if there is one.
    fn busy_slot(&self) -> Option<u32>;
    /// Closes every slot that is open, and ends this rank's work in windows. Returns what it knows of the slots' steps and
    /// of lost ranks.
    fn suspend(&self, why: &Error) -> Result<Standing>;
    /// True if a rank makes no more calls: its process ended, or its comm was destroyed or aborted.
    fn has_left(&self, peer: u32) -> bool;
    /// True if no window can be read or written by a rank any more, whatever it was at.
    fn cannot_touch(&self, peer: u32) -> bool;
    /// The rank that went on without this one, if any did.
    fn left_behind_by(&self) -> Option<u32>;
    /// Tells a rank that this one goes on without it.
    fn leave_behind(&self, lost: u32);
    /// What this rank goes on with among these members, all slots idle. Its own window is in its first state; the
    /// others' are not looked at. `self` is not used again.
    fn recovered(self: Arc<Self>, membership: Membership) -> Result<Arc<dyn Device>>;
    /// True if a rank that takes no part might still use the windows by the same mappings as this one, so that they cannot be
    /// replaced.
    fn shares_mappings(&self, peer: u32) -> bool;
}

/// What a view can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    Plane(usize),
    ExpertCounts,
    ExpertOffsets,
    RankCounts,
    Status,
    Combine,
}
