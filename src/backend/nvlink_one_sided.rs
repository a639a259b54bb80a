//! NVLINK_ONE_SIDED: push dispatch, pull combine.
//!
//! Dispatch stores a token once into the window of every rank that owns one of its experts, at
//! `source * bound + position`: no rank needs another's counts first. Combine leaves results where the experts wrote
//! them; each source reads and sums its own tokens' rows.

use super::Backend;
use crate::device::{Combine, Device, Dispatch};
use crate::error::Result;

pub struct NvlinkOneSided;

impl Backend for NvlinkOneSided {
    fn gathers(&self) -> bool {
        false
    }
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        device.route(d)?;
        device.push_rows(d)?;
        device.signal_dispatch(d)
    }
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        device.wait_dispatch(d)?;
        device.settle_rows(d)
    }
    fn combine_send(&self, device: &dyn Device, c: &Combine) -> Result<()> {
        device.stage_rows(c)?;
        device.signal_combine(c)
    }
    fn combine_recv(&self, device: &dyn Device, c: &Combine) -> Result<()> {
        device.wait_combine(c)?;
        device.reduce_rows(c)
    }
}
