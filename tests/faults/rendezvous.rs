//! Creating a comm where something is wrong: ranks that differ, never come, come twice, are refused or die; strangers,
//! wrong keys, other versions, silence, floods and lies at rank 0's door; and the caller's own all-gather.

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Barrier, Mutex};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use a2a::abi::calls::a2a_unique_id_from_address;
use a2a::abi::types::*;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use super::common::*;
use super::*;

type Spoil = fn(&mut a2a_config_t);

/// What every rank must agree on: its name, and how one rank comes to have another.
const FIELDS: [(&str, Spoil); 15] = [
    ("flags", |config| config.flags = A2A_CONFIG_REMOTE),
    ("num_experts", |config| config.num_experts = 7),
    ("max_topk", |config| config.max_topk = 3),
    ("max_hidden", |config| config.max_hidden = 64),
    ("max_tokens", |config| config.max_tokens = 17),
    ("num_slots", |config| config.num_slots = 1),
    ("fifo_rows", |config| config.fifo_rows = 3),
    ("backend", |config| config.backend = A2A_BACKEND_ALLGATHER_REDUCESCATTER),
    ("layout", |config| config.layout = A2A_LAYOUT_RANK_MAJOR),
    ("token_dtype", |config| config.token_dtype = A2A_DTYPE_BF16),
    ("combine_dtype", |config| config.combine_dtype = A2A_DTYPE_F16),
    ("combine_hidden", |config| config.combine_hidden = 64),
    ("max_scale_bytes", |config| config.max_scale_bytes = 4),
    ("extra_row_bytes[3]", |config| config.extra_row_bytes[3] = 8),
    ("expert_owner", |config| config.expert_owner = const { &[1, 0, 0, 1, 2, 2, 3, 3] }.as_ptr()),
];

/// Ranks that differ in one field, `late` long after the others: all are told which field.
pub fn configs_differ(odd: usize, late: Option<usize>) -> Result<(), String> {
    for (name, spoil) in FIELDS {
        let outcomes = create(&seats(RANKS, GroupId::new()), |seat| {
            let mut config = settings(seat, Pair::OneSided);
            // A table on all sides, so that it is the table that differs.
            config.placement = A2A_PLACEMENT_TABLE;
            config.expert_owner = const { &[0, 0, 1, 1, 2, 2, 3, 3] }.as_ptr();
            if seat.rank == odd {
                spoil(&mut config);
            }
            if late == Some(seat.rank) {
                sleep(Duration::from_millis(100));
            }
            config
        });
        for (rank, outcome) in outcomes.iter().enumerate() {
            refused(outcome, A2A_MISMATCH, &[name, "rank 0"])
                .map_err(|error| format!("{name} differs, rank {rank}: {error}"))?;
            in_time("told that configs differ", outcome.1, PROMISE)?;
        }
    }
    Ok(())
}

fn refused(outcome: &Created, status: a2a_status_t, words: &[&str]) -> Result<(), String> {
    let (Err(Failure { status: got, text }), took) = outcome else { return Err("a comm was made".into()) };
    if *got == status && words.iter().all(|word| text.contains(word)) {
        return Ok(());
    }
    let (want, got) = (status_name(status), status_name(*got));
    Err(format!("expected {want} with {words:?}, got {got} after {took:?}: {text:?}"))
}

/// Some ranks never come: the deadline holds, and rank 0 says who.
pub fn ranks_that_never_come(missing: &[usize]) -> Result<(), String> {
    let setup = Duration::from_millis(1000);
    let mut seats = seats(RANKS, GroupId::new());
    seats.retain(|seat| !missing.contains(&seat.rank));
    let outcomes = create(&seats, |seat| a2a_config_t {
        setup_timeout_ms: setup.as_millis() as i64,
        ..settings(seat, Pair::OneSided)
    });
    let names: Vec<String> = missing.iter().map(usize::to_string).collect();
    let names = format!("ranks {}", names.join(", "));
    for (seat, outcome) in seats.iter().zip(&outcomes) {
        let words: &[&str] = match seat.rank {
            0 => &[&names, "1000 ms"],
            _ if missing.contains(&0) => &["rank 0", "1000 ms"],
            _ => &["1000 ms"],
        };
        refused(outcome, A2A_TIMEOUT, words)?;
        let took = outcome.1;
        in_time("a group that is not complete (1 s is the deadline)", took, setup + PROMISE)?;
        // The others hear of rank 0's deadline, which may have begun before theirs.
        let own_deadline = seat.rank == 0 || missing.contains(&0);
        if own_deadline && took < setup {
            return Err(format!("rank {} gave up after {took:?}", seat.rank));
        }
    }
    Ok(())
}

/// Ranks come, one of them is refused alone, then the last one comes and the group is whole.
fn one_is_refused(first: Vec<Seat>, last: Seat, status: a2a_status_t, words: &[&str]) -> Result<(), String> {
    let (send, outcomes) = channel();
    let members = scope(|scope| {
        for seat in &first {
            let send = send.clone();
            scope.spawn(move || {
                let begun = Instant::now();
                let outcome = Member::join(seat, Pair::OneSided, false);
                // Nobody listens any more once the case has failed.
                let _ = send.send((outcome, begun.elapsed()));
            });
        }
        let next = || outcomes.recv().expect("every rank says how it went");
        let (refusal, took) = next();
        refused(&(refusal.map(|member| member.comm), took), status, words)?;
        in_time("a rank that is refused", took, PROMISE)?;
        let mut members = vec![Member::join(&last, Pair::OneSided, false)?];
        for _ in 1..first.len() {
            members.push(next().0?);
        }
        Ok::<_, String>(members)
    })?;
    all_fine("a step", &together(&all(&members), |m| m.step(0, 1)))
}

pub fn a_rank_comes_twice(twice: usize) -> Result<(), String> {
    let mut first = seats(RANKS, GroupId::new());
    let last = first.pop().expect("four ranks");
    first.push(first[twice].clone());
    match twice {
        0 => one_is_refused(first, last, A2A_INVALID_ARGUMENT, &["rank 0", "in use"]),
        _ => {
            one_is_refused(first, last, A2A_INVALID_ARGUMENT, &[&format!("rank {twice} has joined already")])
        }
    }
}

/// An address that nobody listens on, nor will: a host of this process alone, since a port that was let go on 127.0.0.1
/// may be somebody's connection a moment later.
pub fn free_address() -> Result<String, String> {
    let [.., high, middle, low] = std::process::id().to_be_bytes();
    let host = format!("127.{}.{middle}.{low}:0", 1 + high % 254);
    let listener = TcpListener::bind(host).map_err(|error| error.to_string())?;
    listener.local_addr().map(|address| address.to_string()).map_err(|error| error.to_string())
}

pub fn id_of(address: &str, key: &str) -> Result<GroupId, String> {
    let text = |text: &str| CString::new(text).expect("no NUL");
    let (address, key) = (text(address), text(key));
    let mut id = a2a_unique_id_t { bytes: [0; 128] };
    // SAFETY: NUL-terminated strings and a valid out-pointer.
    check(unsafe { a2a_unique_id_from_address(address.as_ptr(), key.as_ptr(), &mut id) })?;
    Ok(GroupId(id))
}

/// A stranger with another key claims rank 2 before rank 2 comes.
pub fn the_wrong_key() -> Result<(), String> {
    let address = free_address()?;
    let mut first = seats(RANKS, id_of(&address, "the right key")?);
    let last = first.pop().expect("four ranks");
    first.push(Seat { id: id_of(&address, "a wrong key")?, ..first[2].clone() });
    one_is_refused(first, last, A2A_MISMATCH, &["rank 2", "does not know the group's key"])
}

/// Whatever talks to rank 0's port, the group forms.
pub fn garbage_at_the_door() -> Result<(), String> {
    let address = free_address()?;
    let seats = seats(RANKS, id_of(&address, "key")?);
    let comms = scope(|scope| {
        let root = scope.spawn(|| Member::join(&seats[0], Pair::Gather, false));
        let mut rng = Rng::new(&[seed(), 3]);
        let mut too_long = u32::MAX.to_le_bytes().to_vec();
        too_long.push(2);
        // A JOIN (kind 2) of no bytes, one of a length never sent in full, one of noise.
        let noise = [&[200, 0, 0, 0, 2][..], &rng.bytes(200)].concat();
        let said: [&[u8]; 7] = [
            b"",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            &too_long,
            &[0, 0, 0, 0, 2],
            &[100, 0, 0, 0, 2, 1],
            &noise,
            &rng.bytes(100_000),
        ];
        let mut open = Vec::new();
        for bytes in said {
            let mut stream = knock(&address)?;
            // Being thrown out while still talking is one of the ways this may end.
            let _ = stream.write_all(bytes);
            open.push(stream);
        }
        // One that hangs up, the others stay.
        drop(knock(&address)?);
        let mut members = members(&seats[1..], Pair::Gather)?;
        members.push(root.join().expect("no panic in a2a_create")?);
        Ok::<_, String>(members)
    })?;
    all_fine("a step", &together(&all(&comms), |m| m.step(0, 1)))
}

/// Connects as soon as somebody listens.
pub fn knock(address: &str) -> Result<TcpStream, String> {
    let limit = Instant::now() + DEADLINE;
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > limit => return Err(format!("nobody listens: {error}")),
            Err(_) => sleep(Duration::from_millis(5)),
        }
    }
}

/// A rank that may not have the memory says both numbers, and the others hear of it.
fn a_memory_limit_too_small(odd: usize) -> Result<(), String> {
    let seats = seats(RANKS, GroupId::new());
    let total = query_memory(&settings(&seats[odd], Pair::OneSided))?.total_bytes;
    let outcomes = create(&seats, |seat| {
        let memory_limit = if seat.rank == odd { total - 1 } else { total };
        a2a_config_t { memory_limit, ..settings(seat, Pair::OneSided) }
    });
    let rank = format!("rank {odd}");
    for (seat, outcome) in seats.iter().zip(&outcomes) {
        if seat.rank == odd {
            refused(outcome, A2A_OUT_OF_MEMORY, &[&rank, &total.to_string(), &(total - 1).to_string()])?;
        } else {
            refused(outcome, A2A_PEER_LOST, &[&rank, "memory_limit"])?;
        }
        in_time("told of a rank without memory", outcome.1, PROMISE)?;
    }
    Ok(())
}

/// A process is killed while the group forms: as soon as it has joined, or (`welcomed`) when all have and it is due
/// to send its window; then rank 1 is slow and finds the group gone.
fn killed_in_rendezvous(victim: usize, welcomed: bool) -> Result<(), String> {
    let mut group = Group::spawn(Pair::OneSided, false);
    let id = GroupId::new();
    let mut joined = vec![0, 2, 1];
    group.tell_join(&[0, 1, 2], RANKS, id)?;
    has_joined(&group, 1)?;
    has_joined(&group, 2)?;
    if welcomed {
        group.workers[victim].stop();
        group.workers[1].stop();
        group.tell(3, &join(3, RANKS, group.pair, group.views, id))?;
        joined.insert(0, 3);
        has_joined(&group, 3)?;
    }
    group.workers[victim].kill();
    let mut struck = now();
    joined.retain(|rank| *rank != victim);
    for &rank in &joined {
        if welcomed && rank == 1 {
            group.workers[1].go_on();
            struck = now();
        }
        let outcome = group.answer(rank)?;
        let told = outcome.is(A2A_PEER_LOST, &[&format!("rank {victim}")]);
        told.map_err(|error| format!("rank {rank}: {error}"))?;
        in_time("told of a death in a2a_create", outcome.ended.saturating_sub(struck), PROMISE)?;
    }
    group.join(&joined)?;
    group.step(&joined, 0, 1)
}

/// Returns once rank 0 has let this rank in.
fn has_joined(group: &Group, rank: usize) -> Result<(), String> {
    let line = format!("rank {rank} of {RANKS} has joined");
    let limit = Instant::now() + DEADLINE + GRACE;
    while !group.workers[0].stderr().contains(&line) {
        if Instant::now() > limit {
            return Err(format!("rank 0 never said {line:?}"));
        }
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ one is refused

/// A rank that thinks the group has another size is refused alone, whichever comes first.
pub fn another_size(odd: usize) -> Result<(), String> {
    let mut first = seats(RANKS, GroupId::new());
    let last = first.pop().expect("four ranks");
    first.push(Seat { world: 5, ..first[odd].clone() });
    one_is_refused(first, last, A2A_MISMATCH, &["num_ranks is 4 on rank 0 and 5 on rank"])
}

/// Where it is rank 0 that has another size, nobody fits: all are told, and rank 0 says who was there.
pub fn rank_0_has_another_size() -> Result<(), String> {
    let seats = seats(RANKS, GroupId::new());
    let outcomes = create(&seats, |seat| {
        let mut config = settings(seat, Pair::OneSided);
        config.setup_timeout_ms = 1000;
        if seat.rank == 0 {
            config.num_ranks = 5;
        }
        config
    });
    for (rank, outcome) in outcomes.iter().enumerate() {
        let each = [1, 2, 3].map(|rank| format!("num_ranks is 5 on rank 0 and 4 on rank {rank}"));
        match rank {
            0 => refused(outcome, A2A_TIMEOUT, &["ranks 1, 2, 3, 4 of 5", &each[0], &each[1], &each[2]])?,
            _ => refused(outcome, A2A_MISMATCH, &[&each[rank - 1]])?,
        }
    }
    Ok(())
}

/// A rank whose own config is refused says so to the others, rank 0 as well as any.
fn a_config_of_its_own_is_refused(
    odd: usize,
    spoil: Spoil,
    status: a2a_status_t,
    words: &[&str],
) -> Result<(), String> {
    let outcomes = create(&seats(RANKS, GroupId::new()), |seat| {
        let mut config = settings(seat, Pair::OneSided);
        if seat.rank == odd {
            spoil(&mut config);
        }
        config
    });
    for (rank, outcome) in outcomes.iter().enumerate() {
        let status = if rank == odd { status } else { A2A_PEER_LOST };
        refused(outcome, status, &[&[&format!("rank {odd}: ")[..]], words].concat())
            .map_err(|error| format!("rank {rank}: {error}"))?;
        in_time("told of a config that is refused", outcome.1, PROMISE + Duration::from_secs(1))?;
    }
    Ok(())
}

/// An address that more than this host can reach is taken only by who says so.
fn addresses_beyond_loopback() -> Result<(), String> {
    let port = free_address()?.rsplit_once(':').expect("host:port").1.to_string();
    let anywhere = id_of(&format!("0.0.0.0:{port}"), "key")?;
    let mut seats = seats(2, anywhere);
    for outcome in &create(&seats, |seat| settings(seat, Pair::OneSided)) {
        refused(outcome, A2A_INVALID_ARGUMENT, &["0.0.0.0", "no loopback address", "A2A_CONFIG_REMOTE"])?;
    }
    // The peer says where it goes; the address is the same.
    seats[1].id = id_of(&format!("127.0.0.1:{port}"), "key")?;
    let comms =
        create(&seats, |seat| a2a_config_t { flags: A2A_CONFIG_REMOTE, ..settings(seat, Pair::OneSided) });
    comms.into_iter().try_for_each(|(comm, _)| comm.map(drop)).map_err(Into::into)
}

fn a_name_that_nobody_knows() -> Result<(), String> {
    let seats = seats(2, id_of("no-such-host.invalid:4711", "key")?);
    for outcome in
        &create(&seats, |seat| a2a_config_t { setup_timeout_ms: 1000, ..settings(seat, Pair::OneSided) })
    {
        let Err(failure) = &outcome.0 else { return Err("a name of nobody was found".into()) };
        // A resolver that is slow to know it is stopped at the deadline.
        let known = [A2A_SYSTEM_ERROR, A2A_TIMEOUT].contains(&failure.status);
        if !known || !failure.text.contains("no-such-host.invalid") {
            return Err(failure.to_string());
        }
        in_time(
            "told of a name that nobody knows (1 s is the deadline)",
            outcome.1,
            Duration::from_secs(1) + PROMISE,
        )?;
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------ strangers and liars

/// Speaks the protocol without the library: what it says is written down here from its description.
struct Stranger {
    stream: TcpStream,
    key: [u8; 16],
}

const NONCE: [u8; 16] = [0x5a; 16];

impl Stranger {
    fn knock(address: &str, key: &str) -> Result<Stranger, String> {
        let digest = Sha256::digest(key.as_bytes());
        let stream = knock(address)?;
        stream.set_read_timeout(Some(DEADLINE + PROMISE)).map_err(|error| error.to_string())?;
        Ok(Stranger { stream, key: digest[..16].try_into().expect("16 bytes") })
    }

    /// A frame: its kind and its body.
    fn hear(&mut self) -> Result<(u8, Vec<u8>), String> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head).map_err(|error| format!("no frame came: {error}"))?;
        let mut body = vec![0; u32::from_le_bytes(head[..4].try_into().expect("4 bytes")) as usize];
        self.stream.read_exact(&mut body).map_err(|error| format!("no body came: {error}"))?;
        Ok((head[4], body))
    }

    fn signed(&self, purpose: &str, nonce: &[u8], body: &[u8]) -> Vec<u8> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("any length");
        for part in [purpose.as_bytes(), nonce, body] {
            mac.update(part);
        }
        [body, &mac.finalize().into_bytes()].concat()
    }

    /// A JOIN's head.
    fn head(protocol: u32, rank: u32, version: u64) -> Vec<u8> {
        let words = [protocol, rank, RANKS as u32].map(u32::to_le_bytes).concat();
        [&b"a2a.join"[..], &words, &NONCE, &version.to_le_bytes()].concat()
    }

    /// What rank 0 answers to a JOIN.
    fn join(&mut self, head: &[u8]) -> Result<String, String> {
        let (CHALLENGE, challenge) = self.hear()? else { return Err("no challenge came".into()) };
        let body = self.signed("join", &challenge, head);
        self.stream.write_all(&frame(JOIN, &body)).map_err(|error| error.to_string())?;
        let (kind, body) = self.hear()?;
        let said = body.split_at(body.len().saturating_sub(32)).0;
        if kind != FAIL || self.signed("fail", &NONCE, said) != body {
            return Err(format!("a proven FAIL was due, message {kind} came: {body:?}"));
        }
        Ok(String::from_utf8_lossy(&said[4..]).into_owned())
    }
}

const CHALLENGE: u8 = 1;
const JOIN: u8 = 2;
const WELCOME: u8 = 3;
const FAIL: u8 = 6;

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_le_bytes()[..], &[kind], body].concat()
}

/// The group forms while strangers do their worst; `strangers` runs once rank 0 waits at the address.
fn beside(strangers: impl FnOnce(&str) -> Result<(), String>) -> Result<(), String> {
    let address = free_address()?;
    let seats = seats(RANKS, id_of(&address, "key")?);
    let crew = scope(|scope| {
        let root = scope.spawn(|| Member::join(&seats[0], Pair::OneSided, false));
        strangers(&address)?;
        let mut crew = members(&seats[1..], Pair::OneSided)?;
        crew.push(root.join().expect("no panic in a2a_create")?);
        Ok::<_, String>(crew)
    })?;
    all_fine("a step", &together(&all(&crew), |m| m.step(0, 1)))
}

/// Ranks of other versions know the key and are told both versions; the group forms without them.
pub fn another_version() -> Result<(), String> {
    beside(|address| {
        for (protocol, version) in [(3, 7_008_009), (4, 1000), (2, 1000)] {
            let mut other = Stranger::knock(address, "key")?;
            // What follows a version that is not ours is not looked at.
            let said = other.join(&[Stranger::head(protocol, 2, version), vec![9; 40]].concat())?;
            let own = format!("{} (rendezvous protocol 3) on rank 0", env!("CARGO_PKG_VERSION"));
            let (major, rest) = (version / 1_000_000, version % 1_000_000);
            let theirs = format!("{major}.{}.{} ({protocol}) on rank 2", rest / 1000, rest % 1000);
            if !said.contains(&own) || !said.contains(&theirs) {
                return Err(format!("told {said:?}, {own:?} and {theirs:?} were due"));
            }
        }
        Ok(())
    })
}

/// A JOIN that comes a byte at a time is heard when it is whole.
fn a_slow_socket() -> Result<(), String> {
    beside(|address| {
        let mut slow = Stranger::knock(address, "key")?;
        let (CHALLENGE, challenge) = slow.hear()? else { return Err("no challenge came".into()) };
        let bytes = frame(JOIN, &slow.signed("join", &challenge, &Stranger::head(9, 1, 1000)));
        for byte in bytes {
            slow.stream.write_all(&[byte]).map_err(|error| error.to_string())?;
            sleep(Duration::from_millis(2));
        }
        let (kind, _) = slow.hear()?;
        if kind == FAIL { Ok(()) } else { Err(format!("message {kind} came")) }
    })
}

/// What one connection was told does not prove another.
fn a_join_that_is_replayed() -> Result<(), String> {
    beside(|address| {
        let mut first = Stranger::knock(address, "key")?;
        let (_, challenge) = first.hear()?;
        let join = first.signed("join", &challenge, &Stranger::head(2, 2, 1000));
        drop(first);
        let mut second = Stranger::knock(address, "key")?;
        second.hear()?;
        second.stream.write_all(&frame(JOIN, &join)).map_err(|error| error.to_string())?;
        let (kind, body) = second.hear()?;
        let said = String::from_utf8_lossy(&body).into_owned();
        if kind == FAIL && said.contains("does not know the group's key") { Ok(()) } else { Err(said) }
    })
}

/// More silent connections than rank 0 takes at a time: ranks get in all the same, as the silent ones are let go.
fn a_flood_of_silence() -> Result<(), String> {
    let open = Mutex::new(Vec::new());
    beside(|address| {
        for _ in 0..200 {
            open.lock().unwrap().push(knock(address)?);
        }
        Ok(())
    })
}

/// Connections without end do not keep rank 0 from looking at its deadline.
fn a_flood_does_not_move_the_deadline() -> Result<(), String> {
    let address = free_address()?;
    let seats = seats(2, id_of(&address, "key")?);
    let setup = Duration::from_secs(1);
    let done = AtomicBool::new(false);
    let outcome = scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // Refused once rank 0 has ended.
                    let _ = TcpStream::connect(&address).and_then(|mut stream| stream.write_all(b"x"));
                }
            });
        }
        let config = a2a_config_t {
            setup_timeout_ms: setup.as_millis() as i64,
            ..settings(&seats[0], Pair::OneSided)
        };
        let begun = Instant::now();
        let outcome = (Comm::create(&config), begun.elapsed());
        done.store(true, Ordering::Relaxed);
        outcome
    });
    refused(&outcome, A2A_TIMEOUT, &["ranks 1 of 2 did not join within 1000 ms"])?;
    in_time("a deadline in a flood of connections (1 s is the deadline)", outcome.1, setup + PROMISE)
}

/// Whoever listens at the address without the key is not believed: its welcome is refused, its reasons are marked.
fn who_is_not_rank_0() -> Result<(), String> {
    for (kind, words) in [
        (WELCOME, ["does not know the group's key", "rank 1"]),
        (FAIL, ["go home (said by who did not prove the group's key)", "rank 1"]),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
        let address = listener.local_addr().map_err(|error| error.to_string())?.to_string();
        let seat = seats(2, id_of(&address, "key")?).remove(1);
        let outcome = scope(|scope| {
            let liar = scope.spawn(|| -> Result<(), std::io::Error> {
                let (mut stream, _) = listener.accept()?;
                stream.write_all(&frame(CHALLENGE, &NONCE))?;
                let said = if kind == FAIL { b"\x12\0\0\0go home".to_vec() } else { vec![7; 16] };
                stream.write_all(&frame(kind, &[said, vec![1; 32]].concat()))?;
                // Stays until the other side has gone.
                stream.read_to_end(&mut Vec::new()).map(drop)
            });
            let begun = Instant::now();
            let outcome = (Comm::create(&settings(&seat, Pair::OneSided)), begun.elapsed());
            liar.join().expect("no panic").map_err(|error| error.to_string())?;
            Ok::<_, String>(outcome)
        })?;
        refused(&outcome, A2A_MISMATCH, &words)?;
        in_time("told of who is not rank 0", outcome.1, PROMISE)?;
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------ out of descriptors

/// A process of its own: its limit of open files is lowered.
pub const FEW_FILES: (&str, Job) = ("few_files", few_files);

/// With a few descriptors more each time, a group of threads ends whole or not at all, and in time.
fn few_files(_: &Seat) -> Result<(), String> {
    let setup = Duration::from_secs(1);
    let join = || {
        let setup_timeout_ms = setup.as_millis() as i64;
        create(&seats(RANKS, GroupId::new()), |seat| a2a_config_t {
            setup_timeout_ms,
            ..settings(seat, Pair::OneSided)
        })
    };
    // What the first use of anything opens for good.
    drop(join());
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid out-pointer.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    let open = footprint()?[0] as u64;
    let (mut whole, mut none) = (0, 0);
    for more in (0..).step_by(3) {
        let few = libc::rlimit { rlim_cur: open + more, ..limit };
        // SAFETY: a valid pointer.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &few) };
        let begun = Instant::now();
        let outcomes = join();
        let took = begun.elapsed();
        // SAFETY: as above.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
        in_time(
            "a group without descriptors (10 s are the deadline)",
            took,
            Duration::from_secs(10) + PROMISE,
        )?;
        if outcomes.iter().all(|(outcome, _)| outcome.is_ok()) {
            whole += 1;
            if whole == 3 {
                break;
            }
            continue;
        }
        none += 1;
        for (rank, (outcome, _)) in outcomes.iter().enumerate() {
            match outcome {
                Ok(_) => return Err(format!("{more} more files: rank {rank} has a comm, another has none")),
                Err(failure) if [A2A_OUT_OF_MEMORY, A2A_PEER_LOST, A2A_TIMEOUT].contains(&failure.status) => {
                }
                Err(failure) => return Err(format!("{more} more files: rank {rank}: {failure}")),
            }
        }
        if footprint()?[0] as u64 > open {
            return Err(format!("{more} more files: {} descriptors stay, {open} were open", footprint()?[0]));
        }
    }
    if none < 10 { Err(format!("only {none} groups ran out of descriptors")) } else { Ok(()) }
}

// ---------------------------------------------------------------------------------------- the caller's all-gather

/// An all-gather of threads.
struct Gather {
    blocks: Mutex<BTreeMap<usize, Vec<u8>>>,
    barrier: Barrier,
}

/// One rank's use of it, and what it does wrong.
struct Caller<'a> {
    gather: &'a Gather,
    rank: usize,
    lie: Lie,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    None,
    /// Returns 3.
    Fails,
    /// Brings zeros from rank 1.
    Loses,
    /// Brings rank 1's block as rank 2's.
    Swaps,
}

unsafe extern "C" fn all_gather(
    send: *const c_void,
    recv: *mut c_void,
    bytes: usize,
    user: *mut c_void,
) -> i32 {
    // SAFETY: what `by_allgather` passed; buffers as a2a_allgather_fn says.
    let (caller, mine, all) = unsafe {
        (
            &*(user as *const Caller),
            std::slice::from_raw_parts(send as *const u8, bytes),
            std::slice::from_raw_parts_mut(recv as *mut u8, RANKS * bytes),
        )
    };
    caller.gather.blocks.lock().unwrap().insert(caller.rank, mine.to_vec());
    caller.gather.barrier.wait();
    for (rank, block) in caller.gather.blocks.lock().unwrap().iter() {
        all[rank * bytes..][..bytes].copy_from_slice(block);
    }
    match caller.lie {
        Lie::None => {}
        Lie::Fails => return 3,
        Lie::Loses => all[bytes..2 * bytes].fill(0),
        Lie::Swaps => all.copy_within(bytes..2 * bytes, 2 * bytes),
    }
    0
}

fn by_allgather(lie: Lie, spoil: impl Fn(usize, &mut a2a_config_t) + Sync) -> Vec<Created> {
    let gather = Gather { blocks: Mutex::default(), barrier: Barrier::new(RANKS) };
    let seats = seats(RANKS, GroupId(a2a_unique_id_t { bytes: [0; 128] }));
    let callers: Vec<Caller> = (0..RANKS).map(|rank| Caller { gather: &gather, rank, lie }).collect();
    // Addresses, so that they may cross to the ranks' threads.
    let users: Vec<usize> = callers.iter().map(|caller| caller as *const Caller as usize).collect();
    create(&seats, |seat| {
        let mut config = settings(seat, Pair::OneSided);
        config.bootstrap = A2A_BOOTSTRAP_ALLGATHER;
        config.allgather = Some(all_gather);
        config.allgather_user = users[seat.rank] as *mut c_void;
        spoil(seat.rank, &mut config);
        config
    })
}

fn an_allgather_brings_ranks_together() -> Result<(), String> {
    let comms = by_allgather(Lie::None, |_, _| {});
    let seats = seats(RANKS, GroupId::new());
    let crew = comms
        .into_iter()
        .zip(&seats)
        .map(|((comm, _), seat)| Member::new(seat, comm?, Pair::OneSided, false));
    let crew: Vec<Member> = crew.collect::<Result<_, Failure>>()?;
    all_fine("a step", &together(&all(&crew), |m| m.step(0, 1)))
}

/// Every field that differs is found in the one exchange, and named on every rank.
pub fn configs_differ_in_an_allgather(odd: usize) -> Result<(), String> {
    // The table needs another placement on all sides.
    for (name, spoil) in FIELDS.into_iter().filter(|(name, _)| *name != "expert_owner") {
        let outcomes = by_allgather(Lie::None, |rank, config| {
            if rank == odd {
                spoil(config)
            }
        });
        for (rank, outcome) in outcomes.iter().enumerate() {
            refused(outcome, A2A_MISMATCH, &[name, &format!("rank {odd}"), &format!("rank {rank}: ")])?;
        }
    }
    Ok(())
}

fn an_allgather_that_fails() -> Result<(), String> {
    for (lie, status, words) in [
        (Lie::Fails, A2A_SYSTEM_ERROR, "allgather returned 3"),
        (Lie::Loses, A2A_MISMATCH, "no block of liba2a from rank 1"),
        (Lie::Swaps, A2A_MISMATCH, "rank 1's block where rank 2's was due"),
    ] {
        for outcome in &by_allgather(lie, |_, _| {}) {
            refused(outcome, status, &[words])?;
        }
    }
    Ok(())
}

/// A rank that is refused by itself takes part in the collective all the same.
fn one_is_refused_in_an_allgather(odd: usize) -> Result<(), String> {
    let outcomes = by_allgather(Lie::None, |rank, config| {
        if rank == odd {
            config.max_topk = 99
        }
    });
    for (rank, outcome) in outcomes.iter().enumerate() {
        let status = if rank == odd { A2A_INVALID_ARGUMENT } else { A2A_PEER_LOST };
        refused(outcome, status, &[&format!("rank {odd}: max_topk is 99")])?;
        in_time("told of a config that is refused", outcome.1, PROMISE)?;
    }
    Ok(())
}

// --------------------------------------------------------------------------------------------------- the cases

pub fn cases(add: &mut impl FnMut(String, Run)) {
    let mut add = |name: &str, run: Run| add(format!("create/{name}"), run);
    for odd in [0, 2] {
        add(&format!("configs_differ/{odd}"), Box::new(move || configs_differ(odd, None)));
        add(&format!("memory_limit/{odd}"), Box::new(move || a_memory_limit_too_small(odd)));
        add(&format!("twice/{odd}"), Box::new(move || a_rank_comes_twice(odd)));
        add(&format!("killed/{odd}"), Box::new(move || killed_in_rendezvous(odd, false)));
        let topk: Run = Box::new(move || {
            let words = &["max_topk is 99"];
            a_config_of_its_own_is_refused(odd, |config| config.max_topk = 99, A2A_INVALID_ARGUMENT, words)
        });
        add(&format!("refused_by_itself/value/{odd}"), topk);
        let elastic: Run = Box::new(move || {
            a_config_of_its_own_is_refused(
                odd,
                |config| config.max_ranks = 8,
                A2A_UNSUPPORTED,
                &["max_ranks"],
            )
        });
        add(&format!("refused_by_itself/feature/{odd}"), elastic);
        add(
            &format!("allgather/configs_differ/{odd}"),
            Box::new(move || configs_differ_in_an_allgather(odd)),
        );
        add(&format!("allgather/refused/{odd}"), Box::new(move || one_is_refused_in_an_allgather(odd)));
    }
    add("killed/2/welcomed", Box::new(|| killed_in_rendezvous(2, true)));
    add("configs_differ/1/late", Box::new(|| configs_differ(1, Some(3))));
    for missing in [&[3][..], &[1, 2], &[0]] {
        add(&format!("never_come/{missing:?}"), Box::new(|| ranks_that_never_come(missing)));
    }
    add("another_size/1", Box::new(|| another_size(1)));
    add("another_size/0", Box::new(rank_0_has_another_size));
    add("another_version", Box::new(another_version));
    add("wrong_key", Box::new(the_wrong_key));
    add("garbage", Box::new(garbage_at_the_door));
    add("slow", Box::new(a_slow_socket));
    add("replayed", Box::new(a_join_that_is_replayed));
    add("flood/silent", Box::new(a_flood_of_silence));
    add("flood/deadline", Box::new(a_flood_does_not_move_the_deadline));
    add("not_rank_0", Box::new(who_is_not_rank_0));
    add("address/beyond_loopback", Box::new(addresses_beyond_loopback));
    add("address/unknown", Box::new(a_name_that_nobody_knows));
    add("few_files", Box::new(|| launch(FEW_FILES, 1, &[Host::Child(vec![0])], &[], LIMIT)));
    add("allgather/works", Box::new(an_allgather_brings_ranks_together));
    add("allgather/fails", Box::new(an_allgather_that_fails));
}
