//! NIXL's courier: an agent with UCX, in CPU memory.
//!
//! A channel keeps its request: what is posted again with the same pieces costs no new one. A note that goes with pieces is sent by
//! NIXL from inside the question how the transfer goes, so `poll` asks of every one until it has ended. Errors of the network have no
//! names of their own in NIXL's C interface.

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::Arc;

use nixl_sys::{
    AgentConfig, Backend, DRAM, ERROR_INVALID_PARAM, IN_PROG, Nixl, NotifMap, OptArgs, SUCCESS, WRITE,
    XferList, XferReq, nixl_capi_status_t, status_name,
};

use super::{Courier, Delivery, Peer, Piece, busy, stranger};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};

/// The process's NIXL, or what to install.
pub fn probe() -> Result<&'static Nixl> {
    Nixl::get().map_err(|why| Error::unsupported(why.to_string()))
}

fn check(what: &str, status: nixl_capi_status_t) -> Result<()> {
    match status {
        SUCCESS => Ok(()),
        _ => {
            Err(Error::new(Status::Nixl, format!("{what}: NIXL returned {} ({status})", status_name(status))))
        }
    }
}

/// One rank's agent.
pub struct Agent {
    nixl: &'static Nixl,
    name: CString,
    agent: *mut nixl_sys::Agent,
    backend: *mut Backend,
    /// For what has no note, and for what has.
    plain: *mut OptArgs,
    noted: *mut OptArgs,
    map: *mut NotifMap,
    keep: Vec<Arc<dyn Any + Send + Sync>>,
    peers: Vec<Known>,
    /// Something is under way to a peer that was forgotten.
    is_abandoned: bool,
}

// SAFETY: NIXL takes an agent and what belongs to it from any thread, one at a time: whoever has it has it alone.
unsafe impl Send for Agent {}

struct Known {
    name: CString,
    is_forgotten: bool,
    channels: Vec<Channel>,
}

struct Channel {
    /// NULL before the first.
    request: *mut XferReq,
    pieces: Vec<Piece>,
    delivery: Delivery,
}

impl Agent {
    /// `name`: nobody else's, of all that meet. `settings`: of UCX, by its names without the UCX_.
    pub fn new(name: &str, settings: &str) -> Result<Agent> {
        let nixl = probe()?;
        let text = |text: &str| CString::new(text).map_err(|_| Error::invalid("a name with a zero byte"));
        let (name, settings) = (text(name)?, text(settings)?);
        let mut agent = null_mut();
        let config = AgentConfig { thread_sync: nixl_sys::SYNC_NONE, ..AgentConfig::default() };
        // SAFETY: valid pointers.
        let made = unsafe { (nixl.nixl_capi_create_configured_agent)(name.as_ptr(), &config, &mut agent) };
        check("an agent", made)?;
        let mut this = Agent {
            nixl,
            name,
            agent,
            backend: null_mut(),
            plain: null_mut(),
            noted: null_mut(),
            map: null_mut(),
            keep: Vec::new(),
            peers: Vec::new(),
            is_abandoned: false,
        };
        this.open(&settings)?;
        Ok(this)
    }

    fn open(&mut self, settings: &CStr) -> Result<()> {
        let (nixl, mut params) = (self.nixl, null_mut());
        // SAFETY: valid pointers; the parameters are freed on every path.
        unsafe {
            check("settings", (nixl.nixl_capi_create_params)(&mut params))?;
            let set = (nixl.nixl_capi_params_add)(params, c"engine_config".as_ptr(), settings.as_ptr());
            let made = check("settings", set).and_then(|()| {
                let made =
                    (nixl.nixl_capi_create_backend)(self.agent, c"UCX".as_ptr(), params, &mut self.backend);
                check("the UCX backend", made)
            });
            (nixl.nixl_capi_destroy_params)(params);
            made?;
            for args in [&mut self.plain, &mut self.noted] {
                check("arguments", (nixl.nixl_capi_create_opt_args)(args))?;
                check("arguments", (nixl.nixl_capi_opt_args_add_backend)(*args, self.backend))?;
            }
            check("a note", (nixl.nixl_capi_opt_args_set_has_notif)(self.noted, true))?;
            check("a list of notes", (nixl.nixl_capi_create_notif_map)(&mut self.map))
        }
    }

    fn list(&self, pieces: impl Iterator<Item = (u64, u64)>) -> Result<List> {
        let mut list = List { nixl: self.nixl, raw: null_mut() };
        // SAFETY: a valid out-pointer, then the list.
        unsafe {
            check("a list", (self.nixl.nixl_capi_create_xfer_dlist)(DRAM, &mut list.raw))?;
            for (at, bytes) in pieces {
                let add = self.nixl.nixl_capi_xfer_dlist_add_desc;
                check("a list", add(list.raw, at as usize, bytes as usize, 0))?;
            }
        }
        Ok(list)
    }

    fn request(&self, peer: usize, pieces: &[Piece]) -> Result<*mut XferReq> {
        let local = self.list(pieces.iter().map(|piece| (piece.from, piece.bytes)))?;
        let remote = self.list(pieces.iter().map(|piece| (piece.to, piece.bytes)))?;
        let (name, mut request) = (self.peers[peer].name.as_ptr(), null_mut());
        // SAFETY: lists of this agent's and of the peer's memory; the request keeps neither.
        let made = unsafe {
            let create = self.nixl.nixl_capi_create_xfer_req;
            create(self.agent, WRITE, local.raw, remote.raw, name, &mut request, self.plain)
        };
        check("a transfer", made)?;
        Ok(request)
    }

    /// Of one that is not under way.
    fn release(&self, request: *mut XferReq) {
        if request.is_null() {
            return;
        }
        // SAFETY: a request of this agent's, which nobody uses afterwards.
        let released = unsafe { (self.nixl.nixl_capi_release_xfer_req)(self.agent, request) };
        if let Err(error) = check("the end of a transfer", released) {
            log(Level::Debug, || format!("{:?}: {error}", self.name));
            return;
        }
        // SAFETY: released.
        unsafe { (self.nixl.nixl_capi_destroy_xfer_req)(request) };
    }

    fn known(&self, peer: Peer) -> Result<&Known> {
        Some(&self.peers[peer.0]).filter(|known| !known.is_forgotten).ok_or_else(|| stranger(peer))
    }

    /// Asks how everything goes that is under way.
    fn drive(&mut self) {
        let (nixl, agent) = (self.nixl, self.agent);
        for channel in self.peers.iter_mut().flat_map(|known| &mut known.channels) {
            if channel.delivery.is_under_way() {
                // SAFETY: a request of this agent's that was posted.
                let status = unsafe { (nixl.nixl_capi_get_xfer_status)(agent, channel.request) };
                channel.delivery = outcome(status);
            }
        }
    }
}

fn outcome(status: nixl_capi_status_t) -> Delivery {
    match status {
        IN_PROG => Delivery::UnderWay,
        status => check("a transfer", status).map_or_else(Delivery::Failed, |()| Delivery::Done),
    }
}

/// Freed on drop.
struct List {
    nixl: &'static Nixl,
    raw: *mut XferList,
}

impl Drop for List {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: made by `list`, freed once.
            unsafe { (self.nixl.nixl_capi_destroy_xfer_dlist)(self.raw) };
        }
    }
}

impl Courier for Agent {
    unsafe fn register(&mut self, at: u64, bytes: u64, keep: Arc<dyn Any + Send + Sync>) -> Result<()> {
        let (nixl, mut list) = (self.nixl, null_mut());
        // SAFETY: valid pointers; the memory is the caller's word.
        let registered = unsafe {
            check("memory", (nixl.nixl_capi_create_reg_dlist)(DRAM, &mut list))?;
            let add = nixl.nixl_capi_reg_dlist_add_desc;
            let added = check("memory", add(list, at as usize, bytes as usize, 0, null(), 0));
            let registered = added.and_then(|()| {
                let registered = (nixl.nixl_capi_register_mem)(self.agent, list, self.plain);
                check("the registration of memory", registered)
            });
            (nixl.nixl_capi_destroy_reg_dlist)(list);
            registered
        };
        self.keep.push(keep);
        registered
    }

    fn card(&mut self) -> Result<Vec<u8>> {
        let (mut data, mut bytes) = (null_mut(), 0);
        // SAFETY: valid out-pointers; what is handed out is copied, and freed as NIXL says.
        unsafe {
            check("a card", (self.nixl.nixl_capi_get_local_md)(self.agent, &mut data, &mut bytes))?;
            let card = std::slice::from_raw_parts(data.cast::<u8>(), bytes).to_vec();
            free(data);
            // The name goes before: NIXL's own card says it to NIXL alone.
            let name = self.name.as_bytes_with_nul();
            Ok([name, &card].concat())
        }
    }

    fn meet(&mut self, card: &[u8]) -> Result<Peer> {
        let no_card = || Error::invalid("what a peer sent is no card");
        let name = CStr::from_bytes_until_nul(card).map_err(|_| no_card())?;
        let card = &card[name.to_bytes_with_nul().len()..];
        if card.is_empty() {
            return Err(no_card());
        }
        // NIXL would take a card twice.
        let is_known = |known: &Known| !known.is_forgotten && known.name.as_c_str() == name;
        if name == self.name.as_c_str() || self.peers.iter().any(is_known) {
            return Err(Error::invalid(format!("{} has been met already", name.to_string_lossy())));
        }
        let mut loaded: *mut c_char = null_mut();
        // SAFETY: bytes of this length, and a valid out-pointer.
        let status = unsafe {
            let load = self.nixl.nixl_capi_load_remote_md;
            load(self.agent, card.as_ptr().cast::<c_void>(), card.len(), &mut loaded)
        };
        if status == ERROR_INVALID_PARAM {
            return Err(no_card());
        }
        check(&format!("the way to {}", name.to_string_lossy()), status)?;
        // SAFETY: a name that NIXL hands out, copied and freed.
        let theirs = unsafe {
            let theirs = CStr::from_ptr(loaded).to_owned();
            free(loaded.cast());
            theirs
        };
        if theirs.as_c_str() != name {
            // SAFETY: a name.
            unsafe { (self.nixl.nixl_capi_invalidate_remote_md)(self.agent, theirs.as_ptr()) };
            return Err(no_card());
        }
        self.peers.push(Known { name: theirs, is_forgotten: false, channels: Vec::new() });
        Ok(Peer(self.peers.len() - 1))
    }

    fn forget(&mut self, peer: Peer) {
        let known = &mut self.peers[peer.0];
        if std::mem::replace(&mut known.is_forgotten, true) {
            return;
        }
        let name = known.name.clone();
        // What is under way is left to itself: nothing of NIXL's ends it.
        for channel in std::mem::take(&mut known.channels) {
            match channel.delivery {
                Delivery::UnderWay => self.is_abandoned = true,
                _ => self.release(channel.request),
            }
        }
        // SAFETY: a name. NIXL may have forgotten a peer that has died by itself.
        let forgotten = unsafe { (self.nixl.nixl_capi_invalidate_remote_md)(self.agent, name.as_ptr()) };
        if let Err(error) = check("the end of a way", forgotten) {
            log(Level::Debug, || format!("{:?}, {name:?}: {error}", self.name));
        }
    }

    unsafe fn post(&mut self, peer: Peer, channel: usize, pieces: &[Piece], note: &[u8]) -> Result<()> {
        self.known(peer)?;
        let (data, bytes) = (note.as_ptr().cast::<c_void>(), note.len());
        if pieces.is_empty() {
            // SAFETY: a note of this length, and the name of a peer.
            let status = unsafe {
                let name = self.peers[peer.0].name.as_ptr();
                (self.nixl.nixl_capi_gen_notif)(self.agent, name, data, bytes, self.plain)
            };
            return check("a note", status);
        }
        let channels = &mut self.peers[peer.0].channels;
        while channels.len() <= channel {
            channels.push(Channel { request: null_mut(), pieces: Vec::new(), delivery: Delivery::Done });
        }
        let this = &channels[channel];
        if !matches!(this.delivery, Delivery::Done) {
            return Err(busy(peer, channel));
        }
        let (former, is_same) = (this.request, this.pieces == pieces && !this.request.is_null());
        if !is_same {
            let request = self.request(peer.0, pieces)?;
            self.release(former);
            let this = &mut self.peers[peer.0].channels[channel];
            this.request = request;
            this.pieces.clear();
            this.pieces.extend_from_slice(pieces);
        }
        let this = &mut self.peers[peer.0].channels[channel];
        // SAFETY: a note of this length, which is copied; a request that is not under way.
        let status = unsafe {
            check("a note", (self.nixl.nixl_capi_opt_args_set_notif_msg)(self.noted, data, bytes))?;
            (self.nixl.nixl_capi_post_xfer_req)(self.agent, this.request, self.noted)
        };
        this.delivery = outcome(status);
        Ok(())
    }

    fn poll(&mut self, heard: &mut dyn FnMut(Peer, &[u8])) -> Result<()> {
        self.drive();
        let (nixl, map, mut senders) = (self.nixl, self.map, 0);
        // SAFETY: valid out-pointers; what the map lends is read before it is cleared.
        unsafe {
            check("notes", (nixl.nixl_capi_get_notifs)(self.agent, map, self.plain))?;
            check("notes", (nixl.nixl_capi_notif_map_size)(map, &mut senders))?;
            if senders == 0 {
                return Ok(());
            }
            for sender in 0..senders {
                let (mut name, mut count) = (null(), 0);
                check("notes", (nixl.nixl_capi_notif_map_get_agent_at)(map, sender, &mut name))?;
                check("notes", (nixl.nixl_capi_notif_map_get_notifs_size)(map, name, &mut count))?;
                let sent_by = CStr::from_ptr(name);
                let is_theirs = |known: &Known| !known.is_forgotten && known.name.as_c_str() == sent_by;
                let Some(peer) = self.peers.iter().position(is_theirs) else { continue };
                for index in 0..count {
                    let (mut data, mut bytes) = (null(), 0);
                    let get = nixl.nixl_capi_notif_map_get_notif;
                    check("notes", get(map, name, index, &mut data, &mut bytes))?;
                    let note = match bytes {
                        0 => &[][..],
                        bytes => std::slice::from_raw_parts(data.cast::<u8>(), bytes),
                    };
                    heard(Peer(peer), note);
                }
            }
            check("notes", (nixl.nixl_capi_notif_map_clear)(map))
        }
    }

    fn delivery(&self, peer: Peer, channel: usize) -> Delivery {
        let channel = self.peers[peer.0].channels.get(channel);
        channel.map_or(Delivery::Done, |channel| channel.delivery.clone())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let all = self.peers.iter().flat_map(|known| &known.channels);
        if self.is_abandoned || all.clone().any(|channel| channel.delivery.is_under_way()) {
            // NIXL may still read what it carries: nothing of it ends.
            log(Level::Debug, || format!("{:?} is left behind with something under way", self.name));
            self.keep.drain(..).for_each(std::mem::forget);
            return;
        }
        all.for_each(|channel| self.release(channel.request));
        let nixl = self.nixl;
        // SAFETY: made by `new`, as far as it came, and ended once; the agent last.
        unsafe {
            if !self.map.is_null() {
                (nixl.nixl_capi_destroy_notif_map)(self.map);
            }
            for args in [self.plain, self.noted] {
                if !args.is_null() {
                    (nixl.nixl_capi_destroy_opt_args)(args);
                }
            }
            if !self.backend.is_null() {
                (nixl.nixl_capi_destroy_backend)(self.backend);
            }
            (nixl.nixl_capi_destroy_agent)(self.agent);
        }
    }
}

unsafe extern "C" {
    /// What NIXL hands out by malloc.
    fn free(memory: *mut c_void);
}
