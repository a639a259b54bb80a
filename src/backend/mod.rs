//! The strategies: each is an order of ops over windows, one file apiece. No device code, no `if cuda`: if a strategy
//! needs one, an op is missing.

#![forbid(unsafe_code)]

mod allgather_reducescatter;
mod nvlink_one_sided;

use crate::config::BackendKind;
use crate::device::{Combine, Device, Dispatch};
use crate::error::Result;

/// What a strategy does in each half of a step. `comm` opens and closes the halves.
pub trait Backend: Send + Sync {
    /// True if dispatch gathers published rows; the windows have room for them then.
    fn gathers(&self) -> bool;
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()>;
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()>;
    fn combine_send(&self, device: &dyn Device, c: &Combine) -> Result<()>;
    fn combine_recv(&self, device: &dyn Device, c: &Combine) -> Result<()>;
}

/// The strategies this build has.
pub fn of(kind: BackendKind) -> Option<&'static dyn Backend> {
    match kind {
        BackendKind::AllgatherReducescatter => Some(&allgather_reducescatter::AllgatherReducescatter),
        BackendKind::NvlinkOneSided => Some(&nvlink_one_sided::NvlinkOneSided),
        _ => None,
    }
}
