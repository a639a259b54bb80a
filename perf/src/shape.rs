//! One point of a sweep: everything that a rank process must know to measure it.

use a2a::abi::types::*;
use serde::{Deserialize, Serialize};

use crate::conformance::common::{BF16, Dtype, F8, F32};
use crate::conformance::oracle::{Float, Layout, Scale};

/// A backend with one of its layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    pub name: &'static str,
    pub backend_name: &'static str,
    pub layout_name: &'static str,
    pub backend: a2a_backend_t,
    pub layout: a2a_layout_t,
}

const fn pair(
    name: &'static str,
    backend_name: &'static str,
    layout_name: &'static str,
    backend: a2a_backend_t,
    layout: a2a_layout_t,
) -> Pair {
    Pair { name, backend_name, layout_name, backend, layout }
}

pub const PAIRS: [Pair; 6] = [
    pair("one_sided", "nvlink_one_sided", "rank_major", A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_RANK_MAJOR),
    pair(
        "allgather",
        "allgather_reducescatter",
        "gathered",
        A2A_BACKEND_ALLGATHER_REDUCESCATTER,
        A2A_LAYOUT_GATHERED,
    ),
    pair("ht_flat", "high_throughput", "flat", A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT),
    pair(
        "ht_contiguous",
        "high_throughput",
        "expert_contiguous",
        A2A_BACKEND_HIGH_THROUGHPUT,
        A2A_LAYOUT_EXPERT_CONTIGUOUS,
    ),
    pair("low_latency", "low_latency", "expert_padded", A2A_BACKEND_LOW_LATENCY, A2A_LAYOUT_EXPERT_PADDED),
    pair("two_sided", "nvlink_two_sided", "flat", A2A_BACKEND_NVLINK_TWO_SIDED, A2A_LAYOUT_FLAT),
];

impl Pair {
    pub fn named(name: &str) -> Result<Pair, String> {
        PAIRS.into_iter().find(|pair| pair.name == name).ok_or_else(|| {
            let known: Vec<&str> = PAIRS.iter().map(|pair| pair.name).collect();
            format!("backend {name:?} is not one of {}", known.join(", "))
        })
    }
    pub fn oracle_layout(&self) -> Layout {
        match self.layout {
            A2A_LAYOUT_GATHERED => Layout::Gathered,
            A2A_LAYOUT_RANK_MAJOR => Layout::RankMajor,
            A2A_LAYOUT_FLAT => Layout::Flat,
            A2A_LAYOUT_EXPERT_PADDED => Layout::ExpertPadded,
            _ => Layout::ExpertContiguous { alignment: 1 },
        }
    }
    /// Rows may stay in the comm's own memory.
    pub fn keeps_rows(&self) -> bool {
        self.backend != A2A_BACKEND_NVLINK_TWO_SIDED
    }
}

/// What tokens are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Bf16,
    F32,
    /// bf16, quantised to e4m3 with float32 scales by dispatch.
    Fp8,
}

impl Kind {
    pub fn parse(text: &str) -> Result<Kind, String> {
        match text {
            "bf16" => Ok(Kind::Bf16),
            "f32" => Ok(Kind::F32),
            "fp8" => Ok(Kind::Fp8),
            _ => Err(format!("dtype {text:?} is not bf16, f32 or fp8")),
        }
    }
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bf16 => "bf16",
            Kind::F32 => "f32",
            Kind::Fp8 => "fp8",
        }
    }
    /// Of the tokens given, and of the results.
    pub fn float(self) -> Float {
        if self == Kind::F32 { Float::F32 } else { Float::Bf16 }
    }
    pub fn dtype(self) -> Dtype {
        if self == Kind::F32 { F32 } else { BF16 }
    }
    /// Of the tokens received.
    pub fn wire(self) -> Dtype {
        if self == Kind::Fp8 { F8 } else { self.dtype() }
    }
    pub fn scale(self) -> Option<Scale> {
        (self == Kind::Fp8).then_some(Scale::F32)
    }
    /// Bytes of a token on its way, its scales included.
    pub fn wire_bytes(self, hidden: usize) -> usize {
        match self {
            Kind::Fp8 => hidden + Scale::F32.row_bytes(hidden),
            _ => hidden * self.float().bytes(),
        }
    }
}

/// One point of a sweep.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shape {
    pub pair: String,
    pub tokens: usize,
    pub hidden: usize,
    pub experts: usize,
    pub topk: usize,
    pub kind: Kind,
    /// As the command line has it.
    pub routing: String,
    pub seed: u64,
    pub warmup: usize,
    pub iterations: usize,
    pub caches: Vec<String>,
    /// Results are staged from the caller's tensor.
    pub staged: bool,
    pub max_recv_rows: i64,
    /// Where each rank leaves what it measured.
    pub directory: String,
}
