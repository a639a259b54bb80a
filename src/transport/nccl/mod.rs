//! NCCL communicators: one a slot, made within the deadline in which the group forms; what carries rows and words where
//! windows do not reach.
//!
//! They are split off one that is made so that NCCL answers `ncclInProgress` where it would wait, and is asked again until a
//! deadline. Those of the slots return when they have put their work on the stream, which takes a tenth of the time; where they
//! might have to wait for peers to connect, on an operation of a kind and a size that there was none of before, a thread calls
//! them (`within`). Operations on the device have no deadline, so another thread watches them (`watch`): one that a rank is missing
//! for is ended with its communicator (`ncclCommAbort`), and the kernels behind it find the step void.

mod callers;
mod calls;
mod watch;

use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use nccl_sys::{
    Nccl, ncclComm, ncclComm_t, ncclConfig_t, ncclInProgress, ncclResult_t, ncclSuccess, ncclUniqueId,
};

use crate::config::CallersComm;
use crate::device::cuda::Lookout;
use crate::device::{Counts, Move, Stream, Wire};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};

pub use callers::{allgather, check_fits};
use calls::{Caller, WAYS, way};
pub use watch::Watch;

/// Between two questions of what NCCL does in the background.
const PAUSE: Duration = Duration::from_micros(100);
/// A call that puts work on a stream takes no longer, if it can.
const CALL: Duration = Duration::from_millis(200);
/// Between two looks at what is in flight.
const LOOK: Duration = Duration::from_millis(2);
/// A kernel of NCCL's has no more blocks than it has channels.
const MOST_CTAS: u32 = 32;

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

/// Where NCCL puts a communicator when it gets there, which may be after the call has given up.
fn leaked() -> &'static mut ncclComm_t {
    Box::leak(Box::new(std::ptr::null_mut()))
}

/// What may wait for peers on the thread that calls has a thread of its own, which is left behind if the deadline comes first.
fn within<T: Send + 'static>(
    what: &str,
    deadline: Instant,
    ending: &AtomicBool,
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, finished) = channel();
    std::thread::Builder::new()
        .name("a2a-nccl-call".into())
        // Nobody listens any more once the deadline has passed.
        .spawn(move || drop(done.send(run())))
        .map_err(|e| Error::system("a thread that calls NCCL", e))?;
    let error = |status, why: &str| Err(Error::new(status, format!("{what}: {why}")));
    loop {
        match finished.recv_timeout(LOOK) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Disconnected) => return error(Status::Internal, "its thread panicked"),
            Err(RecvTimeoutError::Timeout) if ending.load(Ordering::Acquire) => {
                return error(
                    Status::PeerLost,
                    "it was ended, because a rank is gone or the comm was aborted",
                );
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                return error(Status::Timeout, "not every rank came in time");
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// A communicator.
struct Handle(ncclComm_t);

// SAFETY: NCCL takes a communicator from any thread, one at a time: a lock is held around each call.
unsafe impl Send for Handle {}

impl Handle {
    fn raw(&self) -> ncclComm_t {
        self.0
    }
}

/// What communicators are made for.
#[derive(Clone, Copy)]
pub struct Group {
    pub rank: u32,
    pub ranks: u32,
    pub slots: u32,
    /// The most multiprocessors that NCCL's kernels may use, each; 0: NCCL's choice.
    pub max_sms: u32,
}

impl Group {
    /// Of a slot's.
    fn config(&self) -> ncclConfig_t {
        let mut config = ncclConfig_t::default();
        config.blocking = 1;
        if self.max_sms > 0 {
            config.maxCTAs = self.max_sms.min(MOST_CTAS) as i32;
        }
        config
    }
}

/// Where communicators come from.
pub enum Origin<'a> {
    /// What `new_id` made on rank 0.
    Id(&'a [u8]),
    /// They are split off the caller's, which stays the caller's.
    Caller(CallersComm),
}

impl Slot {
    fn new(comm: Handle) -> Slot {
        let (comm, call, ending) = (AtomicPtr::new(comm.0), Mutex::default(), AtomicBool::new(false));
        Slot { comm, call, ending, known: Default::default() }
    }
    /// Nobody else has it from now on.
    fn take(&self) -> Option<Handle> {
        let comm = self.comm.swap(std::ptr::null_mut(), Ordering::AcqRel);
        (!comm.is_null()).then_some(Handle(comm))
    }
}

/// A rank's communicators.
pub struct Communicators {
    caller: Caller,
    slots: Vec<Slot>,
    failure: OnceLock<Error>,
    /// What is in flight, once somebody watches it.
    lookout: OnceLock<Arc<Lookout>>,
    /// Of communicators that have been ended.
    ending: Mutex<Vec<Aside>>,
}

struct Slot {
    /// NULL once it was ended.
    comm: AtomicPtr<ncclComm>,
    /// Held around each call.
    call: Mutex<()>,
    /// It is to be ended.
    ending: AtomicBool,
    /// By way, the sizes of messages that there were, by powers of two: nobody has to connect for more of them.
    known: [AtomicU64; WAYS],
}

impl Communicators {
    /// Collective: returns when all ranks have called it, or at the deadline. The context of the rank's device is current.
    pub fn create(group: Group, origin: Origin<'_>, deadline: Instant) -> Result<Communicators> {
        let caller = Caller { nccl: probe()?, rank: group.rank, ranks: group.ranks };
        let mut all = Communicators {
            caller,
            slots: Vec::new(),
            failure: OnceLock::new(),
            lookout: OnceLock::new(),
            ending: Mutex::default(),
        };
        // Who gives up does not wait for the peers' farewell.
        all.make(&group, origin, deadline).inspect_err(|_| all.cut())?;
        Ok(all)
    }

    fn make(&mut self, group: &Group, origin: Origin<'_>, deadline: Instant) -> Result<()> {
        let parent = match origin {
            Origin::Id(id) => Some(Parent::new(self.caller, id, deadline)?),
            Origin::Caller(_) => None,
        };
        for _ in 0..group.slots {
            let comm = match (&parent, &origin) {
                (Some(parent), _) => parent.split_off(group, deadline)?,
                (None, Origin::Caller(comm)) => callers::split_off(self.caller.nccl, *comm, group, deadline)?,
                (None, Origin::Id(_)) => return Err(Error::internal("communicators of nothing")),
            };
            self.slots.push(Slot::new(comm));
        }
        match parent {
            Some(parent) => parent.finish(deadline),
            None => Ok(()),
        }
    }

    /// Ends a slot's communicator: kernels of it that wait return.
    fn end(&self, slot: u32) {
        let slot = &self.slots[slot as usize];
        slot.ending.store(true, Ordering::Release);
        // A call is soon over, but for one whose kernel finds no room in a queue behind the operation that is to end.
        let until = Instant::now() + CALL;
        let mut call = slot.call.try_lock();
        while call.is_err() && Instant::now() < until {
            std::thread::sleep(PAUSE);
            call = slot.call.try_lock();
        }
        self.abort(slot);
    }

    fn abort(&self, slot: &Slot) {
        lock(&self.ending).extend(slot.take().map(|comm| abort(self.caller, comm)));
    }

    /// Waits for what has been ended, but not for long: a process that exits meanwhile may crash in NCCL (seen with 2.28).
    fn wait(&self) {
        wait_for(std::mem::take(&mut *lock(&self.ending)), Instant::now() + FAREWELL);
    }

    /// What NCCL has to say of a slot that is in flight.
    fn async_error(&self, slot: u32) -> Result<()> {
        let slot = &self.slots[slot as usize];
        // A call hears for itself.
        let Ok(_call) = slot.call.try_lock() else { return Ok(()) };
        let comm = slot.comm.load(Ordering::Acquire);
        if comm.is_null() {
            return Ok(());
        }
        check(self.caller.nccl, "a collective", state_of(self.caller.nccl, comm)?)
    }
}

fn state_of(nccl: &Nccl, comm: ncclComm_t) -> Result<ncclResult_t> {
    let mut state = ncclSuccess;
    // SAFETY: a communicator, and a valid out-pointer.
    let asked = unsafe { (nccl.ncclCommGetAsyncError)(comm, &mut state) };
    check(nccl, "ncclCommGetAsyncError", asked)?;
    Ok(state)
}

/// Waits for what NCCL does in the background.
fn settle(nccl: &Nccl, what: &str, comm: ncclComm_t, deadline: Instant) -> Result<()> {
    loop {
        let state = state_of(nccl, comm)?;
        if state != ncclInProgress {
            return check(nccl, what, state);
        }
        if Instant::now() >= deadline {
            return Err(Error::new(Status::Timeout, format!("{what}: not every rank came in time")));
        }
        std::thread::sleep(PAUSE);
    }
}

/// The communicator that the slots' are split off: it carries nothing. Ended on drop.
struct Parent {
    caller: Caller,
    comm: ncclComm_t,
}

impl Parent {
    /// By an id of rank 0's.
    fn new(caller: Caller, id: &[u8], deadline: Instant) -> Result<Parent> {
        let mut unique = ncclUniqueId { internal: [0; 128] };
        if id.len() != unique.internal.len() {
            return Err(Error::internal(format!("an NCCL id of {} bytes", id.len())));
        }
        unique.internal.copy_from_slice(id);
        let mut config = ncclConfig_t::default();
        config.blocking = 0;
        let (raw, ranks, rank) = (leaked(), caller.ranks as i32, caller.rank as i32);
        // SAFETY: valid pointers; the id is rank 0's.
        let made = unsafe { (caller.nccl.ncclCommInitRankConfig)(raw, ranks, unique, rank, &mut config) };
        let parent = Parent { caller, comm: *raw };
        check(caller.nccl, "ncclCommInitRankConfig", made)?;
        settle(caller.nccl, "ncclCommInitRankConfig", parent.comm, deadline)?;
        // SAFETY: `leaked` made it, and NCCL is done with it.
        drop(unsafe { Box::from_raw(raw) });
        Ok(parent)
    }

    /// A slot's.
    fn split_off(&self, group: &Group, deadline: Instant) -> Result<Handle> {
        let (mut config, raw) = (group.config(), leaked());
        let nccl = self.caller.nccl;
        // SAFETY: valid pointers; a communicator of this rank's.
        let made = unsafe { (nccl.ncclCommSplit)(self.comm, 0, group.rank as i32, raw, &mut config) };
        check(nccl, "ncclCommSplit", made)?;
        // What is split off is not there before that is done: its parent tells.
        settle(nccl, "ncclCommSplit", self.comm, deadline)?;
        let comm = Handle(*raw);
        // SAFETY: as in `new`.
        drop(unsafe { Box::from_raw(raw) });
        Ok(comm)
    }

    /// All is split off it. Collective.
    fn finish(mut self, deadline: Instant) -> Result<()> {
        let (nccl, comm) = (self.caller.nccl, Handle(self.comm));
        // SAFETY: a communicator that nobody else has.
        check(nccl, "ncclCommFinalize", unsafe { (nccl.ncclCommFinalize)(self.comm) })?;
        settle(nccl, "ncclCommFinalize", self.comm, deadline)?;
        self.comm = std::ptr::null_mut();
        // SAFETY: finalized, and nobody has it any more.
        let end = move || check(nccl, "ncclCommDestroy", unsafe { (nccl.ncclCommDestroy)(comm.raw()) });
        wait_for(vec![aside(self.caller.rank, end)], Instant::now() + FAREWELL);
        Ok(())
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        if !self.comm.is_null() {
            wait_for(vec![abort(self.caller, Handle(self.comm))], Instant::now() + FAREWELL);
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
        let it = &self.slots[slot as usize];
        let _call = lock(&it.call);
        let comm = it.comm.load(Ordering::Acquire);
        if comm.is_null() {
            let text = format!("the communicator of slot {slot} was ended");
            return Err(self.failure.get().cloned().unwrap_or_else(|| Error::new(Status::Nccl, text)));
        }
        let ways = || moves.iter().map(|one| way(one, counts));
        if ways().all(|(way, size)| it.known[way].load(Ordering::Relaxed) >> size & 1 != 0) {
            return self.caller.group(comm, moves, counts, stream);
        }
        let (caller, handle) = (self.caller, Handle(comm));
        let (own_moves, own_counts) = (moves.to_vec(), counts.own());
        let call = move || caller.group(handle.raw(), &own_moves, own_counts.lent(), stream);
        let called = within("a collective", deadline, &it.ending, call);
        if called.as_ref().is_err_and(|error| error.status.is_step()) {
            // Its thread is told to give up, and so is what is in flight before it.
            it.ending.store(true, Ordering::Release);
            if let Some(lookout) = self.lookout.get()
                && let Some(operation) = lookout.in_flight(slot)
            {
                std::thread::sleep(watch::SPARED);
                lookout.break_off(slot, operation);
            }
            self.abort(it);
        }
        called?;
        for (way, size) in ways() {
            it.known[way].fetch_or(1 << size, Ordering::Relaxed);
        }
        Ok(())
    }
    fn failure(&self) -> Option<Error> {
        self.failure.get().cloned()
    }
    fn cut(&self) {
        (0..self.slots.len()).for_each(|slot| self.end(slot as u32));
        self.wait();
    }
}

/// A communicator whose peers do not come to its end is ended without them.
const FAREWELL: Duration = Duration::from_secs(2);

/// Something that has a thread of its own: it is told here that it is done.
type Aside = Receiver<()>;

/// NCCL may wait for whatever it likes when a communicator ends (seen with 2.28: ncclCommAbort of one of two ranks of a process,
/// for the other). Its kernels are told at once.
fn aside(rank: u32, run: impl FnOnce() -> Result<()> + Send + 'static) -> Aside {
    let (done, aside) = channel();
    let thread = std::thread::Builder::new().name("a2a-nccl-end".into()).spawn(move || {
        if let Err(error) = run() {
            log(Level::Debug, || format!("rank {rank}: {error}"));
        }
        // Whoever waited may have given up.
        let _ = done.send(());
    });
    if let Err(error) = thread {
        log(Level::Error, || {
            format!("rank {rank}: a communicator is left behind for want of a thread: {error}")
        });
    }
    aside
}

/// Waits for all, but not for long; those that are not done are left behind.
fn wait_for(all: Vec<Aside>, until: Instant) {
    for aside in all {
        // A thread that was never made has hung up.
        let _ = aside.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

/// Makes kernels return that wait, and frees the communicator.
fn abort(caller: Caller, comm: Handle) -> Aside {
    let nccl = caller.nccl;
    // SAFETY: a communicator that nobody else has any more, but a call that waits and is to give up.
    aside(caller.rank, move || check(nccl, "ncclCommAbort", unsafe { (nccl.ncclCommAbort)(comm.raw()) }))
}

impl Drop for Communicators {
    /// Nothing of this rank's is in flight any more.
    fn drop(&mut self) {
        let (nccl, rank) = (self.caller.nccl, self.caller.rank);
        let end = |slot: &Slot| {
            let comm = slot.take()?;
            let farewell = move || {
                let comm = comm.raw();
                // SAFETY: a communicator that nobody else has; peers may still read what this rank sent, which the first waits for.
                let finalized = check(nccl, "ncclCommFinalize", unsafe { (nccl.ncclCommFinalize)(comm) });
                // SAFETY: as above.
                finalized
                    .and_then(|()| check(nccl, "ncclCommDestroy", unsafe { (nccl.ncclCommDestroy)(comm) }))
            };
            Some(aside(rank, farewell))
        };
        lock(&self.ending).extend(self.slots.iter().filter_map(end));
        self.wait();
    }
}
