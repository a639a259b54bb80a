//! Where a courier carries what this rank sends: what goes with each note, and what a note that is heard does.
//!
//! Rows, counts and words are first stored as where windows are shared, into this rank's own idea of a peer's: the outbox for it,
//! and its mailbox there. A note carries the words that go with one flag, and is heard once what it speaks of is in this rank's
//! inbox at the peer; the peer stores them into its own window, the flag last, and goes on as if they had been stored by their
//! source. A call that waits returns when what it has sent has been delivered, besides: until then peers may not have been told.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::route::{Ledger, keep_weights};
use super::sync::{Backoff, Slot};
use super::{Host, copy_row};
use crate::device::loss::Why;
use crate::device::members::Members;
use crate::device::note::{Note, Read, Written};
use crate::device::protocol::Flag;
use crate::device::{Call, Combine, Dispatch, Heard, Parcel, Taken, Weighting};
use crate::error::{Result, Status};
use crate::fault::Point;
use crate::log::{Level, log};

fn note_of(flag: Flag) -> Option<Note> {
    match flag {
        Flag::Dispatch | Flag::Replay => Some(Note::Dispatch),
        Flag::Combine => Some(Note::Combine),
        Flag::Read => Some(Note::Read),
        // They go with the dispatch; FIFOs are not for couriers.
        Flag::Counts | Flag::Rows | Flag::Results => None,
    }
}

/// Bytes of an expert's results for a rank, on average, from which on they are not copied first.
const DIRECT: u64 = 128 << 10;

/// What a slot's dispatches, and its combines, are sent on.
fn lane(slot: u32, note: Note) -> u32 {
    2 * slot + u32::from(note == Note::Combine)
}

impl Host {
    fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let rank = self.rank;
        self.members().filter(move |peer| *peer != rank)
    }

    /// Sends what was stored for a flag to every peer. `parcels`: by peer, which. `is_last`: the call ends with it.
    pub(super) fn post(
        &self,
        number: u32,
        slot: &mut Slot,
        flag: Flag,
        is_last: bool,
        parcels: impl Fn(u32, &mut Vec<Parcel>),
    ) -> Result<()> {
        let (Some(post), Some(note)) = (&self.post, note_of(flag)) else { return Ok(()) };
        for peer in self.peers() {
            slot.parcels.clear();
            parcels(peer, &mut slot.parcels);
            let all = &slot.parcels;
            self.with_note(number, note, peer, |words| post.send(peer, lane(number, note), all, words))?;
        }
        if is_last {
            post.rest();
        }
        Ok(())
    }

    /// Tells every rank there is that this one has left, or that a step is lost: by notes alone.
    pub(super) fn post_alone(&self, slot: u32, note: Note) {
        let Some(post) = &self.post else { return };
        for peer in (0..self.ranks).filter(|peer| *peer != self.rank) {
            self.with_note(slot, note, peer, |words| match note {
                // Who has left after a flag is no loss: the flag comes first.
                Note::Gone => post.send_last(peer, words),
                _ => drop(post.send(peer, lane(slot, note), &[], words).inspect_err(|error| {
                    log(Level::Debug, || format!("rank {}: {note:?} to rank {peer}: {error}", self.rank));
                })),
            });
        }
        let _ = self.hear();
        // Nobody may call again.
        post.rest();
    }

    fn with_note<T>(&self, slot: u32, note: Note, peer: u32, send: impl FnOnce(&[u8]) -> T) -> T {
        let (mailbox, masks) = (self.map.mailbox(slot, self.rank), self.map.loss_mask(slot, self.rank));
        let word = |offset| self.bases.word(peer, offset).load(Relaxed);
        let before = (0..note.words_before(self.ranks) as u64).map(|at| match note {
            Note::Gone => self.bases.half(peer, self.map.gone(self.rank)).load(Relaxed) as u64,
            _ => word(masks + at * 8),
        });
        let words = before.chain(note.words(false).iter().map(|at| word(mailbox + at)));
        send(Written::new(note, slot, self.membership.generation, words).bytes())
    }

    /// Drives what couriers carry, and stores what they have brought word of.
    pub(super) fn hear(&self) -> Result<()> {
        let Some(post) = &self.post else { return Ok(()) };
        post.poll(&mut |heard| match heard {
            // What it says now is of a group that this rank is no part of.
            Heard::Note(source, _) if self.degrades && self.lost().contains(source) => Taken::Now,
            Heard::Note(source, note) => self.store_note(source, note).unwrap_or_else(|| {
                log(Level::Warn, || {
                    format!(
                        "rank {}: a note of rank {source} makes no sense ({} bytes)",
                        self.rank,
                        note.len()
                    )
                });
                Taken::Now
            }),
            Heard::Lost(peer) => {
                self.health.left(peer);
                Taken::Now
            }
        })
    }

    /// `None` if it is no note.
    fn store_note(&self, source: u32, bytes: &[u8]) -> Option<Taken> {
        let read = Read::new(bytes, (self.ranks, self.map.sizes.slots), false)?;
        // Of a rank that is ahead, it is this one's soon; of one that is behind, never more.
        let ahead = read.ahead_of(self.membership.generation);
        if ahead != 0 {
            return Some(if ahead > 0 { Taken::Later } else { Taken::Now });
        }
        let (slot, note, mut words) = (read.slot, read.note, read.words());
        let before = note.words_before(self.ranks) as u64;
        if note == Note::Gone {
            let gone = self.bases.half(self.rank, self.map.gone(source));
            let _ = gone.compare_exchange(0, words.next()? as u32, Release, Relaxed);
            return Some(Taken::Now);
        }
        let region = self.map.loss_mask(slot, source);
        for (at, word) in (0..before).zip(words.by_ref()) {
            self.bases.word(self.rank, region + at * 8).store(word, Relaxed);
        }
        let mailbox = self.map.mailbox(slot, source);
        for (at, word) in note.words(false).iter().zip(words) {
            self.bases.word(self.rank, mailbox + at).store(word, Release);
        }
        Some(Taken::Now)
    }

    /// Returns when what the slot has sent for a flag has been delivered, as far as its receivers live.
    pub(super) fn await_delivery(&self, call: &Call, slot: &mut Slot, flag: Flag) -> Result<()> {
        let (Some(post), Some(note)) = (&self.post, note_of(flag)) else { return Ok(()) };
        let mut backoff = Backoff::new();
        loop {
            let mut late = self.peers().filter(|peer| post.is_under_way(*peer, lane(call.slot, note)));
            let Some(first) = late.next() else { return Ok(()) };
            let late: Vec<u32> = std::iter::once(first).chain(late).collect();
            self.hear()?;
            // Who has left does not take the rest.
            let end = self.endpoint(call.slot);
            let has_left = |peer: &&u32| end.why_gone(**peer, &self.health.vitals).is_some();
            late.iter().filter(has_left).for_each(|peer| post.abandon(*peer));
            self.check_aborted(call, slot, flag)?;
            if call.started.elapsed() >= call.budget {
                let why = Why::Late { deadline: call.budget };
                let values = (slot.epoch() as u64, slot.epoch() as u64);
                if !self.degrades {
                    return Err(self.lose(
                        call,
                        slot,
                        self.void(call, slot, flag, Status::Timeout, &late, values, why),
                    ));
                }
                self.go_on_without(self.void(call, slot, flag, Status::Timeout, &late, values, why));
            }
            backoff.pause();
        }
    }

    // ------------------------------------------------------------------------------------------- dispatch

    /// What lies at an offset of the outbox for a peer.
    fn of_outbox(&self, peer: u32, offset: u64, bytes: u64) -> Parcel {
        let (start, each) = self.map.inboxes();
        let from = self.bases.at(peer, offset, bytes) as u64;
        Parcel { from, within: offset - start - self.rank as u64 * each, bytes }
    }

    /// What this rank sends to a peer: its counts, and behind them the rows.
    pub(super) fn dispatched(&self, d: &Dispatch, l: &Ledger, peer: u32, parcels: &mut Vec<Parcel>) {
        let rows = l.rows_for[peer as usize] as u32;
        let (offset, bytes) = self.map.dispatched(d.call.slot, self.rank, rows, &d.send.shape.plane_bytes);
        parcels.push(self.of_outbox(peer, offset, bytes));
    }

    /// This rank's rows by expert, of a routing that is replayed: they are told again.
    pub(super) fn count_again(&self, d: &Dispatch) {
        let mut slot = self.slot(d.call.slot);
        let l = self.ledger(d.memory);
        slot.rows_of.fill(0);
        for choice in 0..d.send.tokens as usize * d.grid.topk as usize {
            if let Some((key, position)) = l.choice(choice) {
                let rows = &mut slot.rows_of[key];
                *rows = (*rows).max(position as i32 + 1);
            }
        }
    }

    // -------------------------------------------------------------------------------------------- combine

    /// A source's rows for a key, as it has told, in this rank's own inbox.
    fn told_rows(&self, slot: u32, source: u32, key: u32, bound: u32) -> u32 {
        let at = self.map.counts(slot, source) + key as u64 * 4;
        // What a peer wrote is bounded before it is an index.
        self.bases.half(self.rank, at).load(Acquire).min(bound)
    }

    /// Keeps what the sources have told of this rank's experts: a peer that is a step ahead tells more.
    pub(super) fn keep_told(&self, number: u32, bound: u32, told: &mut [u32]) {
        if !self.map.sizes.uses.posted {
            return;
        }
        let local = self.experts.count(self.rank) as usize;
        for source in self.members() {
            for (place, key) in self.keys_of(self.rank).enumerate() {
                told[source as usize * local + place] = self.told_rows(number, source, key, bound);
            }
        }
    }

    /// A source's rows, as they are kept by own expert.
    fn all_told(&self, told: &[u32], source: u32) -> u64 {
        let local = self.experts.count(self.rank) as usize;
        told[source as usize * local..][..local].iter().map(|rows| *rows as u64).sum()
    }

    /// The keys of a rank's experts.
    fn keys_of(&self, rank: u32) -> std::ops::Range<u32> {
        let first = self.experts.start(rank);
        first..first + self.experts.count(rank)
    }

    /// A source's results by key: the key's first row and how many are kept, and how many of the source's lie before them where they
    /// are brought. Dropped rows leave gaps there.
    fn runs<'a>(
        &self,
        l: &'a Ledger,
        told: &'a [u32],
        (placed, source): (Members, u32),
    ) -> impl Iterator<Item = (u64, u64, u64)> + use<'a> {
        let local = self.experts.count(self.rank) as usize;
        let rows = move |rank: u32, place: usize| told[rank as usize * local + place] as u64;
        let mut at = 0;
        (0..local).map(move |place| {
            let before: u64 =
                placed.iter().take_while(|rank| *rank < source).map(|rank| rows(rank, place)).sum();
            let (first, mine) = (l.starts[place] as u64 + before, rows(source, place));
            let end = l.starts[place] as u64 + l.counts[place] as u64;
            let run = (first, (first + mine).min(end) - first.min(end), at);
            at += mine;
            run
        })
    }

    /// If a source's results are fetched from where the experts wrote them: in as many parcels as there are experts, which pays
    /// where those are large.
    fn is_direct(&self, c: &Combine, told: &[u32], source: u32) -> bool {
        let size = c.hidden as u64 * c.send_type.bytes() as u64;
        let keys = self.experts.count(self.rank) as u64;
        c.send.is_none() && self.all_told(told, source) * size >= keys * DIRECT
    }

    /// Puts each source's results one behind the other, by expert and position, into the outbox for it, unless they are fetched from
    /// where they are; behind them the values that go back beside them. This rank's own stay where they are if they may.
    pub(super) fn pack_results(&self, c: &Combine) -> Result<()> {
        let mut guard = self.slot(c.call.slot);
        let l = self.ledger(c.memory);
        if c.weighting == Weighting::Given {
            keep_weights(&c.weights, c.tokens as usize, c.grid.topk as usize, l.given);
        }
        // The caller's rows are there as long as the call is.
        guard.in_place = c.send.is_none() || !c.split;
        let number = c.call.slot;
        let size = c.hidden as u64 * c.send_type.bytes() as u64;
        let is_compact = c.send.is_none_or(|rows| rows.is_compact());
        let results = self.map.results(number, self.rank);
        let (mut rows, mut bytes, mut remote) = (0, 0, 0);
        for source in self.members() {
            let all = self.all_told(&guard.told, source) * size;
            let weights = self.map.result_weights(number, self.rank, all);
            let stays =
                if source == self.rank { guard.in_place } else { self.is_direct(c, &guard.told, source) };
            for (first, kept, at) in self.runs(&l, &guard.told, (guard.placed, source)) {
                let together = if is_compact { kept.max(1) } else { 1 };
                for i in (0..if stays { 0 } else { kept }).step_by(together as usize) {
                    let (bytes, last) = (together * size, first + i + together - 1);
                    // What its last row is checked for.
                    self.result(c, last, size);
                    let to = self.bases.at(source, results + (at + i) * size, bytes);
                    // SAFETY: so many rows on both sides.
                    unsafe {
                        copy_row(self.result(c, first + i, size), to, bytes as usize, Point::CombineRow)
                    };
                }
                for i in (0..kept).filter(|_| c.row_weights.is_some()) {
                    let Some(values) = &c.row_weights else { continue };
                    let to = self.bases.at(source, weights + (at + i) * 4, 4);
                    // SAFETY: a float32 on both sides.
                    unsafe { copy_row(values.row((first + i) as usize), to, 4, Point::CombineRow) };
                }
                let moved = kept * (size + if c.row_weights.is_some() { 4 } else { 0 });
                rows += kept;
                bytes += moved;
                remote += if source == self.rank { 0 } else { moved };
            }
        }
        Self::add(&self.stats.rows_pushed, rows);
        Self::add(&self.stats.bytes_pushed, bytes);
        Self::add(&self.stats.bytes_remote, remote);
        Ok(())
    }

    /// A row of the experts'.
    pub(super) fn result(&self, c: &Combine, row: u64, size: u64) -> *const u8 {
        match &c.send {
            Some(rows) => rows.row(row as usize),
            None => self.bases.at(self.rank, self.map.combine(c.call.slot) + row * size, size),
        }
    }

    /// The results for a peer.
    pub(super) fn returned(
        &self,
        c: &Combine,
        (placed, told, peer): (Members, &[u32], u32),
        parcels: &mut Vec<Parcel>,
    ) {
        let size = c.hidden as u64 * c.send_type.bytes() as u64;
        let rows = self.all_told(told, peer);
        let start = self.map.results(c.call.slot, self.rank);
        if rows == 0 {
            return;
        }
        let weights = self.map.result_weights(c.call.slot, self.rank, rows * size);
        if !self.is_direct(c, told, peer) {
            let end = if c.has_row_weights { weights + rows * 4 } else { start + rows * size };
            return parcels.push(self.of_outbox(peer, start, end - start));
        }
        let l = self.ledger(c.memory);
        for (first, kept, at) in self.runs(&l, told, (placed, peer)).filter(|(_, kept, _)| *kept > 0) {
            self.result(c, first + kept - 1, size);
            let from = self.result(c, first, size) as u64;
            parcels.push(Parcel { from, ..self.of_outbox(peer, start + at * size, kept * size) });
        }
        if c.has_row_weights {
            parcels.push(self.of_outbox(peer, weights, rows * 4));
        }
    }

    /// Of this rank's rows: by key, how many lie before it among those for its owner. And by owner, where the values beside
    /// its results begin.
    pub(super) fn lay_out_results(&self, c: &Combine, slot: &mut Slot) {
        let size = c.hidden as u64 * c.send_type.bytes() as u64;
        for owner in 0..self.ranks {
            let mut before = 0;
            for key in self.keys_of(owner) {
                slot.firsts[key as usize] = before;
                before += self.told_rows(c.call.slot, self.rank, key, c.grid.bound);
            }
            slot.beside[owner as usize] = self.map.result_weights(c.call.slot, owner, before as u64 * size);
        }
    }
}
