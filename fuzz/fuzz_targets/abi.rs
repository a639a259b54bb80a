//! Sequences of calls on one or two ranks, with structs of the wrong size, constants nobody knows, tensors that are not
//! what they should be, calls in the wrong order and handles that are gone.
//!
//! Both ranks read the same bytes; a call is made by both, or by one of them. Every call must come back in time with a
//! status of the header and, if that is no success, a sentence that begins with the function's name; none may panic, and
//! what is destroyed in the end must still be there. A pointer is NULL or points at as much memory as the struct it stands
//! in says: more cannot be checked by any library.
#![no_main]

use std::ffi::{CStr, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use a2a::abi::calls::*;
use a2a::abi::types::*;
use a2a_fuzz::bytes::Bytes;
use a2a_fuzz::memory::{Memory, copy};
use libfuzzer_sys::fuzz_target;

/// The longest deadline that a call is given, and what a loaded machine may add.
const DEADLINE_MS: i64 = 10;
const SETUP_MS: i64 = 160;
const GRACE: Duration = Duration::from_secs(8);
/// A tensor that says more than this has no data, or is refused before anybody looks.
const MOST_BYTES: i128 = 64 << 10;
const CALLS: usize = 24;

fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    let world = if bytes.half() { 2 } else { 1 };
    let mut id = a2a_unique_id_t { bytes: [0; 128] };
    // SAFETY: a valid out-pointer.
    check("a2a_get_unique_id", unsafe { a2a_get_unique_id(&mut id) });
    let shared = Shared::default();
    std::thread::scope(|scope| {
        let peer = (world > 1).then(|| {
            let (bytes, shared) = (bytes.clone(), &shared);
            scope.spawn(move || Rank::new(1, world, id, bytes, shared).run())
        });
        Rank::new(0, world, id, bytes, &shared).run();
        // The scope's end waits for the closure alone, not for what the thread then frees: its last sentence.
        if let Some(peer) = peer {
            peer.join().expect("no panic");
        }
    });
});

/// Handles that any rank may name, whoever's they are: live ones, and dead ones.
#[derive(Default)]
struct Shared {
    comms: Mutex<Vec<usize>>,
    routings: Mutex<Vec<usize>>,
}

unsafe extern "C" fn log_line(level: i32, message: *const c_char, user: *mut c_void) {
    assert!((A2A_LOG_ERROR..=A2A_LOG_DEBUG).contains(&level));
    // SAFETY: NUL-terminated, by the ABI.
    let line = unsafe { CStr::from_ptr(message) }.to_str().expect("UTF-8");
    assert!(!line.contains('\n'));
    // SAFETY: a static.
    unsafe { &*user.cast::<AtomicUsize>() }.fetch_add(1, Relaxed);
}
static LOGGED: AtomicUsize = AtomicUsize::new(0);

/// What every call must do, whatever it was given.
fn check(name: &str, status: a2a_status_t) -> bool {
    if status == A2A_SUCCESS {
        return true;
    }
    // SAFETY: static text, and this thread's own until its next call.
    let (known, text) =
        unsafe { (CStr::from_ptr(a2a_status_name(status)), CStr::from_ptr(a2a_last_error())) };
    let text = text.to_str().expect("a sentence is UTF-8");
    assert!(known != c"unknown status", "{name} returned {status} ({text})");
    assert!(text.len() > name.len() + 2 && text.starts_with(name), "{name}: {known:?} says {text:?}");
    assert!(status != A2A_INTERNAL, "{text}");
    false
}

/// One rank's reading of the bytes.
struct Rank<'a> {
    rank: i32,
    world: i32,
    id: a2a_unique_id_t,
    bytes: Bytes<'a>,
    shared: &'a Shared,
    memory: Memory,
    comm: *mut a2a_comm_t,
    /// Live and dead.
    routings: Vec<usize>,
    /// What the last dispatch, and the last a2a_combine_buffer, showed: data, element type, shape, strides.
    views: Vec<Seen>,
    config: a2a_config_t,
    capacity: i64,
    /// T and K of the last dispatch that was tried.
    last: (i64, i64),
    timeout: Duration,
}

/// A view as it was when it was shown.
struct Seen {
    tensor: a2a_tensor_t,
    shape: [i64; 3],
    strides: [i64; 3],
}

impl<'a> Rank<'a> {
    fn new(rank: i32, world: i32, id: a2a_unique_id_t, bytes: Bytes<'a>, shared: &'a Shared) -> Rank<'a> {
        let mut config = std::mem::MaybeUninit::<a2a_config_t>::uninit();
        // SAFETY: room for the struct; all of it is written.
        let config = unsafe {
            let size = size_of::<a2a_config_t>();
            assert!(check("a2a_config_init", a2a_config_init(config.as_mut_ptr(), size)));
            config.assume_init()
        };
        Rank {
            rank,
            world,
            id,
            bytes,
            shared,
            memory: Memory::default(),
            comm: null_mut(),
            routings: Vec::new(),
            views: Vec::new(),
            config,
            capacity: 0,
            last: (0, 1),
            timeout: Duration::ZERO,
        }
    }

    fn run(mut self) {
        self.config = self.some_config();
        let config = self.sized(copy(&self.config), 352);
        self.create(config);
        if !self.comm.is_null() {
            let mut info = a2a_info_t { struct_size: size_of::<a2a_info_t>(), ..INFO };
            // SAFETY: a struct of this size.
            assert!(check("a2a_get_info", unsafe { a2a_get_info(self.comm, &mut info) }));
            self.capacity = info.row_capacity;
            self.routing(0);
        }
        for _ in 0..CALLS {
            if self.bytes.is_empty() {
                break;
            }
            let call = self.bytes.byte();
            // Most calls are everybody's.
            let whose = self.bytes.byte();
            // What a call is made of is read by those who do not make it, too.
            let mine = whose < 224 || whose as i32 % 2 == self.rank;
            self.call(call, mine);
        }
        self.end();
    }

    /// Runs a call if it is this rank's, and checks what all calls promise.
    fn timed(&self, name: &str, mine: bool, call: impl FnOnce() -> a2a_status_t) -> bool {
        if !mine {
            return false;
        }
        let start = Instant::now();
        let success = check(name, call());
        let (took, limit) = (start.elapsed(), self.timeout + GRACE);
        assert!(took < limit, "{name} took {took:?}, its deadline is {:?}", self.timeout);
        success
    }

    fn call(&mut self, call: u8, mine: bool) {
        match call % 24 {
            // Of the 256 values of a byte, those past the last whole 24.
            _ if call >= 250 => self.recover(mine),
            _ if call >= 240 => self.history(mine),
            0..=6 => self.dispatch(mine),
            7..=12 => self.combine(mine),
            13 => self.combine_buffer(mine),
            14 => self.make_routing(mine),
            15 => self.drop_routing(mine),
            16 => self.set_timeout(mine),
            17 => self.results(mine),
            18 => self.abort(mine),
            19 => self.leave(mine),
            20 => self.plans(mine),
            21 => self.names(mine),
            22 => self.another_comm(mine),
            _ => self.config_init(mine),
        }
    }

    // ---------------------------------------------------------------------------------------- structs

    /// A struct in memory of its own, which says a size that may be wrong. No shorter than `v1` if it is to be believed.
    fn sized<T>(&mut self, mut value: T, v1: usize) -> *mut T {
        let true_size = size_of::<T>();
        let (said, tail) = match if self.bytes.odd() { 1 + self.bytes.below(8) } else { 0 } {
            0 => (true_size, 0),
            1 => (v1 + self.bytes.below(true_size - v1 + 1), 0),
            2 => (self.bytes.below(v1), 0),
            3 => (true_size + self.bytes.below(64), 0),
            4 => (true_size + 1 + self.bytes.below(64), self.bytes.byte()),
            5 => (65536, 0),
            6 => (65537, 0),
            7 => (usize::MAX, 0),
            _ if self.bytes.half() => return null_mut(),
            _ => return self.memory.zeroed(true_size, 4).cast(),
        };
        // SAFETY: every struct of the ABI that is given here begins with its size.
        unsafe { (&raw mut value).cast::<usize>().write_unaligned(said) };
        let real = if said > 65536 { true_size } else { said.max(8) };
        let at = self.memory.zeroed(real, 0);
        // SAFETY: as many bytes as both have.
        unsafe { at.copy_from_nonoverlapping((&raw const value).cast(), real.min(true_size)) };
        if tail != 0 {
            // SAFETY: a byte past what the library knows, inside the memory.
            unsafe { at.add(real - 1).write(tail) };
        }
        at.cast()
    }

    /// An int32 that is meant to be this one.
    fn int(&mut self, value: i32) -> i32 {
        if !self.bytes.odd() {
            return value;
        }
        match self.bytes.below(8) {
            0 => -1,
            1 => 0,
            2 => i32::MAX,
            3 => i32::MIN,
            4 => value.wrapping_add(1),
            5 => 99,
            6 => 1 << 16,
            _ => self.bytes.word() as i32,
        }
    }

    fn some_config(&mut self) -> a2a_config_t {
        let mut config = copy(&self.config);
        (config.placement, config.expert_owner) = (A2A_PLACEMENT_CONTIGUOUS, null());
        let pairs = [
            (A2A_BACKEND_NVLINK_ONE_SIDED, A2A_LAYOUT_AUTO),
            (A2A_BACKEND_ALLGATHER_REDUCESCATTER, A2A_LAYOUT_GATHERED),
            (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_FLAT),
            (A2A_BACKEND_HIGH_THROUGHPUT, A2A_LAYOUT_EXPERT_CONTIGUOUS),
            (A2A_BACKEND_LOW_LATENCY, A2A_LAYOUT_EXPERT_PADDED),
            (A2A_BACKEND_NVLINK_TWO_SIDED, A2A_LAYOUT_FLAT),
            (A2A_BACKEND_AUTO, A2A_LAYOUT_AUTO),
            (A2A_BACKEND_NIXL_ELASTIC, A2A_LAYOUT_AUTO),
        ];
        let (backend, layout) = self.bytes.pick(&pairs);
        config.backend = self.int(backend);
        config.layout = self.int(layout);
        config.rank = self.int(self.rank);
        config.num_ranks = self.int(self.world);
        config.unique_id = self.id;
        if self.bytes.odd() {
            let at = self.bytes.below(128);
            config.unique_id.bytes[at] ^= self.bytes.byte();
        }
        let (experts, topk, tokens) =
            (1 + self.bytes.below(9), 1 + self.bytes.below(4), 1 + self.bytes.below(8));
        config.num_experts = self.int(experts as i32);
        // What is legal stays small: the limit is another test's, and each expert of 65,536 costs what the fuzzer notes.
        if (513..=1 << 16).contains(&config.num_experts) {
            config.num_experts = 512;
        }
        config.max_topk = self.int(topk as i32);
        config.max_tokens = self.int(tokens as i32);
        config.token_dtype = self.bytes.pick(&[0, 1, 2, 3, 4, 5]);
        config.token_dtype = self.int(config.token_dtype);
        config.combine_dtype = self.bytes.pick(&[0, 1, 2, 3]);
        config.combine_dtype = self.int(config.combine_dtype);
        let hidden = self.bytes.pick(&[16, 32, 64, 144]);
        config.max_hidden = self.int(hidden);
        config.combine_hidden = self.bytes.pick(&[0, 0, 32]);
        config.quant = self.bytes.pick(&[0, 0, 1, 2]);
        config.quant = self.int(config.quant);
        config.scale_layout = if config.quant > 0 { self.bytes.pick(&[0, 1]) } else { 0 };
        config.scale_layout = self.int(config.scale_layout);
        config.max_scale_bytes = if config.quant == 0 { 16 } else { 0 };
        config.max_scale_bytes = self.int(config.max_scale_bytes);
        config.extra_row_bytes[0] = 8;
        config.extra_row_bytes[7] = self.int(4);
        let slots = self.bytes.pick(&[1, 2, 3, 0]);
        config.num_slots = self.int(slots);
        config.expert_alignment = match layout {
            A2A_LAYOUT_EXPERT_CONTIGUOUS => self.bytes.pick(&[0, 1, 4, 7]),
            _ => 0,
        };
        config.expert_alignment = self.int(config.expert_alignment);
        config.overflow = self.bytes.pick(&[0, 1]);
        config.overflow = self.int(config.overflow);
        config.max_recv_rows = match layout {
            A2A_LAYOUT_FLAT | A2A_LAYOUT_EXPERT_CONTIGUOUS | A2A_LAYOUT_EXPERT_PADDED => {
                self.bytes.pick(&[0, 0, 1, 3, 8])
            }
            _ => 0,
        };
        if self.bytes.odd() {
            config.max_recv_rows = self.bytes.pick(&[-1, i64::MAX, i64::MIN, 1 << 32, 5]);
        }
        config.fifo_rows =
            if backend == A2A_BACKEND_NVLINK_TWO_SIDED { self.bytes.pick(&[0, 2, 3]) } else { 0 };
        config.fifo_rows = self.int(config.fifo_rows);
        if self.bytes.byte() % 4 == 1 {
            config.placement = A2A_PLACEMENT_TABLE;
            let count = config.num_experts.clamp(0, 1 << 17) as usize;
            let mut owners: Vec<i32> =
                (0..count.min(64)).map(|_| self.bytes.below(self.world as usize) as i32).collect();
            owners.resize(count, 0);
            if let Some(owner) = owners.first_mut() {
                *owner = self.int(*owner);
            }
            // As long as num_experts says, or not there.
            let whole = config.num_experts <= 1 << 17;
            config.expert_owner = if whole { self.memory.of(&owners) } else { null() };
        }
        config.placement = self.int(config.placement);
        if config.num_experts > 1 << 17 {
            config.expert_owner = null();
        }
        config.device = self.int(config.device);
        config.device_ordinal = self.int(0);
        config.transport = self.int(0);
        config.max_ranks = self.int(0);
        config.ranks_per_device = self.int(0);
        config.max_sms = self.int(0);
        config.bootstrap = self.int(0);
        // Windows may be as large as the maxima say: they take no memory before they are written, and some of it then.
        config.memory_limit = self.bytes.pick(&[1 << 26, 1 << 26, 1 << 26, 4096]);
        config.flags = if self.bytes.odd() { self.bytes.word() as u64 } else { 0 };
        if self.bytes.odd() {
            config.nccl_comm = self.memory.zeroed(8, 0).cast();
        }
        if self.bytes.odd() {
            config.allgather_user = self.memory.zeroed(8, 0).cast();
        }
        config.setup_timeout_ms = SETUP_MS;
        config.first_step_timeout_ms = 1 + self.bytes.byte() as i64 % DEADLINE_MS;
        config.timeout_ms = 1 + self.bytes.byte() as i64 % DEADLINE_MS;
        if self.bytes.odd() {
            config.timeout_ms = self.bytes.pick(&[-1, i64::MIN, i64::MAX, 1]);
        }
        config
    }

    fn tensor(&mut self, dtype: (u8, u8), shape: &[i64]) -> *mut a2a_tensor_t {
        if self.bytes.byte() < 232 {
            let bytes = shape.iter().product::<i64>() as usize * dtype.1 as usize / 8;
            let data = self.memory.zeroed(bytes, 0);
            return self.tensor_at(dtype, shape, None, data);
        }
        let (mut dtype, mut shape) = (dtype, shape.to_vec());
        let mut lanes = 1u16;
        let (mut shift, mut device) = (0, A2A_DEVICE_CPU);
        let mut strides = None;
        let mut no_data = false;
        for _ in 0..1 + self.bytes.below(2) {
            let at = self.bytes.below(shape.len().max(1));
            let sizes = [0, -1, 1, 2, 3, 9, 17, i64::MIN, i64::MAX, 1 << 32, 1 << 40, 33];
            match self.bytes.below(12) {
                0 if !shape.is_empty() => shape[at] = self.bytes.pick(&sizes),
                1 => shape.push(self.bytes.pick(&sizes)),
                2 => drop(shape.pop()),
                3 => {
                    dtype = (
                        self.bytes.pick(&[0, 1, 2, 4, 10, 200]),
                        self.bytes.pick(&[8, 16, 32, 64, 4, 0, 255]),
                    )
                }
                4 => lanes = self.bytes.pick(&[0, 2, 4, u16::MAX]),
                5 => shift = self.bytes.pick(&[1, 2, 4, 8]),
                6 => device = self.bytes.pick(&[0, 2, 3, 13, -1, 7]),
                7 => no_data = true,
                8 => return null_mut(),
                9 => {
                    // Rows further apart; what lies between is memory, too.
                    let mut step = 1i64;
                    let gap = self.bytes.pick(&[0, 8, 16, 1, 3]);
                    let mut found: Vec<i64> = Vec::new();
                    for (dim, &size) in shape.iter().enumerate().rev() {
                        found.insert(0, step);
                        step = step.saturating_mul(size.clamp(1, 1 << 20));
                        step = step.saturating_add(if dim + 1 == shape.len() { gap } else { 0 });
                    }
                    strides = Some(found);
                }
                10 => {
                    let some = [0, 1, -1, 2, 16, 32, 64, i64::MIN, i64::MAX, 1 << 40];
                    strides = Some(shape.iter().map(|_| self.bytes.pick(&some)).collect());
                }
                _ => return self.seen(),
            }
        }
        shape.truncate(5);
        if let Some(strides) = &mut strides {
            strides.resize(shape.len(), 1);
        }
        // The bytes from the first element to the last, which must be there if the library is to look at any.
        let mut span = 1i128;
        let mut compact = 1i128;
        for (dim, &size) in shape.iter().enumerate().rev() {
            let stride = strides.as_ref().map_or(compact, |strides| strides[dim] as i128);
            span += (size as i128 - 1).max(0) * stride.max(0);
            compact = compact.saturating_mul(size.max(1) as i128);
        }
        let empty = shape.contains(&0);
        let element = (dtype.1 as i128 / 8 * lanes as i128).max(1);
        let bytes = if empty { 0 } else { span.saturating_mul(element) };
        let data = if no_data || bytes > MOST_BYTES {
            null_mut()
        } else {
            self.memory.zeroed(bytes as usize, shift)
        };
        let tensor = self.tensor_at(dtype, &shape, strides, data);
        // SAFETY: just made.
        unsafe {
            (*tensor).dtype.lanes = lanes;
            (*tensor).device.device_type = device;
            if self.bytes.odd() {
                (*tensor).ndim = self.bytes.pick(&[0, -1, i32::MAX, i32::MIN]);
            }
            if self.bytes.odd() {
                (*tensor).shape = null_mut();
            }
        }
        tensor
    }

    fn tensor_at(
        &mut self,
        (code, bits): (u8, u8),
        shape: &[i64],
        strides: Option<Vec<i64>>,
        data: *mut u8,
    ) -> *mut a2a_tensor_t {
        let tensor = a2a_tensor_t {
            data: data.cast(),
            device: a2a_tensor_device_t { device_type: A2A_DEVICE_CPU, device_id: 0 },
            ndim: shape.len() as i32,
            dtype: a2a_tensor_dtype_t { code, bits, lanes: 1 },
            shape: self.memory.of(shape),
            strides: strides.map_or(null_mut(), |strides| self.memory.of(&strides)),
            byte_offset: 0,
        };
        self.memory.of(&[tensor])
    }

    /// One of the views that were shown, as a tensor.
    fn seen(&mut self) -> *mut a2a_tensor_t {
        let at = self.bytes.byte() as usize;
        if self.views.is_empty() {
            return null_mut();
        }
        let seen = &self.views[at % self.views.len()];
        let (shape, strides) = (self.memory.of(&seen.shape), self.memory.of(&seen.strides));
        let tensor = a2a_tensor_t { shape, strides, ..copy(&seen.tensor) };
        self.memory.of(&[tensor])
    }

    fn view(&mut self) -> *mut a2a_tensor_t {
        self.tensor_at((0, 0), &[], None, null_mut())
    }

    /// Notes what a view shows, and reads all of it.
    fn note(&mut self, tensor: *const a2a_tensor_t) {
        // SAFETY: the library has just filled it, shape and strides included; it is the routing's, which is ours.
        unsafe {
            let tensor = tensor.read();
            if tensor.shape.is_null() || tensor.strides.is_null() || !(1..=3).contains(&tensor.ndim) {
                return;
            }
            let (mut shape, mut strides) = ([1; 3], [0; 3]);
            for dim in 0..tensor.ndim as usize {
                shape[dim] = *tensor.shape.add(dim);
                strides[dim] = *tensor.strides.add(dim);
            }
            // A tensor of ours has the strides we gave it, wild ones where they mean nothing.
            let counts = |dim: usize| shape[dim] > 1 && !shape.contains(&0);
            assert!(
                (0..3).all(|dim| shape[dim] >= 0 && (strides[dim] >= 0 || !counts(dim))),
                "a view of {shape:?} with strides {strides:?}"
            );
            if !shape.contains(&0) {
                let last: i64 = shape.iter().zip(strides).map(|(size, stride)| (size - 1) * stride).sum();
                let bytes = (last as usize + 1) * tensor.dtype.bits as usize / 8;
                for at in (0..bytes).step_by(64) {
                    tensor.data.cast::<u8>().add(at).read_volatile();
                }
                tensor.data.cast::<u8>().add(bytes - 1).read_volatile();
            }
            self.views.push(Seen { tensor, shape, strides });
        }
    }

    // ------------------------------------------------------------------------------------------ calls

    fn create(&mut self, config: *mut a2a_config_t) {
        let mut comm = null_mut();
        self.timeout = Duration::from_millis(SETUP_MS as u64);
        // SAFETY: as the file's first lines say.
        if self.timed("a2a_create", true, || unsafe { a2a_create(config, &mut comm) }) {
            assert!(!comm.is_null());
            self.comm = comm;
            self.shared.comms.lock().unwrap().push(comm as usize);
        } else {
            assert!(comm.is_null());
        }
        // The deadline of a step: no longer than this whatever the config says, see `set_timeout`.
        self.timeout = Duration::from_millis(DEADLINE_MS as u64);
    }

    /// This rank's comm, or what somebody could take for it.
    fn some_comm(&mut self) -> *mut a2a_comm_t {
        if !self.bytes.odd() {
            return self.comm;
        }
        let which = self.bytes.byte() as usize;
        let comms = self.shared.comms.lock().unwrap();
        match which {
            0 => null_mut(),
            1 => 8 as *mut a2a_comm_t,
            2 => self.routings.first().map_or(null_mut(), |&routing| routing as *mut a2a_comm_t),
            _ if comms.is_empty() => null_mut(),
            // Another rank's data are not to be touched from here: a step on its comm would be between its own.
            _ => comms[which % comms.len()] as *mut a2a_comm_t,
        }
    }

    fn some_routing(&mut self) -> *mut a2a_routing_t {
        let which = self.bytes.byte() as usize;
        if which < 224 {
            let count = self.routings.len().max(1);
            return self.routings.get(which % count).map_or(null_mut(), |&routing| routing as *mut _);
        }
        let routings = self.shared.routings.lock().unwrap();
        match which % 8 {
            0 => null_mut(),
            1 => 3 as *mut a2a_routing_t,
            2 => self.comm.cast(),
            _ if routings.is_empty() => null_mut(),
            _ => routings[which % routings.len()] as *mut a2a_routing_t,
        }
    }

    fn routing(&mut self, slot: i32) -> bool {
        let mut routing = null_mut();
        // SAFETY: a valid out-pointer.
        let made = self.timed("a2a_routing_create", true, || unsafe {
            a2a_routing_create(self.comm, slot, &mut routing)
        });
        if made {
            self.routings.push(routing as usize);
            self.shared.routings.lock().unwrap().push(routing as usize);
        }
        made
    }

    fn make_routing(&mut self, mine: bool) {
        let slot = self.bytes.pick(&[0, 1, 2]);
        let slot = self.int(slot);
        if mine && self.routings.len() < 6 {
            self.routing(slot);
        }
    }

    fn drop_routing(&mut self, mine: bool) {
        let at = self.bytes.byte() as usize;
        if let (true, Some(&routing)) = (mine, self.routings.get(at % self.routings.len().max(1))) {
            // Gone already, perhaps.
            // SAFETY: a handle, whatever became of it.
            self.timed("a2a_routing_destroy", true, || unsafe { a2a_routing_destroy(routing as *mut _) });
        }
    }

    fn dispatch(&mut self, mine: bool) {
        let config = copy(&self.config);
        let (bound, topk) = (config.max_tokens.clamp(1, 64) as i64, config.max_topk.clamp(1, 32) as i64);
        let hidden = config.max_hidden.clamp(1, 1024) as i64;
        let quantised = config.quant > 0;
        let type_of = |code: i32| match code {
            A2A_DTYPE_F16 => (2, 16),
            A2A_DTYPE_F32 => (2, 32),
            A2A_DTYPE_F8_E4M3 => (10, 8),
            A2A_DTYPE_U8 => (1, 8),
            _ => (4, 16),
        };
        let dtype = type_of(config.token_dtype);
        // A rank more, a token less.
        let tokens = (self.bytes.byte() as i64 + self.rank as i64) % (bound + 1);
        let topk = 1 + (self.bytes.byte() as i64 % topk);
        self.last = (tokens, topk);
        let style = self.bytes.byte();
        let phase = self.bytes.pick(&[A2A_PHASE_BOTH, A2A_PHASE_BOTH, A2A_PHASE_SEND, A2A_PHASE_RECV]);
        let mut input = a2a_dispatch_in_t {
            struct_size: 0,
            tokens: self.tensor(dtype, &[tokens, hidden]),
            topk_ids: null(),
            topk_weights: null(),
            scales: null(),
            extras: [null(); 8],
            rank_tokens: null(),
            max_tokens: self.int(0),
            phase: self.int(phase),
            flags: (self.bytes.pick(&[0, 0, 1, 2, 3, 8, 8, 4])) as u64,
            max_sms: self.int(0),
            reserved: self.int(0),
        };
        if self.bytes.odd() {
            input.flags = self.bytes.word() as u64;
        }
        if input.flags & A2A_DISPATCH_REUSE == 0 || style & 64 != 0 {
            let wide = style & 1 != 0;
            let ids = self.tensor((0, if wide { 64 } else { 32 }), &[tokens, topk]);
            self.fill_ids(ids, wide);
            input.topk_ids = ids;
        }
        if style & 2 != 0 {
            input.topk_weights = self.tensor((2, 32), &[tokens, topk]);
        }
        if style & 4 != 0 && (!quantised || dtype == (10, 8)) {
            let columns = if quantised { (hidden + 127) / 128 } else { 4 };
            input.scales = self.tensor((2, 32), &[tokens, columns]);
        }
        if style & 8 != 0 {
            input.extras[0] = self.tensor((0, 64), &[tokens]);
            input.extras[7] = self.tensor((1, 8), &[tokens, 4]);
        }
        if style & 16 != 0 {
            let first = tokens - self.rank as i64;
            let mut told: Vec<i32> = (0..self.world as i64)
                .map(|rank| ((first + rank + bound + 1) % (bound + 1)) as i32)
                .collect();
            told[0] = self.int(told[0]);
            input.rank_tokens = self.memory.of(&told);
        }

        let rows = match config.layout {
            A2A_LAYOUT_EXPERT_CONTIGUOUS | A2A_LAYOUT_EXPERT_PADDED => self.capacity,
            _ if config.max_recv_rows > 0 => config.max_recv_rows.min(self.world as i64 * bound),
            _ => self.world as i64 * bound,
        }
        .clamp(0, 4096);
        let by_expert = matches!(config.layout, A2A_LAYOUT_EXPERT_CONTIGUOUS | A2A_LAYOUT_EXPERT_PADDED);
        let padded = config.layout == A2A_LAYOUT_EXPERT_PADDED;
        let owns = config.backend == A2A_BACKEND_NVLINK_TWO_SIDED;
        let pairs: &[i64] = if by_expert { &[rows] } else { &[rows, topk] };
        let experts = config.num_experts.clamp(1, 64) as i64;
        let ranks = self.world as i64;
        let out_type = if quantised { (10, 8) } else { dtype };
        let given = copy(&input);
        let mut output = a2a_dispatch_out_t {
            struct_size: 0,
            tokens: self.output(owns, out_type, &[rows, hidden]),
            scales: null_mut(),
            topk_ids: null_mut(),
            topk_weights: null_mut(),
            extras: [null_mut(); 8],
            expert_counts: null_mut(),
            rank_counts: null_mut(),
            expert_offsets: null_mut(),
            row_source: null_mut(),
            expert_stats: null_mut(),
            status: null_mut(),
            num_rows: 0,
        };
        let wants = self.bytes.byte();
        if wants & 1 != 0 && !padded {
            output.topk_ids = self.output(owns, (0, 32), pairs);
        }
        if wants & 2 != 0 {
            output.topk_weights = self.output(owns, (2, 32), pairs);
        }
        if wants & 4 != 0 {
            output.row_source = self.output(owns, (0, 32), &[rows, 2]);
        }
        if wants & 8 != 0 {
            output.expert_counts = self.output(false, (0, 32), &[experts]);
            output.rank_counts = self.output(false, (0, 32), &[ranks]);
        }
        if wants & 16 != 0 {
            output.status = self.output(false, (0, 32), &[4 + ranks]);
        }
        if wants & 32 != 0 && (quantised || !given.scales.is_null()) {
            let columns = if quantised { (hidden + 127) / 128 } else { 4 };
            output.scales = self.output(owns, (2, 32), &[rows, columns]);
        }
        if wants & 64 != 0 && !given.extras[0].is_null() {
            output.extras[0] = self.output(owns, (0, 64), &[rows]);
        }
        if wants & 128 != 0 {
            output.expert_stats = self.tensor((0, 64), &[experts]);
            if by_expert {
                output.expert_offsets = self.output(false, (0, 32), &[experts + 1]);
            }
        }
        let input = self.sized(input, 136);
        let out = if self.bytes.odd() { null_mut() } else { self.sized(copy(&output), 160) };
        let (comm, routing) = (self.own_comm(), self.some_routing());
        let stream = if self.bytes.odd() { 7 as *mut c_void } else { null_mut() };
        // SAFETY: as the file's first lines say.
        if self.timed("a2a_dispatch", mine, || unsafe { a2a_dispatch(comm, routing, input, out, stream) }) {
            // The views of before may be the same memory, or over.
            self.views.clear();
            if given.phase != A2A_PHASE_SEND {
                for tensor in
                    [output.tokens, output.scales, output.topk_ids, output.topk_weights, output.row_source]
                {
                    if !tensor.is_null() {
                        self.note(tensor);
                    }
                }
            }
        }
    }

    /// A comm that a step may be made on: this rank's, or one that is none.
    fn own_comm(&mut self) -> *mut a2a_comm_t {
        if self.bytes.odd() { null_mut() } else { self.comm }
    }

    /// Ids of one byte each: most of them experts.
    fn fill_ids(&mut self, tensor: *mut a2a_tensor_t, wide: bool) {
        if tensor.is_null() {
            return;
        }
        // SAFETY: a tensor of ours, whose memory is as large as it says.
        let (data, count) = unsafe {
            let tensor = &*tensor;
            let exact = tensor.strides.is_null()
                && tensor.ndim == 2
                && tensor.dtype.bits == if wide { 64 } else { 32 };
            if tensor.data.is_null() || !exact || tensor.shape.is_null() || tensor.dtype.lanes != 1 {
                return;
            }
            let (rows, columns) = (*tensor.shape, *tensor.shape.add(1));
            // What is negative has no memory to write to.
            let count = if rows > 0 && columns > 0 { rows.checked_mul(columns).unwrap_or(0) } else { 0 };
            (tensor.data, count)
        };
        for at in 0..count as usize {
            let byte = self.bytes.byte();
            let experts = self.config.num_experts.max(1) as i64;
            let id = match byte {
                0..240 => byte as i64 % experts,
                240..248 => -1,
                248 => experts,
                249 => i32::MIN as i64,
                250 => i32::MAX as i64,
                251 if wide => i64::MIN,
                252 if wide => 1 << 32,
                _ => -2,
            };
            // SAFETY: one of `count` elements.
            unsafe {
                match wide {
                    true => data.cast::<i64>().add(at).write_unaligned(id),
                    false => data.cast::<i32>().add(at).write_unaligned(id as i32),
                }
            }
        }
    }

    fn output(&mut self, owns: bool, dtype: (u8, u8), shape: &[i64]) -> *mut a2a_tensor_t {
        match self.bytes.byte() {
            0..128 if !owns => self.view(),
            250.. => null_mut(),
            _ => self.tensor(dtype, shape),
        }
    }

    fn combine(&mut self, mine: bool) {
        let config = copy(&self.config);
        let hidden = config.max_hidden.clamp(1, 1024) as i64;
        let hidden = if config.combine_hidden > 0 { config.combine_hidden as i64 } else { hidden };
        let bound = config.max_tokens.clamp(1, 64) as i64;
        let (tokens, topk) = self.last;
        let by_expert = matches!(config.layout, A2A_LAYOUT_EXPERT_CONTIGUOUS | A2A_LAYOUT_EXPERT_PADDED);
        let phase = self.bytes.pick(&[A2A_PHASE_BOTH, A2A_PHASE_BOTH, A2A_PHASE_SEND, A2A_PHASE_RECV]);
        let float = self.bytes.pick(&[(4, 16), (2, 16), (2, 32)]);
        let rows = self.capacity.clamp(0, 4096);
        let style = self.bytes.byte();
        let (routing, comm) = (self.some_routing(), self.own_comm());
        let mut input = a2a_combine_in_t {
            struct_size: 0,
            tokens: null(),
            topk_weights: null(),
            row_weights: null(),
            flags: self.bytes.pick(&[0, 0, 1, if by_expert { 2 } else { 1 }]),
            phase: self.int(phase),
            max_sms: self.int(0),
        };
        input.tokens = match style % 4 {
            // Where the experts are asked to put it, if the slot says where that is.
            0 | 1 => {
                let (buffer, instead) = (self.view(), self.tensor(float, &[rows, hidden]));
                // SAFETY: ours.
                unsafe { (*buffer).dtype = a2a_tensor_dtype_t { code: float.0, bits: float.1, lanes: 1 } };
                // SAFETY: as the file's first lines say.
                let shown = self.timed("a2a_combine_buffer", mine, || unsafe {
                    a2a_combine_buffer(comm, routing, buffer)
                });
                if shown {
                    self.note(buffer);
                }
                if shown { buffer } else { instead }
            }
            2 => self.tensor(float, &[rows, hidden]),
            _ => self.seen(),
        };
        if style & 8 != 0 && by_expert {
            input.topk_weights = self.tensor((2, 32), &[tokens, topk]);
        }
        if style & 16 != 0 {
            let shape: &[i64] = if by_expert { &[rows] } else { &[rows, topk] };
            input.row_weights = self.tensor((2, 32), shape);
        }
        if self.bytes.odd() {
            input.flags = self.bytes.word() as u64;
        }
        let mut output = a2a_combine_out_t {
            struct_size: 0,
            tokens: null_mut(),
            topk_weights: null_mut(),
            status: null_mut(),
        };
        output.tokens = self.tensor(float, &[if style & 32 != 0 { bound } else { tokens }, hidden]);
        if style & 64 != 0 {
            output.topk_weights = self.tensor((2, 32), &[tokens, topk]);
        }
        if style & 128 != 0 {
            output.status = self.output(false, (0, 32), &[4 + self.world as i64]);
        }
        let input = self.sized(input, 48);
        let out = if self.bytes.odd() { null_mut() } else { self.sized(output, 32) };
        // SAFETY: as the file's first lines say.
        self.timed("a2a_combine", mine, || unsafe { a2a_combine(comm, routing, input, out, null_mut()) });
    }

    fn combine_buffer(&mut self, mine: bool) {
        let tensor = if self.bytes.odd() { null_mut() } else { self.view() };
        if !tensor.is_null() {
            let (code, bits) =
                self.bytes.pick(&[(0, 0), (4, 16), (2, 32), (2, 16), (10, 8), (2, 64), (99, 3)]);
            // SAFETY: ours.
            unsafe { (*tensor).dtype = a2a_tensor_dtype_t { code, bits, lanes: 1 } };
        }
        let (comm, routing) = (self.own_comm(), self.some_routing());
        // SAFETY: as the file's first lines say.
        if self.timed("a2a_combine_buffer", mine, || unsafe { a2a_combine_buffer(comm, routing, tensor) }) {
            self.note(tensor);
        }
    }

    fn set_timeout(&mut self, mine: bool) {
        let [first, later] = std::array::from_fn(|_| match self.bytes.below(4) {
            0 => 0,
            1 => 1,
            2 => self.bytes.pick(&[-1, i64::MIN, i64::MAX, 15_552_000_001]),
            _ => self.bytes.byte() as i64 % DEADLINE_MS,
        });
        let comm = self.some_comm();
        // SAFETY: numbers.
        self.timed("a2a_set_timeout", mine, || unsafe { a2a_set_timeout(comm, first, later) });
    }

    /// What reports, each with a struct that may have any size.
    fn results(&mut self, mine: bool) {
        let comm = self.some_comm();
        match self.bytes.below(3) {
            0 => {
                let info = self.sized(INFO, 16);
                // SAFETY: as the file's first lines say.
                self.timed("a2a_get_info", mine, || unsafe { a2a_get_info(comm, info) });
            }
            1 => {
                let stats = self.sized(a2a_stats_t::default(), 16);
                // SAFETY: as above.
                self.timed("a2a_get_stats", mine, || unsafe { a2a_get_stats(comm, stats) });
            }
            _ => {
                // SAFETY: numbers and characters.
                let error = self.sized(unsafe { std::mem::zeroed::<a2a_error_info_t>() }, 16);
                // SAFETY: as above.
                self.timed("a2a_get_async_error", mine, || unsafe { a2a_get_async_error(comm, error) });
            }
        }
    }

    fn history(&mut self, mine: bool) {
        let comm = self.some_comm();
        let length = self.bytes.pick(&[128 << 10, 0, 1, 2, 300]);
        let text: *mut c_char =
            if self.bytes.odd() { null_mut() } else { self.memory.zeroed(length, 1).cast() };
        let needed = if self.bytes.half() { self.memory.zeroed(8, 0).cast() } else { null_mut() };
        // SAFETY: as the file's first lines say.
        if self.timed("a2a_get_history", mine, || unsafe { a2a_get_history(comm, text, length, needed) })
            && !text.is_null()
            && length > 0
        {
            // SAFETY: NUL-terminated, by the ABI.
            let text = unsafe { CStr::from_ptr(text) }.to_str().expect("UTF-8");
            assert!(text.starts_with('{') && text.ends_with('}'), "{text:?} is no object");
        }
        let count = self.bytes.pick(&[2, 1, 0, 8]);
        let mask: *mut i32 =
            if self.bytes.odd() { null_mut() } else { self.memory.zeroed(count * 4, 3).cast() };
        let count = if self.bytes.odd() { self.int(count as i32).min(count as i32) } else { count as i32 };
        // SAFETY: as above.
        if self.timed("a2a_get_rank_mask", mine, || unsafe { a2a_get_rank_mask(comm, mask, count) }) {
            // SAFETY: there is a rank, or it would have been refused; at an odd address.
            let first = unsafe { mask.read_unaligned() };
            assert!(first == 0 || first == 1, "rank 0's mask is {first}");
        }
    }

    fn recover(&mut self, mine: bool) {
        let comm = self.some_comm();
        let own = std::ptr::eq(comm, self.comm);
        let mut input = a2a_recover_in_t {
            struct_size: 0,
            timeout_ms: 1 + self.bytes.byte() as i64 % DEADLINE_MS,
            patience_ms: 1,
        };
        if self.bytes.odd() {
            input.timeout_ms = self.bytes.pick(&[0, -1, i64::MIN, 1]);
            input.patience_ms = self.bytes.pick(&[0, -1, i64::MIN, i64::MAX, 30]);
        }
        let input = self.sized(input, 24);
        // SAFETY: numbers.
        let output = self.sized(unsafe { std::mem::zeroed::<a2a_recover_out_t>() }, 16);
        // SAFETY: as the file's first lines say.
        let fine = self.timed("a2a_recover", mine, || unsafe { a2a_recover(comm, input, output) });
        if fine && own {
            let mut mask = [0i32; 2];
            // SAFETY: room for as many ranks as there are.
            assert!(check("a2a_get_rank_mask", unsafe { a2a_get_rank_mask(comm, mask.as_mut_ptr(), 2) }));
            assert!(
                mask[self.config.rank as usize] == 1,
                "rank {} recovered without itself",
                self.config.rank
            );
        }
    }

    fn abort(&mut self, mine: bool) {
        let comm = self.some_comm();
        // Seldom: nothing is left to find out afterwards.
        if self.bytes.byte() >= 192 {
            // SAFETY: a handle, whatever became of it.
            self.timed("a2a_abort", mine, || unsafe { a2a_abort(comm) });
        }
    }

    fn leave(&mut self, mine: bool) {
        if self.bytes.byte() >= 192 && mine {
            // Its memory goes with it.
            self.views.clear();
            let comm = self.comm;
            // SAFETY: a handle, whatever became of it.
            self.timed("a2a_destroy", true, || unsafe { a2a_destroy(comm) });
        }
    }

    fn plans(&mut self, mine: bool) {
        let config = self.some_config();
        let config = self.sized(config, 352);
        let memory = a2a_memory_t {
            struct_size: 0,
            window_bytes: 0,
            control_bytes: 0,
            slot_bytes: 0,
            private_bytes: 0,
            routing_bytes: 0,
            total_bytes: 0,
            pinned_bytes: 0,
        };
        let memory = self.sized(memory, 16);
        // SAFETY: as the file's first lines say.
        self.timed("a2a_query_memory", mine, || unsafe { a2a_query_memory(config, memory) });
        let length = self.bytes.pick(&[4096, 0, 1, 2, 100]);
        let text = if self.bytes.odd() { null_mut() } else { self.memory.zeroed(length, 0).cast() };
        let needed = if self.bytes.half() { self.memory.zeroed(8, 0).cast() } else { null_mut() };
        // SAFETY: as above.
        self.timed("a2a_explain", mine, || unsafe { a2a_explain(config, text, length, needed) });
    }

    fn names(&mut self, mine: bool) {
        let length = self.bytes.below(100);
        let mut address: Vec<u8> = b"127.0.0.1:".to_vec();
        if self.bytes.half() {
            address.clear();
        }
        for _ in 0..length {
            address.push(self.bytes.byte().max(1));
        }
        address.push(0);
        let address: *mut c_char =
            if self.bytes.odd() { null_mut() } else { self.memory.of(&address).cast() };
        let key: *mut c_char = match self.bytes.below(4) {
            0 => self.memory.of(b"key\0").cast(),
            1 => self.memory.of(b"\0").cast(),
            2 => null_mut(),
            _ => {
                let mut long = vec![b'k'; 4090 + self.bytes.below(16)];
                long.push(0);
                self.memory.of(&long).cast()
            }
        };
        let id = if self.bytes.odd() { null_mut() } else { self.memory.zeroed(128, 0).cast() };
        // SAFETY: as the file's first lines say; strings end with NUL.
        unsafe {
            let unique = || a2a_unique_id_from_address(address, key, id);
            self.timed("a2a_unique_id_from_address", mine, unique);
            a2a_backend_from_name(address);
            CStr::from_ptr(a2a_status_name(self.int(0))).to_str().expect("ASCII");
            self.timed("a2a_get_unique_id", mine, || a2a_get_unique_id(id));
            let (callback, user) = match self.bytes.half() {
                true => (Some(log_line as _), (&raw const LOGGED).cast_mut().cast()),
                false => (None, null_mut()),
            };
            self.timed("a2a_set_log_callback", mine, || a2a_set_log_callback(callback, user));
        }
    }

    /// A comm of one rank beside this one, for its handles.
    fn another_comm(&mut self, mine: bool) {
        if !mine {
            return;
        }
        let mut config = copy(&self.config);
        (config.rank, config.num_ranks, config.expert_owner, config.placement) = (0, 1, null(), 0);
        let mut comm = null_mut();
        // SAFETY: valid pointers.
        if self.timed("a2a_create", true, || unsafe { a2a_create(&config, &mut comm) }) {
            let mut routing = null_mut();
            // SAFETY: as above.
            unsafe {
                if check("a2a_routing_create", a2a_routing_create(comm, 0, &mut routing)) {
                    self.shared.routings.lock().unwrap().push(routing as usize);
                    assert!(check("a2a_routing_destroy", a2a_routing_destroy(routing)));
                }
                self.shared.comms.lock().unwrap().push(comm as usize);
                assert!(check("a2a_destroy", a2a_destroy(comm)));
            }
        }
    }

    fn config_init(&mut self, mine: bool) {
        let size = self.bytes.pick(&[size_of::<a2a_config_t>(), 352, 351, 0, 1000, 65536, 65537, usize::MAX]);
        let real = if size > 65536 { 8 } else { size };
        let at = if self.bytes.odd() { null_mut() } else { self.memory.zeroed(real, 0).cast() };
        // SAFETY: as the file's first lines say.
        self.timed("a2a_config_init", mine, || unsafe { a2a_config_init(at, size) });
    }

    fn end(self) {
        let Rank { comm, routings, .. } = &self;
        // SAFETY: handles, whatever became of them.
        unsafe {
            for &routing in routings {
                let routing = routing as *mut a2a_routing_t;
                self.timed("a2a_routing_destroy", true, || a2a_routing_destroy(routing));
                let twice = a2a_routing_destroy(routing);
                assert!(twice == A2A_INVALID_ARGUMENT, "a routing was destroyed twice");
            }
            if !comm.is_null() {
                self.timed("a2a_destroy", true, || a2a_destroy(*comm));
                assert!(a2a_destroy(*comm) == A2A_INVALID_ARGUMENT, "a comm was destroyed twice");
            }
        }
    }
}

const INFO: a2a_info_t = a2a_info_t {
    struct_size: 0,
    rank: 0,
    num_ranks: 0,
    max_ranks: 0,
    device: 0,
    device_ordinal: 0,
    backend: 0,
    transport: 0,
    layout: 0,
    num_experts: 0,
    first_expert: 0,
    num_local_experts: 0,
    max_topk: 0,
    max_hidden: 0,
    max_tokens: 0,
    num_slots: 0,
    max_sms: 0,
    row_capacity: 0,
    window_bytes: 0,
};
