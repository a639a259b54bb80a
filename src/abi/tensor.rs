//! The data plane from C to Rust and back: pointers and tensors become checked values, views become tensors.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::guard::read_struct;
use super::types::*;
use crate::comm::{
    ColumnTensor, CombineRecv, CombineSend, Comm, DispatchRecv, DispatchSend, Element, Output, Routing,
    Tensor, View,
};
use crate::config::{DeviceKind, MAX_EXTRAS, ROW_ALIGN, ScaleLayout};
use crate::device::map::{PLANES, Plane};
use crate::device::{Columns, Rows, Stream};
use crate::error::{Error, Result};

/// A routing and the shape arrays of its views.
pub struct RoutingHandle {
    routing: Routing,
    /// [ndim] sizes, then [ndim] strides, one entry a view.
    shapes: Box<[[AtomicI64; 6]; VIEWS]>,
}

/// Views by plane, then expert_counts, rank_counts, status, the combine buffer, combine's status, expert_offsets.
const VIEWS: usize = PLANES + 6;

impl RoutingHandle {
    pub fn new(routing: Routing) -> RoutingHandle {
        let shapes = std::array::from_fn(|_| std::array::from_fn(|_| AtomicI64::new(0)));
        RoutingHandle { routing, shapes: Box::new(shapes) }
    }

    /// Makes the caller's tensor a view.
    ///
    /// # Safety
    /// `tensor` is writable.
    unsafe fn show(&self, at: Place, entry: usize, view: &View, tensor: *mut a2a_tensor_t) {
        let words = &self.shapes[entry];
        for i in 0..view.ndim {
            words[i].store(view.dims[i], Ordering::Relaxed);
            words[3 + i].store(view.strides[i], Ordering::Relaxed);
        }
        let value = a2a_tensor_t {
            data: view.address as *mut _,
            device: at.tensor_device(),
            ndim: view.ndim as i32,
            dtype: a2a_tensor_dtype_t {
                code: view.element.code,
                bits: view.element.bits,
                lanes: view.element.lanes,
            },
            shape: words[0].as_ptr(),
            strides: words[3].as_ptr(),
            byte_offset: 0,
        };
        // SAFETY: forwarded.
        unsafe { tensor.write(value) };
    }
}

/// Where a comm's tensors lie.
#[derive(Clone, Copy)]
struct Place {
    rank: u32,
    device: DeviceKind,
    ordinal: i32,
}

fn place(comm: &Comm) -> Place {
    let config = comm.config();
    Place { rank: config.rank, device: config.device, ordinal: config.device_ordinal }
}

/// DLPack's device types: kDLCPU, kDLCUDA, and memory of the host and of the driver that kernels can address.
const DL_CPU: i32 = 1;
const DL_CUDA: i32 = 2;
const DL_CUDA_HOST: i32 = 3;
const DL_CUDA_MANAGED: i32 = 13;

impl Place {
    fn tensor_device(self) -> a2a_tensor_device_t {
        match self.device {
            DeviceKind::Cpu => a2a_tensor_device_t { device_type: DL_CPU, device_id: 0 },
            DeviceKind::Cuda => a2a_tensor_device_t { device_type: DL_CUDA, device_id: self.ordinal },
        }
    }
    /// Refuses a tensor that the comm's device cannot address.
    fn check(self, name: &str, device: a2a_tensor_device_t) -> Result<()> {
        let (rank, given) = (self.rank, device.device_type);
        let refuse = |text: String| Err(Error::invalid(format!("rank {rank}: {name} lies on {text}")));
        match (self.device, given) {
            (DeviceKind::Cpu, DL_CPU) | (DeviceKind::Cuda, DL_CUDA_HOST | DL_CUDA_MANAGED) => Ok(()),
            (DeviceKind::Cuda, DL_CUDA) if device.device_id == self.ordinal => Ok(()),
            (DeviceKind::Cuda, DL_CUDA) => refuse(format!(
                "CUDA device {}, the comm is on device {} (device_ordinal)",
                device.device_id, self.ordinal
            )),
            (DeviceKind::Cpu, _) => {
                refuse(format!("DLPack device type {given}, the comm is on the CPU ({DL_CPU})"))
            }
            (DeviceKind::Cuda, _) => {
                refuse(format!("DLPack device type {given}, the comm is on CUDA memory ({DL_CUDA})"))
            }
        }
    }
}

/// What every tensor says of itself.
struct Header {
    address: usize,
    has_data: bool,
    ndim: usize,
    dims: [i64; 3],
    strides: [i64; 3],
    element: Element,
}

/// Checks a tensor's device, dimensions and element type.
///
/// # Safety
/// `tensor` points at a tensor whose shape and strides have ndim entries.
unsafe fn read_header(at: Place, name: &str, tensor: *const a2a_tensor_t) -> Result<Header> {
    let invalid = |text: String| Err(Error::invalid(format!("rank {}: {name} {text}", at.rank)));
    // SAFETY: forwarded.
    let raw = unsafe { tensor.read() };
    at.check(name, raw.device)?;
    let ndim = raw.ndim as usize;
    if !(1..=3).contains(&raw.ndim) || raw.shape.is_null() {
        return invalid(format!(
            "has {} dimensions and shape {:p}, it needs 1 to 3 dimensions",
            raw.ndim, raw.shape
        ));
    }
    let element = Element { code: raw.dtype.code, bits: raw.dtype.bits, lanes: raw.dtype.lanes };
    let size = element.bytes() as i64;
    if size == 0 {
        return invalid(format!("has elements of {element}, which are no whole bytes"));
    }
    let (mut dims, mut strides) = ([1i64; 3], [0i64; 3]);
    let mut compact = 1i64;
    for i in (0..ndim).rev() {
        // SAFETY: i < ndim entries; not NULL.
        unsafe {
            dims[i] = raw.shape.add(i).read();
            strides[i] = if raw.strides.is_null() { compact } else { raw.strides.add(i).read() };
        }
        if dims[i] < 0 {
            return invalid(format!("has dimension {i} of size {}", dims[i]));
        }
        compact = match compact.checked_mul(dims[i].max(1)) {
            Some(elements) if elements <= i64::MAX / size => elements,
            _ => return invalid(format!("has the shape {:?}, which is past the address space", &dims[..=i])),
        };
    }
    let address = (raw.data as usize).wrapping_add(raw.byte_offset as usize);
    Ok(Header { address, has_data: !raw.data.is_null(), ndim, dims, strides, element })
}

/// Reads a tensor. `aligned`: rows of tokens, which are moved in 16-byte vectors.
///
/// # Safety
/// As `read_header`, and its data is there.
unsafe fn read(at: Place, name: &str, tensor: *const a2a_tensor_t, aligned: bool) -> Result<Tensor> {
    let invalid = |text: String| Err(Error::invalid(format!("rank {}: {name} {text}", at.rank)));
    // SAFETY: forwarded.
    let Header { address, has_data, ndim, dims, strides, element } =
        unsafe { read_header(at, name, tensor)? };
    let size = element.bytes() as i64;
    let columns = if ndim > 1 { dims[ndim - 1] } else { 1 };
    let rows: i64 = if ndim > 1 { dims[..ndim - 1].iter().product() } else { dims[0] };
    let row_stride = match ndim {
        1 => strides[0],
        _ => strides[ndim - 2],
    };
    // Without elements strides mean nothing, whatever a framework put there (numpy: zeros).
    let empty = rows == 0 || columns == 0;
    if ndim > 1 && columns > 1 && strides[ndim - 1] != 1 && !empty {
        return invalid(format!(
            "has stride {} in its last dimension, it must be contiguous",
            strides[ndim - 1]
        ));
    }
    if ndim == 3 && dims[0] > 1 && !empty && dims[1].checked_mul(strides[1]) != Some(strides[0]) {
        return invalid(format!(
            "has the strides {strides:?} over {dims:?}: its rows must be evenly spaced over both dimensions"
        ));
    }
    // Nor does the stride of a single row.
    let row_stride = if rows > 1 && !empty { row_stride } else { columns };
    let (row_bytes, stride) = (columns * size, row_stride.checked_mul(size).unwrap_or(-1));
    if stride < row_bytes || stride.checked_mul(rows).is_none_or(|span| span > isize::MAX as i64) {
        return invalid(format!("has rows of {row_bytes} bytes {stride} bytes apart"));
    }
    if rows > 0 && row_bytes > 0 {
        if !has_data {
            return invalid(format!("has no data and the shape {:?}", &dims[..ndim]));
        }
        // The CPU reads elements wherever they lie, a GPU where their size divides the address.
        if at.device == DeviceKind::Cuda && !address.is_multiple_of(size as usize) {
            return invalid(format!(
                "has data at {address:#x}, on CUDA it must be a multiple of the {size} bytes of {element}"
            ));
        }
        let align = ROW_ALIGN as usize;
        if aligned && (!address.is_multiple_of(align) || !(stride as usize).is_multiple_of(align) && rows > 1)
        {
            return invalid(format!(
                "has data at {address:#x} and rows {stride} bytes apart, both must be multiples of {align} bytes"
            ));
        }
    }
    // SAFETY: the caller vouches for the memory the tensor describes, during the call.
    let rows = unsafe { Rows::new(address as *mut u8, rows as usize, row_bytes as usize, stride as usize) };
    Ok(Tensor { rows, ndim, dims, element })
}

/// # Safety
/// As `read`, or NULL.
unsafe fn optional(
    at: Place,
    name: &str,
    tensor: *const a2a_tensor_t,
    aligned: bool,
) -> Result<Option<Tensor>> {
    if tensor.is_null() {
        return Ok(None);
    }
    // SAFETY: forwarded.
    unsafe { read(at, name, tensor, aligned) }.map(Some)
}

/// An output: not wanted (NULL), a view (no data), or the caller's. Of a tensor without data nothing else is read: what
/// an earlier step left in it says nothing about this one.
///
/// # Safety
/// As `read`, or NULL.
unsafe fn output(at: Place, name: &str, tensor: *mut a2a_tensor_t, aligned: bool) -> Result<Output> {
    // SAFETY: forwarded, here and below.
    unsafe {
        if tensor.is_null() {
            return Ok(Output::Nothing);
        }
        if (*tensor).data.is_null() {
            return Ok(Output::View);
        }
        read(at, name, tensor, aligned).map(Output::Into)
    }
}

/// Reads a tensor of 4-byte elements whose token dimension is contiguous: [rows, S] or [blocks, rows, S].
///
/// # Safety
/// As `read`.
unsafe fn read_columns(at: Place, name: &str, tensor: *const a2a_tensor_t) -> Result<ColumnTensor> {
    let invalid = |text: String| Err(Error::invalid(format!("rank {}: {name} {text}", at.rank)));
    // SAFETY: forwarded.
    let Header { address, has_data, ndim, dims, strides, element } =
        unsafe { read_header(at, name, tensor)? };
    if ndim < 2 || element.bytes() != 4 {
        return invalid(format!(
            "has {ndim} dimensions of {element}, scales by column are [rows, S] or [blocks, rows, S] of 4 bytes each"
        ));
    }
    let (block, elements) = (dims[ndim - 2], dims[ndim - 1]);
    let (blocks, block_stride) = if ndim == 3 { (dims[0], strides[0]) } else { (1, 0) };
    let (row_stride, column_stride) = (strides[ndim - 2], strides[ndim - 1]);
    let used = blocks > 0 && block > 0 && elements > 0;
    if used && (block > 1 && row_stride != 1 || elements > 1 && column_stride < block) {
        return invalid(format!(
            "has the strides {:?} over {:?}, its token dimension must be contiguous (scale_layout column)",
            &strides[..ndim],
            &dims[..ndim]
        ));
    }
    let span = (blocks - 1)
        .max(0)
        .checked_mul(block_stride)
        .zip((elements - 1).max(0).checked_mul(column_stride))
        .and_then(|(a, b)| a.checked_add(b)?.checked_add(block)?.checked_mul(4));
    if used && (block_stride < 0 || span.is_none_or(|span| span > isize::MAX as i64) || !has_data) {
        return invalid(format!(
            "has no data, or the strides {:?}, over {:?}",
            &strides[..ndim],
            &dims[..ndim]
        ));
    }
    let shape = (blocks as usize, block as usize, elements as usize);
    let (block_stride, column_stride) = (block_stride as usize * 4, column_stride.max(0) as usize * 4);
    // SAFETY: the caller vouches for the memory the tensor describes, during the call.
    let columns = unsafe { Columns::new(address as *mut u8, shape, block_stride, column_stride) };
    Ok(ColumnTensor { columns, ndim, dims, element })
}

/// An output that takes scales by column.
///
/// # Safety
/// As `output`.
unsafe fn column_output(at: Place, name: &str, tensor: *mut a2a_tensor_t) -> Result<Output> {
    // SAFETY: forwarded.
    unsafe {
        if tensor.is_null() || (*tensor).data.is_null() {
            return output(at, name, tensor, false);
        }
        read_columns(at, name, tensor).map(Output::Columns)
    }
}

fn phases(rank: u32, phase: a2a_phase_t) -> Result<(bool, bool)> {
    match phase {
        A2A_PHASE_BOTH => Ok((true, true)),
        A2A_PHASE_SEND => Ok((true, false)),
        A2A_PHASE_RECV => Ok((false, true)),
        _ => Err(Error::invalid(format!(
            "rank {rank}: phase is {phase}, known are 0 (both), 1 (send) and 2 (recv)"
        ))),
    }
}

fn required<'a, T>(rank: u32, name: &str, value: &'a Option<T>) -> Result<&'a T> {
    value.as_ref().ok_or_else(|| Error::invalid(format!("rank {rank}: {name} is NULL")))
}

/// A call's bound on multiprocessors; 0: none of its own.
fn max_sms(comm: &Comm, max_sms: i32) -> Result<u32> {
    let rank = comm.config().rank;
    let sms = u32::try_from(max_sms)
        .map_err(|_| Error::invalid(format!("rank {rank}: max_sms is {max_sms}, it must be at least 0")))?;
    comm.plan().check_sms(sms).map_err(|why| Error::unsupported(format!("rank {rank}: {why}")))?;
    Ok(sms)
}

/// # Safety
/// Every pointer is as the header says.
pub unsafe fn dispatch(
    comm: &Arc<Comm>,
    handle: &RoutingHandle,
    input: &a2a_dispatch_in_t,
    out: *mut a2a_dispatch_out_t,
    stream: Stream,
) -> Result<()> {
    let rank = comm.config().rank;
    let (sends, recvs) = phases(rank, input.phase)?;
    if input.reserved != 0 {
        return Err(Error::invalid(format!("rank {rank}: reserved is {}, it must be 0", input.reserved)));
    }
    let max_sms = max_sms(comm, input.max_sms)?;
    let send = match sends {
        // SAFETY: forwarded.
        true => Some(unsafe { dispatch_send(comm, input)? }),
        false => None,
    };
    let (mut recv, mut raw) = (None, None);
    if recvs {
        // SAFETY: forwarded.
        let outputs = unsafe { read_struct(out)? };
        // SAFETY: forwarded.
        recv = Some(unsafe { dispatch_recv(comm, &outputs)? });
        raw = Some(outputs);
    }
    let views = comm.dispatch(&handle.routing, send.as_ref(), recv.as_ref(), input.flags, max_sms, stream)?;
    if let Some(raw) = raw {
        let tensors = planes(&raw);
        let small = [
            (PLANES, &views.expert_counts, raw.expert_counts),
            (PLANES + 1, &views.rank_counts, raw.rank_counts),
            (PLANES + 2, &views.status, raw.status),
            (PLANES + 5, &views.expert_offsets, raw.expert_offsets),
        ];
        let rows =
            views.planes.iter().zip(tensors).enumerate().map(|(i, (view, tensor))| (i, view, tensor.1));
        for (entry, view, tensor) in rows.chain(small) {
            if let Some(view) = view {
                // SAFETY: a view was asked for through this pointer.
                unsafe { handle.show(place(comm), entry, view, tensor) };
            }
        }
        // SAFETY: read_struct found at least the first version's size behind the pointer.
        unsafe { (*out).num_rows = views.num_rows };
    }
    Ok(())
}

/// # Safety
/// As `dispatch`.
unsafe fn dispatch_send<'a>(comm: &Comm, input: &'a a2a_dispatch_in_t) -> Result<DispatchSend<'a>> {
    let config = comm.config();
    let (rank, at) = (config.rank, place(comm));
    let mut extras = [None; MAX_EXTRAS];
    // SAFETY: forwarded, here and below.
    unsafe {
        for (i, extra) in extras.iter_mut().enumerate() {
            *extra = optional(at, format_extra(i), input.extras[i], false)?;
        }
        let tokens = optional(at, "tokens", input.tokens, true)?;
        Ok(DispatchSend {
            tokens: *required(rank, "tokens", &tokens)?,
            topk_ids: optional(at, "topk_ids", input.topk_ids, false)?,
            topk_weights: optional(at, "topk_weights", input.topk_weights, false)?,
            scales: optional(at, "scales", input.scales, false)?,
            extras,
            rank_tokens: (!input.rank_tokens.is_null())
                .then(|| std::slice::from_raw_parts(input.rank_tokens, config.num_ranks as usize)),
            max_tokens: input.max_tokens,
        })
    }
}

/// The name of an extra, without an allocation in the data plane.
fn format_extra(i: usize) -> &'static str {
    const NAMES: [&str; MAX_EXTRAS] = [
        "extras[0]",
        "extras[1]",
        "extras[2]",
        "extras[3]",
        "extras[4]",
        "extras[5]",
        "extras[6]",
        "extras[7]",
    ];
    NAMES[i]
}

/// The names of the outputs that hold rows, by plane.
const OUTPUTS: [&str; PLANES] = [
    "the output tokens",
    "the output topk_ids",
    "the output topk_weights",
    "the output row_source",
    "the output scales",
    "the output extras[0]",
    "the output extras[1]",
    "the output extras[2]",
    "the output extras[3]",
    "the output extras[4]",
    "the output extras[5]",
    "the output extras[6]",
    "the output extras[7]",
];

/// The outputs that hold rows, by plane, and whether they are moved in 16-byte vectors.
fn planes(raw: &a2a_dispatch_out_t) -> [(bool, *mut a2a_tensor_t); PLANES] {
    let mut planes = [(false, std::ptr::null_mut()); PLANES];
    planes[Plane::Tokens as usize] = (true, raw.tokens);
    planes[Plane::Ids as usize].1 = raw.topk_ids;
    planes[Plane::Weights as usize].1 = raw.topk_weights;
    planes[Plane::Source as usize].1 = raw.row_source;
    planes[Plane::Scales as usize].1 = raw.scales;
    for (i, extra) in raw.extras.iter().enumerate() {
        planes[Plane::Extra0 as usize + i].1 = *extra;
    }
    planes
}

/// # Safety
/// As `dispatch`.
unsafe fn dispatch_recv(comm: &Comm, raw: &a2a_dispatch_out_t) -> Result<DispatchRecv> {
    let at = place(comm);
    let by_column = comm.config().scale_layout == ScaleLayout::Column;
    let mut recv = DispatchRecv::default();
    // SAFETY: forwarded, here and below.
    unsafe {
        for (plane, (aligned, tensor)) in planes(raw).into_iter().enumerate() {
            recv.planes[plane] = match plane == Plane::Scales as usize && by_column {
                true => column_output(at, OUTPUTS[plane], tensor)?,
                false => output(at, OUTPUTS[plane], tensor, aligned)?,
            };
        }
        recv.expert_counts = output(at, "the output expert_counts", raw.expert_counts, false)?;
        recv.rank_counts = output(at, "the output rank_counts", raw.rank_counts, false)?;
        recv.expert_offsets = output(at, "the output expert_offsets", raw.expert_offsets, false)?;
        recv.expert_stats = output(at, "the output expert_stats", raw.expert_stats, false)?;
        recv.status = output(at, "the output status", raw.status, false)?;
    }
    Ok(recv)
}

/// # Safety
/// Every pointer is as the header says.
pub unsafe fn combine(
    comm: &Arc<Comm>,
    handle: &RoutingHandle,
    input: &a2a_combine_in_t,
    out: *mut a2a_combine_out_t,
    stream: Stream,
) -> Result<()> {
    let (rank, at) = (comm.config().rank, place(comm));
    let (sends, recvs) = phases(rank, input.phase)?;
    let max_sms = max_sms(comm, input.max_sms)?;
    let send = match sends {
        true => {
            // SAFETY: forwarded.
            let tokens = unsafe { optional(at, "tokens", input.tokens, true)? };
            let tokens = *required(rank, "tokens", &tokens)?;
            // SAFETY: forwarded.
            let (topk_weights, row_weights) = unsafe {
                (
                    optional(at, "topk_weights", input.topk_weights, false)?,
                    optional(at, "row_weights", input.row_weights, false)?,
                )
            };
            Some(CombineSend { tokens, topk_weights, row_weights })
        }
        false => None,
    };
    let (mut recv, mut raw) = (None, None);
    if recvs {
        // SAFETY: forwarded, here and below.
        let outputs: a2a_combine_out_t = unsafe { read_struct(out)? };
        recv = Some(CombineRecv {
            // SAFETY: forwarded.
            tokens: unsafe { optional(at, "the output tokens", outputs.tokens, true)? },
            // SAFETY: forwarded.
            topk_weights: unsafe { optional(at, "the output topk_weights", outputs.topk_weights, false)? },
            // SAFETY: forwarded.
            status: unsafe { output(at, "the output status", outputs.status, false)? },
        });
        raw = Some(outputs);
    }
    let view = comm.combine(&handle.routing, send.as_ref(), recv.as_ref(), input.flags, max_sms, stream)?;
    if let (Some(view), Some(raw)) = (view, raw) {
        // SAFETY: a view was asked for through this pointer.
        unsafe { handle.show(place(comm), PLANES + 4, &view, raw.status) };
    }
    Ok(())
}

/// # Safety
/// `tensor` is NULL or a tensor the caller may have preset a type in.
pub unsafe fn combine_buffer(
    comm: &Arc<Comm>,
    handle: &RoutingHandle,
    tensor: *mut a2a_tensor_t,
) -> Result<()> {
    if tensor.is_null() {
        return Err(Error::invalid(format!("rank {}: tensor is NULL", comm.config().rank)));
    }
    // SAFETY: not NULL.
    let preset = unsafe { (*tensor).dtype };
    let element =
        (preset.bits != 0).then_some(Element { code: preset.code, bits: preset.bits, lanes: preset.lanes });
    let view = comm.combine_buffer(&handle.routing, element)?;
    // SAFETY: not NULL, the caller's.
    unsafe { handle.show(place(comm), PLANES + 3, &view, tensor) };
    Ok(())
}
