//! ALLGATHER_REDUCESCATTER over windows: every rank reads every token, partial sums are added over ranks.
//!
//! Dispatch publishes this rank's rows in its own window, then reads every rank's, in rank order, straight to where
//! they are wanted: exact rows without a counts hop, and nothing is staged on the receiving side. Combine is the
//! reduce-scatter: each source reads its tokens' rows from the ranks that own one of their experts, or from all of
//! them when dispatch had no ids.

use super::{Backend, route};
use crate::device::map::Uses;
use crate::device::{Device, Dispatch};
use crate::error::Result;

pub struct AllgatherReducescatter;

impl Backend for AllgatherReducescatter {
    fn uses(&self) -> Uses {
        Uses { published: true, rows: true, ..Uses::default() }
    }
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        route(device, d)?;
        device.publish_rows(d)?;
        device.signal_dispatch(d)
    }
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        device.wait_dispatch(d)?;
        device.gather_rows(d)?;
        device.settle_rows(d)
    }
}
