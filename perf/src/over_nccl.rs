//! ALLGATHER_REDUCESCATTER over NCCL, beside bare NCCL calls that move the same rows, in the same run.
//!
//! A rank is a process with a GPU of its own, or with its part of one. Operations take turns, iteration by iteration, each
//! behind a gate (`gpu`) that opens once all ranks have made their calls; its time is that of the slowest rank.

use std::ffi::c_void;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use a2a::abi::types::*;
use nccl_sys::{Nccl, ncclBfloat16, ncclComm_t, ncclResult_t, ncclSuccess, ncclSum, ncclUint8, ncclUniqueId};

use crate::conformance::common::{BF16, F32, Host, I32, Seat, Tensor, choose_device, cuda, launch};
use crate::gpu::{Gpu, Graph, Stream, describe};
use crate::one_gpu::Rank;
use crate::row::percentile;
use crate::shape::{Kind, Pair, Shape};

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
            kind: Kind::Bf16,
            routing: "hash".into(),
            seed: 1,
            warmup: self.warmup,
            iterations: self.iterations,
            caches: Vec::new(),
            scopes: Vec::new(),
            graph: true,
            split: false,
            staged: false,
            max_recv_rows: 0,
            max_sms: 0,
            directory: directory.path().to_string_lossy().into_owned(),
        };
        Meeting::place(&shape)?;
        let hosts: Vec<Host> = (0..self.ranks).map(|rank| Host::Child(vec![rank])).collect();
        let args = [serde_json::to_string(&shape).map_err(|error| error.to_string())?];
        launch(crate::OVER_NCCL, self.ranks, &hosts, &args, Duration::from_secs(self.limit))?;
        let mut slowest: Times = Vec::new();
        for rank in 0..self.ranks {
            let path = format!("{}/{rank}.json", shape.directory);
            let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
            let times: Times = serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))?;
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

/// Where all ranks' processes meet: a word of a file that all have mapped.
struct Meeting {
    word: &'static AtomicU32,
    ranks: u32,
    met: std::cell::Cell<u32>,
}

impl Meeting {
    fn path(shape: &Shape) -> String {
        format!("{}/meeting", shape.directory)
    }
    fn place(shape: &Shape) -> Result<(), String> {
        std::fs::write(Meeting::path(shape), [0; 4096]).map_err(|error| error.to_string())
    }
    fn open(shape: &Shape) -> Result<Meeting, String> {
        let file = File::options().read(true).write(true).open(Meeting::path(shape));
        let file = file.map_err(|error| error.to_string())?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a file of 4096 bytes, which lasts as long as the process.
        let at = unsafe { libc::mmap(null_mut(), 4096, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().to_string());
        }
        // SAFETY: mapped for good, aligned, and atomic for all who have it.
        let word = unsafe { &*at.cast::<AtomicU32>() };
        Ok(Meeting { word, ranks: shape.ranks as u32, met: std::cell::Cell::new(0) })
    }
    fn wait(&self) -> Result<(), String> {
        self.met.set(self.met.get() + self.ranks);
        self.word.fetch_add(1, Ordering::AcqRel);
        let begun = Instant::now();
        while self.word.load(Ordering::Acquire) < self.met.get() {
            std::hint::spin_loop();
            if begun.elapsed() > Duration::from_secs(60) {
                return Err("a rank did not come to a meeting in 60 s".into());
            }
        }
        Ok(())
    }
}

/// NCCL as an engine calls it: a communicator as it is by default, one group a call.
struct Bare {
    nccl: &'static Nccl,
    comm: ncclComm_t,
    shape: Shape,
    rank: usize,
    /// All ranks' tokens, ids and weights; everybody's results for this rank's tokens; their sums.
    gathered: [Tensor; 3],
    brought: Tensor,
    sums: Tensor,
}

fn ok(what: &str, result: ncclResult_t) -> Result<(), String> {
    if result == ncclSuccess { Ok(()) } else { Err(format!("{what}: NCCL returned {result}")) }
}

impl Bare {
    fn new(shape: &Shape, rank: usize, meeting: &Meeting) -> Result<Bare, String> {
        let nccl = Nccl::get().map_err(|why| why.to_string())?;
        let path = format!("{}/id", shape.directory);
        let mut id = ncclUniqueId { internal: [0; 128] };
        if rank == 0 {
            // SAFETY: a valid out-pointer.
            ok("ncclGetUniqueId", unsafe { (nccl.ncclGetUniqueId)(&mut id) })?;
            std::fs::write(&path, id.internal).map_err(|error| error.to_string())?;
        }
        meeting.wait()?;
        id.internal.copy_from_slice(&std::fs::read(&path).map_err(|error| error.to_string())?);
        let mut comm = null_mut();
        let (ranks, me, config) = (shape.ranks as i32, rank as i32, &mut Default::default());
        // SAFETY: the same id on all ranks, which all call this now.
        let made = unsafe { (nccl.ncclCommInitRankConfig)(&mut comm, ranks, id, me, config) };
        ok("ncclCommInitRankConfig", made)?;
        let all = shape.ranks * shape.tokens;
        Ok(Bare {
            nccl,
            comm,
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

    fn group(&self, calls: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        // SAFETY: paired.
        ok("ncclGroupStart", unsafe { (self.nccl.ncclGroupStart)() })?;
        calls()?;
        // SAFETY: as above.
        ok("ncclGroupEnd", unsafe { (self.nccl.ncclGroupEnd)() })
    }

    /// What a dispatch gathers.
    fn gather(&self, ours: &Rank, stream: Stream) -> Result<(), String> {
        let input = ours.input();
        let planes = [&input.tokens, &input.topk_ids, &input.topk_weights];
        self.group(|| {
            for (from, to) in planes.into_iter().zip(&self.gathered) {
                let from = from.as_ref().ok_or("no such plane")?;
                let bytes = from.shape().iter().product::<usize>() * usize::from(from.dtype().bits) / 8;
                let (from, to) = (from.address() as *const c_void, to.address() as *mut c_void);
                // SAFETY: tensors of this many bytes, and of as many from each rank.
                let sent = unsafe {
                    (self.nccl.ncclAllGather)(from, to, bytes, ncclUint8, self.comm, stream.cast())
                };
                ok("ncclAllGather", sent)?;
            }
            Ok(())
        })
    }

    /// What a combine brings: the others' results for this rank's tokens.
    fn scatter(&self, stream: Stream) -> Result<(), String> {
        let bytes = self.shape.tokens * self.shape.hidden * 2;
        self.group(|| {
            for peer in (0..self.shape.ranks).filter(|peer| *peer != self.rank) {
                let from = (self.gathered[0].address() + peer * bytes) as *const c_void;
                let to = (self.brought.address() + peer * bytes) as *mut c_void;
                // SAFETY: parts of tensors, of this many bytes each.
                unsafe {
                    let (to_peer, stream) = (peer as i32, stream.cast());
                    let sent = (self.nccl.ncclSend)(from, bytes, ncclUint8, to_peer, self.comm, stream);
                    ok("ncclSend", sent)?;
                    let due = (self.nccl.ncclRecv)(to, bytes, ncclUint8, to_peer, self.comm, stream);
                    ok("ncclRecv", due)?;
                }
            }
            Ok(())
        })
    }

    fn reduce(&self, stream: Stream) -> Result<(), String> {
        let (from, to) = (self.gathered[0].address() as *const c_void, self.sums.address() as *mut c_void);
        let count = self.shape.tokens * self.shape.hidden;
        // SAFETY: tensors of as many elements, those sent times the ranks.
        let summed = unsafe {
            (self.nccl.ncclReduceScatter)(from, to, count, ncclBfloat16, ncclSum, self.comm, stream.cast())
        };
        ok("ncclReduceScatter", summed)
    }

    fn pair(&self, ours: &Rank, stream: Stream) -> Result<(), String> {
        self.gather(ours, stream)?;
        self.scatter(stream)
    }
}

/// A whole step against the oracle.
fn check(rank: &mut Rank, gpu: &Gpu, all: bool) -> Result<(), String> {
    let stream = gpu.stream(0);
    let settle = |rank: &Rank| gpu.synchronize().and_then(|()| rank.failure());
    rank.want(all);
    rank.dispatch(A2A_PHASE_BOTH, stream)?;
    settle(rank)?;
    rank.check_received()?;
    rank.combine(A2A_PHASE_BOTH, stream)?;
    settle(rank)?;
    rank.check_sums()
}

/// The job of a rank process.
pub fn job(seat: &Seat) -> Result<(), String> {
    let shape: Shape = serde_json::from_str(&seat.args[0]).map_err(|error| error.to_string())?;
    let times = measure(seat, &shape)?;
    let path = format!("{}/{}.json", shape.directory, seat.rank);
    let text = serde_json::to_string(&times).map_err(|error| error.to_string())?;
    std::fs::write(&path, text).map_err(|error| format!("{path}: {error}"))
}

fn measure(seat: &Seat, shape: &Shape) -> Result<Times, String> {
    let meeting = Meeting::open(shape)?;
    let rows = shape.ranks * shape.tokens;
    cuda::grow(8 * rows * (2 * shape.hidden + 64 * shape.topk) + (64 << 20))?;
    let gpu = Gpu::new(1)?;
    let bare = Bare::new(shape, seat.rank, &meeting)?;
    let mut ours = Rank::new(seat, shape, Pair::named(&shape.pair)?)?;
    check(&mut ours, &gpu, true)?;
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
        // The device's time and the host's.
        let timed = |call: &mut dyn FnMut(Stream) -> Result<(), String>| -> Result<[f64; 2], String> {
            meeting.wait()?;
            let mut host = 0.0;
            let us = gpu.time_first(|stream| {
                let begun = Instant::now();
                let called = call(stream);
                host = begun.elapsed().as_secs_f64() * 1e6;
                called.and_then(|()| meeting.wait())
            })?;
            Ok([us, host])
        };
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
    check(&mut ours, &gpu, false)?;
    meeting.wait()?;
    Ok(times)
}
