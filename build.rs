//! Names the shared object for the loader (programs bind to `liba2a.so.0` for as long as the ABI stays compatible), and
//! compiles `kernels/` ahead of time where there is an nvcc.
//!
//! With device code the crate has `cfg(a2a_kernels)`, and `env!("A2A_FATBIN")` is the file to embed. Without an nvcc it
//! has neither, which is a legitimate build for CPU memory; `A2A_REQUIRE_NVCC=1` makes that an error. An nvcc that fails
//! always is one.
//!
//! Where `A2A_KERNEL_CACHE` names a directory, what was compiled is kept there, by everything that it was compiled of: builds
//! for other profiles and features of the crate have the same kernels, which take minutes.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, exit};

/// Machine code for each of these, and PTX of the first for devices that are none of them.
const ARCHITECTURES: [u32; 3] = [90, 100, 120];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,liba2a.so.0");
    println!("cargo::rustc-check-cfg=cfg(a2a_kernels)");

    let Some(nvcc) = find_nvcc() else {
        println!("cargo::rerun-if-env-changed=A2A_REQUIRE_NVCC");
        if env::var_os("A2A_REQUIRE_NVCC").is_some_and(|v| v == "1") {
            fail(
                "A2A_REQUIRE_NVCC is 1 and there is no nvcc: set A2A_NVCC to its path, or CUDA_HOME to the toolkit",
            );
        }
        return;
    };
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-changed={}", nvcc.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let (fatbin, report) = (out.join("kernels.fatbin"), out.join("resources.txt"));
    match compile(&nvcc, &fatbin, &report) {
        Err(error) => fail(&format!(
            "{} cannot be run: {error} (A2A_NVCC=none builds without device code)",
            nvcc.display()
        )),
        Ok(status) if !status.success() => {
            eprintln!("{}", fs::read_to_string(&report).unwrap_or_default());
            fail(&format!(
                "{} failed, see its output below; CUDA 13.0 and a C++ compiler are needed, A2A_NVCC=none builds \
                 without device code",
                nvcc.display()
            ));
        }
        Ok(_) => {}
    }
    println!("cargo::rustc-cfg=a2a_kernels");
    println!("cargo::rustc-env=A2A_FATBIN={}", fatbin.display());
}

fn fail(sentence: &str) -> ! {
    println!("cargo::error={sentence}");
    exit(1)
}

/// A2A_NVCC (`none`: there shall be none), else what CUDA_HOME or PATH have.
fn find_nvcc() -> Option<PathBuf> {
    let set = |name: &str| {
        println!("cargo::rerun-if-env-changed={name}");
        env::var_os(name).filter(|value| !value.is_empty())
    };
    if let Some(named) = set("A2A_NVCC") {
        let is_path = Path::new(&named).components().count() > 1;
        return match named == "none" {
            true => None,
            false if is_path => Some(named.into()),
            // A bare name; if PATH does not have it, running it says so.
            false => Some(on_path(&named).unwrap_or(named.into())),
        };
    }
    let of_toolkit = |home| Path::new(&home).join("bin/nvcc");
    set("CUDA_HOME").map(of_toolkit).filter(|nvcc| nvcc.is_file()).or_else(|| on_path("nvcc".as_ref()))
}

fn on_path(name: &OsStr) -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed=PATH");
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Writes the fatbin, and nvcc's version and everything that it and ptxas say to the report.
fn compile(nvcc: &Path, fatbin: &Path, report: &Path) -> io::Result<ExitStatus> {
    let version = Command::new(nvcc).arg("--version").output()?.stdout;
    let mut command = command(nvcc);
    let kept =
        kept(&command, &version)?.map(|name| (name.with_extension("fatbin"), name.with_extension("txt")));
    if let Some((fatbin_kept, report_kept)) = &kept
        && fs::copy(fatbin_kept, fatbin).is_ok()
        && fs::copy(report_kept, report).is_ok()
    {
        return Ok(ExitStatus::default());
    }
    fs::write(report, "")?;
    // A file to append to, not a pipe: nvcc prints what one architecture's ptxas said by one write, which then stays
    // together although the architectures are compiled at the same time.
    let mut said = OpenOptions::new().append(true).open(report)?;
    said.write_all(&version)?;
    if let Ok(jobs) = env::var("NUM_JOBS") {
        command.args(["--threads", &jobs]);
    }
    command.arg("-o").arg(fatbin).arg("kernels/kernels.cu");
    let status = command.stdout(said.try_clone()?).stderr(said).status()?;
    if let Some((fatbin_kept, report_kept)) = kept.filter(|_| status.success()) {
        keep(report, &report_kept)?;
        keep(fatbin, &fatbin_kept)?;
    }
    Ok(status)
}

/// Another build sees the whole file or none.
fn keep(file: &Path, to: &Path) -> io::Result<()> {
    let part = to.with_extension(format!("part-{}", std::process::id()));
    fs::copy(file, &part)?;
    fs::rename(part, to)
}

/// Where what this command makes of the kernels is kept, without an extension.
fn kept(command: &Command, version: &[u8]) -> io::Result<Option<PathBuf>> {
    // Cargo is not told of it: wherever that is, the same comes out.
    let Some(cache) = env::var_os("A2A_KERNEL_CACHE").filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    fs::create_dir_all(&cache)?;
    let mut sources: Vec<PathBuf> =
        fs::read_dir("kernels")?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    sources.sort();
    let mut hash = DefaultHasher::new();
    (command.get_program(), command.get_args().collect::<Vec<_>>(), version).hash(&mut hash);
    for source in sources {
        (fs::read(&source)?, source).hash(&mut hash);
    }
    Ok(Some(Path::new(&cache).join(format!("{:016x}", hash.finish()))))
}

/// All but who shares the work, and what it makes of what.
fn command(nvcc: &Path) -> Command {
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3"]);
    // Bits must be those of the CPU: a product is rounded before it is added. For the same reason there is no
    // -use_fast_math here. Nor is there -lineinfo: it doubles the size of the fatbin.
    command.arg("-fmad=false");
    // nvcc hands -Werror on to ptxas: a spill is an error as well.
    command.args(["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-warn-spills,-v"]);
    for arch in ARCHITECTURES {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    let oldest = ARCHITECTURES[0];
    command.arg(format!("-gencode=arch=compute_{oldest},code=compute_{oldest}"));
    if env::var_os("CARGO_FEATURE_JITTER").is_some() {
        command.arg("-DA2A_JITTER=1");
    }
    command
}
