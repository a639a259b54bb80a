//! Moves as NCCL calls: what is one operation is one group.

use nccl_sys::{Nccl, ncclBfloat16, ncclComm_t, ncclFloat16, ncclFloat32, ncclSum, ncclUint8};

use super::check;
use crate::device::{Counts, Float, Move, Stream};
use crate::error::Result;

/// A rank that calls.
#[derive(Clone, Copy)]
pub struct Caller {
    pub nccl: &'static Nccl,
    pub rank: u32,
    pub ranks: u32,
}

/// How many ways there are for NCCL to do an operation that it may have to connect peers for.
pub const WAYS: usize = 5;

/// The way of a move, and the size of its messages by powers of two.
pub fn way(one: &Move, counts: Counts) -> (usize, u32) {
    let size = |row_bytes: u64| u64::BITS - (counts.most() * row_bytes).leading_zeros();
    let equal = usize::from(counts.equal().is_none());
    match one {
        Move::Words { bytes, .. } => (0, u64::BITS - bytes.leading_zeros()),
        Move::Gather { row_bytes, .. } => (equal, size(*row_bytes)),
        Move::Tell { bytes, .. } => (2, u64::BITS - bytes.leading_zeros()),
        Move::Scatter { row_bytes, .. } => (2, size(*row_bytes)),
        Move::Sum { row_bytes, .. } => (3 + equal, size(*row_bytes)),
    }
}

impl Caller {
    /// Puts all moves on the stream.
    pub fn group(self, comm: ncclComm_t, moves: &[Move], counts: Counts, stream: Stream) -> Result<()> {
        let nccl = self.nccl;
        // SAFETY: pairs with the end below, on every path.
        check(nccl, "ncclGroupStart", unsafe { (nccl.ncclGroupStart)() })?;
        let queued = moves.iter().try_for_each(|one| self.enqueue(comm, *one, counts, stream));
        // SAFETY: as above.
        let ended = check(nccl, "ncclGroupEnd", unsafe { (nccl.ncclGroupEnd)() });
        queued.and(ended)
    }

    /// `bytes` to a peer, and as many from it, if there are any.
    fn exchange(
        self,
        comm: ncclComm_t,
        peer: u32,
        (from, sent): (u64, u64),
        (to, due): (u64, u64),
        stream: Stream,
    ) -> Result<()> {
        let (nccl, peer, stream) = (self.nccl, peer as i32, stream.raw());
        if sent > 0 {
            // SAFETY: whoever made the move vouches for the memory.
            let result = unsafe { (nccl.ncclSend)(from as _, sent as usize, ncclUint8, peer, comm, stream) };
            check(nccl, "ncclSend", result)?;
        }
        if due > 0 {
            // SAFETY: as above.
            let result = unsafe { (nccl.ncclRecv)(to as _, due as usize, ncclUint8, peer, comm, stream) };
            check(nccl, "ncclRecv", result)?;
        }
        Ok(())
    }

    fn enqueue(self, comm: ncclComm_t, one: Move, counts: Counts, stream: Stream) -> Result<()> {
        match one {
            Move::Gather { from, to, row_bytes } => self.gather(comm, (from, to, row_bytes), counts, stream),
            Move::Words { at, bytes } => {
                self.gather(comm, (at + self.rank as u64 * bytes, at, bytes), Counts::Equal(1), stream)
            }
            Move::Tell { at, bytes } => {
                let own = at + self.rank as u64 * bytes;
                (0..self.ranks).filter(|peer| *peer != self.rank).try_for_each(|peer| {
                    self.exchange(comm, peer, (own, bytes), (at + peer as u64 * bytes, bytes), stream)
                })
            }
            Move::Scatter { from, to, row_bytes, apart, own } => {
                let mut from = from;
                let mine = counts.of(self.rank) * row_bytes;
                for peer in 0..self.ranks {
                    let theirs = counts.of(peer) * row_bytes;
                    if peer != self.rank || own {
                        self.exchange(comm, peer, (from, theirs), (to + peer as u64 * apart, mine), stream)?;
                    }
                    from += theirs;
                }
                Ok(())
            }
            Move::Sum { from, to, row_bytes, float } => {
                self.sum(comm, (from, to, row_bytes), float, counts, stream)
            }
        }
    }

    fn gather(
        self,
        comm: ncclComm_t,
        (from, to, row_bytes): (u64, u64, u64),
        counts: Counts,
        stream: Stream,
    ) -> Result<()> {
        let nccl = self.nccl;
        if let Some(rows) = counts.equal() {
            if rows == 0 {
                return Ok(());
            }
            let bytes = (rows * row_bytes) as usize;
            // SAFETY: whoever made the move vouches for the memory.
            let result =
                unsafe { (nccl.ncclAllGather)(from as _, to as _, bytes, ncclUint8, comm, stream.raw()) };
            return check(nccl, "ncclAllGather", result);
        }
        let mut to = to;
        for root in (0..self.ranks).filter(|root| counts.of(*root) > 0) {
            let bytes = counts.of(root) * row_bytes;
            // SAFETY: as above.
            let result = unsafe {
                let (count, root, stream) = (bytes as usize, root as i32, stream.raw());
                (nccl.ncclBroadcast)(from as _, to as _, count, ncclUint8, root, comm, stream)
            };
            check(nccl, "ncclBroadcast", result)?;
            to += bytes;
        }
        Ok(())
    }

    fn sum(
        self,
        comm: ncclComm_t,
        (from, to, row_bytes): (u64, u64, u64),
        float: Float,
        counts: Counts,
        stream: Stream,
    ) -> Result<()> {
        let nccl = self.nccl;
        let (kind, bytes) = match float {
            Float::Bf16 => (ncclBfloat16, 2),
            Float::F16 => (ncclFloat16, 2),
            Float::F32 => (ncclFloat32, 4),
        };
        let elements = |rows: u64| (rows * row_bytes / bytes) as usize;
        if let Some(rows) = counts.equal() {
            if rows == 0 {
                return Ok(());
            }
            // SAFETY: whoever made the move vouches for the memory.
            let result = unsafe {
                let stream = stream.raw();
                (nccl.ncclReduceScatter)(from as _, to as _, elements(rows), kind, ncclSum, comm, stream)
            };
            return check(nccl, "ncclReduceScatter", result);
        }
        let mut from = from;
        for root in (0..self.ranks).filter(|root| counts.of(*root) > 0) {
            let rows = counts.of(root);
            // SAFETY: as above.
            let result = unsafe {
                let (count, stream) = (elements(rows), stream.raw());
                (nccl.ncclReduce)(from as _, to as _, count, kind, ncclSum, root as i32, comm, stream)
            };
            check(nccl, "ncclReduce", result)?;
            from += rows * row_bytes;
        }
        Ok(())
    }
}
