//! A routing: private memory for where the rows of one dispatch went, and what its later halves need to know.

use std::sync::Mutex;

use super::Element;
use crate::device::map::PLANES;
use crate::device::{Block, Float, Shape};

/// What SEND of a dispatch fixed.
#[derive(Clone, Default)]
pub(super) struct Sent {
    pub shape: Shape,
    pub tokens: u32,
    pub everyone: bool,
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
}

pub struct Routing {
    pub(super) id: u64,
    /// The comm it belongs to, by a number that is never used twice.
    pub(super) comm: u64,
    pub(super) rank: u32,
    pub(super) slot: u32,
    pub(super) memory: Block,
    pub(super) sent: Mutex<Sent>,
}
