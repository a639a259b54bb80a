//! The part of NIXL's C API that liba2a calls, as the wheel nixl-cu13 1.5.1 has it, found at run time.
//!
//! Nothing is linked: [`Nixl::get`] opens the library once a process, and says in a sentence why it cannot. Functions have the names
//! that NIXL's `wrapper.h` gives them; of its handles each kind is a type of its own here. The library has no version: what is
//! looked for is every function, and that it is no stub.
//!
//! An agent is one thread's at a time. Errors are few: what a network did arrives as [`ERROR_BACKEND`], whatever it was.
#![deny(missing_docs)]

mod load;

use std::ffi::{c_char, c_int, c_uint, c_void};

pub use load::LoadError;

/// What a call returned: a number, since another library may return one that nobody here knows.
#[allow(non_camel_case_types)]
pub type nixl_capi_status_t = c_int;
/// The call did what it was asked; a transfer has ended, at the other side too.
pub const SUCCESS: nixl_capi_status_t = 0;
/// A transfer goes on.
pub const IN_PROG: nixl_capi_status_t = 1;
/// An argument is not one.
pub const ERROR_INVALID_PARAM: nixl_capi_status_t = -1;
/// Whatever else went wrong, a peer's death among it.
pub const ERROR_BACKEND: nixl_capi_status_t = -2;
/// A request that has not ended, or has been released.
pub const ERROR_INVALID_STATE: nixl_capi_status_t = -3;
/// NIXL threw something.
pub const ERROR_EXCEPTION: nixl_capi_status_t = -4;
/// Nobody by that name, or nothing that reaches them.
pub const ERROR_NOT_FOUND: nixl_capi_status_t = -6;

/// The name of a status.
pub fn status_name(status: nixl_capi_status_t) -> &'static str {
    match status {
        SUCCESS => "success",
        IN_PROG => "in progress",
        ERROR_INVALID_PARAM => "invalid parameter",
        ERROR_BACKEND => "backend error",
        ERROR_INVALID_STATE => "invalid state",
        ERROR_EXCEPTION => "exception",
        ERROR_NOT_FOUND => "not found",
        _ => "unknown status",
    }
}

/// Where memory is.
pub type MemoryKind = c_int;
/// The CPU's.
pub const DRAM: MemoryKind = 0;
/// A GPU's, by its ordinal.
pub const VRAM: MemoryKind = 1;

/// What a transfer does.
pub type Operation = c_int;
/// From there to here.
pub const READ: Operation = 0;
/// From here to there.
pub const WRITE: Operation = 1;

/// Who calls an agent: one thread at a time, or any with locks around everything.
pub type ThreadSync = c_int;
/// Nothing is locked.
pub const SYNC_NONE: ThreadSync = 0;

/// How an agent is made.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AgentConfig {
    /// A thread of NIXL's drives transfers. Without it whoever asks for statuses and notifications does.
    pub enable_prog_thread: bool,
    /// A thread answers requests for metadata.
    pub enable_listen_thread: bool,
    /// Where.
    pub listen_port: c_int,
    /// `SYNC_NONE`, for one thread at a time.
    pub thread_sync: ThreadSync,
    /// Of a backend; 0: its own choice.
    pub num_workers: c_uint,
    /// Between two rounds of the first thread, in microseconds.
    pub pthr_delay_us: u64,
    /// Of the other.
    pub lthr_delay_us: u64,
    /// Times of transfers are kept.
    pub capture_telemetry: bool,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<AgentConfig>() == 40);
    assert!(offset_of!(AgentConfig, listen_port) == 4 && offset_of!(AgentConfig, num_workers) == 12);
    assert!(offset_of!(AgentConfig, pthr_delay_us) == 16 && offset_of!(AgentConfig, capture_telemetry) == 32);
};

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[repr(C)]
        pub struct $name {
            _opaque: [u8; 0],
        }
    )+};
}
handles! {
    /// A named endpoint of a process.
    Agent,
    /// Settings by name.
    Params,
    /// A way for an agent to move bytes.
    Backend,
    /// What a call takes beside its arguments.
    OptArgs,
    /// Memory to be registered.
    RegList,
    /// Pieces of registered memory.
    XferList,
    /// A transfer, which can be posted again when it has ended.
    XferReq,
    /// Notifications by the names of their senders.
    NotifMap,
}

late_library::functions! {
    Nixl;

    /// True of a library whose other functions end the process.
    fn nixl_capi_is_stub() -> bool;

    /// The name is its identity for all others.
    fn nixl_capi_create_configured_agent(
        name: *const c_char, config: *const AgentConfig, agent: *mut *mut Agent,
    ) -> nixl_capi_status_t;
    /// Last of all that the agent has.
    fn nixl_capi_destroy_agent(agent: *mut Agent) -> nixl_capi_status_t;
    /// What a peer must load to write here. `data` is to be freed by `free`.
    fn nixl_capi_get_local_md(agent: *mut Agent, data: *mut *mut c_void, bytes: *mut usize) -> nixl_capi_status_t;
    /// Connects to the peer. `name` is to be freed by `free`.
    fn nixl_capi_load_remote_md(
        agent: *mut Agent, data: *const c_void, bytes: usize, name: *mut *mut c_char,
    ) -> nixl_capi_status_t;
    /// Forgets the peer, which can still write here.
    fn nixl_capi_invalidate_remote_md(agent: *mut Agent, name: *const c_char) -> nixl_capi_status_t;

    /// Empty.
    fn nixl_capi_create_params(params: *mut *mut Params) -> nixl_capi_status_t;
    /// Copies both.
    fn nixl_capi_params_add(params: *mut Params, key: *const c_char, value: *const c_char) -> nixl_capi_status_t;
    /// Frees it.
    fn nixl_capi_destroy_params(params: *mut Params) -> nixl_capi_status_t;

    /// By a plugin's name. It lives as long as the agent.
    fn nixl_capi_create_backend(
        agent: *mut Agent, plugin: *const c_char, params: *mut Params, backend: *mut *mut Backend,
    ) -> nixl_capi_status_t;
    /// Frees the handle, not the backend.
    fn nixl_capi_destroy_backend(backend: *mut Backend) -> nixl_capi_status_t;

    /// Empty.
    fn nixl_capi_create_opt_args(args: *mut *mut OptArgs) -> nixl_capi_status_t;
    /// Frees it.
    fn nixl_capi_destroy_opt_args(args: *mut OptArgs) -> nixl_capi_status_t;
    /// What the call is for.
    fn nixl_capi_opt_args_add_backend(args: *mut OptArgs, backend: *mut Backend) -> nixl_capi_status_t;
    /// What the peer is told when a transfer has ended: copied.
    fn nixl_capi_opt_args_set_notif_msg(
        args: *mut OptArgs, data: *const c_void, bytes: usize,
    ) -> nixl_capi_status_t;
    /// If it is told.
    fn nixl_capi_opt_args_set_has_notif(args: *mut OptArgs, has: bool) -> nixl_capi_status_t;

    /// Empty.
    fn nixl_capi_create_reg_dlist(kind: MemoryKind, list: *mut *mut RegList) -> nixl_capi_status_t;
    /// Frees it.
    fn nixl_capi_destroy_reg_dlist(list: *mut RegList) -> nixl_capi_status_t;
    /// `device`: a GPU's ordinal, 0 for the CPU. `metadata` may be NULL.
    fn nixl_capi_reg_dlist_add_desc(
        list: *mut RegList, address: usize, bytes: usize, device: u64, metadata: *const c_void, metadata_bytes: usize,
    ) -> nixl_capi_status_t;
    /// From now on peers can write there that load what the agent says of itself afterwards. Nothing takes that back.
    fn nixl_capi_register_mem(agent: *mut Agent, list: *mut RegList, args: *mut OptArgs) -> nixl_capi_status_t;
    /// Does not keep those from writing that could.
    fn nixl_capi_deregister_mem(agent: *mut Agent, list: *mut RegList, args: *mut OptArgs) -> nixl_capi_status_t;

    /// Empty.
    fn nixl_capi_create_xfer_dlist(kind: MemoryKind, list: *mut *mut XferList) -> nixl_capi_status_t;
    /// Frees it.
    fn nixl_capi_destroy_xfer_dlist(list: *mut XferList) -> nixl_capi_status_t;
    /// A piece of registered memory, of this side or of the other.
    fn nixl_capi_xfer_dlist_add_desc(
        list: *mut XferList, address: usize, bytes: usize, device: u64,
    ) -> nixl_capi_status_t;
    /// Pieces of both lists in pairs of equal length.
    fn nixl_capi_create_xfer_req(
        agent: *mut Agent, operation: Operation, local: *mut XferList, remote: *mut XferList, name: *const c_char,
        request: *mut *mut XferReq, args: *mut OptArgs,
    ) -> nixl_capi_status_t;
    /// `SUCCESS` or `IN_PROG`; not to be called of one in progress. `args` may tell the peer something else than the request's.
    fn nixl_capi_post_xfer_req(
        agent: *mut Agent, request: *mut XferReq, args: *mut OptArgs,
    ) -> nixl_capi_status_t;
    /// Drives it, and sends its notification once it has ended: to be asked until it has.
    fn nixl_capi_get_xfer_status(agent: *mut Agent, request: *mut XferReq) -> nixl_capi_status_t;
    /// Gives the request up; bytes that are under way still arrive.
    fn nixl_capi_release_xfer_req(agent: *mut Agent, request: *mut XferReq) -> nixl_capi_status_t;
    /// Frees the handle of one that is released.
    fn nixl_capi_destroy_xfer_req(request: *mut XferReq) -> nixl_capi_status_t;

    /// Tells a peer something, without an order to what transfers tell it.
    fn nixl_capi_gen_notif(
        agent: *mut Agent, name: *const c_char, data: *const c_void, bytes: usize, args: *mut OptArgs,
    ) -> nixl_capi_status_t;
    /// Empty.
    fn nixl_capi_create_notif_map(map: *mut *mut NotifMap) -> nixl_capi_status_t;
    /// Frees it.
    fn nixl_capi_destroy_notif_map(map: *mut NotifMap) -> nixl_capi_status_t;
    /// Drives what is under way, and adds what peers have told the agent.
    fn nixl_capi_get_notifs(agent: *mut Agent, map: *mut NotifMap, args: *mut OptArgs) -> nixl_capi_status_t;
    /// Empties it.
    fn nixl_capi_notif_map_clear(map: *mut NotifMap) -> nixl_capi_status_t;
    /// Senders.
    fn nixl_capi_notif_map_size(map: *mut NotifMap, senders: *mut usize) -> nixl_capi_status_t;
    /// The name of one, which is the map's.
    fn nixl_capi_notif_map_get_agent_at(
        map: *mut NotifMap, index: usize, name: *mut *const c_char,
    ) -> nixl_capi_status_t;
    /// What it said, how often.
    fn nixl_capi_notif_map_get_notifs_size(
        map: *mut NotifMap, name: *const c_char, count: *mut usize,
    ) -> nixl_capi_status_t;
    /// And what: the map's.
    fn nixl_capi_notif_map_get_notif(
        map: *mut NotifMap, name: *const c_char, index: usize, data: *mut *const c_void, bytes: *mut usize,
    ) -> nixl_capi_status_t;
}
