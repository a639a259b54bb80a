//! The sockets under the rendezvous: where rank 0 listens, how it is found, and how descriptors cross.
//!
//! Nothing here blocks: whoever waits does so in `wait`, and looks at its deadline each time that returns.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::config::{Address, resolve};
use crate::error::{Error, Result, Status, is_shortage};
use crate::fault::{self, Point};

/// Descriptors a rank may hand round.
const MAX_FDS: usize = 4;

/// Until when, and how long that was when it was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    pub ms: u64,
}

impl Deadline {
    pub fn after_ms(ms: u64) -> Deadline {
        Deadline { at: Instant::now() + Duration::from_millis(ms), ms }
    }
    pub fn later(self, by: Duration) -> Deadline {
        Deadline { at: self.at + by, ..self }
    }
    pub fn left(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
    pub fn has_passed(self) -> bool {
        self.left().is_zero()
    }
}

/// A slice of a wait at most: a signal or a lost wake-up costs this, not the deadline.
pub const SLICE: Duration = Duration::from_millis(100);

/// Returns when one of the descriptors has something, and after a slice of time at the latest.
pub fn wait(fds: &[BorrowedFd<'_>], deadline: Deadline, slice: Duration) -> Result<()> {
    let mut polled: Vec<PollFd> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let slice = deadline.left().min(slice);
    let timeout = Timespec { tv_sec: 0, tv_nsec: slice.as_nanos() as i64 };
    match fault::call(Point::Poll, || poll(&mut polled, Some(&timeout))) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(Error::system("poll", e)),
    }
}

/// A stream of either family.
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub fn set_nonblocking(&self) -> std::io::Result<()> {
        match self {
            Stream::Unix(s) => s.set_nonblocking(true),
            Stream::Tcp(s) => s.set_nodelay(true).and_then(|()| s.set_nonblocking(true)),
        }
    }
}

impl Stream {
    /// A peer whose host falls silent is noticed: the connection is asked for life when nothing has been said for a while. As far
    /// as the system lets it be.
    pub fn keep_alive(&self) {
        use rustix::net::sockopt::*;
        let Stream::Tcp(stream) = self else { return };
        let _ = set_socket_keepalive(stream, true)
            .and_then(|()| set_tcp_keepidle(stream, Duration::from_secs(5)))
            .and_then(|()| set_tcp_keepintvl(stream, Duration::from_secs(5)))
            .and_then(|()| set_tcp_keepcnt(stream, 3));
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

/// An abstract Unix address: gone with its last socket, nothing on disk.
fn local_address(name: &[u8; 16]) -> Result<std::os::unix::net::SocketAddr> {
    let hex: String = name.iter().map(|b| format!("{b:02x}")).collect();
    std::os::unix::net::SocketAddr::from_abstract_name(format!("a2a-{hex}"))
        .map_err(|e| Error::system("a Unix address", e))
}

pub fn listen_local(name: &[u8; 16]) -> Result<std::io::Result<UnixListener>> {
    let address = local_address(name)?;
    let listener = fault::call(Point::Listen, || UnixListener::bind_addr(&address));
    Ok(listener.and_then(|l| l.set_nonblocking(true).map(|()| l)))
}

pub fn connect_local(name: &[u8; 16]) -> Result<std::io::Result<UnixStream>> {
    let address = local_address(name)?;
    Ok(fault::call(Point::Connect, || UnixStream::connect_addr(&address)))
}

/// Only the same user (or root) may take part over a Unix socket.
pub fn check_user(socket: &UnixStream) -> Result<()> {
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

// ------------------------------------------------------------------------------------------ rank 0's address

/// What a group's address is here. Whoever looks a name up may wait for other machines: that has a thread of its
/// own, which is left behind if the deadline comes first.
fn look_up(text: &str, remote: bool, deadline: Deadline) -> Result<Vec<SocketAddr>> {
    let (done, found) = channel();
    let asked = text.to_string();
    let resolver = std::thread::Builder::new()
        .name("a2a-resolve".into())
        // Nobody listens any more once the deadline has passed.
        .spawn(move || drop(done.send(resolve(&asked))))
        .map_err(|e| Error::system("the resolver's thread", e))?;
    let mut found = match found.recv_timeout(deadline.left()) {
        Ok(found) => {
            // It only ends; left to itself it would do so while others look for what leaks.
            let _ = resolver.join();
            found?
        }
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            return Err(Error::new(
                Status::Timeout,
                format!("{text:?} was not resolved within {} ms", deadline.ms),
            ));
        }
    };
    if !remote {
        let all = found.clone();
        found.retain(|address| address.ip().is_loopback());
        if found.is_empty() {
            return Err(Error::invalid(format!(
                "{text:?} is {}, which is no loopback address; flags needs A2A_CONFIG_REMOTE (1) for others",
                all.iter().map(|a| a.ip().to_string()).collect::<Vec<_>>().join(", ")
            )));
        }
    }
    Ok(found)
}

/// Rank 0's door.
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// `in_use`: what to say if somebody listens there already.
    pub fn open(address: &Address, remote: bool, deadline: Deadline, in_use: &str) -> Result<Listener> {
        let refused = |what: &str, e: std::io::Error| match e.kind() {
            ErrorKind::AddrInUse => Error::invalid(format!("{what} is in use: {in_use}")),
            _ => Error::system(format!("listening on {what}"), e),
        };
        match address {
            Address::Local(name) => {
                listen_local(name)?.map(Listener::Unix).map_err(|e| refused("the group's Unix address", e))
            }
            Address::Tcp(text) => look_up(text, remote, deadline)
                .map(|found| fault::call(Point::Listen, || TcpListener::bind(&found[..])))?
                .and_then(|l| l.set_nonblocking(true).map(|()| Listener::Tcp(l)))
                .map_err(|e| refused(text, e)),
        }
    }

    /// Whoever waits at the door; over a Unix socket only the same user.
    pub fn accept(&self) -> std::io::Result<Stream> {
        match self {
            Listener::Unix(l) => {
                let (socket, _) = fault::call(Point::Accept, || l.accept())?;
                check_user(&socket).map_err(|e| std::io::Error::new(ErrorKind::PermissionDenied, e))?;
                Ok(Stream::Unix(socket))
            }
            Listener::Tcp(l) => fault::call(Point::Accept, || l.accept()).map(|(s, _)| Stream::Tcp(s)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(l) => l.as_fd(),
            Listener::Tcp(l) => l.as_fd(),
        }
    }
}

/// An address that drops packets must not keep the next one of the same name from being tried.
const ONE_ADDRESS: Duration = Duration::from_secs(2);

/// Where an address leads to: nowhere else than to itself, if it is a local one.
fn leads_to(address: &Address, remote: bool, deadline: Deadline) -> Result<Vec<SocketAddr>> {
    match address {
        Address::Local(_) => Ok(Vec::new()),
        Address::Tcp(text) => look_up(text, remote, deadline),
    }
}

/// Connects if somebody listens.
fn attempt(
    address: &Address,
    addresses: &[SocketAddr],
    deadline: Deadline,
) -> Result<std::io::Result<Stream>> {
    let mut last = std::io::Error::from(ErrorKind::ConnectionRefused);
    if let Address::Local(name) = address {
        match connect_local(name)? {
            Ok(socket) => {
                check_user(&socket)?;
                return Ok(Ok(Stream::Unix(socket)));
            }
            Err(error) => last = error,
        }
    }
    for address in addresses {
        let patience = deadline.left().min(ONE_ADDRESS).max(Duration::from_millis(1));
        match fault::call(Point::Connect, || TcpStream::connect_timeout(address, patience)) {
            Ok(stream) => return Ok(Ok(Stream::Tcp(stream))),
            Err(error) => last = error,
        }
    }
    Ok(Err(last))
}

/// Connects if somebody listens, and says so if nobody does.
pub fn connect_once(address: &Address, remote: bool, deadline: Deadline) -> Result<Stream> {
    let addresses = leads_to(address, remote, deadline)?;
    attempt(address, &addresses, deadline)?.map_err(|error| Error::system("connecting", error))
}

/// Connects as soon as somebody listens.
pub fn connect(address: &Address, remote: bool, deadline: Deadline) -> Result<Stream> {
    let addresses = leads_to(address, remote, deadline)?;
    let mut pause = Duration::from_millis(1);
    loop {
        let last = match attempt(address, &addresses, deadline)? {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        // It is not rank 0 that is missing.
        if is_shortage(&last) {
            return Err(Error::system("connecting to rank 0", last));
        }
        if deadline.has_passed() {
            let text = format!("rank 0 did not listen within {} ms ({last})", deadline.ms);
            return Err(Error::new(Status::Timeout, text));
        }
        std::thread::sleep(pause.min(deadline.left()));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

// ---------------------------------------------------------------------------------------------- descriptors

/// Sends a rank's descriptors in one message; `false` if it has to be tried again later. Descriptors on their way count
/// against the sender's limit of open files (ETOOMANYREFS).
pub fn send_fds(socket: &UnixStream, body: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<bool> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(std::io::Error::other("too many descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let send = || rustix::net::sendmsg(socket, &[IoSlice::new(body)], &mut control, flags);
    match fault::call(Point::SendWindows, send) {
        Ok(sent) if sent == body.len() => Ok(true),
        Ok(_) => Err(std::io::Error::other("a short message")),
        Err(Errno::AGAIN | Errno::INTR | Errno::TOOMANYREFS | Errno::NOBUFS) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Receives one message of `body`'s length, and its descriptors (close-on-exec); `None` if none has come.
pub fn receive_fds(socket: &UnixStream, body: &mut [u8]) -> std::io::Result<Option<Vec<OwnedFd>>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = body.len();
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut bodies = [IoSliceMut::new(body)];
    let receive = || rustix::net::recvmsg(socket, &mut bodies, &mut control, flags);
    let got = match fault::call(Point::ReceiveWindows, receive) {
        Ok(got) => got,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if got.bytes != length {
        return Err(std::io::Error::other("the connection ended"));
    }
    // The kernel hands over as many as this process may still open, and keeps the rest.
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::MFILE.into());
    }
    Ok(Some(fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Descriptors that nobody takes make the sender come again, not wait.
    #[test]
    fn descriptors_never_block_their_sender() {
        let (mine, theirs) = UnixStream::pair().unwrap();
        mine.set_nonblocking(true).unwrap();
        let fds = [mine.as_fd(), theirs.as_fd(), mine.as_fd()];
        let mut sent = 0u32;
        while send_fds(&mine, &sent.to_le_bytes(), &fds).unwrap() {
            sent += 1;
            assert!(sent < 100_000, "no limit was met");
        }
        assert!(sent > 0);
        for of in 0..sent {
            let mut body = [0; 4];
            let got = receive_fds(&theirs, &mut body).unwrap().unwrap();
            assert_eq!((u32::from_le_bytes(body), got.len()), (of, 3));
        }
        assert!(receive_fds(&theirs, &mut [0; 4]).unwrap().is_none());
        assert!(send_fds(&mine, &[1; 4], &fds).unwrap());
        drop(mine);
        assert!(receive_fds(&theirs, &mut [0; 4]).unwrap().is_some());
        assert!(receive_fds(&theirs, &mut [0; 4]).is_err(), "the connection ended");
    }

    #[test]
    fn only_loopback_addresses_are_used_unless_told_otherwise() {
        let deadline = Deadline::after_ms(5000);
        let error = look_up("192.0.2.1:4711", false, deadline).unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument);
        assert!(error.message.contains("192.0.2.1") && error.message.contains("A2A_CONFIG_REMOTE"));
        assert_eq!(look_up("192.0.2.1:4711", true, deadline).unwrap().len(), 1);
        assert_eq!(look_up("127.0.0.1:4711", false, deadline).unwrap().len(), 1);
    }
}
