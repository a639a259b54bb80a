//! Every backend with a GPU for each rank, beside what the links carry: copies, and NCCL's collectives, of the same bytes in the
//! same run.
//!
//! A rank is a process. Operations take turns, iteration by iteration, each behind a gate (`gpu`) that opens once all ranks
//! have made their calls; its time is that of the slowest rank. A row's logical bytes are those that must cross a link into
//! the busiest rank (or out of it, in a combine): what a rank has for itself does not count.

use std::io::Write;
use std::ptr::null_mut;
use std::time::Duration;

use a2a::abi::types::*;
use cudarc::driver::sys;
use nccl_sys::Nccl;
use serde::{Deserialize, Serialize};

use crate::bare_nccl::{BareNccl, Part};
use crate::conformance::common::cuda::{self, ok};
use crate::conformance::common::{BF16, GroupId, Host, Seat, Tensor, choose_device, launch};
use crate::gate::Gate;
use crate::gpu::{Gpu, Stream, describe};
use crate::meeting::{LIMIT, Meeting};
use crate::one_gpu::{Rank, tensor_bytes};
use crate::routing::Routing;
use crate::row::{Row, percentile};
use crate::shape::{Kind, PAIRS, Pair, Shape};

/// Steps of a captured graph.
const BATCH: usize = 10;
const ROUTING: &str = "hash";
/// The copy that says what a link carries.
const LONG_COPY: usize = 256 << 20;

#[derive(clap::Args, Clone, Debug)]
pub struct Links {
    /// Ranks, each a process; rank r has GPU r % the number of GPUs
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Tokens of each rank
    #[arg(long, default_value = "1,8,32,128,512,2048,4096", value_delimiter = ',')]
    tokens: Vec<usize>,
    /// bf16, fp8 (bf16 that dispatch quantises) or f8 (given so, with scales)
    #[arg(long, default_value = "bf16,fp8", value_delimiter = ',', value_parser = Kind::parse)]
    dtype: Vec<Kind>,
    /// Hidden size
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts of the group
    #[arg(long, default_value_t = 256)]
    experts: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// Backends; all without it
    #[arg(long, value_delimiter = ',')]
    backends: Vec<String>,
    /// Multiprocessors of a GPU that a backend may use; 0: its own choice
    #[arg(long, default_value_t = 0)]
    sms: i32,
    /// Iterations before those that count
    #[arg(long, default_value_t = 10)]
    warmup: usize,
    /// Iterations that count
    #[arg(long, default_value_t = 60)]
    iterations: usize,
    /// Seconds until a number of tokens is given up
    #[arg(long, default_value_t = 300)]
    limit: u64,
}

/// Times of an operation on one rank, or why there are none.
#[derive(Serialize, Deserialize)]
struct Timed {
    of: String,
    operation: String,
    /// Microseconds, an entry an iteration.
    times: Vec<f64>,
    link_bytes: u64,
    refused: Option<String>,
}

impl Timed {
    fn refused(of: &str, why: String) -> Timed {
        let (of, operation) = (of.into(), "all".into());
        Timed { of, operation, times: Vec::new(), link_bytes: 0, refused: Some(why) }
    }
}

/// A backend, and the group that measures it.
#[derive(Serialize, Deserialize)]
struct Entry {
    pair: String,
    group: String,
}

impl Links {
    pub fn run(&self, out: &mut dyn Write) -> Result<bool, String> {
        choose_device("cuda:rank")?;
        let pairs: Vec<Pair> = match self.backends.is_empty() {
            true => PAIRS.to_vec(),
            false => self.backends.iter().map(|name| Pair::named(name)).collect::<Result<_, _>>()?,
        };
        let failed = |error: std::io::Error| error.to_string();
        let (_, line) = describe(0)?;
        let count = cuda::count();
        writeln!(out, "# {count} GPUs, the first: {line}").map_err(failed)?;
        if count < self.ranks {
            writeln!(out, "# ranks share GPUs: not timings of links").map_err(failed)?;
        }
        let nccl = Nccl::get().map_err(|why| why.to_string());
        let with_nccl = nccl.is_ok();
        match nccl {
            Ok(nccl) => writeln!(out, "# NCCL {}", nccl.version()),
            Err(why) => writeln!(out, "# without NCCL beside it: {why}"),
        }
        .map_err(failed)?;
        writeln!(
            out,
            "# {} rank processes, hidden {}, {} of {} experts; {} iterations of the slowest rank, microseconds an operation",
            self.ranks, self.hidden, self.topk, self.experts, self.iterations
        )
        .map_err(failed)?;
        let mut right = true;
        let mut headed = false;
        for &kind in &self.dtype {
            for &tokens in &self.tokens {
                let timed = match self.measure(&pairs, kind, tokens, with_nccl) {
                    Ok(timed) => timed,
                    Err(why) => vec![Timed::refused("all", why)],
                };
                let mut said = String::new();
                for Timed { of, refused, .. } in &timed {
                    let Some(why) = refused.as_ref().filter(|_| *of != said) else { continue };
                    right &= why.contains("A2A_OUT_OF_MEMORY") || why.contains("A2A_UNSUPPORTED");
                    let (what, why) = (format!("{tokens} tokens of {}", kind.name()), why.replace('\n', " "));
                    writeln!(out, "# no time of {of}, {what}: {why}").map_err(failed)?;
                    said.clone_from(of);
                }
                let mut csv = csv::WriterBuilder::new().has_headers(!headed).from_writer(&mut *out);
                for timed in timed.into_iter().filter(|timed| timed.refused.is_none()) {
                    csv.serialize(self.row(kind, tokens, timed)).map_err(|error| error.to_string())?;
                    headed = true;
                }
                csv.flush().map_err(failed)?;
            }
        }
        Ok(right)
    }

    fn row(&self, kind: Kind, tokens: usize, timed: Timed) -> Row {
        let Timed { of, operation, mut times, link_bytes, .. } = timed;
        times.sort_by(f64::total_cmp);
        let [p10, p50, p90, p99] = [10, 50, 90, 99].map(|percent| percentile(&times, percent));
        let pair = Pair::named(&of).ok();
        Row {
            device: "cuda".into(),
            backend: pair.map_or(of, |pair| pair.backend_name.into()),
            layout: pair.map_or("", |pair| pair.layout_name).into(),
            ranks: self.ranks,
            mode: "processes".into(),
            tokens,
            hidden: self.hidden,
            dtype: kind.name().into(),
            experts: self.experts,
            topk: self.topk,
            routing: ROUTING.into(),
            operation,
            cache: "warm".into(),
            iterations: times.len(),
            p50_us: p50,
            p99_us: p99,
            logical_bytes: link_bytes,
            wire_bytes: 0,
            scope: "links".into(),
            p10_us: Some(p10),
            p90_us: Some(p90),
            memory_bytes: 0,
        }
    }

    /// The slowest rank's times of all that is compared.
    fn measure(&self, pairs: &[Pair], kind: Kind, tokens: usize, nccl: bool) -> Result<Vec<Timed>, String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let shape = Shape {
            nccl,
            ranks: self.ranks,
            tokens,
            hidden: self.hidden,
            experts: self.experts,
            topk: self.topk,
            kind,
            routing: ROUTING.into(),
            seed: 1,
            warmup: self.warmup,
            iterations: self.iterations,
            max_sms: self.sms,
            directory: directory.path().to_string_lossy().into_owned(),
            ..Shape::default()
        };
        Meeting::place(&shape.directory)?;
        let entry = |pair: &Pair| Entry { pair: pair.name.into(), group: GroupId::new().to_hex() };
        let entries: Vec<Entry> = pairs.iter().map(entry).collect();
        let text = |error: serde_json::Error| error.to_string();
        let args =
            [serde_json::to_string(&shape).map_err(text)?, serde_json::to_string(&entries).map_err(text)?];
        let hosts: Vec<Host> = (0..self.ranks).map(|rank| Host::Child(vec![rank])).collect();
        launch(crate::OVER_LINKS, self.ranks, &hosts, &args, Duration::from_secs(self.limit))?;
        let mut slowest: Vec<Timed> = shape.left(0)?;
        for rank in 1..self.ranks {
            let own: Vec<Timed> = shape.left(rank)?;
            for (slowest, own) in slowest.iter_mut().zip(own) {
                if slowest.refused.is_none() {
                    slowest.refused = own.refused;
                }
                slowest.link_bytes = slowest.link_bytes.max(own.link_bytes);
                slowest
                    .times
                    .iter_mut()
                    .zip(own.times)
                    .for_each(|(slowest, own)| *slowest = slowest.max(own));
            }
        }
        Ok(slowest)
    }
}

// ------------------------------------------------------------------------------------------------- a rank's part

/// Operations that take turns: name, and what puts it on the stream so many times.
struct Turn<'a> {
    operation: &'static str,
    times: usize,
    link_bytes: u64,
    put: Box<dyn FnMut(Stream) -> Result<(), String> + 'a>,
}

/// The job of a rank process.
pub fn job(seat: &Seat) -> Result<(), String> {
    let text = |error: serde_json::Error| error.to_string();
    let shape: Shape = serde_json::from_str(&seat.args[0]).map_err(text)?;
    let entries: Vec<Entry> = serde_json::from_str(&seat.args[1]).map_err(text)?;
    let pairs = entries.iter().map(|entry| Pair::named(&entry.pair)).collect::<Result<Vec<_>, _>>()?;
    // Tensors of one backend after another, and of what is beside them.
    let largest = pairs.iter().map(|pair| tensor_bytes(&shape, *pair)).max().unwrap_or(0);
    let rows = shape.ranks * shape.tokens * shape.hidden * 2;
    cuda::grow(largest + 4 * rows + (64 << 20))?;
    let gpu = Gpu::new(1)?;

    // Where all come again that have failed to meet at a backend's own place.
    let beside = Meeting::open(&shape.directory, shape.ranks, 0, 3 * LIMIT)?;
    let mut timed = measure_beside(seat, &shape, &gpu, &beside)?;
    for (at, (entry, pair)) in entries.iter().zip(pairs).enumerate() {
        // A place of its own: who fails comes to it no more.
        let meeting = Meeting::open(&shape.directory, shape.ranks, at + 1, LIMIT)?;
        let seat = Seat { id: GroupId::from_hex(&entry.group), args: Vec::new(), ..*seat };
        match measure(&seat, &shape, pair, &gpu, &meeting) {
            Ok(times) => timed.extend(times),
            // As many as there are otherwise: the parent compares rank by rank.
            Err(why) => timed.extend(
                ["dispatch", "combine", "pair_graph"].map(|_| Timed::refused(pair.name, why.clone())),
            ),
        }
        beside.wait()?;
    }
    shape.leave(seat.rank, &timed)
}

/// Each in its turn, iteration by iteration.
fn take_turns(
    of: &str,
    shape: &Shape,
    gpu: &Gpu,
    meeting: &Meeting,
    mut turns: Vec<Turn>,
    after: impl Fn() -> Result<(), String>,
) -> Result<Vec<Timed>, String> {
    let mut times = vec![Vec::with_capacity(shape.iterations); turns.len()];
    for iteration in 0..shape.warmup + shape.iterations {
        for (turn, times) in turns.iter_mut().zip(&mut times) {
            let [us, _] = meeting.time(gpu, &mut *turn.put)?;
            if iteration >= shape.warmup {
                times.push(us / turn.times as f64);
            }
        }
        after()?;
    }
    let timed = turns.iter().zip(times).map(|(turn, times)| Timed {
        of: of.into(),
        operation: turn.operation.into(),
        times,
        link_bytes: turn.link_bytes,
        refused: None,
    });
    Ok(timed.collect())
}

/// A dispatch, a combine, and steps in a graph, of one backend.
fn measure(
    seat: &Seat,
    shape: &Shape,
    pair: Pair,
    gpu: &Gpu,
    meeting: &Meeting,
) -> Result<Vec<Timed>, String> {
    let shape = &Shape { pair: pair.name.into(), nccl: false, ..shape.clone() };
    let rank = &mut Rank::new(seat, shape, pair)?;
    rank.check_step(gpu, true)?;
    rank.want(false);
    meeting.wait()?;
    let graph = gpu.capture(0, |stream| (0..BATCH).try_for_each(|_| rank.pair(stream)))?;
    let [dispatched, combined] = link_bytes(rank.gate(), shape, pair, seat.rank);
    let shared = std::cell::RefCell::new(rank);
    let turns = vec![
        Turn {
            operation: "dispatch",
            times: 1,
            link_bytes: dispatched,
            put: Box::new(|stream| shared.borrow_mut().dispatch(A2A_PHASE_BOTH, stream)),
        },
        Turn {
            operation: "combine",
            times: 1,
            link_bytes: combined,
            put: Box::new(|stream| shared.borrow_mut().combine(A2A_PHASE_BOTH, stream)),
        },
        Turn {
            operation: "pair_graph",
            times: BATCH,
            link_bytes: dispatched + combined,
            put: Box::new(|stream| graph.launch(stream)),
        },
    ];
    let timed = take_turns(pair.name, shape, gpu, meeting, turns, || shared.borrow().failure())?;
    // What was right before the clock ran must still be.
    shared.borrow_mut().check_step(gpu, false)?;
    meeting.wait()?;
    Ok(timed)
}

/// Bytes into this rank from others in a dispatch, and out of it to others in a combine.
fn link_bytes(gate: &Gate, shape: &Shape, pair: Pair, me: usize) -> [u64; 2] {
    let others = || (0..shape.ranks).filter(|peer| *peer != me);
    let laid_out: u64 = others().map(|peer| gate.rows_from(peer)).sum();
    let distinct: u64 = others().map(|peer| gate.rows_between(peer, me)).sum();
    let [dispatched, combined] = match pair.layout {
        A2A_LAYOUT_GATHERED => [laid_out, distinct],
        A2A_LAYOUT_EXPERT_PADDED => [laid_out, laid_out],
        // A token crosses once, its results for each expert.
        A2A_LAYOUT_EXPERT_CONTIGUOUS => [distinct, laid_out],
        _ => [distinct, distinct],
    };
    let result = shape.hidden * shape.kind.float().bytes();
    [dispatched * shape.kind.wire_bytes(shape.hidden) as u64, combined * result as u64]
}

/// Copies to the next rank's GPU by all ranks at once, and NCCL's collectives.
fn measure_beside(seat: &Seat, shape: &Shape, gpu: &Gpu, meeting: &Meeting) -> Result<Vec<Timed>, String> {
    let (ranks, me) = (shape.ranks, seat.rank);
    let gate = Gate::new(seat, shape, Pair::named("one_sided")?, &Routing::parse(&shape.routing)?)?;
    let others = || (0..ranks).filter(|peer| *peer != me);
    let [incoming, _] = link_bytes(&gate, shape, Pair::named("one_sided")?, me);
    let copies = Copies::new(LONG_COPY.max(incoming as usize))?;
    let copy = |operation, bytes: usize| Turn {
        operation,
        times: 1,
        link_bytes: bytes as u64,
        put: Box::new(move |stream| copies.put(bytes, stream)),
    };
    let turns = vec![copy("copy_256_mib", LONG_COPY), copy("dispatch", incoming as usize)];
    let mut timed = take_turns("peer copy", shape, gpu, meeting, turns, || Ok(()))?;
    if !shape.nccl {
        return Ok(timed);
    }

    let nccl = &BareNccl::new(&shape.directory, me, ranks, meeting)?;
    let token = shape.kind.wire_bytes(shape.hidden);
    let result = shape.hidden * 2;
    // Room for whatever of the two is longer.
    let room = shape.tokens * token.max(result);
    let all = Tensor::new(BF16, &[ranks * shape.tokens, room / shape.tokens.max(1) / 2]);
    let own = Tensor::new(BF16, &[ranks * shape.tokens, room / shape.tokens.max(1) / 2]);
    let (all, own) = (all.address(), own.address());
    let parts = |bytes: usize, back: bool| {
        let part = |peer: usize| {
            let [mut out, mut back_in] =
                [(me, peer), (peer, me)].map(|(a, b)| gate.rows_between(a, b) as usize * bytes);
            if back {
                std::mem::swap(&mut out, &mut back_in);
            }
            Part { peer, sent: (own + peer * room, out), received: (all + peer * room, back_in) }
        };
        others().map(part).collect::<Vec<_>>()
    };
    let (there, back) = (parts(token, false), parts(result, true));
    let gathered = (others().count() * shape.tokens) as u64;
    let count = shape.tokens * shape.hidden;
    let gather = |stream| nccl.gather(own, all, shape.tokens * token, stream);
    let reduce = |stream| nccl.reduce(all, own, count, stream);
    let out = |stream| nccl.exchange(&there, stream);
    let home = |stream| nccl.exchange(&back, stream);
    let mut combined = 0;
    back.iter().for_each(|part| combined += part.sent.1 as u64);
    // What NCCL connects at its first call is there before anything is timed.
    let stream = gpu.stream(0);
    gather(stream).and_then(|()| reduce(stream)).and_then(|()| out(stream)).and_then(|()| home(stream))?;
    gpu.synchronize()?;
    meeting.wait()?;
    let graphs = [
        gpu.capture(0, |stream| (0..BATCH).try_for_each(|_| gather(stream).and_then(|()| reduce(stream))))?,
        gpu.capture(0, |stream| (0..BATCH).try_for_each(|_| out(stream).and_then(|()| home(stream))))?,
    ];
    type Calls<'a> = [&'a dyn Fn(Stream) -> Result<(), String>; 2];
    let whole = [gathered * token as u64, gathered * result as u64];
    let compared: [(&str, Calls, [u64; 2]); 2] = [
        ("nccl_allgather_reducescatter", [&gather, &reduce], whole),
        ("nccl_alltoallv", [&out, &home], [incoming, combined]),
    ];
    for ((of, calls, bytes), graph) in compared.into_iter().zip(&graphs) {
        let turn = |operation, at: usize| Turn {
            operation,
            times: 1,
            link_bytes: bytes[at],
            put: Box::new(move |stream| calls[at](stream)),
        };
        let step = Turn {
            operation: "pair_graph",
            times: BATCH,
            link_bytes: bytes[0] + bytes[1],
            put: Box::new(|stream| graph.launch(stream)),
        };
        let turns = vec![turn("dispatch", 0), turn("combine", 1), step];
        timed.extend(take_turns(of, shape, gpu, meeting, turns, || Ok(()))?);
    }
    Ok(timed)
}

/// Copies by the driver from this rank's GPU to the next one; memory and contexts live as long as the process.
#[derive(Clone, Copy)]
struct Copies {
    from: (sys::CUcontext, sys::CUdeviceptr),
    to: (sys::CUcontext, sys::CUdeviceptr),
}

impl Copies {
    fn new(bytes: usize) -> Result<Copies, String> {
        let next = (cuda::ordinal() + 1) % cuda::count() as i32;
        let (mut own, mut other, mut device) = (null_mut(), null_mut(), 0);
        let (mut from, mut to) = (0, 0);
        // SAFETY: valid out-pointers; this thread's context is current again at the end.
        unsafe {
            ok("cuCtxGetCurrent", sys::cuCtxGetCurrent(&mut own))?;
            ok("cuMemAlloc", sys::cuMemAlloc_v2(&mut from, bytes))?;
            ok("cuDeviceGet", sys::cuDeviceGet(&mut device, next))?;
            ok("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut other, device))?;
            ok("cuCtxSetCurrent", sys::cuCtxSetCurrent(other))?;
            let taken = ok("cuMemAlloc on the next GPU", sys::cuMemAlloc_v2(&mut to, bytes));
            ok("cuCtxSetCurrent", sys::cuCtxSetCurrent(own))?;
            taken?;
            if other != own {
                // Without it the driver copies by way of the host.
                let enabled = sys::cuCtxEnablePeerAccess(other, 0);
                if enabled != sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED {
                    ok("cuCtxEnablePeerAccess", enabled)?;
                }
            }
        }
        Ok(Copies { from: (own, from), to: (other, to) })
    }

    fn put(&self, bytes: usize, stream: Stream) -> Result<(), String> {
        if bytes == 0 {
            return Ok(());
        }
        let (to, from) = (self.to, self.from);
        // SAFETY: memory of ours, at least so many bytes; a stream of the source's context.
        let copied = unsafe { sys::cuMemcpyPeerAsync(to.1, to.0, from.1, from.0, bytes, stream) };
        ok("cuMemcpyPeerAsync", copied)
    }
}
