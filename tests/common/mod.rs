//! What the tests need to drive the library through its C ABI: owned tensors, thin wrappers whose errors are
//! values, a random generator, recorded routings, and a launcher that runs a group's ranks as threads of this
//! process, as processes, or both, under a time limit.
//!
//! A test binary that launches processes has `harness = false` and calls `worker(JOBS)` first in `main`: its
//! children are itself, told by environment variables which job to run for which ranks.
//!
//! Everything lies in host memory, or (`choose_device`) in a GPU's: tensors are then device memory, ranks have streams
//! of their own, and a call of `Comm` waits for its stream and fails as it would have failed on the CPU.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_void};
use std::io::{BufRead, BufReader, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::ptr::{null, null_mut};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use a2a::abi::calls::*;
use a2a::abi::types::*;

pub mod cuda;

// ------------------------------------------------------------------------------------------- results

/// A call's refusal: its status and its sentence.
#[derive(Clone, Debug)]
pub struct Failure {
    pub status: a2a_status_t,
    pub text: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", status_name(self.status), self.text)
    }
}

impl From<Failure> for String {
    fn from(failure: Failure) -> String {
        failure.to_string()
    }
}

pub fn status_name(status: a2a_status_t) -> &'static str {
    // SAFETY: a static NUL-terminated string, by the ABI.
    unsafe { CStr::from_ptr(a2a_status_name(status)) }.to_str().expect("status names are ASCII")
}

/// A status as a result; reads the thread's last error, so it comes right after the call.
pub fn check(status: a2a_status_t) -> Result<(), Failure> {
    if status == A2A_SUCCESS {
        return Ok(());
    }
    // SAFETY: NUL-terminated and valid until this thread's next call, by the ABI.
    let text = unsafe { CStr::from_ptr(a2a_last_error()) }.to_string_lossy().into_owned();
    Err(Failure { status, text })
}

// ------------------------------------------------------------------------------------------- tensors

pub type Dtype = a2a_tensor_dtype_t;

pub const fn dtype(code: u8, bits: u8) -> Dtype {
    Dtype { code, bits, lanes: 1 }
}
pub const I32: Dtype = dtype(0, 32);
pub const I64: Dtype = dtype(0, 64);
pub const U8: Dtype = dtype(1, 8);
pub const U16: Dtype = dtype(1, 16);
pub const F16: Dtype = dtype(2, 16);
pub const F32: Dtype = dtype(2, 32);
pub const BF16: Dtype = dtype(4, 16);
pub const F8: Dtype = dtype(10, 8);

fn size(dtype: Dtype) -> usize {
    dtype.bits as usize / 8 * dtype.lanes as usize
}

/// Memory that starts on a 64-byte line, held by address so that the library may write it.
struct Memory {
    start: *mut u8,
    bytes: usize,
    /// Of host memory; `None`: the arena's.
    layout: Option<Layout>,
}

impl Memory {
    fn new(bytes: usize, fill: u8) -> Memory {
        let bytes = bytes.max(1);
        if cuda::is_enabled() {
            let start = cuda::allocate(bytes);
            cuda::fill(start, bytes, fill);
            return Memory { start: start as *mut u8, bytes, layout: None };
        }
        let layout = Layout::from_size_align(bytes, 64).expect("a buffer of less than 2^63 bytes");
        // SAFETY: the layout is not empty.
        let start = unsafe { std::alloc::alloc(layout) };
        assert!(!start.is_null(), "out of memory");
        // SAFETY: just allocated with this size.
        unsafe { start.write_bytes(fill, bytes) };
        Memory { start, bytes, layout: Some(layout) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.layout {
            // SAFETY: allocated in `new` with this layout, freed once.
            Some(layout) => unsafe { std::alloc::dealloc(self.start, layout) },
            None => cuda::release(self.start as usize, self.bytes),
        }
    }
}

/// A copy of a GPU's bytes, from the first of some pieces to the last, what lies between them included.
struct Copied {
    start: usize,
    bytes: Vec<u8>,
}

impl Copied {
    fn of(pieces: &[*mut u8], length: usize) -> Copied {
        let first = pieces.iter().min().map_or(0, |&piece| piece as usize);
        let end = pieces.iter().max().map_or(0, |&piece| piece as usize + length);
        let mut copied = Copied { start: first, bytes: vec![0; end - first] };
        cuda::read(first, &mut copied.bytes);
        copied
    }
    fn piece(&mut self, piece: *mut u8, length: usize) -> &mut [u8] {
        &mut self.bytes[piece as usize - self.start..][..length]
    }
    fn write_back(&self) {
        cuda::write(self.start, &self.bytes);
    }
}

/// True if pieces follow each other without a gap.
fn adjoin(pieces: &[*mut u8], length: usize) -> bool {
    pieces.iter().enumerate().all(|(at, &piece)| piece as usize == pieces[0] as usize + at * length)
}

/// What stands between the rows of a strided tensor of ours: nobody may change it.
const GAP: u8 = 0xA7;

/// An `a2a_tensor_t` with what it points at: memory of its own, or (a view) whatever the library put in.
pub struct Tensor {
    raw: Box<a2a_tensor_t>,
    _shape: Box<[i64]>,
    strides: Option<Box<[i64]>>,
    memory: Option<Memory>,
}

// SAFETY: owned memory, or the slot's, which outlives the comm's use on whatever thread.
unsafe impl Send for Tensor {}
// SAFETY: as above; changed only through `&mut`.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// Asks the library for a view.
    pub fn view() -> Tensor {
        let raw = a2a_tensor_t {
            data: null_mut(),
            device: a2a_tensor_device_t { device_type: 0, device_id: 0 },
            ndim: 0,
            dtype: dtype(0, 0),
            shape: null_mut(),
            strides: null_mut(),
            byte_offset: 0,
        };
        Tensor { raw: Box::new(raw), _shape: Box::default(), strides: None, memory: None }
    }

    /// A tensor of `GAP` bytes, to be filled; compact.
    pub fn new(dtype: Dtype, shape: &[usize]) -> Tensor {
        Tensor::build(dtype, shape, None, 0)
    }

    /// As `new`, with `gap` bytes between rows (the last dimension), which start `offset` bytes into the memory.
    pub fn strided(dtype: Dtype, shape: &[usize], gap: usize, offset: usize) -> Tensor {
        assert_eq!(gap % size(dtype), 0, "strides count elements");
        let mut step = shape[shape.len() - 1] as i64 + (gap / size(dtype)) as i64;
        let mut strides = vec![1; shape.len()];
        for dim in (0..shape.len() - 1).rev() {
            strides[dim] = step;
            step *= shape[dim] as i64;
        }
        Tensor::build(dtype, shape, Some(strides.into()), offset)
    }

    /// A compact tensor that holds `bytes`.
    pub fn of(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Tensor {
        let mut tensor = Tensor::new(dtype, shape);
        tensor.write(bytes);
        tensor
    }

    /// A compact tensor in memory that somebody else keeps.
    pub fn inside(dtype: Dtype, shape: &[usize], address: usize) -> Tensor {
        let mut shape: Box<[i64]> = shape.iter().map(|&n| n as i64).collect();
        let raw = a2a_tensor_t {
            data: address as *mut c_void,
            device: tensor_device(),
            ndim: shape.len() as i32,
            dtype,
            shape: shape.as_mut_ptr(),
            strides: null_mut(),
            byte_offset: 0,
        };
        Tensor { raw: Box::new(raw), _shape: shape, strides: None, memory: None }
    }

    /// Rows whose elements stand `step` elements apart, next to those of the rows beside them; a third dimension is
    /// `gap` elements more than compact. What the scales of A2A_SCALES_COLUMN look like.
    pub fn columns(dtype: Dtype, shape: &[usize], step: usize, gap: usize) -> Tensor {
        let (rows, columns) = (shape[shape.len() - 2], shape[shape.len() - 1]);
        assert!(step >= rows, "columns overlap");
        let mut strides = vec![1, step as i64];
        if shape.len() == 3 {
            strides.insert(0, (columns * step + gap) as i64);
        }
        Tensor::build(dtype, shape, Some(strides.into()), 0)
    }

    fn build(dtype: Dtype, shape: &[usize], strides: Option<Box<[i64]>>, offset: usize) -> Tensor {
        let mut shape: Box<[i64]> = shape.iter().map(|&n| n as i64).collect();
        let mut strides = strides;
        let elements = match &strides {
            // The largest stride times its size covers everything below it.
            Some(strides) if strides.len() > 1 => {
                strides.iter().zip(&shape).map(|(stride, size)| stride * size).max().unwrap_or(0)
            }
            _ => shape.iter().product(),
        };
        let memory = Memory::new(offset + elements as usize * size(dtype), GAP);
        let raw = a2a_tensor_t {
            data: memory.start.cast(),
            device: tensor_device(),
            ndim: shape.len() as i32,
            dtype,
            shape: shape.as_mut_ptr(),
            strides: strides.as_mut().map_or(null_mut(), |strides| strides.as_mut_ptr()),
            byte_offset: offset as u64,
        };
        Tensor { raw: Box::new(raw), _shape: shape, strides, memory: Some(memory) }
    }

    /// The struct, to be changed into something wrong.
    pub fn raw_mut(&mut self) -> &mut a2a_tensor_t {
        &mut self.raw
    }
    pub fn as_ptr(&self) -> *const a2a_tensor_t {
        &*self.raw
    }
    pub fn as_mut_ptr(&mut self) -> *mut a2a_tensor_t {
        &mut *self.raw
    }
    pub fn dtype(&self) -> Dtype {
        self.raw.dtype
    }
    pub fn device(&self) -> a2a_tensor_device_t {
        self.raw.device
    }
    pub fn address(&self) -> usize {
        self.raw.data as usize + self.raw.byte_offset as usize
    }
    pub fn is_view(&self) -> bool {
        self.memory.is_none()
    }

    pub fn shape(&self) -> Vec<usize> {
        if self.raw.ndim == 0 {
            return Vec::new();
        }
        // SAFETY: ours, or the routing's by the ABI; ndim entries.
        let shape = unsafe { std::slice::from_raw_parts(self.raw.shape, self.raw.ndim as usize) };
        shape.iter().map(|&n| n as usize).collect()
    }

    pub fn row_bytes(&self) -> usize {
        self.shape().last().map_or(0, |&columns| columns * size(self.raw.dtype))
    }

    /// In elements.
    pub fn strides(&self) -> Vec<usize> {
        let shape = self.shape();
        if !self.raw.strides.is_null() && !shape.is_empty() {
            // SAFETY: ndim entries, as for the shape.
            let given = unsafe { std::slice::from_raw_parts(self.raw.strides, shape.len()) };
            return given.iter().map(|&n| n as usize).collect();
        }
        let mut strides = vec![1; shape.len()];
        for dim in (1..shape.len()).rev() {
            strides[dim - 1] = strides[dim] * shape[dim].max(1);
        }
        strides
    }

    /// Stretches of contiguous bytes by address, in order of the elements, and the bytes of each: rows of the last
    /// dimension, or single elements where that one is strided.
    fn pieces(&self) -> (Vec<*mut u8>, usize) {
        let (mut shape, mut strides) = (self.shape(), self.strides());
        if strides.last().is_some_and(|&last| last != 1) {
            shape.push(1);
            strides.push(1);
        }
        let bytes = shape.last().map_or(0, |&columns| columns * size(self.raw.dtype));
        (self.rows(&shape, &strides), bytes)
    }

    fn rows(&self, shape: &[usize], strides: &[usize]) -> Vec<*mut u8> {
        let Some((&columns, outer)) = shape.split_last() else { return Vec::new() };
        if columns == 0 {
            return Vec::new();
        }
        (0..outer.iter().product())
            .map(|row: usize| {
                let (mut row, mut at) = (row, 0);
                for dim in (0..outer.len()).rev() {
                    at += row % outer[dim] * strides[dim];
                    row /= outer[dim];
                }
                (self.address() + at * size(self.raw.dtype)) as *mut u8
            })
            .collect()
    }

    /// The rows without what lies between them.
    pub fn read(&self) -> Vec<u8> {
        let (pieces, length) = self.pieces();
        if cuda::is_enabled() {
            let mut copied = Copied::of(&pieces, length);
            if adjoin(&pieces, length) {
                return copied.bytes;
            }
            return pieces.into_iter().flat_map(|piece| copied.piece(piece, length).to_vec()).collect();
        }
        let mut bytes = Vec::with_capacity(pieces.len() * length);
        for piece in pieces {
            // SAFETY: our memory, or a view that the test knows to be valid.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(piece, length) });
        }
        bytes
    }

    /// Fills the rows from `bytes`.
    pub fn write(&mut self, bytes: &[u8]) {
        let (pieces, length) = self.pieces();
        assert_eq!(bytes.len(), pieces.len() * length, "bytes for a tensor of shape {:?}", self.shape());
        if cuda::is_enabled() {
            return self.write_to_device(&pieces, length, bytes);
        }
        for (piece, bytes) in pieces.into_iter().zip(bytes.chunks_exact(length.max(1))) {
            // SAFETY: as in `read`.
            unsafe { piece.copy_from_nonoverlapping(bytes.as_ptr(), length) };
        }
    }

    fn write_to_device(&mut self, pieces: &[*mut u8], length: usize, bytes: &[u8]) {
        if adjoin(pieces, length) {
            return cuda::write(self.address(), bytes);
        }
        let mut copied = Copied::of(pieces, length);
        for (&piece, bytes) in pieces.iter().zip(bytes.chunks_exact(length)) {
            copied.piece(piece, length).copy_from_slice(bytes);
        }
        copied.write_back();
    }

    /// A row of a compact tensor, whatever its dimensions. The whole may be too large to copy.
    pub fn read_row(&self, row: usize) -> Vec<u8> {
        let length = self.row_bytes();
        let from = self.address() + row * length;
        if cuda::is_enabled() {
            let mut bytes = vec![0; length];
            cuda::read(from, &mut bytes);
            return bytes;
        }
        // SAFETY: our memory, or a view that the test knows to be valid, of more than `row` rows.
        unsafe { std::slice::from_raw_parts(from as *const u8, length) }.to_vec()
    }

    /// Fills a row of a compact tensor.
    pub fn write_row(&mut self, row: usize, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.row_bytes(), "bytes for a row of shape {:?}", self.shape());
        let to = self.address() + row * bytes.len();
        if cuda::is_enabled() {
            return cuda::write(to, bytes);
        }
        // SAFETY: as in `read_row`.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Overwrites the rows of a tensor of our own.
    pub fn scribble(&mut self) {
        if self.memory.is_none() || self.raw.data.is_null() {
            return;
        }
        let (pieces, length) = self.pieces();
        if cuda::is_enabled() {
            return self.write_to_device(&pieces, length, &vec![0xEE; pieces.len() * length]);
        }
        for piece in pieces {
            // SAFETY: as in `read`.
            unsafe { piece.write_bytes(0xEE, length) };
        }
    }

    pub fn read_i32(&self) -> Vec<i32> {
        assert_eq!((self.raw.dtype.code, self.raw.dtype.bits), (0, 32), "an int32 tensor");
        self.read().chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect()
    }
    pub fn read_i64(&self) -> Vec<i64> {
        assert_eq!((self.raw.dtype.code, self.raw.dtype.bits), (0, 64), "an int64 tensor");
        self.read().chunks_exact(8).map(|word| i64::from_le_bytes(word.try_into().unwrap())).collect()
    }

    /// True if what stands between the rows of our own strided tensor is as we left it.
    pub fn gaps_are_intact(&self) -> bool {
        let (Some(memory), Some(strides)) = (&self.memory, &self.strides) else { return true };
        if strides.len() < 2 || self.raw.data.is_null() {
            return true;
        }
        let copied = cuda::is_enabled().then(|| Copied::of(&[memory.start], memory.bytes));
        let all = match &copied {
            Some(copied) => &copied.bytes[..],
            // SAFETY: all of our own memory.
            None => unsafe { std::slice::from_raw_parts(memory.start, memory.bytes) },
        };
        let mut gaps = vec![true; all.len()];
        let (pieces, length) = self.pieces();
        for piece in pieces {
            gaps[piece as usize - memory.start as usize..][..length].fill(false);
        }
        all.iter().zip(gaps).all(|(&byte, gap)| !gap || byte == GAP)
    }
}

/// Where this thread's tensors lie, as they say it.
pub fn tensor_device() -> a2a_tensor_device_t {
    if cuda::is_enabled() {
        a2a_tensor_device_t { device_type: A2A_DEVICE_CUDA, device_id: cuda::ordinal() }
    } else {
        a2a_tensor_device_t { device_type: A2A_DEVICE_CPU, device_id: 0 }
    }
}

fn in_ptr(tensor: &Option<Tensor>) -> *const a2a_tensor_t {
    tensor.as_ref().map_or(null(), Tensor::as_ptr)
}
fn out_ptr(tensor: &mut Option<Tensor>) -> *mut a2a_tensor_t {
    tensor.as_mut().map_or(null_mut(), Tensor::as_mut_ptr)
}

// --------------------------------------------------------------------------------------------- calls

/// A group's name, as text for a child's environment.
#[derive(Clone, Copy)]
pub struct GroupId(pub a2a_unique_id_t);

impl GroupId {
    pub fn new() -> GroupId {
        let mut id = a2a_unique_id_t { bytes: [0; 128] };
        // SAFETY: a valid out-pointer.
        check(unsafe { a2a_get_unique_id(&mut id) }).expect("a unique id");
        GroupId(id)
    }
    pub fn to_hex(self) -> String {
        self.0.bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
    pub fn from_hex(text: &str) -> GroupId {
        let mut id = a2a_unique_id_t { bytes: [0; 128] };
        for (at, byte) in id.bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hex digits");
        }
        GroupId(id)
    }
}

/// A config with the defaults, for this seat, with deadlines that suit a test.
pub fn config(seat: &Seat) -> a2a_config_t {
    let mut config = std::mem::MaybeUninit::uninit();
    // SAFETY: room for the struct; success means that it is filled.
    let mut config: a2a_config_t = unsafe {
        check(a2a_config_init(config.as_mut_ptr(), size_of::<a2a_config_t>())).expect("a config");
        config.assume_init()
    };
    config.rank = seat.rank as i32;
    config.num_ranks = seat.world as i32;
    config.unique_id = seat.id.0;
    config.setup_timeout_ms = 20_000;
    config.first_step_timeout_ms = 20_000;
    config.timeout_ms = 20_000;
    if cuda::is_enabled() {
        config.device = A2A_DEVICE_CUDA;
        config.device_ordinal = cuda::ordinal();
        config.ranks_per_device = cuda::ranks_per_device(seat.world) as i32;
        // Processes come when they have their contexts, which they get one after the other.
        config.setup_timeout_ms = 60_000;
    }
    config
}

/// The stream of this thread's calls.
pub fn stream() -> *mut c_void {
    if cuda::is_enabled() { cuda::stream() } else { null_mut() }
}

/// Stands between a record's sentence and the operations that follow it.
pub const LAST: &str = "; last: ";

/// The sentence of a record.
pub fn sentence(info: &a2a_error_info_t) -> String {
    let text = message(info);
    text.split_once(LAST).map_or(&text[..], |(sentence, _)| sentence).into()
}

/// The sentence of a record, and the operations that follow it.
pub fn message(info: &a2a_error_info_t) -> String {
    let text: Vec<u8> = info.message.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8_lossy(&text).into_owned()
}

pub fn query_memory(config: &a2a_config_t) -> Result<a2a_memory_t, Failure> {
    // SAFETY: integers only; the struct and its size are right.
    unsafe {
        let mut memory: a2a_memory_t = std::mem::zeroed();
        memory.struct_size = size_of::<a2a_memory_t>();
        check(a2a_query_memory(config, &mut memory)).map(|()| memory)
    }
}

/// A live comm, destroyed on drop.
pub struct Comm(*mut a2a_comm_t);

// SAFETY: the ABI lets any thread use a comm.
unsafe impl Send for Comm {}
// SAFETY: two calls at a time are answered with BUSY.
unsafe impl Sync for Comm {}

impl Comm {
    pub fn create(config: &a2a_config_t) -> Result<Comm, Failure> {
        let mut comm = null_mut();
        // SAFETY: valid pointers; an owner table outlives the call.
        check(unsafe { a2a_create(config, &mut comm) })?;
        Ok(Comm(comm))
    }
    pub fn handle(&self) -> *mut a2a_comm_t {
        self.0
    }
    pub fn routing(&self, slot: i32) -> Result<Routing, Failure> {
        let mut routing = null_mut();
        // SAFETY: a valid out-pointer.
        check(unsafe { a2a_routing_create(self.0, slot, &mut routing) })?;
        Ok(Routing(routing))
    }
    pub fn info(&self) -> Result<a2a_info_t, Failure> {
        // SAFETY: integers only; the struct and its size are right.
        unsafe {
            let mut info: a2a_info_t = std::mem::zeroed();
            info.struct_size = size_of::<a2a_info_t>();
            check(a2a_get_info(self.0, &mut info)).map(|()| info)
        }
    }
    pub fn stats(&self) -> Result<a2a_stats_t, Failure> {
        let mut stats = a2a_stats_t { struct_size: size_of::<a2a_stats_t>(), ..Default::default() };
        // SAFETY: the struct and its size are right.
        check(unsafe { a2a_get_stats(self.0, &mut stats) }).map(|()| stats)
    }
    pub fn async_error(&self) -> Result<a2a_error_info_t, Failure> {
        // SAFETY: integers only; the struct and its size are right.
        unsafe {
            let mut info: a2a_error_info_t = std::mem::zeroed();
            info.struct_size = size_of::<a2a_error_info_t>();
            check(a2a_get_async_error(self.0, &mut info)).map(|()| info)
        }
    }
    /// The last operations as JSON, in a buffer of the size that a2a.h says is always enough.
    pub fn history(&self) -> Result<String, Failure> {
        let mut text = vec![0u8; 128 << 10];
        // SAFETY: as many bytes as are said.
        check(unsafe { a2a_get_history(self.0, text.as_mut_ptr().cast(), text.len(), null_mut()) })?;
        let text = CStr::from_bytes_until_nul(&text).expect("NUL-terminated");
        Ok(text.to_str().expect("UTF-8").into())
    }
    /// 0: the defaults.
    pub fn recover(&self, timeout_ms: i64, patience_ms: i64) -> Result<a2a_recover_out_t, Failure> {
        let input = a2a_recover_in_t { struct_size: size_of::<a2a_recover_in_t>(), timeout_ms, patience_ms };
        // SAFETY: integers only; the structs and their sizes are right.
        unsafe {
            let mut output: a2a_recover_out_t = std::mem::zeroed();
            output.struct_size = size_of::<a2a_recover_out_t>();
            check(a2a_recover(self.0, &input, &mut output)).map(|()| output)
        }
    }
    pub fn set_timeout(&self, first_step_ms: i64, ms: i64) -> Result<(), Failure> {
        // SAFETY: no pointers but the handle.
        check(unsafe { a2a_set_timeout(self.0, first_step_ms, ms) })
    }
    pub fn abort(&self) -> Result<(), Failure> {
        // SAFETY: no pointers but the handle.
        check(unsafe { a2a_abort(self.0) })
    }
    pub fn destroy(self) -> Result<(), Failure> {
        let handle = self.0;
        std::mem::forget(self);
        // SAFETY: a handle of ours.
        check(unsafe { a2a_destroy(handle) })
    }

    pub fn dispatch(
        &self,
        routing: &Routing,
        phase: a2a_phase_t,
        input: &DispatchIn,
        output: &mut DispatchOut,
    ) -> Result<(), Failure> {
        let raw = if phase == A2A_PHASE_RECV {
            // By the ABI only phase and flags count in RECV.
            DispatchIn { flags: input.flags, ..Default::default() }.raw(phase)
        } else {
            input.raw(phase)
        };
        let known = self.known()?;
        let mut out = output.raw();
        // SAFETY: the structs' tensors are owned by `input` and `output`.
        let status = unsafe { a2a_dispatch(self.0, routing.0, &raw, &mut out, stream()) };
        check(status)?;
        output.num_rows = out.num_rows;
        self.settle(known, routing, phase, &output.status)
    }

    pub fn combine(
        &self,
        routing: &Routing,
        phase: a2a_phase_t,
        flags: u64,
        rows: Option<&Tensor>,
        output: &mut CombineOut,
    ) -> Result<(), Failure> {
        let raw = combine_in(phase, flags, rows);
        let known = self.known()?;
        let mut out = output.raw();
        // SAFETY: the structs' tensors are owned by `rows` and `output`.
        check(unsafe { a2a_combine(self.0, routing.0, &raw, &mut out, stream()) })?;
        self.settle(known, routing, phase, &output.status)
    }

    /// Combine with all that it can be given; `input` may name tensors that only one phase needs.
    pub fn combine_with(
        &self,
        routing: &Routing,
        phase: a2a_phase_t,
        input: &CombineIn,
        output: &mut CombineOut,
    ) -> Result<(), Failure> {
        let mut raw = combine_in(phase, input.flags, None);
        if phase != A2A_PHASE_RECV {
            raw.tokens = in_ptr(&input.tokens);
            raw.topk_weights = in_ptr(&input.topk_weights);
            raw.row_weights = in_ptr(&input.row_weights);
        }
        let known = self.known()?;
        let mut out = output.raw();
        // SAFETY: the structs' tensors are owned by `input` and `output`.
        check(unsafe { a2a_combine(self.0, routing.0, &raw, &mut out, stream()) })?;
        self.settle(known, routing, phase, &output.status)
    }

    /// True if a call's work is to be waited for: a GPU's, and not put on the stream for later.
    fn settles() -> bool {
        cuda::is_enabled() && !cuda::is_deferred()
    }

    /// The failure that the comm has on record before a call.
    fn known(&self) -> Result<a2a_status_t, Failure> {
        if Comm::settles() { self.async_error().map(|record| record.status) } else { Ok(A2A_SUCCESS) }
    }

    /// On a GPU a call returns before its work is done. Waits for that, and makes of what it found the failure that
    /// the call would have been on the CPU: the record's, if it is new, else the slot's.
    fn settle(
        &self,
        known: a2a_status_t,
        routing: &Routing,
        phase: a2a_phase_t,
        status: &Option<Tensor>,
    ) -> Result<(), Failure> {
        if !Comm::settles() {
            return Ok(());
        }
        cuda::synchronize().map_err(|text| Failure { status: A2A_CUDA_ERROR, text })?;
        let record = self.async_error()?;
        if record.status != known {
            return Err(Failure { status: record.status, text: sentence(&record) });
        }
        let written = status.as_ref().filter(|status| phase != A2A_PHASE_SEND && status.address() != 0);
        let words = written.map_or(Vec::new(), Tensor::read_i32);
        let bits = words.first().copied().unwrap_or(0);
        if bits & A2A_STEP_OVERFLOW != 0 {
            return Err(Failure { status: A2A_OVERFLOW, text: format!("out.status is {words:?}") });
        }
        let void = bits & A2A_STEP_VOID != 0;
        if known == A2A_SUCCESS && !void {
            return Ok(());
        }
        // The record has the comm's first failure alone. A slot that is closed says why.
        match self.combine_buffer(routing, dtype(0, 0)) {
            Err(failure) if failure.status >= A2A_TIMEOUT => Err(failure),
            _ if void => {
                let text = format!("out.status is {words:?}, and neither the comm nor the slot says why");
                Err(Failure { status: A2A_INTERNAL, text })
            }
            _ => Ok(()),
        }
    }

    /// The zero-copy target for results of this type.
    pub fn combine_buffer(&self, routing: &Routing, dtype: Dtype) -> Result<Tensor, Failure> {
        let mut tensor = Tensor::view();
        tensor.raw.dtype = dtype;
        // SAFETY: a valid out-pointer.
        check(unsafe { a2a_combine_buffer(self.0, routing.0, tensor.as_mut_ptr()) })?;
        Ok(tensor)
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        // SAFETY: a handle of ours; a failure here has nobody to tell.
        unsafe { a2a_destroy(self.0) };
    }
}

/// A live routing, destroyed on drop.
pub struct Routing(*mut a2a_routing_t);

// SAFETY: the ABI lets any thread use a routing.
unsafe impl Send for Routing {}
// SAFETY: as for the comm.
unsafe impl Sync for Routing {}

impl Routing {
    pub fn handle(&self) -> *mut a2a_routing_t {
        self.0
    }
    pub fn destroy(self) -> Result<(), Failure> {
        let handle = self.0;
        std::mem::forget(self);
        // SAFETY: a handle of ours.
        check(unsafe { a2a_routing_destroy(handle) })
    }
}

impl Drop for Routing {
    fn drop(&mut self) {
        // SAFETY: a handle of ours; a failure here has nobody to tell.
        unsafe { a2a_routing_destroy(self.0) };
    }
}

/// What a rank dispatches; absent is NULL.
#[derive(Default)]
pub struct DispatchIn {
    pub tokens: Option<Tensor>,
    pub topk_ids: Option<Tensor>,
    pub topk_weights: Option<Tensor>,
    pub scales: Option<Tensor>,
    pub extras: [Option<Tensor>; A2A_MAX_EXTRAS],
    pub rank_tokens: Option<Vec<i32>>,
    pub max_tokens: i32,
    pub flags: u64,
}

impl DispatchIn {
    /// The struct that C sees; valid as long as `self` stays unchanged.
    pub fn raw(&self, phase: a2a_phase_t) -> a2a_dispatch_in_t {
        a2a_dispatch_in_t {
            struct_size: size_of::<a2a_dispatch_in_t>(),
            tokens: in_ptr(&self.tokens),
            topk_ids: in_ptr(&self.topk_ids),
            topk_weights: in_ptr(&self.topk_weights),
            scales: in_ptr(&self.scales),
            extras: std::array::from_fn(|i| in_ptr(&self.extras[i])),
            rank_tokens: self.rank_tokens.as_ref().map_or(null(), |counts| counts.as_ptr()),
            max_tokens: self.max_tokens,
            phase,
            flags: self.flags,
            max_sms: 0,
            reserved: 0,
        }
    }
}

/// What a rank wants to receive; absent is NULL.
#[derive(Default)]
pub struct DispatchOut {
    pub tokens: Option<Tensor>,
    pub scales: Option<Tensor>,
    pub topk_ids: Option<Tensor>,
    pub topk_weights: Option<Tensor>,
    pub extras: [Option<Tensor>; A2A_MAX_EXTRAS],
    pub expert_counts: Option<Tensor>,
    pub rank_counts: Option<Tensor>,
    pub expert_offsets: Option<Tensor>,
    pub row_source: Option<Tensor>,
    pub expert_stats: Option<Tensor>,
    pub status: Option<Tensor>,
    pub num_rows: i64,
}

impl DispatchOut {
    pub fn raw(&mut self) -> a2a_dispatch_out_t {
        let mut extras = self.extras.iter_mut();
        a2a_dispatch_out_t {
            struct_size: size_of::<a2a_dispatch_out_t>(),
            tokens: out_ptr(&mut self.tokens),
            scales: out_ptr(&mut self.scales),
            topk_ids: out_ptr(&mut self.topk_ids),
            topk_weights: out_ptr(&mut self.topk_weights),
            extras: std::array::from_fn(|_| extras.next().map_or(null_mut(), out_ptr)),
            expert_counts: out_ptr(&mut self.expert_counts),
            rank_counts: out_ptr(&mut self.rank_counts),
            expert_offsets: out_ptr(&mut self.expert_offsets),
            row_source: out_ptr(&mut self.row_source),
            expert_stats: out_ptr(&mut self.expert_stats),
            status: out_ptr(&mut self.status),
            // Not what any dispatch reports: the library must overwrite it.
            num_rows: i64::MIN,
        }
    }
}

/// What the experts of a rank computed; absent is NULL.
#[derive(Default)]
pub struct CombineIn {
    pub tokens: Option<Tensor>,
    pub topk_weights: Option<Tensor>,
    pub row_weights: Option<Tensor>,
    pub flags: u64,
}

/// What the experts computed, as C sees it.
pub fn combine_in(phase: a2a_phase_t, flags: u64, rows: Option<&Tensor>) -> a2a_combine_in_t {
    a2a_combine_in_t {
        struct_size: size_of::<a2a_combine_in_t>(),
        tokens: rows.map_or(null(), Tensor::as_ptr),
        topk_weights: null(),
        row_weights: null(),
        flags,
        phase,
        max_sms: 0,
    }
}

/// What a rank wants back.
#[derive(Default)]
pub struct CombineOut {
    pub tokens: Option<Tensor>,
    pub topk_weights: Option<Tensor>,
    pub status: Option<Tensor>,
}

impl CombineOut {
    pub fn raw(&mut self) -> a2a_combine_out_t {
        a2a_combine_out_t {
            struct_size: size_of::<a2a_combine_out_t>(),
            tokens: out_ptr(&mut self.tokens),
            topk_weights: out_ptr(&mut self.topk_weights),
            status: out_ptr(&mut self.status),
        }
    }
}

/// Runs a call as an engine's thread might be set: subnormals flushed, rounding toward zero. Says if the call left
/// the thread's modes changed. Means nothing on other architectures, where it only runs the call.
pub fn in_odd_float_modes<T>(call: impl FnOnce() -> T) -> (T, bool) {
    #[cfg(target_arch = "x86_64")]
    {
        let (mut saved, mut after) = (0u32, 0u32);
        // Flush to zero, denormals are zero, round toward zero, exceptions masked.
        let odd = 0x8000u32 | 0x0040 | 0x6000 | 0x1f80;
        // SAFETY: MXCSR is put back before any float of ours is computed; the sticky flags mean nothing to us.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", "ldmxcsr [{}]", in(reg) &mut saved, in(reg) &odd, options(nostack));
            let result = call();
            std::arch::asm!("stmxcsr [{}]", "ldmxcsr [{}]", in(reg) &mut after, in(reg) &saved, options(nostack));
            (result, after & !0x3f != odd)
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    (call(), false)
}

// ---------------------------------------------------------------------------------- random, recorded

/// SplitMix64: small, and the same on every rank.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    /// A stream of its own for every list of words.
    pub fn new(words: &[u64]) -> Rng {
        let mut rng = Rng(0x2545_f491_4f6c_dd1d);
        for &word in words {
            rng.0 ^= word;
            rng.0 = rng.next();
        }
        rng
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// 0 to n - 1.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// True once in n.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// A routing of tests/data; its README says what it is and how it lies in the file.
pub struct Recorded {
    pub tokens: usize,
    pub topk: usize,
    pub experts: usize,
    /// [tokens, topk].
    pub ids: Vec<i64>,
    /// [tokens, topk] float32 as bits.
    pub weights: Vec<u32>,
}

impl Recorded {
    /// One of ours, which the program carries: it may run where there is no checkout.
    pub fn load(name: &str) -> Recorded {
        let file: &[u8] = match name {
            "mixtral" => include_bytes!("../data/mixtral.a2ar"),
            "qwen3_moe" => include_bytes!("../data/qwen3_moe.a2ar"),
            "deepseek_v3" => include_bytes!("../data/deepseek_v3.a2ar"),
            "gaussian" => include_bytes!("../data/gaussian.a2ar"),
            "worst" => include_bytes!("../data/worst.a2ar"),
            _ => panic!("no recording {name:?}"),
        };
        Recorded::parse(file).unwrap_or_else(|| panic!("{name} is no recording"))
    }
    pub fn parse(file: &[u8]) -> Option<Recorded> {
        let int = |at: usize| {
            file.get(at..at + 4).map(|word| i32::from_le_bytes(word.try_into().expect("four bytes")) as usize)
        };
        let (tokens, topk, experts) = (int(8)?, int(12)?, int(16)?);
        let rest = file.strip_prefix(b"A2AROUT1").and_then(|_| file.get(56..))?;
        if rest.len() != 6 * tokens * topk {
            return None;
        }
        let (ids, weights) = rest.split_at(2 * tokens * topk);
        Some(Recorded {
            tokens,
            topk,
            experts,
            ids: ids.chunks_exact(2).map(|id| i64::from(i16::from_le_bytes([id[0], id[1]]))).collect(),
            weights: weights
                .chunks_exact(4)
                .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
                .collect(),
        })
    }
}

// ------------------------------------------------------------------------------------------- launcher

/// One rank's place in a group.
#[derive(Clone)]
pub struct Seat {
    pub rank: usize,
    pub world: usize,
    pub id: GroupId,
    /// The job's own parameters.
    pub args: Vec<String>,
}

/// What a rank does. A named function, so that a child process can be told to do it.
pub type Job = fn(&Seat) -> Result<(), String>;

/// The ranks that live in one process.
#[derive(Clone, Debug)]
pub enum Host {
    /// Threads of this process.
    Here(Vec<usize>),
    /// Threads of a child.
    Child(Vec<usize>),
}

const JOB: &str = "A2A_TEST_JOB";
const RANKS: &str = "A2A_TEST_RANKS";
const WORLD: &str = "A2A_TEST_WORLD";
const ID: &str = "A2A_TEST_ID";
const ARGS: &str = "A2A_TEST_ARGS";
/// Also of a program that is started by hand.
const DEVICE: &str = "A2A_TEST_DEVICE";

/// As `choose_device` was told; nothing is the CPU.
static CHOSEN: OnceLock<String> = OnceLock::new();

/// Where everything lies, here and in the children: "cpu", "cuda" (the first GPU), "cuda:N", or "cuda:rank" (rank r has
/// GPU r % the number of GPUs). Once, before other threads exist.
pub fn choose_device(device: &str) -> Result<(), String> {
    use_device(device, &Vec::from_iter(0..A2A_MAX_RANKS as usize))
}

/// Each process says that it is a host of its own.
pub fn are_apart() -> bool {
    std::env::var("A2A_TEST_TRANSPORT").is_ok_and(|transport| transport == "hosts")
}

/// As A2A_TEST_DEVICE says; without it, on the CPU.
pub fn choose_device_of_environment() -> Result<(), String> {
    std::env::var(DEVICE).map_or(Ok(()), |device| choose_device(&device))
}

fn use_device(device: &str, ranks: &[usize]) -> Result<(), String> {
    match device.split_once(':') {
        None if device == "cpu" => return Ok(()),
        None if device == "cuda" => cuda::enable(0),
        Some(("cuda", "rank")) => cuda::enable_by_rank(ranks),
        Some(("cuda", ordinal)) if ordinal.parse::<i32>().is_ok() => {
            cuda::enable(ordinal.parse().expect("parsed before"))
        }
        _ => Err("no such device: cpu, cuda, cuda:N and cuda:rank are".into()),
    }
    .map_err(|error| format!("{device}: {error}"))?;
    CHOSEN.set(device.into()).expect("a device is chosen once");
    Ok(())
}

/// For each group with ranks that are threads of this process and share a GPU: where they meet.
static MEETINGS: Mutex<BTreeMap<[u8; 128], Arc<Turn>>> = Mutex::new(BTreeMap::new());

/// On a GPU, waits until the group's other ranks in this process have come here too: between what takes the GPU's
/// memory and the first kernel that waits for a peer. Nothing on the CPU.
pub fn meet(seat: &Seat) -> Result<(), String> {
    let turn = MEETINGS.lock().unwrap().get(&seat.id.0.bytes).cloned();
    turn.map_or(Ok(()), |turn| turn.wait())
}

/// Runs a child's job and exits; returns at once in the parent.
pub fn worker(jobs: &[(&str, Job)]) {
    let Ok(name) = std::env::var(JOB) else { return };
    // SAFETY: a flag of this process. It is killed when the thread that spawned it ends, whatever ended that.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let var = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("a worker needs {name}"));
    let (_, job) = jobs.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no job {name:?}"));
    let ranks: Vec<usize> = var(RANKS).split(',').map(|rank| rank.parse().expect("a rank")).collect();
    let args = var(ARGS).split('\n').filter(|arg| !arg.is_empty()).map(String::from).collect();
    let seat =
        Seat { rank: 0, world: var(WORLD).parse().expect("a size"), id: GroupId::from_hex(&var(ID)), args };
    let job = *job;
    if let Ok(device) = std::env::var(DEVICE) {
        use_device(&device, &ranks).unwrap_or_else(|error| panic!("{DEVICE}={error}"));
    }
    // The parent keeps the time: it kills a child that is late.
    let outcome = join(start(&ranks, &seat, Arc::new(job)), Instant::now() + Duration::from_secs(3600));
    if let Err(errors) = &outcome {
        eprintln!("{errors}");
    }
    std::process::exit(if outcome.is_ok() { 0 } else { 1 });
}

type Rank = (usize, JoinHandle<()>, Receiver<Result<(), String>>);

/// What every rank runs.
type SharedJob = Arc<dyn Fn(&Seat) -> Result<(), String> + Send + Sync>;

fn start(ranks: &[usize], seat: &Seat, job: SharedJob) -> Vec<Rank> {
    if cuda::is_enabled() {
        cuda::reserve(ranks);
        MEETINGS.lock().unwrap().insert(seat.id.0.bytes, Arc::new(Turn::new(ranks.len())));
    }
    ranks
        .iter()
        .map(|&rank| {
            let (job, seat) = (job.clone(), Seat { rank, ..seat.clone() });
            let (done, outcome) = channel();
            let body = move || {
                let run = || {
                    if cuda::is_enabled() {
                        cuda::enter_rank(rank);
                    }
                    job(&seat)
                };
                let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
                    let text = payload.downcast_ref::<String>().cloned();
                    let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string()));
                    Err(format!("panicked: {}", text.unwrap_or_default()))
                });
                let turn = MEETINGS.lock().unwrap().get(&seat.id.0.bytes).cloned();
                if let Some(turn) = turn.filter(|_| result.is_err()) {
                    turn.fail();
                }
                // Nobody listens any more once the time is up.
                let _ = done.send(result);
            };
            let thread =
                std::thread::Builder::new().name(format!("rank {rank}")).spawn(body).expect("a thread");
            (rank, thread, outcome)
        })
        .collect()
}

/// Collects what the ranks say. One that is late is named and left behind: a thread cannot be killed.
fn join(ranks: Vec<Rank>, deadline: Instant) -> Result<(), String> {
    let mut errors = Vec::new();
    for (rank, thread, outcome) in ranks {
        match outcome.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(result) => {
                errors.extend(result.err().map(|error| format!("rank {rank}: {error}")));
                // It has said its last word; its thread-locals are torn down before anything else is measured.
                let _ = thread.join();
            }
            Err(_) => errors.push(format!("rank {rank}: not finished when the time was up")),
        }
    }
    // A rank that ends takes the others' steps with it: the cause comes before what it caused.
    errors.sort_by_key(|error| error.contains("A2A_PEER_LOST"));
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

/// Runs a closure as every rank of a new group, as threads.
pub fn threads(
    world: usize,
    limit: Duration,
    job: impl Fn(&Seat) -> Result<(), String> + Send + Sync + 'static,
) -> Result<(), String> {
    let seat = Seat { rank: 0, world, id: GroupId::new(), args: Vec::new() };
    let ranks: Vec<usize> = (0..world).collect();
    join(start(&ranks, &seat, Arc::new(job)), Instant::now() + limit)
}

/// Runs a named job as every rank of a new group, spread over `hosts`. Children that are late are killed.
pub fn launch(
    (name, job): (&str, Job),
    world: usize,
    hosts: &[Host],
    args: &[String],
    limit: Duration,
) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    let seat = Seat { rank: 0, world, id: GroupId::new(), args: args.to_vec() };
    let mut children = Vec::new();
    let mut here = Vec::new();
    for host in hosts {
        match host {
            Host::Here(ranks) => here.extend(start(ranks, &seat, Arc::new(job))),
            Host::Child(ranks) => children.push(Worker::spawn(name, ranks, &seat)),
        }
    }
    let mut errors: Vec<String> = join(here, deadline).err().into_iter().collect();
    for mut child in children {
        match child.wait(deadline) {
            Some(status) if status.success() => {}
            Some(status) => errors.push(format!("{}: {status}\n{}", child.name, child.stderr())),
            None => {
                child.kill();
                errors.push(format!(
                    "{}: killed, not finished when the time was up\n{}",
                    child.name,
                    child.stderr()
                ));
            }
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n")) }
}

/// A barrier for ranks that are threads: a rank that failed does not keep the others waiting for ever.
pub struct Turn {
    ranks: usize,
    /// `None` once a rank has failed, which comes no more.
    arrived: Mutex<Option<usize>>,
    changed: Condvar,
}

impl Turn {
    pub fn new(ranks: usize) -> Turn {
        Turn { ranks, arrived: Mutex::new(Some(0)), changed: Condvar::new() }
    }

    fn fail(&self) {
        *self.arrived.lock().unwrap() = None;
        self.changed.notify_all();
    }

    /// Returns when every rank has called it as often as this one.
    pub fn wait(&self) -> Result<(), String> {
        let mut arrived = self.arrived.lock().unwrap();
        let failed = || Err("another rank has failed".into());
        let Some(count) = &mut *arrived else { return failed() };
        *count += 1;
        self.changed.notify_all();
        let due = count.next_multiple_of(self.ranks);
        let limit = Duration::from_secs(30);
        let waits = |arrived: &mut Option<usize>| arrived.is_some_and(|count| count < due);
        let (arrived, late) = self.changed.wait_timeout_while(arrived, limit, waits).unwrap();
        if arrived.is_none() {
            return failed();
        }
        if late.timed_out() { Err("another rank did not come to its turn".into()) } else { Ok(()) }
    }
}

/// A child that runs a job for some ranks. Killed on drop, and by the kernel when the thread that spawned it ends.
pub struct Worker {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Worker {
    pub fn spawn(job: &str, ranks: &[usize], seat: &Seat) -> Worker {
        Worker::spawn_in(job, ranks, seat, &[], &[])
    }

    /// Through another program, and with more in its environment.
    pub fn spawn_in(
        job: &str,
        ranks: &[usize],
        seat: &Seat,
        prefix: &[String],
        environment: &[(&str, &str)],
    ) -> Worker {
        let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
        let this = std::env::current_exe().expect("this executable");
        let mut command = Command::new(prefix.first().map_or(this.as_os_str(), |program| program.as_ref()));
        if let [_, arguments @ ..] = prefix {
            command.args(arguments).arg(this);
        }
        command
            .envs(environment.iter().copied())
            .env(JOB, job)
            .env(RANKS, list.join(","))
            .env(WORLD, seat.world.to_string())
            .env(ID, seat.id.to_hex())
            .env(ARGS, seat.args.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        match CHOSEN.get() {
            Some(device) => command.env(DEVICE, device),
            None => command.env_remove(DEVICE),
        };
        if are_apart() {
            // For NCCL too, which then takes no shared memory.
            let host = format!("{}-{}", seat.id.to_hex(), list[0]);
            command.env("A2A_HOST_ID", &host).env("NCCL_HOSTID", &host);
        }
        let mut child = command.spawn().expect("a child process");
        let (send, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // Whoever does not read the lines does not want them.
                let _ = send.send(line);
            }
        });
        let stderr = Arc::new(Mutex::new(String::new()));
        let (mut pipe, text) = (child.stderr.take().expect("piped"), stderr.clone());
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut chunk) {
                text.lock().unwrap().push_str(&String::from_utf8_lossy(&chunk[..count]));
            }
        });
        Worker {
            name: format!("process {} (rank {})", child.id(), list.join(", ")),
            stdin: child.stdin.take(),
            child,
            lines,
            stderr,
            reader: Some(reader),
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line of its standard output, within the limit.
    pub fn line(&self, limit: Duration) -> Result<String, String> {
        self.lines.recv_timeout(limit).map_err(|error| match error {
            RecvTimeoutError::Timeout => format!("{}: no line after {limit:?}", self.name),
            RecvTimeoutError::Disconnected => {
                format!("{}: ended without another line\n{}", self.name, self.stderr())
            }
        })
    }

    /// Writes a line to its standard input.
    pub fn tell(&mut self, line: &str) -> Result<(), String> {
        let stdin = self.stdin.as_mut().expect("open until the child is dropped");
        writeln!(stdin, "{line}").map_err(|error| format!("{}: {error}", self.name))
    }

    /// What it has written to standard error; all of it once it has been waited for.
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// kill(2), for SIGSTOP, SIGCONT and worse.
    pub fn signal(&self, signal: i32) {
        // SAFETY: our own child, not yet reaped while `self` lives and `wait` has not returned its status.
        unsafe { libc::kill(self.pid(), signal) };
    }
    /// Returns once all its threads stand.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        self.stands();
    }
    /// Returns once it has stopped, whoever stopped it, or ended.
    pub fn stands(&self) {
        // SAFETY: plain data; our own child, whose status is left where it is.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let either = libc::WSTOPPED | libc::WEXITED | libc::WNOWAIT;
            libc::waitid(libc::P_PID, self.child.id(), &mut info, either);
        }
    }
    pub fn go_on(&self) {
        self.signal(libc::SIGCONT);
    }
    pub fn kill(&mut self) {
        // A child that has ended already is no failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its exit status, or `None` at the deadline.
    pub fn wait(&mut self, deadline: Instant) -> Option<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                if let Some(reader) = self.reader.take() {
                    // It ends with the pipe, which closes with the child.
                    let _ = reader.join();
                }
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}
