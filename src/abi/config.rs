//! From `a2a_config_t` to a checked config, and from a comm to the structs that report on it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::types::*;
use crate::comm::Comm;
use crate::config::{
    Allgather, BackendKind, Bootstrap, BootstrapKind, CallersComm, Config, DeviceKind, Dtype, Experts,
    LayoutKind, MAX_EXTRAS, MAX_RANKS, MAX_ROWS, MAX_SLOTS, MAX_TIMEOUT_MS, MAX_TOPK, Meeting, OverflowKind,
    PlacementKind, QuantKind, ROW_ALIGN, ScaleLayout, TransportKind, UniqueId,
};
use crate::error::{Error, Result, Status};

fn range(rank: i32, name: &str, value: i64, low: i64, high: i64) -> Result<i64> {
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(Error::invalid(format!("rank {rank}: {name} is {value}, it must be from {low} to {high}")))
    }
}

/// 0 means the default.
fn positive(rank: i32, name: &str, value: i64, default: i64, high: i64) -> Result<u64> {
    range(rank, name, value, 0, high).map(|value| if value == 0 { default as u64 } else { value as u64 })
}

/// If ranks come and go: what is made is made for as many as there may be. A code that is none is refused elsewhere.
fn is_elastic(raw: &a2a_config_t) -> bool {
    let transport = TransportKind::from_code(raw.rank, raw.transport);
    let backend = BackendKind::from_code(raw.rank, raw.backend);
    matches!((transport, backend), (Ok(transport), Ok(backend)) if transport.wants_nixl(backend))
}

/// The part by which a rank finds the others; the rest may still be refused.
///
/// # Safety
/// `allgather`, if set, is a function as the ABI says, and may be called with `allgather_user` as long as the call that
/// reads this lasts.
pub unsafe fn meeting(raw: &a2a_config_t) -> Result<Meeting> {
    let rank = raw.rank;
    let invalid = |text: &str| Err(Error::invalid(format!("rank {rank}: {text}")));
    let num_ranks = range(rank, "num_ranks", raw.num_ranks as i64, 1, MAX_RANKS as i64)? as u32;
    let seats = if is_elastic(raw) { (raw.max_ranks as i64).max(num_ranks as i64) } else { num_ranks as i64 };
    range(rank, "rank", rank as i64, 0, seats - 1)?;
    if raw.flags & !(A2A_CONFIG_REMOTE | A2A_CONFIG_DEGRADE) != 0 {
        return invalid(&format!(
            "flags is {:#x}, this version knows A2A_CONFIG_REMOTE (1) and A2A_CONFIG_DEGRADE (2)",
            raw.flags
        ));
    }
    let id = UniqueId::from_bytes(rank, &raw.unique_id.bytes)?;
    let bootstrap = match (BootstrapKind::from_code(rank, raw.bootstrap)?, id, raw.allgather) {
        (BootstrapKind::UniqueId, _, Some(_)) => {
            return invalid("allgather is set and bootstrap is unique_id (0), it needs allgather (1)");
        }
        (BootstrapKind::Allgather, Some(_), _) => {
            return invalid("unique_id is set and bootstrap is allgather (1), it needs unique_id (0)");
        }
        (BootstrapKind::Allgather, _, None) => {
            return invalid("bootstrap is allgather (1) and allgather is NULL");
        }
        (_, _, None) if !raw.allgather_user.is_null() => {
            return invalid("allgather_user is set and allgather is NULL");
        }
        (BootstrapKind::UniqueId, Some(id), None) => Bootstrap::UniqueId(id),
        (BootstrapKind::UniqueId, None, None) => Bootstrap::Nothing,
        (BootstrapKind::Allgather, None, Some(call)) => {
            let user = User(raw.allgather_user);
            Bootstrap::Allgather(Allgather::new(move |mine, all| {
                // SAFETY: forwarded from the caller; `all` has room for num_ranks times what `mine` has.
                match unsafe { call(mine.as_ptr().cast(), all.as_mut_ptr().cast(), mine.len(), user.get()) } {
                    0 => Ok(()),
                    code => Err(Error::new(Status::System, format!("allgather returned {code}"))),
                }
            }))
        }
    };
    Ok(Meeting {
        rank: rank as u32,
        num_ranks,
        bootstrap,
        remote: raw.flags & A2A_CONFIG_REMOTE != 0,
        timeout_ms: positive(rank, "setup_timeout_ms", raw.setup_timeout_ms, 300_000, MAX_TIMEOUT_MS)?,
    })
}

/// The pointer that goes with a caller's function.
struct User(*mut std::ffi::c_void);

// SAFETY: only handed back to the caller's function, on the thread of the call that brought it.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}

impl User {
    fn get(&self) -> *mut std::ffi::c_void {
        self.0
    }
}

/// Fills in defaults and checks every value.
///
/// # Safety
/// As for `meeting`; `expert_owner`, if set, points at `num_experts` int32.
pub unsafe fn read(raw: &a2a_config_t) -> Result<Config> {
    // SAFETY: forwarded from the caller.
    let meeting = unsafe { meeting(raw)? };
    let rank = raw.rank;
    let range = |name: &str, value, low, high| range(rank, name, value, low, high);
    let positive = |name: &str, value, default, high| positive(rank, name, value, default, high);
    let max = i32::MAX as i64;
    let max_ranks = match range("max_ranks", raw.max_ranks as i64, 0, MAX_RANKS as i64)? as u32 {
        0 => meeting.num_ranks,
        max_ranks if max_ranks < meeting.num_ranks => {
            return Err(Error::invalid(format!(
                "rank {rank}: max_ranks is {max_ranks}, num_ranks is {}",
                meeting.num_ranks
            )));
        }
        max_ranks => max_ranks,
    };
    // All that there may be: their experts and outputs are the same whoever takes part.
    let num_ranks = if is_elastic(raw) { max_ranks } else { meeting.num_ranks };
    let num_experts = range("num_experts", raw.num_experts as i64, 1, 1 << 20)? as u32;
    let max_tokens = range("max_tokens", raw.max_tokens as i64, 1, max)? as u32;
    let max_hidden = range("max_hidden", raw.max_hidden as i64, 1, max)? as u32;
    let rows = num_ranks as u64 * max_tokens as u64;
    if rows > MAX_ROWS {
        return Err(Error::invalid(format!(
            "rank {rank}: num_ranks * max_tokens is {rows} rows, the limit is {MAX_ROWS}"
        )));
    }

    let token_dtype = match raw.token_dtype {
        A2A_DTYPE_DEFAULT => Dtype::Bf16,
        code => Dtype::from_code(rank, code).map_err(|e| e.context("token_dtype"))?,
    };
    let combine_dtype = match raw.combine_dtype {
        A2A_DTYPE_DEFAULT if token_dtype.is_summable() => token_dtype,
        A2A_DTYPE_DEFAULT => Dtype::Bf16,
        code => Dtype::from_code(rank, code).map_err(|e| e.context("combine_dtype"))?,
    };
    if !combine_dtype.is_summable() {
        return Err(Error::invalid(format!(
            "rank {rank}: combine_dtype is {}, it must be bf16 (1), f16 (2) or f32 (3)",
            combine_dtype.name()
        )));
    }
    let mut extra_row_bytes = [0; MAX_EXTRAS];
    for (i, bytes) in raw.extra_row_bytes.iter().enumerate() {
        extra_row_bytes[i] = range(&format!("extra_row_bytes[{i}]"), *bytes as i64, 0, max)? as u32;
    }

    let placement = PlacementKind::from_code(rank, raw.placement)?;
    let experts = match placement {
        PlacementKind::Contiguous if raw.expert_owner.is_null() => {
            Experts::contiguous(num_experts, num_ranks)
        }
        PlacementKind::Contiguous => {
            return Err(Error::invalid(format!(
                "rank {rank}: expert_owner is set and placement is contiguous (0), it needs table (1)"
            )));
        }
        PlacementKind::Table => {
            if raw.expert_owner.is_null() {
                return Err(Error::invalid(format!(
                    "rank {rank}: placement is table (1) and expert_owner is NULL"
                )));
            }
            // SAFETY: not NULL; num_experts int32 by the contract.
            let table: Vec<i32> = (0..num_experts as usize)
                .map(|e| unsafe { raw.expert_owner.add(e).read_unaligned() })
                .collect();
            for (expert, owner) in table.iter().enumerate() {
                range(&format!("expert_owner[{expert}]"), *owner as i64, 0, num_ranks as i64 - 1)?;
            }
            Experts::from_owners(table.into_iter().map(|owner| owner as u32).collect(), num_ranks)
        }
    };

    let config = Config {
        rank: rank as u32,
        num_ranks,
        max_ranks,
        degrades: raw.flags & A2A_CONFIG_DEGRADE != 0,
        ranks_per_device: positive("ranks_per_device", raw.ranks_per_device as i64, 1, MAX_RANKS as i64)?
            as u32,
        device: match raw.device {
            0 => DeviceKind::Cpu,
            code => DeviceKind::from_code(rank, code)?,
        },
        device_ordinal: range("device_ordinal", raw.device_ordinal as i64, 0, max)? as i32,
        backend: BackendKind::from_code(rank, raw.backend)?,
        transport: match TransportKind::from_code(rank, raw.transport)? {
            // Who hands over a communicator means it.
            TransportKind::Auto if !raw.nccl_comm.is_null() => TransportKind::Nccl,
            transport => transport,
        },
        layout: LayoutKind::from_code(rank, raw.layout)?,
        experts,
        placement,
        max_topk: range("max_topk", raw.max_topk as i64, 1, MAX_TOPK as i64)? as u32,
        max_hidden,
        max_tokens,
        token_dtype,
        combine_dtype,
        combine_hidden: range("combine_hidden", raw.combine_hidden as i64, 0, max)? as u32,
        quant: QuantKind::from_code(rank, raw.quant)?,
        scale_layout: ScaleLayout::from_code(rank, raw.scale_layout)?,
        max_scale_bytes: range("max_scale_bytes", raw.max_scale_bytes as i64, 0, max)? as u32,
        extra_row_bytes,
        max_sms: range("max_sms", raw.max_sms as i64, 0, max)? as u32,
        num_slots: positive("num_slots", raw.num_slots as i64, 1, MAX_SLOTS as i64)? as u32,
        expert_alignment: positive("expert_alignment", raw.expert_alignment as i64, 1, 1 << 16)? as u32,
        overflow: OverflowKind::from_code(rank, raw.overflow)?,
        fifo_rows: match raw.fifo_rows {
            0 => 0,
            rows => range("fifo_rows", rows as i64, 2, 1 << 16)? as u32,
        },
        max_recv_rows: range("max_recv_rows", raw.max_recv_rows, 0, MAX_ROWS as i64)? as u64,
        first_step_timeout_ms: positive(
            "first_step_timeout_ms",
            raw.first_step_timeout_ms,
            600_000,
            MAX_TIMEOUT_MS,
        )?,
        timeout_ms: positive("timeout_ms", raw.timeout_ms, 30_000, MAX_TIMEOUT_MS)?,
        memory_limit: raw.memory_limit,
        meeting,
        nccl_comm: (!raw.nccl_comm.is_null()).then_some(CallersComm(raw.nccl_comm as usize)),
        chosen: None,
    };
    for (name, bytes) in [
        ("max_hidden * token_dtype", config.max_token_bytes()),
        ("max_hidden, a byte a column with quant,", config.max_wire_bytes()),
        ("max_hidden (or combine_hidden) * combine_dtype", config.max_combine_bytes()),
    ] {
        if bytes > i32::MAX as u64 || !bytes.is_multiple_of(ROW_ALIGN) {
            return Err(Error::invalid(format!(
                "rank {rank}: {name} is {bytes} bytes a row, rows must be multiples of {ROW_ALIGN} bytes below 2^31"
            )));
        }
    }
    Ok(config)
}

pub fn info(comm: &Comm) -> a2a_info_t {
    let (config, plan) = (comm.config(), comm.plan());
    a2a_info_t {
        struct_size: 0,
        rank: config.rank as i32,
        num_ranks: config.num_ranks as i32,
        max_ranks: config.max_ranks as i32,
        device: config.device as i32,
        device_ordinal: config.device_ordinal,
        backend: plan.backend as i32,
        transport: plan.transport as i32,
        layout: plan.layout as i32,
        num_experts: config.experts.num() as i32,
        first_expert: config.experts.first(config.rank).map_or(-1, |e| e as i32),
        num_local_experts: config.experts.count(config.rank) as i32,
        max_topk: config.max_topk as i32,
        max_hidden: config.max_hidden as i32,
        max_tokens: config.max_tokens as i32,
        num_slots: config.num_slots as i32,
        max_sms: plan.max_sms(config) as i32,
        row_capacity: plan.row_capacity(config) as i64,
        window_bytes: plan.memory().window,
    }
}

pub fn stats(comm: &Comm) -> a2a_stats_t {
    comm.with_stats(|s| {
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        a2a_stats_t {
            struct_size: 0,
            dispatches: read(&s.dispatches),
            combines: read(&s.combines),
            rows_pushed: read(&s.rows_pushed),
            bytes_pushed: read(&s.bytes_pushed),
            rows_pulled: read(&s.rows_pulled),
            bytes_pulled: read(&s.bytes_pulled),
            rows_gathered: read(&s.rows_gathered),
            bytes_gathered: read(&s.bytes_gathered),
            rows_fifo: read(&s.rows_fifo),
            bytes_fifo: read(&s.bytes_fifo),
            rows_copied: read(&s.rows_copied),
            bytes_copied: read(&s.bytes_copied),
            bytes_remote: read(&s.bytes_remote),
            hops: read(&s.hops),
            bad_ids: read(&s.bad_ids),
            steps_lost: read(&s.steps_lost),
        }
    })
}

pub fn error_info(comm: &Comm) -> a2a_error_info_t {
    let mut info = a2a_error_info_t {
        struct_size: 0,
        status: A2A_SUCCESS,
        operation: 0,
        slot: 0,
        rank: 0,
        peer: 0,
        reserved: 0,
        sequence: 0,
        expected: 0,
        seen: 0,
        lost_ranks: [0; 16],
        message: [0; 512],
    };
    let Some(error) = comm.async_error() else { return info };
    info.status = error.status as i32;
    info.rank = comm.config().rank as i32;
    info.peer = -1;
    if let Some(loss) = &error.loss {
        info.operation = loss.operation;
        info.slot = loss.slot as i32;
        info.peer = loss.peer as i32;
        info.sequence = loss.sequence;
        info.expected = loss.expected;
        info.seen = loss.seen;
        for rank in &loss.lost {
            info.lost_ranks[(rank / 64) as usize] |= 1 << (rank % 64);
        }
    }
    let text = comm.error_text(&error, info.message.len() - 1);
    for (to, from) in info.message.iter_mut().zip(text.bytes()) {
        *to = from as _;
    }
    info
}
