//! The thread that notices peers that are gone, and tells those apart that are proven dead: it sleeps in poll() on one
//! lifeline and one pidfd per peer.
//!
//! * A lifeline is the read end of a pipe whose write end only its rank holds. It hangs up when the rank's process ends or
//!   the rank destroys its comm, whichever thread or namespace it lives in: the rank is *gone*. Waits for it end, but its
//!   last call may still be on its way.
//! * A pidfd is readable once every thread of the process has ended: the rank is *proven dead*, also where a forked child
//!   still holds its lifeline. It stays watched when the lifeline has hung up, for that is what recovery waits for.
//!
//! No proof comes where the rank is a thread of this process, whose end nobody here lives to see, and where the kernel
//! gave its process no pidfd (ENOSYS: before Linux 5.3, or under valgrind). Such a rank is only ever gone.
//!
//! None of it costs anything while all is well.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::device::Health;
use crate::error::{Error, Result};
use crate::fault::{self, Point};
use crate::log::{Level, log};

/// This rank's own ends: kept open while it takes part.
pub struct Lifeline {
    _write: OwnedFd,
}

impl Lifeline {
    /// Makes the lifeline and the descriptors that the peers get: the read end, and a pidfd where the kernel allows
    /// one.
    pub fn new(rank: u32) -> Result<(Lifeline, Vec<OwnedFd>)> {
        let pipe = fault::call(Point::Lifeline, || rustix::pipe::pipe_with(PipeFlags::CLOEXEC))
            .map_err(|e| Error::system(format!("rank {rank}: a lifeline pipe"), e))?;
        let mut shared = vec![pipe.0];
        let me = rustix::process::getpid();
        let pidfd = || rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty());
        shared.extend(fault::call(Point::Pidfd, pidfd).ok());
        Ok((Lifeline { _write: pipe.1 }, shared))
    }
}

/// Joined on drop.
pub struct Watchdog {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches every peer by the descriptors that its `Lifeline::new` made; `watched[r]` is empty for this rank itself.
    pub fn start(rank: u32, watched: Vec<Vec<OwnedFd>>, health: Arc<Health>) -> Result<Watchdog> {
        Watchdog::start_with(rank, watched, health, |fds| poll(fds, None))
    }

    /// `poll`: the system's, or a test's.
    fn start_with(
        rank: u32,
        watched: Vec<Vec<OwnedFd>>,
        health: Arc<Health>,
        poll: impl FnMut(&mut [PollFd<'_>]) -> rustix::io::Result<usize> + Send + 'static,
    ) -> Result<Watchdog> {
        let (wake, stop) = fault::call(Point::WatchdogPipe, || rustix::pipe::pipe_with(PipeFlags::CLOEXEC))
            .map_err(|e| Error::system(format!("rank {rank}: the watchdog's pipe"), e))?;
        let peers = watched.into_iter().map(Peer::new).collect();
        let thread = std::thread::Builder::new().name(format!("a2a-watch-{rank}"));
        let watch = move || watch(rank, &wake, peers, &health, poll);
        let thread = fault::call(Point::WatchdogThread, || thread.spawn(watch))
            .map_err(|e| Error::system(format!("rank {rank}: the watchdog thread"), e))?;
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

/// What is still watched of a peer.
struct Peer {
    lifeline: Option<OwnedFd>,
    process: Option<OwnedFd>,
}

impl Peer {
    fn new(fds: Vec<OwnedFd>) -> Peer {
        let mut fds = fds.into_iter();
        Peer { lifeline: fds.next(), process: fds.next() }
    }
}

/// What a descriptor tells of its peer.
#[derive(Clone, Copy)]
enum Sign {
    Left,
    Died,
}

/// Between two tries of a poll() that lacked memory.
const PAUSE: Duration = Duration::from_millis(10);

fn watch(
    rank: u32,
    wake: &OwnedFd,
    mut peers: Vec<Peer>,
    health: &Health,
    mut poll: impl FnMut(&mut [PollFd<'_>]) -> rustix::io::Result<usize>,
) {
    let mut lacks_memory = false;
    loop {
        let mut owners = Vec::new();
        let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
        for (number, peer) in peers.iter().enumerate() {
            for (fd, sign) in [(&peer.lifeline, Sign::Left), (&peer.process, Sign::Died)] {
                if let Some(fd) = fd {
                    owners.push((number, sign));
                    fds.push(PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
                }
            }
        }
        match poll(&mut fds) {
            Ok(_) => lacks_memory = false,
            Err(Errno::INTR) => continue,
            Err(error @ (Errno::NOMEM | Errno::AGAIN)) => {
                if !std::mem::replace(&mut lacks_memory, true) {
                    log(Level::Warn, || format!("rank {rank}: the watchdog tries poll again: {error}"));
                }
                // The user may end the comm meanwhile: drop waits for this long.
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(error) => {
                let what = format!(
                    "rank {rank}: the watchdog cannot poll {} descriptors, a rank that dies is noticed at the deadline \
                     alone from now on",
                    fds.len()
                );
                let error = Error::system(what, error);
                log(Level::Error, || error.message.clone());
                health.blinded(error);
                return;
            }
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        let signs: Vec<(usize, Sign, PollFlags)> = fds[1..]
            .iter()
            .zip(&owners)
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(fd, (peer, sign))| (*peer, *sign, fd.revents()))
            .collect();
        for (peer, sign, events) in signs {
            match sign {
                Sign::Left => {
                    peers[peer].lifeline = None;
                    if health.left(peer as u32) {
                        log(Level::Info, || format!("rank {rank}: rank {peer} has ended or left"));
                    }
                }
                Sign::Died => {
                    peers[peer].process = None;
                    // Anything but these is an error of the descriptor, and proves nothing.
                    if events.intersects(PollFlags::IN | PollFlags::HUP) && health.died(peer as u32) {
                        log(Level::Info, || format!("rank {rank}: the process of rank {peer} has ended"));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;
    use crate::error::Status;

    /// The peer in these tests; rank 0 watches.
    const PEER: u32 = 1;

    fn until(what: &str, holds: impl Fn() -> bool) {
        let limit = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < limit, "not within 20 s: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A rank's process: a shell that has the lifeline's write end for its standard output.
    struct Process {
        child: Child,
        lifeline: Option<OwnedFd>,
        pidfd: Option<OwnedFd>,
    }

    impl Process {
        fn start(script: &str) -> Process {
            let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
            let child = Command::new("sh")
                .args(["-c", script])
                .stdin(Stdio::piped())
                .stdout(write)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
            Process { child, lifeline: Some(read), pidfd: Some(pidfd) }
        }
        /// Lets the script's next `read` return.
        fn go_on(&mut self) {
            self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        }
        fn descriptors(&mut self) -> Vec<OwnedFd> {
            self.lifeline.take().into_iter().chain(self.pidfd.take()).collect()
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn health() -> Arc<Health> {
        Arc::new(Health::new(2))
    }

    fn watching(peer: Vec<OwnedFd>, health: &Arc<Health>) -> Watchdog {
        Watchdog::start(0, vec![Vec::new(), peer], health.clone()).unwrap()
    }

    fn is_open(lifeline: &OwnedFd) -> bool {
        let mut fds = [PollFd::new(lifeline, PollFlags::IN)];
        poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 0
    }

    #[test]
    fn a_rank_that_left_is_gone_and_dead_only_when_its_process_ends() {
        let mut process = Process::start("read a; exec >&-; read b");
        let health = health();
        let _watchdog = watching(process.descriptors(), &health);
        process.go_on();
        until("gone", || health.is_dead(PEER));
        // The process waits for its second line.
        assert!(!health.is_proven_dead(PEER));
        process.go_on();
        until("proven dead", || health.is_proven_dead(PEER));
        assert!(!health.is_dead(0) && !health.is_proven_dead(0));
    }

    #[test]
    fn a_death_is_proven_though_a_forked_child_holds_the_lifeline() {
        let mut process = Process::start("exec 3<&0; cat <&3 & echo forked >&2; wait");
        let mut line = String::new();
        BufReader::new(process.child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "forked\n");
        let lifeline = process.lifeline.as_ref().unwrap().try_clone().unwrap();
        let health = health();
        let _watchdog = watching(process.descriptors(), &health);
        process.child.kill().unwrap();
        until("proven dead", || health.is_proven_dead(PEER));
        assert!(health.is_dead(PEER) && is_open(&lifeline));
        // The child ends with its standard input.
        drop(process.child.stdin.take());
        until("the child's end", || !is_open(&lifeline));
    }

    #[test]
    fn both_signs_at_once_are_both_facts() {
        let mut process = Process::start("read a");
        let lifeline = process.lifeline.as_ref().unwrap().try_clone().unwrap();
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        // A process that another test is just starting may have it for a moment.
        until("the lifeline's end", || !is_open(&lifeline));
        let health = health();
        let _watchdog = watching(process.descriptors(), &health);
        until("proven dead", || health.is_proven_dead(PEER));
        assert!(health.is_dead(PEER));
    }

    #[test]
    fn without_a_pidfd_nothing_is_proven() {
        let mut process = Process::start("read a");
        process.pidfd = None;
        let health = health();
        let watchdog = watching(process.descriptors(), &health);
        process.child.kill().unwrap();
        process.child.wait().unwrap();
        until("gone", || health.is_dead(PEER));
        drop(watchdog);
        assert!(!health.is_proven_dead(PEER));
    }

    #[test]
    fn a_thread_of_this_process_is_gone_and_never_proven_dead() {
        let (lifeline, descriptors) = Lifeline::new(0).unwrap();
        assert_eq!(descriptors.len(), 2, "this kernel has pidfds");
        let health = health();
        let watchdog = watching(descriptors, &health);
        drop(lifeline);
        until("gone", || health.is_dead(PEER));
        drop(watchdog);
        assert!(!health.is_proven_dead(PEER));
    }

    #[test]
    fn a_poll_that_lacks_memory_is_tried_again() {
        let mut process = Process::start("read a");
        let health = health();
        let mut failures = vec![Errno::AGAIN, Errno::INTR, Errno::NOMEM];
        let watchdog =
            Watchdog::start_with(0, vec![Vec::new(), process.descriptors()], health.clone(), move |fds| {
                match failures.pop() {
                    Some(failure) => Err(failure),
                    None => poll(fds, None),
                }
            });
        process.child.kill().unwrap();
        until("proven dead", || health.is_proven_dead(PEER));
        assert!(health.blind().is_none());
        drop(watchdog);
    }

    #[test]
    fn any_other_failure_of_poll_is_remembered() {
        let mut process = Process::start("read a");
        let health = health();
        let watched = vec![Vec::new(), process.descriptors()];
        let watchdog = Watchdog::start_with(0, watched, health.clone(), |_| Err(Errno::INVAL));
        until("remembered", || health.blind().is_some());
        drop(watchdog);
        let error = health.blind().unwrap();
        assert_eq!(error.status, Status::System);
        assert!(error.message.contains("rank 0: the watchdog cannot poll 3 descriptors"), "{error}");
        assert!(!health.is_dead(PEER));
    }
}
