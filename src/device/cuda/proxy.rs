//! The thread that sends what kernels have left on desks, and stores what peers send.
//!
//! Kernels tell it by the very words that they would raise in a peer's window: a flag of a desk that has another epoch than what was sent
//! last is up, and all that it covers is there. What a peer is sent of a slot goes one behind the other: a note must not overtake what was said
//! before it. A flag that is heard is stored into the own desk, where kernels wait for it.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::desks::Desks;
use super::lock;
use crate::config::Experts;
use crate::device::map::{FIRST_EPOCH, INBOX_ALIGN, Map, PLANES};
use crate::device::note::{Note, Read, Written};
use crate::device::protocol::{Flag, WITHOUT, progress, reached};
use crate::device::{Health, Heard, Membership, Parcel, Post, Shape, Taken, mail};
use crate::error::{Error, Result};
use crate::log::{Level, log};

/// Looks without a pause once there was nothing to do: while something is on its way, which goes on by looks alone, and else. After
/// that the pauses, at first and at last.
const EAGER_IN_A_STEP: Duration = Duration::from_secs(1);
const EAGER: Duration = Duration::from_millis(2);
const PAUSE: Duration = Duration::from_micros(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// What kernels have left before the comm was destroyed is sent within this, or not at all.
const LINGER: Duration = Duration::from_secs(2);

/// What a peer was sent last of a slot.
#[derive(Clone, Copy)]
struct Sent {
    dispatch: u64,
    combine: u64,
    read: u64,
    loss: u64,
    /// Of the last dispatch: max_tokens of the step.
    bound: u32,
    /// The epoch of the last flag, and what it was sent on.
    epoch: u32,
    lane: u32,
}

impl Sent {
    fn nothing() -> Sent {
        let epoch = FIRST_EPOCH.wrapping_sub(1);
        let flag = (epoch as u64) << 32;
        Sent { dispatch: flag, combine: flag, read: flag, loss: 0, bound: 0, epoch, lane: 0 }
    }
}

struct State {
    membership: Membership,
    /// By slot and rank.
    sent: Vec<Sent>,
    last_words: LastWords,
}

/// How far a rank has come that leaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LastWords {
    /// It does not leave.
    None,
    /// It says that it leaves, and why, once all is sent, or then at the latest.
    After(Instant, u32),
    Said,
}

/// What the thread has.
struct Office {
    rank: u32,
    map: Map,
    /// The experts that are this rank's.
    own: Vec<u32>,
    desks: Arc<Desks>,
    post: Arc<dyn Post>,
    health: Arc<Health>,
    state: Mutex<State>,
    failure: OnceLock<Error>,
    is_over: AtomicBool,
}

/// Joined on drop.
pub struct Proxy {
    office: Arc<Office>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn start(
        (rank, map, experts): (u32, &Map, &Experts),
        desks: Arc<Desks>,
        post: Arc<dyn Post>,
        health: Arc<Health>,
        membership: Membership,
    ) -> Result<Proxy> {
        let boxes = map.sizes.slots as usize * map.sizes.ranks() as usize;
        let own = (0..experts.num()).filter(|expert| experts.place(*expert as usize).0 == rank).collect();
        let state = State { membership, sent: vec![Sent::nothing(); boxes], last_words: LastWords::None };
        let office = Arc::new(Office {
            rank,
            map: map.clone(),
            own,
            desks,
            post,
            health,
            state: Mutex::new(state),
            failure: OnceLock::new(),
            is_over: AtomicBool::new(false),
        });
        let (works, name) = (office.clone(), format!("a2a-proxy-{rank}"));
        let thread = std::thread::Builder::new().name(name).spawn(move || works.work());
        let thread = thread.map_err(|e| Error::system(format!("rank {rank}: the proxy's thread"), e))?;
        Ok(Proxy { office, thread: Some(thread) })
    }

    /// From now on these take part, and begin at the first epoch. No kernel of this rank is on its way.
    pub fn begin_anew(&self, membership: Membership) {
        let mut state = lock(&self.office.state);
        self.office.desks.reset();
        state.membership = membership;
        state.sent.fill(Sent::nothing());
    }

    /// Tells every peer, behind all that was sent, that this rank takes part no more. `why`: as gone words have it.
    pub fn leave(&self, why: u32) {
        let mut state = lock(&self.office.state);
        if state.last_words == LastWords::None {
            state.last_words = LastWords::After(Instant::now() + LINGER, why);
        }
    }

    /// Why it sends nothing more.
    pub fn failure(&self) -> Option<Error> {
        self.office.failure.get().cloned()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.office.is_over.store(true, Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Office {
    fn work(&self) {
        let (mut idle_since, mut pause) = (None, PAUSE);
        loop {
            let mut state = lock(&self.state);
            let done = self.hear(&mut state).and_then(|heard| Ok(heard | self.send_all(&mut state)?));
            let is_busy = done.unwrap_or_else(|error| {
                let error = error.context(format!("rank {}", self.rank));
                if self.failure.set(error.clone()).is_ok() {
                    log(Level::Error, || error.to_string());
                }
                // Kernels that wait would wait in vain.
                self.health.abort();
                false
            });
            if let LastWords::After(until, why) = state.last_words
                && (Instant::now() >= until || !is_busy && self.has_sent_all(&state))
            {
                self.say_gone(&state, why);
                state.last_words = LastWords::Said;
            }
            let is_silent = !matches!(state.last_words, LastWords::After(..));
            let eager = if is_busy || self.is_in_a_step(&state) { EAGER_IN_A_STEP } else { EAGER };
            drop(state);
            if is_silent && self.is_over.load(Acquire) {
                break;
            }
            if is_busy {
                (idle_since, pause) = (None, PAUSE);
                continue;
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() < eager {
                std::thread::yield_now();
                continue;
            }
            std::thread::sleep(pause);
            pause = (pause + pause / 16).min(LONGEST_PAUSE);
        }
        // Nobody may poll again.
        self.post.rest();
    }

    fn ranks(&self) -> u32 {
        self.map.sizes.ranks()
    }

    // ---------------------------------------------------------------------------------------------- what goes out

    /// What kernels have left for a peer in this rank's mailbox of a slot.
    fn left(&self, peer: u32, slot: u32, word: u64) -> u64 {
        self.desks.word(peer, self.desks.words().mailbox(slot, self.rank) + word).load(Acquire)
    }

    fn peers(&self, state: &State) -> impl Iterator<Item = u32> + use<> {
        let rank = self.rank;
        state.membership.members.iter().filter(move |peer| *peer != rank)
    }

    /// True if there was anything to send.
    fn send_all(&self, state: &mut State) -> Result<bool> {
        let mut is_busy = false;
        for slot in 0..self.map.sizes.slots {
            for peer in self.peers(state) {
                is_busy |= self.send_next(state, slot, peer)?;
            }
        }
        Ok(is_busy)
    }

    /// Sends what is due to a peer next, if it may be sent; true if there was anything.
    fn send_next(&self, state: &mut State, slot: u32, peer: u32) -> Result<bool> {
        let generation = state.membership.generation;
        let sent = &mut state.sent[(slot * self.ranks() + peer) as usize];
        let loss = self.left(peer, slot, mail::LOSS);
        if loss != sent.loss {
            sent.loss = loss;
            self.send(slot, peer, Note::Loss, generation, &[], |word| self.left(peer, slot, word))?;
        }
        let flags = [
            (Note::Dispatch, self.left(peer, slot, mail::DISPATCH_PAIR), sent.dispatch),
            (Note::Read, self.left(peer, slot, mail::READ_FLAG), sent.read),
            (Note::Combine, self.left(peer, slot, mail::COMBINE_FLAG), sent.combine),
        ];
        let since = sent.epoch;
        let ahead = |flag: u64| ((flag >> 32) as u32).wrapping_sub(since) as i32;
        // Of one epoch in this order.
        let up = flags.into_iter().filter(|(_, now, before)| now != before);
        let Some((note, flag, _)) = up.min_by_key(|(_, now, _)| ahead(*now)) else { return Ok(false) };
        if self.post.is_under_way(peer, sent.lane) {
            return Ok(false);
        }
        let epoch = (flag >> 32) as u32;
        let mut parcels = Vec::new();
        let (says, lane) = match note {
            Note::Dispatch => {
                let shape = self.shape_of(peer, slot);
                sent.bound = shape.bound;
                self.pack(slot, peer, flag as u32 & 0x7fff_ffff, &shape, &mut parcels);
                let replays = self.left(peer, slot, mail::TOKENS) >> 32 != 0;
                (if replays { Flag::Replay } else { Flag::Dispatch }, 2 * slot)
            }
            Note::Combine => {
                self.results(slot, peer, sent.bound, &mut parcels);
                (Flag::Combine, 2 * slot + 1)
            }
            _ => (Flag::Read, 2 * slot),
        };
        // The word that stands there may be of what follows.
        let bound = if note == Note::Read { 0 } else { sent.bound };
        let progress = progress(epoch, says.operation(), bound);
        let flag_word = match note {
            Note::Dispatch => mail::DISPATCH_PAIR,
            Note::Combine => mail::COMBINE_FLAG,
            _ => mail::READ_FLAG,
        };
        self.send(slot, peer, note, generation, &parcels, |word| match word {
            mail::PROGRESS => progress,
            _ if word == flag_word => flag,
            _ => self.left(peer, slot, word),
        })?;
        (sent.epoch, sent.lane) = (epoch, lane);
        match note {
            Note::Dispatch => sent.dispatch = flag,
            Note::Combine => sent.combine = flag,
            _ => sent.read = flag,
        }
        Ok(true)
    }

    fn send(
        &self,
        slot: u32,
        peer: u32,
        note: Note,
        generation: u64,
        parcels: &[Parcel],
        word: impl Fn(u64) -> u64,
    ) -> Result<()> {
        let masks = self.desks.words().loss_mask(slot, self.rank);
        let before = (0..note.words_before(self.ranks()) as u64)
            .map(|at| self.desks.word(peer, masks + at * 8).load(Relaxed));
        let words = before.chain(note.words(true).iter().map(|at| word(*at)));
        let written = Written::new(note, slot, generation, words);
        self.post.send(peer, 2 * slot + u32::from(note == Note::Combine), parcels, written.bytes())
    }

    /// The shape that this rank dispatches.
    fn shape_of(&self, peer: u32, slot: u32) -> Shape {
        let word = |at: usize| {
            let two = self.left(peer, slot, mail::DISPATCH_SHAPE + at as u64 / 2 * 8);
            (two >> (32 * (at % 2))) as u32
        };
        Shape {
            bound: word(0),
            topk: word(1),
            token_type: word(2),
            plane_bytes: std::array::from_fn(|plane| word(3 + plane)),
        }
    }

    /// Puts the planes that kernels have left apart one behind the other: one parcel is what couriers like.
    fn pack(&self, slot: u32, peer: u32, rows: u32, shape: &Shape, parcels: &mut Vec<Parcel>) {
        let (counts, start, end) = self.map.in_inbox(slot);
        let (desk, outbox) = (self.desks.box_of(peer), self.desks.outbox(peer));
        let (mut from, mut to) = (start, start);
        let moved = |from: u64, to: u64, bytes: u64| {
            if bytes == 0 || desk + from == outbox + to {
                return;
            }
            assert!(from.max(to) + bytes <= end, "{bytes} bytes of a box at {from}, {to}");
            // SAFETY: inside boxes, of which kernels have left one and nobody reads the other; they may overlap.
            unsafe { std::ptr::copy((desk + from) as *const u8, (outbox + to) as *mut u8, bytes as usize) };
        };
        moved(counts, counts, start - counts);
        for plane in 0..PLANES {
            let bytes = rows as u64 * shape.plane_bytes[plane] as u64;
            moved(from, to, bytes);
            to += bytes.next_multiple_of(INBOX_ALIGN);
            from += (shape.bound as u64 * shape.plane_bytes[plane] as u64).next_multiple_of(INBOX_ALIGN);
        }
        parcels.push(Parcel { from: outbox + counts, within: counts, bytes: to - counts });
    }

    /// The results for a peer's tokens, as many as it has told of.
    fn results(&self, slot: u32, peer: u32, bound: u32, parcels: &mut Vec<Parcel>) {
        let (counts, _, start) = self.map.in_inbox(slot);
        let told = |expert: u32| {
            let at = self.desks.inbox(peer) + counts + expert as u64 * 8;
            // SAFETY: a word of an inbox, whose bytes couriers have brought; kernels only read it.
            let word = unsafe { AtomicU64::from_ptr(at as *mut u64) }.load(Relaxed);
            (word as u32).min(bound) as u64
        };
        let rows =
            self.own.iter().map(|expert| told(*expert)).sum::<u64>().min(self.map.sizes.most_results());
        if rows == 0 {
            return;
        }
        let shape = [0, 8].map(|at| self.left(peer, slot, mail::COMBINE_SHAPE + at));
        let (hidden, float, has_weights) = (shape[0] as u32 as u64, shape[0] >> 32, shape[1] as u32 != 0);
        let mut bytes = rows * hidden * if float == 2 { 4 } else { 2 };
        if has_weights {
            bytes = bytes.next_multiple_of(INBOX_ALIGN) + rows * 4;
        }
        let (desk, outbox) = (self.desks.box_of(peer), self.desks.outbox(peer));
        assert!(start + bytes <= self.desks.box_bytes(), "{bytes} bytes of results at {start}");
        if desk != outbox {
            // SAFETY: as in `pack`, and apart.
            unsafe {
                let (from, to) = ((desk + start) as *const u8, (outbox + start) as *mut u8);
                std::ptr::copy_nonoverlapping(from, to, bytes as usize);
            }
        }
        parcels.push(Parcel { from: outbox + start, within: start, bytes });
    }

    /// True if something is under way to a peer, or of it: it was sent what it has not sent.
    fn is_in_a_step(&self, state: &State) -> bool {
        let slots = 0..self.map.sizes.slots;
        slots.flat_map(|slot| self.peers(state).map(move |peer| (slot, peer))).any(|(slot, peer)| {
            let sent = &state.sent[(slot * self.ranks() + peer) as usize];
            let mailbox = self.desks.words().mailbox(slot, peer);
            let is_due = |sent: u64, word: u64| {
                let heard = self.desks.word(self.rank, mailbox + word).load(Relaxed);
                !reached(heard, (sent >> 32) as u32)
            };
            self.post.is_under_way(peer, sent.lane)
                || is_due(sent.dispatch, mail::DISPATCH_PAIR)
                || is_due(sent.combine, mail::COMBINE_FLAG)
        })
    }

    fn has_sent_all(&self, state: &State) -> bool {
        let lanes = (0..self.map.sizes.slots).flat_map(|slot| [2 * slot, 2 * slot + 1]);
        lanes
            .flat_map(|lane| self.peers(state).map(move |peer| (peer, lane)))
            .all(|(peer, lane)| self.health.is_dead(peer) || !self.post.is_under_way(peer, lane))
    }

    fn say_gone(&self, state: &State, why: u32) {
        let written = Written::new(Note::Gone, 0, state.membership.generation, std::iter::once(why as u64));
        (0..self.ranks())
            .filter(|peer| *peer != self.rank)
            .for_each(|peer| self.post.send_last(peer, written.bytes()));
    }

    // ----------------------------------------------------------------------------------------------- what comes in

    /// True if anything was heard.
    fn hear(&self, state: &mut State) -> Result<bool> {
        let mut heard_any = false;
        let generation = state.membership.generation;
        self.post.poll(&mut |heard| match heard {
            Heard::Note(source, bytes) => {
                let slots = self.map.sizes.slots;
                let Some(read) = Read::new(bytes, (self.ranks(), slots), true) else {
                    log(Level::Warn, || {
                        let bytes = bytes.len();
                        format!("rank {}: a note of rank {source} makes no sense ({bytes} bytes)", self.rank)
                    });
                    return Taken::Now;
                };
                let ahead = read.ahead_of(generation);
                if ahead == 0 {
                    heard_any = true;
                    self.store(source, &read);
                }
                if ahead > 0 { Taken::Later } else { Taken::Now }
            }
            Heard::Lost(peer) => {
                self.health.left(peer);
                Taken::Now
            }
        })?;
        Ok(heard_any)
    }

    fn store(&self, source: u32, read: &Read) {
        let (slot, note, mut words) = (read.slot, read.note, read.words());
        if note == Note::Gone {
            let why = (words.next().unwrap_or_default() as u32).clamp(1, WITHOUT);
            if self.desks.gone(source).compare_exchange(0, why, AcqRel, Relaxed).is_ok() {
                self.health.left_because(source, why);
            }
            return;
        }
        let masks = self.desks.words().loss_mask(slot, source);
        for (at, word) in (0..note.words_before(self.ranks()) as u64).zip(words.by_ref()) {
            self.desks.word(self.rank, masks + at * 8).store(word, Relaxed);
        }
        let mailbox = self.desks.words().mailbox(slot, source);
        for (at, word) in note.words(true).iter().zip(words) {
            self.desks.word(self.rank, mailbox + at).store(word, Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::super::desks;
    use super::*;
    use crate::config::LayoutKind;
    use crate::device::grid::Grid;
    use crate::device::map::{IDS, Sizes, TOKENS, Uses};

    const BOUND: u32 = 4;
    const EXPERTS: u32 = 4;
    /// The first epoch of a comm.
    const FIRST: u32 = FIRST_EPOCH;

    fn map() -> Map {
        let uses =
            Uses { counts: true, rows: true, banks: true, posted: true, fetched: true, ..Uses::default() };
        let mut plane_bytes = [0; PLANES];
        plane_bytes[..4].copy_from_slice(&[32, 8, 8, 8]);
        let grid =
            Grid { layout: LayoutKind::ExpertPadded, ranks: 2, bound: 8, topk: 2, alignment: 1, limit: 0 };
        Map::new(Sizes {
            grid,
            slots: 2,
            num_experts: EXPERTS,
            experts: 2,
            plane_bytes,
            quantises: false,
            columns: false,
            combine_bytes: 32,
            uses,
            fifo_rows: 0,
            fifo_pieces: 0,
        })
        .unwrap()
    }

    struct Letter {
        from: u32,
        lane: u32,
        parcels: Vec<(u64, Vec<u8>)>,
        note: Vec<u8>,
    }

    /// Between two ranks of this process.
    struct Street {
        desks: [Arc<Desks>; 2],
        letters: [Mutex<VecDeque<Letter>>; 2],
        is_closed: AtomicBool,
    }

    struct End(u32, Arc<Street>);

    impl Post for End {
        fn send(&self, peer: u32, lane: u32, parcels: &[Parcel], note: &[u8]) -> Result<()> {
            // SAFETY: bytes of this rank's boxes.
            let read = |parcel: &Parcel| unsafe {
                std::slice::from_raw_parts(parcel.from as *const u8, parcel.bytes as usize).to_vec()
            };
            let parcels = parcels.iter().map(|parcel| (parcel.within, read(parcel))).collect();
            let letter = Letter { from: self.0, lane, parcels, note: note.to_vec() };
            lock(&self.1.letters[peer as usize]).push_back(letter);
            Ok(())
        }
        fn abandon(&self, _peer: u32) {}
        fn send_last(&self, peer: u32, note: &[u8]) {
            self.send(peer, 0, &[], note).unwrap();
        }
        fn poll(&self, hear: &mut dyn FnMut(Heard) -> Taken) -> Result<()> {
            if self.1.is_closed.load(Acquire) {
                return Ok(());
            }
            let letters = std::mem::take(&mut *lock(&self.1.letters[self.0 as usize]));
            for letter in letters {
                for (within, bytes) in &letter.parcels {
                    let to = self.1.desks[self.0 as usize].inbox(letter.from) + within;
                    // SAFETY: as many bytes as an inbox has, by `pack`'s own check.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
                }
                hear(Heard::Note(letter.from, &letter.note));
            }
            Ok(())
        }
        fn is_under_way(&self, peer: u32, lane: u32) -> bool {
            let letters = lock(&self.1.letters[peer as usize]);
            letters.iter().any(|letter| letter.lane == lane && !letter.parcels.is_empty())
        }
        fn rest(&self) {}
    }

    fn street() -> Arc<Street> {
        let desks = [0, 1].map(|rank| {
            let desks = desks::over_plain_memory(rank, &map());
            desks.reset();
            desks
        });
        Arc::new(Street { desks, letters: Default::default(), is_closed: AtomicBool::new(false) })
    }

    fn proxy(street: &Arc<Street>, rank: u32) -> (Proxy, Arc<Health>) {
        let (health, experts) = (Arc::new(Health::new(2)), Experts::contiguous(EXPERTS, 2));
        let who = (rank, &map(), &experts);
        let post = Arc::new(End(rank, street.clone()));
        let desks = street.desks[rank as usize].clone();
        let proxy = Proxy::start(who, desks, post, health.clone(), Membership::first(2)).unwrap();
        (proxy, health)
    }

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// What a rank's kernels do that store one of the mailbox's words for a peer.
    fn say(desks: &Desks, rank: u32, peer: u32, slot: u32, word: u64, value: u64) {
        desks.word(peer, desks.words().mailbox(slot, rank) + word).store(value, Release);
    }
    /// What a rank's kernels see.
    fn see(desks: &Desks, rank: u32, source: u32, slot: u32, word: u64) -> u64 {
        desks.word(rank, desks.words().mailbox(slot, source) + word).load(Acquire)
    }
    fn flag(epoch: u32, number: u32) -> u64 {
        (epoch as u64) << 32 | number as u64
    }

    fn fill(at: u64, bytes: &[u8]) {
        // SAFETY: inside a box.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }
    fn bytes_at(at: u64, bytes: u64) -> Vec<u8> {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(at as *const u8, bytes as usize).to_vec() }
    }
    fn pattern(seed: u8, bytes: u64) -> Vec<u8> {
        (0..bytes).map(|at| (at as u8).wrapping_mul(7) ^ seed).collect()
    }

    /// A dispatch of so many rows, planes as far apart as a step's bound has them; counts of each expert.
    fn dispatch(desks: &Desks, (rank, peer, slot): (u32, u32, u32), epoch: u32, rows: u32, counts: [u32; 4]) {
        let (at, mut plane_at, _) = map().in_inbox(slot);
        for (expert, count) in (0..).zip(counts) {
            fill(desks.box_of(peer) + at + expert * 8, &flag(epoch, count).to_le_bytes());
        }
        for (plane, bytes) in [(TOKENS, 32u64), (IDS, 8), (2, 8), (3, 8)] {
            fill(desks.box_of(peer) + plane_at, &pattern(plane as u8 ^ epoch as u8, rows as u64 * bytes));
            plane_at += (BOUND as u64 * bytes).next_multiple_of(16);
        }
        let mut shape = [0u32; Shape::WORDS];
        shape[..7].copy_from_slice(&[BOUND, 2, 99, 32, 8, 8, 8]);
        for (at, two) in shape.chunks_exact(2).enumerate() {
            let word = mail::DISPATCH_SHAPE + at as u64 * 8;
            say(desks, rank, peer, slot, word, (two[1] as u64) << 32 | two[0] as u64);
        }
        say(desks, rank, peer, slot, mail::TOKENS, 3);
        say(desks, rank, peer, slot, mail::COUNTS_FLAG, flag(epoch, 0));
        say(desks, rank, peer, slot, mail::DISPATCH_PAIR + 8, flag(epoch, 77));
        say(desks, rank, peer, slot, mail::DISPATCH_PAIR, flag(epoch, 1 << 31 | rows));
    }

    fn combine(desks: &Desks, (rank, peer, slot): (u32, u32, u32), epoch: u32, has_weights: bool) {
        say(desks, rank, peer, slot, mail::COMBINE_SHAPE, 16);
        say(desks, rank, peer, slot, mail::COMBINE_SHAPE + 8, has_weights as u64);
        say(desks, rank, peer, slot, mail::COMBINE_FLAG, flag(epoch, 5));
    }

    /// Rows come one plane behind the other, and before their flag; results as many as were told of.
    #[test]
    fn a_step_is_carried() {
        for anew in [false, true] {
            let street = street();
            let [a, b] = &street.desks;
            let _fresh =
                anew.then(|| [a.boxes(1, true).unwrap(), b.boxes(0, true).unwrap()].map(|(.., keep)| keep));
            let (_proxies, slot) = ([proxy(&street, 0), proxy(&street, 1)], 1);
            dispatch(a, (0, 1, slot), FIRST, 3, [0, 0, 2, 1]);
            until("no dispatch is heard", || see(b, 1, 0, slot, mail::DISPATCH_PAIR) >> 32 == FIRST as u64);
            assert_eq!(see(b, 1, 0, slot, mail::DISPATCH_PAIR), flag(FIRST, 1 << 31 | 3));
            assert_eq!(see(b, 1, 0, slot, mail::DISPATCH_PAIR + 8), flag(FIRST, 77));
            let progress = (BOUND as u64) << 32 | 1 << 28 | FIRST as u64 & 0x0fff_ffff;
            assert_eq!(see(b, 1, 0, slot, mail::PROGRESS), progress);
            assert_eq!(see(b, 1, 0, slot, mail::TOKENS), 3);
            let (counts, mut at, results) = map().in_inbox(slot);
            let inbox = b.inbox(0);
            assert_eq!(bytes_at(inbox + counts + 16, 8), flag(FIRST, 2).to_le_bytes());
            for (plane, bytes) in [(TOKENS, 32u64), (IDS, 8), (2, 8), (3, 8)] {
                let want = pattern(plane as u8 ^ FIRST as u8, 3 * bytes);
                assert_eq!(bytes_at(inbox + at, 3 * bytes), want, "plane {plane}, anew {anew}");
                at += (3 * bytes).next_multiple_of(16);
            }
            // Three results of 32 bytes go back, and a value beside each.
            let back = pattern(9, 3 * 32 + 12);
            fill(b.box_of(0) + results, &back);
            dispatch(b, (1, 0, slot), FIRST, 0, [0; 4]);
            combine(b, (1, 0, slot), FIRST, true);
            until("no combine is heard", || see(a, 0, 1, slot, mail::COMBINE_FLAG) >> 32 == FIRST as u64);
            assert_eq!(bytes_at(a.inbox(1) + results, 3 * 32 + 12), back);
            assert_eq!(see(a, 0, 1, slot, mail::PROGRESS) >> 28 & 0xf, 2);
        }
    }

    /// Whatever stands on a desk when the way is free again is sent in the order of the steps, and each note says its own progress.
    #[test]
    fn notes_keep_the_order_of_steps() {
        let street = street();
        let a = &street.desks[0];
        let (_proxy, seat) = (proxy(&street, 0), (0, 1, 0));
        street.is_closed.store(true, Release);
        let sent = |count: usize| until("too few notes", || lock(&street.letters[1]).len() == count);
        dispatch(a, seat, FIRST, 2, [0, 0, 1, 1]);
        sent(1);
        // Epochs wrap within these.
        let epochs: Vec<u32> = (0..5).map(|step| FIRST.wrapping_add(step)).collect();
        combine(a, seat, FIRST, false);
        dispatch(a, seat, epochs[1], 1, [0, 0, 1, 0]);
        std::thread::sleep(Duration::from_millis(20));
        sent(1);
        let mut heard = Vec::new();
        let mut hear = |count: usize| {
            until("too few notes are heard", || {
                let letters = std::mem::take(&mut *lock(&street.letters[1]));
                heard.extend(letters.into_iter().map(|letter| letter.note));
                heard.len() >= count
            });
        };
        hear(3);
        // One that no combine follows: it has been read.
        say(a, 0, 1, 0, mail::READ_FLAG, flag(epochs[1], 0));
        hear(4);
        dispatch(a, seat, epochs[2], 1, [0, 0, 1, 0]);
        hear(5);
        combine(a, seat, epochs[2], false);
        dispatch(a, seat, epochs[3], 0, [0; 4]);
        hear(7);
        let words = |note: &Vec<u8>| {
            let read = Read::new(note, (2, 2), true).unwrap();
            let words: Vec<u64> = read.words().collect();
            let at = read.note.words(true).iter().position(|word| *word == mail::PROGRESS).unwrap();
            (
                read.note,
                (*words.last().unwrap() >> 32) as u32,
                words[at] >> 28 & 0xf,
                words[at] as u32 & 0x0fff_ffff,
            )
        };
        let want = [
            (Note::Dispatch, 0, 1),
            (Note::Combine, 0, 2),
            (Note::Dispatch, 1, 1),
            (Note::Read, 1, 3),
            (Note::Dispatch, 2, 1),
            (Note::Combine, 2, 2),
            (Note::Dispatch, 3, 1),
        ];
        let want =
            want.map(|(note, step, operation)| (note, epochs[step], operation, epochs[step] & 0x0fff_ffff));
        assert_eq!(heard.iter().map(words).collect::<Vec<_>>(), want);
    }

    /// Who leaves says so behind all that it has sent; the others' kernels are told why.
    #[test]
    fn who_leaves_is_heard_last() {
        let street = street();
        let [a, b] = &street.desks;
        let (leaver, (_stays, health)) = (proxy(&street, 0), proxy(&street, 1));
        street.is_closed.store(true, Release);
        dispatch(a, (0, 1, 0), FIRST, 1, [0, 0, 1, 0]);
        until("no dispatch is sent", || !lock(&street.letters[1]).is_empty());
        leaver.0.leave(2);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(lock(&street.letters[1]).len(), 1);
        street.is_closed.store(false, Release);
        until("nobody is gone", || health.is_dead(0));
        assert_eq!((b.gone(0).load(Acquire), see(b, 1, 0, 0, mail::DISPATCH_PAIR) as u32), (2, 1 << 31 | 1));
        drop(leaver);
    }

    /// Notes of those that are behind are nobody's; those that begin anew find nothing of what was.
    #[test]
    fn generations_are_kept_apart() {
        let street = street();
        let [a, b] = &street.desks;
        let (first, second) = (proxy(&street, 0), proxy(&street, 1));
        dispatch(a, (0, 1, 0), FIRST, 1, [0, 0, 1, 0]);
        until("no dispatch is heard", || see(b, 1, 0, 0, mail::DISPATCH_PAIR) as u32 != 0);
        let next = Membership { generation: 2, ..Membership::first(2) };
        second.0.begin_anew(next);
        assert_eq!(see(b, 1, 0, 0, mail::DISPATCH_PAIR), flag(FIRST.wrapping_sub(1), 0));
        dispatch(a, (0, 1, 1), FIRST, 2, [0, 0, 1, 1]);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(see(b, 1, 0, 1, mail::DISPATCH_PAIR), flag(FIRST.wrapping_sub(1), 0));
        first.0.begin_anew(next);
        dispatch(a, (0, 1, 1), FIRST, 1, [0, 0, 1, 0]);
        until("no dispatch is heard", || see(b, 1, 0, 1, mail::DISPATCH_PAIR) == flag(FIRST, 1 << 31 | 1));
    }
}
