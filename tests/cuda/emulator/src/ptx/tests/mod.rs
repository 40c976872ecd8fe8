//! Kernels run as a whole: snippets of PTX whose threads each write one word or more.

mod control;
mod hopper;
mod lanes;
mod spaces;

use super::{Launch, Module, run};
use crate::memory;

/// Names the folder of the kernels' PTX.
const FOLDER: &str = "EMULATOR_PTX";

#[test]
fn all_kernels_are_read() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        println!("{FOLDER} is not set: nothing to read");
        return;
    };
    let mut num_kernels = 0;
    for entry in std::fs::read_dir(folder).expect("the folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "ptx") {
            let text = std::fs::read_to_string(&path).expect("text");
            let start = std::time::Instant::now();
            let module =
                Module::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let (rows, code) = module.kernels.iter().fold((0, 0), |(rows, code), kernel| {
                (
                    rows.max(kernel.program.num_rows),
                    code + kernel.program.code.len(),
                )
            });
            println!(
                "{}: {} kernels, {code} instructions, at most {rows} rows, {:?}",
                path.display(),
                module.kernels.len(),
                start.elapsed()
            );
            num_kernels += module.kernels.len();
        }
    }
    assert!(num_kernels > 0, "no kernel was found");
}

/// A launch of a snippet.
struct Snippet<'a> {
    body: &'a str,
    header: &'a str,
    grid: u32,
    threads: u32,
    shared_bytes: u32,
    input: Vec<u32>,
    num_outputs: usize,
}

impl<'a> Snippet<'a> {
    /// A block of one warp that writes a word a lane. The body finds its thread's number in `%t`, the address of
    /// its word of the output in `%out` and that of the input in `%in`; it writes registers `%a`, `%b`, `%c`,
    /// `%d<9>` (32 bits), `%h<4>` (16), `%f<9>`, `%w<9>` (64) and predicates `%p<9>`.
    fn new(body: &'a str) -> Self {
        Self {
            body,
            header: "",
            grid: 1,
            threads: 32,
            shared_bytes: 0,
            input: Vec::new(),
            num_outputs: 32,
        }
    }

    /// Runs it; returns the output, which has all ones where nothing was written.
    fn try_run(&self) -> Result<Vec<u32>, String> {
        let text = format!(
            ".version 9.0\n.target sm_90a\n.address_size 64\n{}\n.visible .entry test(.param .u64 p0, .param .u64 p1)\n\
             {{ .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %t, %n, %a, %b, %c, %d<9>; .reg .f32 %f<9>;\n\
             .reg .b64 %out, %in, %w<9>; .reg .f64 %x<9>;\n\
             ld.param.u64 %out, [p0]; ld.param.u64 %in, [p1]; mov.u32 %t, %ctaid.x; mov.u32 %n, %ntid.x;\n\
             mov.u32 %a, %tid.x; mad.lo.s32 %t, %t, %n, %a; mul.wide.u32 %w0, %t, 4; add.s64 %out, %out, %w0;\n\
             add.s64 %in, %in, %w0; mov.b32 %a, 0;\n{}\nret; }}",
            self.header, self.body
        );
        let module = Module::parse(&text)?;
        let mut output = vec![u32::MAX; self.num_outputs];
        let addresses = [output.as_mut_ptr() as u64, self.input.as_ptr() as u64];
        memory::enter(addresses[0], output.len() * 4);
        if !self.input.is_empty() {
            memory::enter(addresses[1], self.input.len() * 4);
        }
        let params: Vec<u8> = addresses
            .iter()
            .flat_map(|address| address.to_le_bytes())
            .collect();
        let launch = Launch {
            grid: [self.grid, 1, 1],
            block: [self.threads, 1, 1],
            shared_bytes: self.shared_bytes,
            params: &params,
            num_multiprocessors: 2,
        };
        let result = run(&module.kernels[0], &launch);
        for address in addresses {
            memory::forget(address);
        }
        result.map(|()| output)
    }

    /// The same; faults are failures.
    fn run(&self) -> Vec<u32> {
        self.try_run().expect("runs without a fault")
    }
}

/// Runs a body that leaves its result in `%a`; returns all lanes'.
fn lanes(body: &str, input: &[u32]) -> Vec<u32> {
    let body = format!("{body}\nst.global.u32 [%out], %a;");
    Snippet {
        input: input.to_vec(),
        ..Snippet::new(&body)
    }
    .run()
}

/// Returns the value that `body` gives for each of up to 32 pairs of inputs in `%b` and `%c`.
fn binary(instruction: &str, pairs: &[(u32, u32)]) -> Vec<u32> {
    let mut input = vec![0; 64];
    for (index, &(first, second)) in pairs.iter().enumerate() {
        (input[index], input[32 + index]) = (first, second);
    }
    let body = format!("ld.global.u32 %b, [%in]; ld.global.u32 %c, [%in+128]; {instruction}");
    lanes(&body, &input)[..pairs.len()].to_vec()
}
