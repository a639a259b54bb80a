//! How ranks find each other, and how bytes travel where no window reaches.

pub mod bootstrap;
pub mod nccl;
#[cfg_attr(
    not(test),
    expect(dead_code, unused_imports, reason = "NIXL_ELASTIC, whose it is, is not built yet")
)]
pub mod nixl;
