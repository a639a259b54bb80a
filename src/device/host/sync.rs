//! A slot's state, its flags, and every wait on the CPU.
//!
//! Who writes what: a rank writes its own mailbox in every window (flags with release, after the rows they cover),
//! and waits on the mailboxes in its own. All waits go through `wait_for`, which knows the ways a wait can end other
//! than by its flags: ranks that are at something else, an abort, another rank's loss, a dead peer, the deadline.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use super::Host;
use super::fifo::Fifos;
use super::reduce::Pull;
use super::route::{DEMAND, DROPPED, END};
use crate::config::{LayoutKind, MAX_TOPK};
use crate::device::loss::{Void, Why, operation_name, result_word, why_gone};
#[cfg(debug_assertions)]
use crate::device::map::TOKENS;
use crate::device::map::{FIRST_EPOCH, Map, mail, mask_words};
use crate::device::order::State;
use crate::device::{Call, Combine, Dispatch, Float, Half, Shape};
use crate::error::{Error, Result, Status};

/// The generation of members; it stays 1 until membership can change.
const GENERATION: u64 = 1;

/// What a rank knows of one slot.
#[derive(Default)]
pub(super) struct Slot {
    state: State,
    /// Steps opened.
    sequence: u64,
    /// The routing of the current step.
    routing: u64,
    /// Ids of the current dispatch outside [-1, experts).
    pub(super) bad_ids: u32,
    /// Of the current dispatch: each source's tokens for this rank, and whether they stand in its bank.
    pub(super) arrived: Vec<(u32, bool)>,
    /// Scratch: this rank's rows by expert number.
    pub(super) rows_of: Vec<i32>,
    /// Scratch: rows that each rank would receive.
    pub(super) demands: Vec<u64>,
    /// Scratch: the next row of each local expert.
    pub(super) cursors: Vec<u64>,
    /// Scratch: a quantised token and its scales.
    pub(super) scratch: Vec<u8>,
    /// Scratch: the rows that one token's sum reads.
    pub(super) pulls: Vec<Pull>,
    pub(super) fifos: Fifos,
    /// Why the slot is closed.
    closed: Option<Error>,
}

impl Slot {
    /// With room for what a step needs, so that no step allocates.
    pub(super) fn new(map: &Map) -> Slot {
        let (sizes, ranks) = (&map.sizes, map.sizes.ranks() as usize);
        let by_expert = |len: u32| if sizes.grid.layout.by_expert() { len as usize } else { 0 };
        Slot {
            arrived: vec![(0, false); ranks],
            rows_of: vec![0; by_expert(sizes.num_experts)],
            demands: vec![0; ranks],
            cursors: vec![0; by_expert(sizes.experts)],
            scratch: vec![0; sizes.scratch_bytes() as usize],
            pulls: Vec::with_capacity(ranks.max(MAX_TOPK as usize)),
            fifos: Fifos::new(if sizes.uses.fifos { ranks } else { 0 }),
            ..Slot::default()
        }
    }
    /// Every rank takes part in the next dispatch, nobody in a combine of this one.
    pub(super) fn overflowed(&mut self) {
        self.state = State::Overflowed;
        self.fifos.withdraw();
    }
    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_some()
    }
    /// Between SEND and RECV of an operation, and the RECV can succeed.
    pub(super) fn is_pending(&self) -> bool {
        !self.is_closed() && matches!(self.state, State::DispatchSent | State::CombineSent)
    }
    /// The epoch of the current step: wraps with u32, as the flags do.
    pub(super) fn epoch(&self) -> u32 {
        FIRST_EPOCH.wrapping_add(self.sequence as u32).wrapping_sub(1)
    }
}

/// What a wait waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flag {
    /// The counts of a dispatch.
    Counts,
    Dispatch,
    /// A dispatch that replays a routing.
    Replay,
    Combine,
    Read,
    /// Rows of a dispatch, and of a combine, out of FIFOs.
    Rows,
    Results,
}

/// Operations in progress words and error records.
const DISPATCH: u32 = 1;
const COMBINE: u32 = 2;
const READ: u32 = 3;
const REPLAY: u32 = 4;

impl Flag {
    fn offset(self) -> u64 {
        match self {
            Flag::Counts => mail::COUNTS_FLAG,
            Flag::Dispatch | Flag::Replay => mail::DISPATCH_FLAG,
            Flag::Combine => mail::COMBINE_FLAG,
            Flag::Read => mail::READ_FLAG,
            Flag::Rows | Flag::Results => mail::FIFO_HEAD,
        }
    }
    pub(super) fn operation(self) -> u32 {
        match self {
            Flag::Counts | Flag::Dispatch | Flag::Rows => DISPATCH,
            Flag::Replay => REPLAY,
            Flag::Combine | Flag::Results => COMBINE,
            Flag::Read => READ,
        }
    }
    fn of_dispatch(d: &Dispatch) -> Flag {
        if d.reuse { Flag::Replay } else { Flag::Dispatch }
    }
}

/// A peer in one of the two kinds of dispatch waits for a peer in the other.
fn replay_differs(mine: u32, theirs: u32) -> bool {
    matches!((mine, theirs), (DISPATCH, REPLAY) | (REPLAY, DISPATCH))
}

/// Bit of a dispatch flag's number: the rows stand in the source's bank.
const BANKED: u32 = 1 << 31;

/// An epoch and a number, as a flag carries them.
fn pack(epoch: u32, number: u32) -> u64 {
    (epoch as u64) << 32 | number as u64
}

/// True if `flag` has reached `epoch`; right across the wrap.
fn reached(flag: u64, epoch: u32) -> bool {
    ((flag >> 32) as u32).wrapping_sub(epoch) as i32 >= 0
}

/// {bound, operation, low 28 bits of the epoch}.
fn progress(epoch: u32, operation: u32, bound: u32) -> u64 {
    (bound as u64) << 32 | (operation as u64) << 28 | (epoch & 0x0fff_ffff) as u64
}

/// How far a progress word's step is ahead of an epoch.
fn steps_ahead(word: u64, epoch: u32) -> i32 {
    // 28-bit difference, sign-extended.
    ((word as u32).wrapping_sub(epoch) << 4) as i32 >> 4
}

/// Gives the core away more and more: on a machine with fewer cores than ranks the peer needs it.
pub(super) struct Backoff {
    polls: u32,
}

impl Backoff {
    pub(super) fn new() -> Backoff {
        Backoff { polls: 0 }
    }
    const SPINS: u32 = 32;
    const YIELDS: u32 = 4096;

    pub(super) fn pause(&mut self) {
        self.polls = self.polls.saturating_add(1);
        if self.polls < Self::SPINS {
            std::hint::spin_loop();
        } else if self.polls < Self::YIELDS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    /// Looking for trouble costs more than a poll: at first only now and then.
    pub(super) fn looks(&self) -> bool {
        self.polls.is_multiple_of(16) || self.polls >= Self::YIELDS
    }
}

impl Host {
    pub(super) fn slot(&self, slot: u32) -> MutexGuard<'_, Slot> {
        self.slots[slot as usize].lock().unwrap_or_else(|e| e.into_inner())
    }

    /// No flag of the first epoch has come.
    pub(super) fn reset_flags(&self) {
        for slot in 0..self.map.sizes.slots {
            for source in 0..self.ranks {
                let mailbox = self.map.mailbox(slot, source);
                for flag in [mail::DISPATCH_FLAG, mail::COMBINE_FLAG, mail::READ_FLAG, mail::COUNTS_FLAG] {
                    let word = pack(FIRST_EPOCH.wrapping_sub(1), 0);
                    self.bases.word(self.rank, mailbox + flag).store(word, Release);
                }
                let word = progress(FIRST_EPOCH.wrapping_sub(1), 0, 0);
                self.bases.word(self.rank, mailbox + mail::PROGRESS).store(word, Release);
            }
        }
    }

    pub(super) fn mark_gone(&self, aborted: bool) {
        let reason = if aborted { 2 } else { 1 };
        for peer in 0..self.ranks {
            let word = self.bases.half(peer, self.map.gone(self.rank));
            // An abort stays an abort when the comm is destroyed afterwards.
            let _ = word.compare_exchange(0, reason, Release, Relaxed);
        }
    }

    pub(super) fn check_half(&self, slot: &Slot, call: &Call, half: Half) -> Result<()> {
        if let Some(error) = &slot.closed {
            return Err(error.clone());
        }
        slot.state.check(self.rank, slot.routing, call, half)
    }

    pub(super) fn open_half(&self, call: &Call, half: Half) -> Result<()> {
        let mut slot = self.slot(call.slot);
        self.check_half(&slot, call, half)?;
        if half == Half::DispatchSend {
            if matches!(slot.state, State::Dispatched | State::Overflowed) {
                self.finish_reading(call, &mut slot)?;
            }
            slot.sequence += 1;
            slot.routing = call.routing;
        }
        Ok(())
    }

    pub(super) fn close_half(&self, call: &Call, half: Half) {
        let mut slot = self.slot(call.slot);
        slot.state = State::after(half);
        match half {
            Half::DispatchSend => Self::add(&self.stats.dispatches, 1),
            Half::CombineRecv => Self::add(&self.stats.combines, 1),
            _ => {}
        }
    }

    /// A dispatch follows a dispatch: nothing of the former one may be overwritten before all have read it.
    fn finish_reading(&self, call: &Call, slot: &mut Slot) -> Result<()> {
        let epoch = slot.epoch();
        self.tell_progress(call.slot, epoch, READ, 0);
        for peer in 0..self.ranks {
            let mailbox = self.map.mailbox(call.slot, self.rank);
            self.bases.word(peer, mailbox + mail::READ_FLAG).store(pack(epoch, 0), Release);
        }
        self.wait_for(call, slot, Flag::Read, None)
    }

    fn tell_progress(&self, slot: u32, epoch: u32, operation: u32, bound: u32) {
        let mailbox = self.map.mailbox(slot, self.rank);
        for peer in 0..self.ranks {
            let word = progress(epoch, operation, bound);
            self.bases.word(peer, mailbox + mail::PROGRESS).store(word, Release);
        }
    }

    /// Tells every rank this rank's counts, which stand in the routing or, by expert, in the slot. The progress word
    /// comes before the flag, so that a peer that waits for something else can tell.
    pub(super) fn raise_counts(&self, d: &Dispatch) -> Result<()> {
        let slot = self.slot(d.call.slot);
        let l = self.ledger(d.memory);
        let counts: &[i32] = if d.grid.layout.by_expert() { &slot.rows_of } else { l.rows_for };
        let epoch = slot.epoch();
        self.tell_progress(d.call.slot, epoch, DISPATCH, d.grid.bound);
        for peer in 0..self.ranks {
            let offset = self.map.counts(d.call.slot, self.rank);
            for (key, rows) in counts.iter().enumerate() {
                self.bases.half(peer, offset + key as u64 * 4).store(*rows as u32, Relaxed);
            }
            let mailbox = self.map.mailbox(d.call.slot, self.rank);
            self.bases.word(peer, mailbox + mail::COUNTS_FLAG).store(pack(epoch, 0), Release);
        }
        Ok(())
    }

    pub(super) fn await_counts(&self, d: &Dispatch) -> Result<()> {
        let mut slot = self.slot(d.call.slot);
        self.wait_for(&d.call, &mut slot, Flag::Counts, Some(d.grid.bound))
    }

    /// True if every rank's counts of the slot's step are here.
    pub(super) fn counts_are_here(&self, slot: u32, epoch: u32) -> bool {
        (0..self.ranks).all(|peer| reached(self.flag(slot, peer, Flag::Counts), epoch))
    }

    /// The rows are in place: says so to every rank, with what they are.
    pub(super) fn raise_dispatch(&self, d: &Dispatch) -> Result<()> {
        let slot = self.slot(d.call.slot);
        let l = self.ledger(d.memory);
        let epoch = slot.epoch();
        let mailbox = self.map.mailbox(d.call.slot, self.rank);
        let shape = &d.send.shape;
        let banked = d.split && !d.reuse && self.map.sizes.uses.banks;
        self.tell_progress(d.call.slot, epoch, Flag::of_dispatch(d).operation(), shape.bound);
        for peer in 0..self.ranks {
            self.tell_shape(peer, mailbox + mail::DISPATCH_SHAPE, &shape.words());
            self.bases.half(peer, mailbox + mail::TOKENS).store(d.send.tokens, Relaxed);
            self.bases.half(peer, mailbox + mail::REPLAYS).store(d.reuse as u32, Relaxed);
            let gathers = self.map.sizes.uses.published;
            let rows = if gathers { d.send.tokens } else { l.rows_for[peer as usize] as u32 };
            let word = pack(epoch, rows | if banked { BANKED } else { 0 });
            self.bases.word(peer, mailbox + mail::DISPATCH_FLAG).store(word, Release);
        }
        Ok(())
    }

    pub(super) fn raise_combine(&self, c: &Combine) -> Result<()> {
        let epoch = self.slot(c.call.slot).epoch();
        #[cfg(debug_assertions)]
        self.poison(c);
        let mailbox = self.map.mailbox(c.call.slot, self.rank);
        self.tell_progress(c.call.slot, epoch, COMBINE, c.grid.bound);
        for peer in 0..self.ranks {
            self.tell_shape(peer, mailbox + mail::COMBINE_SHAPE, &combine_words(c));
            self.bases.word(peer, mailbox + mail::COMBINE_FLAG).store(pack(epoch, 0), Release);
        }
        Ok(())
    }

    /// Views end with this rank's combine SEND: in a debug build who reads them afterwards reads NaN.
    #[cfg(debug_assertions)]
    fn poison(&self, c: &Combine) {
        let sizes = &self.map.sizes;
        if sizes.uses.rows {
            let bytes = c.grid.capacity(self.experts.count(self.rank)) * sizes.plane_bytes[TOKENS] as u64;
            let at = self.bases.at(self.rank, self.map.received(c.call.slot, TOKENS), bytes);
            // SAFETY: `at` checked the bounds; peers store there only after they have heard this combine.
            unsafe { std::ptr::write_bytes(at, 0xff, bytes as usize) };
        }
    }

    fn tell_shape(&self, peer: u32, offset: u64, words: &[u32]) {
        for (i, word) in words.iter().enumerate() {
            self.bases.half(peer, offset + i as u64 * 4).store(*word, Relaxed);
        }
    }

    pub(super) fn await_dispatch(&self, d: &Dispatch) -> Result<()> {
        let mut guard = self.slot(d.call.slot);
        let slot = &mut *guard;
        let flag = Flag::of_dispatch(d);
        self.wait_for(&d.call, slot, flag, Some(d.grid.bound))?;
        let words = d.send.shape.words();
        for peer in 0..self.ranks {
            let mailbox = self.map.mailbox(d.call.slot, peer);
            let replays = self.bases.half(self.rank, mailbox + mail::REPLAYS).load(Relaxed);
            if replays != d.reuse as u32 {
                let values = (d.reuse as u64, replays as u64);
                return Err(self.lose(&d.call, slot, flag, Status::Mismatch, &[peer], values, Why::Replay));
            }
            self.compare_shape(&d.call, slot, flag, peer, &words, Shape::name)?;
            let tokens = self.bases.half(self.rank, mailbox + mail::TOKENS).load(Relaxed);
            let told = match d.rank_tokens {
                Some(told) => Some(told[peer as usize] as u32),
                None if d.uniform => Some(d.send.tokens),
                None => None,
            };
            if let Some(told) = told.filter(|told| *told != tokens) {
                let values = (told as u64, tokens as u64);
                return Err(self.lose(&d.call, slot, flag, Status::Mismatch, &[peer], values, Why::Told));
            }
            let word = self.bases.word(self.rank, mailbox + mail::DISPATCH_FLAG).load(Relaxed) as u32;
            // A count is what a peer wrote: bounded before it is an index.
            slot.arrived[peer as usize] = ((word & !BANKED).min(d.grid.bound), word & BANKED != 0);
        }
        // Where places need no counts, the flags' own numbers say where rows lie.
        if !self.map.sizes.uses.counts {
            let l = self.ledger(d.memory);
            let mut total = 0;
            for (peer, (rows, _)) in slot.arrived.iter().enumerate() {
                l.rank_counts[peer] = *rows as i32;
                if d.grid.layout == LayoutKind::RankMajor {
                    l.starts[peer] = (peer as u32 * d.grid.bound) as i32;
                    l.counts[peer] = *rows as i32;
                }
                total += *rows as i32;
            }
            if d.grid.layout == LayoutKind::Gathered {
                (l.starts[0], l.counts[0]) = (0, total);
            }
            (l.summary[DEMAND], l.summary[DROPPED], l.summary[END]) = (total, 0, total);
        }
        Ok(())
    }

    pub(super) fn await_combine(&self, c: &Combine) -> Result<()> {
        let mut slot = self.slot(c.call.slot);
        self.wait_for(&c.call, &mut slot, Flag::Combine, Some(c.grid.bound))?;
        for peer in 0..self.ranks {
            let words = combine_words(c);
            self.compare_shape(&c.call, &mut slot, Flag::Combine, peer, &words, |word| {
                result_word(word).into()
            })?;
        }
        Ok(())
    }

    fn compare_shape(
        &self,
        call: &Call,
        slot: &mut Slot,
        flag: Flag,
        peer: u32,
        mine: &[u32],
        name: impl Fn(usize) -> String,
    ) -> Result<()> {
        let shape = if flag == Flag::Combine { mail::COMBINE_SHAPE } else { mail::DISPATCH_SHAPE };
        let mailbox = self.map.mailbox(call.slot, peer);
        for (i, mine) in mine.iter().enumerate() {
            let theirs = self.bases.half(self.rank, mailbox + shape + i as u64 * 4).load(Relaxed);
            if theirs != *mine {
                let values = (*mine as u64, theirs as u64);
                let why = Why::Word { name: name(i) };
                return Err(self.lose(call, slot, flag, Status::Mismatch, &[peer], values, why));
            }
        }
        Ok(())
    }

    /// The one wait. Returns when every rank's flag has reached the slot's epoch.
    fn wait_for(&self, call: &Call, slot: &mut Slot, flag: Flag, bound: Option<u32>) -> Result<()> {
        let epoch = slot.epoch();
        let mut backoff = Backoff::new();
        let mut next = 0;
        Self::add(&self.stats.hops, 1);
        loop {
            while next < self.ranks && reached(self.flag(call.slot, next, flag), epoch) {
                next += 1;
            }
            if next == self.ranks {
                return Ok(());
            }
            if self.pump(call.slot, slot) {
                backoff = Backoff::new();
            }
            if backoff.looks() {
                self.look_for_trouble(call, slot, flag, bound)?;
            }
            backoff.pause();
        }
    }

    pub(super) fn flag(&self, slot: u32, source: u32, flag: Flag) -> u64 {
        let offset = self.map.mailbox(slot, source) + flag.offset();
        self.bases.word(self.rank, offset).load(Acquire)
    }

    /// True if all that is waited for from a peer has come.
    fn has_come(&self, slot_number: u32, slot: &Slot, flag: Flag, peer: u32) -> bool {
        let word = self.flag(slot_number, peer, flag);
        match flag {
            Flag::Rows | Flag::Results => word >= slot.fifos.goals[peer as usize],
            _ => reached(word, slot.epoch()),
        }
    }

    /// Ranks whose flag has not come, or comes no more.
    pub(super) fn missing(&self, slot_number: u32, slot: &Slot, flag: Flag) -> impl Iterator<Item = u32> {
        (0..self.ranks).filter(move |&peer| !self.has_come(slot_number, slot, flag, peer))
    }

    /// Another thread aborted this comm.
    pub(super) fn check_aborted(&self, call: &Call, slot: &Slot, flag: Flag) -> Result<()> {
        if !self.health.is_aborted() {
            return Ok(());
        }
        let text = format!(
            "rank {}: aborted while it waited in {} on slot {}, sequence {}",
            self.rank,
            operation_name(flag.operation()),
            call.slot,
            slot.sequence
        );
        Err(Error::new(Status::Aborted, text))
    }

    /// Why a peer can send nothing more, if it cannot.
    pub(super) fn why_gone(&self, peer: u32) -> Option<&'static str> {
        let word = self.bases.half(self.rank, self.map.gone(peer)).load(Acquire);
        why_gone(if word == 0 && self.health.is_dead(peer) { 3 } else { word })
    }

    /// True if a peer has given up on the slot's step or an earlier one.
    pub(super) fn gave_up(&self, slot_number: u32, observer: u32, epoch: u32) -> Option<u64> {
        let offset = self.map.mailbox(slot_number, observer) + mail::LOSS;
        let word = self.bases.word(self.rank, offset).load(Acquire);
        // A loss of a later step leaves this one to its own flags.
        let later = (word as u32).wrapping_sub(epoch) as i32 > 0;
        (word >> 48 == GENERATION && !later).then_some(word)
    }

    /// Every way a wait can end without its flags. The cause is read before the flag is looked at once more: a rank
    /// that left, died or went on *after* its flag is no loss.
    pub(super) fn look_for_trouble(
        &self,
        call: &Call,
        slot: &mut Slot,
        flag: Flag,
        bound: Option<u32>,
    ) -> Result<()> {
        let epoch = slot.epoch();
        let streams = matches!(flag, Flag::Rows | Flag::Results);
        let goals = |slot: &Slot, peer: u32| match streams {
            true => (slot.fifos.goals[peer as usize], self.flag(call.slot, peer, flag)),
            false => (pack(epoch, 0) >> 32, self.flag(call.slot, peer, flag) >> 32),
        };
        self.check_aborted(call, slot, flag)?;

        // Ranks that do something else: named before any loss, so that each side of a disagreement says it.
        for peer in 0..self.ranks {
            let word =
                self.bases.word(self.rank, self.map.mailbox(call.slot, peer) + mail::PROGRESS).load(Acquire);
            let (ahead, operation, theirs) =
                (steps_ahead(word, epoch), (word >> 28 & 0xf) as u32, (word >> 32) as u32);
            // A peer may go on while rows it owes are on offer; what it is at was checked by its flag.
            let here = !streams && !self.has_come(call.slot, slot, flag, peer);
            if let Some(mine) =
                bound.filter(|mine| ahead == 0 && operation == flag.operation() && theirs != *mine)
            {
                let values = (mine as u64, theirs as u64);
                return Err(self.lose(call, slot, flag, Status::Mismatch, &[peer], values, Why::Bound));
            }
            let mine = flag.operation();
            let elsewhere = matches!(operation, COMBINE | READ) && operation != mine;
            // One kind of dispatch beside the other is wrong whatever flags have come.
            let differs = !streams && ahead == 0 && replay_differs(mine, operation);
            if differs || here && (ahead > 0 || ahead == 0 && elsewhere) {
                let values = (flag.operation() as u64, operation as u64);
                let why = Why::Elsewhere { ahead: ahead as i64 };
                return Err(self.lose(call, slot, flag, Status::Mismatch, &[peer], values, why));
            }
        }

        // Somebody else gave up on the step.
        for observer in (0..self.ranks).filter(|r| *r != self.rank) {
            let Some(word) = self.gave_up(call.slot, observer, epoch) else { continue };
            if self.missing(call.slot, slot, flag).next().is_none() {
                continue;
            }
            let status = Status::from_code((word >> 32 & 0xffff) as i32).unwrap_or(Status::PeerLost);
            let lost = self.read_mask(call.slot, observer);
            // Word may have come through a third rank: the first is the one to ask.
            let origin = self.map.mailbox(call.slot, observer) + mail::LOSS_ORIGIN;
            let origin = self.bases.half(self.rank, origin).load(Relaxed);
            let values = goals(slot, lost.first().copied().unwrap_or(observer));
            return Err(self.lose(call, slot, flag, status, &lost, values, Why::GaveUp { origin }));
        }

        // Ranks that can send nothing more.
        let (lost, whys): (Vec<u32>, Vec<&str>) = (0..self.ranks)
            .filter_map(|peer| self.why_gone(peer).map(|why| (peer, why)))
            .filter(|(peer, _)| !self.has_come(call.slot, slot, flag, *peer))
            .unzip();
        if let Some(first) = lost.first() {
            let values = goals(slot, *first);
            return Err(self.lose(call, slot, flag, Status::PeerLost, &lost, values, Why::Gone { whys }));
        }

        if call.started.elapsed() >= call.budget {
            let late: Vec<u32> = match streams {
                true => self.starved_of(call.slot, slot, flag).collect(),
                false => self.missing(call.slot, slot, flag).collect(),
            };
            if let Some(first) = late.first() {
                let values = goals(slot, *first);
                let why = Why::Late { deadline: call.budget };
                return Err(self.lose(call, slot, flag, Status::Timeout, &late, values, why));
            }
        }
        Ok(())
    }

    fn read_mask(&self, slot: u32, observer: u32) -> Vec<u32> {
        let mask = self.map.loss_mask(slot, observer);
        (0..self.ranks)
            .filter(|r| {
                let word = self.bases.word(self.rank, mask + (r / 64) as u64 * 8).load(Relaxed);
                word >> (r % 64) & 1 == 1
            })
            .collect()
    }

    /// Gives a step up: tells every rank, closes the slot, keeps the first error.
    #[allow(clippy::too_many_arguments, reason = "one place builds the whole record")]
    pub(super) fn lose(
        &self,
        call: &Call,
        slot: &mut Slot,
        flag: Flag,
        status: Status,
        lost: &[u32],
        (expected, seen): (u64, u64),
        why: Why,
    ) -> Error {
        let origin = if let Why::GaveUp { origin } = why { origin } else { self.rank };
        let epoch = slot.epoch();
        let mut mask = vec![0u64; mask_words(self.ranks)];
        for r in lost {
            mask[(r / 64) as usize] |= 1 << (r % 64);
        }
        for peer in 0..self.ranks {
            let offset = self.map.loss_mask(call.slot, self.rank);
            for (i, word) in mask.iter().enumerate() {
                self.bases.word(peer, offset + i as u64 * 8).store(*word, Relaxed);
            }
            let mailbox = self.map.mailbox(call.slot, self.rank);
            self.bases.half(peer, mailbox + mail::LOSS_ORIGIN).store(origin, Relaxed);
            let word = GENERATION << 48 | (status as u64) << 32 | epoch as u64;
            self.bases.word(peer, self.map.mailbox(call.slot, self.rank) + mail::LOSS).store(word, Release);
        }
        let error = Void {
            rank: self.rank,
            slot: call.slot,
            sequence: slot.sequence,
            operation: flag.operation(),
            status,
            lost: lost.to_vec(),
            expected,
            seen,
            why,
        }
        .error();
        self.first_error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_with(|| error.clone());
        slot.closed = Some(error.clone());
        slot.fifos.clear();
        Self::add(&self.stats.steps_lost, 1);
        error
    }
}

fn combine_words(c: &Combine) -> [u32; 3] {
    let code = match c.send_type {
        Float::Bf16 => 0,
        Float::F16 => 1,
        Float::F32 => 2,
    };
    [c.hidden, code, c.has_row_weights as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_compare_across_the_wrap() {
        assert!(reached(pack(0, 7), u32::MAX));
        assert!(!reached(pack(u32::MAX, 7), 0));
        assert!(reached(pack(5, 0), 5));
    }

    #[test]
    fn progress_words_compare_across_the_wrap() {
        assert_eq!(steps_ahead(progress(1, 1, 9), u32::MAX), 2);
        assert_eq!(steps_ahead(progress(u32::MAX, 2, 9), 1), -2);
        assert_eq!(steps_ahead(progress(77, 2, u32::MAX), 77), 0);
        assert_eq!(progress(77, 2, 5) >> 32, 5);
    }
}
