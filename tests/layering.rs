//! The house's arrows point down: a layer uses those below it and the leaves, never one above or beside it. And
//! `unsafe` stands only where the layers that touch memory are, CUDA's driver is called from there alone, and device
//! code does not end the process that it runs for.

use std::fs;
use std::path::{Path, PathBuf};

/// Top to bottom; two names in one row do not know each other.
const LAYERS: [&[&str]; 5] = [&["abi"], &["comm"], &["backend"], &["transport", "memory"], &["device"]];
const LEAVES: [&str; 4] = ["error", "config", "log", "fault"];
/// Where `unsafe` may stand, and nowhere else: in these, and in the files that call what is loaded at run time.
const UNSAFE: [&str; 3] = ["abi", "memory", "device"];
const LOADERS: [&str; 7] = [
    "transport/nccl/mod.rs",
    "transport/nccl/calls.rs",
    "transport/nccl/callers.rs",
    "transport/nixl/mod.rs",
    "transport/nixl/agent.rs",
    "transport/nixl/mesh.rs",
    "transport/nixl/shared.rs",
];
/// Where the CUDA driver may be named.
const DRIVER: [&str; 2] = ["memory", "device"];
/// Words that device code may not have: a trap is an error of the caller's whole context for good, and a print takes a
/// stack.
const DEADLY: [&str; 5] = ["trap", "__trap", "assert", "printf", "__brkpt"];
/// The one file with PTX: what a load or a store orders, and for whom, is read in one place.
const PTX: &str = "ptx.cuh";

fn depth(module: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&module))
}

fn sources(dir: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, extensions, found);
        } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
            found.push(path);
        }
    }
}

/// The module under src/ that a file belongs to.
fn module(root: &Path, path: &Path) -> String {
    let first = path.strip_prefix(root).unwrap().components().next().unwrap();
    first.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_string()
}

/// Every `crate::x` that code (not a comment) names.
fn used(text: &str) -> Vec<String> {
    let code = text.lines().map(|l| l.split("//").next().unwrap()).collect::<Vec<_>>().join("\n");
    code.split("crate::")
        .skip(1)
        .map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
        .filter(|name: &String| !name.is_empty())
        .collect()
}

/// What a file breaks.
fn offences(module: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for target in used(text) {
        if target == module || LEAVES.contains(&target.as_str()) {
            continue;
        }
        let allowed = match (depth(module), depth(&target)) {
            (Some(from), Some(to)) => to > from,
            _ => false,
        };
        if !allowed {
            found.push(format!("{module} uses {target}"));
        }
    }
    if has(text, "unsafe") && !UNSAFE.contains(&module) {
        found.push(format!("{module} has unsafe code"));
    }
    if has(text, "cudarc") && !DRIVER.contains(&module) {
        found.push(format!("{module} calls the CUDA driver"));
    }
    found
}

/// Whether code (not a line comment) has the word.
fn has(text: &str, word: &str) -> bool {
    let code = text.lines().map(|l| l.split("//").next().unwrap());
    code.flat_map(|l| l.split(|c: char| !c.is_alphanumeric() && c != '_')).any(|w| w == word)
}

/// What a file of device code breaks.
fn device_offences(name: &str, text: &str) -> Vec<String> {
    let mut found: Vec<String> =
        DEADLY.iter().filter(|word| has(text, word)).map(|word| format!("{name} has {word}")).collect();
    if name != PTX && (has(text, "asm") || has(text, "__asm__")) {
        found.push(format!("{name} has asm, which stands in {PTX}"));
    }
    found
}

#[test]
fn arrows_point_down_and_unsafe_stays_below() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &["rs"], &mut files);
    assert!(files.len() > 20, "the walk found {} files", files.len());
    let mut found = Vec::new();
    for path in files {
        let module = module(&root, &path);
        if module == "lib" {
            continue;
        }
        assert!(
            depth(&module).is_some() || LEAVES.contains(&module.as_str()),
            "{} belongs to no layer: name it in tests/layering.rs",
            path.display()
        );
        let text = fs::read_to_string(&path).unwrap();
        let loads = LOADERS.iter().any(|loader| path.ends_with(loader));
        let offences =
            offences(&module, &text).into_iter().filter(|o| !(loads && o.ends_with("has unsafe code")));
        found.extend(offences.map(|o| format!("{}: {o}", path.display())));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn device_code_does_not_trap_and_has_its_ptx_in_one_file() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"), &["cu", "cuh"], &mut files);
    assert!(!files.is_empty());
    let found: Vec<String> = files
        .iter()
        .flat_map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            device_offences(name, &fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn an_upward_arrow_is_found() {
    assert_eq!(offences("device", "use crate::comm::Comm;"), ["device uses comm"]);
    assert_eq!(offences("memory", "use crate::transport::x;"), ["memory uses transport"]);
    assert_eq!(offences("error", "use crate::device::x;"), ["error uses device"]);
    assert_eq!(offences("comm", "fn f() { unsafe { g() } }"), ["comm has unsafe code"]);
    assert_eq!(
        offences("comm", "let there = cudarc::driver::sys::is_culib_present();"),
        ["comm calls the CUDA driver"]
    );
    assert!(offences("backend", "use crate::device::Device; // crate::abi").is_empty());
    assert_eq!(device_offences("route.cu", "assert(x); // trap"), ["route.cu has assert"]);
    assert_eq!(
        device_offences("wait.cuh", "asm volatile(\"\");"),
        ["wait.cuh has asm, which stands in ptx.cuh"]
    );
    assert!(device_offences("ptx.cuh", "static_assert(true); asm volatile(\"\");").is_empty());
}
