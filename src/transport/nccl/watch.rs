//! The thread that sees to it that no operation outlasts its deadline, or a peer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Communicators, LOOK};
use crate::device::Health;
use crate::device::cuda::Lookout;
use crate::error::{Error, Result};
use crate::log::{Level, log};

/// What a rank that has gone had sent is on its way for no longer.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// None is ended before: kernels behind one that is younger do not ask if it was (kYoung, kernels/wait.cuh).
pub(super) const SPARED: Duration = Duration::from_millis(21);

/// Joined on drop.
pub struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(all: Arc<Communicators>, lookout: Lookout, health: Arc<Health>) -> Result<Watch> {
        let (stop, stopped) = channel::<()>();
        let name = format!("a2a-nccl-{}", all.caller.rank);
        let lookout = Arc::new(lookout);
        let _ = all.lookout.set(lookout.clone());
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

/// Looks at one slot. `since`: the operation that was in flight at the last look, and since when.
fn look(
    all: &Communicators,
    lookout: &Lookout,
    health: &Health,
    slot: u32,
    since: &mut Option<(u64, Instant)>,
) {
    let Some(operation) = lookout.in_flight(slot) else {
        *since = None;
        return;
    };
    let begun = match since {
        Some((same, begun)) if *same == operation => *begun,
        _ => since.insert((operation, Instant::now())).1,
    };
    let gone = (0..all.caller.ranks).any(|rank| rank != all.caller.rank && health.is_dead(rank));
    let failed = all.async_error(slot);
    let age = begun.elapsed();
    let is_over = health.is_aborted()
        || gone && age >= LAST_WORDS
        || age >= lookout.deadline(operation)
        || failed.is_err();
    if !is_over || age < SPARED || all.slots[slot as usize].ending.load(Ordering::Acquire) {
        return;
    }
    // Kernels behind it know before they run.
    if !lookout.break_off(slot, operation) {
        return;
    }
    if let Err(error) = failed {
        let error = error.context(format!("rank {}", all.caller.rank));
        log(Level::Error, || error.to_string());
        let _ = all.failure.set(error);
    }
    log(Level::Warn, || format!("rank {}: a collective on slot {slot} is ended", all.caller.rank));
    all.end(slot);
}
