//! Strangers at the address where ranks meet. What one sends to rank 0, in fragments, framed or not, must not keep the group
//! from forming; what one sends in rank 0's place must end rank 1's a2a_create with a status, and soon.
//!
//! The address is one of TCP, by a2a_unique_id_from_address. A message is a length of four bytes, little-endian, a byte
//! that says its kind, and as many bytes as the length says.
#![no_main]

use std::ffi::{CStr, CString};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use a2a::abi::calls::*;
use a2a::abi::types::*;
use a2a_fuzz::bytes::Bytes;
use libfuzzer_sys::fuzz_target;

/// Of a group that must form; and of one that cannot, which may say so this much later than its deadline.
const SETUP_MS: i64 = 20_000;
const SHORT_MS: i64 = 20;
const GRACE: Duration = Duration::from_secs(10);
const STRANGERS: usize = 3;
const FRAGMENTS: usize = 8;

fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    let place = Place::new();
    // Silence takes its time, so it is seldom.
    match bytes.byte() {
        0..160 => strangers(&place, &mut bytes, true),
        160..254 => impostor(&place, &mut bytes),
        _ => strangers(&place, &mut bytes, false),
    }
});

/// Where a group meets: an address of the loopback network, each time another one, for what has been closed keeps a pair of
/// addresses taken for a while.
struct Place {
    address: SocketAddr,
    id: a2a_unique_id_t,
}

impl Place {
    fn new() -> Place {
        static PORT: OnceLock<u16> = OnceLock::new();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let port = *PORT.get_or_init(|| {
            let any = TcpListener::bind("127.0.0.1:0").expect("a port");
            any.local_addr().expect("bound").port()
        });
        let number = NUMBER.fetch_add(1, Relaxed);
        let address = SocketAddr::from((
            Ipv4Addr::new(127, 0, (number / 250 % 250) as u8, (1 + number % 250) as u8),
            port,
        ));
        let (text, key) = (CString::new(address.to_string()).expect("no NUL"), c"the group's key");
        let mut id = a2a_unique_id_t { bytes: [0; 128] };
        // SAFETY: NUL-terminated strings and a valid out-pointer.
        assert_eq!(unsafe { a2a_unique_id_from_address(text.as_ptr(), key.as_ptr(), &mut id) }, A2A_SUCCESS);
        Place { address, id }
    }

    /// Creates and destroys a rank's comm: its status, and the sentence if it is no success.
    fn join(&self, rank: i32, setup_timeout_ms: i64) -> (a2a_status_t, String) {
        let mut config = std::mem::MaybeUninit::<a2a_config_t>::uninit();
        // SAFETY: room for the struct, all of which is written.
        let mut config = unsafe {
            assert_eq!(a2a_config_init(config.as_mut_ptr(), size_of::<a2a_config_t>()), A2A_SUCCESS);
            config.assume_init()
        };
        (config.rank, config.num_ranks, config.unique_id) = (rank, 2, self.id);
        (config.num_experts, config.max_topk, config.max_hidden, config.max_tokens) = (2, 1, 16, 1);
        config.setup_timeout_ms = setup_timeout_ms;
        let mut comm = null_mut();
        // SAFETY: valid pointers; the sentence is this thread's until its next call.
        unsafe {
            let status = a2a_create(&config, &mut comm);
            if status == A2A_SUCCESS {
                assert_eq!(a2a_destroy(comm), A2A_SUCCESS);
                return (status, String::new());
            }
            let text = CStr::from_ptr(a2a_last_error()).to_str().expect("a sentence is UTF-8").to_string();
            assert!(text.starts_with("a2a_create: rank ") && status != A2A_INTERNAL, "{status}: {text}");
            (status, text)
        }
    }

    /// Connects as soon as somebody listens.
    fn knock(&self) -> TcpStream {
        let limit = Instant::now() + GRACE;
        loop {
            match TcpStream::connect(self.address) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < limit, "nobody listens: {error}"),
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Some bytes of what a stranger says: a message, what looks like one, or neither.
fn fragment(bytes: &mut Bytes) -> Vec<u8> {
    let (style, kind) = (bytes.byte(), bytes.byte() % 9);
    let mut body = if style & 1 != 0 { b"a2a.join".to_vec() } else { Vec::new() };
    let length = match style & 6 {
        0 => bytes.byte() as usize,
        2 => 4 * bytes.byte() as usize,
        4 => 40 * bytes.byte() as usize,
        _ => bytes.below(8),
    };
    // What the bytes do not say is repeated: a long body costs no long input.
    let said: Vec<u8> = (0..1 + length.min(64)).map(|_| bytes.byte()).collect();
    body.extend(said.iter().cycle().take(length));
    if style & 8 != 0 {
        return body;
    }
    let said = match style >> 6 {
        0 | 1 => body.len() as u32,
        2 => (body.len() as u32).wrapping_add(bytes.byte() as u32),
        _ => bytes.word(),
    };
    [&said.to_le_bytes()[..], &[kind], &body].concat()
}

/// Says everything to a stream, in its own time, and what becomes of the connection is up to the bytes, too.
fn speak(stream: &mut TcpStream, bytes: &mut Bytes) {
    for _ in 0..1 + bytes.below(FRAGMENTS) {
        let said = fragment(bytes);
        let cut = bytes.byte() as usize % (said.len() + 1);
        // Being thrown out while still talking is one of the ways this may end.
        for part in [&said[..cut], &said[cut..]] {
            if stream.write_all(part).is_err() {
                return;
            }
            if bytes.odd() {
                std::thread::yield_now();
            }
        }
        if bytes.odd() {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        if bytes.odd() {
            let _ = stream.set_read_timeout(Some(Duration::from_millis(1)));
            let _ = stream.read(&mut [0; 64]);
        }
    }
}

/// Rank 0 waits, strangers come first. With `complete` rank 1 comes then, and the group must form.
fn strangers(place: &Place, bytes: &mut Bytes, complete: bool) {
    let start = Instant::now();
    let setup = if complete { SETUP_MS } else { SHORT_MS };
    std::thread::scope(|scope| {
        let root = scope.spawn(|| place.join(0, setup));
        let mut open = Vec::new();
        for _ in 0..bytes.below(STRANGERS + 1) {
            if !complete && root.is_finished() {
                break;
            }
            let mut stream = match complete {
                true => place.knock(),
                // Rank 0 may not listen yet, or no more.
                false => match TcpStream::connect(place.address) {
                    Ok(stream) => stream,
                    Err(_) => continue,
                },
            };
            speak(&mut stream, bytes);
            // Some hang up, some stay until the group has formed.
            if bytes.half() {
                open.push(stream);
            }
        }
        let peer = if complete { place.join(1, SETUP_MS) } else { (A2A_TIMEOUT, String::new()) };
        let root = root.join().expect("no panic in a2a_create");
        let due = if complete { A2A_SUCCESS } else { A2A_TIMEOUT };
        assert!(root.0 == due && peer.0 == due, "rank 0 got {root:?}, rank 1 {peer:?}, due was {due}");
    });
    assert!(start.elapsed() < GRACE, "it took {:?}", start.elapsed());
}

/// Somebody else listens where rank 0 should.
fn impostor(place: &Place, bytes: &mut Bytes) {
    let listener = TcpListener::bind(place.address).expect("an address of ours");
    let start = Instant::now();
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| place.join(1, SETUP_MS));
        let (mut stream, _) = listener.accept().expect("rank 1 connects");
        speak(&mut stream, bytes);
        drop((stream, listener));
        let (status, text) = peer.join().expect("no panic in a2a_create");
        assert!(status != A2A_SUCCESS, "rank 1 took a stranger for rank 0");
        assert!(
            matches!(status, A2A_MISMATCH | A2A_PEER_LOST | A2A_TIMEOUT | A2A_INVALID_ARGUMENT),
            "{status}: {text}"
        );
    });
    assert!(start.elapsed() < GRACE, "it took {:?}", start.elapsed());
}
