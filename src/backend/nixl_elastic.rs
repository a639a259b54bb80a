//! NIXL_ELASTIC: LOW_LATENCY's rows and bits between ranks that address nothing of each other's.
//!
//! Each rank sends every other one piece of memory a half: its counts, and each of its tokens that has an expert there, once; then
//! the results of that rank's rows, once a (token, expert). The receiver lays rows out by everybody's counts, and sums.

use super::{Backend, route};
use crate::device::map::Uses;
use crate::device::{Combine, Device, Dispatch};
use crate::error::Result;

pub struct NixlElastic;

impl Backend for NixlElastic {
    fn uses(&self) -> Uses {
        Uses { counts: true, rows: true, posted: true, ..Uses::default() }
    }
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        route(device, d)?;
        device.tell_counts(d)?;
        device.push_banks(d)?;
        device.signal_dispatch(d)
    }
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        // Counts come with rows; and what this rank has sent is delivered before the step can be refused.
        device.wait_dispatch(d)?;
        device.place_rows(d)?;
        device.land_rows(d)?;
        device.settle_rows(d)
    }
    fn combine_send(&self, device: &dyn Device, c: &Combine) -> Result<()> {
        device.return_rows(c)?;
        device.signal_combine(c)
    }
}
