//! What a jitter build does beside the sleeps of its kernels: memory that is about to be written anew is overwritten, so
//! that a row that nobody wrote, or that was read too early, shows in the results.
//!
//! All of it is this rank's own. Rows become what is NaN in every float type and no id, lists what is no expert and no
//! rank: a step that comes to nothing leaves them behind, and kernels may look at them before they know. It is a kernel
//! and not a memset, because the slot's state decides, which a host does not know where graphs are replayed.
//!
//! Why nobody else uses the memory at the time, in a slot that is neither closed nor in the middle of a half:
//!
//! * *Received rows*, and those in banks, once all ranks' dispatch flags have come (state DISPATCHED), are written by nobody until this rank
//!   raises its combine flag, or its "rows read" flag where a dispatch follows a dispatch: peers wait for it before they
//!   dispatch again. Views end there too, and what was staged from a view has been copied. So they are poisoned ahead of
//!   either flag.
//! * *Results* were last read for the peers' sums of the step before, and a peer's dispatch flag comes after its sums.
//!   This rank's experts write them once its dispatch is received. So they are poisoned at the end of that.
//! * *Published rows* are read by peers until their combine flags. So they are poisoned when those have come (state IDLE
//!   again). Where a dispatch follows a dispatch they are left alone: the rows are stored by the kernel behind the one that
//!   waits for the peers' "rows read" flags, and nothing may come between those two.
//! * *A routing's lists* are written by a dispatch and used up to its combine, all in the order of the stream. So they
//!   are poisoned ahead of a dispatch that the state allows. Its counts are left alone: they say how much is looked at, in
//!   steps that come to nothing too.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::driver::Launch;
use super::params::{PoisonParams, Shared, Slot};
use super::{Cuda, lock};
use crate::device::map::TOKENS;
use crate::device::order::State;
use crate::device::{Call, Combine, Dispatch};
use crate::error::{Error, Result};

/// Threads of a block, as the kernel has it.
const THREADS: u32 = 256;

/// NaN as bf16, f16, f32, and each byte as e4m3; no rank, no token and no expert.
const NAN: u32 = 0x7fff_7fff;
/// No expert, no rank; NaN as a weight.
const NONE: u32 = u32::MAX;

const IDLE: u32 = 1 << State::Idle as u32;
const DISPATCHED: u32 = 1 << State::Dispatched as u32;

/// Whatever the slot's last routing was.
const ANY: u64 = 0;

impl Cuda {
    /// Keeps the loosest bound on multiprocessors of all calls.
    pub(super) fn note_bound(&self, call: &Call) {
        let bound = if call.max_sms > 0 { call.max_sms } else { u32::MAX };
        self.loosest.fetch_max(bound, Ordering::Relaxed);
    }

    /// Kernels were on more multiprocessors at a time than any call allowed. What poisons memory is not counted.
    pub(super) fn too_many_sms(&self) -> Option<Error> {
        let mut word = [0u8; 4];
        let at = self.layout.shared + std::mem::offset_of!(Shared, most_sms) as u64;
        self.private.read(at, &mut word).ok()?;
        let (most, bound) = (u32::from_le_bytes(word), self.loosest.load(Ordering::Relaxed));
        let text =
            || format!("rank {}: kernels were on {most} multiprocessors, max_sms is {bound}", self.rank);
        (bound > 0 && most > bound).then(|| Error::internal(text()))
    }

    pub(super) fn poison_before_dispatch(&self, d: &Dispatch) -> Result<()> {
        let slot = d.call.slot;
        if lock(&self.slots[slot as usize]).opens {
            self.poison(&d.call, self.received_rows_of(slot), NAN, DISPATCHED, ANY)?;
        }
        if d.reuse {
            return Ok(());
        }
        // The lists of what each token chose and where it went; counts follow them.
        let at = |list| d.memory.list(list) as u64;
        let lists = at(self.routing.ids)..at(self.routing.rows_for);
        self.poison(&d.call, lists, NONE, IDLE | DISPATCHED, ANY)
    }

    /// At the end of a dispatch.
    pub(super) fn poison_results(&self, d: &Dispatch) -> Result<()> {
        let slot = d.call.slot;
        let results = self.own(self.map.combine(slot))..self.own(self.map.fifos(slot));
        self.poison(&d.call, results, NAN, DISPATCHED, d.call.routing)
    }

    /// Before a combine's flags, after what is staged.
    pub(super) fn poison_received(&self, c: &Combine) -> Result<()> {
        self.poison(&c.call, self.received_rows_of(c.call.slot), NAN, DISPATCHED, c.call.routing)
    }

    /// At the end of a combine.
    pub(super) fn poison_published(&self, c: &Combine) -> Result<()> {
        let slot = c.call.slot;
        let rows = self.own(self.map.published(slot, TOKENS))..self.own(self.map.bank(slot, TOKENS));
        self.poison(&c.call, rows, NAN, IDLE, c.call.routing)
    }

    /// Every plane's, in banks and in place.
    fn received_rows_of(&self, slot: u32) -> Range<u64> {
        self.own(self.map.bank(slot, TOKENS))..self.own(self.map.combine(slot))
    }

    /// Overwrites memory of this rank's, whose ends are multiples of 16, if the slot is in one of the states and at the
    /// routing.
    fn poison(&self, call: &Call, memory: Range<u64>, word: u32, states: u32, routing: u64) -> Result<()> {
        let vectors = (memory.end - memory.start) / 16;
        if vectors == 0 {
            return Ok(());
        }
        let slot = self.private.address() + self.layout.slots + call.slot as u64 * size_of::<Slot>() as u64;
        let params = PoisonParams { slot, to: memory.start, vectors, routing, states, word };
        let blocks = vectors.div_ceil(THREADS as u64).min(2 * self.station.sms() as u64);
        let shape = Launch { grid: blocks as u32, block: THREADS, ..Launch::default() };
        // SAFETY: this rank's window, or the routing's memory.
        unsafe { self.launch(&self.station.kernels.poison, shape, call, &params) }
    }
}
