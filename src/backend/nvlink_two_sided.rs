//! NVLINK_TWO_SIDED: bounded FIFOs with credits, in memory that does not grow with tokens.
//!
//! SEND tells counts; rows move in RECV, from the sender's tensor through a few entries in the receiver's window to
//! the receiver's tensor. Combine sends one partial sum back for each row, the same way, and adds them as they come.

use super::{Backend, route};
use crate::device::map::Uses;
use crate::device::{Combine, Device, Dispatch};
use crate::error::Result;

pub struct NvlinkTwoSided;

impl Backend for NvlinkTwoSided {
    fn uses(&self) -> Uses {
        Uses { counts: true, fifos: true, ..Uses::default() }
    }
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        route(device, d)?;
        if !d.reuse {
            device.tell_counts(d)?;
        }
        device.offer_rows(d)?;
        device.signal_dispatch(d)
    }
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        if !d.reuse {
            device.wait_counts(d)?;
            device.place_rows(d)?;
        }
        device.wait_dispatch(d)?;
        device.stream_rows(d)?;
        device.settle_rows(d)
    }
    fn combine_send(&self, device: &dyn Device, c: &Combine) -> Result<()> {
        device.offer_results(c)?;
        device.signal_combine(c)
    }
    fn combine_recv(&self, device: &dyn Device, c: &Combine) -> Result<()> {
        device.wait_combine(c)?;
        device.stream_results(c)
    }
}
