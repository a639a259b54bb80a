//! What holds ranks of several hosts together once they have met: every rank's connection to rank 0 stays open. Who breaks off
//! is gone, which rank 0 tells the others; if it is rank 0 that does, the others know no more than that.
//!
//! A process that ends closes its connections, and so does a comm that is destroyed or aborted; a host that falls silent is
//! noticed within some 20 seconds, unless a step's deadline comes first.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use super::wire::{Kind, Line, Trouble};
use crate::device::Health;
use crate::error::{Error, Result};
use crate::log::{Level, log};

/// The connections, by the rank at the other end.
pub struct Ties {
    rank: u32,
    lines: Vec<(u32, Line)>,
}

/// The thread that watches them; joined on drop, and with it the connections close.
pub struct Tied {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Tied {
    fn drop(&mut self) {
        // Closing the write end hangs up the thread's read end.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Ties {
    pub fn new(rank: u32, lines: Vec<(u32, Line)>) -> Ties {
        for (_, line) in &lines {
            line.link.stream.keep_alive();
        }
        Ties { rank, lines }
    }

    pub fn watch(self, health: Arc<Health>) -> Result<Tied> {
        let rank = self.rank;
        let (wake, stop) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(|e| Error::system(format!("rank {rank}: the pipe of who watches other hosts"), e))?;
        let thread = std::thread::Builder::new()
            .name(format!("a2a-ties-{rank}"))
            .spawn(move || self.run(&wake, &health))
            .map_err(|e| Error::system(format!("rank {rank}: the thread that watches other hosts"), e))?;
        Ok(Tied { stop: Some(stop), thread: Some(thread) })
    }

    fn run(mut self, wake: &OwnedFd, health: &Health) {
        loop {
            let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
            let streams = self.lines.iter().map(|(_, line)| line.link.stream.as_fd());
            fds.extend(streams.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    let what = format!(
                        "rank {}: ranks on other hosts are watched no more, one that dies is noticed at the deadline alone \
                         from now on",
                        self.rank
                    );
                    let error = Error::system(what, error);
                    log(Level::Error, || error.message.clone());
                    return health.blinded(error);
                }
            }
            if !fds[0].revents().is_empty() {
                return;
            }
            let gone = self.hear();
            for &rank in &gone {
                if health.left(rank) {
                    log(Level::Info, || format!("rank {}: rank {rank} has ended or left", self.rank));
                }
            }
            self.pass_on(&gone);
        }
    }

    /// Who has broken off, or is said to have.
    fn hear(&mut self) -> Vec<u32> {
        let mut gone = Vec::new();
        self.lines.retain_mut(|(rank, line)| {
            loop {
                match line.link.receive() {
                    Ok(None) => return true,
                    Ok(Some(message)) if message.kind == Kind::Gone => {
                        let said = line.verify(Kind::Gone, &message.body);
                        gone.extend(
                            said.and_then(|said| said.first_chunk()).map(|said| u32::from_le_bytes(*said)),
                        );
                    }
                    // Nothing else is said any more.
                    Ok(Some(_)) | Err(Trouble::Closed | Trouble::Garbage(_)) => {
                        gone.push(*rank);
                        return false;
                    }
                }
            }
        });
        gone
    }

    /// Only rank 0 hears of all.
    fn pass_on(&mut self, gone: &[u32]) {
        if self.rank != 0 {
            return;
        }
        for (_, line) in &mut self.lines {
            for rank in gone {
                // Who cannot be told has gone too, and shows it.
                let _ = line.send_signed(Kind::Gone, rank.to_le_bytes().to_vec());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, Mutex};
    use std::time::{Duration, Instant};

    use super::super::{Finish, Gathered, Party, Reach, allgather, new_unique_id, peer, root};
    use super::*;
    use crate::config::{Allgather, Bootstrap, Meeting};
    use crate::error::Status;

    const RANKS: u32 = 3;

    fn party(rank: u32, reach: Reach, hosts: [u64; 3]) -> Party {
        // The id is the test's: it is put in its place by whoever makes the parties.
        let id = new_unique_id().unwrap();
        let meeting = Meeting {
            rank,
            num_ranks: RANKS,
            bootstrap: Bootstrap::UniqueId(id.clone()),
            remote: false,
            timeout_ms: 20_000,
        };
        Party { reach, host: hosts[rank as usize], ..Party::of(&meeting, id, 20_000) }
    }

    /// What became of every rank's part, on a thread of its own.
    fn of_all<T: Send>(part: impl Fn(u32) -> T + Sync) -> Vec<T> {
        let part = &part;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..RANKS).map(|rank| scope.spawn(move || part(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    fn meet(
        reach: Reach,
        hosts: [u64; 3],
        able: impl Fn(u32, bool) -> Result<()> + Sync,
    ) -> Vec<Result<Gathered>> {
        let id = new_unique_id().unwrap();
        of_all(|rank| {
            let party = Party { id: id.clone(), ..party(rank, reach, hosts) };
            let own = |apart| able(rank, apart).map(|()| vec![]);
            match rank {
                0 => root::gather(party, |apart| Ok(vec![7, u8::from(apart)]), own),
                _ => peer::gather(party, own),
            }
        })
    }

    /// All-gathers of threads.
    fn in_memory() -> Vec<Allgather> {
        let shared = Arc::new((Mutex::new(vec![Vec::new(); RANKS as usize]), Barrier::new(RANKS as usize)));
        let of_rank = |rank: u32| {
            let shared = shared.clone();
            Allgather::new(move |mine, all| {
                let (blocks, barrier) = &*shared;
                blocks.lock().unwrap()[rank as usize] = mine.to_vec();
                barrier.wait();
                all.copy_from_slice(&blocks.lock().unwrap().concat());
                barrier.wait();
                Ok(())
            })
        };
        (0..RANKS).map(of_rank).collect()
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let limit = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < limit, "not within 20 s: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn finish(met: Vec<Result<Gathered>>) -> Vec<Option<Ties>> {
        let met: Vec<_> = met.into_iter().map(|met| Mutex::new(Some(met.unwrap()))).collect();
        of_all(|rank| met[rank as usize].lock().unwrap().take().unwrap().finish(Ok(())).unwrap())
    }

    #[test]
    fn ranks_of_several_hosts_meet_without_descriptors_and_notice_who_leaves() {
        for leaver in [1, 2, 0] {
            let met = meet(Reach::Hosts, [5, 6, 5], |_, apart| {
                assert!(apart);
                Ok(())
            });
            for met in &met {
                let met = met.as_ref().unwrap();
                assert!(met.apart && met.gift == [7, 1]);
            }
            let health: Vec<_> = (0..RANKS).map(|_| Arc::new(Health::new(RANKS))).collect();
            let ties = finish(met).into_iter().zip(&health);
            let mut tied: Vec<_> =
                ties.map(|(ties, health)| Some(ties.unwrap().watch(health.clone()).unwrap())).collect();
            tied[leaver as usize] = None;
            for rank in (0..RANKS).filter(|rank| *rank != leaver) {
                until("who left is gone", || health[rank as usize].is_dead(leaver));
                for other in (0..RANKS).filter(|other| *other != leaver) {
                    assert!(!health[rank as usize].is_dead(other), "rank {rank} of rank {other}");
                }
            }
        }
    }

    #[test]
    fn ranks_of_one_host_meet_as_ever() {
        for met in finish(meet(Reach::Hosts, [5, 5, 5], |_, apart| {
            assert!(!apart);
            Ok(())
        })) {
            assert!(met.is_none());
        }
    }

    #[test]
    fn windows_do_not_reach_another_host() {
        for (rank, met) in (0..).zip(meet(Reach::OneHost, [5, 6, 5], |_, _| Ok(()))) {
            let error = met.err().unwrap();
            assert_eq!(error.status, Status::Mismatch, "rank {rank}: {error}");
            assert!(
                error.message.contains("windows reach no other) is 5 on rank 0 and 6 on rank 1"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_rank_that_can_not_reach_other_hosts_tells_the_others() {
        let unable = || Error::unsupported("rank 2: no libnccl.so.2");
        let met = meet(Reach::Hosts, [5, 6, 5], |rank, _| if rank == 2 { Err(unable()) } else { Ok(()) });
        let met: Vec<_> = met.into_iter().map(Mutex::new).collect();
        let outcomes = of_all(|rank| {
            let met = std::mem::replace(&mut *met[rank as usize].lock().unwrap(), Err(unable()));
            met.and_then(|met| met.finish(Ok(())).map(|_| ())).unwrap_err()
        });
        for error in outcomes {
            assert!(error.message.contains("no libnccl.so.2"), "{error}");
        }
    }

    #[test]
    fn ranks_of_several_hosts_meet_by_an_all_gather_alone() {
        let all = in_memory();
        let outcome = |failing: Option<u32>| {
            of_all(|rank| {
                let party = party(rank, Reach::Hosts, [5, 5, 6]);
                let gather = &all[rank as usize];
                let (_, apart) = allgather::agree(gather, &party)?;
                assert!(apart, "rank {rank}");
                let met = allgather::gather(gather, &party, |_| Ok(vec![9; 128]), |_| Ok(vec![]))?;
                assert_eq!(met.gift, [9; 128]);
                assert!(matches!(met.finish, Finish::Together { .. }));
                let mine = if failing == Some(rank) { Err(Error::internal("it could not")) } else { Ok(()) };
                met.finish(mine).map(|ties| assert!(ties.is_none()))
            })
        };
        assert!(outcome(None).into_iter().all(|outcome| outcome.is_ok()));
        for error in outcome(Some(1)) {
            assert!(error.unwrap_err().message.contains("it could not"));
        }
    }

    #[test]
    fn an_all_gather_tells_of_hosts_that_windows_do_not_reach() {
        let all = in_memory();
        let outcomes =
            of_all(|rank| allgather::agree(&all[rank as usize], &party(rank, Reach::OneHost, [5, 5, 6])));
        for outcome in outcomes {
            let error = outcome.err().unwrap();
            assert!(error.message.contains("windows reach no other"), "{error}");
        }
    }
}
