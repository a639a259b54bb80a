//! The thread that notices dead peers: it sleeps in poll() on one lifeline and one pidfd per peer.
//!
//! A lifeline is the read end of a pipe whose write end only its rank holds: it hangs up when the rank's process ends
//! or the rank destroys its comm, whichever thread or namespace it lives in. A pidfd says the same of a process whose
//! lifeline a forked child still holds. Neither costs anything while all is well.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::PipeFlags;

use crate::device::Health;
use crate::error::{Error, Result};
use crate::log::{Level, log};

/// This rank's own ends: kept open while it takes part.
pub struct Lifeline {
    _write: OwnedFd,
}

impl Lifeline {
    /// Makes the lifeline and the descriptors that the peers get: the read end, and a pidfd where the kernel allows
    /// one.
    pub fn new() -> Result<(Lifeline, Vec<OwnedFd>)> {
        let pipe =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::system("a lifeline pipe", e))?;
        let mut shared = vec![pipe.0];
        let me = rustix::process::getpid();
        shared.extend(rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty()).ok());
        Ok((Lifeline { _write: pipe.1 }, shared))
    }
}

/// Joined on drop.
pub struct Watchdog {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches the descriptors of every peer; `watched[r]` is empty for this rank itself.
    pub fn start(rank: u32, watched: Vec<Vec<OwnedFd>>, health: Arc<Health>) -> Result<Watchdog> {
        let (wake, stop) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(|e| Error::system("the watchdog's pipe", e))?;
        let thread = std::thread::Builder::new()
            .name(format!("a2a-watch-{rank}"))
            .spawn(move || watch(rank, &wake, watched, &health))
            .map_err(|e| Error::system("the watchdog thread", e))?;
        Ok(Watchdog { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        // Closing the write end hangs up the thread's read end.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(rank: u32, wake: &OwnedFd, mut watched: Vec<Vec<OwnedFd>>, health: &Health) {
    loop {
        let mut owners = Vec::new();
        let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
        for (peer, peer_fds) in watched.iter().enumerate() {
            for fd in peer_fds {
                owners.push(peer);
                fds.push(PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
            }
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => {
                log(Level::Error, || format!("rank {rank}: the watchdog cannot poll: {error}"));
                return;
            }
            Ok(_) => {}
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        let ended: Vec<usize> = fds[1..]
            .iter()
            .zip(&owners)
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, peer)| *peer)
            .collect();
        for peer in ended {
            if health.died(peer as u32) {
                log(Level::Info, || format!("rank {rank}: rank {peer} has ended or left"));
            }
            watched[peer].clear();
        }
    }
}
