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
use crate::device::map::mask_words;
use crate::device::protocol::Flag;
use crate::device::{Call, Combine, Dispatch, Heard, Taken, Weighting, mail};
use crate::error::{Result, Status};
use crate::fault::Point;
use crate::log::{Level, log};

/// What a note says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Note {
    Dispatch = 1,
    Combine,
    Read,
    Loss,
    Gone,
}

/// The words of a mailbox that a dispatch's note carries: shape, tokens, what the source is at, flags.
const DISPATCH_WORDS: [u64; 12] = {
    let mut words = [0; 12];
    let mut i = 0;
    while i < 8 {
        words[i] = mail::DISPATCH_SHAPE + i as u64 * 8;
        i += 1;
    }
    [words[8], words[9], words[10], words[11]] =
        [mail::TOKENS, mail::PROGRESS, mail::COUNTS_FLAG, mail::DISPATCH_FLAG];
    words
};
const COMBINE_WORDS: [u64; 4] =
    [mail::COMBINE_SHAPE, mail::COMBINE_SHAPE + 8, mail::PROGRESS, mail::COMBINE_FLAG];
const READ_WORDS: [u64; 2] = [mail::PROGRESS, mail::READ_FLAG];
const LOSS_WORDS: [u64; 2] = [mail::LOSS_ORIGIN, mail::LOSS];

/// {kind, 0, slot: u16, generation: u32}, little-endian, and then words.
const HEADER: usize = 8;
const MOST_WORDS: usize = 12 + mask_words(crate::config::MAX_RANKS);
const MOST: usize = HEADER + 8 * MOST_WORDS;

impl Note {
    fn from_byte(byte: u8) -> Option<Note> {
        [Note::Dispatch, Note::Combine, Note::Read, Note::Loss, Note::Gone]
            .into_iter()
            .find(|note| *note as u8 == byte)
    }
    /// Those of the mailbox, in the order in which they are stored.
    fn words(self) -> &'static [u64] {
        match self {
            Note::Dispatch => &DISPATCH_WORDS,
            Note::Combine => &COMBINE_WORDS,
            Note::Read => &READ_WORDS,
            Note::Loss => &LOSS_WORDS,
            Note::Gone => &[],
        }
    }
    fn of(flag: Flag) -> Option<Note> {
        match flag {
            Flag::Dispatch | Flag::Replay => Some(Note::Dispatch),
            Flag::Combine => Some(Note::Combine),
            Flag::Read => Some(Note::Read),
            // They go with the dispatch; FIFOs are not for couriers.
            Flag::Counts | Flag::Rows | Flag::Results => None,
        }
    }
}

/// What a slot's dispatches, and its combines, are sent on.
fn lane(slot: u32, note: Note) -> u32 {
    2 * slot + u32::from(note == Note::Combine)
}

impl Host {
    fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let rank = self.rank;
        self.members().filter(move |peer| *peer != rank)
    }

    /// Sends what was stored for a flag to every peer. `piece`: by peer, where it lies among the boxes, and bytes. `is_last`: the
    /// call ends with it.
    pub(super) fn post(
        &self,
        slot: u32,
        flag: Flag,
        is_last: bool,
        piece: impl Fn(u32) -> (u64, u64),
    ) -> Result<()> {
        let (Some(post), Some(note)) = (&self.post, Note::of(flag)) else { return Ok(()) };
        let (start, bytes) = self.map.inboxes();
        let own = start + self.rank as u64 * bytes;
        for peer in self.peers() {
            let (offset, bytes) = piece(peer);
            let within = offset.saturating_sub(own);
            self.with_note(slot, note, peer, |words| {
                post.send(peer, lane(slot, note), (within, bytes), words)
            })?;
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
                _ => drop(post.send(peer, lane(slot, note), (0, 0), words).inspect_err(|error| {
                    log(Level::Debug, || format!("rank {}: {note:?} to rank {peer}: {error}", self.rank));
                })),
            });
        }
        let _ = self.hear();
    }

    fn with_note<T>(&self, slot: u32, note: Note, peer: u32, send: impl FnOnce(&[u8]) -> T) -> T {
        let mut bytes = [0; MOST];
        let mut length = HEADER;
        bytes[0] = note as u8;
        bytes[2..4].copy_from_slice(&(slot as u16).to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.membership.generation as u32).to_le_bytes());
        let mut put = |word: u64| {
            bytes[length..length + 8].copy_from_slice(&word.to_le_bytes());
            length += 8;
        };
        let mailbox = self.map.mailbox(slot, self.rank);
        match note {
            Note::Gone => put(self.bases.half(peer, self.map.gone(self.rank)).load(Relaxed) as u64),
            Note::Loss => {
                let masks = self.map.loss_mask(slot, self.rank);
                (0..mask_words(self.ranks) as u64)
                    .for_each(|word| put(self.bases.word(peer, masks + word * 8).load(Relaxed)));
            }
            _ => {}
        }
        note.words().iter().for_each(|word| put(self.bases.word(peer, mailbox + word).load(Relaxed)));
        send(&bytes[..length])
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
        let (header, words) = bytes.split_first_chunk::<HEADER>()?;
        let note = Note::from_byte(header[0])?;
        let slot = u16::from_le_bytes([header[2], header[3]]) as u32;
        let generation = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let masks = if note == Note::Loss { mask_words(self.ranks) } else { usize::from(note == Note::Gone) };
        if slot >= self.map.sizes.slots || words.len() != 8 * (masks + note.words().len()) {
            return None;
        }
        // Of a rank that is ahead, it is this one's soon; of one that is behind, never more.
        let ahead = generation.wrapping_sub(self.membership.generation as u32) as i32;
        if ahead != 0 {
            return Some(if ahead > 0 { Taken::Later } else { Taken::Now });
        }
        let mut words =
            words.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
        if note == Note::Gone {
            let gone = self.bases.half(self.rank, self.map.gone(source));
            let _ = gone.compare_exchange(0, words.next()? as u32, Release, Relaxed);
            return Some(Taken::Now);
        }
        let region = self.map.loss_mask(slot, source);
        for (word, at) in words.by_ref().take(masks).zip(0..) {
            self.bases.word(self.rank, region + at * 8).store(word, Relaxed);
        }
        let mailbox = self.map.mailbox(slot, source);
        for (at, word) in note.words().iter().zip(words) {
            self.bases.word(self.rank, mailbox + at).store(word, Release);
        }
        Some(Taken::Now)
    }

    /// Returns when what the slot has sent for a flag has been delivered, as far as its receivers live.
    pub(super) fn await_delivery(&self, call: &Call, slot: &mut Slot, flag: Flag) -> Result<()> {
        let (Some(post), Some(note)) = (&self.post, Note::of(flag)) else { return Ok(()) };
        let mut backoff = Backoff::new();
        loop {
            let mut late = self.peers().filter(|peer| post.is_under_way(*peer, lane(call.slot, note)));
            let Some(first) = late.next() else { return Ok(()) };
            let late: Vec<u32> = std::iter::once(first).chain(late).collect();
            self.hear()?;
            self.check_aborted(call, slot, flag)?;
            if call.started.elapsed() >= call.budget {
                let why = Why::Late { deadline: call.budget };
                let values = (slot.epoch() as u64, slot.epoch() as u64);
                if !self.degrades {
                    return Err(self.lose(call, slot, flag, Status::Timeout, &late, values, why));
                }
                self.go_on_without(call, slot, flag, Status::Timeout, &late, values, why);
            }
            backoff.pause();
        }
    }

    // ------------------------------------------------------------------------------------------- dispatch

    /// Where what this rank sends to a peer lies, and bytes.
    pub(super) fn dispatched(&self, d: &Dispatch, l: &Ledger, peer: u32) -> (u64, u64) {
        let rows = l.rows_for[peer as usize] as u32;
        self.map.dispatched(d.call.slot, self.rank, rows, &d.send.shape.plane_bytes)
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

    /// As `told_rows`, of all keys of a rank's.
    fn told_to(&self, slot: u32, source: u32, rank: u32, bound: u32) -> u64 {
        self.keys_of(rank).map(|key| self.told_rows(slot, source, key, bound) as u64).sum()
    }

    /// The keys of a rank's experts.
    fn keys_of(&self, rank: u32) -> std::ops::Range<u32> {
        let first = self.experts.start(rank);
        first..first + self.experts.count(rank)
    }

    /// Puts each source's results one behind the other, by expert and position, into the outbox for it; behind them the values
    /// that go back beside them. Dropped rows leave gaps.
    pub(super) fn pack_results(&self, c: &Combine) -> Result<()> {
        let mut guard = self.slot(c.call.slot);
        let slot = &mut *guard;
        let l = self.ledger(c.memory);
        if c.weighting == Weighting::Given {
            keep_weights(&c.weights, c.tokens as usize, c.grid.topk as usize, l.given);
        }
        let (number, bound) = (c.call.slot, c.grid.bound);
        let size = c.hidden as u64 * c.send_type.bytes() as u64;
        let combine = self.map.combine(number);
        let result = |row: u64| match &c.send {
            Some(rows) => rows.row(row as usize).cast_const(),
            None => self.bases.at(self.rank, combine + row * size, size).cast_const(),
        };
        let is_compact = c.send.is_none_or(|rows| rows.is_compact());
        let results = self.map.results(number, self.rank);
        slot.cursors.iter_mut().zip(l.starts.iter()).for_each(|(cursor, start)| *cursor = *start as u64);
        let (mut rows, mut bytes, mut remote) = (0, 0, 0);
        for source in self.members() {
            let all = self.told_to(number, source, self.rank, bound) * size;
            let weights = self.map.result_weights(number, self.rank, all);
            let mut at = 0;
            for (place, key) in self.keys_of(self.rank).enumerate() {
                let told = self.told_rows(number, source, key, bound) as u64;
                let first = slot.cursors[place];
                let end = l.starts[place] as u64 + l.counts[place] as u64;
                let kept = (first + told).min(end) - first.min(end);
                let together = if is_compact { kept.max(1) } else { 1 };
                for i in (0..kept).step_by(together as usize) {
                    let (bytes, last) = (together * size, first + i + together - 1);
                    // What its last row is checked for.
                    result(last);
                    let to = self.bases.at(source, results + (at + i) * size, bytes);
                    // SAFETY: so many rows on both sides.
                    unsafe { copy_row(result(first + i), to, bytes as usize, Point::CombineRow) };
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
                slot.cursors[place] += told;
                at += told;
            }
        }
        Self::add(&self.stats.rows_pushed, rows);
        Self::add(&self.stats.bytes_pushed, bytes);
        Self::add(&self.stats.bytes_remote, remote);
        Ok(())
    }

    /// Where the results for a peer lie, and bytes.
    pub(super) fn returned(&self, c: &Combine, peer: u32) -> (u64, u64) {
        let size = c.hidden as u64 * c.send_type.bytes() as u64;
        let rows = self.told_to(c.call.slot, peer, self.rank, c.grid.bound);
        let start = self.map.results(c.call.slot, self.rank);
        let end = match c.has_row_weights {
            true => self.map.result_weights(c.call.slot, self.rank, rows * size) + rows * 4,
            false => start + rows * size,
        };
        (start, if rows == 0 { 0 } else { end - start })
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
