//! What figures were measured on: a figure without its machine and build says little.

use std::fs::read_to_string;

/// Lines that name the machine and the build.
pub fn describe() -> Vec<String> {
    let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_once(':').map(|(_, value)| value.trim().to_string())
    };
    let model = value(&cpuinfo, "model name").unwrap_or_else(|| "a CPU of unknown model".into());
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let memory = value(&read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal");
    let gib = memory
        .and_then(|text| text.split_whitespace().next()?.parse::<f64>().ok())
        .map_or("unknown".into(), |kib| format!("{:.0} GiB", kib / 1024.0 / 1024.0));
    let kernel = read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split_whitespace().next().unwrap_or("unknown").to_string();
    let profile = if cfg!(debug_assertions) { "debug build" } else { "release build" };
    vec![
        format!("machine: {model}, {cores} CPUs, {gib}, Linux {}, load {load} at the start", kernel.trim()),
        format!(
            "build: liba2a {} ({profile}, {} {})",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::ARCH,
            std::env::consts::OS
        ),
    ]
}
