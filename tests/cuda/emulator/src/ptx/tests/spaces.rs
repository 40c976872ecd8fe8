//! Memory: state spaces, vectors, atomics, copies, and the faults of wrong accesses.

use super::{Snippet, lanes};

#[test]
fn vectors_and_narrow_types_are_loaded_and_stored() {
    let input: Vec<u32> = (0..128).map(|index| index * 0x0101_0101).collect();
    let body = "mul.wide.u32 %w1, %t, 12; add.s64 %in, %in, %w1;\n\
                ld.global.v4.u32 {%d0, %d1, %d2, %d3}, [%in]; ld.global.v2.u32 {%d4, %d5}, [%in+8];\n\
                sub.u32 %a, %d3, %d5; add.u32 %a, %a, %d0;";
    assert_eq!(
        lanes(body, &input),
        (0..32)
            .map(|lane| 4 * lane * 0x0101_0101)
            .collect::<Vec<_>>()
    );
    let input = [0xfedc_ba98; 32];
    let sum = |load: &str| {
        lanes(
            &format!("{load} cvt.u32.u64 %a, %w1; shr.u64 %w1, %w1, 32;"),
            &input,
        )[0]
    };
    assert_eq!(sum("ld.global.s8 %w1, [%in+1];"), 0xffff_ffba);
    assert_eq!(sum("ld.global.u8 %w1, [%in+1];"), 0xba);
    assert_eq!(sum("ld.global.s16 %w1, [%in+2];"), 0xffff_fedc);
    let high = "ld.global.s32 %w1, [%in]; shr.u64 %w1, %w1, 32; cvt.u32.u64 %a, %w1;";
    assert_eq!(lanes(high, &input)[0], u32::MAX);
}

#[test]
fn shared_memory_is_poisoned_and_shared() {
    let header = ".extern .shared .align 16 .b8 dynamic[];";
    let body = ".shared .align 4 .b8 fixed[100];\n\
                mov.u32 %b, dynamic; shl.b32 %c, %t, 2; add.u32 %b, %b, %c; ld.shared.u32 %d0, [%b];\n\
                st.shared.u32 [%b], %t; bar.sync 0; xor.b32 %c, %t, 63; shl.b32 %c, %c, 2;\n\
                mov.u32 %b, dynamic; add.u32 %b, %b, %c; ld.shared.u32 %a, [%b]; and.b32 %a, %a, %d0;\n\
                st.global.u32 [%out], %a;";
    let snippet = Snippet {
        header,
        threads: 64,
        shared_bytes: 256,
        num_outputs: 64,
        ..Snippet::new(body)
    };
    assert_eq!(snippet.run(), (0..64).rev().collect::<Vec<_>>());
    let error = Snippet {
        shared_bytes: 252,
        ..snippet
    }
    .try_run()
    .expect_err("too little");
    assert!(
        error.contains("access of 4 bytes at shared address 0x16c"),
        "{error}"
    );
    assert!(
        error.contains("thread [63, 0, 0]") && error.contains("364 bytes"),
        "{error}"
    );
}

#[test]
fn generic_addresses_reach_all_spaces() {
    let body = ".shared .align 8 .b8 fixed[128]; .local .align 8 .b8 own[16];\n\
                mov.u32 %b, fixed; shl.b32 %c, %t, 2; add.u32 %b, %b, %c; cvt.u64.u32 %w1, %b;\n\
                cvta.shared.u64 %w2, %w1; st.u32 [%w2], %t;\n\
                mov.u64 %w3, own; cvta.local.u64 %w4, %w3; add.s32 %d0, %t, 100; st.u32 [%w4+8], %d0;\n\
                ld.local.u32 %d1, [own+8]; ld.shared.u32 %d2, [%b]; mad.lo.u32 %d3, %d1, 1000, %d2;\n\
                cvta.to.shared.u64 %w5, %w2; cvt.u32.u64 %d4, %w5; sub.u32 %d4, %d4, %b; add.u32 %a, %d3, %d4;\n\
                st.u32 [%out], %a;";
    assert_eq!(
        Snippet::new(body).run(),
        (0..32)
            .map(|lane| (lane + 100) * 1000 + lane)
            .collect::<Vec<_>>()
    );
}

#[test]
fn parameters_and_variables_have_addresses() {
    let header = ".const .align 4 .u32 table[4] = {10, 20, 0x1e, -2}; .global .align 8 .b8 bytes[8] = {1, 2, 3};";
    let body = "and.b32 %b, %t, 3; mul.wide.u32 %w1, %b, 4; mov.u64 %w2, table; add.s64 %w2, %w2, %w1;\n\
                ld.const.u32 %a, [%w2]; ld.global.u8 %c, [bytes+2]; add.u32 %a, %a, %c;\n\
                mov.b64 %w3, p1; cvta.param.u64 %w4, %w3; ld.u64 %w5, [%w4]; ld.param.u64 %w6, [%w3];\n\
                sub.s64 %w5, %w5, %w6; cvt.u32.u64 %d0, %w5; add.u32 %a, %a, %d0; st.global.u32 [%out], %a;";
    let snippet = Snippet {
        header,
        ..Snippet::new(body)
    };
    assert_eq!(snippet.run()[..4], [13, 23, 33, 1]);
}

#[test]
fn atomic_operations_of_all_blocks_add_up() {
    let body = "sub.s64 %out, %out, %w0; atom.global.add.u32 %a, [%out], 3; red.global.max.u32 [%out+4], %t;\n\
                atom.global.cas.b32 %b, [%out+8], -1, %t;";
    let got = Snippet {
        grid: 4,
        threads: 96,
        num_outputs: 3,
        ..Snippet::new(body)
    }
    .run();
    assert_eq!(got, [u32::MAX.wrapping_add(3 * 384), u32::MAX, 0]);
}

#[test]
fn asynchronous_copies_come_with_the_wait() {
    let body = ".shared .align 16 .b8 fixed[512];\n\
                mul.lo.u32 %b, %t, 16; mul.wide.u32 %w1, %t, 12; add.s64 %in, %in, %w1; mov.u32 %d3, fixed;\n\
                add.u32 %b, %b, %d3; selp.b32 %c, 16, 4, %p0; setp.lt.u32 %p1, %t, 16; selp.b32 %c, 16, 4, %p1;\n\
                cp.async.cg.shared.global.L2::256B [%b], [%in], 16, %c; cp.async.commit_group;\n\
                ld.shared.u32 %d0, [%b+12]; cp.async.wait_group 0; ld.shared.u32 %d1, [%b+12];\n\
                and.b32 %a, %d0, %d1; st.global.u32 [%out], %a;";
    let got = Snippet {
        input: (0..128).collect(),
        ..Snippet::new(body)
    }
    .run();
    assert_eq!(
        got,
        (0..32)
            .map(|lane| if lane < 16 { 4 * lane + 3 } else { 0 })
            .collect::<Vec<_>>()
    );
}

#[test]
fn wrong_accesses_are_reported_with_their_place() {
    let error = |body| Snippet::new(body).try_run().expect_err("a fault");
    let text = error("setp.eq.u32 %p1, %t, 9; @%p1 ld.global.u32 %a, [%in+4096];");
    assert!(
        text.contains("kernel test, block [0, 0, 0], thread [9, 0, 0], line 11"),
        "{text}"
    );
    let text = error("st.global.u32 [%out+2], %t;");
    assert!(text.contains("not aligned"), "{text}");
    let text = error("mov.u64 %w1, 0; setp.eq.u32 %p1, %t, 3; @%p1 st.global.u32 [%w1], %t;");
    assert!(
        text.contains("thread [3, 0, 0]") && text.contains("nothing is allocated there"),
        "{text}"
    );
    // The last word of the output and one more.
    let text = error("st.global.u32 [%out+4], %t;");
    assert!(
        text.contains("thread [31, 0, 0]") && text.contains("128 bytes from"),
        "{text}"
    );
    let text = error("mov.u32 %b, 0; ld.local.u32 %a, [%b];");
    assert!(text.contains("a thread has 0 bytes"), "{text}");
    let text = error("ld.param.u64 %w1, [p1+8];");
    assert!(text.contains("the parameters have 16 bytes"), "{text}");
}
