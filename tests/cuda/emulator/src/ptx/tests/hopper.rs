//! What compute capability 9.0 has: clusters, barriers in shared memory, tiles, products of warpgroups.

use half::f16;

use super::{Launch, Module, Snippet, memory, run};
use crate::tensor_map::{Swizzle, TensorMap};

/// Runs `text`'s kernel, which has a tensor map and the address of its output as parameters.
fn run_tiles(
    text: &str,
    map: &TensorMap,
    blocks: u32,
    threads: u32,
    num_outputs: usize,
) -> Result<Vec<f32>, String> {
    let module = Module::parse(text)?;
    let mut output = vec![f32::NAN; num_outputs];
    let address = output.as_mut_ptr() as u64;
    memory::enter(address, 4 * num_outputs);
    let mut params = map.to_bytes().to_vec();
    params.extend_from_slice(&address.to_le_bytes());
    let (grid, block) = ([blocks, 1, 1], [threads, 1, 1]);
    let launch = Launch {
        grid,
        block,
        shared_bytes: 0,
        params: &params,
        num_multiprocessors: 2,
    };
    let result = run(&module.kernels[0], &launch);
    memory::forget(address);
    result.map(|()| output)
}

/// Describes a matrix of f16 in boxes of 64 columns of `box_rows` rows.
fn describe(matrix: &[f16], columns: usize, box_rows: u16) -> TensorMap {
    TensorMap {
        rank: 2,
        element_bytes: 2,
        address: matrix.as_ptr() as u64,
        sizes: [columns as u32, (matrix.len() / columns) as u32, 1, 1, 1],
        stride_bytes: [2, 2 * columns as u64, 0, 0, 0],
        box_sizes: [64, box_rows, 1, 1, 1],
        swizzle: Swizzle::Bytes128,
    }
}

/// Opens a kernel: barrier 0 at shared address 0, tiles from 1024 on; `%t` is the thread's number.
const OPENING: &str = ".version 9.0\n.target sm_90a\n.address_size 64\n\
    .visible .entry test(.param .align 128 .b8 map[128], .param .u64 out) CLUSTER {\n\
    .shared .align 1024 .b8 memory[40960]; .reg .pred %p<9>; .reg .b32 %t, %r<9>; .reg .b64 %rd<9>; .reg .f32 %f<9>;\n\
    mov.u32 %t, %tid.x; mov.b64 %rd1, map; cvta.param.u64 %rd1, %rd1; ld.param.u64 %rd2, [out];\n\
    setp.eq.u32 %p1, %t, 0; mov.u32 %r0, memory; @!%p1 bra $start;\n\
    mbarrier.init.shared::cta.b64 [%r0], 1; fence.mbarrier_init.release.cluster; $start: bar.sync 0;\n";

/// Waits for the barrier's first phase.
const WAIT: &str =
    "$poll: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r0], 0; @!%p2 bra $poll;\n";

#[test]
fn tiles_are_swizzled_and_padded_with_zeros() {
    let matrix: Vec<f16> = (0..100 * 72)
        .map(|index| f16::from_f32((index % 2048) as f32))
        .collect();
    memory::enter(matrix.as_ptr() as u64, 2 * matrix.len());
    // The box begins at column 64, of which there are 72, and row -2.
    let text = format!(
        "{}@!%p1 bra $wait; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 2048; mov.u32 %r1, 64; mov.u32 %r2, -2;\n\
         add.u32 %r3, %r0, 1024; mov.b64 %rd3, 0;\n\
         cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint\n\
         [%r3], [%rd1, {{%r1, %r2}}], [%r0], %rd3; $wait: {WAIT}\n\
         shl.b32 %r4, %t, 1; add.u32 %r4, %r4, %r0; .reg .b16 %h; ld.shared.u16 %h, [%r4+1024]; cvt.f32.f16 %f1, %h;\n\
         mul.wide.u32 %rd4, %t, 4; add.s64 %rd2, %rd2, %rd4; st.global.f32 [%rd2], %f1; ret; }}",
        OPENING.replace("CLUSTER", "")
    );
    let got = run_tiles(&text, &describe(&matrix, 72, 16), 1, 1024, 1024).expect("runs");
    memory::forget(matrix.as_ptr() as u64);
    for (place, &value) in got.iter().enumerate() {
        let (row, unit, column) = (place / 64, (place % 64 / 8) ^ (place / 64 % 8), place % 8);
        let (row, column) = (row as i32 - 2, 64 + 8 * unit + column);
        let is_inside = row >= 0 && column < 72;
        let want = if is_inside {
            matrix[row as usize * 72 + column].to_f32()
        } else {
            0.0
        };
        assert_eq!(value, want, "row {row}, column {column}");
    }
}

#[test]
fn a_tile_goes_to_all_blocks_of_a_cluster() {
    let matrix: Vec<f16> = (0..16 * 64)
        .map(|index| f16::from_f32(index as f32))
        .collect();
    memory::enter(matrix.as_ptr() as u64, 2 * matrix.len());
    // Block 1 copies to both; block 0 reads block 1's memory through the cluster's addresses.
    let text = format!(
        "{}barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 %r6, %cluster_ctarank;\n\
         @!%p1 bra $wait; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 2048; setp.eq.u32 %p3, %r6, 0;\n\
         @%p3 bra $wait; mov.u32 %r1, 0; mov.u32 %r2, 0; add.u32 %r3, %r0, 1024; .reg .b16 %h; mov.u16 %h, 3;\n\
         cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster\n\
         [%r3], [%rd1, {{%r1, %r2}}], [%r0], %h; $wait: {WAIT}\n\
         shl.b32 %r4, %t, 1; add.u32 %r4, %r4, 1024; add.u32 %r4, %r4, %r0; ld.shared.u16 %h, [%r4];\n\
         mapa.shared::cluster.u32 %r5, %r0, 1; ld.shared::cluster.u32 %r7, [%r5+1024]; shr.u32 %r7, %r7, 16;\n\
         .reg .b16 %g; cvt.u16.u32 %g, %r7; cvt.f32.f16 %f1, %h; cvt.f32.f16 %f2, %g; add.f32 %f1, %f1, %f2;\n\
         barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;\n\
         mad.lo.u32 %t, %r6, 64, %t; mul.wide.u32 %rd4, %t, 4; add.s64 %rd2, %rd2, %rd4; st.global.f32 [%rd2], %f1;\n\
         ret; }}",
        OPENING.replace("CLUSTER", ".reqnctapercluster 2, 1, 1")
    );
    let got = run_tiles(&text, &describe(&matrix, 64, 16), 2, 64, 128).expect("runs");
    memory::forget(matrix.as_ptr() as u64);
    let want: Vec<f32> = (0..128).map(|index| (index % 64) as f32 + 1.0).collect();
    assert_eq!(got, want);
}

/// Small numbers that f16 has exactly.
fn element(row: usize, column: usize) -> f32 {
    ((row * 5 + column * 3) % 13) as f32 - 6.0
}

/// Computes A·B where A is the matrix's first 64 rows, and B its next 16 rows transposed, or its rows 64 to 79
/// with all 64 columns.
fn product(is_transposed: bool) {
    let matrix: Vec<f16> = (0..128 * 64)
        .map(|index| f16::from_f32(element(index / 64, index % 64)))
        .collect();
    memory::enter(matrix.as_ptr() as u64, 2 * matrix.len());
    let columns = if is_transposed { 16 } else { 64 };
    let sums: Vec<String> = (0..columns / 2).map(|index| format!("%s{index}")).collect();
    let (sums, count) = (sums.join(", "), columns / 2);
    let descriptor = |offset: u32| (u64::from(offset) >> 4) | 1 << 16 | 64 << 32 | 1 << 62;
    let mut products = String::new();
    // Four steps of 16 columns, or one.
    for step in 0..if is_transposed { 4 } else { 1 } {
        let (a, b) = (
            descriptor(1024 + 32 * step),
            descriptor(1024 + 8192 + if is_transposed { 32 * step } else { 0 }),
        );
        let majors = if is_transposed { "0, 0" } else { "0, 1" };
        products.push_str(&format!(
            "mov.b64 %rd5, {a}; mov.b64 %rd6, {b}; setp.ne.u32 %p4, {step}, 0;\n\
             wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{sums}}}, %rd5, %rd6, %p4, 1, 1, {majors};\n"
        ));
    }
    let stores: String = (0..count)
        .map(|index| format!("st.global.f32 [%rd2+{}], %s{index};\n", 4 * index))
        .collect();
    let text = format!(
        "{}@!%p1 bra $wait; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 16384; mov.u32 %r1, 0; mov.u32 %r2, 0;\n\
         add.u32 %r3, %r0, 1024; mov.b64 %rd3, 0;\n\
         cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint\n\
         [%r3], [%rd1, {{%r1, %r2}}], [%r0], %rd3; $wait: {WAIT}\n.reg .f32 %s<{count}>;\n\
         wgmma.fence.sync.aligned;\n{products}wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n\
         mul.wide.u32 %rd4, %t, {}; add.s64 %rd2, %rd2, %rd4;\n{stores}ret; }}",
        OPENING.replace("CLUSTER", ""),
        4 * count
    );
    let got = run_tiles(&text, &describe(&matrix, 64, 128), 1, 128, 128 * count).expect("runs");
    memory::forget(matrix.as_ptr() as u64);
    for thread in 0..128 {
        for index in 0..count {
            let row = thread / 32 * 16 + thread % 32 / 4 + 8 * (index / 2 % 2);
            let column = 8 * (index / 4) + 2 * (thread % 4) + index % 2;
            let inner = if is_transposed { 64 } else { 16 };
            let b = |k: usize| {
                if is_transposed {
                    element(64 + column, k)
                } else {
                    element(64 + k, column)
                }
            };
            let want: f32 = (0..inner).map(|k| element(row, k) * b(k)).sum();
            assert_eq!(
                got[thread * count + index],
                want,
                "row {row}, column {column}"
            );
        }
    }
}

#[test]
fn warpgroups_multiply_by_transposed_matrices() {
    product(true);
}

#[test]
fn warpgroups_multiply_by_matrices_with_columns_side_by_side() {
    product(false);
}

#[test]
fn arrivals_at_another_block_are_counted_there() {
    let body = ".shared .align 8 .b64 barrier; mov.u32 %b, barrier; setp.eq.u32 %p1, %t, 0; @!%p1 bra $start;\n\
                mbarrier.init.shared::cta.b64 [%b], 32; $start: bar.sync 0;\n\
                mbarrier.test_wait.parity.shared::cta.b64 %p2, [%b], 0; selp.b32 %a, 1, 0, %p2;\n\
                mapa.shared::cluster.u32 %c, %b, 0; mbarrier.arrive.shared::cluster.b64 _, [%c];\n\
                mbarrier.test_wait.parity.shared::cta.b64 %p2, [%b], 0; selp.b32 %c, 2, 0, %p2; add.u32 %a, %a, %c;\n\
                st.global.u32 [%out], %a;";
    assert_eq!(Snippet::new(body).run(), [2; 32]);
    // Of 32 arrivals each 12 end a phase: two phases, after which the parity is the first one's.
    assert_eq!(
        Snippet::new(&body.replace(", 32; $start", ", 12; $start")).run(),
        [0; 32]
    );
    assert_eq!(
        Snippet::new(&body.replace(", 32; $start", ", 24; $start")).run(),
        [2; 32]
    );
}

#[test]
fn barriers_that_were_not_initialised_are_faults() {
    let body = ".shared .align 8 .b64 barrier; mov.u32 %b, barrier; mbarrier.arrive.shared::cta.b64 _, [%b];";
    let error = Snippet::new(body).try_run().expect_err("no barrier");
    assert!(error.contains("was not initialised"), "{error}");
}
