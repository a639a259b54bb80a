//! LOW_LATENCY: one row per (token, expert), stored straight into its expert's block.
//!
//! A counts hop makes the places. A split dispatch, which must not wait for it, sends a token once to each of its ranks
//! and lets the receiver lay its rows out. Combine pulls each expert's result and weighs it.

use super::{Backend, receive_at_places, send_to_places};
use crate::device::map::Uses;
use crate::device::{Device, Dispatch};
use crate::error::Result;

pub struct LowLatency;

impl Backend for LowLatency {
    fn uses(&self) -> Uses {
        Uses { counts: true, banks: true, rows: true, ..Uses::default() }
    }
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        send_to_places(device, d, |device| device.push_rows(d))
    }
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        receive_at_places(device, d)
    }
}
