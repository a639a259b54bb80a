//! Log lines go to the caller's callback, or to standard error when `A2A_LOG` asks for them.
//!
//! A leaf. The library logs nothing per step: a line means set-up, tear-down or trouble.

use std::sync::{Arc, OnceLock, RwLock};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum Level {
    Error = 1,
    Warn = 2,
    Info = 3,
    Debug = 4,
}

pub type Sink = Arc<dyn Fn(Level, &str) + Send + Sync>;

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

/// Replaces the sink; `None` restores the default.
pub fn set_sink(sink: Option<Sink>) {
    *SINK.write().unwrap_or_else(|e| e.into_inner()) = sink;
}

/// The most talkative level that reaches standard error without a callback: `A2A_LOG` =
/// `error`, `warn`, `info` or `debug`; unset means nothing.
fn env_level() -> i32 {
    static LEVEL: OnceLock<i32> = OnceLock::new();
    *LEVEL.get_or_init(|| match std::env::var("A2A_LOG").as_deref() {
        Ok("error") => 1,
        Ok("warn") => 2,
        Ok("info") => 3,
        Ok("debug") => 4,
        _ => 0,
    })
}

pub fn log(level: Level, message: impl FnOnce() -> String) {
    // The sink is cloned out so that a callback may itself call a2a_set_log_callback.
    let sink = SINK.read().unwrap_or_else(|e| e.into_inner()).clone();
    match sink {
        Some(sink) => sink(level, &message()),
        None if level as i32 <= env_level() => eprintln!("a2a {level:?}: {}", message()),
        None => {}
    }
}
