//! Windows: memory of one rank that every rank of the group can address.
//!
//! `host` is shared memory for the CPU, `vmm` memory of a GPU. A window is made before the ranks meet and shared as a
//! file descriptor. `apart` is the memory of a rank that shares none.

pub mod apart;
mod host;
pub mod vmm;

use std::os::fd::OwnedFd;

pub use apart::Apart;
pub use host::{WindowFd, Windows};

use crate::device::members::Members;
use crate::error::{Error, Result, Status};

/// The windows that a comm has mapped.
pub enum Mapped {
    Host(Windows),
    Cuda(vmm::Windows),
    /// Nobody's but this rank's own.
    Apart,
}

impl Mapped {
    /// New memory for this rank's own window.
    pub fn renew(&self, rank: u32, bytes: u64) -> Result<OwnedFd> {
        match self {
            Mapped::Host(_) => WindowFd::create(rank, bytes).map(WindowFd::into_fd),
            Mapped::Cuda(windows) => windows.renew(),
            Mapped::Apart => Err(Error::internal("a window that nobody shares is not renewed")),
        }
    }

    /// Shows other memory at the addresses of the members' windows: `fds`, by rank. Nobody may be using them. `lost`: ranks
    /// that were left behind, whose windows are not written to any more.
    pub fn replace(
        &self,
        (rank, bytes, generation): (u32, u64, u64),
        members: &Members,
        lost: &Members,
        fds: Vec<Vec<OwnedFd>>,
    ) -> Result<()> {
        for (peer, fds) in (0..).zip(fds).filter(|(peer, _)| members.contains(*peer)) {
            let Some(fd) = fds.into_iter().next() else {
                return Err(Error::new(Status::PeerLost, format!("rank {rank}: rank {peer} sent no window")));
            };
            match self {
                Mapped::Host(windows) => windows.replace(peer, &WindowFd::adopt(peer, fd, bytes)?)?,
                Mapped::Cuda(windows) => windows.replace(generation, peer, &fd)?,
                Mapped::Apart => return Err(Error::internal("a window that nobody shares is not replaced")),
            }
        }
        match self {
            Mapped::Host(_) | Mapped::Apart => Ok(()),
            Mapped::Cuda(windows) => lost.iter().try_for_each(|lost| windows.dismiss(generation, lost)),
        }
    }
}
