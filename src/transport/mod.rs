//! How ranks find each other, and how bytes travel where no window reaches.

pub mod bootstrap;
pub mod nccl;
pub mod nixl;
