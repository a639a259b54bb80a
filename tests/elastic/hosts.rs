//! Hosts of their own, as network namespaces: each has a link to a switch, and nothing else reaches it. Needs root and iproute2.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use a2a::abi::calls::a2a_unique_id_from_address;
use a2a::abi::types::a2a_unique_id_t;

use super::common::{GroupId, check};

/// A host's end of its link.
const LINK: &str = "a2a0";
const PORT: u16 = 29_577;
/// Links come up within this.
const UP: Duration = Duration::from_secs(10);

/// So many hosts, gone on drop.
pub struct Hosts {
    name: String,
    count: usize,
}

fn ip(arguments: &str) -> Result<String, String> {
    let done = Command::new("ip").args(arguments.split(' ')).stdin(Stdio::null()).output();
    let done = done.map_err(|error| format!("ip: {error}"))?;
    match done.status.success() {
        true => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
        false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&done.stderr).trim())),
    }
}

/// Why there can be none here.
pub fn missing() -> Option<String> {
    Hosts::new(1).err().map(|why| format!("no network namespaces here: {why}"))
}

impl Hosts {
    pub fn new(count: usize) -> Result<Hosts, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("a2a-{}-{}", std::process::id(), NUMBER.fetch_add(1, Relaxed));
        let hosts = Hosts { name, count };
        let switch = hosts.switch();
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add br0 type bridge"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for host in 0..count {
            let name = hosts.of(host);
            ip(&format!("netns add {name}"))?;
            ip(&format!("link add {LINK} netns {name} type veth peer name port{host} netns {switch}"))?;
            ip(&format!("-n {switch} link set port{host} master br0 up"))?;
            ip(&format!("-n {name} addr add {}/24 dev {LINK}", address(host)))?;
            ip(&format!("-n {name} link set lo up"))?;
            ip(&format!("-n {name} link set {LINK} up"))?;
        }
        // UCX takes no device that is not up.
        let begun = Instant::now();
        for host in 0..count {
            while !ip(&format!("-n {} link show {LINK}", hosts.of(host)))?.contains("state UP") {
                if begun.elapsed() > UP {
                    return Err(format!("host {host} has no link after {UP:?}"));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(hosts)
    }

    pub fn count(&self) -> usize {
        self.count
    }
    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }
    fn of(&self, host: usize) -> String {
        format!("{}-{host}", self.name)
    }

    /// What a program is run with to be on a host, and its environment: TCP over the link alone.
    pub fn enter(&self, host: usize) -> (Vec<String>, [(&'static str, &'static str); 2]) {
        let prefix = ["ip", "netns", "exec", &self.of(host)].map(str::to_string).to_vec();
        (prefix, [("UCX_TLS", "tcp"), ("UCX_NET_DEVICES", LINK)])
    }
    /// A group that meets on the first host.
    pub fn group(&self) -> Result<GroupId, String> {
        let mut id = a2a_unique_id_t { bytes: [0; 128] };
        let address = format!("{}:{PORT}\0", address(0));
        let key = c"elastic";
        // SAFETY: a NUL-terminated string, a NUL-terminated one, a valid out-pointer.
        check(unsafe { a2a_unique_id_from_address(address.as_ptr().cast(), key.as_ptr(), &mut id) })?;
        Ok(GroupId(id))
    }
    /// Bytes that a host has put on its link.
    pub fn sent(&self, host: usize) -> Result<u64, String> {
        let text = ip(&format!("-n {} -s link show {LINK}", self.of(host)))?;
        let after = text
            .split("TX:")
            .nth(1)
            .and_then(|rest| rest.lines().nth(1)?.split_whitespace().next()?.parse().ok());
        after.ok_or_else(|| format!("no counters in {text}"))
    }
    /// The cable of a host, at the switch.
    pub fn plug(&self, host: usize, is_in: bool) -> Result<(), String> {
        let state = if is_in { "up" } else { "down" };
        ip(&format!("-n {} link set port{host} {state}", self.switch())).map(drop)
    }
}

fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

impl Drop for Hosts {
    fn drop(&mut self) {
        // Links go with their namespaces.
        (0..self.count).for_each(|host| drop(ip(&format!("netns del {}", self.of(host)))));
        let _ = ip(&format!("netns del {}", self.switch()));
    }
}
