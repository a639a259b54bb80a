//! Pinned memory of a rank whose rows couriers carry: what its kernels leave for each peer, which the host sends, and what comes of
//! each, which they fetch.
//!
//! ```text
//! desk    words (gone words, then of each slot mailboxes and loss masks) | box    one for each rank
//! inbox   box                                                                     one for each peer
//! ```
//! What kernels take for the window of a peer lies so that its words and its box are this rank's desk for it; so a rank's kernels store
//! there what they would store into that window. A rank's own desk has the words that it waits for, which the host stores, and its
//! box is its inbox of itself.

use std::any::Any;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::Ground;
use super::driver::Pinned;
use crate::device::mail;
use crate::device::map::{FIRST_EPOCH, Map, mask_words};
use crate::error::{Error, Result};

/// Boxes begin at a page.
const ALIGN: u64 = 4096;

/// Where words lie on a desk.
#[derive(Clone, Copy)]
pub struct WordMap {
    ranks: u32,
    slots: u32,
    /// Of the first slot; bytes of each.
    start: u64,
    each: u64,
}

impl WordMap {
    fn new(map: &Map) -> WordMap {
        let ranks = map.sizes.ranks();
        let masks = ranks as u64 * mask_words(ranks) as u64 * 8;
        WordMap {
            ranks,
            slots: map.sizes.slots,
            start: (ranks as u64 * 4).next_multiple_of(mail::BYTES),
            each: (ranks as u64 * mail::BYTES + masks).next_multiple_of(mail::BYTES),
        }
    }
    fn bytes(&self) -> u64 {
        (self.start + self.slots as u64 * self.each).next_multiple_of(ALIGN)
    }
    fn gone(&self, source: u32) -> u64 {
        source as u64 * 4
    }
    pub fn mailbox(&self, slot: u32, source: u32) -> u64 {
        self.start + slot as u64 * self.each + source as u64 * mail::BYTES
    }
    pub fn loss_mask(&self, slot: u32, source: u32) -> u64 {
        self.mailbox(slot, self.ranks) + source as u64 * mask_words(self.ranks) as u64 * 8
    }
}

/// Bytes of it.
pub fn bytes(map: &Map) -> u64 {
    let (ranks, (_, each)) = (map.sizes.ranks() as u64, map.inboxes());
    (WordMap::new(map).bytes() + each).saturating_mul(ranks).saturating_add(each.saturating_mul(ranks - 1))
}

/// Takes so many zeroed bytes, at an address that the host and kernels have alike, and says what keeps them.
type Take = dyn Fn(u64) -> Result<(u64, Keep)> + Send + Sync;
type Keep = Arc<dyn Any + Send + Sync>;

pub struct Desks {
    rank: u32,
    words: WordMap,
    box_bytes: u64,
    take: Box<Take>,
    start: u64,
    bytes: u64,
    _keep: Keep,
    /// By rank: where couriers bring what it sends, and take what is for it: its inbox and the box of its desk, but others once another
    /// incarnation of it may still write into the former, or be sent what is in the latter.
    inboxes: Vec<AtomicU64>,
    outboxes: Vec<AtomicU64>,
    kept: Mutex<Vec<Keep>>,
}

impl Desks {
    pub fn new(ground: &Ground, rank: u32, map: &Map) -> Result<Arc<Desks>> {
        let context = ground.context().clone();
        let take = move |bytes: u64| {
            let pinned =
                Pinned::new(&context, bytes as usize).map_err(|e| e.context(format!("rank {rank}")))?;
            let address = pinned.address();
            if address != pinned.as_ptr() as u64 {
                return Err(Error::unsupported(format!(
                    "rank {rank}: {} has other addresses for host memory than the CPU",
                    context.describe()
                )));
            }
            Ok((address, Arc::new(pinned) as Keep))
        };
        Desks::of(rank, map, Box::new(take))
    }

    fn of(rank: u32, map: &Map, take: Box<Take>) -> Result<Arc<Desks>> {
        let bytes = bytes(map);
        let (start, keep) = take(bytes)?;
        let mut desks = Desks {
            rank,
            words: WordMap::new(map),
            box_bytes: map.inboxes().1,
            take,
            start,
            bytes,
            _keep: keep,
            inboxes: Vec::new(),
            outboxes: Vec::new(),
            kept: Mutex::default(),
        };
        let ranks = map.sizes.ranks();
        let inbox = |peer: u32| match peer == rank {
            true => desks.box_of(peer),
            false => desks.desk(ranks) + (peer - u32::from(peer > rank)) as u64 * desks.box_bytes,
        };
        let inboxes = (0..ranks).map(|peer| AtomicU64::new(inbox(peer))).collect();
        let outboxes = (0..ranks).map(|peer| AtomicU64::new(desks.box_of(peer))).collect();
        (desks.inboxes, desks.outboxes) = (inboxes, outboxes);
        Ok(Arc::new(desks))
    }

    pub fn words(&self) -> &WordMap {
        &self.words
    }
    /// Where the desk for a rank is.
    pub fn desk(&self, rank: u32) -> u64 {
        self.start + rank as u64 * (self.words.bytes() + self.box_bytes)
    }
    /// The box that kernels fill for a rank.
    pub fn box_of(&self, rank: u32) -> u64 {
        self.desk(rank) + self.words.bytes()
    }
    /// From a desk to its box.
    pub fn box_offset(&self) -> u64 {
        self.words.bytes()
    }
    pub fn inbox(&self, peer: u32) -> u64 {
        self.inboxes[peer as usize].load(Ordering::Acquire)
    }
    pub fn outbox(&self, peer: u32) -> u64 {
        self.outboxes[peer as usize].load(Ordering::Acquire)
    }

    /// All of it: address and bytes, and what keeps it.
    pub fn all(self: &Arc<Desks>) -> (u64, u64, Keep) {
        (self.start, self.bytes, self.clone())
    }
    pub fn box_bytes(&self) -> u64 {
        self.box_bytes
    }

    /// A peer's inbox and outbox; `anew`: in memory of their own from now on. The peer takes no part. What keeps them is to be
    /// kept as long as anybody may write there.
    pub fn boxes(self: &Arc<Desks>, peer: u32, anew: bool) -> Result<(u64, u64, Keep)> {
        let mut keep: Keep = self.clone();
        if anew {
            let (fresh, kept) = (self.take)(2 * self.box_bytes)?;
            self.inboxes[peer as usize].store(fresh, Ordering::Release);
            self.outboxes[peer as usize].store(fresh + self.box_bytes, Ordering::Release);
            // Kernels go by it as long as they go by the desks.
            self.kept.lock().unwrap_or_else(|e| e.into_inner()).push(kept.clone());
            keep = Arc::new((self.clone(), kept));
        }
        Ok((self.inbox(peer), self.outbox(peer), keep))
    }

    /// A word of the desk for a rank.
    pub fn word(&self, rank: u32, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.words.bytes(), "a word at {offset}");
        // SAFETY: aligned, in bounds, and kept as long as self; kernels and this write it whole.
        unsafe { AtomicU64::from_ptr((self.desk(rank) + offset) as *mut u64) }
    }
    /// Why a rank sends nothing more, in its own words.
    pub fn gone(&self, source: u32) -> &AtomicU32 {
        // SAFETY: as `word`; desks begin with such a word for each rank.
        unsafe { AtomicU32::from_ptr((self.desk(self.rank) + self.words.gone(source)) as *mut u32) }
    }

    /// No flag of the first epoch has come, or is up. No kernel of this rank is on its way, and nothing is sent.
    pub fn reset(&self) {
        let before = FIRST_EPOCH.wrapping_sub(1) as u64;
        for rank in 0..self.words.ranks {
            (0..self.words.bytes() / 8).for_each(|at| self.word(rank, at * 8).store(0, Ordering::Relaxed));
            for (slot, source) in
                (0..self.words.slots).flat_map(|slot| (0..self.words.ranks).map(move |source| (slot, source)))
            {
                let mailbox = self.words.mailbox(slot, source);
                let flags = [mail::COMBINE_FLAG, mail::READ_FLAG, mail::COUNTS_FLAG];
                let pair = [mail::DISPATCH_PAIR, mail::DISPATCH_PAIR + 8];
                for flag in flags.into_iter().chain(pair) {
                    self.word(rank, mailbox + flag).store(before << 32, Ordering::Relaxed);
                }
                // As a progress word has it: no operation, no bound.
                self.word(rank, mailbox + mail::PROGRESS).store(before & 0x0fff_ffff, Ordering::Release);
            }
        }
    }
}

/// Desks for a test of what is no kernel.
#[cfg(test)]
pub fn over_plain_memory(rank: u32, map: &Map) -> Arc<Desks> {
    let take = |bytes: u64| {
        let words: Arc<Vec<AtomicU64>> =
            Arc::new((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect());
        Ok((words.as_ptr() as u64, words as Keep))
    };
    Desks::of(rank, map, Box::new(take)).unwrap_or_else(|error| panic!("{error}"))
}
