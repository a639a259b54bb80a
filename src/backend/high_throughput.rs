//! HIGH_THROUGHPUT: one copy over the link per (token, destination rank), rows ready for a grouped GEMM.
//!
//! Everybody's counts, told in one hop, make every rank's places: FLAT rows are stored straight where they stay.
//! EXPERT_CONTIGUOUS stores a token in the first of its rows at each rank, and the receiver copies it to the others.
//! Combine pulls a rank's partial sum, or each expert's result.

use super::{Backend, receive_at_places, send_to_places};
use crate::config::LayoutKind;
use crate::device::map::Uses;
use crate::device::{Device, Dispatch};
use crate::error::Result;

pub struct HighThroughput;

impl Backend for HighThroughput {
    fn uses(&self) -> Uses {
        Uses { counts: true, banks: true, rows: true, ..Uses::default() }
    }
    fn dispatch_send(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        send_to_places(device, d, |device| match d.grid.layout {
            LayoutKind::ExpertContiguous => device.push_first_rows(d),
            _ => device.push_rows(d),
        })
    }
    fn dispatch_recv(&self, device: &dyn Device, d: &Dispatch) -> Result<()> {
        receive_at_places(device, d)
    }
}
