//! The bare data plane on a GPU (perf/peers/data_plane.cu): what moving and adding the rows alone takes.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use crate::peers::{self, Shape};
use crate::row::Row;
use crate::shape::Kind;

const PROGRAM: &str = "data_plane";

/// What a token has a row for: the job differs with the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// Each rank that it goes to.
    Rank,
    /// Each of its experts.
    Expert,
}

impl Per {
    /// Nothing of the program is like GATHERED, where every token goes to every rank.
    pub fn of_layout(name: &str) -> Option<Per> {
        match name {
            "rank_major" | "flat" => Some(Per::Rank),
            "expert_padded" | "expert_contiguous" => Some(Per::Expert),
            _ => None,
        }
    }
    /// What a report calls the program.
    pub fn name(self) -> &'static str {
        match self {
            Per::Rank => "data plane (bare)",
            Per::Expert => "data plane (per expert)",
        }
    }
    /// What the program calls it.
    fn argument(self) -> &'static str {
        match self {
            Per::Rank => "rank",
            Per::Expert => "expert",
        }
    }
    /// The rows of a rank.
    fn rows_of(self, shape: &Shape, source: usize) -> Vec<(usize, usize)> {
        match self {
            Per::Rank => shape.rows_of(source),
            Per::Expert => shape.expert_rows_of(source),
        }
    }
}

/// The program as perf/peers/build_data_plane.sh left it.
#[derive(Debug)]
pub struct DataPlane {
    program: PathBuf,
    ordinal: i32,
    limit: Duration,
    /// Multiprocessors of each rank; 0: all, for all.
    sms: u16,
}

/// A line of its table.
#[derive(Deserialize)]
struct Line {
    operation: String,
    scope: String,
    rows: u64,
    memory_bytes: u64,
    p10_us: f64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
}

impl DataPlane {
    pub fn find(ordinal: i32, limit: Duration, sms: u16) -> Result<DataPlane, String> {
        let program = peers::folder_of(PROGRAM, "build_data_plane.sh")?.join(PROGRAM);
        Ok(DataPlane { program, ordinal, limit, sms })
    }

    /// Dispatch and combine in every scope asked for, each by the fastest kernel. The program checks its results
    /// before it times them.
    pub fn measure(
        &self,
        shape: &Shape,
        kind: Kind,
        per: Per,
        scopes: &[String],
    ) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let ids = folder.path().join("ids");
        let bytes: Vec<u8> = shape.ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        fs::write(&ids, bytes).map_err(|error| format!("cannot write {}: {error}", ids.display()))?;
        let mut command = Command::new(&self.program);
        command.args([shape.ranks, shape.tokens, shape.hidden].map(|number| number.to_string()));
        // It quantises nothing: rows that dispatch quantises are moved as they travel.
        command.arg(if kind.scale().is_some() { Kind::F8.name() } else { kind.name() });
        let numbers = [shape.topk, shape.experts, shape.warmup, shape.iterations];
        command.args(numbers.map(|number| number.to_string())).arg(&ids).arg(self.ordinal.to_string());
        command.arg(per.argument());
        // On few multiprocessors it only dispatches.
        let operations: &[&str] = if self.sms > 0 { &["dispatch"] } else { &["dispatch", "combine"] };
        if self.sms > 0 {
            command.arg(self.sms.to_string());
        }
        let said = peers::run(command, self.limit).map_err(|why| format!("{}: {why}", per.name()))?;
        rows(&said, shape, kind, per, scopes, operations).map_err(|why| format!("{}: {why}", per.name()))
    }
}

fn rows(
    said: &str,
    shape: &Shape,
    kind: Kind,
    per: Per,
    scopes: &[String],
    operations: &[&str],
) -> Result<Vec<Row>, String> {
    let mut csv = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(said.as_bytes());
    let lines: Vec<Line> = csv.deserialize().collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let sent: Vec<u64> = (0..shape.ranks).map(|rank| per.rows_of(shape, rank).len() as u64).collect();
    let (token, result) = (kind.wire_bytes(shape.hidden), shape.hidden * kind.float().bytes());
    let mut rows = Vec::new();
    for scope in scopes {
        for &operation in operations {
            let of = |line: &&Line| (&line.scope, &*line.operation) == (scope, operation);
            let fastest = lines.iter().filter(of).min_by(|a, b| a.p50_us.total_cmp(&b.p50_us));
            let line = fastest.ok_or_else(|| format!("it printed no {operation} of {scope}"))?;
            let (moved, busiest, distinct) = match scope.as_str() {
                "all" => {
                    (sent.iter().sum(), shape.busiest(|rank| per.rows_of(shape, rank)), shape.busiest_rows())
                }
                _ => (sent[0], sent[0] as usize, shape.rows_of(0).len()),
            };
            // Both read the same routing: else the same bytes are not compared.
            if line.rows != moved {
                return Err(format!("it moved {} rows, here they are {moved}", line.rows));
            }
            let bytes = if operation == "dispatch" { token } else { result };
            rows.push(Row {
                device: "cuda".into(),
                backend: per.name().into(),
                layout: String::new(),
                ranks: shape.ranks,
                mode: "streams".into(),
                tokens: shape.tokens,
                hidden: shape.hidden,
                dtype: kind.name().into(),
                experts: shape.experts,
                topk: shape.topk,
                routing: shape.routing.into(),
                operation: operation.into(),
                cache: "warm".into(),
                iterations: shape.iterations,
                p50_us: line.p50_us,
                p99_us: line.p99_us,
                logical_bytes: (distinct * bytes) as u64,
                wire_bytes: (busiest * bytes) as u64,
                scope: scope.clone(),
                p10_us: Some(line.p10_us),
                p90_us: Some(line.p90_us),
                memory_bytes: line.memory_bytes,
            });
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::tests::SHAPE;

    const BOTH: [&str; 2] = ["dispatch", "combine"];
    const SAID: &str = "\
# NVIDIA H100, 2 ranks share it: not NVLink timings
operation,kernel,scope,rows,memory_bytes,p10_us,p50_us,p90_us,p99_us
dispatch,split,all,4,128,1,5,6,7
dispatch,split,rank0,3,80,1,3,6,7
dispatch,block,all,4,128,1,4,6,7
dispatch,block,rank0,3,80,1,3.5,6,7
combine,split,all,4,128,1,8,9,10
combine,split,rank0,3,80,1,2,6,7
";

    #[test]
    fn the_fastest_kernel_stands_for_an_operation() {
        let scopes = ["all".to_string(), "rank0".into()];
        let found = rows(SAID, &SHAPE, Kind::Bf16, Per::Rank, &scopes, &BOTH).unwrap();
        let said: Vec<_> =
            found.iter().map(|row| (&*row.operation, &*row.scope, row.p50_us, row.logical_bytes)).collect();
        let expected = [
            ("dispatch", "all", 4.0, 48),
            ("combine", "all", 8.0, 48),
            ("dispatch", "rank0", 3.0, 48),
            ("combine", "rank0", 2.0, 48),
        ];
        assert_eq!(said, expected);
        let one_row_more = SAID.replace(",3,80,", ",4,80,");
        let why = rows(&one_row_more, &SHAPE, Kind::Bf16, Per::Rank, &scopes, &BOTH).unwrap_err();
        assert_eq!(why, "it moved 4 rows, here they are 3");
        let why = rows("", &SHAPE, Kind::Bf16, Per::Rank, &scopes, &BOTH).unwrap_err();
        assert_eq!(why, "it printed no dispatch of all");
    }

    #[test]
    fn a_row_for_each_expert_is_another_job() {
        let scopes = ["all".to_string(), "rank0".into()];
        // Rank 0 sends four rows where it sent three, and so does the busiest rank.
        let said = SAID.replace(",4,128,", ",5,144,").replace(",3,80,", ",4,96,");
        let found = rows(&said, &SHAPE, Kind::Bf16, Per::Expert, &scopes, &BOTH).unwrap();
        for row in &found {
            let said = (&*row.backend, row.logical_bytes, row.wire_bytes);
            assert_eq!(said, ("data plane (per expert)", 48, 64), "{row:?}");
        }
        let why = rows(SAID, &SHAPE, Kind::Bf16, Per::Expert, &scopes, &BOTH).unwrap_err();
        assert_eq!(why, "it moved 4 rows, here they are 5");
    }

    #[test]
    fn layouts_have_the_rows_that_the_oracle_gives_them() {
        for pair in crate::shape::PAIRS {
            let by_expert = Per::of_layout(pair.layout_name) == Some(Per::Expert);
            assert_eq!(by_expert, pair.oracle_layout().by_expert(), "{}", pair.name);
        }
    }
}
