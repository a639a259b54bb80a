//! The exported functions. Each checks and copies what it was given, then asks `comm`; the doc comments become
//! the header.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Arc;

use super::config;
use super::guard::{
    Table, Versioned, check_struct, guard, guard_with, last_error, read_struct, write_struct,
};
use super::tensor::{self, RoutingHandle};
use super::types::*;
use crate::comm::{self, Comm};
use crate::config::{BackendKind, UniqueId};
use crate::device::Stream;
use crate::error::{Error, Result, Status};
use crate::log;

static COMMS: Table<Comm> = Table::new("a2a_comm_t");
static ROUTINGS: Table<RoutingHandle> = Table::new("a2a_routing_t");

macro_rules! versioned {
    ($($ty:ident: $v1:expr),+ $(,)?) => {$(
        // SAFETY: repr(C), size first, no inner padding (types.rs freezes the offsets), zero bytes are valid.
        unsafe impl Versioned for $ty {
            const NAME: &'static str = stringify!($ty);
            const V1_SIZE: usize = $v1;
        }
    )+};
}
versioned! {
    a2a_config_t: 352,
    a2a_dispatch_in_t: 136,
    a2a_dispatch_out_t: 160,
    a2a_combine_in_t: 48,
    a2a_combine_out_t: 32,
    a2a_recover_in_t: 24,
    // Results: a caller may take fewer fields than there are.
    a2a_memory_t: 16,
    a2a_info_t: 16,
    a2a_stats_t: 16,
    a2a_error_info_t: 16,
    a2a_recover_out_t: 16,
}

/// Runs `body` with the comm; a panic in it fails the comm.
fn with_comm(name: &str, comm: *mut a2a_comm_t, body: impl FnOnce(&Arc<Comm>) -> Result<()>) -> a2a_status_t {
    match COMMS.get(comm as usize) {
        Ok(comm) => guard_with(name, || body(&comm), |error| comm.fail(error.clone())),
        Err(error) => guard(name, || Err(error)),
    }
}

// ---------------------------------------------------------------------------------------------- comm

/// Makes the name of a new group of ranks on this host: a random address for a Unix socket (abstract, nothing
/// on disk) and a random 128-bit key. Opens nothing; rank 0 listens during a2a_create.
///
/// id: out, not NULL. Threads: any. Errors: INVALID_ARGUMENT, SYSTEM_ERROR (no randomness).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_get_unique_id(id: *mut a2a_unique_id_t) -> a2a_status_t {
    guard("a2a_get_unique_id", || {
        let unique = comm::new_unique_id()?;
        write_id(id, unique)
    })
}

/// Makes the name of a group from an address and a key that all ranks already know: no exchange is needed, every
/// rank makes the same id. Rank 0 listens on the address during a2a_create. Windows reach no further than one host; over NCCL
/// ranks may be on several.
///
/// address: "host:port", NUL-terminated, at most 80 bytes; an IPv6 host stands in brackets. key: NUL-terminated,
/// not empty, at most 4096 bytes; a secret. id: out, not NULL. Threads: any. Errors: INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_unique_id_from_address(
    address: *const c_char,
    key: *const c_char,
    id: *mut a2a_unique_id_t,
) -> a2a_status_t {
    guard("a2a_unique_id_from_address", || {
        // SAFETY: the ABI asks for NUL-terminated strings.
        let (address, key) = unsafe { (text("address", address)?, text("key", key)?) };
        write_id(id, UniqueId::from_address(address, key)?)
    })
}

/// Fills a config with the defaults and this library's version of the struct: all zero but struct_size. Then set
/// at least rank, num_ranks, num_experts, max_topk, max_hidden, max_tokens and unique_id.
///
/// config: out, not NULL, `size` bytes. size: sizeof(a2a_config_t) of the caller. Threads: any.
/// Errors: INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_config_init(config: *mut a2a_config_t, size: usize) -> a2a_status_t {
    guard("a2a_config_init", || {
        if config.is_null() {
            return Err(Error::invalid("config is NULL"));
        }
        if !(a2a_config_t::V1_SIZE..=64 * 1024).contains(&size) {
            return Err(Error::invalid(format!(
                "size is {size}, it must be sizeof(a2a_config_t), between {} and 65536",
                a2a_config_t::V1_SIZE
            )));
        }
        // SAFETY: the caller vouches for `size` bytes; zero is valid for every field.
        unsafe {
            std::ptr::write_bytes(config as *mut u8, 0, size);
            std::ptr::write_unaligned(config as *mut usize, size);
        }
        Ok(())
    })
}

/// Explains what a2a_create would do with this config on this host: which backend and layout and why, why not the
/// others, bytes per rank, limits in effect. Depends on the config and the host alone, creates nothing.
///
/// buf: out, may be NULL with len 0; receives NUL-terminated JSON, cut off if it does not fit. needed: out, may be
/// NULL; the bytes the whole text needs, NUL included. Threads: any. Errors: INVALID_ARGUMENT for a config that
/// makes no sense; OVERFLOW if buf is given and too small (buf then holds the beginning). A config that is refused
/// as UNSUPPORTED is explained, not an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_explain(
    config: *const a2a_config_t,
    buf: *mut c_char,
    len: usize,
    needed: *mut usize,
) -> a2a_status_t {
    guard("a2a_explain", || {
        // SAFETY: forwarded from the caller.
        let config = unsafe { config::read(&read_struct(config)?)? };
        let text = comm::explain(&config);
        // SAFETY: forwarded from the caller.
        unsafe { write_text(&text, buf, len, needed) }
    })
}

/// Says how many bytes a2a_create and a2a_routing_create will take with this config. Creates nothing.
///
/// memory: out, its struct_size set by the caller. Threads: any. Errors: INVALID_ARGUMENT, UNSUPPORTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_query_memory(
    config: *const a2a_config_t,
    memory: *mut a2a_memory_t,
) -> a2a_status_t {
    guard("a2a_query_memory", || {
        // SAFETY: forwarded from the caller.
        let config = unsafe { config::read(&read_struct(config)?)? };
        let need = comm::query_memory(&config)?;
        let value = a2a_memory_t {
            struct_size: 0,
            window_bytes: need.window,
            control_bytes: need.control,
            slot_bytes: need.slot,
            private_bytes: need.private,
            routing_bytes: need.routing,
            total_bytes: need.total,
            pinned_bytes: need.pinned,
        };
        // SAFETY: forwarded from the caller.
        unsafe { write_struct(memory, &value) }
    })
}

/// Creates this rank's membership of the group: agrees with every rank on version and config, takes the memory,
/// maps the peers' windows. Collective: returns when every rank has called it, or on every rank with an error that
/// names the rank and the reason, within setup_timeout_ms of rank 0's call (a rank whose rank 0 never comes: of its
/// own). A rank whose config is refused tells the others, for which it waits up to a second.
///
/// config: read during the call. comm: out, written on success only; free with a2a_destroy. Ranks may be threads of
/// one process, processes, or both, all on one host; over A2A_TRANSPORT_NCCL, or A2A_TRANSPORT_AUTO where a config
/// allows that one, on several, which a connection to rank 0 then holds together as long as the comm lives.
/// Threads: any; ranks of one process must call from threads of their own. Capture: refused. Errors:
/// INVALID_ARGUMENT, UNSUPPORTED, OUT_OF_MEMORY, SYSTEM_ERROR, MISMATCH (the ranks' configs differ), TIMEOUT (a rank
/// did not come), PEER_LOST (a rank left or was refused memory).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_create(config: *const a2a_config_t, comm: *mut *mut a2a_comm_t) -> a2a_status_t {
    guard("a2a_create", || {
        if comm.is_null() {
            return Err(Error::invalid("comm is NULL"));
        }
        // SAFETY: forwarded from the caller.
        let (meeting, config) = unsafe {
            let raw = read_struct(config)?;
            (config::meeting(&raw)?, config::read(&raw))
        };
        let created = Comm::create(config.inspect_err(|error| comm::decline(&meeting, error))?)?;
        // SAFETY: not NULL; the caller vouches for it.
        unsafe { *comm = COMMS.insert(created) as *mut a2a_comm_t };
        Ok(())
    })
}

/// Says what the comm is: what was chosen, the experts this rank owns, capacities.
///
/// info: out, its struct_size set by the caller. Threads: any, at any time. Errors: INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_get_info(comm: *mut a2a_comm_t, info: *mut a2a_info_t) -> a2a_status_t {
    with_comm("a2a_get_info", comm, |comm| {
        // SAFETY: forwarded from the caller.
        unsafe { write_struct(info, &config::info(comm)) }
    })
}

/// Changes how long calls wait for peers, for every call that begins afterwards, on this rank alone.
///
/// first_step_timeout_ms, timeout_ms: as in a2a_config_t; 0 leaves a value as it is. Threads: any, at any time.
/// Errors: INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_set_timeout(
    comm: *mut a2a_comm_t,
    first_step_timeout_ms: i64,
    timeout_ms: i64,
) -> a2a_status_t {
    with_comm("a2a_set_timeout", comm, |comm| comm.set_timeout(first_step_timeout_ms, timeout_ms))
}

/// After a loss: the survivors agree on who they are, and go on in the same comm, at the same addresses. Collective over
/// the survivors: every rank calls it whose call ended with TIMEOUT, PEER_LOST or MISMATCH, and every other that means
/// to go on, from any state of its slots; steps in flight are void. Returns when all have done their part; then every
/// slot is open and idle, routings can be dispatched afresh (not replayed: A2A_DISPATCH_REUSE is refused until they have
/// been), a2a_get_async_error says nothing, and what stood in views is gone.
///
/// Whoever does not come is lost: ranks whose process has ended or whose comm was destroyed or aborted at once, others
/// as a2a_recover_in_t says. Experts of lost ranks get no rows: their ids count as -1 and as bad ids
/// (A2A_STEP_BAD_ID). A lost rank that turns up later gets PEER_LOST and can only destroy its comm; whatever it was at, it
/// changes nothing of the others' results: unless it is known to have ended, the windows have become other memory.
///
/// in: may be NULL. out: may be NULL; written on success only. With another failure than INVALID_ARGUMENT or BUSY no step
/// can run until a later a2a_recover succeeds: one may die during a recovery too. Memory: while windows are replaced, as
/// much again as window_bytes of a2a_memory_t.
///
/// CUDA memory: waits for all work on the device's primary context that this process has launched, and ends this rank's
/// kernels that wait for peers. Graphs captured before are replayed afterwards as before, their addresses are the same; a
/// replay of a dispatch with A2A_DISPATCH_REUSE must come after one that routes afresh. Ranks that are threads of one process
/// share their mappings of the windows: such a rank that takes no part must have destroyed its comm, else UNSUPPORTED.
///
/// Threads: one call at a time on a comm. Capture: not inside one. Errors: INVALID_ARGUMENT, BUSY, UNSUPPORTED,
/// OUT_OF_MEMORY, SYSTEM_ERROR, TIMEOUT, PEER_LOST (a survivor died meanwhile; or the others went on without this rank),
/// ABORTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_recover(
    comm: *mut a2a_comm_t,
    input: *const a2a_recover_in_t,
    output: *mut a2a_recover_out_t,
) -> a2a_status_t {
    with_comm("a2a_recover", comm, |comm| {
        // SAFETY: forwarded from the caller.
        let input = if input.is_null() { None } else { Some(unsafe { read_struct(input)? }) };
        if !output.is_null() {
            // SAFETY: as above. Refused before anybody is kept waiting.
            unsafe { check_struct(output)? };
        }
        let (timeout_ms, patience_ms) = input.map_or((0, 0), |input| (input.timeout_ms, input.patience_ms));
        let recovered = comm.recover(timeout_ms, patience_ms)?;
        if output.is_null() {
            return Ok(());
        }
        let mut whole_steps = [0; 64];
        whole_steps[..recovered.whole.len()].copy_from_slice(&recovered.whole);
        let value = a2a_recover_out_t {
            struct_size: 0,
            generation: recovered.generation,
            members: *recovered.members.words(),
            num_members: recovered.members.len() as i32,
            replaced: recovered.replaced as i32,
            whole_steps,
        };
        // SAFETY: as above.
        unsafe { write_struct(output, &value) }
    })
}

/// Connects to ranks, each of which calls this too and names this rank; those that are connected already stay so.
/// A rank that has been replaced is disconnected first. Connected ranks take no part in steps before a2a_activate_ranks, and steps
/// of those that do go on meanwhile. NIXL_ELASTIC; windows have the ranks that they were created with.
///
/// ranks: [count] int32, in any order, this rank among them or not; below max_ranks. timeout_ms: 0 = the config's
/// setup_timeout_ms. On failure none of those that were new is connected. Memory: of a rank whose predecessor did not say goodbye
/// (a2a_destroy), two boxes more: what it was given may still be written to.
///
/// Threads: any, also while another thread is inside a call on the comm; one at a time of the calls that connect and activate.
/// Errors: INVALID_ARGUMENT, UNSUPPORTED (another backend), TIMEOUT, MISMATCH (another config or version),
/// OUT_OF_MEMORY, SYSTEM_ERROR, NIXL_ERROR, ABORTED; or what a rank that cannot take part says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_connect_ranks(
    comm: *mut a2a_comm_t,
    ranks: *const i32,
    count: i32,
    timeout_ms: i64,
) -> a2a_status_t {
    with_comm("a2a_connect_ranks", comm, |comm| {
        // SAFETY: forwarded from the caller.
        let ranks = unsafe { int_list("ranks", ranks, count)? };
        comm.connect_ranks(&ranks, timeout_ms)
    })
}

/// Agrees with ranks, all of which call this with the same ones, that from now on they take part, and nobody else: ranks join, and
/// others leave, by it. Windows: some of those that take part, or all; it is a2a_recover without those that are not named (what
/// is said there of memory and of CUDA holds here), and who is named and does not come is left out too: PEER_LOST. Every slot is idle or closed, and is idle afterwards; steps begin anew, routings of before are not
/// replayed (A2A_DISPATCH_REUSE). Experts of ranks that take no part get no rows: their ids count as bad ids.
///
/// ranks: [count] int32, in any order, this rank among them, the others connected. timeout_ms: 0 = the config's
/// setup_timeout_ms. generation: out, may be NULL: the same on all, and higher than any of them has had. On failure all is as
/// before, but if others have succeeded meanwhile, steps end by their deadline.
///
/// Threads: one call at a time on a comm. Errors: INVALID_ARGUMENT, UNSUPPORTED (another backend), BUSY, TIMEOUT (who did not agree),
/// PEER_LOST (who has gone meanwhile), ABORTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_activate_ranks(
    comm: *mut a2a_comm_t,
    ranks: *const i32,
    count: i32,
    timeout_ms: i64,
    generation: *mut u64,
) -> a2a_status_t {
    with_comm("a2a_activate_ranks", comm, |comm| {
        // SAFETY: forwarded from the caller.
        let ranks = unsafe { int_list("ranks", ranks, count)? };
        let agreed = comm.activate_ranks(&ranks, timeout_ms)?;
        if !generation.is_null() {
            // SAFETY: not NULL; the caller vouches for it.
            unsafe { generation.write_unaligned(agreed) };
        }
        Ok(())
    })
}

/// Forgets ranks that take no part. Nothing is sent to them or heard of them any more, and what a rank that does not
/// know it writes is looked at by nobody. Those that are not connected are passed over.
///
/// ranks: [count] int32, in any order. Threads: one call at a time on a comm. Errors: INVALID_ARGUMENT (a rank that takes part),
/// UNSUPPORTED (another backend), BUSY, ABORTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_disconnect_ranks(
    comm: *mut a2a_comm_t,
    ranks: *const i32,
    count: i32,
) -> a2a_status_t {
    with_comm("a2a_disconnect_ranks", comm, |comm| {
        // SAFETY: forwarded from the caller.
        let ranks = unsafe { int_list("ranks", ranks, count)? };
        comm.disconnect_ranks(&ranks)
    })
}

/// NIXL_ELASTIC: lets this rank take steps alone, to warm up, and then goes on as before. Nobody agrees on it: no rank that takes part
/// begins a step while another is alone. Who takes part is changed by a2a_activate_ranks alone.
///
/// mask: [count] int32, not 0 = takes part; count is max_ranks. It names this rank alone, or all that take part. Slots are idle
/// or closed. Threads: one call at a time on a comm. Errors: INVALID_ARGUMENT, UNSUPPORTED (another backend; on A2A_DEVICE_CUDA this
/// rank alone), BUSY, ABORTED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_set_rank_mask(
    comm: *mut a2a_comm_t,
    mask: *const i32,
    count: i32,
) -> a2a_status_t {
    with_comm("a2a_set_rank_mask", comm, |comm| {
        // SAFETY: forwarded from the caller.
        let mask = unsafe { int_list("mask", mask, count)? };
        comm.set_rank_mask(&mask)
    })
}

/// Says who takes part and, as far as this rank knows, lives.
///
/// mask: out, [count] int32, 1 = member and alive; count at least num_ranks (max_ranks with NIXL_ELASTIC). Threads: any, at any time. Errors:
/// INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_get_rank_mask(
    comm: *mut a2a_comm_t,
    mask: *mut i32,
    count: i32,
) -> a2a_status_t {
    with_comm("a2a_get_rank_mask", comm, |comm| {
        let ranks = comm.rank_mask()?;
        let rank = comm.config().rank;
        if mask.is_null() {
            return Err(Error::invalid(format!("rank {rank}: mask is NULL")));
        }
        if (count as i64) < ranks.len() as i64 {
            let text = format!("rank {rank}: count is {count}, num_ranks is {}", ranks.len());
            return Err(Error::invalid(text));
        }
        for (i, is_there) in ranks.into_iter().enumerate() {
            // SAFETY: the caller vouches for count int32.
            unsafe { mask.add(i).write_unaligned(is_there as i32) };
        }
        Ok(())
    })
}

/// Ends every call in flight on the comm with A2A_ABORTED, and every later one. Peers that wait for something this
/// rank has not sent get A2A_PEER_LOST. Returns at once.
///
/// Threads: any, at any time, also while another thread is inside a call. Errors: INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_abort(comm: *mut a2a_comm_t) -> a2a_status_t {
    with_comm("a2a_abort", comm, |comm| {
        comm.abort();
        Ok(())
    })
}

/// Ends the comm and frees what it took, views included. Never waits for peers: those that still wait for this
/// rank get A2A_PEER_LOST, those that need nothing more from it notice nothing. A call in flight on another thread
/// is aborted first, and so is work on a CUDA stream that waits for a peer: synchronise the stream before if its results
/// are wanted. CUDA memory goes when the group's last rank in this process does. Routings of the comm stay valid objects
/// and are destroyed by a2a_routing_destroy.
///
/// comm: NULL is accepted and does nothing. Threads: any. Errors: INVALID_ARGUMENT (not a live comm).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_destroy(comm: *mut a2a_comm_t) -> a2a_status_t {
    guard("a2a_destroy", || {
        if comm.is_null() {
            return Ok(());
        }
        COMMS.remove(comm as usize)?.destroy();
        Ok(())
    })
}

// ------------------------------------------------------------------------------------------- routing

/// Makes a routing: private memory for where the rows of one dispatch went, bound to a slot. Local, not collective.
/// Any number may be bound to one slot (one per layer); one at a time is between dispatch SEND and combine RECV.
///
/// slot: 0 to num_slots - 1. routing: out, written on success only; free with a2a_routing_destroy. Threads: one call
/// at a time on a comm. Capture: refused. Errors: INVALID_ARGUMENT, BUSY, OUT_OF_MEMORY, or the comm's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_routing_create(
    comm: *mut a2a_comm_t,
    slot: i32,
    routing: *mut *mut a2a_routing_t,
) -> a2a_status_t {
    with_comm("a2a_routing_create", comm, |comm| {
        if routing.is_null() {
            return Err(Error::invalid("routing is NULL"));
        }
        let created = RoutingHandle::new(comm.routing_create(slot)?);
        // SAFETY: not NULL; the caller vouches for it.
        unsafe { *routing = ROUTINGS.insert(Arc::new(created)) as *mut a2a_routing_t };
        Ok(())
    })
}

/// Frees a routing and the shape arrays of its views. Before or after its comm.
///
/// routing: NULL is accepted and does nothing. Threads: any, not while a call uses it. Errors: INVALID_ARGUMENT
/// (not a live routing).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_routing_destroy(routing: *mut a2a_routing_t) -> a2a_status_t {
    guard("a2a_routing_destroy", || {
        if !routing.is_null() {
            ROUTINGS.remove(routing as usize)?;
        }
        Ok(())
    })
}

// ---------------------------------------------------------------------------------------------- data

/// Sends each token to the ranks that own its experts and receives what the others sent. Every rank takes part in
/// every step, with or without tokens, with the same bound and row shapes.
///
/// routing: of this comm; its slot must be idle, or hold a received dispatch that is thereby given up.
/// in, out: see the structs; read and written during the call; out may be NULL in SEND. Fields of `in` but phase
/// and flags are ignored in RECV. Views are valid from RECV until this rank's combine SEND, or next dispatch, on
/// the slot. stream: the CUDA stream of the work (NULL: the legacy default stream), on the comm's device; ignored on the
/// CPU, where the call returns with the work done. On CUDA it returns with the work on the stream (HOST_COUNTS waits for
/// it); what kernels find stands in out.status and in a2a_get_async_error, and later calls on the slot return it.
/// Threads: one call at a time on a comm. Capture: always allowed, but for HOST_COUNTS. Never allocates.
/// Errors: INVALID_ARGUMENT (nothing happened), UNSUPPORTED, BUSY, OVERFLOW (an output is too small; or rows exceed
/// max_recv_rows on some rank, on every rank alike, and the slot takes another dispatch: on CUDA the call says so under
/// HOST_COUNTS alone, out.status always does); TIMEOUT, PEER_LOST, MISMATCH (the step is void on every rank that has not
/// completed it, and the slot closed: later calls on it return the same); ABORTED, INTERNAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_dispatch(
    comm: *mut a2a_comm_t,
    routing: *mut a2a_routing_t,
    r#in: *const a2a_dispatch_in_t,
    out: *mut a2a_dispatch_out_t,
    stream: *mut c_void,
) -> a2a_status_t {
    // SAFETY: the caller vouches for it.
    let stream = unsafe { Stream::new(stream) };
    with_comm("a2a_dispatch", comm, |comm| {
        let routing = ROUTINGS.get(routing as usize)?;
        // SAFETY: forwarded from the caller.
        unsafe { tensor::dispatch(comm, &routing, &read_struct(r#in)?, out, stream) }
    })
}

/// Brings the experts' output back and sums it, in float32, in a fixed order, rounding once. GATHERED, RANK_MAJOR,
/// FLAT: out[t] = sum over ranks r ascending of r's row for t, over the ranks that own one of t's experts (every
/// rank when GATHERED came without ids). EXPERT_*: out[t] = sum over k ascending of weight[t,k] * row.
///
/// routing: the one of the slot's last dispatch, received and not yet combined. in, out: see the structs; out may
/// be NULL in SEND; fields of `in` but phase and flags are ignored in RECV. stream, threads, capture, errors: as
/// for a2a_dispatch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_combine(
    comm: *mut a2a_comm_t,
    routing: *mut a2a_routing_t,
    r#in: *const a2a_combine_in_t,
    out: *mut a2a_combine_out_t,
    stream: *mut c_void,
) -> a2a_status_t {
    // SAFETY: the caller vouches for it.
    let stream = unsafe { Stream::new(stream) };
    with_comm("a2a_combine", comm, |comm| {
        let routing = ROUTINGS.get(routing as usize)?;
        // SAFETY: forwarded from the caller.
        unsafe { tensor::combine(comm, &routing, &read_struct(r#in)?, out, stream) }
    })
}

/// Says where the experts may write their output so that combine copies nothing: the slot's own buffer, shaped for
/// this routing's dispatch. May be called, and the buffer written, between dispatch RECV and combine SEND.
///
/// tensor: out, not NULL; `dtype` may be preset to bf16, f16 or f32 (bits 0 = the config's combine_dtype), everything
/// else is overwritten; shape and strides stay owned by the routing. Threads: one call at a time on a comm.
/// Errors: INVALID_ARGUMENT (no received dispatch, or the type does not fit), UNSUPPORTED (NVLINK_TWO_SIDED, which keeps
/// no rows), BUSY, or the slot's or comm's own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_combine_buffer(
    comm: *mut a2a_comm_t,
    routing: *mut a2a_routing_t,
    tensor: *mut a2a_tensor_t,
) -> a2a_status_t {
    with_comm("a2a_combine_buffer", comm, |comm| {
        let routing = ROUTINGS.get(routing as usize)?;
        // SAFETY: forwarded from the caller.
        unsafe { tensor::combine_buffer(comm, &routing, tensor) }
    })
}

// ------------------------------------------------------------------------------------------- observe

/// Reports the comm's first failure: a lost step, an abort, a defect. Clears nothing. If none of these, SYSTEM_ERROR if
/// peers' processes cannot be watched any more: steps go on, but a rank that dies is noticed at the deadline alone.
///
/// info: out, its struct_size set by the caller; info.status is A2A_SUCCESS if nothing failed. Threads: any, at any
/// time. Errors: INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_get_async_error(
    comm: *mut a2a_comm_t,
    info: *mut a2a_error_info_t,
) -> a2a_status_t {
    with_comm("a2a_get_async_error", comm, |comm| {
        // SAFETY: forwarded from the caller.
        unsafe { write_struct(info, &config::error_info(comm)) }
    })
}

/// Tells the comm's last 256 operations, the one in flight among them: where a rank that hangs is, and how it came
/// there. Waits for nothing that a call in flight holds.
///
/// buf: out, may be NULL with len 0; receives NUL-terminated JSON, cut off if it does not fit. needed: out, may be NULL;
/// the bytes the whole text needs now, NUL included: calls on other threads make it longer; 128 KiB are enough at any time.
/// {"rank", "num_ranks", "version" of the library, "age_us" since a2a_create, "gone_ranks": whose comm was destroyed or whose
/// process has ended, "dead_ranks": of these, whose process is known to have ended (never one of this process),
/// "operations": oldest first, "async_error": the first failure's sentence, as a2a_get_async_error has it, or null}. Of an
/// operation
///   number     counts the comm's operations, from 1; one that changes while it is read is left out
///   begun_us   microseconds from a2a_create to the call
///   took_us    microseconds in the call, so far if it is in flight
///   operation  "dispatch" or "combine"
///   half       "SEND", "RECV" or "BOTH"
///   slot, routing   the routing by a number: the comm's first is 1
///   sequence   steps opened on the slot, this one included once it has begun; null if the host cannot know
///   tokens     T of the dispatch
///   outcome    "in flight", "enqueued", or the name of the status that the call returned
/// On CUDA a call enqueues, unless it waits for HOST_COUNTS: "enqueued" says that the work is on the stream or in a graph,
/// and what becomes of it stands in out.status and in async_error. Replays of a captured graph are no calls and are not
/// told; once work on a slot was captured its sequence is null. Calls that were refused before they began (BUSY, a comm
/// that has failed, a struct that makes no sense) are not told either.
///
/// Threads: any, at any time, also while another thread is inside a call, and after a failure or an abort. Errors:
/// INVALID_ARGUMENT; OVERFLOW if buf is given and too small (buf then holds the beginning).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_get_history(
    comm: *mut a2a_comm_t,
    buf: *mut c_char,
    len: usize,
    needed: *mut usize,
) -> a2a_status_t {
    with_comm("a2a_get_history", comm, |comm| {
        // SAFETY: forwarded from the caller.
        unsafe { write_text(&comm.history(), buf, len, needed) }
    })
}

/// Reports what the comm has moved since a2a_create.
///
/// stats: out, its struct_size set by the caller. Threads: any, at any time. Errors: INVALID_ARGUMENT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_get_stats(comm: *mut a2a_comm_t, stats: *mut a2a_stats_t) -> a2a_status_t {
    with_comm("a2a_get_stats", comm, |comm| {
        // SAFETY: forwarded from the caller.
        unsafe { write_struct(stats, &config::stats(comm)) }
    })
}

/// Sends the library's log lines to a callback, for the whole process, which calls nothing of the library. Without one, the environment variable A2A_LOG
/// (error, warn, info, debug) sends them to standard error.
///
/// callback: NULL restores the default. user: passed to it. Both must stay valid until replaced and until calls in
/// flight have returned. Threads: any. Errors: none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_set_log_callback(callback: a2a_log_fn, user: *mut c_void) -> a2a_status_t {
    guard("a2a_set_log_callback", || {
        struct User(*mut c_void);
        // SAFETY: the ABI says that the callback is called on any thread with this pointer.
        unsafe impl Send for User {}
        // SAFETY: as above.
        unsafe impl Sync for User {}
        log::set_sink(callback.map(|callback| {
            let user = User(user);
            Arc::new(move |level: log::Level, line: &str| {
                let user = &user;
                let line = std::ffi::CString::new(line.replace(['\0', '\n'], " ")).unwrap_or_default();
                // SAFETY: the caller keeps the callback and its pointer valid.
                unsafe { callback(level as i32, line.as_ptr(), user.0) }
            }) as log::Sink
        }));
        Ok(())
    })
}

// ---------------------------------------------------------------------------------------------- text

/// The sentence that explains the last failure on this thread: function, rank, argument, value, limit. Empty if
/// nothing has failed. Owned by the library, valid until this thread's next call.
#[unsafe(no_mangle)]
pub extern "C" fn a2a_last_error() -> *const c_char {
    last_error()
}

/// The name of a status, "A2A_TIMEOUT" for instance; "unknown status" for any other number. Static.
#[unsafe(no_mangle)]
pub extern "C" fn a2a_status_name(status: a2a_status_t) -> *const c_char {
    Status::from_code(status).map_or(c"unknown status", Status::name).as_ptr()
}

/// The library's version, "0.1.0" for instance. Static. The header's is A2A_VERSION.
#[unsafe(no_mangle)]
pub extern "C" fn a2a_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("the version holds a NUL"),
        };
    VERSION.as_ptr()
}

/// The backend of a name: "auto", the constants' own names in lower case ("nvlink_one_sided"), or vLLM's names
/// ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency", "flashinfer_nvlink_one_sided",
/// "flashinfer_nvlink_two_sided", "flashinfer_all2allv", "nixl_ep"). A2A_BACKEND_UNKNOWN for any other, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn a2a_backend_from_name(name: *const c_char) -> a2a_backend_t {
    // SAFETY: the ABI asks for a NUL-terminated string.
    let Ok(name) = (unsafe { text("name", name) }) else { return A2A_BACKEND_UNKNOWN };
    BackendKind::from_name(name).map_or(A2A_BACKEND_UNKNOWN, |kind| kind as a2a_backend_t)
}

/// A caller's list of int32.
///
/// # Safety
/// `ptr` is NULL or has `count` int32.
unsafe fn int_list(argument: &str, ptr: *const i32, count: i32) -> Result<Vec<i32>> {
    if !(0..=A2A_MAX_RANKS).contains(&count) {
        return Err(Error::invalid(format!("count is {count}, it must be from 0 to {A2A_MAX_RANKS}")));
    }
    if ptr.is_null() {
        return if count == 0 { Ok(Vec::new()) } else { Err(Error::invalid(format!("{argument} is NULL"))) };
    }
    // SAFETY: not NULL; count int32 by the contract, aligned or not.
    Ok((0..count as usize).map(|i| unsafe { ptr.add(i).read_unaligned() }).collect())
}

/// A caller's string.
///
/// # Safety
/// `ptr` is NULL or NUL-terminated and stays valid during the call.
unsafe fn text<'a>(argument: &str, ptr: *const c_char) -> Result<&'a str> {
    if ptr.is_null() {
        return Err(Error::invalid(format!("{argument} is NULL")));
    }
    // SAFETY: not NULL; NUL-terminated by the contract.
    unsafe { CStr::from_ptr(ptr) }.to_str().map_err(|_| Error::invalid(format!("{argument} is not UTF-8")))
}

/// Gives a caller a text that it cannot know the length of.
///
/// # Safety
/// `buf` is NULL or has `len` bytes, `needed` is NULL or writable.
unsafe fn write_text(text: &str, buf: *mut c_char, len: usize, needed: *mut usize) -> Result<()> {
    if !needed.is_null() {
        // SAFETY: not NULL; the caller vouches for it.
        unsafe { *needed = text.len() + 1 };
    }
    if buf.is_null() {
        return if len == 0 { Ok(()) } else { Err(Error::invalid(format!("buf is NULL and len is {len}"))) };
    }
    if len == 0 {
        return Err(Error::new(Status::Overflow, "len is 0"));
    }
    let cut = text.floor_char_boundary(len - 1);
    // SAFETY: cut < len bytes are the caller's.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), buf as *mut u8, cut);
        *buf.add(cut) = 0;
    }
    if cut < text.len() {
        let text = format!("len is {len}, the text needs {}", text.len() + 1);
        return Err(Error::new(Status::Overflow, text));
    }
    Ok(())
}

fn write_id(id: *mut a2a_unique_id_t, unique: UniqueId) -> Result<()> {
    if id.is_null() {
        return Err(Error::invalid("id is NULL"));
    }
    // SAFETY: not NULL; the caller vouches for it. Bytes need no alignment.
    unsafe { *id = a2a_unique_id_t { bytes: unique.to_bytes() } };
    Ok(())
}

const _: () = {
    assert!(A2A_INVALID_ARGUMENT == Status::InvalidArgument as i32);
    assert!(A2A_UNSUPPORTED == Status::Unsupported as i32);
    assert!(A2A_BUSY == Status::Busy as i32);
    assert!(A2A_OUT_OF_MEMORY == Status::OutOfMemory as i32);
    assert!(A2A_OVERFLOW == Status::Overflow as i32);
    assert!(A2A_SYSTEM_ERROR == Status::System as i32);
    assert!(A2A_TIMEOUT == Status::Timeout as i32);
    assert!(A2A_PEER_LOST == Status::PeerLost as i32);
    assert!(A2A_MISMATCH == Status::Mismatch as i32);
    assert!(A2A_CUDA_ERROR == Status::Cuda as i32);
    assert!(A2A_NCCL_ERROR == Status::Nccl as i32);
    assert!(A2A_NIXL_ERROR == Status::Nixl as i32);
    assert!(A2A_ABORTED == Status::Aborted as i32);
    assert!(A2A_INTERNAL == Status::Internal as i32);
};
