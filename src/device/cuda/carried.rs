//! Steps whose rows and words are carried by collectives, where windows are not addressed by peers.
//!
//! Kernels do what they do beside windows, half by half: the window of every rank that they know of is this rank's own, so
//! that what they leave there for the peers lies in one place. One operation carries it to all, with the rows, and the half
//! behind it finds every flag up, or that the host has ended the operation (`Control::broken`). Tokens go from the caller's
//! tensor to where they are wanted; what must be made or copied first lies in the published rows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::driver::Launch;
use super::params::MarkParams;
use super::{CallersStream, Cuda};
use crate::device::map::{IDS, PLANES, SCALES, SOURCE, TOKENS, WEIGHTS};
use crate::device::{Call, Combine, Counts, Dispatch, Move, Rows, Target, Wire, mail};
use crate::error::{Error, Result, Status};

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
            self.launch_dispatch(d, false)?;
            self.carry_rows(wire, d)?;
        }
        if waits { self.launch_receive(d) } else { Ok(()) }
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
            // The ids are read once more, and may be wanted wider.
            Target::Into(rows) if !d.split && plane != IDS && rows.row_bytes() == d.row_bytes(plane) => {
                compact(rows).unwrap_or_else(|| self.own(self.map.received(slot, plane)))
            }
            _ => self.own(self.map.received(slot, plane)),
        }
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
        let mut moves = Moves::new(self.words(&d.call));
        for (plane, bytes) in d.send.shape.plane_bytes.iter().enumerate() {
            if *bytes == 0 || plane == SOURCE {
                continue;
            }
            let from =
                self.goes_as_it_is(d, plane).unwrap_or_else(|| self.own(self.map.published(slot, plane)));
            moves.push(Move::Gather { from, to: self.brought_to(d, plane), row_bytes: *bytes as u64 });
        }
        self.carry(wire, &d.call, &moves, counts(d.rank_tokens, d.send.tokens))
    }

    /// What this rank's kernels left for the peers.
    fn words(&self, call: &Call) -> Move {
        Move::Words { at: self.own(self.map.mailbox(call.slot, 0)), bytes: mail::BYTES }
    }

    /// One operation, between marks by which the host sees how long it takes.
    fn carry(&self, wire: &Arc<dyn Wire>, call: &Call, moves: &Moves, counts: Counts) -> Result<()> {
        self.mark(call, 0)?;
        {
            let _entered = self.station.context.enter()?;
            let moves = &moves.moves[..moves.count];
            wire.carry(call.slot, moves, counts, call.stream, call.started + call.budget)
                .map_err(|e| e.context(format!("rank {}", self.rank)))?;
        }
        self.mark(call, 1)
    }

    fn mark(&self, call: &Call, end: usize) -> Result<()> {
        let params = MarkParams {
            slot: self.slot_of(call.slot),
            to: self.pinned.address() + (self.flight_words(call.slot) + end * 8) as u64,
        };
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

    /// This rank's results for its own tokens.
    pub(super) fn own_results(&self, c: &Combine) -> u64 {
        let before = counts(c.rank_tokens, c.tokens).before(self.rank);
        self.results(c) + before * Self::result_bytes(c)
    }

    pub(super) fn carry_results(&self, wire: &Arc<dyn Wire>, c: &Combine) -> Result<()> {
        let (slot, bound) = (c.call.slot, c.grid.bound as u64);
        let scatter = |from, to: u64, row_bytes: u64, own| {
            let to = self.own(to);
            Move::Scatter { from, to, row_bytes, apart: bound * row_bytes, own }
        };
        let mut moves = Moves::new(self.words(&c.call));
        moves.push(scatter(self.results(c), self.map.brought(slot), Self::result_bytes(c), false));
        if c.has_row_weights {
            let from = self.own(self.map.combine_weights(slot));
            moves.push(scatter(from, self.map.brought_weights(slot), c.weight_bytes() as u64, true));
        }
        self.carry(wire, &c.call, &moves, counts(c.rank_tokens, c.tokens))
    }
}
