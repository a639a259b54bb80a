//! The strategies: each is an order of ops over windows, one file apiece. No device code, no `if cuda`: if a strategy
//! needs one, an op is missing.

#![forbid(unsafe_code)]

mod allgather_reducescatter;
mod high_throughput;
mod low_latency;
mod nixl_elastic;
mod nvlink_one_sided;
mod nvlink_two_sided;

use crate::config::BackendKind;
use crate::device::map::Uses;
use crate::device::{Combine, Device, Dispatch};
use crate::error::Result;
use crate::fault::{self, Point};

/// What a strategy does in each half of a step. `comm` opens and closes the halves. A dispatch that is not split may
/// wait for its peers in its first half.
pub trait Backend: Send + Sync {
    /// The regions it needs in a window.
    fn uses(&self) -> Uses;
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()>;
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()>;
    fn combine_send(&self, device: &dyn Device, c: &Combine) -> Result<()> {
        device.stage_rows(c)?;
        device.signal_combine(c)
    }
    fn combine_recv(&self, device: &dyn Device, c: &Combine) -> Result<()> {
        device.wait_combine(c)?;
        device.reduce_rows(c)
    }
}

/// The strategies this build has.
pub fn of(kind: BackendKind) -> Option<&'static dyn Backend> {
    match kind {
        BackendKind::AllgatherReducescatter => Some(&allgather_reducescatter::AllgatherReducescatter),
        BackendKind::HighThroughput => Some(&high_throughput::HighThroughput),
        BackendKind::LowLatency => Some(&low_latency::LowLatency),
        BackendKind::NvlinkOneSided => Some(&nvlink_one_sided::NvlinkOneSided),
        BackendKind::NvlinkTwoSided => Some(&nvlink_two_sided::NvlinkTwoSided),
        BackendKind::NixlElastic => Some(&nixl_elastic::NixlElastic),
        BackendKind::Auto => None,
    }
}

/// Routes the tokens, or takes the routing as it is.
fn route(device: &dyn Device, d: &Dispatch) -> Result<()> {
    fault::at(Point::DispatchBegins);
    if d.reuse { device.renew(d) } else { device.route(d) }
}

/// The first half of a dispatch whose rows have places that follow from everybody's counts: a whole one waits for the
/// counts and stores every row where it stays; a split one, which must not wait, stores rows in its bank. A replayed
/// routing knows its places.
fn send_to_places(
    device: &dyn Device,
    d: &Dispatch,
    push: impl FnOnce(&dyn Device) -> Result<()>,
) -> Result<()> {
    route(device, d)?;
    if !d.reuse {
        device.tell_counts(d)?;
        if d.split {
            device.push_banks(d)?;
            return device.signal_dispatch(d);
        }
        device.wait_counts(d)?;
        device.place_rows(d)?;
    }
    push(device)?;
    device.signal_dispatch(d)
}

/// The second half: what went into banks, and what the caller wants elsewhere, is moved.
fn receive_at_places(device: &dyn Device, d: &Dispatch) -> Result<()> {
    if d.split && !d.reuse {
        device.wait_counts(d)?;
        device.place_rows(d)?;
    }
    device.wait_dispatch(d)?;
    device.land_rows(d)?;
    device.settle_rows(d)
}
