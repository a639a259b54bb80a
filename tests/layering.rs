//! The house's arrows point down: a layer uses those below it and the leaves, never one above or beside it. And
//! `unsafe` stands only where the layers that touch memory are.

use std::fs;
use std::path::{Path, PathBuf};

/// Top to bottom; two names in one row do not know each other.
const LAYERS: [&[&str]; 5] = [&["abi"], &["comm"], &["backend"], &["transport", "memory"], &["device"]];
const LEAVES: [&str; 3] = ["error", "config", "log"];
/// Where `unsafe` may stand, and nowhere else.
const UNSAFE: [&str; 3] = ["abi", "memory", "device"];

fn depth(module: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&module))
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
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
    let code = |l: &str| l.split("//").next().unwrap().to_string();
    let is_unsafe = text
        .lines()
        .any(|l| code(l).split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe"));
    if is_unsafe && !UNSAFE.contains(&module) {
        found.push(format!("{module} has unsafe code"));
    }
    found
}

#[test]
fn arrows_point_down_and_unsafe_stays_below() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
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
        found.extend(offences(&module, &text).into_iter().map(|o| format!("{}: {o}", path.display())));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn an_upward_arrow_is_found() {
    assert_eq!(offences("device", "use crate::comm::Comm;"), ["device uses comm"]);
    assert_eq!(offences("memory", "use crate::transport::x;"), ["memory uses transport"]);
    assert_eq!(offences("error", "use crate::device::x;"), ["error uses device"]);
    assert_eq!(offences("comm", "fn f() { unsafe { g() } }"), ["comm has unsafe code"]);
    assert!(offences("backend", "use crate::device::Device; // crate::abi").is_empty());
}
