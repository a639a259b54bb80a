//! All ranks on one GPU, each a comm of this process with a stream of its own, driven by one thread: a call on CUDA
//! puts its work on the stream and returns. They are checked, timed behind a gate (`gpu`), and checked again.

use std::thread;

use a2a::abi::calls::{a2a_combine, a2a_dispatch};
use a2a::abi::types::*;
use serde::{Deserialize, Serialize};

use crate::conformance::common::*;
use crate::gate::Gate;
use crate::gpu::{self, Gpu, Stream};
use crate::routing::Routing as Choices;
use crate::shape::{Pair, Shape};

/// One operation of one scope.
#[derive(Debug, Serialize, Deserialize)]
pub struct Timed {
    pub scope: String,
    pub operation: String,
    /// Microseconds, an entry an iteration.
    pub times: Vec<f64>,
    pub bytes: Bytes,
}

/// As in a report's row.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Bytes {
    pub logical: u64,
    pub wire: u64,
    pub memory: u64,
}

impl std::ops::Add for Bytes {
    type Output = Bytes;
    fn add(self, other: Bytes) -> Bytes {
        Bytes {
            logical: self.logical + other.logical,
            wire: self.wire + other.wire,
            memory: self.memory + other.memory,
        }
    }
}

/// What the GPU is, and what costs what where nothing is done.
#[derive(Debug, Serialize, Deserialize)]
pub struct Floors {
    pub name: String,
    pub line: String,
    /// Microseconds by scope and by empty kernels of each rank.
    pub times: Vec<(String, usize, Vec<f64>)>,
}

/// Bytes of a rank's tensors, with what lies between them.
pub fn tensor_bytes(shape: &Shape, pair: Pair) -> usize {
    let (ranks, tokens, topk) = (shape.ranks as u64, shape.tokens as u64, shape.topk as u64);
    let token = shape.kind.wire_bytes(shape.hidden) as u64;
    let result = (shape.hidden * shape.kind.float().bytes()) as u64;
    let experts = (shape.experts as u64).div_ceil(ranks);
    let rows = match pair.layout {
        A2A_LAYOUT_EXPERT_PADDED => experts * ranks * tokens,
        A2A_LAYOUT_EXPERT_CONTIGUOUS => ranks * tokens * topk.min(experts),
        _ => ranks * tokens,
    };
    let given = tokens * (shape.kind.given_bytes(shape.hidden) as u64 + result + topk * 8);
    let staged = if shape.staged || !pair.keeps_rows() { rows * result } else { 0 };
    let own = if pair.keeps_rows() { 0 } else { rows * (token + topk * 8 + 8) };
    (given + staged + own + (64 << 10)) as usize
}

fn shape_of(seat: &Seat) -> Result<Shape, String> {
    serde_json::from_str(&seat.args[0]).map_err(|error| error.to_string())
}

/// The job of a process that measures the floors of a shape's ranks.
pub fn floors(seat: &Seat) -> Result<(), String> {
    let shape = shape_of(seat)?;
    let (name, line) = gpu::describe(cuda::ordinal())?;
    let gpu = Gpu::new(shape.ranks)?;
    let mut times = Vec::new();
    for scope in &shape.scopes {
        for kernels in 0..=2 {
            let empty = |rank: usize| (0..kernels).try_for_each(|_| gpu.nothing(rank));
            let us = repeat(&shape, || match scope.as_str() {
                "all" => gpu.time_all(|rank, _| empty(rank)),
                _ => gpu.time_first(|_| empty(0)),
            })?;
            times.push((scope.clone(), kernels, us));
        }
    }
    shape.leave(0, &Floors { name, line, times })
}

/// The job of a process that measures a shape.
pub fn job(seat: &Seat) -> Result<(), String> {
    let shape = shape_of(seat)?;
    shape.leave(0, &measure(&shape)?)
}

fn repeat(shape: &Shape, mut once: impl FnMut() -> Result<f64, String>) -> Result<Vec<f64>, String> {
    let mut times = Vec::with_capacity(shape.iterations);
    for iteration in 0..shape.warmup + shape.iterations {
        let us = once()?;
        if iteration >= shape.warmup {
            times.push(us);
        }
    }
    Ok(times)
}

/// The phases of a call for both halves, and of a call for each.
const WHOLE: &[a2a_phase_t] = &[A2A_PHASE_BOTH];
const SPLIT: &[a2a_phase_t] = &[A2A_PHASE_SEND, A2A_PHASE_RECV];

/// One rank, with its tensors.
pub struct Rank {
    comm: Comm,
    routing: Routing,
    gate: Gate,
    pair: Pair,
    shape: Shape,
    capacity: usize,
    input: DispatchIn,
    /// What it sends when it is `quiet`.
    nothing: DispatchIn,
    quiet: bool,
    output: DispatchOut,
    results: Option<Tensor>,
    sums: CombineOut,
    pub combine_flags: u64,
}

impl Rank {
    pub fn new(seat: &Seat, shape: &Shape, pair: Pair) -> Result<Rank, String> {
        let mut config = config(seat);
        (config.backend, config.layout) = (pair.backend, pair.layout);
        config.num_experts = shape.experts as i32;
        (config.max_topk, config.max_hidden) = (shape.topk as i32, shape.hidden as i32);
        config.max_tokens = shape.tokens.max(1) as i32;
        config.max_recv_rows = shape.max_recv_rows;
        config.max_sms = shape.max_sms;
        if shape.nccl {
            config.transport = A2A_TRANSPORT_NCCL;
        }
        shape.kind.configure(&mut config);
        let comm = Comm::create(&config)?;
        let routing = comm.routing(0)?;
        let gate = Gate::new(seat, shape, pair, &Choices::parse(&shape.routing)?)?;
        let capacity = comm.info()?.row_capacity as usize;
        let (mut input, sums) =
            (gate.input(), Tensor::new(shape.kind.dtype(), &[shape.tokens, shape.hidden]));
        if shape.nccl {
            input.flags = A2A_DISPATCH_UNIFORM;
        }
        let none = |tensor: &Tensor| Tensor::new(tensor.dtype(), &[0, tensor.shape()[1]]);
        let nothing = DispatchIn {
            tokens: input.tokens.as_ref().map(none),
            topk_ids: input.topk_ids.as_ref().map(none),
            topk_weights: input.topk_weights.as_ref().map(none),
            scales: input.scales.as_ref().map(none),
            ..Default::default()
        };
        let mut rank = Rank {
            comm,
            routing,
            gate,
            pair,
            shape: shape.clone(),
            capacity,
            input,
            nothing,
            quiet: false,
            output: DispatchOut::default(),
            results: None,
            sums: CombineOut { tokens: Some(sums), ..Default::default() },
            combine_flags: 0,
        };
        rank.results = rank.stages().then(|| Tensor::new(shape.kind.dtype(), &[capacity, shape.hidden]));
        Ok(rank)
    }

    /// Results come from a tensor of the caller's.
    fn stages(&self) -> bool {
        self.shape.staged || !self.pair.keeps_rows()
    }

    /// Asks for what an engine needs, and for the rest that the gate compares if `all`.
    pub fn want(&mut self, all: bool) {
        let (shape, capacity) = (&self.shape, self.capacity);
        let own = |dtype: Dtype, columns: usize| match self.pair.keeps_rows() {
            true => Some(Tensor::view()),
            false => Some(Tensor::new(dtype, &[capacity, columns])),
        };
        let by_expert = self.pair.oracle_layout().by_expert();
        // Memory of the caller's is given back before more is taken.
        self.output = DispatchOut::default();
        self.output = DispatchOut {
            tokens: own(shape.kind.wire(), shape.hidden),
            scales: shape.kind.scale().and_then(|scale| own(F32, scale.row_bytes(shape.hidden) / 4)),
            topk_ids: if by_expert { None } else { own(I32, shape.topk) },
            topk_weights: own(F32, shape.topk),
            row_source: if all { own(I32, 2) } else { None },
            expert_counts: (all || by_expert).then(Tensor::view),
            rank_counts: (all || !by_expert).then(Tensor::view),
            expert_offsets: by_expert.then(Tensor::view),
            ..Default::default()
        };
    }

    pub fn dispatch(&mut self, phase: a2a_phase_t, stream: Stream) -> Result<(), String> {
        // By the ABI only phase and flags count in RECV.
        let input = match phase {
            A2A_PHASE_RECV => DispatchIn::default().raw(phase),
            _ if self.quiet => self.nothing.raw(phase),
            _ => self.input.raw(phase),
        };
        let views = [
            &mut self.output.tokens,
            &mut self.output.scales,
            &mut self.output.topk_ids,
            &mut self.output.topk_weights,
            &mut self.output.row_source,
            &mut self.output.expert_counts,
            &mut self.output.rank_counts,
            &mut self.output.expert_offsets,
        ];
        for view in views.into_iter().flatten().filter(|tensor| tensor.is_view()) {
            // A view is asked for anew: as it was filled, it would be a tensor of the caller's.
            let raw = view.raw_mut();
            (raw.data, raw.shape, raw.strides, raw.ndim) =
                (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut(), 0);
        }
        let mut output = self.output.raw();
        let (comm, routing) = (self.comm.handle(), self.routing.handle());
        // SAFETY: live handles; the structs' tensors are this rank's and live until the stream is done.
        check(unsafe { a2a_dispatch(comm, routing, &input, &mut output, stream.cast()) })?;
        Ok(())
    }

    pub fn combine(&mut self, phase: a2a_phase_t, stream: Stream) -> Result<(), String> {
        let sends = phase != A2A_PHASE_RECV;
        if sends && !self.stages() {
            self.results = Some(self.comm.combine_buffer(&self.routing, self.shape.kind.dtype())?);
        }
        let input = combine_in(phase, self.combine_flags, self.results.as_ref().filter(|_| sends));
        let mut output = self.sums.raw();
        let (comm, routing) = (self.comm.handle(), self.routing.handle());
        // SAFETY: as in `dispatch`.
        check(unsafe { a2a_combine(comm, routing, &input, &mut output, stream.cast()) })?;
        Ok(())
    }

    /// What kernels found: on CUDA calls return before their work is done.
    pub fn failure(&self) -> Result<(), String> {
        let error = self.comm.async_error()?;
        if error.status == A2A_SUCCESS {
            return Ok(());
        }
        Err(format!("{} ({})", status_name(error.status), message(&error)))
    }

    pub fn input(&self) -> &DispatchIn {
        &self.input
    }

    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// A dispatch, and a combine behind it.
    pub fn pair(&mut self, stream: Stream) -> Result<(), String> {
        self.dispatch(A2A_PHASE_BOTH, stream)?;
        self.combine(A2A_PHASE_BOTH, stream)
    }

    /// What a dispatch brought against the oracle; its experts' results are made.
    pub fn check_received(&mut self) -> Result<(), String> {
        self.gate.check_received(&self.output)?;
        let mut results = match self.stages() {
            true => self.results.take().expect("made with the rank"),
            false => self.comm.combine_buffer(&self.routing, self.shape.kind.dtype())?,
        };
        self.gate.write_results(&mut results);
        self.results = Some(results);
        Ok(())
    }

    pub fn check_sums(&self) -> Result<(), String> {
        self.gate.check_sums(self.sums.tokens.as_ref().expect("wanted"))
    }

    /// A whole step of a rank with a stream of its own, against the oracle; with the outputs that are timed, or with all.
    pub fn check_step(&mut self, gpu: &Gpu, all: bool) -> Result<(), String> {
        let stream = gpu.stream(0);
        let settle = |rank: &Rank| gpu.synchronize().and_then(|()| rank.failure());
        self.want(all);
        self.dispatch(A2A_PHASE_BOTH, stream)?;
        settle(self)?;
        self.check_received()?;
        self.combine(A2A_PHASE_BOTH, stream)?;
        settle(self)?;
        self.check_sums()
    }

    /// Bytes moved between windows by dispatches, and by combines, so far; zeros where nobody counts.
    fn moved(&self) -> [u64; 3] {
        let stats = self.comm.stats().unwrap_or_default();
        [stats.bytes_pushed + stats.bytes_gathered, stats.bytes_pulled, stats.bytes_fifo]
    }
}

/// Every rank's part of something that waits for none of the GPU's kernels, on threads.
fn each<T: Send>(
    ranks: &mut [Rank],
    part: impl Fn(&mut Rank) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let part = &part;
    thread::scope(|scope| {
        let threads: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(move || part(rank))).collect();
        joined(threads)
    })
}

/// What all threads returned, or the first failure, with its rank.
fn joined<T>(threads: Vec<thread::ScopedJoinHandle<'_, Result<T, String>>>) -> Result<Vec<T>, String> {
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
    let with_rank = |(rank, result): (usize, thread::Result<Result<T, String>>)| match result {
        Ok(result) => result.map_err(|why| format!("rank {rank}: {why}")),
        Err(_) => Err(format!("rank {rank}: panicked")),
    };
    results.into_iter().enumerate().map(with_rank).collect()
}

/// All ranks of a shape, and what times them.
struct Group {
    gpu: Gpu,
    ranks: Vec<Rank>,
    shape: Shape,
}

impl Group {
    fn new(shape: &Shape, pair: Pair) -> Result<Group, String> {
        let gpu = Gpu::new(shape.ranks)?;
        // Both may wait for a kernel, once there are any.
        cuda::grow(shape.ranks * tensor_bytes(shape, pair))?;
        cuda::reserve(&Vec::from_iter(0..shape.ranks));
        let id = GroupId::new();
        let seat = |rank| Seat { rank, world: shape.ranks, id, args: Vec::new() };
        let ranks = thread::scope(|scope| {
            let create = |rank| {
                let seat = seat(rank);
                scope.spawn(move || Rank::new(&seat, shape, pair))
            };
            joined((0..shape.ranks).map(create).collect())
        })?;
        Ok(Group { gpu, ranks, shape: shape.clone() })
    }

    /// Waits for all streams, and says what failed on them.
    fn settle(&self) -> Result<(), String> {
        let waited = self.gpu.synchronize();
        let failed = |(rank, it): (usize, &Rank)| it.failure().map_err(|why| format!("rank {rank}: {why}"));
        self.ranks.iter().enumerate().try_for_each(failed)?;
        waited
    }

    /// A phase of ranks from `first` on; it ends when they are all done.
    fn phase(
        &mut self,
        first: usize,
        call: impl Fn(&mut Rank, Stream) -> Result<(), String>,
    ) -> Result<(), String> {
        for (rank, it) in self.ranks.iter_mut().enumerate().skip(first) {
            call(it, self.gpu.stream(rank)).map_err(|why| format!("rank {rank}: {why}"))?;
        }
        self.settle()
    }

    /// A whole step against the oracle, its dispatch in `phases`; with the outputs that are timed, or with all. The
    /// bytes that one dispatch, and one combine, of each rank moved between windows.
    fn check(&mut self, phases: &[a2a_phase_t], all: bool) -> Result<Vec<[u64; 2]>, String> {
        self.ranks.iter_mut().for_each(|rank| rank.want(all));
        let moved = |group: &Group| group.ranks.iter().map(Rank::moved).collect::<Vec<_>>();
        let before = moved(self);
        self.phase(0, |rank, stream| in_turn(phases, Rank::dispatch, rank, stream))?;
        let sent = moved(self);
        each(&mut self.ranks, Rank::check_received)?;
        self.phase(0, |rank, stream| rank.combine(A2A_PHASE_BOTH, stream))?;
        let summed = moved(self);
        each(&mut self.ranks, |rank| rank.check_sums())?;
        let wire = |at: usize| {
            let grown = |from: &[[u64; 3]], to: &[[u64; 3]], what: usize| to[at][what] - from[at][what];
            let dispatched = grown(&before, &sent, 0) + grown(&before, &sent, 2);
            [dispatched, grown(&sent, &summed, 1) + grown(&sent, &summed, 2)]
        };
        Ok((0..self.ranks.len()).map(wire).collect())
    }

    /// What a dispatch, and a combine, of these ranks come to.
    fn bytes(&self, of: std::ops::Range<usize>, wire: &[[u64; 2]]) -> [Bytes; 2] {
        let shape = &self.shape;
        let given = shape.kind.given_bytes(shape.hidden) as u64;
        let token = shape.kind.wire_bytes(shape.hidden) as u64;
        let result = (shape.hidden * shape.kind.float().bytes()) as u64;
        let layout = self.ranks[0].pair.oracle_layout();
        let gates = || self.ranks.iter().map(|rank| &rank.gate);
        let all = of.len() == self.ranks.len();
        let [mut dispatch, mut combine] = [Bytes::default(); 2];
        for rank in of {
            let gate = &self.ranks[rank].gate;
            let (sent, received) = gate.rows();
            // In rows of the layout.
            let pushed: u64 = gates().map(|gate| gate.rows_from(rank)).sum();
            let arrived: u64 = (0..self.ranks.len()).map(|source| gate.rows_from(source)).sum();
            let (pulled, staged) = match layout.by_expert() {
                true => (pushed, arrived),
                false => (sent, received),
            };
            let busiest = if all { sent.max(received) } else { sent };
            dispatch.logical = dispatch.logical.max(busiest * token);
            combine.logical = combine.logical.max(busiest * result);
            dispatch.wire = dispatch.wire.max(wire[rank][0]);
            combine.wire = combine.wire.max(wire[rank][1]);
            dispatch.memory += shape.tokens as u64 * given + pushed * token;
            combine.memory += (shape.tokens as u64 + pulled) * result;
            if self.ranks[rank].stages() {
                combine.memory += 2 * staged * result;
            }
        }
        [dispatch, combine]
    }

    /// Every rank at once.
    fn time_all(&mut self, call: impl Fn(&mut Rank, Stream) -> Result<(), String>) -> Result<f64, String> {
        let us = self.gpu.time_all(|rank, stream| call(&mut self.ranks[rank], stream))?;
        self.settle()?;
        Ok(us)
    }

    /// Rank 0's `phases` of an operation alone. The others have sent, and are done, before; they receive afterwards.
    fn time_first(&mut self, phases: &[a2a_phase_t], call: Operation) -> Result<f64, String> {
        // They send no tokens: their rows would drive rank 0's out of the cache before it is timed.
        self.ranks.iter_mut().skip(1).for_each(|rank| rank.quiet = true);
        self.phase(1, |rank, stream| call(rank, A2A_PHASE_SEND, stream))?;
        let first = &mut self.ranks[0];
        let us = self.gpu.time_first(|stream| in_turn(phases, call, first, stream))?;
        self.phase(1, |rank, stream| call(rank, A2A_PHASE_RECV, stream))?;
        self.ranks.iter_mut().for_each(|rank| rank.quiet = false);
        Ok(us)
    }

    /// An operation in `phases`, of every rank at once or of rank 0 alone.
    fn time(&mut self, all: bool, phases: &[a2a_phase_t], call: Operation) -> Result<f64, String> {
        match all {
            true => self.time_all(|rank, stream| in_turn(phases, call, rank, stream)),
            false => self.time_first(phases, call),
        }
    }

    /// A dispatch of two calls. It follows a combine, as the whole dispatch does (a dispatch that follows a dispatch
    /// first waits for all to have read their rows), and is followed by one that is not timed.
    fn time_split(&mut self, all: bool) -> Result<f64, String> {
        let us = self.time(all, SPLIT, Rank::dispatch)?;
        self.time(all, WHOLE, Rank::combine)?;
        Ok(us)
    }
}

fn measure(shape: &Shape) -> Result<Vec<Timed>, String> {
    let pair = Pair::named(&shape.pair)?;
    let mut group = Group::new(shape, pair)?;
    let wire = group.check(WHOLE, true)?;
    let split_wire = if shape.split { group.check(SPLIT, true)? } else { wire.clone() };
    group.ranks.iter_mut().for_each(|rank| rank.want(false));

    let staged = if shape.staged || !pair.keeps_rows() { "_staged" } else { "" };
    let mut timed = Vec::new();
    for scope in &shape.scopes {
        let all = scope == "all";
        // NVLINK_TWO_SIDED moves rows in RECV: no rank can be done before its peers are.
        if !all && !pair.keeps_rows() {
            continue;
        }
        let of = if all { 0..shape.ranks } else { 0..1 };
        let [split_dispatch, _] = group.bytes(of.clone(), &split_wire);
        let [dispatch, combine] = group.bytes(of, &wire);
        let (mut sent, mut summed, mut both, mut split) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for iteration in 0..shape.warmup + shape.iterations {
            let d = group.time(all, WHOLE, Rank::dispatch)?;
            let c = group.time(all, WHOLE, Rank::combine)?;
            // Peers cannot have sent their results before they have received: there is no pair of one rank.
            let b = if all { Some(group.time_all(Rank::pair)?) } else { None };
            let s = if shape.split { Some(group.time_split(all)?) } else { None };
            if iteration >= shape.warmup {
                sent.push(d);
                summed.push(c);
                both.extend(b);
                split.extend(s);
            }
        }
        let mut leave = |operation: String, times: Vec<f64>, bytes: Bytes| {
            if !times.is_empty() {
                timed.push(Timed { scope: scope.clone(), operation, times, bytes });
            }
        };
        leave("dispatch".into(), sent, dispatch);
        leave("dispatch_split".into(), split, split_dispatch);
        leave(format!("combine{staged}"), summed, combine);
        leave(format!("pair{staged}"), both, dispatch + combine);
        if all && shape.graph {
            let Group { gpu, ranks, .. } = &mut group;
            let capture = |(rank, it): (usize, &mut Rank)| gpu.capture(rank, |stream| it.pair(stream));
            let graphs: Vec<_> = ranks.iter_mut().enumerate().map(capture).collect::<Result<_, _>>()?;
            let replayed = repeat(shape, || {
                let us = group.gpu.time_all(|rank, stream| graphs[rank].launch(stream))?;
                group.settle()?;
                Ok(us)
            })?;
            leave(format!("pair{staged}_graph"), replayed, dispatch + combine);
        }
    }
    // What was right before the clock ran must still be, with the outputs that were timed.
    group.check(WHOLE, false)?;
    if shape.split {
        group.check(SPLIT, false)?;
    }
    Ok(timed)
}

/// `Rank::dispatch` or `Rank::combine`.
type Operation = fn(&mut Rank, a2a_phase_t, Stream) -> Result<(), String>;

/// An operation's phases, a call for each, one behind the other on the stream.
fn in_turn(phases: &[a2a_phase_t], call: Operation, rank: &mut Rank, stream: Stream) -> Result<(), String> {
    phases.iter().try_for_each(|&phase| call(rank, phase, stream))
}
