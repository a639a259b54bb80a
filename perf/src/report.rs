//! Figures as a table, CSV or JSON.

use std::io::Write;

use crate::data_plane::Per;
use crate::reference::flashinfer;
use crate::row::Row;
use crate::sweep::Outcome;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Table,
    Csv,
    Json,
}

impl Format {
    pub fn parse(text: &str) -> Result<Format, String> {
        match text {
            "table" => Ok(Format::Table),
            "csv" => Ok(Format::Csv),
            "json" => Ok(Format::Json),
            _ => Err(format!("format {text:?} is not table, csv or json")),
        }
    }
}

/// A shape that has no time, and why.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Refused {
    pub what: String,
    pub why: String,
    /// The results were wrong, rather than the shape too large.
    pub wrong: bool,
}

/// Bytes over microseconds, as GB/s.
fn rate(bytes: u64, us: f64) -> f64 {
    bytes as f64 / us / 1000.0
}

/// Of the CPU.
fn table(rows: &[Row], out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(
        out,
        "{:<30} {:<18} {:>6} {:<5} {:>7} {:<9} {:<8} {:>5} {:>10} {:>10} {:>12} {:>12} {:>8}",
        "backend",
        "layout",
        "tokens",
        "dtype",
        "hidden",
        "routing",
        "op",
        "cache",
        "p50 us",
        "p99 us",
        "logical B",
        "wire B",
        "GB/s"
    )?;
    for row in rows {
        writeln!(
            out,
            "{:<30} {:<18} {:>6} {:<5} {:>7} {:<9} {:<8} {:>5} {:>10.1} {:>10.1} {:>12} {:>12} {:>8.2}",
            row.backend,
            row.layout,
            row.tokens,
            row.dtype,
            row.hidden,
            row.routing,
            row.operation,
            row.cache,
            row.p50_us,
            row.p99_us,
            row.logical_bytes,
            row.wire_bytes,
            rate(row.logical_bytes, row.p50_us)
        )?;
    }
    Ok(())
}

/// Of rows measured on `card`.
fn cuda_table(card: &str, rows: &[Row], out: &mut dyn Write) -> std::io::Result<()> {
    let line = |cells: [String; 14]| {
        let [backend, layout, tokens, dtype, routing, operation, scope, rest @ ..] = cells;
        let [p10, p50, p90, rate, bare, theirs, times] = rest;
        let line = format!(
            "{backend:<24} {layout:<17} {tokens:>6} {dtype:<5} {routing:<9} {operation:<17} {scope:<6} \
             {p10:>9} {p50:>9} {p90:>9} {rate:>7} {bare:>6} {theirs:>10} {times:>6}"
        );
        line.trim_end().to_string()
    };
    let names = [
        "backend",
        "layout",
        "tokens",
        "dtype",
        "routing",
        "op",
        "scope",
        "p10 us",
        "p50 us",
        "p90 us",
        "GB/s",
        "bare",
        "FlashInfer",
        "times",
    ];
    writeln!(out, "{}", line(names.map(String::from)))?;
    for row in rows {
        let floor = row.operation == "floor";
        let us = |time: Option<f64>| time.map_or(String::new(), |us| format!("{us:.2}"));
        let gbs = if row.memory_bytes > 0 {
            format!("{:.0}", rate(row.memory_bytes, row.p50_us))
        } else {
            String::new()
        };
        // The data plane that moves as many rows as the layout has.
        let bare = Per::of_layout(&row.layout).and_then(|per| {
            rows.iter().find(|peer| {
                peer.backend == per.name()
                    && (peer.tokens, peer.hidden, &peer.dtype, &peer.routing, &peer.scope, &peer.operation)
                        == (row.tokens, row.hidden, &row.dtype, &row.routing, &row.scope, &row.operation)
            })
        });
        let theirs = flashinfer(card, row);
        writeln!(
            out,
            "{}",
            line([
                row.backend.clone(),
                row.layout.clone(),
                if floor { String::new() } else { row.tokens.to_string() },
                row.dtype.clone(),
                row.routing.clone(),
                row.operation.clone(),
                row.scope.clone(),
                us(row.p10_us),
                us(Some(row.p50_us)),
                us(row.p90_us),
                gbs,
                bare.map_or(String::new(), |bare| format!("{:.0} %", 100.0 * bare.p50_us / row.p50_us)),
                us(theirs),
                theirs.map_or(String::new(), |theirs| format!("{:.2}", theirs / row.p50_us)),
            ])
        )?;
    }
    Ok(())
}

/// How each of our backends stands to the peers measured beside it.
fn ratios(rows: &[Row], out: &mut dyn Write) -> std::io::Result<()> {
    let is_peer = |row: &Row| row.layout.is_empty();
    let same = |a: &Row, b: &Row| {
        (a.tokens, a.hidden, &a.dtype, &a.routing, &a.cache)
            == (b.tokens, b.hidden, &b.dtype, &b.routing, &b.cache)
    };
    for row in rows.iter().filter(|row| !is_peer(row)) {
        let beside = |name: &str, operation: &str| {
            let peers = rows.iter().filter(|peer| is_peer(peer) && same(peer, row));
            let peers = peers.filter(|peer| peer.backend.starts_with(name) && peer.operation == operation);
            peers.map(|peer| peer.p50_us).min_by(f64::total_cmp)
        };
        let (name, tokens, cache) = (&row.backend, row.tokens, &row.cache);
        let layout = &row.layout;
        match row.operation.as_str() {
            "pair" => {
                // The better of the chained pair and the two alone, of the better setting.
                let settings = ["mpi_alltoallv (default)", "mpi_alltoallv (yield)"];
                let mpi = settings.into_iter().flat_map(|setting| {
                    let alone = beside(setting, "dispatch").zip(beside(setting, "combine"));
                    [beside(setting, "pair"), alone.map(|(dispatch, combine)| dispatch + combine)]
                });
                if let Some(mpi) = mpi.flatten().min_by(f64::total_cmp) {
                    let times = mpi / row.p50_us;
                    writeln!(
                        out,
                        "{name} ({layout}), {tokens} tokens, {cache}: dispatch + combine {times:.2} times as fast as the best MPI"
                    )?;
                }
            }
            "dispatch" => {
                if let Some(copy) = beside("memcpy", "dispatch") {
                    let percent = 100.0 * copy / row.p50_us;
                    writeln!(
                        out,
                        "{name} ({layout}), {tokens} tokens, {cache}: dispatch at {percent:.0} % of the memcpy rate"
                    )?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

pub fn write(
    format: Format,
    header: &[String],
    outcome: &Outcome,
    out: &mut dyn Write,
) -> Result<(), String> {
    let Outcome { rows, refused, card, .. } = outcome;
    let failed = |error: std::io::Error| format!("cannot write the report: {error}");
    match format {
        Format::Table => (|| {
            for line in header {
                writeln!(out, "{line}")?;
            }
            if card.is_empty() {
                writeln!(
                    out,
                    "times: of the slowest rank; logical B: one row per (token, destination rank), of the busiest rank; \
                     wire B: moved between windows; GB/s: logical bytes over p50\n"
                )?;
                table(rows, out)?;
                if rows.iter().any(|row| row.layout.is_empty()) {
                    writeln!(out)?;
                    ratios(rows, out)?;
                }
            } else {
                writeln!(
                    out,
                    "times: device events behind a gate; GB/s: rows read and written over p50; bare: of the bare data \
                     plane's rate; FlashInfer: its p50, and how many times as fast ours is\n"
                )?;
                cuda_table(card, rows, out)?;
            }
            for refused in refused {
                writeln!(out, "no time for {}: {}", refused.what, refused.why)?;
            }
            Ok(())
        })()
        .map_err(failed),
        Format::Csv => {
            for line in header {
                writeln!(out, "# {line}").map_err(failed)?;
            }
            let mut csv = csv::Writer::from_writer(out);
            for row in rows {
                csv.serialize(row).map_err(|error| error.to_string())?;
            }
            csv.flush().map_err(failed)
        }
        Format::Json => {
            let report = serde_json::json!({ "about": header, "rows": rows, "refused": refused });
            let text = serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?;
            writeln!(out, "{text}").map_err(failed)
        }
    }
}

/// Rows of a CSV or JSON report.
pub fn read(text: &str) -> Result<Vec<Row>, String> {
    if text.trim_start().starts_with('{') {
        let report: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        return serde_json::from_value(report["rows"].clone()).map_err(|error| error.to_string());
    }
    let mut csv = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(text.as_bytes());
    csv.deserialize().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::row;

    #[test]
    fn what_is_written_is_read_again() {
        let rows = vec![
            row("high_throughput", "flat", 128, "pair", 100.0),
            row("memcpy", "", 128, "dispatch", 50.5),
        ];
        for format in [Format::Csv, Format::Json] {
            let mut out = Vec::new();
            let outcome = Outcome { rows: rows.clone(), ..Default::default() };
            write(format, &["a, b".into()], &outcome, &mut out).unwrap();
            let again = read(std::str::from_utf8(&out).unwrap()).unwrap();
            assert_eq!(format!("{again:?}"), format!("{rows:?}"));
        }
    }

    /// Reports keep being read: this is one from before there were scopes.
    #[test]
    fn an_old_report_is_read() {
        let old = "\
# machine: a CPU
device,backend,layout,ranks,mode,tokens,hidden,dtype,experts,topk,routing,operation,cache,iterations,p50_us,p99_us,\
logical_bytes,wire_bytes
cpu,memcpy,,4,processes,128,7168,bf16,64,8,hash,dispatch,warm,30,33.5,44.5,100,200
";
        let rows = read(old).unwrap();
        let [row] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((row.p50_us, row.wire_bytes, &*row.scope, row.p10_us), (33.5, 200, "", None));
        assert_eq!(row.memory_bytes, 0);
    }

    #[test]
    fn on_cuda_a_row_stands_beside_the_data_plane_and_flashinfer() {
        let ours = Row {
            device: "cuda".into(),
            ranks: 8,
            experts: 256,
            scope: "all".into(),
            memory_bytes: 50_000,
            ..row("nvlink_one_sided", "rank_major", 1, "dispatch", 20.0)
        };
        let bare = |per: Per, p50_us: f64| Row {
            backend: per.name().into(),
            layout: String::new(),
            p50_us,
            ..ours.clone()
        };
        let other = Row { scope: "rank0".into(), ..bare(Per::Rank, 1.0) };
        let padded = Row {
            backend: "low_latency".into(),
            layout: "expert_padded".into(),
            p50_us: 40.0,
            ..ours.clone()
        };
        let split = Row { operation: "dispatch_split".into(), ..padded.clone() };
        let rows = [other, ours.clone(), bare(Per::Rank, 15.0), padded, bare(Per::Expert, 30.0), split];
        let mut out = Vec::new();
        cuda_table("NVIDIA H100", &rows, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let cells = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>();
        let lines: Vec<_> = text.lines().map(cells).collect();
        assert_eq!(
            lines[2][5..],
            ["dispatch", "all", "10.00", "20.00", "2", "75", "%", "25.25", "1.26"],
            "{text}"
        );
        assert_eq!(lines[3].last().unwrap(), "3", "{text}");
        assert_eq!(lines[4][5..], ["dispatch", "all", "10.00", "40.00", "1", "75", "%"], "{text}");
        assert_eq!(lines[6][5..], ["dispatch_split", "all", "10.00", "40.00", "1"], "{text}");
    }

    #[test]
    fn ratios_name_the_best_peer() {
        let rows = vec![
            row("high_throughput", "flat", 128, "pair", 100.0),
            row("high_throughput", "flat", 128, "dispatch", 80.0),
            row("mpi_alltoallv (default)", "", 128, "pair", 450.0),
            row("mpi_alltoallv (yield)", "", 128, "pair", 350.0),
            row("mpi_alltoallv (yield)", "", 128, "dispatch", 200.0),
            row("mpi_alltoallv (yield)", "", 128, "combine", 100.0),
            row("memcpy", "", 128, "dispatch", 40.0),
        ];
        let mut out = Vec::new();
        ratios(&rows, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("3.00 times as fast") && text.contains("50 % of the memcpy rate"), "{text}");
    }
}
