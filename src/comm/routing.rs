//! A routing: private memory for where the rows of one dispatch went, and what its later halves need to know.

use std::sync::{Arc, Mutex};

use super::Element;
use crate::device::grid::Grid;
use crate::device::map::PLANES;
use crate::device::{Block, Float, Shape, Weighting};

/// What SEND of a dispatch fixed.
#[derive(Clone)]
pub(super) struct Sent {
    pub grid: Grid,
    pub shape: Shape,
    pub tokens: u32,
    pub everyone: bool,
    /// The dispatch was received: it can be combined, and replayed.
    pub received: bool,
    /// Of the members it was sent among.
    pub generation: u64,
    pub flags: u64,
    /// Empty: not told.
    pub rank_tokens: Vec<i32>,
    /// Rows of the outputs, padding included.
    pub capacity: u32,
    /// DLPack types of what travels, by plane.
    pub types: [Element; PLANES],
    /// False for a one-dimensional tensor: its view has one dimension too.
    pub is_2d: [bool; PLANES],
    /// What SEND of the combine fixed.
    pub send_type: Option<Float>,
    pub hidden: u32,
    pub weighting: Weighting,
    pub has_row_weights: bool,
    pub wire_sums: bool,
}

impl Sent {
    pub(super) fn new(grid: Grid, ranks: u32) -> Sent {
        Sent {
            grid,
            shape: Shape::default(),
            tokens: 0,
            everyone: false,
            received: false,
            generation: 0,
            flags: 0,
            // Filled by every dispatch that is told: no step allocates.
            rank_tokens: Vec::with_capacity(ranks as usize),
            capacity: 0,
            types: Default::default(),
            is_2d: [false; PLANES],
            send_type: None,
            hidden: 0,
            weighting: Weighting::None,
            has_row_weights: false,
            wire_sums: false,
        }
    }
}

pub struct Routing {
    pub(super) id: u64,
    /// The comm it belongs to, by a number that is never used twice.
    pub(super) comm: u64,
    pub(super) rank: u32,
    pub(super) slot: u32,
    /// Shared with what is still on its way when the routing is destroyed.
    pub(super) memory: Arc<Block>,
    pub(super) sent: Mutex<Sent>,
}

impl Routing {
    /// Of its last dispatch. A routing that is in another comm's call, and so none of the caller's, has none to tell.
    pub(super) fn tokens(&self) -> u32 {
        self.sent.try_lock().map_or(0, |sent| sent.tokens)
    }
}
