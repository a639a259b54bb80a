//! Ranks on a GPU that lose one of them and go on in the same comm: what they captured before is replayed afterwards, at the
//! same addresses, among those that are left.

use std::io::BufRead;
use std::thread::sleep;
use std::time::Instant;

use super::common::cuda::{self, Graph};
use super::graphs::{Form, Layer};
use super::*;

const WORLD: usize = 4;
/// Of a step, for tests that wait for it to pass.
const DEADLINE: Duration = Duration::from_secs(3);
/// A process has a context, a comm and steps behind it after this; and a recovery.
const START: Duration = Duration::from_secs(90);
const RECOVERY: Duration = Duration::from_secs(20);
const REPLAYS: usize = 40;

/// Adds the tests to the others.
pub fn add(add: &mut impl FnMut(String, Left, Run)) {
    type PerBackend = fn(Backend) -> Result<(), String>;
    let each: [(&str, PerBackend); 4] = [
        ("destroyed", destroyed),
        ("nobody_is_lost", nobody_is_lost),
        ("killed", |backend| lost(backend, libc::SIGKILL)),
        ("stopped", |backend| lost(backend, libc::SIGSTOP)),
    ];
    for (name, run) in each {
        for backend in BACKENDS {
            let name = format!("gpu/recover/{name}/{}", backend.name());
            add(name, Box::new(move || backend.refused_here()), Box::new(move || run(backend)));
        }
    }
}

/// What comes of a step of all ranks, of which only `members` take part: the others have no tokens, and who names their
/// experts names none.
fn among(members: u64, step: &oracle::Step) -> oracle::Step {
    let mut step = step.clone();
    let is_member = |rank: usize| members >> rank & 1 == 1;
    let owner = step.owner.clone();
    for (rank, input) in step.ranks.iter_mut().enumerate() {
        if !is_member(rank) {
            let row_bytes = input.rows.row_bytes;
            *input = Input {
                ids: Some(Vec::new()),
                weights: Some(Vec::new()),
                rows: Rows { row_bytes, bytes: Vec::new() },
                ..Default::default()
            };
            continue;
        }
        for id in input.ids.iter_mut().flatten() {
            let lost = owner.get(*id as usize).is_some_and(|owner| !is_member(*owner));
            if lost {
                *id = owner.len() as i64 + 1;
            }
        }
    }
    step
}

/// A layer, and a graph of it.
struct Captured<'a> {
    layer: Layer<'a>,
    graph: Graph,
    form: Form,
    backend: Backend,
}

impl Captured<'_> {
    /// Ordinary steps, whole and by halves, and replays: each another, `number` and those behind it.
    fn steps(&mut self, members: u64, number: usize) -> Result<(), String> {
        for at in 0..5 {
            let step = self.form.step(self.backend, number + at);
            self.layer.put(&step);
            if at % 2 == 0 {
                self.layer.whole()?
            } else {
                self.layer.halves()?
            }
            let checked = self.layer.check(&among(members, &step));
            checked.map_err(|error| format!("step {}: {error}", number + at))?;
        }
        for first in (0..REPLAYS).step_by(graphs::BATCH) {
            let number = |at: usize| number + 5 + first + at;
            let steps: Vec<_> =
                (0..graphs::BATCH).map(|at| self.form.step(self.backend, number(at))).collect();
            steps.iter().enumerate().for_each(|(at, step)| self.layer.enqueue_at(at, step));
            for at in 0..graphs::BATCH {
                self.layer.feed(at)?;
                self.graph.launch(1)?;
                self.layer.log(at)?;
            }
            cuda::synchronize()?;
            for (at, step) in steps.iter().enumerate() {
                let checked = self.layer.check_logged(at, &among(members, step));
                checked.map_err(|error| format!("replay {}: {error}", number(at)))?;
            }
        }
        Ok(())
    }
}

const ALL: u64 = (1 << WORLD) - 1;

fn recovered(comm: &Comm, generation: u64, members: u64, replaced: Option<bool>) -> Result<(), String> {
    let out = comm.recover(10_000, 500)?;
    expect("the generation", out.generation, generation)?;
    expect("the members", out.members[0], members)?;
    if let Some(replaced) = replaced {
        expect("whether windows were replaced", out.replaced == 1, replaced)?;
    }
    graphs::nothing_on_record(comm)
}

/// A rank that is a thread destroys its comm.
fn destroyed(backend: Backend) -> Result<(), String> {
    threads(WORLD, GPU_LIMIT, move |seat| {
        let comm = Comm::create(&small(seat, backend))?;
        let form = Form::small(WORLD);
        let mut layer = Layer::of(form.clone(), seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&form.step(backend, 8000))?;
        meet(seat)?;
        let graph = Graph::capture(|| layer.whole())?;
        let mut captured = Captured { layer, graph, form, backend };
        meet(seat)?;
        captured.steps(ALL, 8100)?;
        meet(seat)?;
        if seat.rank == 1 {
            // The routing is destroyed after it, and the handle is stale by then.
            // SAFETY: a handle of ours.
            check(unsafe { a2a_destroy(comm.handle()) })?;
        } else {
            // A graph finds out, or an ordinary step.
            if seat.rank == 0 {
                captured.graph.launch(1)?;
                cuda::synchronize()?;
            } else {
                captured.layer.whole().err().ok_or("a step without rank 1")?;
            }
            recovered(&comm, 2, ALL & !2, Some(false))?;
            captured.steps(ALL & !2, 8200)?;
            // Once more, among the same.
            recovered(&comm, 3, ALL & !2, Some(false))?;
            captured.steps(ALL & !2, 8300)?;
        }
        meet(seat)
    })
}

/// A rank does not come to a step, but to the recovery.
fn nobody_is_lost(backend: Backend) -> Result<(), String> {
    threads(WORLD, GPU_LIMIT, move |seat| {
        let mut config = small(seat, backend);
        config.timeout_ms = 1000;
        let comm = Comm::create(&config)?;
        let form = Form::small(WORLD);
        let mut layer = Layer::of(form.clone(), seat, backend, &comm, 0)?;
        meet(seat)?;
        layer.ordinary(&form.step(backend, 8400))?;
        meet(seat)?;
        let graph = Graph::capture(|| layer.whole())?;
        let mut captured = Captured { layer, graph, form, backend };
        meet(seat)?;
        if seat.rank != 2 {
            captured.graph.launch(1)?;
            cuda::synchronize()?;
            let record = comm.async_error()?;
            expect(format!("the record ({})", message(&record)), record.status, A2A_TIMEOUT)?;
        }
        recovered(&comm, 2, ALL, Some(false))?;
        captured.steps(ALL, 8500)?;
        meet(seat)
    })
}

// ------------------------------------------------------------------------------------------------ processes

/// A rank that does what it is told, line by line.
pub const FOLLOW: (&str, Job) = ("recover on a gpu", follow);

fn follow(seat: &Seat) -> Result<(), String> {
    let backend = Backend::named(&seat.args[0]);
    let mut config = small(seat, backend);
    config.timeout_ms = DEADLINE.as_millis() as i64;
    config.first_step_timeout_ms = 20_000;
    let comm = Comm::create(&config)?;
    let form = Form::small(seat.world);
    let mut layer = Layer::of(form.clone(), seat, backend, &comm, 0)?;
    layer.ordinary(&form.step(backend, 9000))?;
    let graph = Graph::capture(|| layer.whole())?;
    let mut captured = Captured { layer, graph, form, backend };
    captured.steps(ALL, 9100)?;
    println!("ready");
    for order in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<u64> = order.split(' ').skip(1).map(|word| word.parse().expect("a number")).collect();
        let outcome: Result<String, String> = match order.split(' ').next() {
            Some("run") => (|| {
                for number in 0.. {
                    let step = captured.form.step(backend, 20_000 + number);
                    captured.layer.put(&step);
                    if let Err(failure) = captured.layer.dispatch(A2A_PHASE_BOTH) {
                        return Ok(format!("{} {}", failure.status, failure.text));
                    }
                    let rest = captured.layer.experts().and_then(|()| {
                        captured.layer.combine(A2A_PHASE_BOTH).map_err(|failure| failure.to_string())
                    });
                    cuda::synchronize()?;
                    if let Err(text) = rest {
                        return Ok(format!("0 {text}"));
                    }
                }
                Ok(String::new())
            })(),
            Some("recover") => match comm.recover(10_000, 500) {
                Ok(out) => Ok(format!("0 {} {} {}", out.generation, out.members[0], out.replaced)),
                Err(failure) => Ok(format!("{} {}", failure.status, failure.text)),
            },
            Some("steps") => captured.steps(words[0], words[1] as usize).map(|()| "fine".to_string()),
            _ => Err(format!("no such order: {order:?}")),
        };
        println!("{}", outcome.unwrap_or_else(|error| format!("failed: {error}")));
    }
    Ok(())
}

/// One of four processes is killed, or stopped for longer than the deadline. The others go on, replays of what they
/// captured before included; one that wakes up changes nothing, and is told.
fn lost(backend: Backend, signal: i32) -> Result<(), String> {
    let stops = signal == libc::SIGSTOP;
    let victim = Rng::new(&[seed(), 320, backend as u64, u64::from(stops)]).below(WORLD);
    let id = GroupId::new();
    let args = vec![backend.name().to_string()];
    let spawn = |rank| Worker::spawn(FOLLOW.0, &[rank], &Seat { rank, world: WORLD, id, args: args.clone() });
    let mut workers: Vec<Worker> = (0..WORLD).map(spawn).collect();
    for worker in &workers {
        expect("an answer", worker.line(START)?.as_str(), "ready")?;
    }
    let others: Vec<usize> = (0..WORLD).filter(|rank| *rank != victim).collect();
    for worker in &mut workers {
        worker.tell("run")?;
    }
    sleep(Duration::from_millis(300));
    workers[victim].signal(signal);
    for &rank in &others {
        let line = workers[rank].line(START)?;
        let named = line.contains(&format!("rank {victim}")) || stops;
        if !named || line.starts_with("failed") {
            return Err(format!("rank {rank} got {line:?}"));
        }
    }
    let members = ALL & !(1 << victim);
    let begun = Instant::now();
    for &rank in &others {
        workers[rank].tell("recover")?;
    }
    for &rank in &others {
        // Whether processes share the GPU through a server decides if the memory of a dead one is safe.
        let line = workers[rank].line(RECOVERY)?;
        let kept = format!("0 2 {members} 0");
        let replaced = format!("0 2 {members} 1");
        if line != replaced && (stops || line != kept) {
            return Err(format!("rank {rank} recovered as {line:?} after {:?}", begun.elapsed()));
        }
    }
    let all_step = |workers: &mut Vec<Worker>, number: usize| -> Result<(), String> {
        for &rank in &others {
            workers[rank].tell(&format!("steps {members} {number}"))?;
        }
        for &rank in &others {
            expect(format!("rank {rank}"), workers[rank].line(START)?.as_str(), "fine")?;
        }
        Ok(())
    };
    all_step(&mut workers, 9200)?;
    if stops {
        workers[victim].signal(libc::SIGCONT);
        all_step(&mut workers, 9300)?;
        let line = workers[victim].line(START)?;
        if line.starts_with("failed") {
            return Err(format!("the late rank got {line:?}"));
        }
        workers[victim].tell("recover")?;
        let line = workers[victim].line(RECOVERY)?;
        let told =
            line.starts_with(&A2A_PEER_LOST.to_string()) && line.contains("recovered without this rank");
        if !told {
            return Err(format!("the late rank's recovery: {line:?}"));
        }
        all_step(&mut workers, 9400)?;
    }
    Ok(())
}
