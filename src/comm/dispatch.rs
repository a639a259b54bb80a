//! Dispatch as a call: what is asked is checked against what the comm was made for, both halves are run, views are
//! described.

use super::routing::{Routing, Sent};
use super::tensor::{Element, Output, Tensor, View};
use super::{Comm, lock};
use crate::config::{LayoutKind, MAX_EXTRAS, ROW_ALIGN};
use crate::device::map::{PLANES, Plane};
use crate::device::{Device, Dispatch, Half, Region, Rows, Shape, Target};
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
    rank_counts: Target,
    status: Target,
    expert_stats: Option<Rows>,
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
    ) -> Result<DispatchViews> {
        let (_call, device) = self.enter()?;
        self.check_routing(routing)?;
        if flags & REUSE != 0 {
            return Err(Error::unsupported(format!(
                "rank {}: flags has A2A_DISPATCH_REUSE, which is not in this build",
                self.config.rank
            )));
        }
        if flags & !(HOST_COUNTS | ZERO_PADDING | UNIFORM) != 0 {
            return Err(self.invalid(format!("flags is {flags:#x}, known bits are 0xf")));
        }
        let call = self.call(routing);
        let due = if send.is_some() { Half::DispatchSend } else { Half::DispatchRecv };
        self.check_due(&*device, &call, due, recv.map(|recv| &recv.status))?;
        let mut sent = lock(&routing.sent);

        // Everything is checked before anything happens.
        let fresh = match send {
            Some(send) => Some(self.check_send(&*device, send, flags)?),
            None => None,
        };
        let (shape, tokens, capacity, flags) = match &fresh {
            Some(f) => (f.shape, f.tokens, f.capacity, flags),
            None => (sent.shape, sent.tokens, sent.capacity, sent.flags | flags),
        };
        let types = fresh.as_ref().map_or(sent.types, |f| f.types);
        let is_2d = fresh.as_ref().map_or(sent.is_2d, |f| f.is_2d);
        let wanted = match recv {
            Some(recv) => self.check_recv(&*device, routing.slot, recv, &shape, capacity)?,
            None => Wanted::default(),
        };

        let mut d = Dispatch {
            call,
            memory: &routing.memory,
            shape,
            tokens,
            ids_are_64: false,
            send: [None; PLANES],
            rank_tokens: None,
            uniform: flags & UNIFORM != 0,
            recv: wanted.planes,
            ids_out_are_64: wanted.ids_are_64,
            expert_counts: wanted.expert_counts,
            rank_counts: wanted.rank_counts,
            status: wanted.status,
            expert_stats: wanted.expert_stats,
            capacity,
            zero_padding: flags & ZERO_PADDING != 0,
        };
        if let (Some(send), Some(fresh)) = (send, fresh) {
            d.send = send.planes();
            d.ids_are_64 = send.topk_ids.is_some_and(|ids| ids.element == Element::I64);
            self.step(&*device, &call, Half::DispatchSend, d.status, |device| {
                // The list keeps its allocation from dispatch to dispatch.
                let mut rank_tokens = std::mem::take(&mut sent.rank_tokens);
                rank_tokens.clear();
                rank_tokens.extend_from_slice(send.rank_tokens.unwrap_or_default());
                *sent = fresh;
                sent.rank_tokens = rank_tokens;
                sent.flags = flags;
                self.backend.dispatch_send(device, &d)
            })?;
        }
        let mut views = DispatchViews { num_rows: -1, ..DispatchViews::default() };
        if let Some(recv) = recv {
            d.rank_tokens = (!sent.rank_tokens.is_empty()).then_some(&sent.rank_tokens[..]);
            self.step(&*device, &call, Half::DispatchRecv, d.status, |device| {
                self.backend.dispatch_recv(device, &d)
            })?;
            if flags & HOST_COUNTS != 0 {
                views.num_rows = device.received_rows(&d) as i64;
                if self.plan.layout == LayoutKind::Gathered {
                    // Now the host knows what it could only bound before.
                    sent.capacity = views.num_rows as u32;
                }
            }
            let rows = sent.capacity as i64;
            self.fill_views(&*device, routing.slot, recv, &mut views, &shape, rows, &types, &is_2d);
        }
        Ok(views)
    }

    fn check_send(&self, device: &dyn Device, send: &DispatchSend, flags: u64) -> Result<Sent> {
        let config = &self.config;
        let invalid = |text: String| Err(self.invalid(text));
        let bound = match send.max_tokens {
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
        let mut sent = Sent { tokens: tokens as u32, ..Sent::default() };
        sent.shape.bound = bound;
        sent.shape.token_type = send.tokens.element.word();
        for (plane, name, tensor) in send.named() {
            let bytes = tensor.rows.row_bytes();
            let most = self.plan.map.sizes.plane_bytes[plane] as usize;
            if plane != Plane::Ids as usize && (bytes == 0 || bytes > most) {
                let field = match plane {
                    0 => "max_hidden * token_dtype".to_string(),
                    2 => "max_topk * 4".to_string(),
                    4 => "max_scale_bytes".to_string(),
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
        if !sent.shape.plane_bytes[0].is_multiple_of(ROW_ALIGN as u32) {
            return invalid(format!(
                "tokens has rows of {} bytes, they must be a multiple of {}",
                sent.shape.plane_bytes[0], ROW_ALIGN
            ));
        }

        let topk = match &send.topk_ids {
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
        let narrow = topk * 4;
        sent.shape.plane_bytes[Plane::Ids as usize] = narrow;
        sent.shape.plane_bytes[Plane::Weights as usize] = narrow;
        sent.types[Plane::Ids as usize] = Element::I32;
        sent.types[Plane::Weights as usize] = Element::F32;
        sent.types[Plane::Source as usize] = Element::I32;
        for plane in [Plane::Ids, Plane::Weights, Plane::Source] {
            sent.is_2d[plane as usize] = true;
        }
        // A gathering receiver knows where a row came from by itself.
        let gathers = self.backend.gathers();
        sent.shape.plane_bytes[Plane::Source as usize] = if gathers { 0 } else { 8 };
        sent.everyone = topk == 0;

        let mut rows = config.num_ranks as u64 * bound as u64;
        if let Some(told) = send.rank_tokens {
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
            }
            if gathers {
                rows = told.iter().map(|count| *count as u64).sum();
            }
        } else if gathers && flags & UNIFORM != 0 {
            rows = config.num_ranks as u64 * tokens as u64;
        }
        sent.capacity = rows as u32;
        Ok(sent)
    }

    /// An output that takes rows: wanted, a view, or the caller's tensor, checked.
    fn check_rows(
        &self,
        device: &dyn Device,
        slot: u32,
        plane: usize,
        output: &Output,
        shape: &Shape,
        capacity: u32,
    ) -> Result<Target> {
        let name = plane_name(plane);
        let mut bytes = shape.plane_bytes[plane] as usize;
        if plane == Plane::Source as usize {
            bytes = 8;
        }
        if matches!(output, Output::Nothing) {
            return Ok(Target::Nothing);
        }
        if bytes == 0 {
            return Err(self.invalid(format!("{name} is wanted, but dispatch was given none")));
        }
        let Output::Into(tensor) = output else { return Ok(Target::View) };
        if tensor.rows.address() == device.view(slot, Region::Plane(plane)) {
            return Ok(Target::View);
        }
        let wide = plane == Plane::Ids as usize && tensor.element == Element::I64;
        let typed = match plane {
            1 => wide || tensor.element == Element::I32,
            2 => tensor.element == Element::F32,
            3 => tensor.element == Element::I32,
            _ => true,
        };
        if !typed {
            return Err(self
                .invalid(format!("the output {name} is {}, see the header for its types", tensor.element)));
        }
        let expected = if wide { bytes * 2 } else { bytes };
        let (ranks, bound) = (self.config.num_ranks as i64, shape.bound as i64);
        let per_rank = self.plan.layout == LayoutKind::RankMajor;
        let mut rows = tensor.rows;
        // One element a row, [T] as dispatched: the output [R, M] has no dimension for it.
        if per_rank && tensor.ndim == 2 && tensor.dims[..2] == [ranks, bound] && rows.row_bytes() != expected
        {
            rows = rows.split(bound as usize).unwrap_or(rows);
        }
        if rows.row_bytes() != expected {
            return Err(self.invalid(format!(
                "the output {name} has rows of {} bytes, the dispatched ones have {expected}",
                rows.row_bytes()
            )));
        }
        if tensor.ndim == 3 && (!per_rank || tensor.dims[..2] != [ranks, bound]) {
            return Err(self.invalid(format!(
                "the output {name} is {:?}, its first dimensions must be [{capacity}]{}",
                tensor.dims,
                if per_rank { format!(" or [{ranks}, {bound}]") } else { String::new() }
            )));
        }
        if rows.rows() < capacity as usize {
            return Err(Error::new(
                Status::Overflow,
                format!(
                    "rank {}: the output {name} has {} rows, this step needs {capacity}",
                    self.config.rank,
                    rows.rows()
                ),
            ));
        }
        self.check_outside(device, name, tensor)?;
        Ok(Target::Into(rows))
    }

    fn check_recv(
        &self,
        device: &dyn Device,
        slot: u32,
        recv: &DispatchRecv,
        shape: &Shape,
        capacity: u32,
    ) -> Result<Wanted> {
        let local = self.config.experts.count(self.config.rank) as usize;
        let ranks = self.config.num_ranks as usize;
        let mut wanted = Wanted::default();
        for (plane, output) in recv.planes.iter().enumerate() {
            wanted.planes[plane] = self.check_rows(device, slot, plane, output, shape, capacity)?;
        }
        if let (Output::Into(ids), Target::Into(_)) = (recv.planes[Plane::Ids as usize], wanted.planes[1]) {
            wanted.ids_are_64 = ids.element == Element::I64;
        }
        if !matches!(recv.expert_offsets, Output::Nothing) {
            return Err(self.invalid(format!(
                "expert_offsets is wanted, layout {} has no expert blocks",
                self.plan.layout.name()
            )));
        }
        let counted = [("expert_counts", &recv.expert_counts), ("expert_stats", &recv.expert_stats)];
        for (name, output) in counted {
            if !matches!(output, Output::Nothing) && shape.topk == 0 {
                return Err(self.invalid(format!("{name} is wanted, but dispatch was given no topk_ids")));
            }
        }
        let region = |region| Some((slot, region));
        let small = |name, at, output, count| self.check_small(device, name, at, output, Element::I32, count);
        wanted.expert_counts =
            small("expert_counts", region(Region::ExpertCounts), &recv.expert_counts, local)?;
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
                Target::Nothing => None,
            };
        Ok(wanted)
    }

    #[allow(clippy::too_many_arguments, reason = "the second half of dispatch, and no other's")]
    fn fill_views(
        &self,
        device: &dyn Device,
        slot: u32,
        recv: &DispatchRecv,
        views: &mut DispatchViews,
        shape: &Shape,
        rows: i64,
        types: &[Element; PLANES],
        is_2d: &[bool; PLANES],
    ) {
        let is_view = |output: &Output, address: usize| match output {
            Output::View => true,
            Output::Into(tensor) => tensor.rows.address() == address,
            Output::Nothing => false,
        };
        for (plane, output) in recv.planes.iter().enumerate() {
            let address = device.view(slot, Region::Plane(plane));
            if !is_view(output, address) {
                continue;
            }
            let bytes = if plane == Plane::Source as usize { 8 } else { shape.plane_bytes[plane] };
            let columns = bytes as i64 / types[plane].bytes().max(1) as i64;
            views.planes[plane] = Some(self.rows_view(
                address,
                types[plane],
                shape.bound,
                rows,
                is_2d[plane].then_some(columns),
            ));
        }
        let small = |output: &Output, region: Region, count: usize| {
            let address = device.view(slot, region);
            is_view(output, address).then_some(View {
                address,
                element: Element::I32,
                ndim: 1,
                dims: [count as i64, 0, 0],
            })
        };
        let ranks = self.config.num_ranks as usize;
        let local = self.config.experts.count(self.config.rank) as usize;
        views.expert_counts = small(&recv.expert_counts, Region::ExpertCounts, local);
        views.rank_counts = small(&recv.rank_counts, Region::RankCounts, ranks);
        views.status = small(&recv.status, Region::Status, 4 + ranks);
    }
}
