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
pub const NAME: &str = "data plane (bare)";

/// The program as perf/peers/build_data_plane.sh left it.
#[derive(Debug)]
pub struct DataPlane {
    program: PathBuf,
    ordinal: i32,
    limit: Duration,
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
    pub fn find(ordinal: i32, limit: Duration) -> Result<DataPlane, String> {
        let program = peers::folder_of(PROGRAM, "build_data_plane.sh")?.join(PROGRAM);
        Ok(DataPlane { program, ordinal, limit })
    }

    /// Dispatch and combine in every scope asked for, each by the fastest kernel. The program checks its results
    /// before it times them.
    pub fn measure(&self, shape: &Shape, kind: Kind, scopes: &[String]) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().map_err(|error| format!("no temporary folder: {error}"))?;
        let ids = folder.path().join("ids");
        let bytes: Vec<u8> = shape.ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        fs::write(&ids, bytes).map_err(|error| format!("cannot write {}: {error}", ids.display()))?;
        let mut command = Command::new(&self.program);
        command.args([shape.ranks, shape.tokens, shape.hidden].map(|number| number.to_string()));
        command.arg(kind.name());
        let numbers = [shape.topk, shape.experts, shape.warmup, shape.iterations];
        command.args(numbers.map(|number| number.to_string())).arg(&ids).arg(self.ordinal.to_string());
        let said = peers::run(command, self.limit).map_err(|why| format!("{NAME}: {why}"))?;
        rows(&said, shape, kind, scopes).map_err(|why| format!("{NAME}: {why}"))
    }
}

fn rows(said: &str, shape: &Shape, kind: Kind, scopes: &[String]) -> Result<Vec<Row>, String> {
    let mut csv = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(said.as_bytes());
    let lines: Vec<Line> = csv.deserialize().collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let sent: Vec<u64> = (0..shape.ranks).map(|rank| shape.rows_of(rank).len() as u64).collect();
    let (token, result) = (kind.wire_bytes(shape.hidden), shape.hidden * kind.float().bytes());
    let mut rows = Vec::new();
    for scope in scopes {
        for operation in ["dispatch", "combine"] {
            let of = |line: &&Line| (&line.scope, &*line.operation) == (scope, operation);
            let fastest = lines.iter().filter(of).min_by(|a, b| a.p50_us.total_cmp(&b.p50_us));
            let line = fastest.ok_or_else(|| format!("it printed no {operation} of {scope}"))?;
            let (moved, busiest) = match scope.as_str() {
                "all" => (sent.iter().sum(), shape.busiest_rows() as u64),
                _ => (sent[0], sent[0]),
            };
            // Both read the same routing: else the same bytes are not compared.
            if line.rows != moved {
                return Err(format!("it moved {} rows, here they are {moved}", line.rows));
            }
            let bytes = busiest * if operation == "dispatch" { token } else { result } as u64;
            rows.push(Row {
                device: "cuda".into(),
                backend: NAME.into(),
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
                logical_bytes: bytes,
                wire_bytes: bytes,
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
        let found = rows(SAID, &SHAPE, Kind::Bf16, &scopes).unwrap();
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
        let why = rows(&one_row_more, &SHAPE, Kind::Bf16, &scopes).unwrap_err();
        assert_eq!(why, "it moved 4 rows, here they are 3");
        let why = rows("", &SHAPE, Kind::Bf16, &scopes).unwrap_err();
        assert_eq!(why, "it printed no dispatch of all");
    }
}
