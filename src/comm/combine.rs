//! Combine as a call: what is asked is checked against the dispatch that it ends, both halves are run.

use super::history::What;
use super::routing::{Routing, Sent};
use super::tensor::{Element, Output, Tensor, View};
use super::{Comm, lock};
use crate::config::{Dtype, ROW_ALIGN};
use crate::device::{Call, Combine, Device, Float, Half, Region, Rows, Stream, Target, Weighting};
use crate::error::{Error, Result};

/// Combine flags, as the ABI numbers them.
const ACCUMULATE: u64 = 1;
const NO_WEIGHTS: u64 = 2;
const NCCL_SUM: u64 = 4;

/// What the experts computed.
#[derive(Clone, Copy, Debug)]
pub struct CombineSend {
    pub tokens: Tensor,
    pub topk_weights: Option<Tensor>,
    pub row_weights: Option<Tensor>,
}

/// A checked SEND.
struct Fresh {
    /// `None` if the experts' rows stand in the combine rows already.
    rows: Option<Rows>,
    hidden: u32,
    float: Float,
    weighting: Weighting,
    weights: Option<Rows>,
    row_weights: Option<Rows>,
}

/// Outputs of a combine.
#[derive(Clone, Copy, Debug, Default)]
pub struct CombineRecv {
    pub tokens: Option<Tensor>,
    pub topk_weights: Option<Tensor>,
    pub status: Output,
}

impl Comm {
    /// The slot's combine rows, shaped for the routing's dispatch. `element`: the experts' type, `None` the config's.
    pub fn combine_buffer(&self, routing: &Routing, element: Option<Element>) -> Result<View> {
        let (_call, device) = self.enter()?;
        self.check_routing(routing)?;
        device.check(&self.call(routing, Stream::none(), false, 0), Half::CombineSend)?;
        if !self.backend.uses().rows {
            return Err(Error::unsupported(format!(
                "rank {}: backend {} keeps no rows: results stay in the caller's tensor until they are sent",
                self.config.rank,
                self.plan.backend.name()
            )));
        }
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
        Ok(self.rows_view(address, element, &sent.grid, rows, Some(hidden as i64)))
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
        max_sms: u32,
        stream: Stream,
    ) -> Result<Option<View>> {
        let (_call, device) = self.enter()?;
        let call = self.call(routing, stream, false, max_sms);
        let what = What { combine: true, sends: send.is_some(), receives: recv.is_some() };
        self.recorded(&*device, &call, what, routing.tokens(), || {
            self.run_combine(&*device, call, routing, send, recv, flags)
        })
    }

    fn run_combine(
        &self,
        device: &dyn Device,
        call: Call,
        routing: &Routing,
        send: Option<&CombineSend>,
        recv: Option<&CombineRecv>,
        flags: u64,
    ) -> Result<Option<View>> {
        self.check_routing(routing)?;
        if flags & NO_WEIGHTS != 0 && !self.plan.layout.by_expert() {
            return Err(self.invalid(format!(
                "flags has A2A_COMBINE_NO_WEIGHTS, which layout {} knows nothing of (EXPERT_* layouts do)",
                self.plan.layout.name()
            )));
        }
        if flags & !(ACCUMULATE | NO_WEIGHTS | NCCL_SUM) != 0 {
            return Err(self.invalid(format!("flags is {flags:#x}, known bits are 0x7")));
        }
        let due = if send.is_some() { Half::CombineSend } else { Half::CombineRecv };
        self.check_due(device, &call, due, recv.map(|recv| &recv.status))?;
        let mut sent = lock(&routing.sent);
        let fresh = match send {
            Some(send) => Some(self.check_experts_rows(device, routing.slot, send, flags, &sent)?),
            None => None,
        };
        let (hidden, send_type, weighting, has_row_weights) = match &fresh {
            Some(f) => (f.hidden, Some(f.float), f.weighting, f.row_weights.is_some()),
            None => (sent.hidden, sent.send_type, sent.weighting, sent.has_row_weights),
        };
        // Values that go back beside the rows are not summed.
        let may_sum = flags & NCCL_SUM != 0 && !has_row_weights && self.is_carried();
        let wire_sums = if fresh.is_some() { may_sum } else { sent.wire_sums };
        let (mut out, mut out_weights) = (None, None);
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
            self.check_outside(device, "tokens", (tensor.rows.address(), tensor.rows.span()))?;
            out_weights = self.check_out_weights(device, recv, &sent, has_row_weights)?;
            let ranks = self.config.num_ranks as usize;
            let region = Some((routing.slot, Region::Status));
            status = self.check_small(device, "status", region, &recv.status, Element::I32, 4 + ranks)?;
            out = Some(tensor.rows);
        }
        // Lent to the call: nobody else looks at the list meanwhile.
        let told = std::mem::take(&mut sent.rank_tokens);
        let c = Combine {
            call,
            memory: &routing.memory,
            split: send.is_none() || recv.is_none(),
            grid: sent.grid,
            tokens: sent.tokens,
            everyone: sent.everyone,
            rank_tokens: (!told.is_empty()).then_some(&told[..]),
            send: fresh.as_ref().and_then(|f| f.rows),
            send_type: send_type.unwrap_or(Float::F32),
            hidden,
            weighting,
            weights: fresh.as_ref().and_then(|f| f.weights),
            row_weights: fresh.as_ref().and_then(|f| f.row_weights),
            has_row_weights,
            out,
            out_type,
            out_weights,
            accumulate: flags & ACCUMULATE != 0,
            wire_sums,
            status,
        };
        let mut outcome = Ok(());
        if fresh.is_some() {
            outcome = self.step(device, &call, Half::CombineSend, status, |device| {
                sent.hidden = hidden;
                sent.send_type = send_type;
                sent.weighting = weighting;
                sent.has_row_weights = has_row_weights;
                sent.wire_sums = wire_sums;
                self.backend.combine_send(device, &c)
            });
        }
        if recv.is_some() && outcome.is_ok() {
            outcome = self.step(device, &call, Half::CombineRecv, status, |device| {
                self.backend.combine_recv(device, &c)
            });
        }
        sent.rank_tokens = told;
        outcome?;
        let address = device.view(routing.slot, Region::Status);
        let view = View::new(address, Element::I32, &[4 + self.config.num_ranks as i64]);
        Ok(matches!(status, Target::View).then_some(view))
    }

    /// Where the values that come back for each choice go.
    fn check_out_weights(
        &self,
        device: &dyn Device,
        recv: &CombineRecv,
        sent: &Sent,
        has_row_weights: bool,
    ) -> Result<Option<Rows>> {
        let Some(tensor) = &recv.topk_weights else { return Ok(None) };
        if !has_row_weights {
            return Err(
                self.invalid("the output topk_weights is wanted, but combine was given no row_weights")
            );
        }
        self.check_choices("the output topk_weights", tensor, sent)?;
        self.check_outside(device, "topk_weights", (tensor.rows.address(), tensor.rows.span()))?;
        Ok(Some(tensor.rows))
    }

    /// [T, K] float32.
    fn check_choices(&self, name: &str, tensor: &Tensor, sent: &Sent) -> Result<()> {
        let (tokens, topk) = (sent.tokens as usize, sent.grid.topk as usize);
        if tensor.element != Element::F32
            || tensor.ndim != 2
            || tensor.rows.rows() < tokens
            || tensor.columns() != topk
        {
            return Err(self.invalid(format!(
                "{name} is {:?} of {}, it must be [{tokens}, {topk}] float32",
                &tensor.dims[..tensor.ndim],
                tensor.element
            )));
        }
        Ok(())
    }

    /// Whose weights the sum uses.
    fn check_weights(&self, send: &CombineSend, flags: u64, sent: &Sent) -> Result<Weighting> {
        let by_expert = self.plan.layout.by_expert();
        let Some(weights) = &send.topk_weights else {
            return Ok(match by_expert && flags & NO_WEIGHTS == 0 {
                true => Weighting::Dispatched,
                false => Weighting::None,
            });
        };
        if !by_expert {
            return Err(self.invalid(format!(
                "topk_weights is set, layout {} sums without weights: the experts apply them",
                self.plan.layout.name()
            )));
        }
        if flags & NO_WEIGHTS != 0 {
            return Err(self.invalid("topk_weights is set and flags has A2A_COMBINE_NO_WEIGHTS"));
        }
        self.check_choices("topk_weights", weights, sent)?;
        Ok(Weighting::Given)
    }

    /// The values that go back beside the experts' rows.
    fn check_row_weights(&self, tensor: &Tensor, sent: &Sent) -> Result<Rows> {
        if sent.everyone {
            return Err(self.invalid("row_weights is set, but dispatch was given no topk_ids"));
        }
        let by_expert = self.plan.layout.by_expert();
        let bytes = if by_expert { 4 } else { sent.grid.topk as usize * 4 };
        let rows = self.fit_rows(tensor, &sent.grid, bytes);
        match rows.filter(|rows| tensor.element == Element::F32 && rows.rows() >= sent.capacity as usize) {
            Some(rows) => Ok(rows),
            None => Err(self.invalid(format!(
                "row_weights is {:?} of {}, it must be [{}{}] float32",
                &tensor.dims[..tensor.ndim],
                tensor.element,
                sent.capacity,
                if by_expert { String::new() } else { format!(", {}", sent.grid.topk) }
            ))),
        }
    }

    fn check_experts_rows(
        &self,
        device: &dyn Device,
        slot: u32,
        send: &CombineSend,
        flags: u64,
        sent: &Sent,
    ) -> Result<Fresh> {
        let tensor = &send.tokens;
        let weighting = self.check_weights(send, flags, sent)?;
        let float = self.check_float("tokens", tensor.element)?;
        let hidden = tensor.columns();
        self.check_combine_row("tokens", hidden, float)?;
        let capacity = sent.capacity as usize;
        let fits = self.fit_rows(tensor, &sent.grid, tensor.rows.row_bytes());
        if tensor.ndim < 2 || fits.is_none_or(|rows| rows.rows() < capacity) {
            return Err(self.invalid(format!(
                "tokens is {:?}, this step's rows are [{capacity}, {hidden}]{}",
                &tensor.dims[..tensor.ndim],
                self.row_blocks(&sent.grid)
                    .map_or(String::new(), |(n, block)| format!(" or [{n}, {block}, {hidden}]"))
            )));
        }
        let mut fresh = Fresh {
            rows: Some(tensor.rows),
            hidden: hidden as u32,
            float,
            weighting,
            weights: send.topk_weights.map(|weights| weights.rows),
            row_weights: match &send.row_weights {
                Some(tensor) => Some(self.check_row_weights(tensor, sent)?),
                None => None,
            },
        };
        if !self.backend.uses().rows {
            return Ok(fresh);
        }
        let buffer = device.view(slot, Region::Combine);
        let bytes = (self.plan.map.sizes.combine_bytes * self.plan.map.sizes.rows()) as usize;
        let (address, span) = (tensor.rows.address(), tensor.rows.span());
        if address == buffer && tensor.rows.is_compact() {
            fresh.rows = None;
        } else if address < buffer + bytes && address + span > buffer {
            return Err(self.invalid(
                "tokens overlaps the slot's combine buffer without being what a2a_combine_buffer returned",
            ));
        }
        Ok(fresh)
    }
}
