//! a2a-perf: measures and checks liba2a, beside its peers, in one run.
//!
//! A rank is a process of this program (`measure`), on CUDA a stream of one process (`one_gpu`); the parent starts the
//! ranks of one shape after another, collects what they measured (`sweep`) and reports it. `--check` is the conformance
//! tests themselves.

mod bare_nccl;
#[path = "../../tests/conformance.rs"]
#[allow(dead_code, reason = "the tests' tools are used in part")]
mod conformance;
mod data_plane;
mod gate;
mod gpu;
mod machine;
mod measure;
mod meeting;
mod one_gpu;
mod over_links;
mod over_nccl;
mod over_nixl;
mod peers;
mod plot;
mod reference;
mod report;
mod routing;
mod row;
mod shape;
mod sweep;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use conformance::common::Job;
use report::Format;
use shape::Device;

const MEASURE: (&str, Job) = ("measure_shape", measure::job);
const ONE_GPU: (&str, Job) = ("measure_on_one_gpu", one_gpu::job);
const FLOORS: (&str, Job) = ("measure_floors", one_gpu::floors);
const OVER_LINKS: (&str, Job) = ("measure_over_links", over_links::job);
const OVER_NCCL: (&str, Job) = ("measure_over_nccl", over_nccl::job);
const OVER_NIXL: (&str, Job) = ("measure_over_nixl", over_nixl::job);

const LONG_ABOUT: &str = "\
Measures a2a_dispatch and a2a_combine: every rank a process (or a thread) of this program, the same routing for every \
backend and every peer. Before a shape is timed, and after it, its results are compared with an oracle: all received \
rows, and the sums of up to 64 tokens of each rank bit by bit. A shape that fails has no time, and the exit status is 1.";

const AFTER_HELP: &str = "\
FIGURES
  Times are of the slowest rank, iteration by iteration, after a meeting of all
  ranks; p50 and p99 over the iterations.
  dispatch, combine   each alone
  pair                one after the other, without a meeting between
  logical B           one row per (token, destination rank), tokens and scales
                      alone, of the busiest rank: the same for every backend,
                      so that rates compare
  wire B              what the backend moved between windows for it, side rows
                      included, of the busiest rank
  warm, cold          cold: each rank touches 64 MiB before each operation

ON CUDA
  All ranks share one GPU: each is a comm of one process with a stream of its
  own. Such figures are of protocol, launches and the GPU's memory, not of
  NVLink. Times are of device events behind a gate, a kernel that spins until
  the host has made all calls; p10, p50 and p90 over the iterations.
  scope all           every rank at once, from the first event to the moment
                      when all are done
  scope rank0         rank 0 alone, after all others have sent and are done
  combine, pair       the experts wrote into a2a_combine_buffer; combine_staged
                      and pair_staged: from the caller's tensor (--staged)
  pair_graph          replays of a captured pair (--graph)
  dispatch_split      a dispatch of two calls, SEND and RECV, one behind the
                      other on the stream (--split)
  floor               nothing, one and two empty kernels of each rank
  GB/s                rows read and written, of all ranks of the scope
  bare                our rate as a part of the bare data plane's (--peers):
                      with a row for each (token, rank) for rank_major and
                      flat, for each (token, expert) for expert_padded and
                      expert_contiguous
  FlashInfer          its time on an H100, where card and shape are the same
                      (perf/reference/flashinfer-h100.csv), and how many times
                      as fast ours is
  Dispatch is asked for views of tokens, scales, ids, weights and rank_counts;
  of expert layouts without ids, with expert_counts and expert_offsets instead.

EXAMPLES
  a2a-perf --tokens 1,8,32,128,512,2048 --output sweep.csv --format csv
  a2a-perf --backends ht_flat,two_sided --routing zipf --cache warm,cold
  a2a-perf --tokens 128,2048 --peers
  a2a-perf --device cuda --ranks 8 --experts 256 --tokens 1,128,4096 --peers
  a2a-perf --device cuda --backends low_latency --dtype bf16,fp8 --split
  a2a-perf plot sweep.csv --directory plots
  A2A_NCCL_LIB=libnccl.so.2 a2a-perf links --ranks 2
  A2A_NCCL_LIB=libnccl.so.2 a2a-perf nccl --ranks 2
  A2A_NIXL_LIB=libnixl_capi.so a2a-perf nixl --ranks 4
  a2a-perf --check                the whole conformance matrix
  a2a-perf --check low_latency    what has low_latency in its name
  a2a-perf --check --device cuda  all of it on CUDA memory, and what only a GPU has

FILES
  target/peers/mpi_alltoallv      the MPI peer, built by perf/peers/build.sh
  target/peers/data_plane         the bare data plane, built by
                                  perf/peers/build_data_plane.sh

EXIT STATUS
  0  all was measured; a shape that there is no memory for, or that the
     library does not have, is named, and left out
  1  a check failed
  2  usage";

#[derive(Parser)]
#[command(name = "a2a-perf", version, about = "Measures and checks liba2a, beside its peers, in one run")]
#[command(long_about = LONG_ABOUT, after_long_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    sweep: sweep::Sweep,
    /// Run the conformance matrix instead, or the part of it whose names contain FILTER
    #[arg(long, value_name = "FILTER", num_args = 0..=1, default_missing_value = "")]
    check: Option<String>,
    /// cpu, cuda (the first GPU) or cuda:N; with --check and nixl also cuda:rank (rank r has GPU r % the number of GPUs)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// table, csv or json
    #[arg(long, default_value = "table", value_parser = Format::parse)]
    format: Format,
    /// Write the report here instead of to standard output
    #[arg(long, value_name = "FILE")]
    output: Option<std::path::PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Draw a report (CSV or JSON) as SVG: p50 and rate over tokens
    Plot {
        /// What --format csv or json wrote
        report: std::path::PathBuf,
        /// Where the pictures go
        #[arg(long, default_value = ".")]
        directory: std::path::PathBuf,
    },
    /// Every backend with a GPU for each rank, beside bare NCCL and copies of the same bytes, as CSV
    Links(over_links::Links),
    /// ALLGATHER_REDUCESCATTER over NCCL, beside bare NCCL calls of the same bytes, as CSV
    Nccl(over_nccl::Beside),
    /// NIXL_ELASTIC, beside a mesh of bare NIXL writes of the same bytes, and while a rank joins, as CSV
    Nixl(over_nixl::Beside),
}

fn main() -> ExitCode {
    let jobs: Vec<(&str, Job)> = conformance::JOBS
        .into_iter()
        .chain([MEASURE, ONE_GPU, FLOORS, OVER_LINKS, OVER_NCCL, OVER_NIXL])
        .collect();
    conformance::common::worker(&jobs);
    let arguments = Arguments::parse();
    if let Some(filter) = &arguments.check {
        let filter = (!filter.is_empty()).then(|| filter.clone());
        if let Err(error) = conformance::common::choose_device(&arguments.device) {
            eprintln!("a2a-perf: {error}");
            return ExitCode::from(2);
        }
        return conformance::run(&libtest_mimic::Arguments { filter, ..Default::default() });
    }
    let outcome = match &arguments.command {
        Some(Command::Plot { report, directory }) => plot(report, directory).map(|()| true),
        Some(Command::Links(links)) => links.run(&mut std::io::stdout()),
        Some(Command::Nccl(beside)) => beside.run(&mut std::io::stdout()).map(|()| true),
        Some(Command::Nixl(beside)) => conformance::common::choose_device(&arguments.device)
            .and_then(|()| beside.run(&mut std::io::stdout()))
            .map(|()| true),
        None => run(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("a2a-perf: {error}");
            ExitCode::from(2)
        }
    }
}

fn plot(report: &std::path::Path, directory: &std::path::Path) -> Result<(), String> {
    let text = std::fs::read_to_string(report).map_err(|error| format!("{}: {error}", report.display()))?;
    let rows = report::read(&text).map_err(|error| format!("{}: {error}", report.display()))?;
    plot::plot(&rows, directory)
}

/// True if nothing was wrong.
fn run(arguments: &Arguments) -> Result<bool, String> {
    let mut out: Box<dyn Write> = match &arguments.output {
        Some(path) => {
            Box::new(std::fs::File::create(path).map_err(|error| format!("{}: {error}", path.display()))?)
        }
        None => Box::new(std::io::stdout()),
    };
    let mut header = machine::describe();
    let device = Device::parse(&arguments.device)?;
    header.push(arguments.sweep.describe(device));
    let outcome = arguments.sweep.run(device)?;
    header.extend(outcome.about.iter().cloned());
    report::write(arguments.format, &header, &outcome, &mut out)?;
    Ok(!outcome.refused.iter().any(|refused| refused.wrong))
}
