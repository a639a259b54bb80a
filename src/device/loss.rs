//! What a lost step is told as, the same on every device.

use std::time::Duration;

use super::Dispatch;
use crate::config::LayoutKind;
use crate::error::{Error, Loss, Status};

/// Why a step was given up.
pub enum Why {
    /// max_tokens (the step's bound) differs.
    Bound,
    /// The peer went on to another operation: so many steps ahead.
    Elsewhere { ahead: i64 },
    /// Another rank gave up first.
    GaveUp { origin: u32 },
    /// Ranks that can send nothing more, and why the first of them cannot, or as many as is known of.
    Gone { whys: Vec<&'static str> },
    /// Ranks that did not answer within the deadline.
    Late { deadline: Duration },
    /// A word of the rows' shape differs.
    Word { name: String },
    /// One rank replays a routing and the other does not.
    Replay,
    /// A rank has other tokens than the host was told.
    Told,
    /// What only one device knows.
    Other(String),
}

/// A step that is void.
pub struct Void {
    pub rank: u32,
    pub slot: u32,
    pub sequence: u64,
    /// By its number in progress words.
    pub operation: u32,
    pub status: Status,
    /// The ranks that are given up on, the first to be named first.
    pub lost: Vec<u32>,
    pub expected: u64,
    pub seen: u64,
    pub why: Why,
}

impl Void {
    fn peer(&self) -> u32 {
        self.lost.first().copied().unwrap_or(self.rank)
    }

    fn reason(&self) -> String {
        let Void { rank, sequence, expected, seen, lost, .. } = self;
        let (peer, names) = (self.peer(), list(lost));
        let differs = |name: &str| format!("{name} is {expected} on rank {rank} and {seen} on rank {peer}");
        match &self.why {
            Why::Bound => differs("max_tokens (the step's bound)"),
            Why::Elsewhere { ahead } => format!(
                "rank {rank} is in {} of sequence {sequence}, rank {peer} went to {} of sequence {} without it",
                operation_name(*expected as u32),
                operation_name(*seen as u32),
                (*sequence as i64).wrapping_add(*ahead)
            ),
            Why::GaveUp { origin } => format!("rank {origin} gave up on {names}"),
            Why::Gone { whys } => {
                let each = lost.iter().enumerate().map(|(i, peer)| match whys.get(i) {
                    Some(why) => format!("rank {peer} is gone ({why})"),
                    None => format!("rank {peer} is gone"),
                });
                each.collect::<Vec<_>>().join(", ")
            }
            Why::Late { deadline } => format!("{names} did not answer within {} ms", deadline.as_millis()),
            Why::Word { name } => differs(name),
            Why::Replay => differs("A2A_DISPATCH_REUSE") + " (1 set, 0 not)",
            Why::Told => format!(
                "rank {peer} dispatched {seen} tokens, rank {rank} was told {expected} (rank_tokens or UNIFORM)"
            ),
            Why::Other(what) => what.clone(),
        }
    }

    pub fn error(self) -> Error {
        self.error_of("is void")
    }

    /// `outcome`: what becomes of the step.
    pub fn error_of(self, outcome: &str) -> Error {
        let Void { rank, slot, sequence, operation, expected, seen, .. } = self;
        let text = format!(
            "rank {rank}: {} on slot {slot}, sequence {sequence}, {outcome}: {} (expected {expected}, seen {seen})",
            operation_name(operation),
            self.reason()
        );
        // A replay is a kind of dispatch, and what is asked for says dispatch.
        let (operation, peer) = (if operation == 4 { 1 } else { operation as i32 }, self.peer());
        let loss = Loss { operation, slot, sequence, rank, peer, expected, seen, lost: self.lost };
        Error::new(self.status, text).with_loss(loss)
    }
}

/// Why a peer can send nothing more, by the number of its gone word (`protocol`).
pub fn why_gone(word: u32) -> Option<&'static str> {
    match word {
        0 => None,
        1 => Some("destroyed its comm"),
        2 => Some("aborted"),
        4 => Some("went on without this rank (a2a_recover)"),
        5 => Some("destroyed or aborted its comm, or its process ended"),
        _ => Some("its process ended"),
    }
}

/// An operation, by its number in progress words and records.
pub fn operation_name(operation: u32) -> &'static str {
    match operation {
        1 => "dispatch",
        2 => "combine",
        3 => "the end of a dispatch without combine",
        4 => "a dispatch that replays a routing (REUSE)",
        _ => "nothing yet",
    }
}

/// A word of the shape that combine compares.
pub fn result_word(word: usize) -> &'static str {
    const WORDS: [&str; 4] = [
        "the hidden size of the experts' rows",
        "the element type of the experts' rows (0 bf16, 1 f16, 2 f32)",
        "the presence of row_weights (0 absent, 1 present)",
        "A2A_COMBINE_NCCL_SUM (0 not set, 1 set)",
    ];
    WORDS[word]
}

/// Ranks, as a sentence names them.
pub fn list(ranks: &[u32]) -> String {
    let numbers: Vec<String> = ranks.iter().map(|r| r.to_string()).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

/// A dispatch that is void on every rank because one would receive too many rows.
pub fn too_many_rows(me: u32, d: &Dispatch, rank: u32, demand: u64) -> Error {
    let of = if d.grid.layout == LayoutKind::ExpertPadded { " of one expert" } else { "" };
    let text = format!(
        "rank {me}: dispatch on slot {} is void on every rank: rank {rank} would receive {demand} rows{of}, \
         max_recv_rows is {} (overflow policy error)",
        d.call.slot, d.grid.limit
    );
    Error::new(Status::Overflow, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn void(why: Why) -> Error {
        let (lost, status) = (vec![1, 3], Status::PeerLost);
        Void { rank: 0, slot: 2, sequence: 9, operation: 4, status, lost, expected: 7, seen: 6, why }.error()
    }

    #[test]
    fn a_rank_whose_reason_nobody_knows_is_gone_all_the_same() {
        let error = void(Why::Gone { whys: vec!["aborted"] });
        assert_eq!(
            error.message,
            "rank 0: a dispatch that replays a routing (REUSE) on slot 2, sequence 9, is void: \
             rank 1 is gone (aborted), rank 3 is gone (expected 7, seen 6)"
        );
    }

    #[test]
    fn a_lost_replay_is_recorded_as_a_dispatch() {
        let loss = void(Why::Replay).loss.expect("a void step has a loss");
        assert_eq!((loss.operation, loss.peer, loss.lost), (1, 1, vec![1, 3]));
    }
}
