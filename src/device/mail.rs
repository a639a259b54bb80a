//! Offsets inside a mailbox: what one source rank writes into another's window, for one slot. Flags and words are u64 and
//! written by the source alone.

/// {epoch << 32 | banked << 31 | rows}: the source's rows of the dispatch are in place, or in its bank.
pub const DISPATCH_FLAG: u64 = 0;
/// {epoch << 32}: the source's results are in its combine rows; it has finished reading the dispatch.
pub const COMBINE_FLAG: u64 = 8;
/// {epoch << 32}: the source has finished reading a dispatch that no combine follows.
pub const READ_FLAG: u64 = 16;
/// {bound << 32 | operation << 28 | low bits of the epoch}: what the source is at.
pub const PROGRESS: u64 = 24;
/// {generation << 48 | status << 32 | epoch}: the source gave up on the ranks of its loss mask.
pub const LOSS: u64 = 32;
/// {epoch << 32}: the source's counts of the dispatch are here.
pub const COUNTS_FLAG: u64 = 40;
/// u32: the rank that gave up first, as far as the source knows.
pub const LOSS_ORIGIN: u64 = 48;
/// u32[16]: the shape the source dispatches.
pub const DISPATCH_SHAPE: u64 = 64;
/// u32[16]: the shape the source combines.
pub const COMBINE_SHAPE: u64 = 128;
/// u32: the tokens the source dispatches in all.
pub const TOKENS: u64 = 192;
/// u32: 1 if the source replays a routing.
pub const REPLAYS: u64 = 196;
/// Rows the source has written into its FIFO here since the comm began.
pub const FIFO_HEAD: u64 = 200;
/// Rows the source has taken out of our FIFO there since the comm began.
pub const FIFO_TAIL: u64 = 208;
/// {epoch << 32 | operation << 16 | rank}: whose rows the owner's RECV stands still for. In its own mailbox alone.
pub const WAITS_FOR: u64 = 216;
/// On CUDA the dispatch flag is here, and {epoch << 32 | digest of the shape} beside it: one load sees both.
pub const DISPATCH_PAIR: u64 = 224;
pub const BYTES: u64 = 256;
