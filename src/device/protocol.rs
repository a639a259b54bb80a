//! What ranks say to each other through words in their windows, and how a wait ends: flags, losses, leaving, FIFOs.
//!
//! Everything between ranks on the CPU that depends on the order of memory stands here, and nothing else does: where
//! the words lie is the caller's to say (`Words`), and what is said of an end (`Trouble`) is told elsewhere. So loom
//! can run this very file under every order that the memory model allows (`tests/loom`).
//!
//! Two rules carry it. A word that others act upon is stored with release after what it speaks of, and loaded with
//! acquire before that is looked at. And a cause to give up is read *before* the flag is looked at once more: a rank
//! that left, died or went on after its flag is no loss.

// Under loom its own, some of which the tests tell to forget their order.
#[cfg(loom)]
use super::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::mail;
use super::members::Members;

/// What a rank is at, in progress words and error records.
pub const DISPATCH: u32 = 1;
pub const COMBINE: u32 = 2;
pub const READ: u32 = 3;
pub const REPLAY: u32 = 4;

/// Why a rank sends nothing more, in its gone word; that it ended nobody is left to write.
pub const DESTROYED: u32 = 1;
const ABORTED: u32 = 2;
const ENDED: u32 = 3;
/// Of a survivor that went on without the rank whose window it is written to.
pub const WITHOUT: u32 = 4;

/// What a wait waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
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

impl Flag {
    /// The words that carry epochs.
    const EPOCHS: [Flag; 4] = [Flag::Counts, Flag::Dispatch, Flag::Combine, Flag::Read];

    fn offset(self) -> u64 {
        match self {
            Flag::Counts => mail::COUNTS_FLAG,
            Flag::Dispatch | Flag::Replay => mail::DISPATCH_FLAG,
            Flag::Combine => mail::COMBINE_FLAG,
            Flag::Read => mail::READ_FLAG,
            Flag::Rows | Flag::Results => mail::FIFO_HEAD,
        }
    }
    pub fn operation(self) -> u32 {
        match self {
            Flag::Counts | Flag::Dispatch | Flag::Rows => DISPATCH,
            Flag::Replay => REPLAY,
            Flag::Combine | Flag::Results => COMBINE,
            Flag::Read => READ,
        }
    }
}

/// A peer in one of the two kinds of dispatch waits for a peer in the other.
fn replay_differs(mine: u32, theirs: u32) -> bool {
    matches!((mine, theirs), (DISPATCH, REPLAY) | (REPLAY, DISPATCH))
}

/// An epoch and a number, as a flag carries them.
fn pack(epoch: u32, number: u32) -> u64 {
    (epoch as u64) << 32 | number as u64
}

/// True if `flag` has reached `epoch`; right across the wrap.
pub fn reached(flag: u64, epoch: u32) -> bool {
    ((flag >> 32) as u32).wrapping_sub(epoch) as i32 >= 0
}

/// {bound, operation, low 28 bits of the epoch}.
pub fn progress(epoch: u32, operation: u32, bound: u32) -> u64 {
    (bound as u64) << 32 | (operation as u64) << 28 | (epoch & 0x0fff_ffff) as u64
}

/// How far a progress word's step is ahead of an epoch.
fn steps_ahead(word: u64, epoch: u32) -> i32 {
    // 28-bit difference, sign-extended.
    ((word as u32).wrapping_sub(epoch) << 4) as i32 >> 4
}

/// The words of one slot, in every rank's window.
pub trait Words {
    /// A word, or half a one, at an offset (`mail`) of the mailbox that `source` writes in a window.
    fn word(&self, window: u32, source: u32, offset: u64) -> &AtomicU64;
    fn half(&self, window: u32, source: u32, offset: u64) -> &AtomicU32;
    /// A word of the mask that goes with `source`'s loss word, 64 ranks each.
    fn mask(&self, window: u32, source: u32, word: usize) -> &AtomicU64;
    /// `source`'s gone word, which all slots share.
    fn gone(&self, window: u32, source: u32) -> &AtomicU32;
}

/// A step's operation, as it is told to every rank and waited for from every rank.
#[derive(Clone, Copy, Debug)]
pub struct Signal {
    pub flag: Flag,
    pub epoch: u32,
    /// The step's bound, if ranks must agree on it.
    pub bound: Option<u32>,
}

/// What is waited for: a signal's flags or, if it is of FIFOs, rows.
#[derive(Clone, Copy)]
pub struct Awaited<'a> {
    pub signal: Signal,
    pub rows: Option<AwaitedRows<'a>>,
}

/// By rank, rows since the comm began.
#[derive(Clone, Copy)]
pub struct AwaitedRows<'a> {
    /// Where each rank's head must get to.
    pub goals: &'a [u64],
    /// Those that have been taken.
    pub taken: &'a [u64],
}

/// Every way a wait can end without its flags.
#[derive(Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Another thread aborted this comm.
    Aborted,
    /// A rank is at the same operation with another bound.
    Bound { peer: u32, mine: u32, theirs: u32 },
    /// A rank is at another operation, or so many steps ahead.
    Elsewhere { peer: u32, operation: u32, ahead: i32 },
    /// A rank gave up on the step: with which status, on whom, and which rank did so first.
    GaveUp { observer: u32, status: u32, lost: Vec<u32>, origin: u32 },
    /// Ranks that can send nothing more, and why: by their gone words' numbers.
    Gone(Vec<(u32, u32)>),
    /// Ranks that did not answer before the deadline.
    Late(Vec<u32>),
}

/// What threads beside the calling one know of a rank and its peers.
pub struct Vitals {
    pub aborted: AtomicBool,
    pub dead: Box<[AtomicBool]>,
}

impl Vitals {
    pub fn new(ranks: u32) -> Vitals {
        Vitals { aborted: AtomicBool::new(false), dead: (0..ranks).map(|_| AtomicBool::new(false)).collect() }
    }
    /// The user aborted this comm.
    pub fn is_aborted(&self) -> bool {
        self.aborted.load(Acquire)
    }
    /// A rank's process is gone.
    pub fn is_dead(&self, rank: u32) -> bool {
        self.dead[rank as usize].load(Acquire)
    }
    pub fn abort(&self) {
        self.aborted.store(true, SeqCst);
    }
    pub fn returned(&self, rank: u32) {
        self.dead[rank as usize].store(false, SeqCst);
    }
    /// True if it was not known.
    pub fn died(&self, rank: u32) -> bool {
        !self.dead[rank as usize].swap(true, SeqCst)
    }
}

/// One rank's end of a slot's words. It writes its own mailbox in every window, and reads the mailboxes in its own.
pub struct Endpoint<W> {
    pub words: W,
    pub rank: u32,
    /// Ranks there were when the comm began.
    pub ranks: u32,
    /// Those that take part: nobody else is told of anything, or waited for.
    pub members: Members,
    /// Of the members; losses of another one are not of this one's steps.
    pub generation: u16,
}

impl<W: Words> Endpoint<W> {
    /// In this rank's own window: no flag of the first epoch has come. No peer may step before that.
    pub fn reset(&self, first_epoch: u32) {
        let before = first_epoch.wrapping_sub(1);
        for source in 0..self.ranks {
            for flag in Flag::EPOCHS {
                self.words.word(self.rank, source, flag.offset()).store(pack(before, 0), Release);
            }
            self.words.word(self.rank, source, mail::PROGRESS).store(progress(before, 0, 0), Release);
        }
    }

    /// Says what this rank is at, so that a peer that waits for something else can tell; then, for each rank, raises
    /// this one's flag. `tell` stores what goes with the flag of a rank, and gives the number in it.
    #[inline]
    pub fn raise(&self, signal: &Signal, mut tell: impl FnMut(u32) -> u32) {
        let Signal { flag, epoch, bound } = *signal;
        for peer in self.members.iter() {
            let word = progress(epoch, flag.operation(), bound.unwrap_or(0));
            self.words.word(peer, self.rank, mail::PROGRESS).store(word, Release);
        }
        for peer in self.members.iter() {
            let number = tell(peer);
            self.words.word(peer, self.rank, flag.offset()).store(pack(epoch, number), Release);
        }
    }

    /// Stores a number that goes with a flag: who has seen the flag reads it.
    #[inline]
    pub fn tell(&self, peer: u32, offset: u64, number: u32) {
        self.words.half(peer, self.rank, offset).store(number, Relaxed);
    }

    /// A number that came with a flag.
    #[inline]
    pub fn told(&self, source: u32, offset: u64) -> u32 {
        self.words.half(self.rank, source, offset).load(Relaxed)
    }

    #[inline]
    pub fn flag(&self, source: u32, flag: Flag) -> u64 {
        self.words.word(self.rank, source, flag.offset()).load(Acquire)
    }

    /// True if every rank's flag has reached an epoch.
    pub fn all_have_come(&self, flag: Flag, epoch: u32) -> bool {
        self.members.iter().all(|peer| reached(self.flag(peer, flag), epoch))
    }

    /// The one wait. Returns when every rank's flag has come, or what ends it `between` two looks.
    #[inline]
    pub fn wait<E>(&self, signal: &Signal, mut between: impl FnMut() -> Result<(), E>) -> Result<(), E> {
        for peer in self.members.iter() {
            while !reached(self.flag(peer, signal.flag), signal.epoch) {
                between()?;
            }
        }
        Ok(())
    }

    /// True if all that is waited for from a rank has come.
    fn has_come(&self, awaited: &Awaited, peer: u32) -> bool {
        let word = self.flag(peer, awaited.signal.flag);
        match awaited.rows {
            Some(rows) => word >= rows.goals[peer as usize],
            None => reached(word, awaited.signal.epoch),
        }
    }

    fn missing(&self, awaited: &Awaited) -> impl Iterator<Item = u32> {
        self.members.iter().filter(|peer| !self.has_come(awaited, *peer))
    }

    /// Ranks whose next word is waited for. Those whose rows stand in their FIFO are not late: we do not take them, for
    /// want of another's.
    pub fn starved_of(&self, awaited: &Awaited) -> impl Iterator<Item = u32> {
        let waiting = |rows: AwaitedRows, peer: u32| self.head(peer) > rows.taken[peer as usize];
        self.missing(awaited).filter(move |peer| !awaited.rows.is_some_and(|rows| waiting(rows, *peer)))
    }

    /// What is waited for from a rank, and what has come of it.
    pub fn values(&self, awaited: &Awaited, peer: u32) -> (u64, u64) {
        let word = self.flag(peer, awaited.signal.flag);
        match awaited.rows {
            Some(rows) => (rows.goals[peer as usize], word),
            None => (awaited.signal.epoch as u64, word >> 32),
        }
    }

    /// Why what is awaited comes no more, if it does not.
    pub fn look_for_trouble(
        &self,
        awaited: &Awaited,
        vitals: &Vitals,
        is_late: impl FnOnce() -> bool,
    ) -> Option<Trouble> {
        if vitals.is_aborted() {
            return Some(Trouble::Aborted);
        }
        let cause = self
            .loss_of_another(awaited)
            .or_else(|| self.leavers(awaited, vitals))
            .or_else(|| if is_late() { self.latecomers(awaited) } else { None });
        // Said before any of these, so that both sides of a disagreement say it; looked for behind them, because a rank
        // that gave up or left for it had said before what it was at.
        self.disagreement(awaited).or(cause)
    }

    /// A rank that does something else.
    fn disagreement(&self, awaited: &Awaited) -> Option<Trouble> {
        let Signal { flag, epoch, bound } = awaited.signal;
        let mine = flag.operation();
        let streams = awaited.rows.is_some();
        self.members.iter().find_map(|peer| {
            let word = self.words.word(self.rank, peer, mail::PROGRESS).load(Acquire);
            let (ahead, operation, theirs) =
                (steps_ahead(word, epoch), (word >> 28 & 0xf) as u32, (word >> 32) as u32);
            // A peer may go on while rows it owes are on offer; what it is at was checked by its flag.
            let here = !streams && !self.has_come(awaited, peer);
            if let Some(mine) =
                bound.filter(|mine| ahead == 0 && operation == flag.operation() && theirs != *mine)
            {
                return Some(Trouble::Bound { peer, mine, theirs });
            }
            let elsewhere = matches!(operation, COMBINE | READ) && operation != mine;
            // One kind of dispatch beside the other is wrong whatever flags have come.
            let differs = !streams && ahead == 0 && replay_differs(mine, operation);
            (differs || here && (ahead > 0 || ahead == 0 && elsewhere)).then_some(Trouble::Elsewhere {
                peer,
                operation,
                ahead,
            })
        })
    }

    /// Somebody else gave up on the step.
    fn loss_of_another(&self, awaited: &Awaited) -> Option<Trouble> {
        self.members.iter().filter(|observer| *observer != self.rank).find_map(|observer| {
            let status = self.gave_up(observer, awaited.signal.epoch)?;
            self.missing(awaited).next()?;
            let is_lost = |rank: &u32| {
                let word = self.words.mask(self.rank, observer, (rank / 64) as usize).load(Relaxed);
                word >> (rank % 64) & 1 == 1
            };
            let lost = self.members.iter().filter(is_lost).collect();
            // Word may have come through a third rank: the first is the one to ask.
            let origin = self.told(observer, mail::LOSS_ORIGIN);
            Some(Trouble::GaveUp { observer, status, lost, origin })
        })
    }

    fn leavers(&self, awaited: &Awaited, vitals: &Vitals) -> Option<Trouble> {
        let gone: Vec<(u32, u32)> = self
            .members
            .iter()
            .filter_map(|peer| Some((peer, self.why_gone(peer, vitals)?)))
            .filter(|(peer, _)| !self.has_come(awaited, *peer))
            .collect();
        (!gone.is_empty()).then_some(Trouble::Gone(gone))
    }

    fn latecomers(&self, awaited: &Awaited) -> Option<Trouble> {
        let late: Vec<u32> = self.starved_of(awaited).collect();
        (!late.is_empty()).then_some(Trouble::Late(late))
    }

    /// With which status a rank gave up on an epoch's step or an earlier one, if it did. A loss of a later step leaves
    /// this one to its own flags.
    pub fn gave_up(&self, observer: u32, epoch: u32) -> Option<u32> {
        let word = self.words.word(self.rank, observer, mail::LOSS).load(Acquire);
        let later = (word as u32).wrapping_sub(epoch) as i32 > 0;
        (word >> 48 == self.generation as u64 && !later).then_some((word >> 32 & 0xffff) as u32)
    }

    /// Gives a step up: tells every rank on whom, and which rank did so first.
    pub fn give_up(&self, epoch: u32, status: u32, lost: &[u32], origin: u32) {
        let word = (self.generation as u64) << 48 | (status as u64) << 32 | epoch as u64;
        for peer in self.members.iter() {
            for (i, first) in (0..self.ranks).step_by(64).enumerate() {
                let mine = lost.iter().filter(|rank| (first..first + 64).contains(rank));
                let mask = mine.fold(0, |mask, rank| mask | 1 << (rank % 64));
                self.words.mask(peer, self.rank, i).store(mask, Relaxed);
            }
            self.tell(peer, mail::LOSS_ORIGIN, origin);
            self.words.word(peer, self.rank, mail::LOSS).store(word, Release);
        }
    }

    /// By which of the gone words' numbers a rank sends nothing more, if so.
    pub fn why_gone(&self, peer: u32, vitals: &Vitals) -> Option<u32> {
        match self.words.gone(self.rank, peer).load(Acquire) {
            0 => vitals.is_dead(peer).then_some(ENDED),
            word => Some(word),
        }
    }

    /// A rank's last call has ended, and it makes no other.
    pub fn has_destroyed(&self, peer: u32) -> bool {
        self.words.gone(self.rank, peer).load(Acquire) == DESTROYED
    }

    /// Says that this rank sends nothing more.
    pub fn leave(&self, aborted: bool) {
        let reason = if aborted { ABORTED } else { DESTROYED };
        for peer in 0..self.ranks {
            // An abort stays an abort when the comm is destroyed afterwards.
            let _ = self.words.gone(peer, self.rank).compare_exchange(0, reason, Release, Relaxed);
        }
    }

    /// Tells a rank that this one went on without it.
    pub fn leave_behind(&self, lost: u32) {
        self.words.gone(lost, self.rank).store(WITHOUT, Release);
    }

    /// The rank that went on without this one, if any did.
    pub fn left_behind_by(&self) -> Option<u32> {
        (0..self.ranks).find(|peer| self.words.gone(self.rank, *peer).load(Acquire) == WITHOUT)
    }

    /// Rows that a rank has written into its FIFO here.
    #[inline]
    pub fn head(&self, source: u32) -> u64 {
        self.flag(source, Flag::Rows)
    }
    /// Rows up to here stand in a rank's FIFO.
    #[inline]
    pub fn tell_head(&self, peer: u32, sent: u64) {
        self.words.word(peer, self.rank, mail::FIFO_HEAD).store(sent, Release);
    }
    /// How many more rows a rank's FIFO of so many entries takes.
    #[inline]
    pub fn credit(&self, peer: u32, sent: u64, entries: u64) -> u64 {
        let tail = self.words.word(self.rank, peer, mail::FIFO_TAIL).load(Acquire);
        entries.saturating_sub(sent.saturating_sub(tail))
    }
    /// Frees a rank's entries here.
    #[inline]
    pub fn tell_tail(&self, source: u32, taken: u64) {
        self.words.word(source, self.rank, mail::FIFO_TAIL).store(taken, Release);
    }
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
