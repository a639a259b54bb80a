//! A sweep: which shapes are measured, one after another, and what their ranks' times come to.

use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::conformance::common::{Host, Job, choose_device, launch};
use crate::data_plane::{DataPlane, Per};
use crate::measure::Measured;
use crate::one_gpu::{Bytes, Floors, Timed};
use crate::peers::{self, Peers};
use crate::report::Refused;
use crate::routing::Routing;
use crate::row::{Row, percentile};
use crate::shape::{Device, Kind, PAIRS, Pair, Shape};

#[derive(clap::Args, Clone, Debug)]
pub struct Sweep {
    /// Ranks of the group
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// Where ranks live: processes, or threads of one process
    #[arg(long, default_value = "processes")]
    mode: String,
    /// all, or a list of one_sided, allgather, ht_flat, ht_contiguous, low_latency, two_sided
    #[arg(long, default_value = "all", value_delimiter = ',')]
    backends: Vec<String>,
    /// Tokens of each rank
    #[arg(long, default_value = "128", value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Hidden size
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// bf16, f32, fp8 (bf16 that dispatch quantises), or f8 (e4m3 with float32 scales, both given)
    #[arg(long, default_value = "bf16", value_delimiter = ',', value_parser = Kind::parse)]
    dtype: Vec<Kind>,
    /// Experts of the group
    #[arg(long, default_value_t = 64)]
    experts: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// hash, zipf, one_hot, or a recorded file (tests/data/README.md)
    #[arg(long, default_value = "hash", value_delimiter = ',')]
    routing: Vec<String>,
    /// Of the routing, the tokens and the results
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// warm, cold, or both
    #[arg(long, default_value = "warm", value_delimiter = ',')]
    cache: Vec<String>,
    /// Iterations before those that count
    #[arg(long, default_value_t = 5)]
    warmup: usize,
    /// Iterations that count
    #[arg(long, default_value_t = 30)]
    iterations: usize,
    /// Combine from the caller's tensor instead of the comm's own rows
    #[arg(long)]
    staged: bool,
    /// CUDA: all (every rank at once), rank0 (it alone, its peers done), or both
    #[arg(long, default_value = "all,rank0", value_delimiter = ',')]
    scope: Vec<String>,
    /// CUDA: time replays of a captured pair too
    #[arg(long)]
    graph: bool,
    /// CUDA: time dispatches of two calls too, SEND and then RECV
    #[arg(long)]
    split: bool,
    /// Rows that each rank has room for; 0 = the layout's capacity (one_sided and allgather know nothing else)
    #[arg(long, default_value_t = 0)]
    max_recv_rows: i64,
    /// CUDA: multiprocessors that the kernels of each rank may use, and the bare data plane's dispatch; 0 = the library's
    /// choice (HIGH_THROUGHPUT and LOW_LATENCY know others)
    #[arg(long, default_value_t = 0)]
    sms: u16,
    /// Beside them, in the same run: MPI_Alltoallv (perf/peers/build.sh) with two settings, and a plain copy; bf16
    /// only. On CUDA: the bare data plane (perf/peers/build_data_plane.sh), with a row for each (token, rank), and for
    /// each (token, expert) beside layouts that have those; bf16, fp8 and f8
    #[arg(long)]
    peers: bool,
    /// Seconds until a shape is given up
    #[arg(long, default_value_t = 300)]
    limit: u64,
}

/// The programs measured beside.
enum Beside {
    Cpu(Peers),
    Cuda(DataPlane),
}

/// What came of a sweep.
#[derive(Default)]
pub struct Outcome {
    /// Lines about what was measured on, beside the machine.
    pub about: Vec<String>,
    /// The GPU's name; empty on the CPU.
    pub card: String,
    pub rows: Vec<Row>,
    pub refused: Vec<Refused>,
}

impl Sweep {
    pub fn describe(&self, device: Device) -> String {
        let place = if device == Device::Cpu { &self.mode } else { "streams of one process on one GPU" };
        format!(
            "sweep: {} ranks ({place}), {} of {} experts, seed {}, {} iterations after {}{}",
            self.ranks,
            self.topk,
            self.experts,
            self.seed,
            self.iterations,
            self.warmup,
            if self.staged { ", results staged" } else { "" }
        )
    }

    fn pairs(&self) -> Result<Vec<Pair>, String> {
        if self.backends == ["all"] {
            return Ok(PAIRS.to_vec());
        }
        self.backends.iter().map(|name| Pair::named(name)).collect()
    }

    fn hosts(&self) -> Result<Vec<Host>, String> {
        match self.mode.as_str() {
            "processes" => Ok((0..self.ranks).map(|rank| Host::Child(vec![rank])).collect()),
            "threads" => Ok(vec![Host::Child((0..self.ranks).collect())]),
            mode => Err(format!("mode {mode:?} is not processes or threads")),
        }
    }

    fn check(&self, device: Device) -> Result<(), String> {
        for cache in &self.cache {
            if cache != "warm" && cache != "cold" {
                return Err(format!("cache {cache:?} is not warm or cold"));
            }
            if cache == "cold" && device != Device::Cpu {
                return Err("cold caches are measured on the CPU alone".into());
            }
        }
        for scope in &self.scope {
            if scope != "all" && scope != "rank0" {
                return Err(format!("scope {scope:?} is not all or rank0"));
            }
        }
        if self.ranks == 0 || self.iterations == 0 {
            return Err("ranks and iterations must be at least 1".into());
        }
        for routing in &self.routing {
            Routing::parse(routing)?.ids(0, 1, self.experts, self.topk, self.seed)?;
        }
        Ok(())
    }

    /// Measures every shape; says on standard error which one is under way.
    pub fn run(&self, device: Device) -> Result<Outcome, String> {
        let (pairs, hosts) = (self.pairs()?, self.hosts()?);
        self.check(device)?;
        let beside = if self.peers { Some(self.find_peers(device)?) } else { None };
        let directory = Directory::new()?;
        let mut outcome = Outcome::default();
        if let Device::Cuda(ordinal) = device {
            choose_device(&format!("cuda:{ordinal}"))?;
            self.measure_floors(&pairs[0], &directory.0, &mut outcome)?;
        }
        let total = self.routing.len() * self.tokens.len() * self.dtype.len() * pairs.len();
        let mut done = 0;
        for routing in &self.routing {
            for (&kind, &tokens) in self.dtype.iter().flat_map(|k| self.tokens.iter().map(move |t| (k, t))) {
                let what = |name: &str| {
                    let dtype =
                        if self.dtype.len() > 1 { format!(" of {}", kind.name()) } else { String::new() };
                    format!("{name}, {tokens} tokens{dtype}, {routing}")
                };
                for pair in &pairs {
                    done += 1;
                    let what = what(pair.name);
                    eprintln!("[{done}/{total}] {what}");
                    let shape = self.shape(pair, kind, tokens, routing, &directory.0);
                    let rows = match device {
                        Device::Cpu => self.measure(&shape, &hosts),
                        Device::Cuda(_) => self.measure_on_gpu(&shape),
                    };
                    match rows {
                        Ok(rows) => outcome.rows.extend(rows),
                        Err(why) => outcome.refuse(what, why),
                    }
                }
                // Without tokens the bare data plane does nothing.
                let nothing = tokens == 0 && device != Device::Cpu;
                if let Some(beside) = beside.as_ref().filter(|_| !nothing) {
                    let what = what("the peers");
                    eprintln!("[{done}/{total}] {what}");
                    for peer in self.measure_peers(beside, &pairs, kind, tokens, routing)? {
                        match peer {
                            Ok(rows) => outcome.rows.extend(rows),
                            Err(why) => outcome.refuse(what.clone(), why),
                        }
                    }
                }
            }
        }
        Ok(outcome)
    }

    /// Says at once what is missing, not after the first shapes.
    fn find_peers(&self, device: Device) -> Result<Beside, String> {
        let known: &[Kind] = match device {
            Device::Cpu => &[Kind::Bf16],
            Device::Cuda(_) => &[Kind::Bf16, Kind::Fp8, Kind::F8],
        };
        if let Some(kind) = self.dtype.iter().find(|kind| !known.contains(kind)) {
            let names: Vec<&str> = known.iter().map(|kind| kind.name()).collect();
            return Err(format!("peers move {}, dtype is {}", names.join(", "), kind.name()));
        }
        let limit = Duration::from_secs(self.limit);
        if let Device::Cuda(ordinal) = device {
            return DataPlane::find(ordinal, limit, self.sms).map(Beside::Cuda);
        }
        let mut found = Peers::find()?;
        found.limit = limit;
        eprintln!("beside {}", found.version);
        Ok(Beside::Cpu(found))
    }

    /// One outcome for each peer and cache.
    fn measure_peers(
        &self,
        found: &Beside,
        pairs: &[Pair],
        kind: Kind,
        tokens: usize,
        routing: &str,
    ) -> Result<Vec<Result<Vec<Row>, String>>, String> {
        let choices = Routing::parse(routing)?;
        let mut ids = Vec::new();
        for rank in 0..self.ranks {
            ids.extend(choices.ids(rank, tokens, self.experts, self.topk, self.seed)?);
        }
        let mut outcomes = Vec::new();
        for cache in &self.cache {
            let shape = peers::Shape {
                ranks: self.ranks,
                tokens,
                hidden: self.hidden,
                topk: self.topk,
                experts: self.experts,
                ids: &ids,
                routing: &choices.name(),
                cold: cache == "cold",
                warmup: self.warmup,
                iterations: self.iterations,
            };
            match found {
                Beside::Cpu(mpi) => {
                    outcomes.extend(mpi.mpi(&shape));
                    outcomes.push(peers::memcpy(&shape, &self.mode));
                }
                Beside::Cuda(bare) => {
                    let measure = |per| bare.measure(&shape, kind, per, &self.scope);
                    outcomes.extend(planes(pairs).map(measure));
                }
            }
        }
        Ok(outcomes)
    }

    fn shape(&self, pair: &Pair, kind: Kind, tokens: usize, routing: &str, directory: &str) -> Shape {
        let limits = !matches!(pair.name, "one_sided" | "allgather");
        Shape {
            pair: pair.name.into(),
            nccl: false,
            ranks: self.ranks,
            tokens,
            hidden: self.hidden,
            experts: self.experts,
            topk: self.topk,
            kind,
            routing: routing.into(),
            seed: self.seed,
            warmup: self.warmup,
            iterations: self.iterations,
            caches: self.cache.clone(),
            scopes: self.scope.clone(),
            graph: self.graph,
            split: self.split,
            staged: self.staged,
            max_recv_rows: if limits { self.max_recv_rows } else { 0 },
            max_sms: self.sms as i32,
            directory: directory.into(),
        }
    }

    fn measure(&self, shape: &Shape, hosts: &[Host]) -> Result<Vec<Row>, String> {
        self.launch(crate::MEASURE, self.ranks, shape, hosts)?;
        let measured: Vec<Measured> =
            (0..self.ranks).map(|rank| shape.left(rank)).collect::<Result<_, _>>()?;
        self.rows(shape, &measured)
    }

    fn measure_on_gpu(&self, shape: &Shape) -> Result<Vec<Row>, String> {
        let timed: Vec<Timed> = self.in_one_process(crate::ONE_GPU, shape)?;
        let row =
            |Timed { scope, operation, times, bytes }| self.cuda_row(shape, &scope, &operation, times, bytes);
        timed.into_iter().map(row).collect()
    }

    /// What one process, with all ranks in it, leaves.
    fn in_one_process<T: DeserializeOwned>(&self, job: (&str, Job), shape: &Shape) -> Result<T, String> {
        self.launch(job, 1, shape, &[Host::Child(vec![0])])?;
        shape.left(0)
    }

    fn launch(&self, job: (&str, Job), world: usize, shape: &Shape, hosts: &[Host]) -> Result<(), String> {
        let args = [serde_json::to_string(shape).map_err(|error| error.to_string())?];
        launch(job, world, hosts, &args, Duration::from_secs(self.limit))
    }

    /// What the GPU is, and what nothing takes on it.
    fn measure_floors(&self, pair: &Pair, directory: &str, outcome: &mut Outcome) -> Result<(), String> {
        let shape = self.shape(pair, Kind::Bf16, 0, &self.routing[0], directory);
        let Floors { name, line, times } = self.in_one_process(crate::FLOORS, &shape)?;
        outcome.about = vec![
            format!("gpu: {line}"),
            format!(
                "{} ranks share one GPU: protocol, launches and its memory, not NVLink timings",
                self.ranks
            ),
        ];
        outcome.card = name;
        for (scope, kernels, times) in times {
            let backend = format!("floor: {kernels} empty kernel{}", if kernels == 1 { "" } else { "s" });
            outcome.rows.push(Row {
                backend,
                layout: String::new(),
                dtype: String::new(),
                routing: String::new(),
                hidden: 0,
                ..self.cuda_row(&shape, &scope, "floor", times, Bytes::default())?
            });
        }
        Ok(())
    }

    fn cuda_row(
        &self,
        shape: &Shape,
        scope: &str,
        operation: &str,
        times: Vec<f64>,
        bytes: Bytes,
    ) -> Result<Row, String> {
        let row = self.row(shape, operation, times, bytes)?;
        Ok(Row { device: "cuda".into(), mode: "streams".into(), scope: scope.into(), ..row })
    }

    /// A row of the CPU, with warm caches.
    fn row(&self, shape: &Shape, operation: &str, mut times: Vec<f64>, bytes: Bytes) -> Result<Row, String> {
        let pair = Pair::named(&shape.pair)?;
        times.sort_by(f64::total_cmp);
        Ok(Row {
            device: "cpu".into(),
            backend: pair.backend_name.into(),
            layout: pair.layout_name.into(),
            ranks: self.ranks,
            mode: self.mode.clone(),
            tokens: shape.tokens,
            hidden: shape.hidden,
            dtype: shape.kind.name().into(),
            experts: shape.experts,
            topk: shape.topk,
            routing: Routing::parse(&shape.routing)?.name(),
            operation: operation.into(),
            cache: "warm".into(),
            iterations: times.len(),
            p50_us: percentile(&times, 50),
            p99_us: percentile(&times, 99),
            logical_bytes: bytes.logical,
            wire_bytes: bytes.wire,
            scope: String::new(),
            p10_us: Some(percentile(&times, 10)),
            p90_us: Some(percentile(&times, 90)),
            memory_bytes: bytes.memory,
        })
    }

    fn rows(&self, shape: &Shape, measured: &[Measured]) -> Result<Vec<Row>, String> {
        let busiest = |of: fn(&Measured) -> u64| measured.iter().map(of).max().unwrap_or(0);
        let token = shape.kind.wire_bytes(shape.hidden) as u64;
        let result = (shape.hidden * shape.kind.float().bytes()) as u64;
        let sent = busiest(|m| m.rows_sent.max(m.rows_received));
        let Some(first) = measured.first() else { return Ok(Vec::new()) };
        let mut rows = Vec::new();
        for (at, (cache, operation, times)) in first.times.iter().enumerate() {
            let slowest: Vec<f64> = (0..times.len())
                .map(|i| measured.iter().map(|m| m.times[at].2[i]).fold(0.0, f64::max))
                .collect();
            let (logical, wire) = match operation.as_str() {
                "dispatch" => (sent * token, busiest(|m| m.dispatch_wire)),
                "combine" => (sent * result, busiest(|m| m.combine_wire)),
                _ => (sent * (token + result), busiest(|m| m.dispatch_wire + m.combine_wire)),
            };
            let bytes = Bytes { logical, wire, memory: 0 };
            rows.push(Row { cache: cache.clone(), ..self.row(shape, operation, slowest, bytes)? });
        }
        Ok(rows)
    }
}

/// The bare data planes that these pairs have a use for.
fn planes(pairs: &[Pair]) -> impl Iterator<Item = Per> {
    let used = |per: &Per| pairs.iter().any(|pair| pair.oracle_layout().by_expert() == (*per == Per::Expert));
    [Per::Rank, Per::Expert].into_iter().filter(used)
}

impl Outcome {
    fn refuse(&mut self, what: String, why: String) {
        // What there is no memory for, or what the library does not have on CUDA, is no defect of what it has.
        let absent = !self.card.is_empty() && why.contains("A2A_UNSUPPORTED");
        let wrong = !absent && !why.contains("A2A_OUT_OF_MEMORY");
        eprintln!("    no time: {why}");
        self.refused.push(Refused { what, why, wrong });
    }
}

/// Where ranks leave what they measured; gone with the sweep.
struct Directory(String);

impl Directory {
    fn new() -> Result<Directory, String> {
        let path = std::env::temp_dir().join(format!("a2a-perf-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Directory(path.to_string_lossy().into_owned()))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
