//! NCCL as an engine calls it: a communicator as it is by default, one group a call.

use std::ffi::c_void;
use std::ptr::null_mut;

use nccl_sys::{Nccl, ncclBfloat16, ncclComm_t, ncclResult_t, ncclSuccess, ncclSum, ncclUint8, ncclUniqueId};

use crate::gpu::Stream;
use crate::meeting::Meeting;

pub struct BareNccl {
    nccl: &'static Nccl,
    comm: ncclComm_t,
}

/// What goes to a peer, and what comes from it: addresses, and bytes.
pub struct Part {
    pub peer: usize,
    pub sent: (usize, usize),
    pub received: (usize, usize),
}

fn ok(what: &str, result: ncclResult_t) -> Result<(), String> {
    if result == ncclSuccess { Ok(()) } else { Err(format!("{what}: NCCL returned {result}")) }
}

impl BareNccl {
    /// All ranks call this. It lives as long as the process.
    pub fn new(directory: &str, rank: usize, ranks: usize, meeting: &Meeting) -> Result<BareNccl, String> {
        let nccl = Nccl::get().map_err(|why| why.to_string())?;
        let path = format!("{directory}/id");
        let mut id = ncclUniqueId { internal: [0; 128] };
        if rank == 0 {
            // SAFETY: a valid out-pointer.
            ok("ncclGetUniqueId", unsafe { (nccl.ncclGetUniqueId)(&mut id) })?;
            std::fs::write(&path, id.internal).map_err(|error| error.to_string())?;
        }
        meeting.wait()?;
        id.internal.copy_from_slice(&std::fs::read(&path).map_err(|error| error.to_string())?);
        let mut comm = null_mut();
        let (ranks, me, config) = (ranks as i32, rank as i32, &mut Default::default());
        // SAFETY: the same id on all ranks, which all call this now.
        let made = unsafe { (nccl.ncclCommInitRankConfig)(&mut comm, ranks, id, me, config) };
        ok("ncclCommInitRankConfig", made)?;
        Ok(BareNccl { nccl, comm })
    }

    pub fn group(&self, calls: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        // SAFETY: paired, whatever becomes of the calls.
        let (begun, done, ended) =
            unsafe { ((self.nccl.ncclGroupStart)(), calls(), (self.nccl.ncclGroupEnd)()) };
        ok("ncclGroupStart", begun).and(done).and(ok("ncclGroupEnd", ended))
    }

    /// `bytes` of each rank, from an address, one behind the other to another.
    pub fn gather(&self, from: usize, to: usize, bytes: usize, stream: Stream) -> Result<(), String> {
        let (from, to) = (from as *const c_void, to as *mut c_void);
        // SAFETY: memory of the caller's, so many bytes, and as many from each rank.
        let sent = unsafe { (self.nccl.ncclAllGather)(from, to, bytes, ncclUint8, self.comm, stream.cast()) };
        ok("ncclAllGather", sent)
    }

    /// To and from other ranks, in a group.
    pub fn exchange(&self, parts: &[Part], stream: Stream) -> Result<(), String> {
        self.group(|| {
            for part in parts {
                let peer = part.peer as i32;
                let (from, to) = (part.sent.0 as *const c_void, part.received.0 as *mut c_void);
                // SAFETY: memory of the caller's, of so many bytes each; the peer says the same.
                unsafe {
                    let sent =
                        (self.nccl.ncclSend)(from, part.sent.1, ncclUint8, peer, self.comm, stream.cast());
                    ok("ncclSend", sent)?;
                    let due =
                        (self.nccl.ncclRecv)(to, part.received.1, ncclUint8, peer, self.comm, stream.cast());
                    ok("ncclRecv", due)?;
                }
            }
            Ok(())
        })
    }

    /// A part of `count` bf16 numbers for each rank at an address; this rank's sums at another.
    pub fn reduce(&self, from: usize, to: usize, count: usize, stream: Stream) -> Result<(), String> {
        let (from, to) = (from as *const c_void, to as *mut c_void);
        // SAFETY: memory of the caller's, of as many elements, those sent times the ranks.
        let summed = unsafe {
            (self.nccl.ncclReduceScatter)(from, to, count, ncclBfloat16, ncclSum, self.comm, stream.cast())
        };
        ok("ncclReduceScatter", summed)
    }
}
