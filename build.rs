//! With the feature `cuda`: compiles `src/kernels/cuda/*.cu` with nvcc, one fat binary a file,
//! for `include_bytes!`. Without it: returns at once.
//!
//! `INFOLD_CUDA_ARCHS` names the architectures, `80,86,89,90a` unless set; the last one is also
//! kept as PTX when it has no suffix, so that newer GPUs can compile it. nvcc is `$NVCC`, else
//! `$CUDA_HOME/bin/nvcc`, else the one on PATH. `INFOLD_NVCC_FLAGS` are more flags for it, with
//! blanks between.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

const KERNELS: &str = "src/kernels/cuda";
const DEFAULT_ARCHS: &str = "80,86,89,90a";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in [
        "INFOLD_CUDA_ARCHS",
        "INFOLD_NVCC_FLAGS",
        "NVCC",
        "CUDA_HOME",
    ] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let archs = env::var("INFOLD_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
    let mut flags = compiler_flags(&archs);
    let more = env::var("INFOLD_NVCC_FLAGS").unwrap_or_default();
    flags.extend(more.split_whitespace().map(str::to_owned));
    let nvcc = find_nvcc();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    let mut sources: Vec<PathBuf> = fs::read_dir(KERNELS)
        .expect("the kernels' folder is part of the package")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu" || e == "cuh"))
        .collect();
    sources.sort();
    for path in &sources {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let (headers, kernels): (Vec<_>, Vec<_>) = sources
        .into_iter()
        .partition(|path| path.extension().is_some_and(|e| e == "cuh"));
    let shared = fingerprint(&headers, &(&flags, &nvcc));

    let mut running: Vec<(PathBuf, Child)> = Vec::new();
    let jobs = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let mut table = String::from("&[\n");
    for source in &kernels {
        let stem = source.file_stem().expect("a file name").to_string_lossy();
        // Named by content: neither a profile nor a touched file compiles anything anew.
        let key = fingerprint(std::slice::from_ref(source), &shared);
        let binary = out.join(format!("{stem}-{key:016x}.fatbin"));
        table += &format!("    ({stem:?}, include_bytes!({binary:?})),\n");
        if !binary.exists() {
            if running.len() >= jobs {
                finish(running.remove(0));
            }
            running.push((binary.clone(), compile(&nvcc, &flags, source, &binary)));
        }
    }
    running.into_iter().for_each(finish);
    table += "]\n";
    fs::write(out.join("fatbins.rs"), table).expect("OUT_DIR can be written");
}

fn compiler_flags(archs: &str) -> Vec<String> {
    let mut flags = ["-O3", "-std=c++17", "-fatbin"].map(str::to_owned).to_vec();
    let archs: Vec<&str> = archs.split(',').map(str::trim).collect();
    for arch in &archs {
        flags.push(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    if let Some(newest) = archs.last() {
        // PTX of an `a` architecture runs on that one alone.
        let portable = newest.trim_end_matches('a');
        flags.push(format!(
            "-gencode=arch=compute_{portable},code=compute_{portable}"
        ));
    }
    flags
}

fn find_nvcc() -> PathBuf {
    if let Some(path) = env::var_os("NVCC") {
        return path.into();
    }
    match env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => "nvcc".into(),
    }
}

fn fingerprint(paths: &[PathBuf], extra: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    extra.hash(&mut hasher);
    for path in paths {
        let text = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.hash(&mut hasher);
    }
    hasher.finish()
}

fn compile(nvcc: &Path, flags: &[String], source: &Path, binary: &Path) -> Child {
    let partial = binary.with_extension("partial");
    Command::new(nvcc)
        .args(flags)
        .arg("-o")
        .arg(&partial)
        .arg(source)
        .spawn()
        .unwrap_or_else(|error| {
            panic!(
                "the feature `cuda` needs nvcc: {} does not start: {error}; set CUDA_HOME or NVCC, \
                 or run: eval \"$(scripts/cuda_toolchain.sh FOLDER)\"",
                nvcc.display()
            )
        })
}

fn finish((binary, mut child): (PathBuf, Child)) {
    let status = child.wait().expect("nvcc was started");
    assert!(
        status.success(),
        "nvcc failed on {}: {status}",
        binary.display()
    );
    fs::rename(binary.with_extension("partial"), &binary).expect("OUT_DIR can be written");
}
