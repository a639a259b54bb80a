//! A slot's state, what a rank says and waits for in a step, and how a step is given up, on the CPU.
//!
//! What words in windows mean, in which order they are written and read, and the ways a wait can end are the
//! protocol's (`device/protocol.rs`). Here stand what goes with each flag, how a waiting rank passes its time, and the
//! error that an end becomes. All waits but those for rows out of FIFOs go through `wait_for`.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use super::Host;
use super::fifo::Fifos;
use super::reduce::Pull;
use super::route::{DEMAND, DROPPED, END};
use crate::config::{LayoutKind, MAX_TOPK};
use crate::device::loss::{Void, Why, operation_name, result_word, why_gone};
#[cfg(debug_assertions)]
use crate::device::map::TOKENS;
use crate::device::map::{FIRST_EPOCH, Map};
use crate::device::members::Members;
use crate::device::note::Note;
use crate::device::order::State;
use crate::device::protocol::{Awaited, AwaitedRows, Endpoint, Flag, Signal, Trouble, Words};
use crate::device::{Bases, Call, Combine, Dispatch, Float, Half, Parcel, Shape, mail};
use crate::error::{Error, Result, Status};
use crate::fault::{self, Point};
use crate::log::{Level, log};

/// What a rank knows of one slot.
#[derive(Default)]
pub(super) struct Slot {
    state: State,
    /// Steps opened.
    sequence: u64,
    /// The last one of which all is done.
    pub(super) whole: u64,
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
    /// Scratch, where results are brought: by key, this rank's rows before it at its owner; by owner, where what is beside them begins.
    pub(super) firsts: Vec<u32>,
    pub(super) beside: Vec<u64>,
    /// This rank's own results are not among those that are brought: they stay where the experts left them.
    pub(super) in_place: bool,
    /// Scratch, where couriers carry: by source and own expert, its rows, as the dispatch has placed them.
    pub(super) told: Vec<u32>,
    /// The ranks whose rows the dispatch has placed.
    pub(super) placed: Members,
    /// Scratch: what goes to one peer.
    pub(super) parcels: Vec<Parcel>,
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
            firsts: vec![0; if sizes.uses.posted { sizes.num_experts as usize } else { 0 }],
            beside: vec![0; if sizes.uses.posted { ranks } else { 0 }],
            told: vec![0; if sizes.uses.posted { ranks * sizes.experts as usize } else { 0 }],
            parcels: Vec::with_capacity(if sizes.uses.posted { sizes.experts as usize + 1 } else { 0 }),
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
    /// Why it is closed; what it is closed with.
    pub(super) fn error(&self) -> Option<&Error> {
        self.closed.as_ref()
    }
    pub(super) fn close(&mut self, error: Error) {
        self.closed.get_or_insert(error);
        self.fifos.clear();
    }
    /// Neither idle nor closed.
    pub(super) fn is_in_a_step(&self) -> bool {
        !self.is_closed() && !matches!(self.state, State::Idle | State::Overflowed)
    }
    /// Between SEND and RECV of an operation, and the RECV can succeed.
    pub(super) fn is_pending(&self) -> bool {
        !self.is_closed() && matches!(self.state, State::DispatchSent | State::CombineSent)
    }
    /// The epoch of the current step: wraps with u32, as the flags do.
    pub(super) fn epoch(&self) -> u32 {
        FIRST_EPOCH.wrapping_add(self.sequence as u32).wrapping_sub(1)
    }
    /// Of the current step.
    fn signal(&self, flag: Flag, bound: Option<u32>) -> Signal {
        Signal { flag, epoch: self.epoch(), bound }
    }
    pub(super) fn awaited(&self, flag: Flag, bound: Option<u32>) -> Awaited<'_> {
        let rows = AwaitedRows { goals: &self.fifos.goals, taken: &self.fifos.taken };
        let streams = matches!(flag, Flag::Rows | Flag::Results);
        Awaited { signal: self.signal(flag, bound), rows: streams.then_some(rows) }
    }
}

/// Where a slot's words lie.
pub(super) struct SlotWords<'a> {
    bases: &'a Bases,
    map: &'a Map,
    slot: u32,
    /// Where its mailboxes begin: known once, not looked up for every word of a shape.
    mailboxes: u64,
}

impl SlotWords<'_> {
    #[inline]
    fn mailbox(&self, source: u32) -> u64 {
        self.mailboxes + source as u64 * mail::BYTES
    }
}

impl Words for SlotWords<'_> {
    #[inline]
    fn word(&self, window: u32, source: u32, offset: u64) -> &AtomicU64 {
        self.bases.word(window, self.mailbox(source) + offset)
    }
    #[inline]
    fn half(&self, window: u32, source: u32, offset: u64) -> &AtomicU32 {
        self.bases.half(window, self.mailbox(source) + offset)
    }
    fn mask(&self, window: u32, source: u32, word: usize) -> &AtomicU64 {
        self.bases.word(window, self.map.loss_mask(self.slot, source) + word as u64 * 8)
    }
    fn gone(&self, window: u32, source: u32) -> &AtomicU32 {
        self.bases.half(window, self.map.gone(source))
    }
}

/// The flag of a dispatch of either kind.
fn of_dispatch(d: &Dispatch) -> Flag {
    if d.reuse { Flag::Replay } else { Flag::Dispatch }
}

/// Where a wait for a flag stands.
pub(super) fn point_of(flag: Flag) -> Point {
    match flag {
        Flag::Counts => Point::WaitCounts,
        Flag::Combine | Flag::Results => Point::WaitCombine,
        _ => Point::WaitDispatch,
    }
}

/// Bit of a dispatch flag's number: the rows stand in the source's bank.
const BANKED: u32 = 1 << 31;

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

    /// This rank's end of a slot's words.
    pub(super) fn endpoint(&self, slot: u32) -> Endpoint<SlotWords<'_>> {
        let mailboxes = self.map.mailbox(slot, 0);
        let words = SlotWords { bases: &self.bases, map: &self.map, slot, mailboxes };
        let (generation, members) = (self.membership.generation, self.present());
        Endpoint { words, rank: self.rank, ranks: self.ranks, members, generation: generation as u16 }
    }

    /// No flag of the first epoch has come.
    pub(super) fn reset_flags(&self) {
        (0..self.map.sizes.slots).for_each(|slot| self.endpoint(slot).reset(FIRST_EPOCH));
    }

    pub(super) fn mark_gone(&self, aborted: bool) {
        // Any slot's end will do: they share the word.
        self.endpoint(0).leave(aborted);
        self.post_alone(0, Note::Gone);
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
                slot.whole = slot.sequence;
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
            Half::CombineRecv => {
                slot.whole = slot.sequence;
                Self::add(&self.stats.combines, 1);
            }
            _ => {}
        }
    }

    /// A dispatch follows a dispatch: nothing of the former one may be overwritten before all have read it.
    fn finish_reading(&self, call: &Call, slot: &mut Slot) -> Result<()> {
        self.endpoint(call.slot).raise(&slot.signal(Flag::Read, None), |_| 0);
        self.post(call.slot, slot, Flag::Read, false, |_, _| {})?;
        self.wait_for(call, slot, Flag::Read, None)
    }

    /// Tells every rank this rank's counts, which stand in the routing or, by expert, in the slot.
    pub(super) fn raise_counts(&self, d: &Dispatch) -> Result<()> {
        let slot = self.slot(d.call.slot);
        let l = self.ledger(d.memory);
        let counts: &[i32] = if d.grid.layout.by_expert() { &slot.rows_of } else { l.rows_for };
        let offset = self.map.counts(d.call.slot, self.rank);
        self.endpoint(d.call.slot).raise(&slot.signal(Flag::Counts, Some(d.grid.bound)), |peer| {
            fault::at(Point::DispatchCounts);
            for (key, rows) in counts.iter().enumerate() {
                self.bases.half(peer, offset + key as u64 * 4).store(*rows as u32, Relaxed);
            }
            0
        });
        Ok(())
    }

    pub(super) fn await_counts(&self, d: &Dispatch) -> Result<()> {
        let mut slot = self.slot(d.call.slot);
        self.wait_for(&d.call, &mut slot, Flag::Counts, Some(d.grid.bound))
    }

    /// The rows are in place: says so to every rank, with what they are.
    pub(super) fn raise_dispatch(&self, d: &Dispatch) -> Result<()> {
        fault::at(Point::DispatchBeforeFlags);
        let mut slot = self.slot(d.call.slot);
        let l = self.ledger(d.memory);
        let uses = &self.map.sizes.uses;
        let banked = d.split && !d.reuse && uses.banks || uses.posted;
        let gathers = self.map.sizes.uses.published;
        let words = d.send.shape.words();
        let end = self.endpoint(d.call.slot);
        end.raise(&slot.signal(of_dispatch(d), Some(d.grid.bound)), |peer| {
            fault::at(Point::DispatchFlag);
            tell_shape(&end, peer, mail::DISPATCH_SHAPE, &words);
            end.tell(peer, mail::TOKENS, d.send.tokens);
            end.tell(peer, mail::REPLAYS, d.reuse as u32);
            let rows = if gathers { d.send.tokens } else { l.rows_for[peer as usize] as u32 };
            rows | if banked { BANKED } else { 0 }
        });
        fault::at(Point::DispatchAfterFlags);
        self.post(d.call.slot, &mut slot, of_dispatch(d), d.split, |peer, parcels| {
            self.dispatched(d, &l, peer, parcels)
        })
    }

    pub(super) fn raise_combine(&self, c: &Combine) -> Result<()> {
        fault::at(Point::CombineBeforeFlags);
        let mut slot = self.slot(c.call.slot);
        #[cfg(debug_assertions)]
        self.poison(c);
        let words = combine_words(c);
        let end = self.endpoint(c.call.slot);
        end.raise(&slot.signal(Flag::Combine, Some(c.grid.bound)), |peer| {
            fault::at(Point::CombineFlag);
            tell_shape(&end, peer, mail::COMBINE_SHAPE, &words);
            0
        });
        fault::at(Point::CombineAfterFlags);
        let (placed, told) = (slot.placed, std::mem::take(&mut slot.told));
        let sent = self.post(c.call.slot, &mut slot, Flag::Combine, c.split, |peer, parcels| {
            self.returned(c, (placed, &told, peer), parcels)
        });
        slot.told = told;
        sent
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

    pub(super) fn await_dispatch(&self, d: &Dispatch) -> Result<()> {
        let mut guard = self.slot(d.call.slot);
        let slot = &mut *guard;
        let flag = of_dispatch(d);
        self.wait_for(&d.call, slot, flag, Some(d.grid.bound))?;
        let words = d.send.shape.words();
        let end = self.endpoint(d.call.slot);
        slot.arrived.fill((0, false));
        for peer in self.members() {
            let replays = end.told(peer, mail::REPLAYS);
            if replays != d.reuse as u32 {
                let values = (d.reuse as u64, replays as u64);
                return Err(self.lose(
                    &d.call,
                    slot,
                    self.void(&d.call, slot, flag, Status::Mismatch, &[peer], values, Why::Replay),
                ));
            }
            self.compare_shape(&d.call, slot, flag, peer, &words, Shape::name)?;
            let tokens = end.told(peer, mail::TOKENS);
            let told = match d.rank_tokens {
                Some(told) => Some(told[peer as usize] as u32),
                None if d.uniform => Some(d.send.tokens),
                None => None,
            };
            if let Some(told) = told.filter(|told| *told != tokens) {
                let values = (told as u64, tokens as u64);
                return Err(self.lose(
                    &d.call,
                    slot,
                    self.void(&d.call, slot, flag, Status::Mismatch, &[peer], values, Why::Told),
                ));
            }
            let word = end.flag(peer, flag) as u32;
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
        for peer in self.members() {
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
        let end = self.endpoint(call.slot);
        for (i, mine) in mine.iter().enumerate() {
            let theirs = end.told(peer, shape + i as u64 * 4);
            if theirs != *mine {
                let values = (*mine as u64, theirs as u64);
                let why = Why::Word { name: name(i) };
                return Err(self.lose(
                    call,
                    slot,
                    self.void(call, slot, flag, Status::Mismatch, &[peer], values, why),
                ));
            }
        }
        Ok(())
    }

    /// Returns when every rank's flag has come.
    fn wait_for(&self, call: &Call, slot: &mut Slot, flag: Flag, bound: Option<u32>) -> Result<()> {
        let signal = slot.signal(flag, bound);
        let mut backoff = Backoff::new();
        Self::add(&self.stats.hops, 1);
        loop {
            let end = self.endpoint(call.slot);
            let waited = end.wait(&signal, || {
                fault::at(point_of(flag));
                self.hear().map_err(Some)?;
                if self.pump(call.slot, slot) {
                    backoff = Backoff::new();
                }
                if backoff.looks() {
                    self.look_for_trouble(call, slot, flag, bound).map_err(Some)?;
                    if self.degrades && self.present() != end.members {
                        return Err(None);
                    }
                }
                backoff.pause();
                Ok(())
            });
            match waited {
                Ok(()) => return self.await_delivery(call, slot, flag),
                // The rest is waited for.
                Err(None) => {}
                Err(Some(error)) => return Err(error),
            }
        }
    }

    /// Another thread aborted this comm.
    pub(super) fn check_aborted(&self, call: &Call, slot: &Slot, flag: Flag) -> Result<()> {
        if self.health.is_aborted() { Err(self.aborted(call, slot, flag)) } else { Ok(()) }
    }

    fn aborted(&self, call: &Call, slot: &Slot, flag: Flag) -> Error {
        let text = format!(
            "rank {}: aborted while it waited in {} on slot {}, sequence {}",
            self.rank,
            operation_name(flag.operation()),
            call.slot,
            slot.sequence
        );
        Error::new(Status::Aborted, text)
    }

    /// Ends the step if what is awaited comes no more.
    pub(super) fn look_for_trouble(
        &self,
        call: &Call,
        slot: &mut Slot,
        flag: Flag,
        bound: Option<u32>,
    ) -> Result<()> {
        let end = self.endpoint(call.slot);
        let awaited = slot.awaited(flag, bound);
        let is_late = || call.started.elapsed() >= call.budget;
        let Some(trouble) = end.look_for_trouble(&awaited, &self.health.vitals, is_late) else {
            return Ok(());
        };
        let (status, lost, values, why) = match trouble {
            Trouble::Aborted => return Err(self.aborted(call, slot, flag)),
            Trouble::Bound { peer, mine, theirs } => {
                (Status::Mismatch, vec![peer], (mine as u64, theirs as u64), Why::Bound)
            }
            Trouble::Elsewhere { peer, operation, ahead } => {
                let values = (flag.operation() as u64, operation as u64);
                (Status::Mismatch, vec![peer], values, Why::Elsewhere { ahead: ahead as i64 })
            }
            Trouble::GaveUp { observer, status, lost, origin } => {
                let status = Status::from_code(status as i32).unwrap_or(Status::PeerLost);
                let values = end.values(&awaited, lost.first().copied().unwrap_or(observer));
                (status, lost, values, Why::GaveUp { origin })
            }
            Trouble::Gone(gone) => {
                let values = end.values(&awaited, gone[0].0);
                let whys = gone.iter().filter_map(|(_, word)| why_gone(*word)).collect();
                let lost = gone.iter().map(|(peer, _)| *peer).collect();
                (Status::PeerLost, lost, values, Why::Gone { whys })
            }
            Trouble::Late(late) => {
                let values = end.values(&awaited, late[0]);
                (Status::Timeout, late, values, Why::Late { deadline: call.budget })
            }
        };
        let may_go_on = matches!(why, Why::Gone { .. } | Why::Late { .. });
        let void = self.void(call, slot, flag, status, &lost, values, why);
        if self.degrades && may_go_on {
            self.go_on_without(void);
            return Ok(());
        }
        Err(self.lose(call, slot, void))
    }

    #[allow(clippy::too_many_arguments, reason = "one place builds the whole record")]
    pub(super) fn void(
        &self,
        call: &Call,
        slot: &Slot,
        flag: Flag,
        status: Status,
        lost: &[u32],
        (expected, seen): (u64, u64),
        why: Why,
    ) -> Void {
        Void {
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
    }

    /// The step goes on, and so do later ones: nothing is sent to the lost ranks or heard of them any more.
    pub(super) fn go_on_without(&self, void: Void) {
        let lost = void.lost.clone();
        let error = void.error_of("goes on degraded");
        log(Level::Warn, || error.to_string());
        self.first_error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(error);
        // What is under way to them reads what later steps write.
        if let Some(post) = &self.post {
            lost.iter().for_each(|rank| post.abandon(*rank));
        }
        let mut all = self.lost.lock().unwrap_or_else(|e| e.into_inner());
        lost.iter().for_each(|rank| all.insert(*rank));
    }

    /// Gives a step up: tells every rank, closes the slot, keeps the first error.
    pub(super) fn lose(&self, call: &Call, slot: &mut Slot, void: Void) -> Error {
        let origin = if let Why::GaveUp { origin } = void.why { origin } else { self.rank };
        self.endpoint(call.slot).give_up(slot.epoch(), void.status as u32, &void.lost, origin);
        let error = void.error();
        self.first_error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert_with(|| error.clone());
        slot.closed = Some(error.clone());
        slot.fifos.clear();
        self.post_alone(call.slot, Note::Loss);
        Self::add(&self.stats.steps_lost, 1);
        error
    }
}

fn tell_shape(end: &Endpoint<SlotWords>, peer: u32, offset: u64, words: &[u32]) {
    for (i, word) in words.iter().enumerate() {
        end.tell(peer, offset + i as u64 * 4, *word);
    }
}

fn combine_words(c: &Combine) -> [u32; 4] {
    let code = match c.send_type {
        Float::Bf16 => 0,
        Float::F16 => 1,
        Float::F32 => 2,
    };
    [c.hidden, code, c.has_row_weights as u32, c.wire_sums as u32]
}
