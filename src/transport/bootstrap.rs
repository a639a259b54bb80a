//! Rendezvous: ranks meet at rank 0, prove the group's key, agree on version and config, and hand round the file
//! descriptors of their windows.
//!
//! ```text
//! peer -> root  connect                 (Unix abstract name, or TCP)
//! root -> peer  CHALLENGE nonce
//! peer -> root  JOIN      rank, config, nonce, HMAC over all of it and the root's nonce
//! root -> peer  WELCOME   HMAC over the peer's nonce, name of the descriptor socket     once all have joined
//! peer -> root  descriptors, over a second, Unix connection                              once its window is made
//! root -> peer  descriptors of all ranks, over the same
//! peer -> root  READY                                                                    once all are mapped
//! root -> peer  GO                                                                       once all are ready
//! ```
//! At any point FAIL, with a sentence, ends it: from a peer it ends the whole group, from the root it is the group's
//! end. A connection that proves no key, claims a taken rank or speaks another version is refused alone; ranks that
//! disagree on the config end the group, because it could never be complete. One deadline covers everything.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use sha2::Sha256;

use crate::config::{Address, Config, UniqueId, resolve};
use crate::error::{Error, Result, Status};
use crate::log::{Level, log};

/// Of the exchange below, not of the library: raised when its bytes change.
const PROTOCOL: u32 = 1;
const MAGIC: &[u8; 8] = b"a2a.join";
/// A message's body is never longer: JOIN has some 40 numbers, FAIL a sentence.
const MAX_BODY: usize = 8192;
/// Only the root knows which ranks are missing: the others give it this much longer to say so.
const ROOT_SPEAKS_FIRST: Duration = Duration::from_millis(500);
/// Descriptors a rank may hand round.
const MAX_FDS: usize = 4;

type Nonce = [u8; 16];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Challenge = 1,
    Join = 2,
    Welcome = 3,
    Ready = 4,
    Go = 5,
    Fail = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [Kind::Challenge, Kind::Join, Kind::Welcome, Kind::Ready, Kind::Go, Kind::Fail]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

pub fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::system("getrandom", e))?;
    }
    Ok(bytes)
}

pub fn new_unique_id() -> Result<UniqueId> {
    Ok(UniqueId { address: Address::Local(random()?), key: random()? })
}

/// An abstract Unix address: gone with its last socket, nothing on disk.
fn local_address(name: &[u8; 16]) -> Result<SocketAddr> {
    let hex: String = name.iter().map(|b| format!("{b:02x}")).collect();
    SocketAddr::from_abstract_name(format!("a2a-{hex}")).map_err(|e| Error::system("a Unix address", e))
}

fn mac(key: &[u8; 16], parts: &[&[u8]]) -> Result<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|e| Error::internal(e.to_string()))?;
    for part in parts {
        mac.update(part);
    }
    Ok(mac)
}

/// What this host is, as far as sharing memory goes: one kernel, one boot, one network namespace.
fn host_identity() -> Vec<u8> {
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let net = std::fs::read_link("/proc/self/ns/net").map(|p| p.into_os_string().into_encoded_bytes());
    [boot, net.unwrap_or_default()].concat()
}

/// What every JOIN carries and every rank must share.
fn identity(config: &Config) -> Vec<(String, u64)> {
    let mut fields = vec![
        ("the rendezvous protocol".to_string(), PROTOCOL as u64),
        ("the library's version".into(), version_number()),
        ("the host (boot and network namespace)".into(), fold(&host_identity())),
    ];
    fields.extend(config.agreed().into_iter().map(|(name, value)| (name.to_string(), value)));
    fields
}

fn version_number() -> u64 {
    env!("CARGO_PKG_VERSION").split('.').fold(0, |n, part| n * 1000 + part.parse::<u64>().unwrap_or(0))
}

fn fold(bytes: &[u8]) -> u64 {
    use sha2::Digest;
    let digest = Sha256::digest(bytes);
    digest.iter().take(8).fold(0, |n, b| n << 8 | *b as u64)
}

/// A stream of either family.
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn set_nonblocking(&self) -> std::io::Result<()> {
        match self {
            Stream::Unix(s) => s.set_nonblocking(true),
            Stream::Tcp(s) => s.set_nodelay(true).and_then(|()| s.set_nonblocking(true)),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Unix(s) => s.read(buf),
            Stream::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        match self {
            Stream::Unix(s) => s.write(buf),
            Stream::Tcp(s) => s.write(buf),
        }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(s) => s.as_fd(),
            Stream::Tcp(s) => s.as_fd(),
        }
    }
}

/// A message: kind and body.
struct Message {
    kind: Kind,
    body: Vec<u8>,
}

/// A connection that keeps what has arrived of a message, so that no peer can make another wait.
struct Link {
    stream: Stream,
    inbox: Vec<u8>,
}

/// Why a link gave no message.
enum Trouble {
    Closed,
    Garbage(String),
}

impl Link {
    fn new(stream: Stream) -> Result<Link> {
        stream.set_nonblocking().map_err(|e| Error::system("a socket's mode", e))?;
        Ok(Link { stream, inbox: Vec::new() })
    }

    /// Messages are small and sockets buffer far more: a send that would block means a peer that never reads.
    fn send(&mut self, kind: Kind, body: &[u8]) -> std::io::Result<()> {
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.push(kind as u8);
        frame.extend_from_slice(body);
        self.stream.write_all(&frame)
    }

    /// Takes what has arrived; a whole message if there is one.
    fn receive(&mut self) -> std::result::Result<Option<Message>, Trouble> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(message) = self.parse()? {
                return Ok(Some(message));
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Trouble::Closed),
                Ok(n) => self.inbox.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Trouble::Closed),
            }
        }
    }

    fn parse(&mut self) -> std::result::Result<Option<Message>, Trouble> {
        let Some(head) = self.inbox.first_chunk::<5>() else { return Ok(None) };
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(kind) = Kind::from_byte(head[4]).filter(|_| length <= MAX_BODY) else {
            return Err(Trouble::Garbage(format!("a message of kind {} with {length} bytes", head[4])));
        };
        if self.inbox.len() < 5 + length {
            return Ok(None);
        }
        let body = self.inbox[5..5 + length].to_vec();
        self.inbox.drain(..5 + length);
        Ok(Some(Message { kind, body }))
    }
}

/// Waits until one of the descriptors has something, for at most until the deadline.
fn wait_readable(fds: &[BorrowedFd<'_>], deadline: Instant) -> Result<bool> {
    let mut polled: Vec<PollFd> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A slice of the time at most: a signal or a lost wake-up costs 100 ms, not the deadline.
        let slice = left.min(Duration::from_millis(100));
        let timeout = Timespec { tv_sec: 0, tv_nsec: slice.as_nanos() as i64 };
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::system("poll", e)),
        }
    }
}

/// Sends a rank's descriptors in one message.
fn send_fds(socket: &UnixStream, rank: u32, fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(std::io::Error::other("too many descriptors"));
    }
    let body = rank.to_le_bytes();
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&body)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == body.len() { Ok(()) } else { Err(std::io::Error::other("a short message")) }
}

/// Receives one rank's descriptors, close-on-exec.
fn receive_fds(socket: &UnixStream) -> std::io::Result<Option<(u32, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut body = [0; 4];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut body)], &mut control, flags) {
        Ok(got) => got,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if got.bytes != body.len() {
        return Err(std::io::Error::other("the connection ended"));
    }
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    Ok(Some((u32::from_le_bytes(body), fds)))
}

/// Only the same user (or root) may hand us descriptors.
fn check_user(socket: &UnixStream) -> Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(socket).map_err(|e| Error::system("SO_PEERCRED", e))?;
    let me = rustix::process::geteuid();
    if peer.uid != me && !peer.uid.is_root() && !me.is_root() {
        return Err(Error::new(
            Status::System,
            format!("a process of user {} connected, this one is user {}", peer.uid.as_raw(), me.as_raw()),
        ));
    }
    Ok(())
}

/// JOIN's body, but for its MAC.
fn join_body(config: &Config, nonce: &Nonce) -> Vec<u8> {
    let mut body = MAGIC.to_vec();
    body.extend(config.rank.to_le_bytes());
    body.extend(config.num_ranks.to_le_bytes());
    body.extend(nonce);
    for (_, value) in identity(config) {
        body.extend(value.to_le_bytes());
    }
    body
}

/// The fields of a JOIN.
struct Join {
    rank: u32,
    num_ranks: u32,
    nonce: Nonce,
    fields: Vec<u64>,
}

const JOIN_HEAD: usize = 8 + 4 + 4 + 16;
const MAC_BYTES: usize = 32;

impl Join {
    fn parse(body: &[u8], key: &[u8; 16], challenge: &Nonce) -> std::result::Result<Join, &'static str> {
        if body.len() < JOIN_HEAD + MAC_BYTES || &body[..8] != MAGIC {
            return Err("it is no rank of liba2a");
        }
        let (signed, tag) = body.split_at(body.len() - MAC_BYTES);
        let proof = mac(key, &[b"join", challenge, signed]).map_err(|_| "no proof could be computed")?;
        proof.verify_slice(tag).map_err(|_| "it does not know the group's key")?;
        let u32_at = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&signed[16..32]);
        let fields = signed[JOIN_HEAD..]
            .chunks_exact(8)
            .map(|c| c.iter().rev().fold(0, |n, b| n << 8 | *b as u64))
            .collect();
        Ok(Join { rank: u32_at(8), num_ranks: u32_at(12), nonce, fields })
    }
}

/// Descriptors of every rank, rank ascending, this one's own included.
pub struct Gathered {
    pub fds: Vec<Vec<OwnedFd>>,
    /// To tell the others whether this rank could use them.
    finish: Finish,
}

enum Finish {
    Alone,
    Peer { link: Link, deadline: Instant },
    Root { root: Root },
}

/// Meets the other ranks. `own` makes this rank's descriptors once all have agreed.
pub fn gather(config: &Config, own: impl FnOnce() -> Result<Vec<OwnedFd>>) -> Result<Gathered> {
    if config.num_ranks == 1 {
        return Ok(Gathered { fds: vec![own()?], finish: Finish::Alone });
    }
    let Some(id) = &config.unique_id else {
        return Err(Error::invalid(format!(
            "rank {}: unique_id is not set and num_ranks is {}",
            config.rank, config.num_ranks
        )));
    };
    let deadline = Instant::now() + Duration::from_millis(config.setup_timeout_ms);
    if config.rank == 0 {
        gather_as_root(config, id, deadline, own)
    } else {
        gather_as_peer(config, id, deadline, own)
    }
}

impl Gathered {
    /// Ends the rendezvous: returns when every rank could use what it got, or with the reason why one could not.
    pub fn finish(mut self, config: &Config, outcome: Result<()>) -> Result<()> {
        match &mut self.finish {
            Finish::Alone => outcome,
            Finish::Peer { link, deadline } => {
                tell_outcome(link, config, &outcome);
                outcome?;
                expect(link, Kind::Go, config, *deadline).map(|_| ())
            }
            Finish::Root { root } => {
                if let Err(error) = outcome {
                    root.fail_all(&error);
                    return Err(error);
                }
                root.collect(Kind::Ready)?;
                root.send_all(Kind::Go, |_| Vec::new())
            }
        }
    }
}

fn tell_outcome(link: &mut Link, config: &Config, outcome: &Result<()>) {
    // A root that is gone shows when GO does not come.
    let _ = match outcome {
        Ok(()) => link.send(Kind::Ready, &[]),
        Err(error) => link.send(Kind::Fail, &fail_body(error, config.rank)),
    };
}

fn fail_body(error: &Error, rank: u32) -> Vec<u8> {
    let mut body = (error.status as i32).to_le_bytes().to_vec();
    body.extend(rank.to_le_bytes());
    let mut text = error.message.as_str();
    while text.len() > MAX_BODY - 16 {
        text = &text[..text.floor_char_boundary(MAX_BODY - 16)];
    }
    body.extend(text.as_bytes());
    body
}

/// The error a FAIL carries. The others' lack of memory is this rank's lost peer.
fn parse_fail(body: &[u8], me: u32) -> Error {
    let status = body.first_chunk::<4>().and_then(|b| Status::from_code(i32::from_le_bytes(*b)));
    let text = String::from_utf8_lossy(body.get(8..).unwrap_or_default());
    let status = match status {
        Some(status @ (Status::Mismatch | Status::Timeout | Status::InvalidArgument | Status::PeerLost)) => {
            status
        }
        _ => Status::PeerLost,
    };
    Error::new(status, format!("rank {me}: the group was not formed: {text}"))
}

// ----------------------------------------------------------------------------------------------- peer

fn connect(config: &Config, id: &UniqueId, deadline: Instant) -> Result<Stream> {
    let mut pause = Duration::from_millis(1);
    loop {
        let attempt = match &id.address {
            Address::Local(name) => UnixStream::connect_addr(&local_address(name)?).map(Stream::Unix),
            Address::Tcp(text) => resolve(text)
                .and_then(|found| {
                    let left =
                        deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
                    TcpStream::connect_timeout(&found[0], left)
                        .map(Stream::Tcp)
                        .map_err(|e| Error::system("connect", e))
                })
                .map_err(|e| std::io::Error::other(e.message)),
        };
        match attempt {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() >= deadline => {
                return Err(Error::new(
                    Status::Timeout,
                    format!(
                        "rank {}: rank 0 did not listen within {} ms ({error})",
                        config.rank, config.setup_timeout_ms
                    ),
                ));
            }
            Err(_) => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        }
    }
}

/// Waits for one kind of message; FAIL and silence are errors.
fn expect(link: &mut Link, kind: Kind, config: &Config, deadline: Instant) -> Result<Vec<u8>> {
    let me = config.rank;
    loop {
        match link.receive() {
            Ok(Some(message)) if message.kind == kind => return Ok(message.body),
            Ok(Some(message)) if message.kind == Kind::Fail => return Err(parse_fail(&message.body, me)),
            Ok(Some(message)) => {
                return Err(Error::new(
                    Status::Mismatch,
                    format!("rank {me}: rank 0 sent {:?} where {kind:?} was due", message.kind),
                ));
            }
            Ok(None) => {}
            Err(Trouble::Closed) => {
                return Err(Error::new(
                    Status::PeerLost,
                    format!("rank {me}: rank 0 closed the connection before the group was formed"),
                ));
            }
            Err(Trouble::Garbage(what)) => {
                return Err(Error::new(Status::Mismatch, format!("rank {me}: rank 0's address sent {what}")));
            }
        }
        if !wait_readable(&[link.stream.as_fd()], deadline)? {
            return Err(Error::new(
                Status::Timeout,
                format!("rank {me}: the group was not complete within {} ms", config.setup_timeout_ms),
            ));
        }
    }
}

fn gather_as_peer(
    config: &Config,
    id: &UniqueId,
    deadline: Instant,
    own: impl FnOnce() -> Result<Vec<OwnedFd>>,
) -> Result<Gathered> {
    let mut link = Link::new(connect(config, id, deadline)?)?;
    // Rank 0 is there: its deadline, which began before this moment, decides, and its reason is the one to report.
    let deadline = Instant::now() + Duration::from_millis(config.setup_timeout_ms) + ROOT_SPEAKS_FIRST;
    let challenge = expect(&mut link, Kind::Challenge, config, deadline)?;
    let nonce: Nonce = random()?;
    let mut body = join_body(config, &nonce);
    let tag = mac(&id.key, &[b"join", &challenge, &body])?.finalize().into_bytes();
    body.extend_from_slice(&tag);
    if link.send(Kind::Join, &body).is_err() {
        return Err(root_failed(&mut link, config));
    }

    let welcome = expect(&mut link, Kind::Welcome, config, deadline)?;
    let proven = welcome.len() == 16 + MAC_BYTES
        && mac(&id.key, &[b"welcome", &nonce, &welcome[..16]])?.verify_slice(&welcome[16..]).is_ok();
    if !proven {
        return Err(Error::new(
            Status::Mismatch,
            format!("rank {}: who answered as rank 0 does not know the group's key", config.rank),
        ));
    }
    let mut name = [0; 16];
    name.copy_from_slice(&welcome[..16]);

    let shared = own().and_then(|own| {
        let Ok(socket) = UnixStream::connect_addr(&local_address(&name)?) else {
            return Err(root_failed(&mut link, config));
        };
        check_user(&socket)?;
        let borrowed: Vec<_> = own.iter().map(|fd| fd.as_fd()).collect();
        match send_fds(&socket, config.rank, &borrowed) {
            Ok(()) => Ok(socket),
            // The root has let the group go, and says why over the first connection.
            Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                Err(root_failed(&mut link, config))
            }
            Err(e) => Err(Error::system(format!("rank {}: sending descriptors", config.rank), e)),
        }
    });
    let socket = match shared {
        Ok(socket) => socket,
        Err(error) => {
            tell_outcome(&mut link, config, &Err(error.clone()));
            return Err(error);
        }
    };

    let mut fds: Vec<Vec<OwnedFd>> = Vec::with_capacity(config.num_ranks as usize);
    while fds.len() < config.num_ranks as usize {
        match receive_fds(&socket) {
            Ok(Some((rank, got))) if rank as usize == fds.len() => fds.push(got),
            Ok(None) => {
                // A FAIL comes over the first connection.
                let both = [link.stream.as_fd(), socket.as_fd()];
                let _ = wait_readable(&both, deadline)?;
                if let Ok(Some(message)) = link.receive() {
                    return Err(parse_fail(&message.body, config.rank));
                }
                if Instant::now() >= deadline {
                    return Err(Error::new(
                        Status::Timeout,
                        format!(
                            "rank {}: the windows were not exchanged within {} ms",
                            config.rank, config.setup_timeout_ms
                        ),
                    ));
                }
            }
            // The root says why over the first connection.
            Ok(Some(_)) | Err(_) => return Err(root_failed(&mut link, config)),
        }
    }
    Ok(Gathered { fds, finish: Finish::Peer { link, deadline } })
}

/// The root broke off: the reason it gave, if it comes soon.
fn root_failed(link: &mut Link, config: &Config) -> Error {
    match expect(link, Kind::Fail, config, Instant::now() + Duration::from_secs(1)) {
        Ok(body) => parse_fail(&body, config.rank),
        Err(error) => error,
    }
}

// ----------------------------------------------------------------------------------------------- root

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn open(config: &Config, id: &UniqueId) -> Result<Listener> {
        let taken = |what: String, e: std::io::Error| match e.kind() {
            ErrorKind::AddrInUse => Error::invalid(format!(
                "rank 0: {what} is in use: another rank 0 of num_ranks {} was started with this unique_id, or the \
                 address is taken",
                config.num_ranks
            )),
            _ => Error::system(format!("rank 0: listening on {what}"), e),
        };
        match &id.address {
            Address::Local(name) => UnixListener::bind_addr(&local_address(name)?)
                .and_then(|l| l.set_nonblocking(true).map(|()| Listener::Unix(l)))
                .map_err(|e| taken("the group's Unix address".into(), e)),
            Address::Tcp(text) => TcpListener::bind(&resolve(text)?[..])
                .and_then(|l| l.set_nonblocking(true).map(|()| Listener::Tcp(l)))
                .map_err(|e| taken(text.clone(), e)),
        }
    }
    fn accept(&self) -> std::io::Result<Stream> {
        match self {
            Listener::Unix(l) => l.accept().map(|(s, _)| Stream::Unix(s)),
            Listener::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
        }
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(l) => l.as_fd(),
            Listener::Tcp(l) => l.as_fd(),
        }
    }
}

/// A connection that has not proven anything yet.
struct Stranger {
    link: Link,
    challenge: Nonce,
    since: Instant,
}

/// A stranger that says nothing for this long is let go.
const STRANGER_PATIENCE: Duration = Duration::from_secs(10);
/// A group that has failed waits this long for ranks that are on their way.
const FAREWELL: Duration = Duration::from_secs(1);
/// More of them at once than this means a scan, not a group.
const MAX_STRANGERS: usize = 4096;

/// The root's side of a group that has formed.
struct Root {
    /// Index 0 is the root itself.
    peers: Vec<Option<Link>>,
    num_ranks: u32,
    deadline: Instant,
    setup_timeout_ms: u64,
}

impl Root {
    fn fail_all(&mut self, error: &Error) {
        let body = fail_body(error, 0);
        for link in self.peers.iter_mut().flatten() {
            // Who cannot be told has left already.
            let _ = link.send(Kind::Fail, &body);
        }
    }
    fn fail(&mut self, error: Error) -> Error {
        self.fail_all(&error);
        error
    }
    fn send_all(&mut self, kind: Kind, body: impl Fn(u32) -> Vec<u8>) -> Result<()> {
        for rank in 1..self.num_ranks {
            let Some(link) = &mut self.peers[rank as usize] else { continue };
            if let Err(e) = link.send(kind, &body(rank)) {
                let text = format!("rank {rank} left while the group was formed ({e})");
                return Err(self.fail(Error::new(Status::PeerLost, text)));
            }
        }
        Ok(())
    }
    fn missing(&self, seen: &[bool]) -> String {
        let late: Vec<String> =
            (1..self.num_ranks).filter(|r| !seen[*r as usize]).map(|r| r.to_string()).collect();
        late.join(", ")
    }

    /// Looks at what a peer has sent: `true` if it is the message that is due.
    fn listen(&mut self, rank: u32, kind: Kind) -> Result<bool> {
        let Some(link) = &mut self.peers[rank as usize] else { return Ok(false) };
        let failed = match link.receive() {
            Ok(None) => return Ok(false),
            Ok(Some(message)) if message.kind == Kind::Fail => {
                Error::new(Status::PeerLost, parse_fail(&message.body, 0).message)
            }
            Ok(Some(message)) if message.kind == kind => return Ok(true),
            Ok(Some(message)) => Error::new(
                Status::Mismatch,
                format!("rank {rank} sent {:?} where {kind:?} was due", message.kind),
            ),
            Err(_) => Error::new(Status::PeerLost, format!("rank {rank} left while the group was formed")),
        };
        Err(self.fail(failed))
    }

    /// Waits for one message of a kind from every peer.
    fn collect(&mut self, kind: Kind) -> Result<()> {
        let mut seen = vec![false; self.num_ranks as usize];
        seen[0] = true;
        loop {
            for rank in 1..self.num_ranks {
                if !seen[rank as usize] && self.listen(rank, kind)? {
                    seen[rank as usize] = true;
                }
            }
            if seen.iter().all(|s| *s) {
                return Ok(());
            }
            let fds: Vec<_> = self
                .peers
                .iter()
                .zip(&seen)
                .filter(|(_, seen)| !**seen)
                .filter_map(|(link, _)| link.as_ref().map(|link| link.stream.as_fd()))
                .collect();
            if !wait_readable(&fds, self.deadline)? {
                let text = format!(
                    "ranks {} were not ready within {} ms",
                    self.missing(&seen),
                    self.setup_timeout_ms
                );
                return Err(self.fail(Error::new(Status::Timeout, text)));
            }
        }
    }
}

fn gather_as_root(
    config: &Config,
    id: &UniqueId,
    deadline: Instant,
    own: impl FnOnce() -> Result<Vec<OwnedFd>>,
) -> Result<Gathered> {
    let listener = Listener::open(config, id)?;
    let mut root = Root {
        peers: (0..config.num_ranks).map(|_| None).collect(),
        num_ranks: config.num_ranks,
        deadline,
        setup_timeout_ms: config.setup_timeout_ms,
    };
    let nonces = admit(&mut root, &listener, config, id)?;
    drop(listener);

    // Descriptors need a Unix socket whatever the first connection was.
    let name: [u8; 16] = random()?;
    let exchange = UnixListener::bind_addr(&local_address(&name)?)
        .and_then(|l| l.set_nonblocking(true).map(|()| l))
        .map_err(|e| root.fail(Error::system("rank 0: the descriptor socket", e)))?;
    let own = own().map_err(|e| root.fail(e))?;
    root.send_all(Kind::Welcome, |rank| {
        let mut body = name.to_vec();
        if let Ok(mac) = mac(&id.key, &[b"welcome", &nonces[rank as usize], &name]) {
            body.extend_from_slice(&mac.finalize().into_bytes());
        }
        body
    })?;
    let (sockets, mut fds) = collect_fds(&mut root, &exchange)?;
    fds[0] = own;

    for (rank, socket) in sockets.iter().enumerate().skip(1) {
        let Some(socket) = socket else { continue };
        for (of, fds) in fds.iter().enumerate() {
            let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            send_fds(socket, of as u32, &borrowed).map_err(|e| {
                root.fail(Error::new(
                    Status::PeerLost,
                    format!("rank {rank} left while windows were exchanged ({e})"),
                ))
            })?;
        }
    }
    Ok(Gathered { fds, finish: Finish::Root { root } })
}

/// Lets ranks in until the group is complete, or tells everybody why it never will be. Returns their nonces.
fn admit(root: &mut Root, listener: &Listener, config: &Config, id: &UniqueId) -> Result<Vec<Nonce>> {
    let mut strangers = Vec::new();
    let outcome = admit_all(root, listener, config, id, &mut strangers);
    match &outcome {
        // A group that has waited in vain has nobody left to tell.
        Err(error) if error.status != Status::Timeout => farewell(root, listener, strangers, error),
        _ => {}
    }
    outcome
}

/// Ranks that come just after the group has failed hear why, instead of finding nobody.
fn farewell(root: &Root, listener: &Listener, strangers: Vec<Stranger>, error: &Error) {
    let body = fail_body(error, 0);
    let mut told: Vec<Link> = strangers.into_iter().map(|stranger| stranger.link).collect();
    for link in &mut told {
        let _ = link.send(Kind::Fail, &body);
    }
    let seated = root.peers.iter().flatten().count();
    // The rank whose JOIN ended the group was told where that was found.
    let deadline = Instant::now() + FAREWELL;
    while seated + told.len() + 2 < root.num_ranks as usize {
        if !matches!(wait_readable(&[listener.as_fd()], deadline), Ok(true)) {
            break;
        }
        while let Ok(stream) = listener.accept() {
            let Ok(mut link) = Link::new(stream) else { continue };
            let _ = link.send(Kind::Fail, &body);
            told.push(link);
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    // What they sent is read, so that closing does not throw away what they have not read yet.
    for link in &mut told {
        let _ = link.receive();
    }
}

fn admit_all(
    root: &mut Root,
    listener: &Listener,
    config: &Config,
    id: &UniqueId,
    strangers: &mut Vec<Stranger>,
) -> Result<Vec<Nonce>> {
    let mine = identity(config);
    let mut nonces = vec![[0; 16]; config.num_ranks as usize];
    loop {
        let joined: Vec<bool> =
            root.peers.iter().enumerate().map(|(rank, link)| rank == 0 || link.is_some()).collect();
        if joined.iter().all(|j| *j) {
            return Ok(nonces);
        }
        let mut fds = vec![listener.as_fd()];
        fds.extend(strangers.iter().map(|s| s.link.stream.as_fd()));
        fds.extend(root.peers.iter().flatten().map(|link| link.stream.as_fd()));
        if !wait_readable(&fds, root.deadline)? {
            let text = format!(
                "rank 0: ranks {} of {} did not join within {} ms",
                root.missing(&joined),
                config.num_ranks,
                config.setup_timeout_ms
            );
            return Err(root.fail(Error::new(Status::Timeout, text)));
        }
        while let Ok(stream) = listener.accept() {
            if strangers.len() >= MAX_STRANGERS {
                continue;
            }
            let (Ok(mut link), Ok(challenge)) = (Link::new(stream), random()) else { continue };
            if link.send(Kind::Challenge, &challenge).is_ok() {
                strangers.push(Stranger { link, challenge, since: Instant::now() });
            }
        }
        // A rank that joined has nothing to say before WELCOME: what comes is its end.
        for rank in 1..config.num_ranks {
            root.listen(rank, Kind::Fail)?;
        }
        for _ in 0..strangers.len() {
            let mut stranger = strangers.remove(0);
            match stranger.link.receive() {
                Ok(None) if stranger.since.elapsed() < STRANGER_PATIENCE => strangers.push(stranger),
                Ok(Some(message)) if message.kind == Kind::Join => {
                    match Join::parse(&message.body, &id.key, &stranger.challenge) {
                        Ok(join) => {
                            let nonce = join.nonce;
                            if let Some(rank) = seat(root, config, &mine, join, stranger.link)? {
                                nonces[rank as usize] = nonce;
                            }
                        }
                        Err(why) => refuse(stranger.link, why),
                    }
                }
                Ok(None) => refuse(stranger.link, "it sent nothing in time"),
                Ok(Some(_)) | Err(Trouble::Garbage(_)) => refuse(stranger.link, "it is no rank of liba2a"),
                Err(Trouble::Closed) => {}
            }
        }
    }
}

fn refuse(mut link: Link, why: &str) {
    log(Level::Warn, || format!("rank 0 refused a connection: {why}"));
    let error = Error::new(Status::Mismatch, format!("rank 0 refused the connection: {why}"));
    let _ = link.send(Kind::Fail, &fail_body(&error, 0));
}

/// Gives a rank that knows the key its place. A taken place is refused alone, a config that differs ends the group.
fn seat(
    root: &mut Root,
    config: &Config,
    mine: &[(String, u64)],
    join: Join,
    mut link: Link,
) -> Result<Option<u32>> {
    let differs = mine
        .iter()
        .zip(join.fields.iter().copied().chain(std::iter::repeat(0)))
        .find(|((_, mine), theirs)| mine != theirs);
    let text = if join.num_ranks != config.num_ranks {
        Some(format!(
            "num_ranks is {} on rank 0 and {} on rank {}",
            config.num_ranks, join.num_ranks, join.rank
        ))
    } else if let Some(((name, mine), theirs)) = differs {
        Some(format!("{name} is {mine} on rank 0 and {theirs} on rank {}", join.rank))
    } else {
        None
    };
    if let Some(text) = text {
        let error = Error::new(Status::Mismatch, text);
        let _ = link.send(Kind::Fail, &fail_body(&error, 0));
        return Err(root.fail(error));
    }
    if join.rank == 0 || join.rank >= config.num_ranks || root.peers[join.rank as usize].is_some() {
        let error = Error::invalid(format!("rank {} has joined already", join.rank));
        log(Level::Warn, || format!("rank 0 refused a second rank {}", join.rank));
        let _ = link.send(Kind::Fail, &fail_body(&error, 0));
        return Ok(None);
    }
    log(Level::Debug, || format!("rank {} of {} has joined", join.rank, config.num_ranks));
    root.peers[join.rank as usize] = Some(link);
    Ok(Some(join.rank))
}

type Exchanged = (Vec<Option<UnixStream>>, Vec<Vec<OwnedFd>>);

/// Receives every peer's descriptors.
fn collect_fds(root: &mut Root, exchange: &UnixListener) -> Result<Exchanged> {
    let ranks = root.num_ranks as usize;
    let mut sockets: Vec<Option<UnixStream>> = (0..ranks).map(|_| None).collect();
    let mut fds: Vec<Vec<OwnedFd>> = (0..ranks).map(|_| Vec::new()).collect();
    let mut waiting: Vec<UnixStream> = Vec::new();
    loop {
        let seen: Vec<bool> = (0..ranks).map(|rank| rank == 0 || sockets[rank].is_some()).collect();
        if seen.iter().all(|s| *s) {
            return Ok((sockets, fds));
        }
        let mut polled = vec![exchange.as_fd()];
        polled.extend(waiting.iter().map(|s| s.as_fd()));
        polled.extend(root.peers.iter().flatten().map(|link| link.stream.as_fd()));
        if !wait_readable(&polled, root.deadline)? {
            let text =
                format!("ranks {} sent no window within {} ms", root.missing(&seen), root.setup_timeout_ms);
            return Err(root.fail(Error::new(Status::Timeout, text)));
        }
        for rank in 1..root.num_ranks {
            root.listen(rank, Kind::Fail)?;
        }
        while let Ok((socket, _)) = exchange.accept() {
            match check_user(&socket) {
                Ok(()) => waiting.push(socket),
                Err(error) => log(Level::Warn, || format!("rank 0 refused a connection: {error}")),
            }
        }
        let mut still = Vec::new();
        for socket in waiting.drain(..) {
            match receive_fds(&socket) {
                Ok(None) => still.push(socket),
                Ok(Some((rank, got))) if (1..ranks).contains(&(rank as usize)) && !seen[rank as usize] => {
                    fds[rank as usize] = got;
                    sockets[rank as usize] = Some(socket);
                }
                // A stranger; a rank that left shows on its own connection.
                Ok(Some(_)) | Err(_) => {}
            }
        }
        waiting = still;
    }
}
