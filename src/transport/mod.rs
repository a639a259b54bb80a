//! How ranks find each other and, later, how bytes travel where no window reaches.

#![forbid(unsafe_code)]

pub mod bootstrap;
