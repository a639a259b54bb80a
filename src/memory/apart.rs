//! Memory of a rank whose window nobody else addresses: the window, an inbox and an outbox for each peer, and room for what
//! this rank would write into the peers' windows, of which couriers carry what they are to have.

use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};

use super::host::{Mapping, WindowFd};
use crate::device::map::Map;
use crate::device::{Bases, Boxes};
use crate::error::{Error, Result};
use crate::fault::{self, Point};

pub struct Apart {
    rank: u32,
    /// Window, inboxes by rank, outboxes by rank without this one's.
    own: Arc<(Mapping, Vec<Mapping>)>,
    /// Where inboxes begin, and the bytes of each.
    inboxes: (u64, u64),
    ranks: u32,
}

/// What `Apart::new` takes, words that it would write elsewhere left out.
pub fn bytes(map: &Map) -> u64 {
    let (start, each) = map.inboxes();
    start.saturating_add(each.saturating_mul(2 * map.sizes.ranks() as u64 - 1))
}

impl Apart {
    pub fn new(rank: u32, map: &Map) -> Result<Apart> {
        let bytes = bytes(map);
        let own = Mapping::new(&WindowFd::create(rank, bytes)?, rank, bytes)?;
        // Of these a few pages are written to, and none is taken before.
        let shadow = |_| {
            let (anywhere, bytes) = (std::ptr::null_mut(), map.window_bytes());
            let (access, flags) =
                (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
            let take = || {
                // SAFETY: a fresh mapping at an address of the kernel's choice.
                unsafe { rustix::mm::mmap_anonymous(anywhere, bytes as usize, access, flags) }
            };
            let ptr = fault::call(Point::Map, take).map_err(|e| {
                Error::system(format!("rank {rank}: mmap of {bytes} bytes for words on their way"), e)
            })?;
            Ok(Mapping::of(ptr as *mut u8, bytes))
        };
        let ranks = map.sizes.ranks();
        let shadows = (0..ranks).map(shadow).collect::<Result<_>>()?;
        Ok(Apart { rank, own: Arc::new((own, shadows)), inboxes: map.inboxes(), ranks })
    }

    fn at(&self, offset: u64) -> *mut u8 {
        self.own.0.start().wrapping_add(offset as usize)
    }
    /// By rank: the address of the inbox for what it sends.
    pub fn inboxes(&self) -> Vec<u64> {
        let (start, each) = self.inboxes;
        (0..self.ranks as u64).map(|source| self.at(start + source * each) as u64).collect()
    }
    /// By rank: the address of the outbox for what is sent to it. A rank's own is its inbox.
    pub fn outboxes(&self) -> Vec<u64> {
        let (start, each) = self.inboxes;
        let (ranks, own) = (self.ranks as u64, self.rank as u64);
        let number = |peer: u64| if peer == own { own } else { ranks + peer - u64::from(peer > own) };
        (0..ranks).map(|peer| self.at(start + number(peer) * each) as u64).collect()
    }
    /// Of each box.
    pub fn box_bytes(&self) -> u64 {
        self.inboxes.1
    }
    /// What keeps all of it mapped.
    pub fn keep(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.own.clone()
    }

    pub fn bases(&self) -> Bases {
        let (own, shadows) = &*self.own;
        let window = |peer: usize| if peer as u32 == self.rank { own } else { &shadows[peer] };
        let windows = (0..shadows.len()).map(|peer| (window(peer).start(), shadows[peer].bytes())).collect();
        let addresses = |boxes: Vec<u64>| boxes.into_iter().map(|at| at as *mut u8).collect();
        let (inboxes, outboxes) = (addresses(self.inboxes()), addresses(self.outboxes()));
        // SAFETY: mapped read-write, page-aligned, kept by the Arc; boxes lie behind each other in the mapping.
        unsafe {
            Bases::new(windows, self.keep()).with_boxes(Boxes::new(
                self.rank,
                self.inboxes,
                inboxes,
                outboxes,
            ))
        }
    }
}
