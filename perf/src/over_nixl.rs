//! NIXL_ELASTIC beside a mesh of bare NIXL writes and notifications that move as many bytes, in the same run; and what steps take while a
//! rank joins.
//!
//! A rank is a process, or on a GPU a thread. Steps, a dispatch and a combine, take turns with the mesh's, iteration by iteration, each behind a meeting of all; a
//! time is that of the slowest rank.

use std::ffi::{CString, c_char, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use a2a::abi::calls::a2a_connect_ranks;
use a2a::abi::types::*;
use nixl_sys::{
    AgentConfig, DRAM, IN_PROG, Nixl, NotifMap, OptArgs, SUCCESS, WRITE, XferReq, nixl_capi_status_t,
    status_name,
};
use serde::{Deserialize, Serialize};

use crate::conformance::common::*;
use crate::measure::Meeting;
use crate::routing::Routing as Choices;
use crate::row::percentile;

#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
pub struct Beside {
    /// Ranks, each a process, or on a GPU a thread; for the join there is one more
    #[arg(long, default_value_t = 4)]
    ranks: usize,
    /// Tokens of each rank
    #[arg(long, default_value = "1,8,32,128", value_delimiter = ',')]
    tokens: Vec<usize>,
    /// Hidden size; bf16
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts of the group
    #[arg(long, default_value_t = 64)]
    experts: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// Iterations before those that count
    #[arg(long, default_value_t = 20)]
    warmup: usize,
    /// Iterations that count
    #[arg(long, default_value_t = 200)]
    iterations: usize,
    /// Seconds until a shape is given up
    #[arg(long, default_value_t = 120)]
    limit: u64,
}

/// What the ranks of a shape are told.
#[derive(Clone, Serialize, Deserialize)]
struct Shape {
    of: Beside,
    tokens: usize,
    directory: PathBuf,
}

/// Microseconds, an entry an iteration.
#[derive(Default, Serialize, Deserialize)]
struct Measured {
    bare: Vec<f64>,
    ours: Vec<f64>,
    dispatch: Vec<f64>,
    /// Steps before a rank joined, and while it did.
    before: Vec<f64>,
    meanwhile: Vec<f64>,
}

const WAIT: Duration = Duration::from_secs(300);

impl Beside {
    pub fn run(&self, out: &mut dyn Write) -> Result<(), String> {
        let failed = |error: std::io::Error| error.to_string();
        Nixl::get().map_err(|why| why.to_string())?;
        // Where there is a GPU, NIXL takes no transports that leave its memory out.
        if std::env::var_os("UCX_TLS").is_none() {
            // SAFETY: no other thread exists yet.
            unsafe { std::env::set_var("UCX_TLS", if cuda::is_enabled() { "tcp,cuda_copy" } else { "tcp" }) };
        }
        let tls = std::env::var("UCX_TLS").unwrap_or_default();
        let places = match (cuda::is_enabled(), cuda::is_by_rank()) {
            (false, _) => "processes",
            (true, false) => "threads that share a GPU",
            (true, true) => "threads, by turns on the GPUs there are",
        };
        writeln!(
            out,
            "# {} ranks, {places}, UCX_TLS={tls}, hidden {} bf16, {} of {} experts; p50 of {} iterations of the slowest rank, microseconds",
            self.ranks,
            self.hidden, self.topk, self.experts, self.iterations
        )
        .map_err(failed)?;
        writeln!(out, "tokens,bare_us,ours_us,ratio,ours_dispatch_us,step_p99_us,longest_before_us,longest_while_joining_us").map_err(failed)?;
        for &tokens in &self.tokens {
            let m = self.measure(tokens)?;
            let at = |times: &[f64], part: usize| {
                let mut sorted = times.to_vec();
                sorted.sort_by(f64::total_cmp);
                percentile(&sorted, part)
            };
            let longest = |times: &[f64]| times.iter().copied().fold(0.0, f64::max);
            let (bare, ours) = (at(&m.bare, 50), at(&m.ours, 50));
            writeln!(
                out,
                "{tokens},{bare:.1},{ours:.1},{:.3},{:.1},{:.1},{:.1},{:.1}",
                ours / bare,
                at(&m.dispatch, 50),
                at(&m.ours, 99),
                longest(&m.before),
                longest(&m.meanwhile)
            )
            .map_err(failed)?;
            out.flush().map_err(failed)?;
        }
        Ok(())
    }

    /// The slowest rank's times of one shape.
    fn measure(&self, tokens: usize) -> Result<Measured, String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let shape = Shape { of: self.clone(), tokens, directory: directory.path().into() };
        // Processes take turns on a GPU, threads of one share it.
        let hosts = match cuda::is_enabled() {
            true => vec![Host::Child((0..self.ranks).collect()), Host::Child(vec![self.ranks])],
            false => (0..=self.ranks).map(|rank| Host::Child(vec![rank])).collect(),
        };
        let args = [serde_json::to_string(&shape).map_err(|error| error.to_string())?];
        launch(crate::OVER_NIXL, self.ranks + 1, &hosts, &args, Duration::from_secs(self.limit))?;
        let mut slowest = Measured::default();
        for rank in 0..self.ranks {
            let path = directory.path().join(format!("{rank}.json"));
            let text =
                std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let one: Measured = serde_json::from_str(&text).map_err(|error| error.to_string())?;
            for (all, one) in [
                (&mut slowest.bare, one.bare),
                (&mut slowest.ours, one.ours),
                (&mut slowest.dispatch, one.dispatch),
                (&mut slowest.before, one.before),
                (&mut slowest.meanwhile, one.meanwhile),
            ] {
                all.resize(one.len(), 0.0);
                all.iter_mut().zip(one).for_each(|(all, one)| *all = all.max(one));
            }
        }
        Ok(slowest)
    }
}

/// The job of a rank process. The last one joins at the end.
pub fn job(seat: &Seat) -> Result<(), String> {
    let shape: Shape = serde_json::from_str(&seat.args[0]).map_err(|error| error.to_string())?;
    let joins = seat.rank == shape.of.ranks;
    let put = |name: &str, bytes: &[u8]| publish(&shape.directory, name, bytes);
    if joins {
        fetch(&shape.directory, "join")?;
    }
    let comm = Comm::create(&config_of(seat, &shape))?;
    if joins {
        put("there", &[])?;
        let all: Vec<i32> = (0..shape.of.ranks as i32).collect();
        // SAFETY: a list of so many int32.
        check(unsafe { a2a_connect_ranks(comm.handle(), all.as_ptr(), all.len() as i32, 0) })?;
        return fetch(&shape.directory, "done").map(drop);
    }
    let mut ours = Ours::new(seat, &shape, &comm)?;
    let meeting = Meeting::new(&Seat { world: shape.of.ranks, ..seat.clone() })?;
    let mut bare = Bare::new(seat.rank, &shape)?;
    let mut measured = Measured::default();
    for iteration in 0..shape.of.warmup + shape.of.iterations {
        let counts = iteration >= shape.of.warmup;
        meeting.wait()?;
        let begun = Instant::now();
        bare.step()?;
        let took = begun.elapsed();
        meeting.wait()?;
        let begun = Instant::now();
        ours.dispatch()?;
        let half = begun.elapsed();
        ours.combine()?;
        let whole = begun.elapsed();
        if counts {
            measured.bare.push(took.as_secs_f64() * 1e6);
            measured.dispatch.push(half.as_secs_f64() * 1e6);
            measured.ours.push(whole.as_secs_f64() * 1e6);
        }
    }
    ours.check()?;
    // A rank joins while the others step.
    meeting.wait()?;
    let step = |ours: &mut Ours| -> Result<f64, String> {
        let begun = Instant::now();
        ours.dispatch()?;
        ours.combine()?;
        Ok(begun.elapsed().as_secs_f64() * 1e6)
    };
    for _ in 0..beside(&shape) {
        measured.before.push(step(&mut ours)?);
    }
    if seat.rank == 0 {
        put("join", &[])?;
    }
    fetch(&shape.directory, "there")?;
    meeting.wait()?;
    let (handle, joining) = (comm.handle() as usize, shape.of.ranks as i32);
    std::thread::scope(|scope| -> Result<(), String> {
        let joiner = scope.spawn(move || {
            // SAFETY: a list of one, of a comm that outlives this thread.
            check(unsafe { a2a_connect_ranks(handle as *mut a2a_comm_t, &joining, 1, 0) })
        });
        for _ in 0..beside(&shape) {
            measured.meanwhile.push(step(&mut ours)?);
        }
        joiner.join().map_err(|_| "the thread that connects panicked".to_string())??;
        Ok(())
    })?;
    ours.check()?;
    meeting.wait()?;
    put("done", &[])?;
    let text = serde_json::to_string(&measured).map_err(|error| error.to_string())?;
    put(&format!("{}.json", seat.rank), text.as_bytes())
}

/// Steps of each part of the join: a second's, about.
fn beside(shape: &Shape) -> usize {
    (2000 / shape.tokens.max(1)).max(60)
}

/// A file that is there whole.
fn publish(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let unique = format!("{name}.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let (path, early) = (directory.join(name), directory.join(unique));
    let written = std::fs::write(&early, bytes).and_then(|()| std::fs::rename(&early, &path));
    written.map_err(|error| format!("{}: {error}", path.display()))
}

/// Waits for a file.
fn fetch(directory: &Path, name: &str) -> Result<Vec<u8>, String> {
    let begun = Instant::now();
    loop {
        match std::fs::read(directory.join(name)) {
            Ok(bytes) => return Ok(bytes),
            Err(_) if begun.elapsed() < WAIT => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(format!("{name}: {error}")),
        }
    }
}

// ------------------------------------------------------------------------------------------------------ ours

fn config_of(seat: &Seat, shape: &Shape) -> a2a_config_t {
    let mut config = config(seat);
    config.backend = A2A_BACKEND_NIXL_ELASTIC;
    config.num_ranks = if seat.rank < shape.of.ranks { shape.of.ranks as i32 } else { 1 };
    config.max_ranks = shape.of.ranks as i32 + 1;
    // Those of the rank that joins are nobody's choice.
    config.num_experts = (shape.of.experts + shape.of.experts / shape.of.ranks) as i32;
    config.max_topk = shape.of.topk as i32;
    config.max_hidden = shape.of.hidden as i32;
    config.max_tokens = shape.tokens as i32;
    config.setup_timeout_ms = WAIT.as_millis() as i64;
    config
}

/// Ids of a rank's tokens.
fn ids(shape: &Shape, rank: usize) -> Result<Vec<i32>, String> {
    Choices::Hash.ids(rank, shape.tokens, shape.of.experts, shape.of.topk, 1)
}

/// The rank of an expert.
fn owner(shape: &Shape, expert: i32) -> usize {
    expert as usize / (shape.of.experts / shape.of.ranks)
}

struct Ours<'a> {
    comm: &'a Comm,
    routing: Routing,
    input: DispatchIn,
    output: DispatchOut,
    sums: CombineOut,
    results: Option<Tensor>,
    tokens: Vec<u8>,
    topk: usize,
}

impl<'a> Ours<'a> {
    fn new(seat: &Seat, shape: &Shape, comm: &'a Comm) -> Result<Ours<'a>, String> {
        let (t, hidden, topk) = (shape.tokens, shape.of.hidden, shape.of.topk);
        // Small whole numbers: sums of top-k of them are exact.
        let value = |at: usize| half_of((at * 7 + seat.rank) % 13);
        let tokens: Vec<u8> = (0..t * hidden).flat_map(|at| value(at).to_le_bytes()).collect();
        let ids: Vec<u8> = ids(shape, seat.rank)?.iter().flat_map(|id| id.to_le_bytes()).collect();
        let view = || Some(Tensor::view());
        Ok(Ours {
            comm,
            routing: comm.routing(0)?,
            input: DispatchIn {
                tokens: Some(Tensor::of(BF16, &[t, hidden], &tokens)),
                topk_ids: Some(Tensor::of(I32, &[t, topk], &ids)),
                topk_weights: Some(Tensor::of(F32, &[t, topk], &1.0f32.to_le_bytes().repeat(t * topk))),
                ..Default::default()
            },
            output: DispatchOut {
                tokens: view(),
                expert_counts: view(),
                status: view(),
                ..Default::default()
            },
            sums: CombineOut { tokens: Some(Tensor::new(BF16, &[t, hidden])), ..Default::default() },
            results: None,
            tokens,
            topk,
        })
    }
    fn dispatch(&mut self) -> Result<(), String> {
        self.comm.dispatch(&self.routing, A2A_PHASE_BOTH, &self.input, &mut self.output)?;
        Ok(())
    }
    fn combine(&mut self) -> Result<(), String> {
        if self.results.is_none() {
            // What experts wrote once stands there for every step.
            self.fill()?;
        }
        self.comm.combine(&self.routing, A2A_PHASE_BOTH, 0, self.results.as_ref(), &mut self.sums)?;
        Ok(())
    }
    /// The experts give every row back.
    fn fill(&mut self) -> Result<(), String> {
        let mut results = self.comm.combine_buffer(&self.routing, BF16)?;
        results.write(&self.output.tokens.as_ref().ok_or("no tokens")?.read());
        self.results = Some(results);
        Ok(())
    }
    /// A step's sums are top-k times the tokens.
    fn check(&mut self) -> Result<(), String> {
        self.dispatch()?;
        self.fill()?;
        self.combine()?;
        let got = self.sums.tokens.as_ref().ok_or("no sums")?.read();
        let value = |bytes: &[u8], at: usize| {
            f32::from_bits((u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]) as u32) << 16)
        };
        match (0..got.len() / 2).find(|at| value(&got, *at) != self.topk as f32 * value(&self.tokens, *at)) {
            Some(at) => Err(format!("element {at} of the sums is {}", value(&got, at))),
            None => Ok(()),
        }
    }
}

/// A small whole number as bfloat16.
fn half_of(number: usize) -> u16 {
    ((number as f32).to_bits() >> 16) as u16
}

// ------------------------------------------------------------------------------------------------------ bare

fn ok(what: &str, status: nixl_capi_status_t) -> Result<(), String> {
    if status == SUCCESS { Ok(()) } else { Err(format!("{what}: {} ({status})", status_name(status))) }
}

/// An agent that writes to every other one of the mesh what a dispatch, and then a combine, would send there.
struct Bare {
    nixl: &'static Nixl,
    agent: *mut nixl_sys::Agent,
    args: *mut OptArgs,
    map: *mut NotifMap,
    /// By half and peer; NULL where there is nothing to write.
    requests: [Vec<(CString, *mut XferReq)>; 2],
    /// What has been heard of each half, of all steps.
    heard: [usize; 2],
    steps: usize,
    peers: usize,
    _memory: Vec<u8>,
}

impl Bare {
    fn new(rank: usize, shape: &Shape) -> Result<Bare, String> {
        let nixl = Nixl::get().map_err(|why| why.to_string())?;
        let peers: Vec<usize> = (0..shape.of.ranks).filter(|peer| *peer != rank).collect();
        let sizes = sizes(shape)?;
        // Two boxes of each half for every rank: out, and in.
        let most =
            sizes.iter().flatten().flatten().copied().max().unwrap_or(0).next_multiple_of(4096).max(4096);
        let memory = vec![1u8; most * 4 * shape.of.ranks];
        let at = |half: usize, inbox: usize, peer: usize| {
            memory.as_ptr() as usize + most * ((half * 2 + inbox) * shape.of.ranks + peer)
        };
        let (mut agent, mut params, mut backend, mut args, mut map) =
            (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
        let name = |rank: usize| CString::new(format!("bare.{rank}")).expect("no zero byte");
        // SAFETY: valid pointers, lists and handles of this agent's; the memory outlives it.
        unsafe {
            let config = AgentConfig { thread_sync: nixl_sys::SYNC_NONE, ..AgentConfig::default() };
            ok(
                "an agent",
                (nixl.nixl_capi_create_configured_agent)(name(rank).as_ptr(), &config, &mut agent),
            )?;
            ok("settings", (nixl.nixl_capi_create_params)(&mut params))?;
            let settings = c"TCP_USER_TIMEOUT=3s,NET_DEVICES=lo";
            ok(
                "settings",
                (nixl.nixl_capi_params_add)(params, c"engine_config".as_ptr(), settings.as_ptr()),
            )?;
            ok("a backend", (nixl.nixl_capi_create_backend)(agent, c"UCX".as_ptr(), params, &mut backend))?;
            ok("arguments", (nixl.nixl_capi_create_opt_args)(&mut args))?;
            ok("arguments", (nixl.nixl_capi_opt_args_add_backend)(args, backend))?;
            ok("arguments", (nixl.nixl_capi_opt_args_set_has_notif)(args, true))?;
            ok("notes", (nixl.nixl_capi_create_notif_map)(&mut map))?;
            let mut list = null_mut();
            ok("a list", (nixl.nixl_capi_create_reg_dlist)(DRAM, &mut list))?;
            ok(
                "a list",
                (nixl.nixl_capi_reg_dlist_add_desc)(
                    list,
                    memory.as_ptr() as usize,
                    memory.len(),
                    0,
                    null(),
                    0,
                ),
            )?;
            ok("memory", (nixl.nixl_capi_register_mem)(agent, list, null_mut()))?;
            let (mut data, mut bytes) = (null_mut(), 0);
            ok("a card", (nixl.nixl_capi_get_local_md)(agent, &mut data, &mut bytes))?;
            let card = std::slice::from_raw_parts(data.cast::<u8>(), bytes);
            let where_to = (memory.as_ptr() as u64).to_le_bytes();
            publish(&shape.directory, &format!("card.{rank}"), &[&where_to[..], card].concat())?;
        }
        let mut requests = [Vec::new(), Vec::new()];
        for peer in &peers {
            let card = fetch(&shape.directory, &format!("card.{peer}"))?;
            let (there, card) = card.split_first_chunk::<8>().ok_or("a card without an address")?;
            let there = u64::from_le_bytes(*there) as usize;
            let mut loaded: *mut c_char = null_mut();
            // SAFETY: as above.
            unsafe {
                ok(
                    "a card",
                    (nixl.nixl_capi_load_remote_md)(
                        agent,
                        card.as_ptr().cast::<c_void>(),
                        card.len(),
                        &mut loaded,
                    ),
                )?
            };
            for (half, requests) in requests.iter_mut().enumerate() {
                let bytes = sizes[half][rank][*peer];
                let to = there + most * ((half * 2 + 1) * shape.of.ranks + rank);
                let mut request = null_mut();
                if bytes > 0 {
                    // SAFETY: as above; so many bytes on both sides.
                    unsafe {
                        let list = |at: usize| {
                            let mut list = null_mut();
                            ok("a list", (nixl.nixl_capi_create_xfer_dlist)(DRAM, &mut list))?;
                            ok("a list", (nixl.nixl_capi_xfer_dlist_add_desc)(list, at, bytes, 0))
                                .map(|()| list)
                        };
                        let (local, remote) = (list(at(half, 0, *peer))?, list(to)?);
                        let create = nixl.nixl_capi_create_xfer_req;
                        ok(
                            "a transfer",
                            create(agent, WRITE, local, remote, name(*peer).as_ptr(), &mut request, args),
                        )?;
                    }
                }
                requests.push((name(*peer), request));
            }
        }
        Ok(Bare {
            nixl,
            agent,
            args,
            map,
            requests,
            heard: [0; 2],
            steps: 0,
            peers: peers.len(),
            _memory: memory,
        })
    }

    fn step(&mut self) -> Result<(), String> {
        self.steps += 1;
        (0..2).try_for_each(|half| self.half(half))
    }

    fn half(&mut self, half: usize) -> Result<(), String> {
        let Bare { nixl, agent, args, map, .. } = *self;
        // As long as a note of ours is.
        let note = [half as u8; 104];
        // SAFETY: requests and notes of this agent's; what the map lends is read before it is cleared.
        unsafe {
            ok("a note", (nixl.nixl_capi_opt_args_set_notif_msg)(args, note.as_ptr().cast(), note.len()))?;
            let mut open = Vec::with_capacity(self.peers);
            for (peer, request) in &self.requests[half] {
                if request.is_null() {
                    ok(
                        "a note",
                        (nixl.nixl_capi_gen_notif)(
                            agent,
                            peer.as_ptr(),
                            note.as_ptr().cast(),
                            note.len(),
                            null_mut(),
                        ),
                    )?;
                    continue;
                }
                match (nixl.nixl_capi_post_xfer_req)(agent, *request, args) {
                    IN_PROG => open.push(*request),
                    status => ok("a transfer", status)?,
                }
            }
            let begun = Instant::now();
            let mut polls = 0u32;
            while self.heard[half] < self.steps * self.peers || !open.is_empty() {
                let mut failed = Ok(());
                open.retain(|request| match (nixl.nixl_capi_get_xfer_status)(agent, *request) {
                    IN_PROG => true,
                    status => {
                        failed = failed.clone().and(ok("a transfer", status));
                        false
                    }
                });
                failed?;
                let mut senders = 0;
                ok("notes", (nixl.nixl_capi_get_notifs)(agent, map, null_mut()))?;
                ok("notes", (nixl.nixl_capi_notif_map_size)(map, &mut senders))?;
                for sender in 0..senders {
                    let (mut name, mut count) = (null(), 0);
                    ok("notes", (nixl.nixl_capi_notif_map_get_agent_at)(map, sender, &mut name))?;
                    ok("notes", (nixl.nixl_capi_notif_map_get_notifs_size)(map, name, &mut count))?;
                    for index in 0..count {
                        let (mut data, mut bytes) = (null(), 0);
                        ok(
                            "notes",
                            (nixl.nixl_capi_notif_map_get_notif)(map, name, index, &mut data, &mut bytes),
                        )?;
                        self.heard[*data.cast::<u8>() as usize] += 1;
                    }
                }
                if senders > 0 {
                    ok("notes", (nixl.nixl_capi_notif_map_clear)(map))?;
                }
                polls += 1;
                if polls > 32 {
                    std::thread::yield_now();
                }
                if begun.elapsed() > WAIT {
                    return Err("the bare mesh stands still".into());
                }
            }
        }
        Ok(())
    }
}

/// By half, sender and receiver: bytes of counts and rows, and of results.
fn sizes(shape: &Shape) -> Result<[Vec<Vec<usize>>; 2], String> {
    let (ranks, row) = (shape.of.ranks, 2 * shape.of.hidden);
    let (mut rows, mut results) = (vec![vec![0; ranks]; ranks], vec![vec![0; ranks]; ranks]);
    let beside = 2 * 4 * shape.of.topk + 8;
    let experts = shape.of.experts + shape.of.experts / ranks;
    for (source, rows) in rows.iter_mut().enumerate() {
        let ids = ids(shape, source)?;
        for (peer, bytes) in rows.iter_mut().enumerate() {
            let goes = |ids: &&[i32]| ids.iter().any(|id| owner(shape, *id) == peer);
            *bytes = 4 * experts + ids.chunks_exact(shape.of.topk).filter(goes).count() * (row + beside);
        }
        for id in &ids {
            results[owner(shape, *id)][source] += row;
        }
    }
    Ok([rows, results])
}
