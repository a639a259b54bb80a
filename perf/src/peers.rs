//! What liba2a is measured beside: the same job with MPI_Alltoallv (perf/peers/), and the plain copies it comes down to.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use serde::Deserialize;

use crate::row::{Row, percentile};

/// What is measured, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Shape<'a> {
    pub ranks: usize,
    /// Of each rank.
    pub tokens: usize,
    pub hidden: usize,
    pub topk: usize,
    /// In consecutive blocks; the first `experts % ranks` ranks own one more.
    pub experts: usize,
    /// [ranks][tokens][topk]; an id outside 0..experts goes nowhere.
    pub ids: &'a [i32],
    /// What the rows of the result call `ids`.
    pub routing: &'a str,
    /// Caches are emptied before each timed operation.
    pub cold: bool,
    pub warmup: usize,
    pub iterations: usize,
}

impl Shape<'_> {
    fn checked(self) -> Result<Self, String> {
        let ids = self.ranks * self.tokens * self.topk;
        if self.ids.len() != ids {
            return Err(format!("{} ids for [ranks][tokens][topk] of {ids}", self.ids.len()));
        }
        if [self.ranks, self.hidden, self.topk, self.experts, self.iterations].contains(&0) {
            return Err("ranks, hidden, topk, experts and iterations are at least 1".into());
        }
        Ok(self)
    }

    fn owner(&self, id: i32) -> Option<usize> {
        let id = usize::try_from(id).ok().filter(|&id| id < self.experts)?;
        let (each, longer) = (self.experts / self.ranks, self.experts % self.ranks);
        let in_longer = longer * (each + 1);
        Some(if id < in_longer { id / (each + 1) } else { longer + (id - in_longer) / each })
    }

    /// The (token, destination rank) rows of `source`, by token, then by rank.
    pub fn rows_of(&self, source: usize) -> Vec<(usize, usize)> {
        let mut rows = self.expert_rows_of(source);
        rows.dedup();
        rows
    }

    /// The (token, expert) rows of `source`, by token, then by expert: each the token and the expert's rank.
    pub fn expert_rows_of(&self, source: usize) -> Vec<(usize, usize)> {
        let mut rows = Vec::new();
        for token in 0..self.tokens {
            let at = (source * self.tokens + token) * self.topk;
            let mut ids = self.ids[at..at + self.topk].to_vec();
            ids.sort_unstable();
            ids.dedup();
            rows.extend(ids.into_iter().filter_map(|id| self.owner(id)).map(|rank| (token, rank)));
        }
        rows
    }

    /// Rows that the busiest rank sends or receives, whichever are more, its rows to itself included.
    pub fn busiest_rows(&self) -> usize {
        self.busiest(|source| self.rows_of(source))
    }

    /// As `busiest_rows`, of other rows.
    pub fn busiest(&self, rows_of: impl Fn(usize) -> Vec<(usize, usize)>) -> usize {
        let mut received = vec![0; self.ranks];
        let mut most = 0;
        for source in 0..self.ranks {
            let rows = rows_of(source);
            most = most.max(rows.len());
            for (_, to) in rows {
                received[to] += 1;
            }
        }
        received.into_iter().max().unwrap_or(0).max(most)
    }

    fn row(&self, peer: &str, mode: &str, operation: &str, timed: &Timed) -> Row {
        Row {
            device: "cpu".into(),
            backend: peer.into(),
            layout: String::new(),
            ranks: self.ranks,
            mode: mode.into(),
            tokens: self.tokens,
            hidden: self.hidden,
            dtype: "bf16".into(),
            experts: self.experts,
            topk: self.topk,
            routing: self.routing.into(),
            operation: operation.into(),
            cache: if self.cold { "cold" } else { "warm" }.into(),
            iterations: self.iterations,
            p50_us: timed.p50_us,
            p99_us: timed.p99_us,
            logical_bytes: timed.logical_bytes,
            wire_bytes: timed.wire_bytes,
            scope: String::new(),
            p10_us: timed.p10_us,
            p90_us: timed.p90_us,
            memory_bytes: 0,
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- MPI

const PROGRAM: &str = "mpi_alltoallv";

/// A name, and what mpirun is told beside COMMON. By default ranks that wait spin, and yield only where mpirun knows
/// that there are more of them than cores.
const SETTINGS: [(&str, &[&str]); 2] =
    [("mpi_alltoallv (default)", &[]), ("mpi_alltoallv (yield)", &["--mca", "mpi_yield_when_idle", "1"])];

/// Root in containers, more ranks than cores, no rank tied to a core that others use. Shared memory by name: where
/// libfabric is installed, Open MPI may take its TCP through eth0 for ranks of one host, which is twice as slow.
const COMMON: &str = "--allow-run-as-root --oversubscribe --bind-to none --mca pml ob1 --mca btl vader,self";

/// Where a peer's program lies: `peers/` of the target folder that this executable was built into.
pub fn folder_of(program: &str, script: &str) -> Result<PathBuf, String> {
    let exe = env::current_exe().map_err(|error| format!("where is this executable? {error}"))?;
    let mut folders = exe.ancestors().skip(1).map(|above| above.join("peers"));
    folders.find(|peers| peers.join(program).exists()).ok_or_else(|| {
        format!(
            "a peer is not built (no peers/{program} above {}); perf/peers/{script} builds it",
            exe.display()
        )
    })
}

/// The MPI program as perf/peers/build.sh left it.
#[derive(Debug)]
pub struct Peers {
    folder: PathBuf,
    /// Which MPI.
    pub version: String,
    /// Of one run of the program, which measures three operations.
    pub limit: Duration,
    /// What mpirun has to end its ranks after the limit, before it is killed.
    grace: Duration,
}

/// One operation, as the program reports it.
#[derive(Deserialize)]
struct Timed {
    #[serde(default)]
    p10_us: Option<f64>,
    p50_us: f64,
    #[serde(default)]
    p90_us: Option<f64>,
    p99_us: f64,
    logical_bytes: u64,
    wire_bytes: u64,
}

#[derive(Deserialize)]
struct Answer {
    check: bool,
    iterations: usize,
    busiest_rows: usize,
    dispatch: Timed,
    combine: Timed,
    pair: Timed,
}

impl Peers {
    /// The error says how to build it.
    pub fn find() -> Result<Peers, String> {
        Self::at(&folder_of(PROGRAM, "build.sh")?)
    }

    fn at(folder: &Path) -> Result<Peers, String> {
        let mut peers = Peers {
            folder: folder.into(),
            version: String::new(),
            limit: Duration::from_secs(300),
            grace: Duration::from_secs(5),
        };
        let said = peers.run(&["--version".into()]).map_err(|why| {
            format!(
                "{} does not run ({why}); perf/peers/build.sh builds it anew",
                folder.join("mpirun").display()
            )
        })?;
        peers.version = said.lines().next().unwrap_or_default().trim().into();
        Ok(peers)
    }

    /// Dispatch, combine and pair for each setting of MPI, the default one first; ranks are processes. The program
    /// checks its results before it times them: an error is also what says that they were wrong.
    pub fn mpi(&self, shape: &Shape) -> [Result<Vec<Row>, String>; 2] {
        SETTINGS.map(|(name, options)| {
            self.measure(name, options, shape).map_err(|why| format!("{name}, {} ranks: {why}", shape.ranks))
        })
    }

    fn measure(&self, name: &str, options: &[&str], shape: &Shape) -> Result<Vec<Row>, String> {
        let shape = shape.checked()?;
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let ids = folder.path().join("ids");
        let bytes: Vec<u8> = shape.ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        fs::write(&ids, bytes).map_err(|error| format!("cannot write {}: {error}", ids.display()))?;

        let mut arguments: Vec<String> =
            COMMON.split(' ').chain(options.iter().copied()).map(String::from).collect();
        arguments.extend(["--timeout".into(), self.limit.as_secs().max(1).to_string()]);
        arguments.extend(["-np".into(), shape.ranks.to_string()]);
        arguments.push(self.folder.join(PROGRAM).display().to_string());
        arguments.push(ids.display().to_string());
        let numbers = [shape.tokens, shape.hidden, shape.topk, shape.experts, shape.warmup, shape.iterations];
        arguments.extend(numbers.map(|number| number.to_string()));
        arguments.push(u8::from(shape.cold).to_string());

        let said = self.run(&arguments)?;
        let line = said.lines().rfind(|line| line.starts_with('{')).ok_or("it printed no result")?;
        let answer: Answer =
            serde_json::from_str(line).map_err(|error| format!("not a result ({error}): {line}"))?;
        if !answer.check {
            return Err("its results are wrong".into());
        }
        // Both read the same routing: else the same bytes are not compared.
        let ours = (shape.busiest_rows(), shape.iterations);
        if (answer.busiest_rows, answer.iterations) != ours {
            return Err(format!(
                "it measured {} rows of the busiest rank, {} times; here they are {}, {} times",
                answer.busiest_rows, answer.iterations, ours.0, ours.1
            ));
        }
        let operations = [("dispatch", answer.dispatch), ("combine", answer.combine), ("pair", answer.pair)];
        Ok(operations.map(|(operation, timed)| shape.row(name, "processes", operation, &timed)).into())
    }

    /// What mpirun writes to its output. A shell script, which sets what a relocated MPI needs and becomes the real one.
    fn run(&self, arguments: &[String]) -> Result<String, String> {
        let mut command = Command::new("sh");
        command.arg(self.folder.join("mpirun")).args(arguments);
        run_for(command, self.limit, self.grace)
    }
}

/// What a program writes to its output.
pub fn run(command: Command, limit: Duration) -> Result<String, String> {
    run_for(command, limit, Duration::ZERO)
}

/// Output goes to files, so that no full pipe holds a rank up while it is timed.
fn run_for(mut command: Command, limit: Duration, grace: Duration) -> Result<String, String> {
    let name = PathBuf::from(command.get_program());
    let system = |error: std::io::Error| format!("cannot run {}: {error}", name.display());
    let folder = tempfile::tempdir().map_err(system)?;
    let (out, err) = (folder.path().join("out"), folder.path().join("err"));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(File::create(&out).map_err(system)?)
        .stderr(File::create(&err).map_err(system)?)
        .spawn()
        .map_err(system)?;

    let end = Instant::now() + limit + grace;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(system)? {
            break status;
        }
        if Instant::now() >= end {
            // Ranks whose mpirun has gone end themselves.
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("killed after {} s{}", limit.as_secs_f64(), tail(&err)));
        }
        thread::sleep(Duration::from_millis(50));
    };
    if !status.success() {
        return Err(format!("{status}{}", tail(&err)));
    }
    Ok(String::from_utf8_lossy(&fs::read(&out).map_err(system)?).into_owned())
}

/// The last lines of what was written to the standard error stream, to stand behind a message.
fn tail(err: &Path) -> String {
    let text = fs::read(err).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(8)..].join("\n");
    if last.is_empty() { last } else { format!(":\n{last}") }
}

// -------------------------------------------------------------------------------------------------------- memcpy

/// The copies that a dispatch cannot do without: each rank, a thread here, copies each of its (token, destination
/// rank) rows into the region of that rank; no ids, no counts. A dispatch ends when all rows have come, so the time is
/// from the first rank's start to the last one's end. The operation is "dispatch". `mode` only names the row: memory
/// that processes share is written at the same speed as a thread's.
pub fn memcpy(shape: &Shape, mode: &str) -> Result<Vec<Row>, String> {
    let shape = shape.checked()?;
    let hidden = shape.hidden;
    let rows: Vec<_> = (0..shape.ranks).map(|source| shape.rows_of(source)).collect();
    let count = |source: usize, to: usize| rows[source].iter().filter(|row| row.1 == to).count();

    let mut regions: Vec<Vec<u16>> = (0..shape.ranks)
        .map(|to| vec![u16::MAX; (0..shape.ranks).map(|source| count(source, to)).sum::<usize>() * hidden])
        .collect();
    // [source][to]: a region is cut by source, as (source rank, token) order has it.
    let mut parts: Vec<Vec<&mut [u16]>> = (0..shape.ranks).map(|_| Vec::new()).collect();
    for (to, region) in regions.iter_mut().enumerate() {
        let mut rest = region.as_mut_slice();
        for (source, parts) in parts.iter_mut().enumerate() {
            let (part, behind) = rest.split_at_mut(count(source, to) * hidden);
            parts.push(part);
            rest = behind;
        }
    }

    let (barrier, epoch) = (Barrier::new(shape.ranks), Instant::now());
    let times: Vec<Option<Vec<(f64, f64)>>> = thread::scope(|scope| {
        let ranks: Vec<_> = rows
            .iter()
            .zip(parts)
            .enumerate()
            .map(|(source, (rows, parts))| {
                let barrier = &barrier;
                scope.spawn(move || copy(&shape, source, rows, parts, barrier, epoch))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a thread that copies does not panic")).collect()
    });
    let times: Vec<Vec<(f64, f64)>> =
        times.into_iter().collect::<Option<_>>().ok_or("memcpy: a row is not what was copied")?;

    let mut slowest: Vec<f64> = (0..shape.iterations)
        .map(|iteration| {
            let of = |part: fn(&(f64, f64)) -> f64| times.iter().map(move |times| part(&times[iteration]));
            of(|times| times.1).fold(0.0, f64::max) - of(|times| times.0).fold(f64::INFINITY, f64::min)
        })
        .collect();
    slowest.sort_by(f64::total_cmp);
    let bytes = (shape.busiest_rows() * hidden * size_of::<u16>()) as u64;
    let timed = Timed {
        p10_us: Some(percentile(&slowest, 10)),
        p50_us: percentile(&slowest, 50),
        p90_us: Some(percentile(&slowest, 90)),
        p99_us: percentile(&slowest, 99),
        logical_bytes: bytes,
        wire_bytes: bytes,
    };
    Ok(vec![shape.row("memcpy", mode, "dispatch", &timed)])
}

/// One rank: when each timed iteration began and ended, in microseconds; none if what it copied is not there.
fn copy(
    shape: &Shape,
    source: usize,
    rows: &[(usize, usize)],
    mut to: Vec<&mut [u16]>,
    barrier: &Barrier,
    epoch: Instant,
) -> Option<Vec<(f64, f64)>> {
    let hidden = shape.hidden;
    let tokens: Vec<u16> =
        (0..shape.tokens * hidden).map(|at| (at / hidden * 31 + at + source) as u16).collect();
    let mut other = vec![1u8; if shape.cold { 64 << 20 } else { 0 }];
    let mut times = Vec::with_capacity(shape.iterations);
    for iteration in 0..shape.warmup + shape.iterations {
        // Nobody empties caches on a core that another rank needs to finish.
        barrier.wait();
        // One byte of each cache line, as the MPI program does it.
        other.iter_mut().step_by(64).for_each(|byte| *byte = byte.wrapping_add(1));
        std::hint::black_box(&other);
        barrier.wait();
        let start = epoch.elapsed();
        let mut at = vec![0; to.len()];
        for &(token, rank) in rows {
            let row = &tokens[token * hidden..][..hidden];
            to[rank][at[rank]..][..hidden].copy_from_slice(row);
            at[rank] += hidden;
        }
        std::hint::black_box(&to);
        if iteration >= shape.warmup {
            times.push((start.as_secs_f64() * 1e6, epoch.elapsed().as_secs_f64() * 1e6));
        }
    }
    let mut rest: Vec<&[u16]> = to.iter().map(|part| &**part).collect();
    let right = rows.iter().all(|&(token, rank)| {
        let (row, behind) = rest[rank].split_at(hidden);
        rest[rank] = behind;
        row == &tokens[token * hidden..][..hidden]
    });
    right.then_some(times)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// 2 ranks, 2 tokens, top-2 of 5: rank 0 owns 0, 1 and 2.
    pub const SHAPE: Shape = Shape {
        ranks: 2,
        tokens: 2,
        hidden: 8,
        topk: 2,
        experts: 5,
        ids: &[0, 2, 2, 3, -1, 5, 4, 4],
        routing: "hash",
        cold: false,
        warmup: 1,
        iterations: 3,
    };

    #[test]
    fn a_row_for_each_token_and_rank_that_owns_one_of_its_experts() {
        assert_eq!(SHAPE.rows_of(0), [(0, 0), (1, 0), (1, 1)]);
        assert_eq!(SHAPE.rows_of(1), [(1, 1)]);
        assert_eq!(SHAPE.busiest_rows(), 3);
        // Rank 1 now receives more than any rank sends.
        assert_eq!(Shape { ids: &[3, 3, 3, 3, 4, 4, 4, 4], ..SHAPE }.busiest_rows(), 4);
    }

    #[test]
    fn a_row_for_each_token_and_expert() {
        assert_eq!(SHAPE.expert_rows_of(0), [(0, 0), (0, 0), (1, 0), (1, 1)]);
        // An expert chosen twice has one row.
        assert_eq!(SHAPE.expert_rows_of(1), [(1, 1)]);
        assert_eq!(SHAPE.busiest(|source| SHAPE.expert_rows_of(source)), 4);
    }

    #[test]
    fn experts_are_owned_in_blocks_of_which_the_first_are_longer() {
        let owners = |experts, ranks| {
            let shape = Shape { experts, ranks, ..SHAPE };
            (-1..=experts as i32).map(|id| shape.owner(id)).collect::<Vec<_>>()
        };
        assert_eq!(owners(4, 3), [None, Some(0), Some(0), Some(1), Some(2), None]);
        assert_eq!(owners(2, 3), [None, Some(0), Some(1), None]);
    }

    #[test]
    fn memcpy_moves_the_rows_of_the_busiest_rank() {
        for cold in [false, true] {
            let rows = memcpy(&Shape { cold, ..SHAPE }, "threads").unwrap();
            let [row] = &rows[..] else { panic!("{rows:?}") };
            assert_eq!((&*row.backend, &*row.mode, &*row.operation), ("memcpy", "threads", "dispatch"));
            assert_eq!(row.cache, if cold { "cold" } else { "warm" });
            assert_eq!((row.logical_bytes, row.wire_bytes), (3 * 8 * 2, 3 * 8 * 2));
            assert!(0.0 < row.p50_us && row.p50_us <= row.p99_us, "{row:?}");
        }
    }

    #[test]
    fn a_shape_that_contradicts_itself_is_refused() {
        let why = memcpy(&Shape { ids: &SHAPE.ids[1..], ..SHAPE }, "threads").unwrap_err();
        assert_eq!(why, "7 ids for [ranks][tokens][topk] of 8");
        assert!(memcpy(&Shape { iterations: 0, ..SHAPE }, "threads").is_err());
    }

    /// A launcher of our own, whose answer is known.
    fn launcher(script: &str) -> (tempfile::TempDir, Peers) {
        let folder = tempfile::tempdir().unwrap();
        let script = format!(
            "if [ \"$1\" = --version ]; then echo 'MPI 0'; exit; fi\nfolder={}\n{script}\n",
            folder.path().display()
        );
        fs::write(folder.path().join("mpirun"), script).unwrap();
        let peers = Peers::at(folder.path()).unwrap();
        assert_eq!(peers.version, "MPI 0");
        (folder, peers)
    }

    fn answer(check: bool, rows: usize) -> String {
        let timed = r#"{"p50_us": 1.5, "p99_us": 2.5, "logical_bytes": 48, "wire_bytes": 96}"#;
        format!(
            r#"echo '{{"check": {check}, "iterations": 3, "busiest_rows": {rows},
                "dispatch": {timed}, "combine": {timed}, "pair": {timed}}}' | tr -d '\n'"#
        )
    }

    #[test]
    fn the_answer_becomes_a_row_for_each_setting_and_operation() {
        let script = format!("echo \"$@\" >>$folder/calls; echo noise; {}", answer(true, 3));
        let (folder, peers) = launcher(&script);
        let rows: Vec<Row> = peers.mpi(&SHAPE).into_iter().flat_map(Result::unwrap).collect();
        let names: Vec<_> = rows.iter().map(|row| (&*row.backend, &*row.operation)).collect();
        let expected =
            SETTINGS.map(|(name, _)| ["dispatch", "combine", "pair"].map(|operation| (name, operation)));
        assert_eq!(names, expected.concat());
        assert_eq!((rows[5].p50_us, rows[5].p99_us), (1.5, 2.5));
        assert_eq!((rows[5].logical_bytes, rows[5].wire_bytes), (48, 96));
        assert_eq!(rows[5].mode, "processes");

        let calls = fs::read_to_string(folder.path().join("calls")).unwrap();
        let yields: Vec<bool> =
            calls.lines().map(|call| call.contains("--mca mpi_yield_when_idle 1 ")).collect();
        assert_eq!(yields, [false, true]);
        for call in calls.lines() {
            assert!(call.contains("-np 2 ") && call.ends_with("/ids 2 8 2 5 1 3 0"), "{call}");
        }
    }

    #[test]
    fn what_went_wrong_is_said() {
        let said = |script: &str| {
            let (_folder, peers) = launcher(script);
            let [why, _] = peers.mpi(&SHAPE);
            why.unwrap_err()
        };
        let why = said("echo one >&2; echo two >&2; exit 9");
        assert_eq!(why, "mpi_alltoallv (default), 2 ranks: exit status: 9:\none\ntwo");
        assert!(said(&answer(false, 3)).ends_with("its results are wrong"));
        assert!(said(&answer(true, 4)).contains("4 rows of the busiest rank"));
        assert!(said("echo hello").ends_with("it printed no result"));
        assert!(said("echo '{}'").contains("not a result"));
    }

    #[test]
    fn a_run_past_its_limit_is_killed() {
        let (folder, mut peers) = launcher("echo $$ >$folder/pid; echo waiting >&2; exec sleep 1000");
        (peers.limit, peers.grace) = (Duration::from_millis(200), Duration::ZERO);
        let [why, _] = peers.mpi(&SHAPE);
        assert_eq!(why.unwrap_err(), "mpi_alltoallv (default), 2 ranks: killed after 0.2 s:\nwaiting");
        let pid = fs::read_to_string(folder.path().join("pid")).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists());
    }

    #[test]
    fn the_program_itself_where_it_is_built() {
        let peers = match Peers::find() {
            Ok(peers) => peers,
            Err(why) => return println!("skipped: {why}"),
        };
        for cold in [false, true] {
            for rows in peers.mpi(&Shape { cold, ..SHAPE }) {
                let rows = rows.unwrap();
                // With two ids and two weights, 4 bytes each, only in dispatch.
                let bytes: Vec<_> = rows.iter().map(|row| (row.logical_bytes, row.wire_bytes)).collect();
                assert_eq!(bytes, [(3 * 16, 3 * 32), (3 * 16, 3 * 16), (6 * 16, 3 * 48)]);
            }
        }
    }
}
