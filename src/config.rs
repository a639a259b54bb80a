//! What a comm is made of, checked: the config that `abi` reads from C and every layer below relies on.
//!
//! A leaf. Values here are in range and consistent; whether this build can do them is `comm::explain`'s question.

use std::net::ToSocketAddrs;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Row indices are int32 on the wire and in `row_source`.
pub const MAX_ROWS: u64 = i32::MAX as u64;
pub const MAX_RANKS: u32 = 1024;
pub const MAX_TOPK: u32 = 32;
pub const MAX_SLOTS: u32 = 64;
pub const MAX_EXTRAS: usize = 8;
/// Half a year: longer than that is a unit mistaken.
pub const MAX_TIMEOUT_MS: i64 = 15_552_000_000;
/// Columns that share a scale.
pub const QUANT_GROUP: u32 = 128;
/// Tokens are moved in vectors of this many bytes.
pub const ROW_ALIGN: u64 = 16;

macro_rules! code_enum {
    ($(#[$doc:meta])* $name:ident, $label:literal { $($variant:ident = $value:literal / $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(i32)]
        pub enum $name { $($variant = $value),+ }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),+];
            pub fn from_code(rank: i32, code: i32) -> Result<$name> {
                Self::ALL.iter().copied().find(|v| *v as i32 == code).ok_or_else(|| {
                    Error::invalid(format!("rank {rank}: {} is {code}, known are {}", $label, Self::known()))
                })
            }
            fn known() -> String {
                Self::ALL.iter().map(|v| format!("{} ({})", *v as i32, v.name())).collect::<Vec<_>>().join(", ")
            }
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }
    };
}

code_enum!(
    /// The strategies; the numbers are the ABI's.
    BackendKind, "backend" {
        Auto = 0 / "auto",
        AllgatherReducescatter = 1 / "allgather_reducescatter",
        HighThroughput = 2 / "high_throughput",
        LowLatency = 3 / "low_latency",
        NvlinkOneSided = 4 / "nvlink_one_sided",
        NvlinkTwoSided = 5 / "nvlink_two_sided",
        NixlElastic = 6 / "nixl_elastic",
    }
);
code_enum!(TransportKind, "transport" { Auto = 0 / "auto", Window = 1 / "window", Nccl = 2 / "nccl", Nixl = 3 / "nixl" });

impl TransportKind {
    /// If couriers carry rows: asked for by themselves, or by the strategy that needs them.
    pub fn wants_nixl(self, backend: BackendKind) -> bool {
        match self {
            TransportKind::Auto => backend == BackendKind::NixlElastic,
            transport => transport == TransportKind::Nixl,
        }
    }
}

code_enum!(
    LayoutKind, "layout" {
        Auto = 0 / "auto",
        Gathered = 1 / "gathered",
        RankMajor = 2 / "rank_major",
        Flat = 3 / "flat",
        ExpertPadded = 4 / "expert_padded",
        ExpertContiguous = 5 / "expert_contiguous",
    }
);
code_enum!(DeviceKind, "device" { Cpu = 1 / "cpu", Cuda = 2 / "cuda" });
code_enum!(
    Dtype, "dtype" { Bf16 = 1 / "bf16", F16 = 2 / "f16", F32 = 3 / "f32", F8E4M3 = 4 / "f8_e4m3", U8 = 5 / "u8" }
);
code_enum!(QuantKind, "quant" { None = 0 / "none", Fp8F32 = 1 / "fp8_f32_scales", Fp8Ue8m0 = 2 / "fp8_ue8m0_scales" });
code_enum!(ScaleLayout, "scale_layout" { Row = 0 / "row", Column = 1 / "column" });
code_enum!(PlacementKind, "placement" { Contiguous = 0 / "contiguous", Table = 1 / "table" });
code_enum!(OverflowKind, "overflow" { Error = 0 / "error", Drop = 1 / "drop" });
code_enum!(BootstrapKind, "bootstrap" { UniqueId = 0 / "unique_id", Allgather = 1 / "allgather" });

impl BackendKind {
    /// The backend of a user's word: our own names, and the ones vLLM's users type.
    pub fn from_name(name: &str) -> Option<BackendKind> {
        match name {
            "deepep_high_throughput" => Some(BackendKind::HighThroughput),
            "deepep_low_latency" => Some(BackendKind::LowLatency),
            "flashinfer_nvlink_one_sided" => Some(BackendKind::NvlinkOneSided),
            "flashinfer_nvlink_two_sided" | "flashinfer_all2allv" => Some(BackendKind::NvlinkTwoSided),
            "nixl_ep" => Some(BackendKind::NixlElastic),
            _ => BackendKind::ALL.iter().copied().find(|kind| kind.name() == name),
        }
    }

    /// The layouts the strategy offers, its first choice first.
    pub fn layouts(self) -> &'static [LayoutKind] {
        match self {
            BackendKind::Auto => &[],
            BackendKind::AllgatherReducescatter => &[LayoutKind::Gathered],
            BackendKind::HighThroughput => &[LayoutKind::Flat, LayoutKind::ExpertContiguous],
            BackendKind::LowLatency | BackendKind::NixlElastic => &[LayoutKind::ExpertPadded],
            BackendKind::NvlinkOneSided => &[LayoutKind::RankMajor],
            BackendKind::NvlinkTwoSided => &[LayoutKind::Flat],
        }
    }
}

impl LayoutKind {
    /// True if a row is a (token, expert) pair, false if it is a token.
    pub fn by_expert(self) -> bool {
        matches!(self, LayoutKind::ExpertPadded | LayoutKind::ExpertContiguous)
    }
}

impl QuantKind {
    /// Bytes of a token's scales.
    pub fn scale_bytes(self, hidden: u32) -> u32 {
        let groups = hidden.div_ceil(QUANT_GROUP);
        match self {
            QuantKind::None => 0,
            QuantKind::Fp8F32 => groups * 4,
            QuantKind::Fp8Ue8m0 => groups.next_multiple_of(4),
        }
    }
}

impl Dtype {
    pub fn bytes(self) -> u32 {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F8E4M3 | Dtype::U8 => 1,
        }
    }
    /// True if combine can sum it.
    pub fn is_summable(self) -> bool {
        matches!(self, Dtype::Bf16 | Dtype::F16 | Dtype::F32)
    }
}

/// Which rank owns which expert, and where it stands among that rank's own.
#[derive(Clone, Debug)]
pub struct Experts {
    owner: Arc<[u32]>,
    local: Arc<[u32]>,
    counts: Arc<[u32]>,
    /// Per rank: its first expert in the order (owner, place).
    starts: Arc<[u32]>,
    /// In that order: the experts.
    order: Arc<[u32]>,
}

impl Experts {
    /// Consecutive blocks; the first `num % ranks` ranks own one more.
    pub fn contiguous(num: u32, ranks: u32) -> Experts {
        let (quotient, remainder) = (num / ranks, num % ranks);
        let owner = (0..ranks)
            .flat_map(|r| std::iter::repeat_n(r, (quotient + u32::from(r < remainder)) as usize))
            .collect();
        Experts::from_owners(owner, ranks)
    }

    /// `owner[e] < ranks` is the caller's to check.
    pub fn from_owners(owner: Vec<u32>, ranks: u32) -> Experts {
        let mut counts = vec![0; ranks as usize];
        let local = owner
            .iter()
            .map(|&r| {
                counts[r as usize] += 1;
                counts[r as usize] - 1
            })
            .collect();
        let mut order: Vec<u32> = (0..owner.len() as u32).collect();
        order.sort_by_key(|expert| owner[*expert as usize]);
        let starts = counts
            .iter()
            .scan(0, |next, count| {
                *next += count;
                Some(*next - count)
            })
            .collect();
        Experts { owner: owner.into(), local, counts: counts.into(), starts, order: order.into() }
    }

    pub fn num(&self) -> u32 {
        self.owner.len() as u32
    }
    /// The rank that owns an expert, and the expert's place among that rank's own.
    #[inline]
    pub fn place(&self, expert: usize) -> (u32, u32) {
        (self.owner[expert], self.local[expert])
    }
    /// An expert's number in the order (owner, place): the experts of a rank follow one another.
    #[inline]
    pub fn slot(&self, expert: usize) -> u32 {
        self.starts[self.owner[expert] as usize] + self.local[expert]
    }
    /// The first number of a rank's experts in that order.
    pub fn start(&self, rank: u32) -> u32 {
        self.starts[rank as usize]
    }
    /// The owner of the expert with a number in that order.
    #[inline]
    pub fn owner_of_slot(&self, slot: usize) -> u32 {
        self.owner[self.order[slot] as usize]
    }
    /// How many experts a rank owns.
    pub fn count(&self, rank: u32) -> u32 {
        self.counts[rank as usize]
    }
    pub fn most(&self) -> u32 {
        self.counts.iter().copied().max().unwrap_or(0)
    }
    /// The lowest expert of a rank.
    pub fn first(&self, rank: u32) -> Option<u32> {
        self.owner.iter().position(|&r| r == rank).map(|e| e as u32)
    }
    fn digest(&self) -> u64 {
        let mut hash = Sha256::new();
        for rank in self.owner.iter() {
            hash.update(rank.to_le_bytes());
        }
        first_u64(&hash.finalize())
    }
}

fn first_u64(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

/// Where rank 0 listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A name in the abstract Unix namespace of this host.
    Local([u8; 16]),
    /// "host:port".
    Tcp(String),
}

/// The name of a group: an address and a key. As bytes: magic[8], kind, address length, address[94], key[16], 0[8].
#[derive(Clone, PartialEq, Eq)]
pub struct UniqueId {
    pub address: Address,
    pub key: [u8; 16],
}

const ID_MAGIC: &[u8; 8] = b"a2a.id.1";
const ID_ADDRESS: std::ops::Range<usize> = 10..104;
const ID_KEY: std::ops::Range<usize> = 104..120;

impl UniqueId {
    pub fn from_address(address: &str, key: &str) -> Result<UniqueId> {
        if address.len() > 80 {
            return Err(Error::invalid(format!("address has {} bytes, the limit is 80", address.len())));
        }
        if key.is_empty() || key.len() > 4096 {
            return Err(Error::invalid(format!("key has {} bytes, it needs 1 to 4096", key.len())));
        }
        let port = address
            .rsplit_once(':')
            .and_then(|(host, port)| port.parse::<u16>().ok().filter(|port| *port != 0 && !host.is_empty()));
        if port.is_none() {
            return Err(Error::invalid(format!(
                "address is {address:?}, it must be \"host:port\" with a port from 1 to 65535"
            )));
        }
        // The key is stretched to 128 bits; its own length and wording stay the user's.
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&Sha256::digest(key.as_bytes())[..16]);
        Ok(UniqueId { address: Address::Tcp(address.to_string()), key: bytes })
    }

    pub fn to_bytes(&self) -> [u8; 128] {
        let mut bytes = [0; 128];
        bytes[..8].copy_from_slice(ID_MAGIC);
        let (kind, address): (u8, &[u8]) = match &self.address {
            Address::Local(name) => (1, name),
            Address::Tcp(text) => (2, text.as_bytes()),
        };
        bytes[8] = kind;
        bytes[9] = address.len() as u8;
        bytes[ID_ADDRESS][..address.len()].copy_from_slice(address);
        bytes[ID_KEY].copy_from_slice(&self.key);
        bytes
    }

    /// `None` for all zeros: no id was set.
    pub fn from_bytes(rank: i32, bytes: &[u8; 128]) -> Result<Option<UniqueId>> {
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let damaged = || {
            Error::invalid(format!(
                "rank {rank}: unique_id does not come from a2a_get_unique_id or a2a_unique_id_from_address of this \
                 version"
            ))
        };
        let length = bytes[9] as usize;
        if &bytes[..8] != ID_MAGIC || length > ID_ADDRESS.len() {
            return Err(damaged());
        }
        let address = &bytes[ID_ADDRESS][..length];
        let address = match bytes[8] {
            1 => Address::Local(address.try_into().map_err(|_| damaged())?),
            2 => Address::Tcp(String::from_utf8(address.to_vec()).map_err(|_| damaged())?),
            _ => return Err(damaged()),
        };
        let mut key = [0; 16];
        key.copy_from_slice(&bytes[ID_KEY]);
        Ok(Some(UniqueId { address, key }))
    }
}

impl std::fmt::Debug for UniqueId {
    // The key is a secret and stays out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UniqueId({:?})", self.address)
    }
}

/// Resolves "host:port".
pub fn resolve(address: &str) -> Result<Vec<std::net::SocketAddr>> {
    let found: Vec<_> = address
        .to_socket_addrs()
        .map_err(|e| Error::system(format!("cannot resolve {address:?}"), e))?
        .collect();
    if found.is_empty() {
        return Err(Error::invalid(format!("{address:?} resolves to no address")));
    }
    Ok(found)
}

/// An all-gather of the caller's, or over what is the caller's: what this rank says, and room for what all say.
#[derive(Clone)]
pub struct Allgather(Arc<AllgatherFn>);
type AllgatherFn = dyn Fn(&[u8], &mut [u8]) -> Result<()> + Send + Sync;

impl Allgather {
    pub fn new(call: impl Fn(&[u8], &mut [u8]) -> Result<()> + Send + Sync + 'static) -> Allgather {
        Allgather(Arc::new(call))
    }
    pub fn call(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        (self.0)(mine, all)
    }
}

/// The caller's `ncclComm_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallersComm(pub usize);

impl std::fmt::Debug for Allgather {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Allgather")
    }
}

/// How ranks find each other.
#[derive(Clone, Debug)]
pub enum Bootstrap {
    /// Nothing was set: a group of one.
    Nothing,
    UniqueId(UniqueId),
    Allgather(Allgather),
}

/// What a rank needs to find the others: known before the rest of a config is.
#[derive(Clone, Debug)]
pub struct Meeting {
    pub rank: u32,
    /// Those that meet: where ranks come and go, from the start.
    pub num_ranks: u32,
    pub bootstrap: Bootstrap,
    /// Rank 0 may listen on, and be reached at, more than a loopback address.
    pub remote: bool,
    pub timeout_ms: u64,
}

/// A config with every default filled in and every value in range.
#[derive(Clone, Debug)]
pub struct Config {
    pub rank: u32,
    /// As many as there may be.
    pub num_ranks: u32,
    pub max_ranks: u32,
    /// Steps go on without ranks that are lost.
    pub degrades: bool,
    pub ranks_per_device: u32,
    pub device: DeviceKind,
    pub device_ordinal: i32,
    pub backend: BackendKind,
    pub transport: TransportKind,
    pub layout: LayoutKind,
    pub experts: Experts,
    pub placement: PlacementKind,
    pub max_topk: u32,
    pub max_hidden: u32,
    pub max_tokens: u32,
    pub token_dtype: Dtype,
    pub combine_dtype: Dtype,
    /// 0: the tokens' own.
    pub combine_hidden: u32,
    pub quant: QuantKind,
    pub scale_layout: ScaleLayout,
    pub max_scale_bytes: u32,
    pub extra_row_bytes: [u32; MAX_EXTRAS],
    /// SMs that kernels may use; 0: as many as they like.
    pub max_sms: u32,
    pub num_slots: u32,
    pub expert_alignment: u32,
    pub overflow: OverflowKind,
    /// 0: the layout's capacity.
    pub max_recv_rows: u64,
    /// 0: the library's choice.
    pub fifo_rows: u32,
    pub first_step_timeout_ms: u64,
    pub timeout_ms: u64,
    /// 0: none.
    pub memory_limit: u64,
    pub meeting: Meeting,
    /// Ours are split off it.
    pub nccl_comm: Option<CallersComm>,
    /// What this rank's plan came to: AUTO may depend on what a rank can afford, and all must come to the same.
    pub chosen: Option<(BackendKind, LayoutKind)>,
}

impl Config {
    /// Bytes of the largest token row as the caller gives it.
    pub fn max_token_bytes(&self) -> u64 {
        self.max_hidden as u64 * self.token_dtype.bytes() as u64
    }
    /// Bytes of the largest token row as it travels.
    pub fn max_wire_bytes(&self) -> u64 {
        match self.quant {
            QuantKind::None => self.max_token_bytes(),
            _ => self.max_hidden as u64,
        }
    }
    /// Bytes of the largest row of scales, given or made.
    pub fn max_scale_row(&self) -> u32 {
        match self.quant {
            QuantKind::None => self.max_scale_bytes,
            quant => quant.scale_bytes(self.max_hidden),
        }
    }
    pub fn max_combine_bytes(&self) -> u64 {
        let hidden = if self.combine_hidden == 0 { self.max_hidden } else { self.combine_hidden };
        hidden as u64 * self.combine_dtype.bytes() as u64
    }

    pub fn wants_nixl(&self) -> bool {
        self.transport.wants_nixl(self.backend)
    }

    /// What every rank must agree on, by the name the user knows.
    pub fn agreed(&self) -> Vec<(&'static str, u64)> {
        let mut fields = vec![
            ("max_ranks", self.max_ranks as u64),
            ("flags (A2A_CONFIG_DEGRADE)", self.degrades as u64),
            ("ranks_per_device", self.ranks_per_device as u64),
            ("device", self.device as u64),
            ("backend", self.backend as u64),
            ("transport", self.transport as u64),
            ("layout", self.layout as u64),
            ("num_experts", self.experts.num() as u64),
            ("placement", self.placement as u64),
            ("expert_owner (digest)", self.experts.digest()),
            ("max_topk", self.max_topk as u64),
            ("max_hidden", self.max_hidden as u64),
            ("max_tokens", self.max_tokens as u64),
            ("token_dtype", self.token_dtype as u64),
            ("combine_dtype", self.combine_dtype as u64),
            ("combine_hidden", self.combine_hidden as u64),
            ("quant", self.quant as u64),
            ("scale_layout", self.scale_layout as u64),
            ("max_scale_bytes", self.max_scale_bytes as u64),
            ("num_slots", self.num_slots as u64),
            ("expert_alignment", self.expert_alignment as u64),
            ("overflow", self.overflow as u64),
            ("max_recv_rows", self.max_recv_rows),
            ("fifo_rows", self.fifo_rows as u64),
            ("flags", u64::from(self.meeting.remote)),
            ("nccl_comm (0 NULL, 1 set)", u64::from(self.nccl_comm.is_some())),
        ];
        const EXTRAS: [&str; MAX_EXTRAS] = [
            "extra_row_bytes[0]",
            "extra_row_bytes[1]",
            "extra_row_bytes[2]",
            "extra_row_bytes[3]",
            "extra_row_bytes[4]",
            "extra_row_bytes[5]",
            "extra_row_bytes[6]",
            "extra_row_bytes[7]",
        ];
        fields.extend(EXTRAS.into_iter().zip(self.extra_row_bytes.map(u64::from)));
        let (backend, layout) = self.chosen.unwrap_or((self.backend, self.layout));
        fields.push(("the backend that AUTO chose (memory_limit may decide it)", backend as u64));
        fields.push(("the layout that AUTO chose", layout as u64));
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ranks_own_the_remainder() {
        let experts = Experts::contiguous(11, 4);
        assert_eq!((0..4).map(|r| experts.count(r)).collect::<Vec<_>>(), [3, 3, 3, 2]);
        assert_eq!(experts.place(3), (1, 0));
        assert_eq!(experts.place(10), (3, 1));
        assert_eq!(experts.first(3), Some(9));
        let mixed = Experts::from_owners(vec![2, 0, 2, 1, 0], 3);
        assert_eq!((0..5).map(|e| mixed.slot(e)).collect::<Vec<_>>(), [3, 0, 4, 2, 1]);
        assert_eq!((0..5).map(|s| mixed.owner_of_slot(s)).collect::<Vec<_>>(), [0, 0, 1, 2, 2]);
        let few = Experts::contiguous(2, 4);
        assert_eq!((few.count(2), few.first(2)), (0, None));
    }

    #[test]
    fn ids_survive_their_bytes() {
        for id in [
            UniqueId { address: Address::Local([7; 16]), key: [9; 16] },
            UniqueId::from_address("[::1]:4711", "secret").unwrap(),
        ] {
            assert_eq!(UniqueId::from_bytes(0, &id.to_bytes()).unwrap().unwrap(), id);
        }
        assert!(UniqueId::from_bytes(0, &[0; 128]).unwrap().is_none());
        assert!(UniqueId::from_bytes(0, &[1; 128]).is_err());
        for bad in ["host", "host:0", ":1", "host:65536", "host:x"] {
            assert!(UniqueId::from_address(bad, "k").is_err(), "{bad}");
        }
        assert!(UniqueId::from_address("host:1", "").is_err());
    }

    #[test]
    fn names_of_vllm_are_understood() {
        assert_eq!(BackendKind::from_name("deepep_low_latency"), Some(BackendKind::LowLatency));
        assert_eq!(BackendKind::from_name("auto"), Some(BackendKind::Auto));
        assert_eq!(BackendKind::from_name("naive"), None);
    }
}
