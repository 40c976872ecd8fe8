//! PTX: read, and run on the CPU.
//!
//! `Module::parse` turns each entry point into a program: instructions with the function that runs them and their
//! operands' places. `run` gives blocks and warps turns; a warp runs an instruction for all of its lanes that are
//! at it. Facts are from the PTX ISA 9.0; no code is anyone else's.
//!
//! - Reading: `lexer`, `parser`, `body`, `operand`, `variables`; `decode` and the files of the instructions;
//!   `builder`, `allocate`, `program`.
//! - Running: `grid`, `block`, `warp`, `context`, `row`.
//! - Instructions: `elementwise`, `arithmetic`, `float`, `pairs`, `convert`, `e4m3`, `special`, `access`, `collective`,
//!   `barriers`, `copies`, `tiles`, `fragments`, `tensor`, `products`.

mod access;
mod allocate;
mod arithmetic;
mod barriers;
mod block;
mod body;
mod builder;
mod collective;
mod context;
mod convert;
mod copies;
mod decode;
mod e4m3;
mod elementwise;
mod float;
mod fragments;
mod grid;
mod lexer;
mod operand;
mod pairs;
mod parser;
mod products;
mod program;
mod row;
mod special;
mod tensor;
mod tiles;
mod variables;
mod warp;

#[cfg(test)]
mod tests;

/// The kernels of one PTX text.
#[derive(Debug, Default)]
pub struct Module {
    /// All entry points.
    pub kernels: Vec<Kernel>,
}

impl Module {
    /// Reads a PTX text.
    ///
    /// # Errors
    /// What is not known of it, with its line.
    pub fn parse(text: &str) -> Result<Self, String> {
        parser::parse_module(text)
    }
}

/// An entry point.
#[derive(Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// The virtual architecture of its text: 80 for `sm_80`, 90 for `sm_90` and `sm_90a`.
    pub architecture: u32,
    /// Its parameters, in order.
    pub params: Vec<Param>,
    /// Blocks of a cluster, from `.reqnctapercluster`; none is 1.
    pub cluster: Option<[u32; 3]>,
    /// Static shared memory of a block, bytes.
    pub static_shared_bytes: u32,
    program: program::Program,
}

/// A parameter's place in a launch's `params`.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    /// Where it begins, bytes.
    pub offset: usize,
    /// Its length, bytes.
    pub num_bytes: usize,
}

/// How a kernel is launched.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// The parameters, each at its offset.
    pub params: &'a [u8],
    /// Multiprocessors of the GPU, each of which holds a few blocks at a time.
    pub num_multiprocessors: u32,
}

/// Runs a kernel to its end.
///
/// # Errors
/// The first fault: kernel, block, thread, line of the PTX, and what was wrong (an access outside of all
/// allocations, misaligned, out of shared memory; threads that wait for each other for ever).
pub fn run(kernel: &Kernel, launch: &Launch<'_>) -> Result<(), String> {
    run_counting(kernel, launch).map(drop)
}

/// The same; returns how many instructions all threads ran together.
///
/// # Errors
/// The first fault.
pub fn run_counting(kernel: &Kernel, launch: &Launch<'_>) -> Result<u64, String> {
    check_processor()?;
    grid::run(kernel, launch)
}

/// Checks that the processor has the vector instructions that handlers are compiled for.
fn check_processor() -> Result<(), String> {
    #[cfg(target_arch = "x86_64")]
    {
        let has_all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("bmi1");
        if !has_all {
            return Err(
                "kernels are run with AVX2, FMA, F16C, POPCNT and BMI1, which this processor lacks"
                    .to_owned(),
            );
        }
    }
    Ok(())
}
