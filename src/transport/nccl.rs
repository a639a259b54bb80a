//! NCCL communicators: one a slot, made within the deadline in which the group forms; what carries rows and words where
//! windows do not reach.
//!
//! Calls never block: communicators are made so that NCCL answers `ncclInProgress` where it would wait, and it is asked
//! again until a deadline. Operations on the device have none, so a thread watches them (`Watch`): one that a rank is missing
//! for is ended with its communicator (`ncclCommAbort`), and the kernels behind it find the step void.

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nccl_sys::{
    Nccl, ncclComm_t, ncclConfig_t, ncclInProgress, ncclResult_t, ncclSuccess, ncclUint8, ncclUniqueId,
};

use crate::device::cuda::Lookout;
use crate::device::{Counts, Health, Move, Stream, Wire};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};

/// Between two questions of what NCCL does in the background.
const PAUSE: Duration = Duration::from_micros(100);
/// Between two looks at what is in flight.
const LOOK: Duration = Duration::from_millis(2);
/// What a rank that has gone had sent is on its way for no longer.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// The process's NCCL, or what to install.
pub fn probe() -> Result<&'static Nccl> {
    Nccl::get().map_err(|why| Error::unsupported(why.to_string()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn check(nccl: &Nccl, what: &str, result: ncclResult_t) -> Result<()> {
    if result == ncclSuccess || result == ncclInProgress {
        return Ok(());
    }
    // SAFETY: static text, and this thread's last failure, which is the one at hand.
    let (text, last) = unsafe {
        (
            CStr::from_ptr((nccl.ncclGetErrorString)(result)),
            CStr::from_ptr((nccl.ncclGetLastError)(std::ptr::null_mut())),
        )
    };
    let (text, last) = (text.to_string_lossy(), last.to_string_lossy());
    Err(Error::new(Status::Nccl, format!("{what}: {text} ({result}) {}", last.trim()).trim_end()))
}

/// What the ranks of a group have in common; rank 0's to make.
pub fn new_id() -> Result<Vec<u8>> {
    let nccl = probe()?;
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: a valid out-pointer.
    check(nccl, "ncclGetUniqueId", unsafe { (nccl.ncclGetUniqueId)(&mut id) })?;
    Ok(id.internal.to_vec())
}

/// A communicator; NULL once it was ended.
struct Handle(ncclComm_t);

// SAFETY: NCCL takes a communicator from any thread, one at a time: a lock is held around each call.
unsafe impl Send for Handle {}

/// A rank's communicators.
pub struct Communicators {
    nccl: &'static Nccl,
    rank: u32,
    ranks: u32,
    slots: Vec<Mutex<Handle>>,
    /// By slot: it is to be ended, and no call waits for it any more.
    ending: Vec<AtomicBool>,
    failure: OnceLock<Error>,
}

impl Communicators {
    /// Collective: returns when all ranks have called it, or at the deadline. The context of the rank's device is current.
    pub fn create(
        (rank, ranks, slots): (u32, u32, u32),
        id: &[u8],
        deadline: Instant,
    ) -> Result<Communicators> {
        let nccl = probe()?;
        let mut unique = ncclUniqueId { internal: [0; 128] };
        if id.len() != unique.internal.len() {
            return Err(Error::internal(format!("an NCCL id of {} bytes", id.len())));
        }
        unique.internal.copy_from_slice(id);
        let mut all = Communicators {
            nccl,
            rank,
            ranks,
            slots: Vec::new(),
            ending: (0..slots).map(|_| AtomicBool::new(false)).collect(),
            failure: OnceLock::new(),
        };
        // Who gives up does not wait for the peers' farewell.
        all.make(slots, unique, deadline).inspect_err(|_| all.cut())?;
        Ok(all)
    }

    fn make(&mut self, slots: u32, id: ncclUniqueId, deadline: Instant) -> Result<()> {
        let (nccl, rank, ranks) = (self.nccl, self.rank as i32, self.ranks as i32);
        for slot in 0..slots {
            let mut config = ncclConfig_t::default();
            config.blocking = 0;
            // NCCL writes it when it gets there, which may be after this call has given up.
            let raw: &mut ncclComm_t = Box::leak(Box::new(std::ptr::null_mut()));
            let first = self.slots.first().map(|first| lock(first).0);
            let (what, made, asks) = match first {
                None => {
                    // SAFETY: valid pointers; the id is rank 0's.
                    let made = unsafe { (nccl.ncclCommInitRankConfig)(raw, ranks, id, rank, &mut config) };
                    ("ncclCommInitRankConfig", made, *raw)
                }
                // A communicator that is split off is not there before that is done: its parent tells.
                Some(first) => {
                    // SAFETY: as above; a communicator of this rank's.
                    let made = unsafe { (nccl.ncclCommSplit)(first, 0, rank, raw, &mut config) };
                    ("ncclCommSplit", made, first)
                }
            };
            let settled = check(nccl, what, made).and_then(|()| self.settle(what, slot, asks, deadline));
            // Whatever became of it is ended with the others.
            self.slots.push(Mutex::new(Handle(*raw)));
            settled?;
            // SAFETY: made above, and NCCL is done with it.
            drop(unsafe { Box::from_raw(raw) });
            let comm = lock(&self.slots[slot as usize]).0;
            self.settle(what, slot, comm, deadline)?;
        }
        Ok(())
    }

    /// Waits for what NCCL does in the background.
    fn settle(&self, what: &str, slot: u32, comm: ncclComm_t, deadline: Instant) -> Result<()> {
        loop {
            let mut state = ncclSuccess;
            // SAFETY: a communicator, and a valid out-pointer.
            let asked = unsafe { (self.nccl.ncclCommGetAsyncError)(comm, &mut state) };
            check(self.nccl, "ncclCommGetAsyncError", asked)?;
            if state != ncclInProgress {
                return check(self.nccl, what, state);
            }
            if self.ending[slot as usize].load(Ordering::Acquire) {
                return Err(Error::new(Status::Aborted, format!("{what}: it was ended")));
            }
            if Instant::now() >= deadline {
                return Err(Error::new(Status::Timeout, format!("{what}: not every rank came in time")));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Ends a slot's communicator: kernels of it that wait return.
    fn end(&self, slot: u32) {
        self.ending[slot as usize].store(true, Ordering::Release);
        let mut handle = lock(&self.slots[slot as usize]);
        let comm = std::mem::replace(&mut handle.0, std::ptr::null_mut());
        if comm.is_null() {
            return;
        }
        // SAFETY: a communicator that nobody else has any more.
        let ended = unsafe { (self.nccl.ncclCommAbort)(comm) };
        if let Err(error) = check(self.nccl, "ncclCommAbort", ended) {
            log(Level::Debug, || format!("rank {}: {error}", self.rank));
        }
    }

    /// What NCCL has to say of a slot that is in flight.
    fn async_error(&self, slot: u32) -> Result<()> {
        // A call that holds it looks for itself.
        let Ok(handle) = self.slots[slot as usize].try_lock() else { return Ok(()) };
        if handle.0.is_null() {
            return Ok(());
        }
        let mut state = ncclSuccess;
        // SAFETY: a communicator, and a valid out-pointer.
        let asked = unsafe { (self.nccl.ncclCommGetAsyncError)(handle.0, &mut state) };
        check(self.nccl, "ncclCommGetAsyncError", asked)?;
        check(self.nccl, "a collective", state)
    }

    fn gather(
        &self,
        comm: ncclComm_t,
        (from, to, row_bytes): (u64, u64, u64),
        counts: Counts,
        stream: Stream,
    ) -> Result<()> {
        let nccl = self.nccl;
        let all = |rows: u64| {
            if rows == 0 {
                return Ok(());
            }
            let bytes = (rows * row_bytes) as usize;
            // SAFETY: whoever made the move vouches for the memory.
            let result =
                unsafe { (nccl.ncclAllGather)(from as _, to as _, bytes, ncclUint8, comm, stream.raw()) };
            check(nccl, "ncclAllGather", result)
        };
        match counts {
            Counts::Equal(rows) => all(rows as u64),
            Counts::Each(rows) if rows.iter().all(|count| *count == rows[0]) => all(rows[0] as u64),
            Counts::Each(rows) => {
                let mut to = to;
                for (root, count) in rows.iter().enumerate().filter(|(_, count)| **count > 0) {
                    let bytes = *count as u64 * row_bytes;
                    // SAFETY: as above.
                    let result = unsafe {
                        let stream = stream.raw();
                        (nccl.ncclBroadcast)(
                            from as _,
                            to as _,
                            bytes as usize,
                            ncclUint8,
                            root as i32,
                            comm,
                            stream,
                        )
                    };
                    check(nccl, "ncclBroadcast", result)?;
                    to += bytes;
                }
                Ok(())
            }
        }
    }

    fn enqueue(&self, comm: ncclComm_t, one: Move, counts: Counts, stream: Stream) -> Result<()> {
        let nccl = self.nccl;
        match one {
            Move::Gather { from, to, row_bytes } => self.gather(comm, (from, to, row_bytes), counts, stream),
            Move::Words { at, bytes } => {
                self.gather(comm, (at + self.rank as u64 * bytes, at, bytes), Counts::Equal(1), stream)
            }
            Move::Scatter { from, to, row_bytes, apart, own } => {
                let mut from = from;
                let mine = counts.of(self.rank) * row_bytes;
                for peer in 0..self.ranks {
                    let theirs = counts.of(peer) * row_bytes;
                    if peer != self.rank || own {
                        let to = to + peer as u64 * apart;
                        // SAFETY: as above.
                        unsafe {
                            let (peer, stream) = (peer as i32, stream.raw());
                            if theirs > 0 {
                                let sent = (nccl.ncclSend)(
                                    from as _,
                                    theirs as usize,
                                    ncclUint8,
                                    peer,
                                    comm,
                                    stream,
                                );
                                check(nccl, "ncclSend", sent)?;
                            }
                            if mine > 0 {
                                let due =
                                    (nccl.ncclRecv)(to as _, mine as usize, ncclUint8, peer, comm, stream);
                                check(nccl, "ncclRecv", due)?;
                            }
                        }
                    }
                    from += theirs;
                }
                Ok(())
            }
        }
    }
}

impl Wire for Communicators {
    fn carry(
        &self,
        slot: u32,
        moves: &[Move],
        counts: Counts,
        stream: Stream,
        deadline: Instant,
    ) -> Result<()> {
        let handle = lock(&self.slots[slot as usize]);
        if handle.0.is_null() {
            let text = format!("the communicator of slot {slot} was ended");
            return Err(self.failure.get().cloned().unwrap_or_else(|| Error::new(Status::Nccl, text)));
        }
        let nccl = self.nccl;
        // SAFETY: pairs with the end below, on every path.
        check(nccl, "ncclGroupStart", unsafe { (nccl.ncclGroupStart)() })?;
        let queued = moves.iter().try_for_each(|one| self.enqueue(handle.0, *one, counts, stream));
        // SAFETY: as above.
        let ended = check(nccl, "ncclGroupEnd", unsafe { (nccl.ncclGroupEnd)() });
        queued.and(ended)?;
        self.settle("a collective", slot, handle.0, deadline)
    }
    fn failure(&self) -> Option<Error> {
        self.failure.get().cloned()
    }
    fn cut(&self) {
        (0..self.slots.len()).for_each(|slot| self.end(slot as u32));
    }
}

/// A communicator whose peers do not come to its end is ended without them.
const FAREWELL: Duration = Duration::from_secs(2);

impl Drop for Communicators {
    /// Nothing of this rank's is in flight any more.
    fn drop(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        for slot in 0..self.slots.len() as u32 {
            let comm = lock(&self.slots[slot as usize]).0;
            if comm.is_null() {
                continue;
            }
            // SAFETY: a communicator; peers may still read what this rank sent, which this waits for.
            let finalized =
                check(self.nccl, "ncclCommFinalize", unsafe { (self.nccl.ncclCommFinalize)(comm) })
                    .and_then(|()| self.settle("ncclCommFinalize", slot, comm, deadline));
            if finalized.is_err() {
                self.end(slot);
                continue;
            }
            lock(&self.slots[slot as usize]).0 = std::ptr::null_mut();
            // SAFETY: finalized, and nobody has it any more.
            let destroyed = unsafe { (self.nccl.ncclCommDestroy)(comm) };
            if let Err(error) = check(self.nccl, "ncclCommDestroy", destroyed) {
                log(Level::Debug, || format!("rank {}: {error}", self.rank));
            }
        }
    }
}

/// The thread that sees to it that no operation outlasts its deadline, or a peer. Joined on drop.
pub struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(all: Arc<Communicators>, lookout: Lookout, health: Arc<Health>) -> Result<Watch> {
        let (stop, stopped) = channel::<()>();
        let name = format!("a2a-nccl-{}", all.rank);
        let watch = move || {
            let mut since: Vec<Option<(u64, Instant)>> = vec![None; all.slots.len()];
            while matches!(stopped.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout)) {
                for (slot, since) in (0..).zip(&mut since) {
                    look(&all, &lookout, &health, slot, since);
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(watch)
            .map_err(|e| Error::system("the thread that watches collectives", e))?;
        Ok(Watch { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Looks at one slot. `since`: the step whose operation was in flight at the last look, and since when.
fn look(
    all: &Communicators,
    lookout: &Lookout,
    health: &Health,
    slot: u32,
    since: &mut Option<(u64, Instant)>,
) {
    let Some(step) = lookout.in_flight(slot) else {
        *since = None;
        return;
    };
    let begun = match since {
        Some((same, begun)) if *same == step => *begun,
        _ => since.insert((step, Instant::now())).1,
    };
    let gone = (0..all.ranks).any(|rank| rank != all.rank && health.is_dead(rank));
    let failed = all.async_error(slot);
    let is_over = health.is_aborted()
        || gone && begun.elapsed() >= LAST_WORDS
        || begun.elapsed() >= lookout.deadline(step)
        || failed.is_err();
    if !is_over || all.ending[slot as usize].load(Ordering::Acquire) {
        return;
    }
    if let Err(error) = failed {
        let error = error.context(format!("rank {}", all.rank));
        log(Level::Error, || error.to_string());
        let _ = all.failure.set(error);
    }
    log(Level::Warn, || format!("rank {}: a collective on slot {slot} is ended", all.rank));
    // Kernels behind it know before they run.
    lookout.break_off(slot);
    all.end(slot);
}
