//! a2a-perf: measures and checks liba2a, beside its peers, in one run.
//!
//! A rank is a process of this program (`measure`); the parent starts the ranks of one shape after another, collects
//! what they measured (`sweep`) and reports it. `--check` is the conformance tests themselves.

#[path = "../../tests/conformance.rs"]
#[allow(dead_code, reason = "the tests' tools are used in part")]
mod conformance;
mod gate;
mod machine;
mod measure;
mod peers;
mod plot;
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

const MEASURE: (&str, Job) = ("measure_shape", measure::job);

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

EXAMPLES
  a2a-perf --tokens 1,8,32,128,512,2048 --output sweep.csv --format csv
  a2a-perf --backends ht_flat,two_sided --routing zipf --cache warm,cold
  a2a-perf --tokens 128,2048 --peers
  a2a-perf plot sweep.csv --directory plots
  a2a-perf --check                the whole conformance matrix
  a2a-perf --check low_latency    what has low_latency in its name

FILES
  target/peers/mpi_alltoallv      the MPI peer, built by perf/peers/build.sh

EXIT STATUS
  0  all was measured; a shape that there is no memory for is named, and
     left out
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
}

fn main() -> ExitCode {
    let jobs: Vec<(&str, Job)> = conformance::JOBS.into_iter().chain([MEASURE]).collect();
    conformance::common::worker(&jobs);
    let arguments = Arguments::parse();
    if let Some(filter) = &arguments.check {
        let filter = (!filter.is_empty()).then(|| filter.clone());
        return conformance::run(&libtest_mimic::Arguments { filter, ..Default::default() });
    }
    let outcome = match &arguments.command {
        Some(Command::Plot { report, directory }) => plot(report, directory).map(|()| true),
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
    header.push(arguments.sweep.describe());
    let (rows, refused) = arguments.sweep.run()?;
    report::write(arguments.format, &header, &rows, &refused, &mut out)?;
    Ok(!refused.iter().any(|refused| refused.wrong))
}
