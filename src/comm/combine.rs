//! Combine as a call: what is asked is checked against the dispatch that it ends, both halves are run.

use super::routing::{Routing, Sent};
use super::tensor::{Element, Output, Tensor, View};
use super::{Comm, lock};
use crate::config::{Dtype, LayoutKind, ROW_ALIGN};
use crate::device::{Combine, Device, Float, Half, Region, Rows, Target};
use crate::error::Result;

/// Combine flags, as the ABI numbers them.
const ACCUMULATE: u64 = 1;
const NO_WEIGHTS: u64 = 2;

/// What the experts computed.
#[derive(Clone, Copy, Debug)]
pub struct CombineSend {
    pub tokens: Tensor,
    pub has_weights: bool,
}

/// Outputs of a combine.
#[derive(Clone, Copy, Debug, Default)]
pub struct CombineRecv {
    pub tokens: Option<Tensor>,
    pub status: Output,
}

impl Comm {
    /// The slot's combine rows, shaped for the routing's dispatch. `element`: the experts' type, `None` the config's.
    pub fn combine_buffer(&self, routing: &Routing, element: Option<Element>) -> Result<View> {
        let (_call, device) = self.enter()?;
        self.check_routing(routing)?;
        device.check(&self.call(routing), Half::CombineSend)?;
        let sent = lock(&routing.sent);
        let element = match element {
            None => match self.config.combine_dtype {
                Dtype::F32 => Element::F32,
                Dtype::F16 => Element::F16,
                _ => Element::BF16,
            },
            Some(element) => element,
        };
        let float = self.check_float("tensor", element)?;
        let hidden = match self.config.combine_hidden {
            0 => sent.shape.plane_bytes[0] as usize / sent.types[0].bytes().max(1),
            hidden => hidden as usize,
        };
        self.check_combine_row("tensor", hidden, float)?;
        let address = device.view(routing.slot, Region::Combine);
        let rows = sent.capacity as i64;
        Ok(self.rows_view(address, element, sent.shape.bound, rows, Some(hidden as i64)))
    }

    fn check_float(&self, name: &str, element: Element) -> Result<Float> {
        element.float().ok_or_else(|| {
            self.invalid(format!("{name} is {element}, combine sums bfloat16, float16 and float32"))
        })
    }

    fn check_combine_row(&self, name: &str, hidden: usize, float: Float) -> Result<()> {
        let (bytes, most) = (hidden * float.bytes(), self.config.max_combine_bytes() as usize);
        if bytes == 0 || bytes > most || !bytes.is_multiple_of(ROW_ALIGN as usize) {
            return Err(self.invalid(format!(
                "{name} has rows of {hidden} {} ({bytes} bytes), combine rows are multiples of {} up to {most} bytes \
                 (combine_hidden or max_hidden * combine_dtype)",
                Element::of(float),
                ROW_ALIGN
            )));
        }
        Ok(())
    }

    /// `send` for SEND and BOTH, `recv` for RECV and BOTH.
    pub fn combine(
        &self,
        routing: &Routing,
        send: Option<&CombineSend>,
        recv: Option<&CombineRecv>,
        flags: u64,
    ) -> Result<Option<View>> {
        let (_call, device) = self.enter()?;
        self.check_routing(routing)?;
        if flags & NO_WEIGHTS != 0 {
            return Err(self.invalid(format!(
                "flags has A2A_COMBINE_NO_WEIGHTS, which layout {} knows nothing of (EXPERT_* layouts do)",
                self.plan.layout.name()
            )));
        }
        if flags & !ACCUMULATE != 0 {
            return Err(self.invalid(format!("flags is {flags:#x}, known bits are 0x3")));
        }
        let call = self.call(routing);
        let due = if send.is_some() { Half::CombineSend } else { Half::CombineRecv };
        self.check_due(&*device, &call, due, recv.map(|recv| &recv.status))?;
        let mut sent = lock(&routing.sent);
        let fresh = match send {
            Some(send) => Some(self.check_experts_rows(&*device, routing.slot, send, &sent)?),
            None => None,
        };
        let (hidden, send_type) = match &fresh {
            Some((_, hidden, float)) => (*hidden, Some(*float)),
            None => (sent.hidden, sent.send_type),
        };
        let mut out = None;
        let mut out_type = Float::F32;
        let mut status = Target::Nothing;
        if let Some(recv) = recv {
            let Some(tensor) = &recv.tokens else {
                return Err(self.invalid("the output tokens is NULL: combine has nowhere to put its sums"));
            };
            out_type = self.check_float("the output tokens", tensor.element)?;
            let tokens = sent.tokens as usize;
            if tensor.ndim != 2
                || tensor.rows.rows() < tokens
                || send_type.is_some() && tensor.columns() != hidden as usize
            {
                return Err(self.invalid(format!(
                    "the output tokens is {:?}, this step needs [{tokens}, {hidden}]",
                    &tensor.dims[..tensor.ndim]
                )));
            }
            self.check_outside(&*device, "tokens", tensor)?;
            let ranks = self.config.num_ranks as usize;
            let region = Some((routing.slot, Region::Status));
            status = self.check_small(&*device, "status", region, &recv.status, Element::I32, 4 + ranks)?;
            out = Some(tensor.rows);
        }
        let c = Combine {
            call,
            memory: &routing.memory,
            bound: sent.shape.bound,
            tokens: sent.tokens,
            everyone: sent.everyone,
            send: fresh.and_then(|(rows, _, _)| rows),
            send_type: send_type.unwrap_or(Float::F32),
            hidden,
            out,
            out_type,
            accumulate: flags & ACCUMULATE != 0,
            status,
        };
        if fresh.is_some() {
            self.step(&*device, &call, Half::CombineSend, status, |device| {
                sent.hidden = hidden;
                sent.send_type = send_type;
                self.backend.combine_send(device, &c)
            })?;
        }
        if recv.is_some() {
            self.step(&*device, &call, Half::CombineRecv, status, |device| {
                self.backend.combine_recv(device, &c)
            })?;
        }
        let view = View {
            address: device.view(routing.slot, Region::Status),
            element: Element::I32,
            ndim: 1,
            dims: [4 + self.config.num_ranks as i64, 0, 0],
        };
        Ok(matches!(status, Target::View).then_some(view))
    }

    /// The experts' rows: `None` if they stand in the combine rows already; hidden size; type.
    fn check_experts_rows(
        &self,
        device: &dyn Device,
        slot: u32,
        send: &CombineSend,
        sent: &Sent,
    ) -> Result<(Option<Rows>, u32, Float)> {
        let tensor = &send.tokens;
        if send.has_weights {
            return Err(self.invalid(format!(
                "topk_weights is set, layout {} sums without weights: the experts apply them",
                self.plan.layout.name()
            )));
        }
        let float = self.check_float("tokens", tensor.element)?;
        let hidden = tensor.columns();
        self.check_combine_row("tokens", hidden, float)?;
        let (ranks, bound, capacity) =
            (self.config.num_ranks as i64, sent.shape.bound as i64, sent.capacity as usize);
        let per_rank = self.plan.layout == LayoutKind::RankMajor;
        let fits = match tensor.ndim {
            3 => per_rank && tensor.dims[..2] == [ranks, bound],
            2 => tensor.rows.rows() >= capacity,
            _ => false,
        };
        if !fits {
            return Err(self.invalid(format!(
                "tokens is {:?}, this step's rows are [{capacity}, {hidden}]{}",
                &tensor.dims[..tensor.ndim],
                if per_rank { format!(" or [{ranks}, {bound}, {hidden}]") } else { String::new() }
            )));
        }
        let buffer = device.view(slot, Region::Combine);
        let bytes = self.plan.map.sizes.combine_bytes as usize
            * self.config.num_ranks as usize
            * self.config.max_tokens as usize;
        let (address, span) = (tensor.rows.address(), tensor.rows.span());
        if address == buffer && tensor.rows.is_compact() {
            return Ok((None, hidden as u32, float));
        }
        if address < buffer + bytes && address + span > buffer {
            return Err(self.invalid(
                "tokens overlaps the slot's combine buffer without being what a2a_combine_buffer returned",
            ));
        }
        Ok((Some(tensor.rows), hidden as u32, float))
    }
}
