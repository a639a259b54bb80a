//! Ranks of a model, and their windows of loom's atomics.

use std::cell::Cell;
// loom's threads are coroutines of one thread. Who holds what is no part of a model, so this is not loom's.
use std::rc::Rc;

use loom::cell::UnsafeCell;
use loom::thread::{JoinHandle, yield_now};

use crate::atomic::{AtomicBool, AtomicU32, AtomicU64, Forgets};
use crate::mail;
use crate::members::Members;
use crate::protocol::{Awaited, Endpoint, Flag, Signal, Trouble, Vitals, Words};

const GENERATION: u16 = 1;

/// All ranks of a group take part.
fn everybody(ranks: u32) -> Members {
    let mut words = [0; Members::WORDS];
    words[0] = (1 << ranks) - 1;
    Members::from_words(words)
}

/// What a rank writes into a window. Of the words, those that a model touches: loom follows each.
struct Mailbox {
    words: Vec<(u64, AtomicU64)>,
    halves: Vec<(u64, AtomicU32)>,
    mask: AtomicU64,
    gone: AtomicU32,
}

const WORDS: [u64; 8] = [
    mail::DISPATCH_FLAG,
    mail::COMBINE_FLAG,
    mail::READ_FLAG,
    mail::COUNTS_FLAG,
    mail::PROGRESS,
    mail::LOSS,
    mail::FIFO_HEAD,
    mail::FIFO_TAIL,
];
const HALVES: [u64; 3] = [mail::LOSS_ORIGIN, mail::DISPATCH_SHAPE, mail::TOKENS];
/// The gone word, as an offset that no mailbox has.
pub const GONE: u64 = mail::BYTES;
/// What threads beside a waiting one tell it, as if it were another.
pub const VITALS: u64 = mail::BYTES + 8;

/// Nothing is weak.
pub const SOUND: (u64, Forgets) = (0, Forgets::Nothing);
pub const ORDERS: [Forgets; 2] = [Forgets::Stores, Forgets::Loads];

/// Every rank's window: one slot's mailboxes, and for each source one row.
pub struct Windows {
    ranks: u32,
    mailboxes: Vec<Mailbox>,
    rows: Vec<UnsafeCell<u32>>,
}

impl Windows {
    /// `weak`: a word, in all mailboxes, and what it forgets.
    pub fn new(ranks: u32, weak: (u64, Forgets)) -> Windows {
        let forgets = |offset: u64| if weak.0 == offset { weak.1 } else { Forgets::Nothing };
        let mailbox = |_| Mailbox {
            words: WORDS.iter().map(|at| (*at, AtomicU64::forgetting(0, forgets(*at)))).collect(),
            halves: HALVES.iter().map(|at| (*at, AtomicU32::new(0))).collect(),
            mask: AtomicU64::new(0),
            gone: AtomicU32::forgetting(0, forgets(GONE)),
        };
        let boxes = 0..ranks * ranks;
        Windows {
            ranks,
            mailboxes: boxes.clone().map(mailbox).collect(),
            rows: boxes.map(|_| UnsafeCell::new(0)).collect(),
        }
    }
    fn at(&self, window: u32, source: u32) -> usize {
        (window * self.ranks + source) as usize
    }
}

impl Words for Rc<Windows> {
    fn word(&self, window: u32, source: u32, offset: u64) -> &AtomicU64 {
        let words = &self.mailboxes[self.at(window, source)].words;
        &words.iter().find(|(at, _)| *at == offset).expect("a word of the model").1
    }
    fn half(&self, window: u32, source: u32, offset: u64) -> &AtomicU32 {
        let halves = &self.mailboxes[self.at(window, source)].halves;
        &halves.iter().find(|(at, _)| *at == offset).expect("half a word of the model").1
    }
    fn mask(&self, window: u32, source: u32, _word: usize) -> &AtomicU64 {
        &self.mailboxes[self.at(window, source)].mask
    }
    fn gone(&self, window: u32, source: u32) -> &AtomicU32 {
        &self.mailboxes[self.at(window, source)].gone
    }
}

/// A rank, for whichever thread plays it.
pub struct Rank {
    pub end: Endpoint<Rc<Windows>>,
    pub vitals: Rc<Vitals>,
}

/// All ranks, their windows reset for a first epoch. `weak`: as of `Windows::new`, or of `VITALS`.
pub fn group<const RANKS: usize>(first_epoch: u32, weak: (u64, Forgets)) -> [Rank; RANKS] {
    let windows = Rc::new(Windows::new(RANKS as u32, weak));
    let forgets = if weak.0 == VITALS { weak.1 } else { Forgets::Nothing };
    let group = std::array::from_fn(|rank| Rank::new(&windows, rank as u32, forgets));
    group.iter().for_each(|rank| rank.end.reset(first_epoch));
    group
}

pub fn join<const COUNT: usize>(threads: [JoinHandle<()>; COUNT]) {
    threads.into_iter().for_each(|thread| thread.join().expect("a thread of the model"));
}

impl Rank {
    fn new(windows: &Rc<Windows>, rank: u32, forgets: Forgets) -> Rank {
        let ranks = windows.ranks;
        let word = || AtomicBool::forgetting(false, forgets);
        let vitals = Vitals { aborted: word(), dead: (0..ranks).map(|_| word()).collect() };
        let (members, generation) = (everybody(ranks), GENERATION);
        let end = Endpoint { words: windows.clone(), rank, ranks, members, generation };
        Rank { end, vitals: Rc::new(vitals) }
    }
    /// For another thread of the rank.
    pub fn again(&self) -> Rank {
        let Endpoint { rank, ranks, members, generation, .. } = self.end;
        let end = Endpoint { words: self.end.words.clone(), rank, ranks, members, generation };
        Rank { end, vitals: self.vitals.clone() }
    }
    pub fn peers(&self) -> std::ops::Range<u32> {
        0..self.end.ranks
    }

    /// Stores this rank's row into a window.
    pub fn put(&self, window: u32, row: u32) {
        let at = self.end.words.at(window, self.end.rank);
        // SAFETY: that nobody else touches it is what loom checks.
        self.end.words.rows[at].with_mut(|cell| unsafe { *cell = row });
    }
    /// A row of this rank's own window.
    pub fn row(&self, source: u32) -> u32 {
        self.row_of(self.end.rank, source)
    }
    pub fn row_of(&self, window: u32, source: u32) -> u32 {
        let at = self.end.words.at(window, source);
        // SAFETY: that nobody writes it is what loom checks.
        self.end.words.rows[at].with(|cell| unsafe { *cell })
    }

    /// Waits for flags alone: the deadline is far and nobody leaves.
    pub fn await_flags(&self, flag: Flag, epoch: u32) {
        let signal = Signal { flag, epoch, bound: None };
        let Ok(()) = self.end.wait(&signal, || {
            yield_now();
            Ok::<(), std::convert::Infallible>(())
        });
    }

    /// Waits and looks for trouble whenever flags are missing; late after so many looks, if ever.
    pub fn wait(&self, signal: Signal, patience: Option<u32>) -> Result<(), Trouble> {
        let looks = Cell::new(0);
        let awaited = Awaited { signal, rows: None };
        let is_late = || patience.is_some_and(|patience| looks.get() >= patience);
        self.end.wait(&signal, || match self.end.look_for_trouble(&awaited, &self.vitals, is_late) {
            Some(trouble) => Err(trouble),
            None => {
                looks.set(looks.get() + 1);
                yield_now();
                Ok(())
            }
        })
    }
}

pub fn signal(flag: Flag, epoch: u32) -> Signal {
    Signal { flag, epoch, bound: Some(7) }
}
