//! ALLGATHER_REDUCESCATTER over NCCL, beside bare NCCL calls that move the same rows, in the same run.
//!
//! A rank is a process with a GPU of its own, or with its part of one. Operations take turns, iteration by iteration, each
//! behind a gate (`gpu`) that opens once all ranks have made their calls; its time is that of the slowest rank.

use std::io::Write;
use std::time::Duration;

use a2a::abi::types::*;
use nccl_sys::Nccl;

use crate::bare_nccl::{BareNccl, Part};
use crate::conformance::common::{BF16, F32, Host, I32, Seat, Tensor, choose_device, cuda, launch};
use crate::gpu::{Gpu, Graph, Stream, describe};
use crate::meeting::{LIMIT, Meeting};
use crate::one_gpu::Rank;
use crate::row::percentile;
use crate::shape::{Pair, Shape};

/// Operations of a batch, one behind the other without a meeting.
const BATCH: usize = 10;

#[derive(clap::Args, Clone, Debug)]
pub struct Beside {
    /// Ranks, each a process; rank r has GPU r % the number of GPUs (two on one: NCCL from 2.30 on, and
    /// NCCL_MULTI_RANK_GPU_ENABLE=1)
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Tokens of each rank
    #[arg(long, default_value = "1,8,32,128,512,2048,4096", value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Hidden size; bf16
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts of the group
    #[arg(long, default_value_t = 256)]
    experts: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// Iterations before those that count
    #[arg(long, default_value_t = 10)]
    warmup: usize,
    /// Iterations that count
    #[arg(long, default_value_t = 100)]
    iterations: usize,
    /// Seconds until a shape is given up
    #[arg(long, default_value_t = 120)]
    limit: u64,
}

/// By name: microseconds, an entry an iteration.
type Times = Vec<(String, Vec<f64>)>;

/// Ours, what it is compared with, and what one time of theirs stands for.
const COMPARED: [(&str, &str, &str); 6] = [
    ("dispatch", "bare_gather", "dispatch"),
    ("combine", "bare_scatter", "combine, our sum"),
    ("combine_nccl_sum", "bare_reduce", "combine, NCCL's sum"),
    ("pair", "bare_pair", "dispatch and combine, 10 in a row"),
    ("pair_graph", "bare_pair_graph", "the same, captured"),
    ("pair_host", "bare_pair_host", "the same, the host's calls"),
];

impl Beside {
    pub fn run(&self, out: &mut dyn Write) -> Result<(), String> {
        choose_device("cuda:rank")?;
        let failed = |error: std::io::Error| error.to_string();
        let nccl = Nccl::get().map_err(|why| why.to_string())?;
        let (_, line) = describe(0)?;
        writeln!(out, "# gpu: {line}; NCCL {}", nccl.version()).map_err(failed)?;
        writeln!(
            out,
            "# {} rank processes, hidden {} bf16, {} of {} experts; p50 of {} iterations of the slowest rank, microseconds an operation",
            self.ranks, self.hidden, self.topk, self.experts, self.iterations
        )
        .map_err(failed)?;
        writeln!(out, "tokens,operation,bare_us,ours_us,more_us,ratio").map_err(failed)?;
        for &tokens in &self.tokens {
            let times = self.measure(tokens)?;
            let p50 = |name: &str| {
                let found = times.iter().find(|(known, _)| known == name);
                let (_, times) = found.ok_or(format!("no time of {name}"))?;
                let mut sorted = times.clone();
                sorted.sort_by(f64::total_cmp);
                Ok::<f64, String>(percentile(&sorted, 50))
            };
            for (ours, bare, what) in COMPARED {
                let (ours, bare) = (p50(ours)?, p50(bare)?);
                let (more, ratio) = (ours - bare, ours / bare);
                writeln!(out, "{tokens},\"{what}\",{bare:.2},{ours:.2},{more:.2},{ratio:.3}")
                    .map_err(failed)?;
            }
            out.flush().map_err(failed)?;
        }
        Ok(())
    }

    /// The slowest rank's times of one shape.
    fn measure(&self, tokens: usize) -> Result<Times, String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let shape = Shape {
            pair: "allgather".into(),
            nccl: true,
            ranks: self.ranks,
            tokens,
            hidden: self.hidden,
            experts: self.experts,
            topk: self.topk,
            routing: "hash".into(),
            seed: 1,
            warmup: self.warmup,
            iterations: self.iterations,
            directory: directory.path().to_string_lossy().into_owned(),
            ..Shape::default()
        };
        Meeting::place(&shape.directory)?;
        let hosts: Vec<Host> = (0..self.ranks).map(|rank| Host::Child(vec![rank])).collect();
        let args = [serde_json::to_string(&shape).map_err(|error| error.to_string())?];
        launch(crate::OVER_NCCL, self.ranks, &hosts, &args, Duration::from_secs(self.limit))?;
        let mut slowest: Times = Vec::new();
        for rank in 0..self.ranks {
            let times: Times = shape.left(rank)?;
            if rank == 0 {
                slowest = times;
                continue;
            }
            for ((_, slowest), (_, times)) in slowest.iter_mut().zip(times) {
                slowest.iter_mut().zip(times).for_each(|(slowest, time)| *slowest = slowest.max(time));
            }
        }
        Ok(slowest)
    }
}

// ------------------------------------------------------------------------------------------------- a rank's part

/// The same rows by NCCL's calls alone.
struct Bare {
    nccl: BareNccl,
    shape: Shape,
    rank: usize,
    /// All ranks' tokens, ids and weights; everybody's results for this rank's tokens; their sums.
    gathered: [Tensor; 3],
    brought: Tensor,
    sums: Tensor,
}

impl Bare {
    fn new(shape: &Shape, rank: usize, meeting: &Meeting) -> Result<Bare, String> {
        let nccl = BareNccl::new(&shape.directory, rank, shape.ranks, meeting)?;
        let all = shape.ranks * shape.tokens;
        Ok(Bare {
            nccl,
            rank,
            gathered: [
                Tensor::new(BF16, &[all, shape.hidden]),
                Tensor::new(I32, &[all, shape.topk]),
                Tensor::new(F32, &[all, shape.topk]),
            ],
            brought: Tensor::new(BF16, &[all, shape.hidden]),
            sums: Tensor::new(BF16, &[shape.tokens, shape.hidden]),
            shape: shape.clone(),
        })
    }

    /// What a dispatch gathers.
    fn gather(&self, ours: &Rank, stream: Stream) -> Result<(), String> {
        let input = ours.input();
        let planes = [&input.tokens, &input.topk_ids, &input.topk_weights];
        self.nccl.group(|| {
            for (from, to) in planes.into_iter().zip(&self.gathered) {
                let from = from.as_ref().ok_or("no such plane")?;
                let bytes = from.shape().iter().product::<usize>() * usize::from(from.dtype().bits) / 8;
                self.nccl.gather(from.address(), to.address(), bytes, stream)?;
            }
            Ok(())
        })
    }

    /// What a combine brings: the others' results for this rank's tokens.
    fn scatter(&self, stream: Stream) -> Result<(), String> {
        let bytes = self.shape.tokens * self.shape.hidden * 2;
        let others = (0..self.shape.ranks).filter(|peer| *peer != self.rank);
        let part = |peer: usize| Part {
            peer,
            sent: (self.gathered[0].address() + peer * bytes, bytes),
            received: (self.brought.address() + peer * bytes, bytes),
        };
        self.nccl.exchange(&others.map(part).collect::<Vec<_>>(), stream)
    }

    fn reduce(&self, stream: Stream) -> Result<(), String> {
        let count = self.shape.tokens * self.shape.hidden;
        self.nccl.reduce(self.gathered[0].address(), self.sums.address(), count, stream)
    }

    fn pair(&self, ours: &Rank, stream: Stream) -> Result<(), String> {
        self.gather(ours, stream)?;
        self.scatter(stream)
    }
}

/// The job of a rank process.
pub fn job(seat: &Seat) -> Result<(), String> {
    let shape: Shape = serde_json::from_str(&seat.args[0]).map_err(|error| error.to_string())?;
    shape.leave(seat.rank, &measure(seat, &shape)?)
}

fn measure(seat: &Seat, shape: &Shape) -> Result<Times, String> {
    let meeting = Meeting::open(&shape.directory, shape.ranks, 0, LIMIT)?;
    let rows = shape.ranks * shape.tokens;
    cuda::grow(8 * rows * (2 * shape.hidden + 64 * shape.topk) + (64 << 20))?;
    let gpu = Gpu::new(1)?;
    let bare = Bare::new(shape, seat.rank, &meeting)?;
    let mut ours = Rank::new(seat, shape, Pair::named(&shape.pair)?)?;
    ours.check_step(&gpu, true)?;
    // What NCCL connects at its first call is there before anything is timed.
    bare.pair(&ours, gpu.stream(0))?;
    bare.reduce(gpu.stream(0))?;
    gpu.synchronize()?;
    ours.want(false);

    let graph_of = |call: &mut dyn FnMut(Stream) -> Result<(), String>| -> Result<Graph, String> {
        meeting.wait()?;
        gpu.capture(0, |stream| (0..BATCH).try_for_each(|_| call(stream)))
    };
    let bare_graph = graph_of(&mut |stream| bare.pair(&ours, stream))?;
    let graph = graph_of(&mut |stream| ours.pair(stream))?;

    let mut times: Times = Vec::new();
    for iteration in 0..shape.warmup + shape.iterations {
        let mut note = |name: &str, us: f64| {
            if iteration < shape.warmup {
                return;
            }
            match times.iter_mut().find(|(known, _)| known == name) {
                Some((_, times)) => times.push(us),
                None => times.push((name.into(), vec![us])),
            }
        };
        let timed = |call: &mut dyn FnMut(Stream) -> Result<(), String>| meeting.time(&gpu, call);
        let each = BATCH as f64;
        note("bare_gather", timed(&mut |stream| bare.gather(&ours, stream))?[0]);
        note("dispatch", timed(&mut |stream| ours.dispatch(A2A_PHASE_BOTH, stream))?[0]);
        note("bare_scatter", timed(&mut |stream| bare.scatter(stream))?[0]);
        note("combine", timed(&mut |stream| ours.combine(A2A_PHASE_BOTH, stream))?[0]);
        note("bare_reduce", timed(&mut |stream| bare.reduce(stream))?[0]);
        ours.dispatch(A2A_PHASE_BOTH, gpu.stream(0))?;
        gpu.synchronize()?;
        ours.combine_flags = A2A_COMBINE_NCCL_SUM;
        note("combine_nccl_sum", timed(&mut |stream| ours.combine(A2A_PHASE_BOTH, stream))?[0]);
        ours.combine_flags = 0;
        let in_a_row = timed(&mut |stream| (0..BATCH).try_for_each(|_| bare.pair(&ours, stream)))?;
        note("bare_pair", in_a_row[0] / each);
        note("bare_pair_host", in_a_row[1] / each);
        let in_a_row = timed(&mut |stream| (0..BATCH).try_for_each(|_| ours.pair(stream)))?;
        note("pair", in_a_row[0] / each);
        note("pair_host", in_a_row[1] / each);
        note("bare_pair_graph", timed(&mut |stream| bare_graph.launch(stream))?[0] / each);
        note("pair_graph", timed(&mut |stream| graph.launch(stream))?[0] / each);
        ours.failure()?;
    }
    // What was right before the clock ran must still be.
    ours.check_step(&gpu, false)?;
    meeting.wait()?;
    Ok(times)
}
