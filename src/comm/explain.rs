//! What a config leads to on this host: the choice of strategy, the memory it takes, and why not the others.
//!
//! Pure functions of the config and of what this build can load: every rank comes to the same answer.

use serde_json::{Value, json};

use crate::backend;
use crate::config::{BackendKind, Config, DeviceKind, LayoutKind, MAX_ROWS, TransportKind};
use crate::config::{QuantKind, ScaleLayout};
use crate::device::cuda;
use crate::device::grid::Grid;
use crate::device::map::{Map, PLANES, Plane, RoutingMap, Sizes, Uses};
use crate::error::{Error, Result, Status};
use crate::memory::{apart, vmm};
use crate::transport::{nccl, nixl};

/// AUTO, in order of preference among those that offer the layout and fit into memory_limit. Without a layout the
/// first is chosen, whose rows need no counts. Two strategies compete for a layout on CPU windows, HIGH_THROUGHPUT and
/// NVLINK_TWO_SIDED for FLAT. Dispatch and combine chained, 4 processes on 2 CPUs, hidden 7168 (docs/performance.md): 2.2
/// against 8.0 ms for 128 tokens, 65 against 135 ms for 2048. The second is for when the memory of the first, which grows
/// with tokens, does not fit.
const AUTO: [BackendKind; 5] = [
    BackendKind::NvlinkOneSided,
    BackendKind::HighThroughput,
    BackendKind::LowLatency,
    BackendKind::AllgatherReducescatter,
    BackendKind::NvlinkTwoSided,
];

/// The strategies whose ops have kernels.
const ON_CUDA: [BackendKind; 6] = [
    BackendKind::NvlinkOneSided,
    BackendKind::AllgatherReducescatter,
    BackendKind::LowLatency,
    BackendKind::HighThroughput,
    BackendKind::NvlinkTwoSided,
    BackendKind::NixlElastic,
];

/// Why a strategy's kernels cannot keep to a number of multiprocessors that is not 0.
fn check_sms(kind: BackendKind, max_sms: u32) -> std::result::Result<(), String> {
    match kind {
        BackendKind::HighThroughput => Ok(()),
        BackendKind::LowLatency | BackendKind::NixlElastic if max_sms > 1 => Ok(()),
        BackendKind::LowLatency | BackendKind::NixlElastic => {
            Err(format!("max_sms is {max_sms}, on cuda (2) it needs 0 or at least 2"))
        }
        BackendKind::NvlinkTwoSided if max_sms > 2 => Ok(()),
        BackendKind::NvlinkTwoSided => {
            Err(format!("max_sms is {max_sms}, on cuda (2) it needs 0 or at least 3"))
        }
        _ => Err(format!("max_sms is {max_sms}, on cuda (2) it only knows 0 in this build")),
    }
}

/// What a config leads to.
#[derive(Clone, Debug)]
pub struct Plan {
    pub device: DeviceKind,
    pub backend: BackendKind,
    pub layout: LayoutKind,
    pub transport: TransportKind,
    pub reason: String,
    pub map: Map,
    pub routing: RoutingMap,
}

/// Bytes, as a2a_memory_t names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub window: u64,
    pub control: u64,
    pub slot: u64,
    pub private: u64,
    pub routing: u64,
    pub total: u64,
    /// Of the host, beside those.
    pub pinned: u64,
}

impl Plan {
    pub fn memory(&self) -> Memory {
        memory(self.device, &self.map, &self.routing)
    }
    /// Refuses a call's bound on the multiprocessors that its kernels use, if they cannot keep to it. The CPU has none.
    pub fn check_sms(&self, max_sms: u32) -> std::result::Result<(), String> {
        if self.device == DeviceKind::Cpu || max_sms == 0 {
            return Ok(());
        }
        check_sms(self.backend, max_sms).map_err(|why| format!("backend {}: {why}", self.backend.name()))
    }
    /// Multiprocessors that kernels keep to; 0: there is no bound.
    pub fn max_sms(&self, config: &Config) -> u32 {
        if self.device == DeviceKind::Cuda { config.max_sms } else { 0 }
    }
    /// Rows of this rank's outputs in a full step.
    pub fn row_capacity(&self, config: &Config) -> u64 {
        self.map.sizes.grid.capacity(config.experts.count(config.rank))
    }
}

fn memory(device: DeviceKind, map: &Map, routing: &RoutingMap) -> Memory {
    let (window, private) = match device {
        DeviceKind::Cpu if map.sizes.uses.posted => {
            let words = (map.sizes.ranks() as u64 - 1).saturating_mul(map.control_bytes());
            (apart::bytes(map), map.private_bytes().saturating_add(words))
        }
        DeviceKind::Cpu => (map.window_bytes(), map.private_bytes()),
        DeviceKind::Cuda if map.sizes.uses.posted => (map.window_bytes(), cuda::private_bytes(map)),
        DeviceKind::Cuda => (vmm::rounded(map.window_bytes()), cuda::private_bytes(map)),
    };
    let routing = routing.bytes();
    Memory {
        window,
        control: map.control_bytes(),
        slot: map.row_bytes(),
        private,
        routing,
        total: window
            .saturating_add(private)
            .saturating_add((map.sizes.slots as u64).saturating_mul(routing)),
        pinned: match device {
            DeviceKind::Cuda if map.sizes.uses.posted => cuda::PostedMemory::pinned_bytes(map),
            _ => 0,
        },
    }
}

/// Fields whose feature this build does not have: anything but the default is refused by name.
fn check_fields(config: &Config) -> Result<()> {
    let refuse = |field: &str, value: String, only: &str| {
        Err(Error::unsupported(format!(
            "rank {}: {field} is {value}, this build only knows {only}",
            config.rank
        )))
    };
    if config.device == DeviceKind::Cuda {
        let usable = cuda::check_kernels().and_then(|()| cuda::probe());
        usable.map_err(|e| e.context(format!("rank {}: device is cuda (2)", config.rank)))?;
    }
    if config.max_ranks != config.num_ranks {
        return refuse("max_ranks", config.max_ranks.to_string(), "num_ranks (no backend here is elastic)");
    }
    if config.degrades && !config.wants_nixl() {
        return Err(Error::unsupported(format!(
            "rank {}: flags has A2A_CONFIG_DEGRADE (2), transport is {} ({}): steps go on without lost ranks over nixl (3) alone",
            config.rank,
            config.transport.name(),
            config.transport as i32
        )));
    }
    if config.degrades && config.max_recv_rows != 0 {
        return Err(Error::unsupported(format!(
            "rank {}: flags has A2A_CONFIG_DEGRADE (2) and max_recv_rows is {}: ranks that lose different peers would drop different \
             rows (it needs 0)",
            config.rank, config.max_recv_rows
        )));
    }
    if config.nccl_comm.is_some()
        && (config.device, config.transport) != (DeviceKind::Cuda, TransportKind::Nccl)
    {
        return Err(Error::unsupported(format!(
            "rank {}: nccl_comm is set, device is {} ({}), transport is {} ({}): it carries GPU memory over nccl (2)",
            config.rank,
            config.device.name(),
            config.device as i32,
            config.transport.name(),
            config.transport as i32
        )));
    }
    match config.transport {
        TransportKind::Auto | TransportKind::Window => {}
        TransportKind::Nccl if config.device == DeviceKind::Cpu => {
            return Err(Error::unsupported(format!(
                "rank {}: transport is nccl (2), which carries GPU memory, and device is cpu (1)",
                config.rank
            )));
        }
        TransportKind::Nccl => nccl::probe()
            .map(|_| ())
            .map_err(|e| e.context(format!("rank {}: transport is nccl (2)", config.rank)))?,
        TransportKind::Nixl => {}
    }
    if config.wants_nixl() {
        if config.device == DeviceKind::Cuda && config.degrades {
            return refuse(
                "flags",
                "A2A_CONFIG_DEGRADE (2)".into(),
                "0 on cuda (2): a step of which a rank is lost is void",
            );
        }
        nixl::probe().map(|_| ()).map_err(|e| {
            e.context(format!(
                "rank {}: transport nixl (3), which backend nixl_elastic (6) needs",
                config.rank
            ))
        })?;
    }
    Ok(())
}

/// Why a strategy cannot serve the config; else what it would be.
fn candidate(kind: BackendKind, config: &Config) -> std::result::Result<(LayoutKind, Map), String> {
    if backend::of(kind).is_none() {
        return Err("not in this build".into());
    }
    if config.device == DeviceKind::Cuda && !ON_CUDA.contains(&kind) {
        return Err("not on cuda in this build".into());
    }
    if config.transport == TransportKind::Nccl && kind != BackendKind::AllgatherReducescatter {
        return Err("transport nccl carries allgather_reducescatter alone".into());
    }
    match (kind == BackendKind::NixlElastic, config.wants_nixl()) {
        (false, true) => return Err("transport nixl (3) carries nixl_elastic alone".into()),
        (true, false) if config.backend == kind => {
            let (name, code) = (config.transport.name(), config.transport as i32);
            return Err(format!("transport is {name} ({code}), it runs over nixl (3)"));
        }
        (true, false) => return Err("it is taken only where it is asked for (backend or transport)".into()),
        _ => {}
    }
    let offered = kind.layouts();
    if config.layout != LayoutKind::Auto && !offered.contains(&config.layout) {
        let offered: Vec<&str> = offered.iter().map(|l| l.name()).collect();
        return Err(format!("layout {} asked for, it offers {}", config.layout.name(), offered.join(", ")));
    }
    let layout = if config.layout == LayoutKind::Auto { offered[0] } else { config.layout };
    if config.device == DeviceKind::Cuda && config.max_sms != 0 {
        check_sms(kind, config.max_sms)?;
    }
    if config.device == DeviceKind::Cuda && layout == LayoutKind::ExpertContiguous {
        let keys = config.experts.num() as u64 + config.num_ranks as u64;
        if keys > cuda::MOST_KEYS as u64 {
            return Err(format!(
                "layout {} on cuda (2) counts num_experts + num_ranks in shared memory, they are {keys}, the limit is {}",
                layout.name(),
                cuda::MOST_KEYS
            ));
        }
    }
    let fixed = matches!(layout, LayoutKind::Gathered | LayoutKind::RankMajor);
    if config.max_recv_rows != 0 && fixed {
        return Err(format!(
            "max_recv_rows is {}, rows of layout {} have fixed places (it needs 0)",
            config.max_recv_rows,
            layout.name()
        ));
    }
    let sizes = sizes(config, kind, layout);
    if config.device == DeviceKind::Cuda && sizes.uses.fifos {
        let (beside, most) = (cuda::fifo_beside(&sizes.plane_bytes), cuda::FIFO_MOST_BESIDE);
        if beside > most {
            return Err(format!(
                "ids, weights, scales and extras of a row take {beside} bytes, FIFOs on cuda (2) have room for {most} beside \
                 its tokens (lower extra_row_bytes, max_scale_bytes or max_topk)"
            ));
        }
    }
    if sizes.rows() > MAX_ROWS {
        return Err(format!(
            "layout {} needs {} rows, the limit is {MAX_ROWS} (lower max_tokens, or set max_recv_rows)",
            layout.name(),
            sizes.rows()
        ));
    }
    Map::new(sizes).map(|map| (layout, map)).map_err(|error| error.message)
}

/// Why a strategy that could serve the config is passed over by AUTO.
fn too_large(map: &Map, config: &Config) -> Option<String> {
    let need = memory(config.device, map, &RoutingMap::new(&map.sizes)).total;
    (config.memory_limit != 0 && need > config.memory_limit)
        .then(|| format!("it needs {need} bytes, memory_limit is {}", config.memory_limit))
}

pub fn plan(config: &Config) -> Result<Plan> {
    check_fields(config)?;
    let rank = config.rank;
    let (backend, layout, map, reason) = if config.backend == BackendKind::Auto {
        let order = if config.wants_nixl() { &[BackendKind::NixlElastic][..] } else { &AUTO };
        let usable: Vec<_> = order
            .iter()
            .copied()
            .filter_map(|kind| candidate(kind, config).ok().map(|(layout, map)| (kind, layout, map)))
            .collect();
        let fits = usable.iter().position(|(_, _, map)| too_large(map, config).is_none());
        // If none fits, the first is refused with its need and the limit, where the other ranks hear of it.
        let chosen = usable.into_iter().nth(fits.unwrap_or(0));
        let Some((kind, layout, map)) = chosen else {
            let whys: Vec<String> = order
                .iter()
                .copied()
                .filter_map(|kind| candidate(kind, config).err().map(|why| format!("{}: {why}", kind.name())))
                .collect();
            return Err(Error::unsupported(format!(
                "rank {rank}: no backend of this build can serve the config ({})",
                whys.join("; ")
            )));
        };
        let that = match config.layout {
            LayoutKind::Auto => String::new(),
            layout => format!(" that offers layout {}", layout.name()),
        };
        let within = match fits {
            Some(1..) => " within memory_limit",
            _ => "",
        };
        (kind, layout, map, format!("the first of the AUTO table{that}{within}"))
    } else {
        match candidate(config.backend, config) {
            Ok((layout, map)) => (config.backend, layout, map, "asked for".to_string()),
            Err(why) => {
                let name = config.backend.name();
                return Err(Error::unsupported(format!("rank {rank}: backend {name}: {why}")));
            }
        }
    };
    if config.expert_alignment > 1 && layout != LayoutKind::ExpertContiguous {
        return Err(Error::invalid(format!(
            "rank {rank}: expert_alignment is {}, layout {} has no expert blocks of its own size (it needs 0 or 1)",
            config.expert_alignment,
            layout.name()
        )));
    }
    if config.quant != QuantKind::None && config.max_scale_bytes != 0 {
        return Err(Error::invalid(format!(
            "rank {rank}: max_scale_bytes is {}, with quant {} the scales are dispatch's own (it needs 0)",
            config.max_scale_bytes,
            config.quant.name()
        )));
    }
    if config.quant == QuantKind::None && config.scale_layout != ScaleLayout::Row {
        return Err(Error::invalid(format!(
            "rank {rank}: scale_layout is {}, without quant scales lie as they are given (it needs row, 0)",
            config.scale_layout.name()
        )));
    }
    let routing = RoutingMap::new(&map.sizes);
    Ok(Plan {
        device: config.device,
        backend,
        layout,
        transport: match config.transport {
            _ if config.wants_nixl() => TransportKind::Nixl,
            TransportKind::Auto => TransportKind::Window,
            transport => transport,
        },
        reason,
        map,
        routing,
    })
}

/// The plan, if its memory may be taken.
pub fn affordable(config: &Config) -> Result<Plan> {
    let plan = plan(config)?;
    let (rank, need) = (config.rank, plan.memory().total);
    if config.memory_limit != 0 && need > config.memory_limit {
        return Err(Error::new(
            Status::OutOfMemory,
            format!(
                "rank {rank}: {need} bytes are needed and memory_limit is {} (lower max_tokens, max_hidden or \
                 num_slots)",
                config.memory_limit
            ),
        ));
    }
    Ok(plan)
}

/// Bytes that all FIFOs of a slot may take, unless the config says how many rows each has.
const FIFO_BYTES: u64 = 32 << 20;
/// On a GPU: those of all slots and of all ranks on it. They are to stay in its cache, of which the tokens that pass through
/// take the rest (H100 has 50 MB).
const FIFO_BYTES_OF_GPU: u64 = 22 << 20;

fn sizes(config: &Config, kind: BackendKind, layout: LayoutKind) -> Sizes {
    let mut plane_bytes = [0; PLANES];
    plane_bytes[Plane::Tokens as usize] = config.max_wire_bytes() as u32;
    plane_bytes[Plane::Ids as usize] = config.max_topk * 4;
    plane_bytes[Plane::Weights as usize] = config.max_topk * 4;
    plane_bytes[Plane::Source as usize] = 8;
    plane_bytes[Plane::Scales as usize] = config.max_scale_row();
    plane_bytes[Plane::Extra0 as usize..].copy_from_slice(&config.extra_row_bytes);
    let mut sizes = Sizes {
        grid: Grid {
            layout,
            ranks: config.num_ranks,
            bound: config.max_tokens,
            topk: config.max_topk,
            alignment: if layout == LayoutKind::ExpertContiguous { config.expert_alignment } else { 1 },
            limit: config.max_recv_rows,
        },
        slots: config.num_slots,
        num_experts: config.experts.num(),
        experts: config.experts.most(),
        plane_bytes,
        quantises: config.quant != QuantKind::None,
        columns: config.scale_layout == ScaleLayout::Column,
        combine_bytes: config.max_combine_bytes(),
        uses: Uses {
            carried: config.transport == TransportKind::Nccl,
            ..backend::of(kind).map(|b| b.uses()).unwrap_or_default()
        },
        fifo_rows: config.fifo_rows,
        fifo_pieces: 0,
    };
    if sizes.uses.posted && config.device == DeviceKind::Cuda {
        (sizes.uses.banks, sizes.uses.fetched) = (true, true);
    }
    if sizes.uses.fifos && config.device == DeviceKind::Cuda {
        sizes.fifo_pieces = cuda::fifo_pieces(&sizes);
    }
    if sizes.uses.fifos && sizes.fifo_rows == 0 {
        let bytes = match config.device {
            DeviceKind::Cuda => FIFO_BYTES_OF_GPU / config.ranks_per_device as u64 / config.num_slots as u64,
            DeviceKind::Cpu => FIFO_BYTES,
        };
        let rows = bytes / config.num_ranks as u64 / sizes.entry_bytes();
        sizes.fifo_rows = rows.clamp(2, 1024) as u32;
    }
    sizes
}

/// If ranks may be on several hosts: what windows do not reach, NCCL carries. With AUTO it is not opened for nothing, where all
/// are on one anyhow (`may_meet_others`) or a config wants what it does not carry.
pub fn may_be_apart(config: &Config, may_meet_others: bool) -> bool {
    let gathers = matches!(config.backend, BackendKind::Auto | BackendKind::AllgatherReducescatter)
        && matches!(config.layout, LayoutKind::Auto | LayoutKind::Gathered);
    config.device == DeviceKind::Cuda
        && match config.transport {
            TransportKind::Auto => may_meet_others && gathers && plan(&apart(config)).is_ok(),
            transport => transport == TransportKind::Nccl,
        }
}

/// What the config comes to where ranks are on several hosts.
pub fn apart(config: &Config) -> Config {
    Config { transport: TransportKind::Nccl, ..config.clone() }
}

/// The JSON of a2a_explain.
pub fn explain(config: &Config) -> String {
    let plan = affordable(config);
    let backends: Vec<Value> = BackendKind::ALL
        .iter()
        .filter(|kind| **kind != BackendKind::Auto)
        .map(|kind| {
            let chosen = plan.as_ref().is_ok_and(|p| p.backend == *kind);
            let found = candidate(*kind, config);
            let bytes =
                found.as_ref().ok().map(|(_, map)| memory(config.device, map, &RoutingMap::new(&map.sizes)));
            let why = match (&plan, &found) {
                (Ok(plan), _) if chosen => plan.reason.clone(),
                (_, Err(why)) => why.clone(),
                (Ok(plan), Ok((_, map))) => too_large(map, config).unwrap_or_else(|| {
                    let first = match config.backend {
                        BackendKind::Auto => "stands before it in the AUTO table",
                        _ => "was asked for",
                    };
                    format!("usable, but {} {first}", plan.backend.name())
                }),
                (Err(_), Ok((_, map))) => {
                    too_large(map, config).unwrap_or_else(|| "usable but for the refusal above".into())
                }
            };
            let layouts: Vec<&str> = kind.layouts().iter().map(|l| l.name()).collect();
            json!({
                "name": kind.name(),
                "chosen": chosen,
                "layouts": layouts,
                "why": why,
                "window_bytes": bytes.map(|b| b.window),
                "total_bytes": bytes.map(|b| b.total),
            })
        })
        .collect();
    let mut report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "rank": config.rank,
        "num_ranks": config.num_ranks,
        "device": config.device.name(),
    });
    match &plan {
        Ok(plan) => {
            let need = plan.memory();
            report["status"] = json!("ok");
            report["backend"] = json!(plan.backend.name());
            report["layout"] = json!(plan.layout.name());
            report["transport"] = json!(plan.transport.name());
            report["why"] = json!(plan.reason);
            report["memory"] = json!({
                "window_bytes": need.window,
                "control_bytes": need.control,
                "slot_bytes": need.slot,
                "private_bytes": need.private,
                "routing_bytes": need.routing,
                "total_bytes": need.total,
                "pinned_bytes": need.pinned,
                "memory_limit": config.memory_limit,
            });
            report["limits"] = json!({
                "max_tokens": config.max_tokens,
                "max_topk": config.max_topk,
                "max_token_bytes": config.max_token_bytes(),
                "max_combine_bytes": config.max_combine_bytes(),
                "max_scale_bytes": config.max_scale_row(),
                "extra_row_bytes": config.extra_row_bytes,
                "num_slots": config.num_slots,
                "row_capacity": plan.row_capacity(config),
                "max_recv_rows": config.max_recv_rows,
                "overflow": config.overflow.name(),
                "expert_alignment": plan.map.sizes.grid.alignment,
                "fifo_rows": if plan.map.sizes.uses.fifos { plan.map.sizes.fifo_rows } else { 0 },
                "quant": config.quant.name(),
                "scale_layout": config.scale_layout.name(),
                "max_wire_bytes": config.max_wire_bytes(),
                "max_sms": plan.max_sms(config),
            });
        }
        Err(error) => {
            report["status"] = json!("refused");
            report["why"] = json!(error.message);
        }
    }
    report["experts"] = json!({
        "num_experts": config.experts.num(),
        "first_expert": config.experts.first(config.rank).map_or(-1, |e| e as i64),
        "num_local_experts": config.experts.count(config.rank),
        "placement": config.placement.name(),
    });
    report["timeouts_ms"] = json!({
        "setup": config.meeting.timeout_ms,
        "first_step": config.first_step_timeout_ms,
        "step": config.timeout_ms,
    });
    report["backends"] = json!(backends);
    report.to_string()
}
