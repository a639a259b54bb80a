//! The arithmetic of layouts: how many rows an output has, in which blocks, and which block a row may not leave.
//! Pure, and the same on every device.

use crate::config::LayoutKind;

/// What the places of a step's rows are made of; equal on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub layout: LayoutKind,
    pub ranks: u32,
    /// M.
    pub bound: u32,
    /// K; 0 without ids.
    pub topk: u32,
    pub alignment: u32,
    /// max_recv_rows; 0 = none.
    pub limit: u64,
}

impl Grid {
    fn limited(&self, rows: u64) -> u64 {
        if self.limit == 0 { rows } else { rows.min(self.limit) }
    }

    /// Rows of each block of a layout whose blocks have one size.
    pub fn block(&self) -> Option<u64> {
        match self.layout {
            LayoutKind::RankMajor => Some(self.bound as u64),
            LayoutKind::ExpertPadded => Some(self.limited(self.ranks as u64 * self.bound as u64)),
            _ => None,
        }
    }

    /// How many blocks of rows a rank with `local` experts has: by source, by expert, or all in one.
    pub fn blocks(&self, local: u32) -> u32 {
        match self.layout {
            LayoutKind::RankMajor => self.ranks,
            layout if layout.by_expert() => local,
            _ => 1,
        }
    }

    /// Rows of the outputs of a rank with `local` experts.
    pub fn capacity(&self, local: u32) -> u64 {
        let (rows, local) = (self.ranks as u64 * self.bound as u64, local as u64);
        match self.layout {
            LayoutKind::ExpertPadded => self.block().unwrap_or(0).saturating_mul(local),
            LayoutKind::ExpertContiguous if local == 0 => 0,
            LayoutKind::ExpertContiguous => {
                let align = self.alignment as u64;
                let most = rows.saturating_mul(local.min(self.topk as u64));
                self.limited(most.saturating_add(local * (align - 1)).next_multiple_of(align))
            }
            _ => self.limited(rows),
        }
    }

    /// Where the rows of local expert `place` must end.
    pub fn end(&self, place: u32, capacity: u64) -> u64 {
        match self.layout {
            LayoutKind::ExpertPadded => (place as u64 + 1) * self.block().unwrap_or(0),
            _ => capacity,
        }
    }

    /// Rows are counted by this many keys on every rank: by destination, or by expert.
    pub fn keys(&self, experts: u32) -> u32 {
        if self.layout.by_expert() { experts } else { self.ranks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(layout: LayoutKind, alignment: u32, limit: u64) -> Grid {
        Grid { layout, ranks: 4, bound: 10, topk: 3, alignment, limit }
    }

    #[test]
    fn capacities_are_those_of_the_layout_table() {
        for (layout, alignment, limit, local, rows) in [
            (LayoutKind::Gathered, 1, 0, 5, 40),
            (LayoutKind::RankMajor, 1, 0, 5, 40),
            (LayoutKind::Flat, 1, 0, 5, 40),
            (LayoutKind::Flat, 1, 7, 5, 7),
            (LayoutKind::ExpertPadded, 1, 0, 5, 200),
            (LayoutKind::ExpertPadded, 1, 7, 5, 35),
            (LayoutKind::ExpertPadded, 1, 0, 0, 0),
            (LayoutKind::ExpertContiguous, 1, 0, 5, 120),
            (LayoutKind::ExpertContiguous, 1, 0, 2, 80),
            (LayoutKind::ExpertContiguous, 16, 0, 2, 112),
            (LayoutKind::ExpertContiguous, 16, 100, 2, 100),
            (LayoutKind::ExpertContiguous, 16, 0, 0, 0),
        ] {
            assert_eq!(
                grid(layout, alignment, limit).capacity(local),
                rows,
                "{layout:?} {alignment} {limit}"
            );
        }
    }
}
