//! A sweep: which shapes are measured, one after another, and what their ranks' times come to.

use std::time::Duration;

use crate::conformance::common::{Host, launch};
use crate::measure::Measured;
use crate::peers::{self, Peers};
use crate::report::Refused;
use crate::routing::Routing;
use crate::row::{Row, percentile};
use crate::shape::{Kind, PAIRS, Pair, Shape};

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
    /// bf16, f32, or fp8 (bf16 that dispatch quantises)
    #[arg(long, default_value = "bf16", value_parser = Kind::parse)]
    dtype: Kind,
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
    /// Rows that each rank has room for; 0 = the layout's capacity (one_sided and allgather know nothing else)
    #[arg(long, default_value_t = 0)]
    max_recv_rows: i64,
    /// Beside them, in the same run: MPI_Alltoallv (perf/peers/build.sh) with two settings, and a plain copy; bf16 only
    #[arg(long)]
    peers: bool,
    /// Seconds until a shape is given up
    #[arg(long, default_value_t = 300)]
    limit: u64,
}

impl Sweep {
    pub fn describe(&self) -> String {
        format!(
            "sweep: {} ranks ({}), {} of {} experts, seed {}, {} iterations after {}{}",
            self.ranks,
            self.mode,
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

    /// Measures every shape; says on standard error which one is under way.
    pub fn run(&self) -> Result<(Vec<Row>, Vec<Refused>), String> {
        let (pairs, hosts) = (self.pairs()?, self.hosts()?);
        for cache in &self.cache {
            if cache != "warm" && cache != "cold" {
                return Err(format!("cache {cache:?} is not warm or cold"));
            }
        }
        if self.ranks == 0 || self.iterations == 0 {
            return Err("ranks and iterations must be at least 1".into());
        }
        for routing in &self.routing {
            Routing::parse(routing)?.ids(0, 1, self.experts, self.topk, self.seed)?;
        }
        let peers = match self.peers {
            true => Some(self.find_peers()?),
            false => None,
        };
        let directory = Directory::new()?;
        let total = self.routing.len() * self.tokens.len() * pairs.len();
        let (mut rows, mut refused) = (Vec::new(), Vec::new());
        let mut done = 0;
        for routing in &self.routing {
            for &tokens in &self.tokens {
                for pair in &pairs {
                    done += 1;
                    let what = format!("{}, {tokens} tokens, {routing}", pair.name);
                    eprintln!("[{done}/{total}] {what}");
                    let shape = self.shape(pair, tokens, routing, &directory.0);
                    match self.measure(&shape, &hosts) {
                        Ok(measured) => rows.extend(self.rows(&shape, pair, &measured)?),
                        Err(why) => {
                            let wrong = !why.contains("A2A_OUT_OF_MEMORY");
                            eprintln!("    no time: {why}");
                            refused.push(Refused { what, why, wrong });
                        }
                    }
                }
                if let Some(peers) = &peers {
                    let what = format!("the peers, {tokens} tokens, {routing}");
                    eprintln!("[{done}/{total}] {what}");
                    for outcome in self.measure_peers(peers, tokens, routing)? {
                        match outcome {
                            Ok(more) => rows.extend(more),
                            Err(why) => {
                                eprintln!("    no time: {why}");
                                refused.push(Refused { what: what.clone(), why, wrong: true });
                            }
                        }
                    }
                }
            }
        }
        Ok((rows, refused))
    }

    /// Says at once what is missing, not after the first shapes.
    fn find_peers(&self) -> Result<Peers, String> {
        if self.dtype != Kind::Bf16 {
            return Err(format!("peers move bf16, dtype is {}", self.dtype.name()));
        }
        let mut found = Peers::find()?;
        found.limit = Duration::from_secs(self.limit);
        eprintln!("beside {}", found.version);
        Ok(found)
    }

    /// One outcome for each peer and cache.
    fn measure_peers(
        &self,
        found: &Peers,
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
            outcomes.extend(found.mpi(&shape));
            outcomes.push(peers::memcpy(&shape, &self.mode));
        }
        Ok(outcomes)
    }

    fn shape(&self, pair: &Pair, tokens: usize, routing: &str, directory: &str) -> Shape {
        let limits = !matches!(pair.name, "one_sided" | "allgather");
        Shape {
            pair: pair.name.into(),
            tokens,
            hidden: self.hidden,
            experts: self.experts,
            topk: self.topk,
            kind: self.dtype,
            routing: routing.into(),
            seed: self.seed,
            warmup: self.warmup,
            iterations: self.iterations,
            caches: self.cache.clone(),
            staged: self.staged,
            max_recv_rows: if limits { self.max_recv_rows } else { 0 },
            directory: directory.into(),
        }
    }

    fn measure(&self, shape: &Shape, hosts: &[Host]) -> Result<Vec<Measured>, String> {
        let args = [serde_json::to_string(shape).map_err(|error| error.to_string())?];
        launch(crate::MEASURE, self.ranks, hosts, &args, Duration::from_secs(self.limit))?;
        (0..self.ranks)
            .map(|rank| {
                let path = format!("{}/{rank}.json", shape.directory);
                let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
                serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))
            })
            .collect()
    }

    fn rows(&self, shape: &Shape, pair: &Pair, measured: &[Measured]) -> Result<Vec<Row>, String> {
        let busiest = |of: fn(&Measured) -> u64| measured.iter().map(of).max().unwrap_or(0);
        let token = shape.kind.wire_bytes(shape.hidden) as u64;
        let result = (shape.hidden * shape.kind.float().bytes()) as u64;
        let sent = busiest(|m| m.rows_sent.max(m.rows_received));
        let routing = Routing::parse(&shape.routing)?.name();
        let Some(first) = measured.first() else { return Ok(Vec::new()) };
        let mut rows = Vec::new();
        for (at, (cache, operation, times)) in first.times.iter().enumerate() {
            let mut slowest: Vec<f64> = (0..times.len())
                .map(|i| measured.iter().map(|m| m.times[at].2[i]).fold(0.0, f64::max))
                .collect();
            slowest.sort_by(f64::total_cmp);
            let (logical_bytes, wire_bytes) = match operation.as_str() {
                "dispatch" => (sent * token, busiest(|m| m.dispatch_wire)),
                "combine" => (sent * result, busiest(|m| m.combine_wire)),
                _ => (sent * (token + result), busiest(|m| m.dispatch_wire + m.combine_wire)),
            };
            rows.push(Row {
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
                routing: routing.clone(),
                operation: operation.clone(),
                cache: cache.clone(),
                iterations: slowest.len(),
                p50_us: percentile(&slowest, 50),
                p99_us: percentile(&slowest, 99),
                logical_bytes,
                wire_bytes,
            });
        }
        Ok(rows)
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
