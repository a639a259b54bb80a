//! Rows on their way out on the CPU: into peers' windows, into this rank's own.
//!
//! Sources and destinations never overlap: a caller's tensor inside its own window is refused before it gets here,
//! and two windows are two mappings.

use super::modes::DefaultModes;
use super::quant::{Row, quantise};
use super::route::Ledger;
use super::{Host, copy_row};
use crate::config::LayoutKind;
use crate::device::map::{IDS, PLANES, SCALES, SOURCE, TOKENS, WEIGHTS, received_bytes};
use crate::device::{Columns, Dispatch, Outbound, column_shape};
use crate::error::Result;
use crate::fault::Point;

/// A row on its way: where the bytes of each plane stand.
pub(super) type Sources = [Option<*const u8>; PLANES];

/// Makes a token's row of the caller's tensors and of what is made rather than read.
pub(super) struct Made<'a> {
    out: &'a Outbound,
    topk: usize,
    source: [i32; 2],
    /// A quantised token, then its scales.
    scratch: &'a mut [u8],
    /// Quantising and summing weights are float arithmetic.
    _modes: DefaultModes,
}

impl<'a> Made<'a> {
    pub fn new(rank: u32, out: &'a Outbound, topk: u32, scratch: &'a mut [u8]) -> Made<'a> {
        Made { out, topk: topk as usize, source: [rank as i32, 0], scratch, _modes: DefaultModes::enter() }
    }

    /// Valid until the next row is made.
    pub fn row(&mut self, l: &Ledger, token: usize) -> Sources {
        let bytes = &self.out.shape.plane_bytes;
        let mut sources = [None; PLANES];
        for (plane, rows) in self.out.planes.iter().enumerate() {
            sources[plane] = rows.as_ref().map(|rows| rows.row(token) as *const u8);
        }
        sources[IDS] = (bytes[IDS] > 0).then(|| l.ids[token * self.topk..].as_ptr() as *const u8);
        sources[WEIGHTS] = (bytes[WEIGHTS] > 0).then(|| l.weights[token * self.topk..].as_ptr() as *const u8);
        sources[SOURCE] = None;
        if bytes[SOURCE] > 0 {
            self.source[1] = token as i32;
            sources[SOURCE] = Some(self.source.as_ptr() as *const u8);
        }
        if let (Some((kind, quant)), Some(from)) = (self.out.quant, sources[TOKENS]) {
            let (tokens, scales) = self.scratch.split_at_mut(bytes[TOKENS] as usize);
            let scales = &mut scales[..bytes[SCALES] as usize];
            let row = Row { from, kind, hidden: bytes[TOKENS] as usize };
            // SAFETY: comm made the row's bytes of the tensor's columns: one a column.
            unsafe { quantise(row, quant, tokens, scales) };
            sources[TOKENS] = Some(tokens.as_ptr());
            sources[SCALES] = Some(scales.as_ptr());
        }
        sources
    }
}

/// What a push moved.
#[derive(Default)]
struct Moved {
    rows: u64,
    bytes: u64,
    remote: u64,
}

impl Moved {
    fn add(&mut self, bytes: u64, remote: bool) {
        self.rows += 1;
        self.bytes += bytes;
        self.remote += if remote { bytes } else { 0 };
    }
}

/// In the default floating-point modes: the sum of a token's weights for an expert: those of the choices that name it, k ascending. `None` if an earlier
/// choice names it already.
pub(super) fn weight_of(ids: &[i32], weights: &[f32], k: usize) -> Option<f32> {
    if ids[..k].contains(&ids[k]) {
        return None;
    }
    let mut sum = weights[k];
    for (id, weight) in ids.iter().zip(weights).skip(k + 1) {
        if *id == ids[k] {
            sum += weight;
        }
    }
    Some(sum)
}

impl Host {
    /// Scales by column in a rank's received rows.
    pub(super) fn received_columns(&self, peer: u32, slot: u32, d: &Dispatch, capacity: u64) -> Columns {
        let local = self.experts.count(peer);
        let (blocks, block, pitch) = column_shape(&d.grid, local, capacity);
        let elements = d.send.shape.plane_bytes[SCALES] as u64 / 4;
        let bytes = blocks * elements * pitch * 4;
        let ptr = self.bases.at(peer, self.map.received(slot, SCALES), bytes);
        let shape = (blocks as usize, block as usize, elements as usize);
        // SAFETY: `at` checked that all of it lies in the window, which stays mapped as long as self.
        unsafe { Columns::new(ptr, shape, (elements * pitch * 4) as usize, pitch as usize * 4) }
    }

    /// Stores a plane's row into a region of a peer's window.
    #[inline]
    fn store(&self, peer: u32, region: u64, row: u64, source: *const u8, bytes: u32) {
        let to = self.bases.at(peer, region + row * bytes as u64, bytes as u64);
        // SAFETY: both sides hold one row of the plane.
        unsafe { copy_row(source, to, bytes as usize, Point::DispatchRow) };
    }

    /// Stores the planes of a row, but for those named, into its place among a peer's received rows.
    fn store_received(&self, d: &Dispatch, peer: u32, row: u64, sources: &Sources, but: &[usize]) {
        for (plane, source) in sources.iter().enumerate() {
            let Some(source) = source.filter(|_| !but.contains(&plane)) else { continue };
            if plane == SCALES && d.columns {
                let capacity = d.grid.capacity(self.experts.count(peer));
                let columns = self.received_columns(peer, d.call.slot, d, capacity);
                // SAFETY: the row of scales has as many elements.
                unsafe { scatter(&columns, row as usize, source) };
                continue;
            }
            let bytes = received_bytes(d.grid.layout, plane, d.send.shape.plane_bytes[plane]);
            self.store(peer, self.map.received(d.call.slot, plane), row, source, bytes);
        }
    }

    fn count_pushed(&self, moved: &Moved) {
        Self::add(&self.stats.rows_pushed, moved.rows);
        Self::add(&self.stats.bytes_pushed, moved.bytes);
        Self::add(&self.stats.bytes_remote, moved.remote);
    }

    /// Stores those planes of a row that are named into this rank's bank at a peer.
    fn store_bank(
        &self,
        d: &Dispatch,
        (peer, position, rows): (u32, u32, u32),
        sources: &Sources,
        planes: &[usize],
    ) {
        let bytes = &d.send.shape.plane_bytes;
        let bank = self.map.banked((d.call.slot, self.rank), (rows, d.grid.bound), bytes);
        for plane in planes {
            if let Some(source) = sources[*plane] {
                self.store(peer, bank[*plane], position as u64, source, bytes[*plane]);
            }
        }
    }

    /// Makes this rank's rows, one token after another.
    fn each_token(&self, d: &Dispatch, mut act: impl FnMut(&Ledger, usize, Sources)) {
        let mut slot = self.slot(d.call.slot);
        let l = self.ledger(d.memory);
        let mut made = Made::new(self.rank, &d.send, d.grid.topk, &mut slot.scratch);
        for token in 0..d.send.tokens as usize {
            let sources = made.row(&l, token);
            act(&l, token, sources);
        }
    }

    pub(super) fn push(&self, d: &Dispatch) -> Result<()> {
        let mut moved = Moved::default();
        let topk = d.grid.topk as usize;
        let present = (0..PLANES).filter(|plane| d.send.shape.plane_bytes[*plane] > 0);
        let row_bytes: u64 = present.map(|plane| d.row_bytes(plane) as u64).sum();
        self.each_token(d, |l, token, mut sources| {
            if d.grid.layout.by_expert() {
                let ids = &l.ids[token * topk..][..topk];
                for k in 0..topk {
                    let Some((key, position)) = l.choice(token * topk + k) else { continue };
                    let Some(weight) = weight_of(ids, &l.weights[token * topk..][..topk], k) else {
                        continue;
                    };
                    let Some(row) = l.place(key, position) else { continue };
                    let peer = self.experts.place(ids[k] as usize).0;
                    sources[IDS] = None;
                    sources[WEIGHTS] = Some(&weight as *const f32 as *const u8);
                    self.store_received(d, peer, row, &sources, &[]);
                    moved.add(row_bytes, peer != self.rank);
                }
                return;
            }
            for (peer, position) in l.targets(token) {
                let row = match d.grid.layout {
                    LayoutKind::RankMajor => Some(self.rank as u64 * d.grid.bound as u64 + position as u64),
                    _ => l.place(peer as usize, position),
                };
                let Some(row) = row else { continue };
                self.store_received(d, peer, row, &sources, &[]);
                moved.add(row_bytes, peer != self.rank);
            }
        });
        self.count_pushed(&moved);
        Ok(())
    }

    pub(super) fn push_first(&self, d: &Dispatch) -> Result<()> {
        let mut moved = Moved::default();
        let topk = d.grid.topk as usize;
        let bytes = d.send.shape.plane_bytes;
        const BESIDE: [usize; 3] = [IDS, WEIGHTS, SOURCE];
        let beside: u64 = BESIDE.iter().map(|plane| bytes[*plane] as u64).sum();
        self.each_token(d, |l, token, sources| {
            for (peer, position) in l.targets(token) {
                let choices = (token * topk..(token + 1) * topk).filter_map(|choice| l.choice(choice));
                let first = choices
                    .filter(|(key, _)| self.experts.owner_of_slot(*key) == peer)
                    .min()
                    .and_then(|(key, position)| l.place(key, position));
                // A token whose first row is dropped has no row at all there: the others lie behind it.
                if let Some(row) = first {
                    self.store_received(d, peer, row, &sources, &BESIDE);
                }
                self.store_bank(d, (peer, position, l.rows_for[peer as usize] as u32), &sources, &BESIDE);
                let moves = if first.is_some() { d.send.wire_bytes() } else { beside };
                moved.add(moves, peer != self.rank);
            }
        });
        self.count_pushed(&moved);
        Ok(())
    }

    pub(super) fn push_bank(&self, d: &Dispatch) -> Result<()> {
        let mut moved = Moved::default();
        let all: [usize; PLANES] = std::array::from_fn(|plane| plane);
        self.each_token(d, |l, token, sources| {
            for (peer, position) in l.targets(token) {
                self.store_bank(d, (peer, position, l.rows_for[peer as usize] as u32), &sources, &all);
                moved.add(d.send.wire_bytes(), peer != self.rank);
            }
        });
        self.count_pushed(&moved);
        Ok(())
    }

    pub(super) fn publish(&self, d: &Dispatch) -> Result<()> {
        self.each_token(d, |_, token, sources| {
            for (plane, source) in sources.iter().enumerate() {
                let Some(source) = source else { continue };
                let region = self.map.published(d.call.slot, plane);
                self.store(self.rank, region, token as u64, *source, d.send.shape.plane_bytes[plane]);
            }
        });
        self.count_copied(d.send.tokens as u64, d.send.wire_bytes());
        Ok(())
    }

    pub(super) fn count_copied(&self, rows: u64, row_bytes: u64) {
        Self::add(&self.stats.rows_copied, rows);
        Self::add(&self.stats.bytes_copied, rows * row_bytes);
    }
}

/// Writes a row of 4-byte elements by column.
///
/// # Safety
/// `columns.elements()` elements stand at `source`.
#[inline]
pub(super) unsafe fn scatter(columns: &Columns, row: usize, source: *const u8) {
    for element in 0..columns.elements {
        // SAFETY: one element on both sides.
        unsafe { std::ptr::copy_nonoverlapping(source.add(element * 4), columns.cell(row, element), 4) };
    }
}
