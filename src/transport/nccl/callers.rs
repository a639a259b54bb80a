//! The caller's `ncclComm_t`: communicators are split off it, and ranks that have nothing else in common meet over it. It stays the
//! caller's, and is never ended here.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use nccl_sys::{Nccl, ncclComm_t, ncclInProgress, ncclSuccess, ncclUint8};

use super::{Group, Handle, PAUSE, check, leaked, probe, within};
use crate::config::{Allgather, CallersComm};
use crate::device::cuda::driver::{Context, DeviceMemory, Pool, Stream};
use crate::error::{Error, Result, Status};

/// Waits for what a communicator of the caller's does in the background, if it is one that does.
fn settle(nccl: &Nccl, what: &str, comm: ncclComm_t, until: Instant) -> Result<()> {
    loop {
        let mut state = ncclSuccess;
        // SAFETY: the caller's communicator, and a valid out-pointer.
        let asked = unsafe { (nccl.ncclCommGetAsyncError)(comm, &mut state) };
        check(nccl, "ncclCommGetAsyncError", asked)?;
        if state != ncclInProgress || Instant::now() >= until {
            return check(nccl, what, state);
        }
        std::thread::sleep(PAUSE);
    }
}

impl CallersComm {
    fn raw(self) -> ncclComm_t {
        self.0 as ncclComm_t
    }
}

pub fn split_off(
    nccl: &'static Nccl,
    caller: CallersComm,
    group: &Group,
    deadline: Instant,
) -> Result<Handle> {
    let (group, rank) = (*group, group.rank as i32);
    within("ncclCommSplit of nccl_comm", deadline, &AtomicBool::new(false), move || {
        let (mut config, raw) = (group.config(), leaked());
        // SAFETY: valid pointers; the caller's communicator, which nobody else uses as long as a2a_create lasts.
        let made = unsafe { (nccl.ncclCommSplit)(caller.raw(), 0, rank, raw, &mut config) };
        check(nccl, "ncclCommSplit of nccl_comm", made)?;
        settle(nccl, "ncclCommSplit of nccl_comm", caller.raw(), deadline)?;
        Ok(Handle(*raw))
    })
}

/// Refuses a communicator that is not of these ranks, or not on this device.
pub fn check_fits(caller: CallersComm, (rank, ranks, ordinal): (u32, u32, i32)) -> Result<()> {
    let nccl = probe()?;
    let asked = [
        ("num_ranks", nccl.ncclCommCount, ranks as i32),
        ("rank", nccl.ncclCommUserRank, rank as i32),
        ("device_ordinal", nccl.ncclCommCuDevice, ordinal),
    ];
    for (name, ask, ours) in asked {
        let mut theirs = 0;
        // SAFETY: the caller's communicator, and a valid out-pointer.
        check(nccl, "nccl_comm", unsafe { ask(caller.raw(), &mut theirs) })?;
        if theirs != ours {
            return Err(Error::invalid(format!("{name} is {ours}, and {theirs} in nccl_comm")));
        }
    }
    Ok(())
}

/// An all-gather over the caller's communicator, by which ranks can meet that have nothing else in common.
pub fn allgather(caller: CallersComm, ordinal: i32, timeout: Duration) -> Allgather {
    Allgather::new(move |mine, all| {
        let (mine, bytes, deadline) = (mine.to_vec(), all.len(), Instant::now() + timeout);
        let nccl = probe()?;
        let gathered = within("ncclAllGather on nccl_comm", deadline, &AtomicBool::new(false), move || {
            let context = Context::retain(ordinal)?;
            let _entered = context.enter()?;
            let (pool, stream) = (Pool::new(&context)?, Stream::new(&context)?);
            let memory = DeviceMemory::new(&pool, (mine.len() + bytes) as u64)?;
            memory.write(0, &mine)?;
            let (from, to) = (memory.address(), memory.address() + mine.len() as u64);
            let raw = stream.raw();
            // SAFETY: memory of ours of these sizes; the caller's communicator, which nobody else uses meanwhile.
            let result = unsafe {
                (nccl.ncclAllGather)(from as _, to as _, mine.len(), ncclUint8, caller.raw(), raw.handle())
            };
            check(nccl, "ncclAllGather on nccl_comm", result)?;
            settle(nccl, "ncclAllGather on nccl_comm", caller.raw(), deadline)?;
            while !raw.is_idle()? {
                if Instant::now() >= deadline {
                    // The kernel may still write there.
                    std::mem::forget((memory, stream));
                    let text = "ncclAllGather on nccl_comm: not every rank came in time";
                    return Err(Error::new(Status::Timeout, text));
                }
                std::thread::sleep(PAUSE);
            }
            let mut all = vec![0; bytes];
            memory.read(mine.len() as u64, &mut all)?;
            Ok(all)
        })?;
        all.copy_from_slice(&gathered);
        Ok(())
    })
}
