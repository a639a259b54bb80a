//! CPU windows: sealed memfds, mapped by every rank, threads of the owner's process included.
//!
//! The seals (no shrink, no grow, no more seals) are what lets a rank trust a peer's memory not to vanish under it.
//! Pages are taken at creation, so that lack of memory is a status there and not a signal in a step.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::device::Bases;
use crate::error::{Error, Result, Status};
use crate::fault::{self, Point};

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A window that is not mapped yet.
pub struct WindowFd {
    fd: OwnedFd,
}

impl WindowFd {
    /// This rank's own window.
    pub fn create(rank: u32, bytes: u64) -> Result<WindowFd> {
        let available = available_memory();
        if available.is_some_and(|available| bytes > available) {
            return Err(Error::new(
                Status::OutOfMemory,
                format!(
                    "rank {rank}: its window needs {bytes} bytes, the host has {} available (lower max_tokens, \
                     max_hidden or num_slots)",
                    available.unwrap_or(0)
                ),
            ));
        }
        let refused = |what: &str, os: rustix::io::Errno| {
            Error::system(format!("rank {rank}: {what} of a window of {bytes} bytes"), os)
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = fault::call(Point::MemfdCreate, || rustix::fs::memfd_create("a2a-window", flags))
            .map_err(|e| refused("memfd_create", e))?;
        fault::call(Point::Ftruncate, || rustix::fs::ftruncate(&fd, bytes))
            .map_err(|e| refused("ftruncate", e))?;
        fault::call(Point::Fallocate, || rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes))
            .map_err(|e| refused("fallocate", e))?;
        fault::call(Point::Seal, || rustix::fs::fcntl_add_seals(&fd, SEALS))
            .map_err(|e| refused("sealing", e))?;
        Ok(WindowFd { fd })
    }

    /// A peer's window, as it came over a socket: its size and seals are checked before it is mapped.
    pub fn adopt(peer: u32, fd: OwnedFd, bytes: u64) -> Result<WindowFd> {
        let what = |what: &str| format!("{what} of rank {peer}'s window");
        let size = rustix::fs::fstat(&fd).map_err(|e| Error::system(what("fstat"), e))?.st_size;
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|e| Error::system(what("the seals"), e))?;
        if size as u64 != bytes || !seals.contains(SEALS) {
            return Err(Error::new(
                Status::Mismatch,
                format!(
                    "rank {peer}'s window has {size} bytes and seals {seals:?}, expected {bytes} and {SEALS:?}"
                ),
            ));
        }
        Ok(WindowFd { fd })
    }

    /// To hand to the other ranks.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// What the kernel says can be taken without swapping.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// A mapped window.
pub(super) struct Mapping {
    ptr: *mut u8,
    bytes: u64,
    /// Peers may write there when it is gone: nothing else is to lie there.
    is_for_peers: bool,
}

// SAFETY: an address range; who touches it when is the protocol's business.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub(super) fn new(window: &WindowFd, peer: u32, bytes: u64) -> Result<Mapping> {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        let map = || {
            let (anywhere, shared) = (std::ptr::null_mut(), MapFlags::SHARED);
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            unsafe { rustix::mm::mmap(anywhere, bytes as usize, flags, shared, &window.fd, 0) }
        };
        let ptr = fault::call(Point::Map, map);
        let ptr =
            ptr.map_err(|e| Error::system(format!("mmap of {bytes} bytes of rank {peer}'s window"), e))?;
        Ok(Mapping { ptr: ptr as *mut u8, bytes, is_for_peers: false })
    }
    /// Of what was mapped elsewhere, which is this one's from now on.
    pub(super) fn of(ptr: *mut u8, bytes: u64) -> Mapping {
        Mapping { ptr, bytes, is_for_peers: false }
    }
    /// The memory goes on drop, the addresses do not: who still writes there finds nothing.
    pub(super) fn never_reused(self) -> Mapping {
        let this = std::mem::ManuallyDrop::new(self);
        Mapping { ptr: this.ptr, bytes: this.bytes, is_for_peers: true }
    }
    pub(super) fn start(&self) -> *mut u8 {
        self.ptr
    }
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.is_for_peers {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            // SAFETY: the range is this one's, and nobody looks at it any more.
            let _ = unsafe {
                rustix::mm::mmap_anonymous(self.ptr as *mut _, self.bytes as usize, ProtFlags::empty(), flags)
            };
            return;
        }
        // SAFETY: mapped, and this one's; unmapped once.
        let _ = unsafe { rustix::mm::munmap(self.ptr as *mut _, self.bytes as usize) };
    }
}

/// Every rank's window, mapped here.
pub struct Windows {
    mappings: Arc<Vec<Mapping>>,
}

impl Windows {
    /// Maps the windows of all ranks, rank ascending; the descriptors are not needed afterwards.
    pub fn map(windows: Vec<WindowFd>, bytes: u64) -> Result<Windows> {
        let mappings = windows
            .iter()
            .enumerate()
            .map(|(peer, window)| Mapping::new(window, peer as u32, bytes))
            .collect::<Result<Vec<_>>>()?;
        Ok(Windows { mappings: Arc::new(mappings) })
    }

    /// Maps another window of a rank at the address of its former one, whose memory goes with its last mapping: who
    /// still maps it writes nowhere else.
    pub fn replace(&self, peer: u32, window: &WindowFd) -> Result<()> {
        let Mapping { ptr, bytes, .. } = self.mappings[peer as usize];
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the range is ours, of that size, and stays mapped; no call of this comm is in flight.
        let mapped = unsafe {
            let flags_fixed = MapFlags::SHARED | MapFlags::FIXED;
            rustix::mm::mmap(ptr as *mut _, bytes as usize, flags, flags_fixed, &window.fd, 0)
        };
        mapped.map(|_| ()).map_err(|e| Error::system(format!("mmap of rank {peer}'s new window"), e))
    }

    pub fn bases(&self) -> Bases {
        let windows = self.mappings.iter().map(|m| (m.ptr, m.bytes)).collect();
        // SAFETY: mapped read-write, page-aligned, kept by the Arc.
        unsafe { Bases::new(windows, self.mappings.clone()) }
    }
}
