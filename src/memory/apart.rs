//! Memory of a rank whose window nobody else addresses: the window, an inbox and an outbox for each peer, and room for what
//! this rank would write into the peers' windows, of which couriers carry what they are to have.

use std::any::Any;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};

use super::host::{Mapping, WindowFd};
use crate::device::map::Map;
use crate::device::{Bases, Boxes};
use crate::error::{Error, Result};
use crate::fault::{self, Point};

pub struct Apart {
    rank: u32,
    /// Window, inboxes by rank, outboxes by rank without this one's; then the peers' windows as this rank has them.
    own: Arc<(Mapping, Vec<Mapping>)>,
    boxes: Arc<Boxes>,
    box_bytes: u64,
}

/// What `Apart::new` takes, words that it would write elsewhere left out.
pub fn bytes(map: &Map) -> u64 {
    let (start, each) = map.inboxes();
    start.saturating_add(each.saturating_mul(2 * map.sizes.ranks() as u64 - 1))
}

impl Apart {
    pub fn new(rank: u32, map: &Map) -> Result<Apart> {
        let bytes = bytes(map);
        let own = Mapping::new(&WindowFd::create(rank, bytes)?, rank, bytes)?.never_reused();
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
        let ranks = map.sizes.ranks() as u64;
        let shadows = (0..ranks).map(shadow).collect::<Result<_>>()?;
        let ((start, each), me) = (map.inboxes(), rank as u64);
        let at = |number: u64| own.start().wrapping_add((start + number * each) as usize);
        // A rank's own outbox is its inbox.
        let outbox = |peer: u64| at(if peer == me { me } else { ranks + peer - u64::from(peer > me) });
        let (inboxes, outboxes) = ((0..ranks).map(at).collect(), (0..ranks).map(outbox).collect());
        // SAFETY: parts of the mapping, which `own` keeps, page-aligned.
        let boxes = Arc::new(unsafe { Boxes::new(rank, map.inboxes(), inboxes, outboxes) });
        Ok(Apart { rank, own: Arc::new((own, shadows)), boxes, box_bytes: each })
    }

    /// Of each box.
    pub fn box_bytes(&self) -> u64 {
        self.box_bytes
    }

    /// The window and the first boxes: address and bytes, and what keeps them.
    pub fn window(&self) -> (u64, u64, Arc<dyn Any + Send + Sync>) {
        let own = &self.own;
        (own.0.start() as u64, own.0.bytes(), own.clone())
    }

    /// What a peer's boxes lie in, in and out; `anew`: in memory of their own from now on, because who had them may still write
    /// there. The peer takes no part. What keeps them is to be kept as long as anybody may write there.
    pub fn boxes(&self, peer: u32, anew: bool) -> Result<(u64, u64, Arc<dyn Any + Send + Sync>)> {
        let mut keep: Arc<dyn Any + Send + Sync> = self.own.clone();
        if anew {
            let bytes = 2 * self.box_bytes;
            let window = WindowFd::create(self.rank, bytes)?;
            let fresh = Arc::new(Mapping::new(&window, self.rank, bytes)?.never_reused());
            let (inbox, outbox) = (fresh.start(), fresh.start().wrapping_add(self.box_bytes as usize));
            keep = fresh;
            // SAFETY: page-aligned parts of a mapping, which the courier keeps with `keep`.
            unsafe { self.boxes.renew(peer, inbox, outbox) };
        }
        let (inbox, outbox) = self.boxes.of(peer);
        Ok((inbox, outbox, keep))
    }

    pub fn bases(&self) -> Bases {
        let (own, shadows) = &*self.own;
        let window = |peer: usize| if peer as u32 == self.rank { own } else { &shadows[peer] };
        let windows = (0..shadows.len()).map(|peer| (window(peer).start(), shadows[peer].bytes())).collect();
        // SAFETY: mapped read-write, page-aligned, kept by the Arc; boxes by it or by whoever renews them.
        unsafe { Bases::new(windows, self.own.clone()).with_boxes(self.boxes.clone()) }
    }
}
