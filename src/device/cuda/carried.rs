//! Steps whose rows and words are carried by collectives, where windows are not addressed by peers.
//!
//! The window of every rank that kernels know of is this rank's own, so that what they leave there for the peers lies in one
//! place: what travels beside the tokens, and this rank's words (a2a_announce). One operation carries it to all, with the rows, and
//! the half behind it (a2a_receive) finds every flag up, or that the host has ended the operation (`Lookout::break_off`). Tokens go
//! from the caller's tensor to where they are wanted; what must be made or copied first lies in the published rows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dispatch::unit;
use super::driver::Launch;
use super::params::{AnnounceParams, MarkParams, ReceiveParams};
use super::{CallersStream, Cuda, lock, within};
use crate::device::map::{BOXED_BYTES, IDS, PLANES, SCALES, SOURCE, TOKENS, WEIGHTS};
use crate::device::{Call, Combine, Counts, Dispatch, Move, Rows, Target, Wire, mail};
use crate::error::{Error, Result, Status};

/// Threads of a block of a2a_announce, and tokens that it takes: one a warp, but where one block takes them all.
const ANNOUNCE_THREADS: u32 = 512;
const ANNOUNCE_TOKENS: u32 = 16;
const ANNOUNCED_BY_ONE: u32 = 64;
const RECEIVE_THREADS: u32 = 256;

/// The most moves of a step: every plane but the source, and the words.
const MOVES: usize = PLANES;

/// Moves, without a list on the heap.
struct Moves {
    moves: [Move; MOVES],
    count: usize,
}

impl Moves {
    fn new(first: Move) -> Moves {
        Moves { moves: [first; MOVES], count: 1 }
    }
    fn push(&mut self, one: Move) {
        self.moves[self.count] = one;
        self.count += 1;
    }
}

/// A rank's words of a dispatch and, where those of all ranks are few, its ids and weights: one collective less for each, which
/// would take 1 to 2 us (an H100).
#[derive(Clone, Copy)]
struct Boxes {
    /// In the window, of rank 0's; of a rank's.
    at: u64,
    bytes: u64,
    /// Of the ids, and of the weights; 0: they are not there.
    beside: u32,
}

impl Boxes {
    fn own(&self, rank: u32) -> u64 {
        self.at + rank as u64 * self.bytes
    }
    /// From a box to its weights.
    fn weights_at(&self) -> u64 {
        mail::BYTES + (self.beside as u64).next_multiple_of(16)
    }
}

fn counts<'a>(told: Option<&'a [i32]>, own: u32) -> Counts<'a> {
    told.map_or(Counts::Equal(own), Counts::Each)
}

/// Rows that lie one behind the other.
fn compact(rows: &Rows) -> Option<u64> {
    rows.is_compact().then_some(rows.ptr as u64)
}

impl Cuda {
    pub(super) fn is_carried(&self) -> bool {
        self.map.sizes.uses.carried
    }

    /// A dispatch, or either half of it.
    pub(super) fn launch_carried(
        &self,
        wire: &Arc<dyn Wire>,
        d: &Dispatch,
        sends: bool,
        waits: bool,
    ) -> Result<()> {
        if sends {
            if let Some((from, quant)) = d.send.quant {
                self.quantise(d, from, quant)?;
            }
            self.launch_announce(d)?;
            self.carry_rows(wire, d)?;
        }
        if waits { self.launch_arrival(d) } else { Ok(()) }
    }

    /// By nothing but what all ranks have alike.
    fn boxes(&self, d: &Dispatch) -> Boxes {
        let (slot, bytes) = (d.call.slot, d.send.shape.plane_bytes);
        let tokens = counts(d.rank_tokens, d.send.tokens).equal().unwrap_or(0);
        let beside = tokens * bytes[IDS] as u64;
        let room = 2 * beside.next_multiple_of(16);
        if beside == 0 || bytes[IDS] != bytes[WEIGHTS] || room * self.ranks as u64 > BOXED_BYTES {
            return Boxes { at: self.map.mailbox(slot, 0), bytes: mail::BYTES, beside: 0 };
        }
        Boxes { at: self.map.boxes(slot), bytes: mail::BYTES + room, beside: beside as u32 }
    }

    /// Ids, weights and what else does not go as it is, and this rank's words.
    fn launch_announce(&self, d: &Dispatch) -> Result<()> {
        let opens = lock(&self.slots[d.call.slot as usize]).opens;
        // What this carries into memory must be there before any of the kernels that overlap.
        let receive = self.receive_params(d)?;
        if opens {
            self.launch_open(d)?;
        }
        let mut push = self.push_params(d, opens, false)?;
        let boxes = self.boxes(d);
        let its_box = boxes.own(self.rank);
        if boxes.beside > 0 {
            (push.to_ids, push.to_weights) = (its_box + mail::BYTES, its_box + boxes.weights_at());
        }
        let params = AnnounceParams { push, receive, its_box };
        let blocks = match d.send.tokens {
            ..=ANNOUNCED_BY_ONE => 1,
            tokens => tokens.div_ceil(ANNOUNCE_TOKENS).min(self.station.sms()),
        };
        let shape = Launch {
            grid: within(&d.call, blocks),
            block: ANNOUNCE_THREADS,
            after_previous: true,
            ..Launch::default()
        };
        // SAFETY: the caller's rows, which comm checked, the routing's memory, this rank's own window.
        unsafe { self.launch(&self.station.kernels.announce, shape, &d.call, &params) }
    }

    /// What came of the collective.
    fn launch_arrival(&self, d: &Dispatch) -> Result<()> {
        let (boxes, counts) = (self.boxes(d), counts(d.rank_tokens, d.send.tokens));
        let (ids, weights) = (self.brought_to(d, IDS), self.brought_to(d, WEIGHTS));
        let params = ReceiveParams {
            seat: self.seat(&d.call, d.grid.bound, d.reuse),
            receive: self.receive_params(d)?,
            boxes: boxes.at,
            box_bytes: boxes.bytes,
            ids,
            weights,
            beside_bytes: boxes.beside,
            weights_at: boxes.weights_at() as u32,
            rows: counts.before(self.ranks) as u32,
            vectors: u32::from(unit(&[ids, weights, boxes.beside as u64]) == 16),
        };
        let shape = Launch { grid: 1, block: RECEIVE_THREADS, after_previous: true, ..Launch::default() };
        // SAFETY: this rank's own window, the caller's outputs, which comm checked, and the routing's memory.
        unsafe { self.launch(&self.station.kernels.receive, shape, &d.call, &params) }
    }

    /// Collective: a first operation of each kind on every slot, for which peers connect. No step has to wait for that.
    pub fn warm_up(&self, deadline: Instant) -> Result<()> {
        let Some(wire) = &self.wire else { return Ok(()) };
        // Nobody watches yet: who gives up ends what is under way.
        self.connect(wire, deadline)
            .inspect_err(|_| wire.cut())
            .map_err(|e| e.context(format!("rank {}", self.rank)))
    }

    fn connect(&self, wire: &Arc<dyn Wire>, deadline: Instant) -> Result<()> {
        let row_bytes = 16;
        let raw = self.station.stream.raw();
        // SAFETY: the process's own stream, which lives as long as this.
        let stream = unsafe { CallersStream::new(raw.handle()) };
        let uneven: Vec<i32> = (0..self.ranks as i32).map(|rank| rank % 2).collect();
        let _entered = self.station.context.enter()?;
        for slot in 0..self.map.sizes.slots {
            let region = |offset| self.own(offset);
            let to = region(self.map.received(slot, TOKENS));
            let gather = Move::Gather { from: region(self.map.published(slot, TOKENS)), to, row_bytes };
            let brought = region(self.map.brought(slot));
            let scatter = Move::Scatter { from: to, to: brought, row_bytes, apart: row_bytes, own: true };
            wire.carry(slot, &[gather, scatter], Counts::Equal(1), stream, deadline)?;
            wire.carry(slot, &[gather], Counts::Each(&uneven), stream, deadline)?;
        }
        while !raw.is_idle()? {
            if Instant::now() >= deadline {
                let text = "not every rank took part in the first collectives in time";
                return Err(Error::new(Status::Timeout, text));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Where a plane's rows lie one behind the other without a kernel's help; ids and weights never do.
    pub(super) fn goes_as_it_is(&self, d: &Dispatch, plane: usize) -> Option<u64> {
        let (from, stride) = self.source(d, plane);
        let bytes = d.send.shape.plane_bytes[plane] as u64;
        let lies = stride == bytes || d.send.tokens <= 1;
        (lies && !matches!(plane, IDS | WEIGHTS)).then_some(from)
    }

    /// Where everybody's rows of a plane are brought: to the caller if they can be.
    pub(super) fn brought_to(&self, d: &Dispatch, plane: usize) -> u64 {
        let slot = d.call.slot;
        if plane == SCALES && d.columns {
            return self.own(self.map.brought_scales(slot));
        }
        match &d.recv[plane] {
            // Ids may be wanted wider, or counted.
            Target::Into(rows)
                if !d.split
                    && rows.row_bytes() == d.row_bytes(plane)
                    && !(plane == IDS && self.counts_ids(d)) =>
            {
                compact(rows).unwrap_or_else(|| self.own(self.map.received(slot, plane)))
            }
            _ => self.own(self.map.received(slot, plane)),
        }
    }

    /// If tokens are counted by expert, for which their ids are read once more.
    fn counts_ids(&self, d: &Dispatch) -> bool {
        d.expert_stats.is_some() || !matches!(d.expert_counts, Target::Nothing)
    }

    fn carry_rows(&self, wire: &Arc<dyn Wire>, d: &Dispatch) -> Result<()> {
        let slot = d.call.slot;
        // Tokens that are far apart are published by a copy.
        if let (None, Some(rows)) = (self.goes_as_it_is(d, TOKENS), &d.send.planes[TOKENS]) {
            let (bytes, to) = (rows.row_bytes(), self.own(self.map.published(slot, TOKENS)));
            let _entered = self.station.context.enter()?;
            // SAFETY: the caller's rows, which comm checked, and room for the most there can be.
            unsafe {
                self.stream_of(d.call.stream).copy_rows(
                    (to, bytes),
                    (rows.ptr as u64, rows.stride),
                    bytes,
                    rows.rows,
                )?;
            }
        }
        let boxes = self.boxes(d);
        let mut moves = Moves::new(Move::Words { at: self.own(boxes.at), bytes: boxes.bytes });
        for (plane, bytes) in d.send.shape.plane_bytes.iter().enumerate() {
            let is_boxed = boxes.beside > 0 && matches!(plane, IDS | WEIGHTS);
            if *bytes == 0 || plane == SOURCE || is_boxed {
                continue;
            }
            let from =
                self.goes_as_it_is(d, plane).unwrap_or_else(|| self.own(self.map.published(slot, plane)));
            moves.push(Move::Gather { from, to: self.brought_to(d, plane), row_bytes: *bytes as u64 });
        }
        self.carry(wire, &d.call, &moves, counts(d.rank_tokens, d.send.tokens), d.split)
    }

    /// One operation. The kernel before it told the host that it is under way, the half behind it tells that it has ended; if
    /// that comes later, another kernel does.
    fn carry(
        &self,
        wire: &Arc<dyn Wire>,
        call: &Call,
        moves: &Moves,
        counts: Counts,
        split: bool,
    ) -> Result<()> {
        {
            let _entered = self.station.context.enter()?;
            let moves = &moves.moves[..moves.count];
            wire.carry(call.slot, moves, counts, call.stream, call.started + call.budget)
                .map_err(|e| e.context(format!("rank {}", self.rank)))?;
        }
        if !split {
            return Ok(());
        }
        let params = MarkParams { slot: self.slot_of(call.slot), marks: self.marks(call.slot) };
        let shape = Launch { grid: 1, block: 32, ..Launch::default() };
        // SAFETY: a slot's state, and its words of the pinned memory.
        unsafe { self.launch(&self.station.kernels.mark, shape, call, &params) }
    }

    /// The experts' rows, one behind the other: the caller's, or copied into the combine rows.
    fn results(&self, c: &Combine) -> u64 {
        match c.send.as_ref().filter(|_| !self.copies_results(c)) {
            Some(rows) => rows.ptr as u64,
            None => self.own(self.map.combine(c.call.slot)),
        }
    }

    /// If the experts' rows are to be copied first: those that are far apart, and those that must outlast the call.
    pub(super) fn copies_results(&self, c: &Combine) -> bool {
        c.send.is_some_and(|rows| c.split || !rows.is_compact())
    }

    /// What is summed first of this rank's tokens: its own results, or the sums.
    pub(super) fn own_results(&self, c: &Combine) -> u64 {
        if c.wire_sums {
            return self.own(self.map.brought(c.call.slot));
        }
        let before = counts(c.rank_tokens, c.tokens).before(self.rank);
        self.results(c) + before * Self::result_bytes(c)
    }

    /// The caller's output, if sums that are brought can go there as they are.
    pub(super) fn takes_sums(&self, c: &Combine) -> Option<u64> {
        let out = c.out.as_ref().filter(|out| c.wire_sums && !c.split && !c.accumulate && out.is_compact());
        out.filter(|_| c.out_type == c.send_type).map(|out| out.ptr as u64)
    }

    pub(super) fn carry_results(&self, wire: &Arc<dyn Wire>, c: &Combine) -> Result<()> {
        let (slot, bound) = (c.call.slot, c.grid.bound as u64);
        let (from, row_bytes) = (self.results(c), Self::result_bytes(c));
        let brought = self.own(self.map.brought(slot));
        // What goes by messages goes by messages alone (an H100: 20 us less where rows are many).
        let (at, bytes) = (self.own(self.map.mailbox(slot, 0)), mail::BYTES);
        let mut moves =
            Moves::new(if c.wire_sums { Move::Words { at, bytes } } else { Move::Tell { at, bytes } });
        moves.push(match c.wire_sums {
            true => {
                Move::Sum { from, to: self.takes_sums(c).unwrap_or(brought), row_bytes, float: c.send_type }
            }
            false => Move::Scatter { from, to: brought, row_bytes, apart: bound * row_bytes, own: false },
        });
        if c.has_row_weights {
            let from = self.own(self.map.combine_weights(slot));
            let (to, row_bytes) = (self.own(self.map.brought_weights(slot)), c.weight_bytes() as u64);
            moves.push(Move::Scatter { from, to, row_bytes, apart: bound * row_bytes, own: true });
        }
        self.carry(wire, &c.call, &moves, counts(c.rank_tokens, c.tokens), c.split)
    }
}
