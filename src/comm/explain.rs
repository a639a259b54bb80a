//! What a config leads to on this host: the choice of strategy, the memory it takes, and why not the others.
//!
//! Pure functions of the config and of what this build can load: every rank comes to the same answer.

use serde_json::{Value, json};

use crate::backend;
use crate::config::{BackendKind, BootstrapKind, Config, DeviceKind, LayoutKind, TransportKind};
use crate::config::{OverflowKind, QuantKind, ScaleLayout};
use crate::device::map::{Map, PLANES, Plane, RoutingMap, Sizes};
use crate::error::{Error, Result, Status};

/// AUTO, in order of preference for each layout. On CPU windows the layout decides: the two strategies built so far
/// share none. (Measured choices come with backends that compete for a layout.)
const AUTO: [BackendKind; 2] = [BackendKind::NvlinkOneSided, BackendKind::AllgatherReducescatter];

/// What a config leads to.
#[derive(Clone, Debug)]
pub struct Plan {
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
}

impl Plan {
    pub fn memory(&self) -> Memory {
        let slots = self.map.sizes.slots as u64;
        let (window, routing) = (self.map.window_bytes(), self.routing.bytes());
        Memory {
            window,
            control: self.map.control_bytes(),
            slot: self.map.row_bytes(),
            private: 0,
            routing,
            total: window.saturating_add(slots.saturating_mul(routing)),
        }
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
        return Err(Error::unsupported(format!(
            "rank {}: device is cuda (2), and this build has no device code: it knows cpu (1)",
            config.rank
        )));
    }
    if config.quant != QuantKind::None {
        return refuse("quant", config.quant.name().into(), "none (0)");
    }
    if config.scale_layout != ScaleLayout::Row {
        return refuse("scale_layout", config.scale_layout.name().into(), "row (0)");
    }
    if config.overflow != OverflowKind::Error {
        return refuse("overflow", config.overflow.name().into(), "error (0)");
    }
    if config.max_recv_rows != 0 {
        return refuse("max_recv_rows", config.max_recv_rows.to_string(), "0 (the layout's capacity)");
    }
    if config.max_ranks != config.num_ranks {
        return refuse("max_ranks", config.max_ranks.to_string(), "num_ranks (no backend here is elastic)");
    }
    if config.bootstrap != BootstrapKind::UniqueId || config.has_allgather {
        return refuse("bootstrap by allgather", "set".into(), "bootstrap by unique_id");
    }
    if config.has_nccl_comm {
        return refuse("nccl_comm", "set".into(), "NULL");
    }
    if !matches!(config.transport, TransportKind::Auto | TransportKind::Window) {
        return refuse("transport", config.transport.name().into(), "auto (0) and window (1)");
    }
    Ok(())
}

/// Why a strategy cannot serve the config; `None` if it can.
fn objection(kind: BackendKind, config: &Config) -> Option<String> {
    if backend::of(kind).is_none() {
        return Some("not in this build".into());
    }
    if config.layout != LayoutKind::Auto && !kind.layouts().contains(&config.layout) {
        let offered: Vec<&str> = kind.layouts().iter().map(|l| l.name()).collect();
        return Some(format!("layout {} asked for, it offers {}", config.layout.name(), offered.join(", ")));
    }
    None
}

pub fn plan(config: &Config) -> Result<Plan> {
    check_fields(config)?;
    let rank = config.rank;
    let (backend, reason) = if config.backend == BackendKind::Auto {
        let chosen = AUTO.into_iter().find(|kind| objection(*kind, config).is_none());
        let Some(chosen) = chosen else {
            return Err(Error::unsupported(format!(
                "rank {rank}: no backend of this build offers layout {}",
                config.layout.name()
            )));
        };
        let reason = match config.layout {
            LayoutKind::Auto => "the first of the AUTO table".to_string(),
            layout => format!("the first of the AUTO table that offers layout {}", layout.name()),
        };
        (chosen, reason)
    } else {
        if let Some(why) = objection(config.backend, config) {
            return Err(Error::unsupported(format!("rank {rank}: backend {}: {why}", config.backend.name())));
        }
        (config.backend, "asked for".to_string())
    };
    let layout = match config.layout {
        LayoutKind::Auto => backend.layouts()[0],
        layout => layout,
    };
    if config.expert_alignment > 1 && layout != LayoutKind::ExpertContiguous {
        return Err(Error::invalid(format!(
            "rank {rank}: expert_alignment is {}, layout {} has no expert blocks (it needs 0 or 1)",
            config.expert_alignment,
            layout.name()
        )));
    }
    let map = Map::new(sizes(config, backend)).map_err(|e| e.context(format!("rank {rank}")))?;
    let routing = RoutingMap::new(&map.sizes);
    Ok(Plan { backend, layout, transport: TransportKind::Window, reason, map, routing })
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

fn sizes(config: &Config, backend: BackendKind) -> Sizes {
    let mut plane_bytes = [0; PLANES];
    plane_bytes[Plane::Tokens as usize] = config.max_token_bytes() as u32;
    plane_bytes[Plane::Ids as usize] = config.max_topk * 4;
    plane_bytes[Plane::Weights as usize] = config.max_topk * 4;
    plane_bytes[Plane::Source as usize] = 8;
    plane_bytes[Plane::Scales as usize] = config.max_scale_bytes;
    plane_bytes[Plane::Extra0 as usize..].copy_from_slice(&config.extra_row_bytes);
    Sizes {
        ranks: config.num_ranks,
        slots: config.num_slots,
        max_tokens: config.max_tokens,
        max_topk: config.max_topk,
        plane_bytes,
        combine_bytes: config.max_combine_bytes(),
        experts: config.experts.most(),
        gathers: backend::of(backend).is_some_and(|b| b.gathers()),
    }
}

/// The JSON of a2a_explain.
pub fn explain(config: &Config) -> String {
    let plan = affordable(config);
    let backends: Vec<Value> = BackendKind::ALL
        .iter()
        .filter(|kind| **kind != BackendKind::Auto)
        .map(|kind| {
            let chosen = plan.as_ref().is_ok_and(|p| p.backend == *kind);
            let why = match (&plan, objection(*kind, config)) {
                (Ok(plan), _) if chosen => plan.reason.clone(),
                (_, Some(why)) => why,
                (Ok(_), None) => "usable, not chosen".into(),
                (Err(_), None) => "usable but for the refusal above".into(),
            };
            let layouts: Vec<&str> = kind.layouts().iter().map(|l| l.name()).collect();
            json!({ "name": kind.name(), "chosen": chosen, "layouts": layouts, "why": why })
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
                "memory_limit": config.memory_limit,
            });
            report["limits"] = json!({
                "max_tokens": config.max_tokens,
                "max_topk": config.max_topk,
                "max_token_bytes": config.max_token_bytes(),
                "max_combine_bytes": config.max_combine_bytes(),
                "max_scale_bytes": config.max_scale_bytes,
                "extra_row_bytes": config.extra_row_bytes,
                "num_slots": config.num_slots,
                "row_capacity": config.num_ranks as u64 * config.max_tokens as u64,
                "max_sms": 0,
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
        "setup": config.setup_timeout_ms,
        "first_step": config.first_step_timeout_ms,
        "step": config.timeout_ms,
    });
    report["backends"] = json!(backends);
    report.to_string()
}
