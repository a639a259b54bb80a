//! NVLINK_ONE_SIDED: push dispatch, pull combine.
//!
//! Dispatch stores a token once into the window of every rank that owns one of its experts, at
//! `source * bound + position`: no rank needs another's counts first. Combine leaves results where the experts wrote
//! them; each source reads and sums its own tokens' rows.

use super::{Backend, route};
use crate::device::map::Uses;
use crate::device::{Device, Dispatch};
use crate::error::Result;

pub struct NvlinkOneSided;

impl Backend for NvlinkOneSided {
    fn uses(&self) -> Uses {
        Uses { rows: true, ..Uses::default() }
    }
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        route(device, d)?;
        device.push_rows(d)?;
        device.signal_dispatch(d)
    }
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        device.wait_dispatch(d)?;
        device.land_rows(d)?;
        device.settle_rows(d)
    }
}
