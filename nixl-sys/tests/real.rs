//! A real NIXL, which `A2A_NIXL_LIB` names: bytes and words from one agent to another over TCP on the loopback. `make test-rust`
//! installs one.

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use nixl_sys::*;

const WAIT: Duration = Duration::from_secs(30);
const BYTES: usize = 7168;

fn ok(what: &str, status: nixl_capi_status_t) {
    assert!(status == SUCCESS, "{what}: {} ({status})", status_name(status));
}

/// An agent with registered memory. It is left behind at the end, as the process is.
struct End {
    nixl: &'static Nixl,
    agent: *mut Agent,
    args: *mut OptArgs,
    name: CString,
    memory: Vec<u8>,
}

impl End {
    fn new(nixl: &'static Nixl, name: &str) -> End {
        let (mut agent, mut params, mut backend, mut args) = (null_mut(), null_mut(), null_mut(), null_mut());
        let (name, memory) = (CString::new(name).unwrap(), vec![0; BYTES]);
        // SAFETY: valid pointers; what is made is freed or left behind.
        unsafe {
            let config = AgentConfig::default();
            ok("agent", (nixl.nixl_capi_create_configured_agent)(name.as_ptr(), &config, &mut agent));
            ok("params", (nixl.nixl_capi_create_params)(&mut params));
            let settings = c"TLS=tcp,NET_DEVICES=lo,TCP_USER_TIMEOUT=3s";
            ok("add", (nixl.nixl_capi_params_add)(params, c"engine_config".as_ptr(), settings.as_ptr()));
            ok("backend", (nixl.nixl_capi_create_backend)(agent, c"UCX".as_ptr(), params, &mut backend));
            ok("params", (nixl.nixl_capi_destroy_params)(params));
            ok("args", (nixl.nixl_capi_create_opt_args)(&mut args));
            ok("add", (nixl.nixl_capi_opt_args_add_backend)(args, backend));
            let mut list = null_mut();
            ok("list", (nixl.nixl_capi_create_reg_dlist)(DRAM, &mut list));
            let at = memory.as_ptr() as usize;
            ok("add", (nixl.nixl_capi_reg_dlist_add_desc)(list, at, BYTES, 0, null(), 0));
            ok("register", (nixl.nixl_capi_register_mem)(agent, list, args));
            ok("list", (nixl.nixl_capi_destroy_reg_dlist)(list));
        }
        End { nixl, agent, args, name, memory }
    }

    /// What a peer must load.
    fn card(&self) -> Vec<u8> {
        let (mut data, mut bytes) = (null_mut(), 0);
        // SAFETY: valid out-pointers; what is handed out is copied and freed.
        unsafe {
            ok("card", (self.nixl.nixl_capi_get_local_md)(self.agent, &mut data, &mut bytes));
            let card = std::slice::from_raw_parts(data.cast::<u8>(), bytes).to_vec();
            libc::free(data);
            card
        }
    }

    fn load(&self, card: &[u8]) -> String {
        let mut name: *mut c_char = null_mut();
        // SAFETY: as above.
        unsafe {
            let (data, bytes) = (card.as_ptr().cast(), card.len());
            ok("load", (self.nixl.nixl_capi_load_remote_md)(self.agent, data, bytes, &mut name));
            let loaded = CStr::from_ptr(name).to_str().unwrap().to_owned();
            libc::free(name.cast());
            loaded
        }
    }

    fn list(&self, at: usize) -> *mut XferList {
        let mut list = null_mut();
        // SAFETY: a valid out-pointer; the list that it says.
        unsafe {
            ok("list", (self.nixl.nixl_capi_create_xfer_dlist)(DRAM, &mut list));
            ok("add", (self.nixl.nixl_capi_xfer_dlist_add_desc)(list, at, BYTES, 0));
        }
        list
    }

    /// All of this end's memory to all of the other's, and a word behind it.
    fn request(&self, to: &End, word: &[u8]) -> *mut XferReq {
        let nixl = self.nixl;
        let (local, remote) =
            (self.list(self.memory.as_ptr() as usize), self.list(to.memory.as_ptr() as usize));
        let mut request = null_mut();
        // SAFETY: handles of this agent's; what is said is copied.
        unsafe {
            let (data, bytes) = (word.as_ptr().cast::<c_void>(), word.len());
            ok("word", (nixl.nixl_capi_opt_args_set_notif_msg)(self.args, data, bytes));
            ok("word", (nixl.nixl_capi_opt_args_set_has_notif)(self.args, true));
            let (name, args) = (to.name.as_ptr(), self.args);
            let made =
                (nixl.nixl_capi_create_xfer_req)(self.agent, WRITE, local, remote, name, &mut request, args);
            ok("request", made);
            ok("list", (nixl.nixl_capi_destroy_xfer_dlist)(local));
            ok("list", (nixl.nixl_capi_destroy_xfer_dlist)(remote));
        }
        request
    }

    /// What has been said here: who, and what.
    fn heard(&self) -> Vec<(String, Vec<u8>)> {
        let nixl = self.nixl;
        let (mut map, mut senders, mut all) = (null_mut(), 0, Vec::new());
        // SAFETY: valid out-pointers; what the map lends is copied before it is destroyed.
        unsafe {
            ok("map", (nixl.nixl_capi_create_notif_map)(&mut map));
            ok("words", (nixl.nixl_capi_get_notifs)(self.agent, map, null_mut()));
            ok("senders", (nixl.nixl_capi_notif_map_size)(map, &mut senders));
            for sender in 0..senders {
                let (mut name, mut count) = (null(), 0);
                ok("sender", (nixl.nixl_capi_notif_map_get_agent_at)(map, sender, &mut name));
                ok("count", (nixl.nixl_capi_notif_map_get_notifs_size)(map, name, &mut count));
                for index in 0..count {
                    let (mut data, mut bytes) = (null(), 0);
                    ok("word", (nixl.nixl_capi_notif_map_get_notif)(map, name, index, &mut data, &mut bytes));
                    let word = std::slice::from_raw_parts(data.cast::<u8>(), bytes).to_vec();
                    all.push((CStr::from_ptr(name).to_str().unwrap().into(), word));
                }
            }
            ok("map", (nixl.nixl_capi_destroy_notif_map)(map));
        }
        all
    }
}

/// A transfer that is posted again moves what then stands there, and its word is heard when the bytes are there.
#[test]
#[ignore = "needs a real NIXL, which A2A_NIXL_LIB names: make test-rust"]
fn bytes_and_words_reach_the_other_agent() {
    let nixl = Nixl::get().unwrap_or_else(|e| panic!("{e}"));
    // UCX calls no destructors of agents that are left behind; names are the process's own.
    let (mut from, to) = (End::new(nixl, "from"), End::new(nixl, "to"));
    assert_eq!(from.load(&to.card()), "to");
    let request = from.request(&to, b"a word \xff\0 of bytes");
    for round in 0..3u8 {
        from.memory.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i as u8).wrapping_mul(7) ^ round);
        let begun = Instant::now();
        // SAFETY: a request that is not under way.
        let mut status = unsafe { (nixl.nixl_capi_post_xfer_req)(from.agent, request, null_mut()) };
        let mut heard = Vec::new();
        // Both sides have to ask: a write over TCP is taken by who asks for words, and the word is sent by who asks how it goes.
        while status == IN_PROG || heard.is_empty() {
            assert!(begun.elapsed() < WAIT, "round {round}: status {status}, heard {heard:?}");
            if status == IN_PROG {
                // SAFETY: a request of this agent's.
                status = unsafe { (nixl.nixl_capi_get_xfer_status)(from.agent, request) };
            }
            from.heard();
            heard.extend(to.heard());
        }
        ok("transfer", status);
        assert_eq!(heard, [("from".to_owned(), b"a word \xff\0 of bytes".to_vec())]);
        assert!(from.memory == to.memory, "round {round}");
    }
    // SAFETY: not under way.
    unsafe {
        ok("release", (nixl.nixl_capi_release_xfer_req)(from.agent, request));
        ok("destroy", (nixl.nixl_capi_destroy_xfer_req)(request));
    }
}

/// Whoever is not there is found out when a request is made, not by a wait.
#[test]
#[ignore = "needs a real NIXL, which A2A_NIXL_LIB names: make test-rust"]
fn an_agent_that_nobody_knows_is_refused() {
    let nixl = Nixl::get().unwrap_or_else(|e| panic!("{e}"));
    let (from, to) = (End::new(nixl, "alone"), End::new(nixl, "unknown"));
    let (local, remote) = (from.list(from.memory.as_ptr() as usize), from.list(to.memory.as_ptr() as usize));
    let mut request = null_mut();
    // SAFETY: handles of this agent's, and the name of one that it has not loaded.
    let status = unsafe {
        let (name, args) = (to.name.as_ptr(), from.args);
        (nixl.nixl_capi_create_xfer_req)(from.agent, WRITE, local, remote, name, &mut request, args)
    };
    assert!(status < 0, "{}", status_name(status));
    // SAFETY: a name, and nothing by that name.
    let status = unsafe { (nixl.nixl_capi_invalidate_remote_md)(from.agent, to.name.as_ptr()) };
    assert!(status < 0, "{}", status_name(status));
}
