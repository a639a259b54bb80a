//! Bounded FIFOs on the CPU: rows from the caller's tensors to the caller's tensors, through a few entries in the
//! receiver's window.
//!
//! Each rank has one FIFO for each source and slot. The source counts rows in with the FIFO's head, the receiver
//! counts them out with its tail; both only ever grow. Entries carry no header: everybody's counts say how many rows
//! come, and in which order.
//!
//! Rows move in RECV. A slot's RECV takes what it waits for out of its own FIFOs, and meanwhile sends what any slot of
//! the comm has on offer (`pump`), so that ranks may complete slots in different orders. What then still lies on
//! offer, because a peer is in another slot's RECV, is left to the next RECV; the last one leaves nothing, also when
//! it fails.

use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, MutexGuard};

use super::land::{From, FromRow, Landing};
use super::modes::DefaultModes;
use super::push::Made;
use super::reduce::{Pull, put_weight, sum_token};
use super::sync::{Backoff, Slot, point_of};
use super::{Host, copy_row};
use crate::config::OverflowKind;
use crate::device::grid::Grid;
use crate::device::loss::{Why, list};
use crate::device::map::{PLANES, entry_part};
use crate::device::protocol::Flag;
use crate::device::{Block, Call, Combine, Dispatch, Outbound, Rows, mail};
use crate::error::{Error, Result, Status};
use crate::fault::{self, Point};

/// Rows that a receiver hears of at once: it can begin while more are written.
const ROWS_A_WORD: u64 = 32;

/// What a rank has on offer.
#[allow(clippy::large_enum_variant, reason = "two a slot, in place: offering must not allocate")]
enum Offer {
    /// Rows of a dispatch.
    Rows { send: Outbound, grid: Grid, overflow: OverflowKind },
    /// Results, and what goes back beside them.
    Results { rows: Rows, weights: Option<Rows> },
}

/// An offer, and how far it has been sent.
struct Outgoing {
    offer: Offer,
    memory: Arc<Block>,
    /// `next` and `left` are known: the counts that they are made of have come.
    ready: bool,
}

/// The FIFOs of one slot, and what is on offer there.
#[derive(Default)]
pub(super) struct Fifos {
    /// Rows that this rank has written for each peer, and taken from each, since the comm began.
    sent: Vec<u64>,
    pub taken: Vec<u64>,
    /// Where each peer's head must get to.
    pub goals: Vec<u64>,
    /// Scratch: where the next row from each peer goes.
    rows: Vec<usize>,
    /// Scratch: rows that each peer's FIFO still takes, and rows written that it has not been told of.
    credit: Vec<u64>,
    unsaid: Vec<u64>,
    /// The older first. A dispatch's may still be on offer when its combine's joins it, or a combine's when the next
    /// dispatch's does; nothing can be older, for a peer takes it before it sends what comes next.
    offers: [Option<Outgoing>; 2],
    /// Per offer and peer: the next token (or row) to look at, and the rows left to send.
    next: [Vec<u32>; 2],
    left: [Vec<u32>; 2],
}

impl Fifos {
    pub fn new(ranks: usize) -> Fifos {
        let list = || vec![0; ranks];
        Fifos {
            sent: vec![0; ranks],
            taken: vec![0; ranks],
            goals: vec![0; ranks],
            rows: vec![0; ranks],
            credit: vec![0; ranks],
            unsaid: vec![0; ranks],
            offers: [None, None],
            next: [list(), list()],
            left: [list(), list()],
        }
    }
    /// Nothing is on offer any more.
    pub fn clear(&mut self) {
        self.offers = [None, None];
        self.left.iter_mut().for_each(|left| left.fill(0));
    }
    /// Takes back a dispatch that turned out to be void before any of it was sent.
    pub fn withdraw(&mut self) {
        for offer in self.offers.iter_mut().filter(|offer| offer.as_ref().is_some_and(|o| !o.ready)) {
            *offer = None;
        }
    }
    fn is_empty(&self) -> bool {
        self.offers[0].is_none()
    }
    fn has_rows_for(&self, peer: u32) -> bool {
        self.left.iter().any(|left| left[peer as usize] > 0)
    }
    fn add(&mut self, outgoing: Outgoing) -> Result<usize> {
        let free = self.offers.iter().position(Option::is_none);
        let at = free.ok_or_else(|| Error::internal("a slot has more on offer than two operations"))?;
        self.offers[at] = Some(outgoing);
        Ok(at)
    }
    /// Drops offers that have been sent.
    fn retire(&mut self) {
        while self.offers[0].as_ref().is_some_and(|o| o.ready) && self.left[0].iter().all(|left| *left == 0) {
            self.offers.swap(0, 1);
            self.next.swap(0, 1);
            self.left.swap(0, 1);
            self.offers[1] = None;
        }
    }
}

fn waits_for(epoch: u32, flag: Flag, peer: u32) -> u64 {
    (epoch as u64) << 32 | (flag.operation() as u64) << 16 | peer as u64
}

/// The planes of a row in a FIFO's entry.
fn entry_row(bytes: &[u32; PLANES], entry: *const u8) -> FromRow {
    let mut at = 0;
    std::array::from_fn(|plane| {
        let start = at;
        at += entry_part(bytes[plane] as u64) as usize;
        (bytes[plane] > 0).then(|| From::Row(entry.wrapping_add(start)))
    })
}

impl Host {
    fn entry(&self, window: u32, slot: u32, source: u32, number: u64) -> *mut u8 {
        let offset = self.map.fifo_entry(slot, source, number);
        self.bases.at(window, offset, self.map.sizes.entry_bytes())
    }
    /// How many more rows a peer's FIFO takes.
    fn credit(&self, slot: u32, peer: u32, sent: u64) -> u64 {
        self.endpoint(slot).credit(peer, sent, self.map.sizes.fifo_rows as u64)
    }

    pub(super) fn offer_dispatch(&self, d: &Dispatch) -> Result<()> {
        let mut slot = self.slot(d.call.slot);
        let offer = Offer::Rows { send: d.send, grid: d.grid, overflow: d.overflow };
        let at = slot.fifos.add(Outgoing { offer, memory: d.memory.clone(), ready: false })?;
        if d.reuse {
            self.make_ready(&mut slot.fifos, at);
        }
        Ok(())
    }

    pub(super) fn offer_combine(&self, c: &Combine) -> Result<()> {
        let mut slot = self.slot(c.call.slot);
        let Some(rows) = c.send else {
            return Err(Error::internal("results to stream must stand in the caller's tensor"));
        };
        let offer = Offer::Results { rows, weights: c.row_weights };
        let at = slot.fifos.add(Outgoing { offer, memory: c.memory.clone(), ready: true })?;
        let l = self.ledger(c.memory);
        let mut next = 0;
        for (peer, count) in l.rank_counts.iter().enumerate() {
            slot.fifos.next[at][peer] = next;
            slot.fifos.left[at][peer] = *count as u32;
            next += *count as u32;
        }
        Ok(())
    }

    /// Works out how many rows of a dispatch each peer gets; their places are known.
    fn make_ready(&self, fifos: &mut Fifos, at: usize) {
        let Some(outgoing) = &mut fifos.offers[at] else { return };
        let l = self.ledger(&outgoing.memory);
        for (peer, rows) in l.rows_for.iter().enumerate() {
            let room = l.ends[peer].saturating_sub(l.bases[peer]).max(0);
            fifos.next[at][peer] = 0;
            fifos.left[at][peer] = (*rows).min(room) as u32;
        }
        outgoing.ready = true;
    }

    /// Sends what any slot has on offer, as far as the FIFOs take it. True if anything was sent.
    pub(super) fn pump(&self, number: u32, slot: &mut Slot) -> bool {
        if !self.map.sizes.uses.fifos {
            return false;
        }
        let mut sent = self.pump_slot(number, slot);
        for (other, mut slot) in self.other_slots(number) {
            sent |= self.pump_slot(other, &mut slot);
        }
        sent
    }

    fn pump_slot(&self, number: u32, slot: &mut Slot) -> bool {
        if slot.fifos.is_empty() || slot.is_closed() {
            return false;
        }
        let mut sent = false;
        loop {
            sent |= self.send_offer(number, slot);
            let before = slot.fifos.offers[1].is_some();
            slot.fifos.retire();
            // The next offer moves up only when the older one is gone.
            if slot.fifos.is_empty() || !before || slot.fifos.offers[1].is_some() {
                return sent;
            }
        }
    }

    /// Sends the slot's older offer, as far as the FIFOs take it.
    fn send_offer(&self, number: u32, slot: &mut Slot) -> bool {
        let epoch = slot.epoch();
        if let Some(Outgoing { ready: false, offer: Offer::Rows { grid, overflow, .. }, memory }) =
            &slot.fifos.offers[0]
        {
            if !self.endpoint(number).all_have_come(Flag::Counts, epoch) {
                return false;
            }
            self.place_by_counts(number, grid, &mut self.ledger(memory), &mut slot.demands);
            let over = slot.demands.iter().any(|demand| grid.limit > 0 && *demand > grid.limit);
            if over && *overflow == OverflowKind::Error {
                return false;
            }
            self.make_ready(&mut slot.fifos, 0);
        }
        let Slot { fifos, scratch, .. } = slot;
        let Fifos { sent, offers, next, left, credit, unsaid, .. } = fifos;
        let Some(outgoing) = &offers[0] else { return false };
        let (next, left) = (&mut next[0], &mut left[0]);
        let mut rows = 0;
        let mut wrote = |peer: u32, count: u64, row_bytes: u64, sent: u64| {
            if count > 0 {
                self.endpoint(number).tell_head(peer, sent);
                Self::add(&self.stats.rows_fifo, count);
                Self::add(&self.stats.bytes_fifo, count * row_bytes);
                Self::add(&self.stats.bytes_remote, if peer == self.rank { 0 } else { count * row_bytes });
                rows += count;
            }
        };
        match &outgoing.offer {
            Offer::Rows { send, grid, .. } => {
                let l = self.ledger(&outgoing.memory);
                let bytes = &send.shape.plane_bytes;
                let row_bytes = send.wire_bytes();
                let mut made = Made::new(self.rank, send, grid.topk, scratch);
                // Token by token, so that a row is made once for all that take it now.
                let mut open = 0;
                credit.fill(0);
                unsaid.fill(0);
                for peer in self.members() {
                    let at = peer as usize;
                    credit[at] = self.credit(number, peer, sent[at]).min(left[at] as u64);
                    open += u32::from(credit[at] > 0);
                }
                let awaited = next.iter().zip(credit.iter()).filter(|(_, credit)| **credit > 0);
                let first = awaited.map(|(next, _)| *next).min().unwrap_or(send.tokens);
                for token in first..send.tokens {
                    if open == 0 {
                        break;
                    }
                    let mut row = None;
                    for (peer, _) in l.targets(token as usize) {
                        let at = peer as usize;
                        if token < next[at] || credit[at] == 0 {
                            continue;
                        }
                        let row = row.get_or_insert_with(|| made.row(&l, token as usize));
                        let places = entry_row(bytes, self.entry(peer, number, self.rank, sent[at]));
                        for (plane, source) in row.iter().enumerate() {
                            if let (Some(source), Some(From::Row(to))) = (source, places[plane]) {
                                // SAFETY: the entry has room for every plane's row.
                                unsafe {
                                    let bytes = bytes[plane] as usize;
                                    copy_row(*source, to as *mut u8, bytes, Point::FifoEntry);
                                }
                            }
                        }
                        next[at] = token + 1;
                        sent[at] += 1;
                        left[at] -= 1;
                        credit[at] -= 1;
                        unsaid[at] += 1;
                        open -= u32::from(credit[at] == 0);
                        if credit[at] == 0 || unsaid[at] == ROWS_A_WORD {
                            wrote(peer, unsaid[at], row_bytes, sent[at]);
                            unsaid[at] = 0;
                        }
                    }
                }
                for peer in self.members() {
                    wrote(peer, unsaid[peer as usize], row_bytes, sent[peer as usize]);
                }
            }
            Offer::Results { rows, weights } => {
                let size = rows.row_bytes();
                let row_bytes = (size + weights.map_or(0, |w| w.row_bytes())) as u64;
                for peer in self.members() {
                    let at = peer as usize;
                    let before = sent[at];
                    for _ in 0..self.credit(number, peer, before).min(left[at] as u64) {
                        let entry = self.entry(peer, number, self.rank, sent[at]);
                        let row = next[at] as usize;
                        // SAFETY: the entry has room for a result and its weights.
                        unsafe {
                            copy_row(rows.row(row), entry, size, Point::FifoEntry);
                            if let Some(weights) = weights {
                                let to = entry.add(entry_part(size as u64) as usize);
                                std::ptr::copy_nonoverlapping(weights.row(row), to, weights.row_bytes());
                            }
                        }
                        next[at] += 1;
                        sent[at] += 1;
                        left[at] -= 1;
                    }
                    wrote(peer, sent[at] - before, row_bytes, sent[at]);
                }
            }
        }
        rows > 0
    }

    pub(super) fn stream(&self, d: &Dispatch) -> Result<()> {
        let mut guard = self.slot(d.call.slot);
        let slot = &mut *guard;
        let mut next = 0;
        for (peer, kept) in self.ledger(d.memory).rank_counts.iter().enumerate() {
            slot.fifos.goals[peer] = slot.fifos.taken[peer] + *kept as u64;
            slot.fifos.rows[peer] = next;
            next += *kept as usize;
        }
        let mut landing = Landing::new(self, d);
        let bytes = &d.send.shape.plane_bytes;
        let end = self.endpoint(d.call.slot);
        let mut backoff = Backoff::new();
        loop {
            let mut moved = self.pump(d.call.slot, slot);
            let mut done = true;
            for peer in self.members() {
                let at = peer as usize;
                let fifos = &mut slot.fifos;
                let until = end.head(peer).min(fifos.goals[at]);
                while fifos.taken[at] < until {
                    let entry = self.entry(self.rank, d.call.slot, peer, fifos.taken[at]);
                    landing.token(&entry_row(bytes, entry), fifos.rows[at], false);
                    fifos.rows[at] += 1;
                    fifos.taken[at] += 1;
                    moved = true;
                }
                end.tell_tail(peer, fifos.taken[at]);
                done &= fifos.taken[at] == fifos.goals[at];
            }
            if done {
                break;
            }
            self.rest(&d.call, slot, Flag::Rows, Some(d.grid.bound), moved, &mut backoff)?;
        }
        self.flush(&d.call, slot, Flag::Rows)
    }

    pub(super) fn stream_and_reduce(&self, c: &Combine) -> Result<()> {
        let mut guard = self.slot(c.call.slot);
        let slot = &mut *guard;
        let l = self.ledger(c.memory);
        for (peer, rows) in l.rows_for.iter().enumerate() {
            let room = l.ends[peer].saturating_sub(l.bases[peer]).max(0);
            slot.fifos.goals[peer] = slot.fifos.taken[peer] + (*rows).min(room) as u64;
        }
        let (mut token, mut missing) = (0, 0);
        let mut backoff = Backoff::new();
        while {
            let moved = self.pump(c.call.slot, slot);
            let taken = self.take_results(c, slot, &mut token, &mut missing);
            if token < c.tokens {
                self.rest(&c.call, slot, Flag::Results, Some(c.grid.bound), moved || taken, &mut backoff)?;
            }
            token < c.tokens
        } {}
        self.flush(&c.call, slot, Flag::Results)?;
        drop(guard);
        self.combine_status(c.status, c.call.slot, missing, 0);
        Ok(())
    }

    /// Sums tokens, in order, as long as all their results have come. A token's results stand at the front of their
    /// FIFOs together, for every rank sends its own in token order.
    fn take_results(&self, c: &Combine, slot: &mut Slot, token: &mut u32, missing: &mut u64) -> bool {
        let l = self.ledger(c.memory);
        let end = self.endpoint(c.call.slot);
        let _modes = DefaultModes::enter();
        let Slot { fifos, pulls, .. } = slot;
        let topk = c.grid.topk as usize;
        let weights_at = entry_part(c.hidden as u64 * c.send_type.bytes() as u64) as usize;
        let first = *token;
        while *token < c.tokens {
            let at = *token as usize;
            let kept = |peer: u32, position: u32| l.place(peer as usize, position).is_some();
            let come = |peer: u32| end.head(peer) > fifos.taken[peer as usize];
            if !l.targets(at).all(|(peer, position)| !kept(peer, position) || come(peer)) {
                break;
            }
            pulls.clear();
            for (peer, position) in l.targets(at) {
                if kept(peer, position) {
                    let entry = self.entry(self.rank, c.call.slot, peer, fifos.taken[peer as usize]);
                    pulls.push(Pull(entry, None));
                } else {
                    *missing += 1;
                }
            }
            sum_token(c, at, pulls);
            if let Some(out) = &c.out_weights {
                for k in 0..topk {
                    let id = l.ids[at * topk + k];
                    let owner = (id >= 0).then(|| self.experts.place(id as usize).0);
                    let found = l.targets(at).find(|(peer, p)| Some(*peer) == owner && kept(*peer, *p));
                    let value = found.map_or(0.0, |(peer, _)| {
                        let entry = self.entry(self.rank, c.call.slot, peer, fifos.taken[peer as usize]);
                        // SAFETY: top-k float32 stand behind the result.
                        unsafe { (entry.add(weights_at) as *const f32).add(k).read_unaligned() }
                    });
                    put_weight(out, at, k, value);
                }
            }
            for (peer, position) in l.targets(at) {
                if kept(peer, position) {
                    fifos.taken[peer as usize] += 1;
                    end.tell_tail(peer, fifos.taken[peer as usize]);
                }
            }
            *token += 1;
        }
        *token > first
    }

    /// Between two looks at the FIFOs.
    fn rest(
        &self,
        call: &Call,
        slot: &mut Slot,
        flag: Flag,
        bound: Option<u32>,
        moved: bool,
        backoff: &mut Backoff,
    ) -> Result<()> {
        if moved {
            *backoff = Backoff::new();
            return Ok(());
        }
        fault::at(point_of(flag));
        if backoff.looks() {
            let own = self.map.mailbox(call.slot, self.rank) + mail::WAITS_FOR;
            if let Some(peer) = self.endpoint(call.slot).starved_of(&slot.awaited(flag, bound)).next() {
                self.bases.word(self.rank, own).store(waits_for(slot.epoch(), flag, peer), Release);
            }
            self.look_for_trouble(call, slot, flag, bound)?;
        }
        backoff.pause();
        Ok(())
    }

    /// The rank that keeps a peer from taking our rows: itself, or whose rows it waits for in the same operation.
    fn behind(&self, slot_number: u32, epoch: u32, flag: Flag, peer: u32) -> u32 {
        let mut at = peer;
        for _ in 0..self.ranks {
            let word = self.bases.word(at, self.map.mailbox(slot_number, at) + mail::WAITS_FOR).load(Acquire);
            let next = word as u32 & 0xffff;
            if next >= self.ranks || word != waits_for(epoch, flag, next) {
                return at;
            }
            // What it waited for may have come since, and it does not look.
            let head = self.map.mailbox(slot_number, next) + mail::FIFO_HEAD;
            let tail = self.map.mailbox(slot_number, at) + mail::FIFO_TAIL;
            if self.bases.word(at, head).load(Acquire) != self.bases.word(next, tail).load(Acquire) {
                return at;
            }
            at = next;
        }
        peer
    }

    /// Sends what is still on offer before a RECV returns.
    fn flush(&self, call: &Call, slot: &mut Slot, flag: Flag) -> Result<()> {
        let late = self.send_rest(call, slot);
        if late.is_empty() {
            return Ok(());
        }
        self.check_aborted(call, slot, flag)?;
        let mut what =
            format!("{} did not take this rank's rows within {} ms", list(&late), call.budget.as_millis());
        let mut lost: Vec<u32> =
            late.iter().map(|peer| self.behind(call.slot, slot.epoch(), flag, *peer)).collect();
        lost.sort_unstable();
        lost.dedup();
        if lost != late {
            what += &format!(", for want of those of {}", list(&lost));
        }
        Err(self.lose(
            call,
            slot,
            self.void(call, slot, flag, Status::Timeout, &lost, (0, 0), Why::Other(what)),
        ))
    }

    /// A RECV that fails leaves nothing on offer either: other slots' rows are none of its failure's business, and
    /// their tensors are the caller's again.
    pub(super) fn flush_after_failure(&self, call: &Call) {
        if let Some(post) = &self.post {
            post.rest();
        }
        let mut slot = self.slot(call.slot);
        if !self.map.sizes.uses.fifos || self.send_rest(call, &mut slot).is_empty() {
            return;
        }
        slot.fifos.clear();
        self.other_slots(call.slot).for_each(|(_, mut other)| other.fifos.clear());
    }

    /// One call at a time is inside a comm: nobody else holds them.
    fn other_slots(&self, slot: u32) -> impl Iterator<Item = (u32, MutexGuard<'_, Slot>)> {
        let others = self.slots.iter().zip(0..).filter(move |(_, other)| *other != slot);
        others.filter_map(|(mutex, other)| Some((other, mutex.try_lock().ok()?)))
    }

    /// Sends what is on offer on any slot, unless another slot's RECV will: its peers may be there already, and take
    /// nothing of this one before it has ended. Returns the ranks that do not take their rows before the deadline, or
    /// before this comm is aborted.
    fn send_rest(&self, call: &Call, slot: &mut Slot) -> Vec<u32> {
        if self.other_slots(call.slot).any(|(_, other)| other.is_pending()) {
            return Vec::new();
        }
        let mut backoff = Backoff::new();
        loop {
            if self.pump(call.slot, slot) {
                backoff = Backoff::new();
            }
            self.drop_undeliverable(call.slot, slot);
            let mut left = !slot.fifos.is_empty();
            for (number, mut other) in self.other_slots(call.slot) {
                self.drop_undeliverable(number, &mut other);
                left |= !other.fifos.is_empty();
            }
            if !left {
                return Vec::new();
            }
            if self.health.is_aborted() || call.started.elapsed() >= call.budget {
                let awaited = |peer: &u32| {
                    let mut others = self.other_slots(call.slot);
                    slot.fifos.has_rows_for(*peer) || others.any(|(_, other)| other.fifos.has_rows_for(*peer))
                };
                return self.members().filter(awaited).collect();
            }
            backoff.pause();
        }
    }

    /// Forgets rows on offer to ranks that will not take them; this rank's own step is whole without them.
    fn drop_undeliverable(&self, number: u32, slot: &mut Slot) {
        let epoch = slot.epoch();
        let end = self.endpoint(number);
        for peer in self.members() {
            if slot.fifos.has_rows_for(peer)
                && (end.why_gone(peer, &self.health.vitals).is_some() || end.gave_up(peer, epoch).is_some())
            {
                slot.fifos.left.iter_mut().for_each(|left| left[peer as usize] = 0);
            }
        }
        slot.fifos.retire();
    }
}
