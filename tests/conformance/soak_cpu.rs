//! Many steps of 8 ranks on the CPU, each of them checked whole. The cells are those of the matrix, but for their
//! maxima: small ones, so that a step is mostly protocol. Each comm lives for thousands of rounds, whose top-k, tokens,
//! routings, slots, halves, replays, types and outputs are dealt like the matrix's, so that what one leaves behind lies
//! in the way of the next.
//!
//! A2A_TEST_STEPS says how many there are, shared by all backends and layouts alike. Ranks are threads: one process
//! derives a cell's rounds once for all of them. The flags they wait for are words of the memory that processes share.
//!
//! Then comms that come and go, A2A_TEST_COMMS of them, after which memory, descriptors and threads are as before.

use std::time::Instant;

use super::*;

const STEPS: usize = 2400;
const COMMS: usize = 300;
/// Comms before memory is looked at: what the first of anything leaves for good is not a leak.
const WARM_UP: usize = 300;
/// Of resident memory, however many comms there were.
const GROWTH: u64 = 1 << 20;
const WORLD: usize = 8;
/// Comms of each backend, one after the other: with every quantisation, limit, alignment and length of FIFOs there is.
const CELLS: usize = 8;
const MAX_TOKENS: usize = 8;
const MAX_ROW: usize = 256;
/// What a step may take on average, of a loaded machine.
const PATIENCE: Duration = Duration::from_millis(20);

/// Adds the tests to the others.
pub fn add(add: &mut impl FnMut(String, Left, Run)) {
    let left =
        || -> Left { Box::new(|| cuda::is_enabled().then(|| "of the CPU; gpu/soak/ is a GPU's".into())) };
    for backend in BACKENDS {
        add(format!("soak/{}", backend.name()), left(), Box::new(move || soak(backend)));
    }
    let alone = || launch(CHURN, 1, &[Host::Child(vec![0])], &[], LIMIT + PATIENCE * 2 * comms() as u32);
    add("soak/create_and_destroy".into(), left(), Box::new(alone));
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}
fn comms() -> usize {
    number("A2A_TEST_COMMS", COMMS)
}

fn count(rounds: &[Round]) -> usize {
    rounds.iter().map(|round| round.steps.len()).sum()
}

fn soak(backend: Backend) -> Result<(), String> {
    let share = number("A2A_TEST_STEPS", STEPS).div_ceil(BACKENDS.len() * CELLS);
    for index in 0..CELLS {
        let enough = |rounds: &[Round]| rounds.len() >= share.div_ceil(3) && count(rounds) >= share;
        let cell = Arc::new(Cell::dealt(backend, WORLD, (index, index), (MAX_TOKENS, MAX_ROW), enough));
        let limit = LIMIT + PATIENCE * count(&cell.rounds) as u32;
        threads(WORLD, limit, move |seat| cell.run(seat))
            .map_err(|error| format!("A2A_TEST_SEED={}, cell {index}\n{error}", seed()))?;
    }
    Ok(())
}

pub const CHURN: (&str, Job) = ("churn", churn);

/// In a process of its own.
fn churn(_: &Seat) -> Result<(), String> {
    come_and_go(WARM_UP)?;
    let before = Footprint::read()?;
    come_and_go(comms())?;
    // Threads of the library end by themselves, a little after their comm.
    let limit = Instant::now() + Duration::from_secs(5);
    let mut after = Footprint::read()?;
    while after.others != before.others && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(10));
        after = Footprint::read()?;
    }
    expect("descriptors, threads, bytes of windows", after.others, before.others)?;
    let grown = after.resident.saturating_sub(before.resident);
    if grown >= GROWTH {
        return Err(format!(
            "{} comms left {grown} bytes of resident memory, before {before:?}, after {after:?}",
            comms()
        ));
    }
    Ok(())
}

/// Two ranks create a comm, do a step that is checked, and destroy it, so many times: each backend in turn.
fn come_and_go(times: usize) -> Result<(), String> {
    let ids: Vec<GroupId> = (0..times).map(|_| GroupId::new()).collect();
    threads(2, LIMIT + PATIENCE * times as u32, move |seat| {
        for (number, &id) in ids.iter().enumerate() {
            let (seat, backend) = (Seat { id, ..seat.clone() }, BACKENDS[number % BACKENDS.len()]);
            let comm = Comm::create(&small(&seat, backend))?;
            let routing = comm.routing(0)?;
            small_step(&seat, backend, &comm, &routing).map_err(|error| format!("comm {number}: {error}"))?;
            // Either may go first.
            if number.is_multiple_of(2) {
                routing.destroy()?;
                comm.destroy()?;
            } else {
                comm.destroy()?;
                routing.destroy()?;
            }
        }
        Ok(())
    })
}

/// What a process has of the system's.
#[derive(Debug)]
struct Footprint {
    /// Bytes.
    resident: u64,
    /// Open descriptors, threads, bytes of mapped windows.
    others: (usize, usize, u64),
}

impl Footprint {
    fn read() -> Result<Footprint, String> {
        let file = "/proc/self/smaps_rollup";
        let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        let entries = |path: &str| {
            std::fs::read_dir(path).map(Iterator::count).map_err(|error| format!("{path}: {error}"))
        };
        Ok(Footprint {
            resident: kilobytes.ok_or_else(|| format!("{file} has no Rss"))? << 10,
            others: (entries("/proc/self/fd")?, entries("/proc/self/task")?, mapped_windows()?),
        })
    }
}
