//! Dispatch as a call: what is asked is checked against what the comm was made for, both halves are run, views are
//! described.

use super::history::What;
use super::routing::{Routing, Sent};
use super::tensor::{ColumnTensor, Element, Output, Tensor, View};
use super::{Comm, lock};
use crate::config::{LayoutKind, MAX_EXTRAS, QuantKind, ROW_ALIGN, ScaleLayout, TransportKind};
use crate::device::grid::Grid;
use crate::device::map::{IDS, PLANES, Plane, SCALES, SOURCE, TOKENS, WEIGHTS, received_bytes};
use crate::device::{
    Call, Device, Dispatch, Float, Half, Membership, Outbound, Region, Rows, Stream, Target, column_shape,
};
use crate::error::{Error, Result, Status};

/// Dispatch flags, as the ABI numbers them.
const HOST_COUNTS: u64 = 1;
const ZERO_PADDING: u64 = 2;
const UNIFORM: u64 = 4;
const REUSE: u64 = 8;

/// What a rank dispatches.
#[derive(Clone, Copy, Debug)]
pub struct DispatchSend<'a> {
    pub tokens: Tensor,
    pub topk_ids: Option<Tensor>,
    pub topk_weights: Option<Tensor>,
    pub scales: Option<Tensor>,
    pub extras: [Option<Tensor>; MAX_EXTRAS],
    pub rank_tokens: Option<&'a [i32]>,
    pub max_tokens: i32,
}

/// Outputs of a dispatch.
#[derive(Clone, Copy, Debug, Default)]
pub struct DispatchRecv {
    pub planes: [Output; PLANES],
    pub expert_counts: Output,
    pub rank_counts: Output,
    pub expert_offsets: Output,
    pub expert_stats: Output,
    pub status: Output,
}

/// Views of a dispatch, in the places of the outputs they were asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct DispatchViews {
    pub planes: [Option<View>; PLANES],
    pub expert_counts: Option<View>,
    pub expert_offsets: Option<View>,
    pub rank_counts: Option<View>,
    pub status: Option<View>,
    /// -1 without HOST_COUNTS.
    pub num_rows: i64,
}

/// Checked outputs of a dispatch.
#[derive(Default)]
struct Wanted {
    planes: [Target; PLANES],
    ids_are_64: bool,
    expert_counts: Target,
    expert_offsets: Target,
    rank_counts: Target,
    status: Target,
    expert_stats: Option<Rows>,
}

/// A checked SEND: what the routing remembers, and what is sent.
struct Fresh {
    sent: Sent,
    send: Outbound,
    ids_are_64: bool,
}

fn plane_name(plane: usize) -> &'static str {
    const NAMES: [&str; PLANES] = [
        "tokens",
        "topk_ids",
        "topk_weights",
        "row_source",
        "scales",
        "extras[0]",
        "extras[1]",
        "extras[2]",
        "extras[3]",
        "extras[4]",
        "extras[5]",
        "extras[6]",
        "extras[7]",
    ];
    NAMES[plane]
}

impl DispatchSend<'_> {
    /// The tensors given, with their plane and name.
    fn named(&self) -> impl Iterator<Item = (usize, &'static str, &Tensor)> {
        let fixed = [
            (Plane::Tokens as usize, Some(&self.tokens)),
            (Plane::Ids as usize, self.topk_ids.as_ref()),
            (Plane::Weights as usize, self.topk_weights.as_ref()),
            (Plane::Scales as usize, self.scales.as_ref()),
        ];
        let extras = self.extras.iter().enumerate().map(|(i, t)| (Plane::Extra0 as usize + i, t.as_ref()));
        fixed.into_iter().chain(extras).filter_map(|(plane, t)| t.map(|t| (plane, plane_name(plane), t)))
    }
    fn planes(&self) -> [Option<Rows>; PLANES] {
        let mut planes = [None; PLANES];
        for (plane, _, tensor) in self.named() {
            planes[plane] = Some(tensor.rows);
        }
        planes
    }
}

impl Comm {
    /// `send` for SEND and BOTH, `recv` for RECV and BOTH.
    pub fn dispatch(
        &self,
        routing: &Routing,
        send: Option<&DispatchSend>,
        recv: Option<&DispatchRecv>,
        flags: u64,
        max_sms: u32,
        stream: Stream,
    ) -> Result<DispatchViews> {
        let (_call, device) = self.enter()?;
        let call = self.call(routing, stream, recv.is_some() && flags & HOST_COUNTS != 0, max_sms);
        let what = What { combine: false, sends: send.is_some(), receives: recv.is_some() };
        let tokens = send.map_or_else(|| routing.tokens(), |send| send.tokens.rows.rows() as u32);
        self.recorded(&*device, &call, what, tokens, || {
            self.run_dispatch(&*device, call, routing, send, recv, flags)
        })
    }

    fn run_dispatch(
        &self,
        device: &dyn Device,
        call: Call,
        routing: &Routing,
        send: Option<&DispatchSend>,
        recv: Option<&DispatchRecv>,
        flags: u64,
    ) -> Result<DispatchViews> {
        self.check_routing(routing)?;
        if flags & !(HOST_COUNTS | ZERO_PADDING | UNIFORM | REUSE) != 0 {
            return Err(self.invalid(format!("flags is {flags:#x}, known bits are 0xf")));
        }
        let due = if send.is_some() { Half::DispatchSend } else { Half::DispatchRecv };
        self.check_due(device, &call, due, recv.map(|recv| &recv.status))?;
        let mut sent = lock(&routing.sent);

        // Everything is checked before anything happens.
        let fresh = match send {
            Some(send) => Some(self.check_send(device, send, flags, &sent)?),
            None => None,
        };
        let next = fresh.as_ref().map_or(&*sent, |fresh| &fresh.sent);
        if fresh.is_none() && flags & !sent.flags & REUSE != 0 {
            return Err(
                self.invalid("flags has A2A_DISPATCH_REUSE, the SEND that this RECV completes had not")
            );
        }
        let flags = if fresh.is_some() { flags } else { sent.flags | flags };
        let wanted = match recv {
            Some(recv) => self.check_recv(device, routing.slot, recv, next)?,
            None => Wanted::default(),
        };

        let (grid, capacity) = (next.grid, next.capacity);
        // The list keeps its allocation from dispatch to dispatch.
        let mut told = std::mem::take(&mut sent.rank_tokens);
        match send.map(|send| send.rank_tokens) {
            Some(Some(list)) => {
                told.clear();
                told.extend_from_slice(list);
            }
            // What is replayed over NCCL has the tokens that it had.
            Some(None) if !(flags & REUSE != 0 && self.is_carried()) => told.clear(),
            _ => {}
        }
        let d = Dispatch {
            call,
            memory: &routing.memory,
            grid,
            overflow: self.config.overflow,
            split: send.is_none() || recv.is_none(),
            reuse: flags & REUSE != 0,
            send: match &fresh {
                Some(fresh) => fresh.send,
                None => {
                    Outbound { shape: sent.shape, tokens: sent.tokens, planes: [None; PLANES], quant: None }
                }
            },
            ids_are_64: fresh.as_ref().is_some_and(|fresh| fresh.ids_are_64),
            rank_tokens: (!told.is_empty()).then_some(&told[..]),
            uniform: flags & UNIFORM != 0,
            recv: wanted.planes,
            ids_out_are_64: wanted.ids_are_64,
            columns: self.config.scale_layout == ScaleLayout::Column,
            expert_counts: wanted.expert_counts,
            expert_offsets: wanted.expert_offsets,
            rank_counts: wanted.rank_counts,
            status: wanted.status,
            expert_stats: wanted.expert_stats,
            capacity,
            zero_padding: flags & ZERO_PADDING != 0,
        };
        let mut views = DispatchViews { num_rows: -1, ..DispatchViews::default() };
        let mut outcome = Ok(());
        if let Some(fresh) = fresh {
            let mut renewed = fresh.sent;
            renewed.flags = flags;
            outcome = self.step(device, &call, Half::DispatchSend, d.status, |device| {
                *sent = renewed;
                self.backend.dispatch_send(device, &d)
            });
        }
        if recv.is_some() && outcome.is_ok() {
            outcome = self.step(device, &call, Half::DispatchRecv, d.status, |device| {
                self.backend.dispatch_recv(device, &d)
            });
            if flags & HOST_COUNTS != 0 && outcome.is_ok() {
                outcome = device.received_rows(&d).map(|rows| views.num_rows = rows as i64);
            }
        }
        sent.rank_tokens = told;
        outcome?;
        if let Some(recv) = recv {
            sent.received = true;
            if views.num_rows >= 0 && grid.block().is_none() {
                // Now the host knows what it could only bound before.
                sent.capacity = views.num_rows as u32;
            }
            self.fill_views(device, routing.slot, recv, &mut views, &sent, capacity);
        }
        Ok(views)
    }

    /// `last`: what the routing remembers of its last dispatch.
    fn check_send(&self, device: &dyn Device, send: &DispatchSend, flags: u64, last: &Sent) -> Result<Fresh> {
        let config = &self.config;
        let invalid = |text: String| Err(self.invalid(text));
        let reuse = flags & REUSE != 0;
        if reuse && !last.received {
            return invalid("flags has A2A_DISPATCH_REUSE, the routing has no received dispatch".into());
        }
        let Membership { generation, members } = device.membership();
        if reuse && last.generation != generation {
            return invalid(format!(
                "flags has A2A_DISPATCH_REUSE, the routing is of generation {}, the comm of {generation}: dispatch \
                 afresh after a2a_recover",
                last.generation
            ));
        }
        let bound = match send.max_tokens {
            0 if reuse => last.grid.bound,
            bound if reuse && bound as i64 != last.grid.bound as i64 => {
                return invalid(format!(
                    "max_tokens (the step's bound) is {bound}, the routing that is to be replayed has {}",
                    last.grid.bound
                ));
            }
            0 => config.max_tokens,
            bound if bound > 0 && bound as u32 <= config.max_tokens => bound as u32,
            bound => {
                return invalid(format!(
                    "max_tokens (the step's bound) is {bound}, the configured max_tokens is {}",
                    config.max_tokens
                ));
            }
        };
        let tokens = send.tokens.rows.rows();
        if send.tokens.ndim != 2 {
            return invalid(format!("tokens has {} dimensions, it must be [T, H]", send.tokens.ndim));
        }
        if tokens > bound as usize {
            return invalid(format!("tokens has {tokens} rows, the step's bound max_tokens is {bound}"));
        }
        if reuse && tokens != last.tokens as usize {
            return invalid(format!(
                "tokens has {tokens} rows, the routing that is to be replayed has {}",
                last.tokens
            ));
        }
        let mut sent = Sent { tokens: tokens as u32, generation, ..Sent::new(last.grid, 0) };
        let quant = self.check_quant(send)?;
        sent.shape.bound = bound;
        for (plane, name, tensor) in send.named() {
            let given = tensor.rows.row_bytes();
            // Quantised tokens have a byte a column.
            let bytes = if plane == TOKENS && quant.is_some() { tensor.columns() } else { given };
            let most = self.plan.map.sizes.plane_bytes[plane] as usize;
            if plane != IDS && (bytes == 0 || bytes > most) {
                let field = match plane {
                    TOKENS if quant.is_some() => "max_hidden, a byte a column once quantised".to_string(),
                    TOKENS => "max_hidden * token_dtype".to_string(),
                    WEIGHTS => "max_topk * 4".to_string(),
                    SCALES => "max_scale_bytes".to_string(),
                    plane => format!("extra_row_bytes[{}]", plane - Plane::Extra0 as usize),
                };
                return invalid(format!("{name} has rows of {bytes} bytes, they need 1 to {most} ({field})"));
            }
            if tensor.rows.rows() != tokens || tensor.ndim > 2 {
                return invalid(format!("{name} has {} rows, tokens has {tokens}", tensor.rows.rows()));
            }
            if device.is_inside(tensor.rows.address(), tensor.rows.span()) {
                return invalid(format!("{name} lies in the comm's own window, which dispatch overwrites"));
            }
            sent.shape.plane_bytes[plane] = bytes as u32;
            sent.types[plane] = tensor.element;
            sent.is_2d[plane] = tensor.ndim == 2;
        }
        if !sent.shape.plane_bytes[TOKENS].is_multiple_of(ROW_ALIGN as u32) {
            return invalid(format!(
                "tokens has rows of {} bytes, they must be a multiple of {}",
                sent.shape.plane_bytes[TOKENS], ROW_ALIGN
            ));
        }
        if config.quant != QuantKind::None {
            sent.shape.plane_bytes[SCALES] = config.quant.scale_bytes(sent.shape.plane_bytes[TOKENS]);
            sent.types[TOKENS] = Element::F8;
            sent.types[SCALES] = Element::of_scales(config.quant);
            sent.is_2d[SCALES] = true;
        }
        sent.shape.token_type = sent.types[TOKENS].word();

        let wide = send.topk_ids.is_some_and(|ids| ids.element == Element::I64);
        let topk = match &send.topk_ids {
            Some(_) if reuse => {
                return invalid("topk_ids is set, A2A_DISPATCH_REUSE replays the routing's own".into());
            }
            None if reuse => last.grid.topk,
            Some(ids) => {
                if ids.element != Element::I32 && ids.element != Element::I64 {
                    return invalid(format!("topk_ids is {}, it must be int32 or int64", ids.element));
                }
                let topk = ids.columns() as u32;
                if ids.ndim != 2 || topk == 0 || topk > config.max_topk {
                    return invalid(format!(
                        "topk_ids is {:?}, it must be [T, K] with K from 1 to max_topk {}",
                        &ids.dims[..ids.ndim],
                        config.max_topk
                    ));
                }
                topk
            }
            None if self.plan.layout != LayoutKind::Gathered => {
                return invalid(format!(
                    "topk_ids is NULL, only layout gathered can do without (this comm's is {})",
                    self.plan.layout.name()
                ));
            }
            None => 0,
        };
        if let Some(weights) = &send.topk_weights {
            if weights.element != Element::F32 || weights.ndim != 2 {
                return invalid(format!(
                    "topk_weights is {} in {} dimensions, it must be [T, K] float32",
                    weights.element, weights.ndim
                ));
            }
            if topk == 0 || weights.columns() as u32 != topk {
                return invalid(format!(
                    "topk_weights has {} columns, topk_ids has {topk}",
                    weights.columns()
                ));
            }
        }
        sent.shape.topk = topk;
        // Ids travel as int32 and weights always travel with them: absent ones are ones.
        for (plane, element) in [(IDS, Element::I32), (WEIGHTS, Element::F32), (SOURCE, Element::I32)] {
            sent.shape.plane_bytes[plane] = topk * 4;
            sent.types[plane] = element;
            // A (token, expert) pair has one id and one weight.
            sent.is_2d[plane] = plane == SOURCE || !self.plan.layout.by_expert();
        }
        // A gathering receiver knows where a row came from by itself.
        let gathers = self.backend.uses().published;
        sent.shape.plane_bytes[SOURCE] = if gathers { 0 } else { 8 };
        sent.everyone = topk == 0;
        sent.grid = Grid { bound, topk, ..self.plan.map.sizes.grid };

        let mut rows = sent.grid.capacity(self.local());
        let told = send.rank_tokens.or_else(|| self.remembered(flags, last));
        if let Some(told) = told {
            if told[config.rank as usize] as i64 != tokens as i64 {
                return invalid(format!(
                    "rank_tokens[{}] is {}, tokens has {tokens} rows",
                    config.rank, told[config.rank as usize]
                ));
            }
            for (rank, count) in told.iter().enumerate() {
                if *count < 0 || *count as u32 > bound {
                    return invalid(format!("rank_tokens[{rank}] is {count}, the step's bound is {bound}"));
                }
                if *count > 0 && !members.contains(rank as u32) {
                    return invalid(format!(
                        "rank_tokens[{rank}] is {count}, rank {rank} takes part no more"
                    ));
                }
            }
            if gathers {
                rows = told.iter().map(|count| *count as u64).sum();
            }
        } else if gathers && flags & UNIFORM != 0 {
            rows = members.len() as u64 * tokens as u64;
        }
        if self.is_carried() && told.is_none() && flags & UNIFORM == 0 {
            return invalid(
                "rank_tokens is NULL and flags has no A2A_DISPATCH_UNIFORM: with transport nccl every rank must know how many \
                 tokens each has"
                    .into(),
            );
        }
        sent.capacity = rows as u32;
        let send = Outbound { shape: sent.shape, tokens: sent.tokens, planes: send.planes(), quant };
        let ids_are_64 = wide;
        Ok(Fresh { sent, send, ids_are_64 })
    }

    /// If rows travel by collectives, for which everybody's tokens must be known.
    pub(super) fn is_carried(&self) -> bool {
        self.plan.transport == TransportKind::Nccl
    }

    /// Everybody's tokens, of a dispatch that is replayed.
    fn remembered<'a>(&self, flags: u64, last: &'a Sent) -> Option<&'a [i32]> {
        let known = flags & REUSE != 0 && self.is_carried() && !last.rank_tokens.is_empty();
        known.then_some(&last.rank_tokens[..])
    }

    /// How tokens are quantised on their way; `None` if they travel as they are.
    fn check_quant(&self, send: &DispatchSend) -> Result<Option<(Float, QuantKind)>> {
        let quant = self.config.quant;
        if quant == QuantKind::None {
            return Ok(None);
        }
        let element = send.tokens.element;
        if let Some(float) = element.float() {
            if send.scales.is_some() {
                return Err(self.invalid(format!("scales is set, dispatch makes them ({})", quant.name())));
            }
            return Ok(Some((float, quant)));
        }
        if element != Element::F8 {
            return Err(self.invalid(format!(
                "tokens is {element}, with {} it must be bfloat16, float16, float32, or float8 e4m3 with scales",
                quant.name()
            )));
        }
        let need = quant.scale_bytes(send.tokens.columns() as u32) as usize;
        match &send.scales {
            Some(scales) if scales.rows.row_bytes() == need => Ok(None),
            scales => Err(self.invalid(format!(
                "scales has rows of {} bytes, e4m3 tokens of {} columns need {need} ({})",
                scales.map_or(0, |scales| scales.rows.row_bytes()),
                send.tokens.columns(),
                quant.name()
            ))),
        }
    }

    /// An output that takes rows: wanted, a view, or the caller's tensor, checked.
    fn check_rows(
        &self,
        device: &dyn Device,
        slot: u32,
        plane: usize,
        output: &Output,
        sent: &Sent,
    ) -> Result<Target> {
        let name = plane_name(plane);
        if matches!(output, Output::Nothing) {
            return Ok(Target::Nothing);
        }
        let layout = self.plan.layout;
        let bytes = received_bytes(layout, plane, sent.shape.plane_bytes[plane]) as usize;
        let needs_topk = matches!(plane, IDS | WEIGHTS) && sent.grid.topk == 0;
        if bytes == 0 && plane == IDS && !needs_topk {
            return Err(self.invalid(format!(
                "topk_ids is wanted, layout {} has none: an expert's rows stand together",
                layout.name()
            )));
        }
        if bytes == 0 || needs_topk {
            return Err(self.invalid(format!("{name} is wanted, but dispatch was given none")));
        }
        let keeps_rows = self.backend.uses().rows;
        let view = device.view(slot, Region::Plane(plane));
        let tensor = match output {
            Output::Columns(tensor) => return self.check_columns(device, slot, tensor, sent),
            Output::Into(tensor) if !(keeps_rows && tensor.rows.address() == view) => tensor,
            _ if keeps_rows => return Ok(Target::View),
            _ => {
                return Err(self.invalid(format!(
                    "the output {name} has no data: backend {} keeps no rows, it needs a tensor of the caller's",
                    self.plan.backend.name()
                )));
            }
        };
        let wide = plane == IDS && tensor.element == Element::I64;
        let made = self.config.quant != QuantKind::None;
        let (typed, wanted) = match plane {
            IDS => (wide || tensor.element == Element::I32, "int32 or int64"),
            WEIGHTS => (tensor.element == Element::F32, "float32"),
            SOURCE => (tensor.element == Element::I32, "int32"),
            TOKENS if made => (tensor.element.bytes() == 1, "float8 e4m3"),
            SCALES if made && sent.types[SCALES] == Element::I32 => (tensor.element == Element::I32, "int32"),
            SCALES if made => (tensor.element == Element::F32, "float32"),
            _ => (true, ""),
        };
        if !typed {
            return Err(self.invalid(format!("the output {name} is {}, it must be {wanted}", tensor.element)));
        }
        let expected = if wide { bytes * 2 } else { bytes };
        let Some(rows) = self.fit_rows(tensor, &sent.grid, expected) else {
            return Err(self.invalid(format!(
                "the output {name} is {:?} with rows of {} bytes, this step's rows have {expected} and are \
                 [{}]{}",
                &tensor.dims[..tensor.ndim],
                tensor.rows.row_bytes(),
                sent.capacity,
                self.row_blocks(&sent.grid).map_or(String::new(), |(n, block)| format!(" or [{n}, {block}]"))
            )));
        };
        self.check_room(name, rows.rows(), sent)?;
        self.check_outside(device, name, (tensor.rows.address(), tensor.rows.span()))?;
        Ok(Target::Into(rows))
    }

    fn check_room(&self, name: &str, rows: usize, sent: &Sent) -> Result<()> {
        if rows >= sent.capacity as usize {
            return Ok(());
        }
        let rank = self.config.rank;
        let text =
            format!("rank {rank}: the output {name} has {rows} rows, this step needs {}", sent.capacity);
        Err(Error::new(Status::Overflow, text))
    }

    /// The caller's tensor for scales that lie by column.
    fn check_columns(
        &self,
        device: &dyn Device,
        slot: u32,
        tensor: &ColumnTensor,
        sent: &Sent,
    ) -> Result<Target> {
        let columns = &tensor.columns;
        if self.backend.uses().rows && columns.address() == device.view(slot, Region::Plane(SCALES)) {
            return Ok(Target::View);
        }
        let elements = sent.shape.plane_bytes[SCALES] as usize / 4;
        let shaped = match self.row_blocks(&sent.grid) {
            Some((blocks, block)) => tensor.ndim == 3 && tensor.dims[..2] == [blocks, block],
            None => tensor.ndim == 2,
        };
        if !shaped || columns.elements() != elements || tensor.element != sent.types[SCALES] {
            return Err(self.invalid(format!(
                "the output scales is {:?} of {}, it must be {} and hold rows of {elements} {} by column",
                &tensor.dims[..tensor.ndim],
                tensor.element,
                self.row_blocks(&sent.grid)
                    .map_or("[rows, S]".into(), |(n, block)| format!("[{n}, {block}, S]")),
                sent.types[SCALES]
            )));
        }
        self.check_room("scales", columns.rows(), sent)?;
        self.check_outside(device, "scales", (columns.address(), columns.span()))?;
        Ok(Target::Columns(*columns))
    }

    fn check_recv(&self, device: &dyn Device, slot: u32, recv: &DispatchRecv, sent: &Sent) -> Result<Wanted> {
        let local = self.local() as usize;
        let ranks = self.config.num_ranks as usize;
        let mut wanted = Wanted::default();
        for (plane, output) in recv.planes.iter().enumerate() {
            wanted.planes[plane] = self.check_rows(device, slot, plane, output, sent)?;
        }
        if let (Output::Into(ids), Target::Into(_)) = (recv.planes[IDS], wanted.planes[IDS]) {
            wanted.ids_are_64 = ids.element == Element::I64;
        }
        if !matches!(recv.expert_offsets, Output::Nothing) && !self.plan.layout.by_expert() {
            return Err(self.invalid(format!(
                "expert_offsets is wanted, layout {} has no expert blocks",
                self.plan.layout.name()
            )));
        }
        let counted = [("expert_counts", &recv.expert_counts), ("expert_stats", &recv.expert_stats)];
        for (name, output) in counted {
            if !matches!(output, Output::Nothing) && sent.grid.topk == 0 {
                return Err(self.invalid(format!("{name} is wanted, but dispatch was given no topk_ids")));
            }
        }
        let region = |region| Some((slot, region));
        let small = |name, at, output, count| self.check_small(device, name, at, output, Element::I32, count);
        wanted.expert_counts =
            small("expert_counts", region(Region::ExpertCounts), &recv.expert_counts, local)?;
        wanted.expert_offsets =
            small("expert_offsets", region(Region::ExpertOffsets), &recv.expert_offsets, local + 1)?;
        wanted.rank_counts = small("rank_counts", region(Region::RankCounts), &recv.rank_counts, ranks)?;
        wanted.status = small("status", region(Region::Status), &recv.status, 4 + ranks)?;
        wanted.expert_stats =
            match self.check_small(device, "expert_stats", None, &recv.expert_stats, Element::I64, local)? {
                Target::Into(rows) => Some(rows),
                Target::View => {
                    return Err(
                        self.invalid("expert_stats has no data: it is added to, so it must be the caller's")
                    );
                }
                Target::Nothing | Target::Columns(_) => None,
            };
        Ok(wanted)
    }

    /// `capacity`: rows of the outputs, before what HOST_COUNTS learnt cut the views.
    fn fill_views(
        &self,
        device: &dyn Device,
        slot: u32,
        recv: &DispatchRecv,
        views: &mut DispatchViews,
        sent: &Sent,
        capacity: u32,
    ) {
        let is_view = |output: &Output, address: usize| match output {
            Output::View => true,
            Output::Into(tensor) => tensor.rows.address() == address,
            Output::Columns(tensor) => tensor.columns.address() == address,
            Output::Nothing => false,
        };
        let by_column = self.config.scale_layout == ScaleLayout::Column;
        for (plane, output) in recv.planes.iter().enumerate().filter(|_| self.backend.uses().rows) {
            let address = device.view(slot, Region::Plane(plane));
            if !is_view(output, address) {
                continue;
            }
            let bytes = received_bytes(self.plan.layout, plane, sent.shape.plane_bytes[plane]) as i64;
            let columns = bytes / sent.types[plane].bytes().max(1) as i64;
            let columns = sent.is_2d[plane].then_some(columns);
            let rows = sent.capacity as i64;
            let mut view = self.rows_view(address, sent.types[plane], &sent.grid, rows, columns);
            if plane == SCALES && by_column {
                let (_, _, pitch) = column_shape(&sent.grid, self.local(), capacity as u64);
                let pitch = pitch as i64;
                let strides = [columns.unwrap_or(1) * pitch, 1, pitch];
                view.strides = if view.ndim == 3 { strides } else { [1, pitch, 0] };
            }
            views.planes[plane] = Some(view);
        }
        let small = |output: &Output, region: Region, count: usize| {
            let address = device.view(slot, region);
            is_view(output, address).then(|| View::new(address, Element::I32, &[count as i64]))
        };
        let ranks = self.config.num_ranks as usize;
        let local = self.local() as usize;
        views.expert_counts = small(&recv.expert_counts, Region::ExpertCounts, local);
        views.expert_offsets = small(&recv.expert_offsets, Region::ExpertOffsets, local + 1);
        views.rank_counts = small(&recv.rank_counts, Region::RankCounts, ranks);
        views.status = small(&recv.status, Region::Status, 4 + ranks);
    }
}
