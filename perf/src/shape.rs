//! One point of a sweep: everything that a rank process must know to measure it.

use a2a::abi::types::*;
use serde::de::DeserializeOwned;
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

/// Where ranks and their memory are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    Cpu,
    /// All ranks on this GPU.
    Cuda(i32),
}

impl Device {
    pub fn parse(text: &str) -> Result<Device, String> {
        let wrong = || format!("device {text:?} is not cpu, cuda or cuda:N");
        match text {
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => {
                let ordinal = text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
                ordinal.filter(|ordinal| *ordinal >= 0).map(Device::Cuda).ok_or_else(wrong)
            }
        }
    }
}

/// What tokens are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    #[default]
    Bf16,
    F32,
    /// bf16, quantised to e4m3 with float32 scales by dispatch.
    Fp8,
    /// e4m3 with a float32 scale for each 128 columns, given so: both travel as bytes.
    F8,
}

impl Kind {
    pub fn parse(text: &str) -> Result<Kind, String> {
        match text {
            "bf16" => Ok(Kind::Bf16),
            "f32" => Ok(Kind::F32),
            "fp8" => Ok(Kind::Fp8),
            "f8" => Ok(Kind::F8),
            _ => Err(format!("dtype {text:?} is not bf16, f32, fp8 or f8")),
        }
    }
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bf16 => "bf16",
            Kind::F32 => "f32",
            Kind::Fp8 => "fp8",
            Kind::F8 => "f8",
        }
    }
    /// Of the results.
    pub fn float(self) -> Float {
        if self == Kind::F32 { Float::F32 } else { Float::Bf16 }
    }
    pub fn dtype(self) -> Dtype {
        if self == Kind::F32 { F32 } else { BF16 }
    }
    /// Of the tokens given.
    pub fn given(self) -> Dtype {
        if self == Kind::F8 { F8 } else { self.dtype() }
    }
    /// Of the tokens received.
    pub fn wire(self) -> Dtype {
        if self == Kind::Fp8 { F8 } else { self.given() }
    }
    /// Of the scales that arrive beside the tokens.
    pub fn scale(self) -> Option<Scale> {
        matches!(self, Kind::Fp8 | Kind::F8).then_some(Scale::F32)
    }
    /// Bytes of a token on its way, its scales included.
    pub fn wire_bytes(self, hidden: usize) -> usize {
        match self {
            Kind::Fp8 | Kind::F8 => hidden + Scale::F32.row_bytes(hidden),
            _ => hidden * self.float().bytes(),
        }
    }
    /// Bytes of a token as it is given, its scales included.
    pub fn given_bytes(self, hidden: usize) -> usize {
        match self {
            Kind::Fp8 => hidden * self.float().bytes(),
            _ => self.wire_bytes(hidden),
        }
    }
    /// Sets what a comm must know of the tokens.
    pub fn configure(self, config: &mut a2a_config_t) {
        config.token_dtype = match self {
            Kind::F32 => A2A_DTYPE_F32,
            Kind::F8 => A2A_DTYPE_F8_E4M3,
            _ => A2A_DTYPE_BF16,
        };
        match self {
            Kind::Fp8 => config.quant = A2A_QUANT_FP8_F32_SCALES,
            Kind::F8 => config.max_scale_bytes = Scale::F32.row_bytes(config.max_hidden as usize) as i32,
            _ => {}
        }
    }
}

/// One point of a sweep.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Shape {
    pub pair: String,
    /// Rows travel by NCCL's collectives.
    pub nccl: bool,
    pub ranks: usize,
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
    /// "all" and "rank0": what is timed on CUDA.
    pub scopes: Vec<String>,
    /// On CUDA, replays of a captured pair are timed too.
    pub graph: bool,
    /// On CUDA, dispatches of two calls, SEND and RECV, are timed too.
    pub split: bool,
    /// Results are staged from the caller's tensor.
    pub staged: bool,
    pub max_recv_rows: i64,
    /// Of a GPU; 0 = the library's choice.
    pub max_sms: i32,
    /// Where each rank leaves what it measured.
    pub directory: String,
}

impl Shape {
    /// Rank `rank` leaves what it measured.
    pub fn leave(&self, rank: usize, what: &impl Serialize) -> Result<(), String> {
        let path = self.place(rank);
        let text = serde_json::to_string(what).map_err(|error| error.to_string())?;
        std::fs::write(&path, text).map_err(|error| format!("{path}: {error}"))
    }

    /// What rank `rank` left.
    pub fn left<T: DeserializeOwned>(&self, rank: usize) -> Result<T, String> {
        let path = self.place(rank);
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        serde_json::from_str(&text).map_err(|error| format!("{path}: {error}"))
    }

    fn place(&self, rank: usize) -> String {
        format!("{}/{rank}.json", self.directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_quantised_on_its_way() {
        let bytes = |kind: Kind| (kind.given_bytes(7168), kind.wire_bytes(7168));
        let both = [Kind::Bf16, Kind::F32, Kind::Fp8, Kind::F8].map(bytes);
        assert_eq!(both, [(14336, 14336), (28672, 28672), (14336, 7392), (7392, 7392)]);
    }

    #[test]
    fn devices_have_names() {
        let parsed = ["cpu", "cuda", "cuda:3"].map(|text| Device::parse(text).unwrap());
        assert_eq!(parsed, [Device::Cpu, Device::Cuda(0), Device::Cuda(3)]);
        for text in ["gpu", "cuda:", "cuda:-1", "cuda:rank"] {
            assert_eq!(
                Device::parse(text).unwrap_err(),
                format!("device {text:?} is not cpu, cuda or cuda:N")
            );
        }
    }
}
