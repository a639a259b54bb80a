//! What the fuzz targets share: how bytes become choices, and memory that is as large as it says and no larger.

pub mod bytes;
pub mod memory;
