//! Control flow, barriers, instructions of the whole warp, matrices.

use half::f16;

use super::{Snippet, lanes};

#[test]
fn loops_of_different_lengths_come_together() {
    let body = "mov.u32 %b, 0; $loop: setp.ge.u32 %p1, %b, %t; @%p1 bra $end; add.u32 %a, %a, %b;\n\
                add.u32 %b, %b, 1; bra.uni $loop; $end: vote.sync.ballot.b32 %c, %p1, -1;\n\
                setp.eq.u32 %p2, %c, -1; selp.b32 %c, 1000, 0, %p2; add.u32 %a, %a, %c;";
    assert_eq!(
        lanes(body, &[]),
        (0..32)
            .map(|lane| lane * (lane.max(1) - 1) / 2 + 1000)
            .collect::<Vec<_>>()
    );
}

#[test]
fn lanes_that_return_are_not_waited_for() {
    let body = "setp.ge.u32 %p1, %t, 40; @%p1 ret; bar.sync 0; setp.lt.u32 %p2, %t, 8; @%p2 bra $low;\n\
                bar.warp.sync -1; mov.u32 %a, 1; bra $end; $low: bar.warp.sync -1; mov.u32 %a, 2;\n\
                $end: bar.sync 0; st.global.u32 [%out], %a;";
    let got = Snippet {
        threads: 96,
        num_outputs: 96,
        ..Snippet::new(body)
    }
    .run();
    let want: Vec<u32> = (0..96)
        .map(|lane| {
            if lane < 8 {
                2
            } else if lane < 40 {
                1
            } else {
                u32::MAX
            }
        })
        .collect();
    assert_eq!(got, want);
}

#[test]
fn a_lane_that_polls_does_not_keep_its_warp_from_writing() {
    let body = "sub.s64 %in, %out, %w0; setp.eq.u32 %p1, %t, 0; @!%p1 bra $write;\n\
                $poll: ld.volatile.global.u32 %b, [%in+124]; setp.eq.u32 %p2, %b, -1; @%p2 bra $poll;\n\
                bra $end; $write: st.global.u32 [%out], %t; $end: @%p1 st.global.u32 [%out], %b;";
    assert_eq!(Snippet::new(body).run()[0], 31);
}

#[test]
fn blocks_that_poll_let_later_ones_run() {
    // Every block waits for what the last one writes.
    let body = "sub.s64 %in, %out, %w0; setp.ge.u32 %p1, %t, 224; @%p1 st.global.u32 [%out], %t;\n\
                $poll: ld.acquire.gpu.global.u32 %b, [%in+1020]; setp.eq.u32 %p2, %b, -1; @%p2 bra $poll;\n\
                st.global.u32 [%out], %b;";
    let snippet = Snippet {
        grid: 8,
        num_outputs: 256,
        ..Snippet::new(body)
    };
    assert_eq!(snippet.run(), vec![255; 256]);
}

#[test]
fn named_barriers_count_waits_and_arrivals() {
    // Warp 0 arrives at barrier 1, after it has written; warps 1 and 2 wait there.
    let body = ".shared .align 4 .b8 flag[4]; mov.u32 %b, flag; setp.ge.u32 %p1, %t, 32; @%p1 bra $wait;\n\
                st.shared.u32 [%b], 77; bar.arrive 1, 96; bra $end; $wait: bar.sync 1, 96;\n\
                ld.shared.u32 %a, [%b]; $end: bar.sync 0; st.global.u32 [%out], %a;";
    let got = Snippet {
        threads: 96,
        num_outputs: 96,
        ..Snippet::new(body)
    }
    .run();
    assert_eq!((&got[..32], &got[32..]), (&[0; 32][..], &[77; 64][..]));
}

#[test]
fn waits_that_never_end_are_faults() {
    let error = Snippet {
        threads: 64,
        ..Snippet::new("setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 1, 64;")
    }
    .try_run()
    .expect_err("a warp is missing");
    assert!(
        error.contains("warp 0 at barrier 1 (32 threads of 64)"),
        "{error}"
    );
    let body = "setp.lt.u32 %p1, %t, 5; @%p1 bra $wait; shfl.sync.idx.b32 %a, %t, 0, 31, -1;\n\
                $wait: shfl.sync.idx.b32 %a, %t, 0, 31, -1;";
    let error = Snippet::new(body)
        .try_run()
        .expect_err("lanes at different shuffles");
    assert!(error.contains("wait for others of their warp"), "{error}");
}

#[test]
fn shuffles_take_values_within_their_segments() {
    let shuffle = |form: &str| {
        let body = format!(
            "mul.lo.u32 %b, %t, 10; shfl.sync.{form}, -1; selp.b32 %c, 1, 0, %p1; add.u32 %a, %a, %c;"
        );
        lanes(&body, &[])
    };
    let want = |of: fn(u32) -> (u32, bool)| -> Vec<u32> {
        (0..32)
            .map(|lane| of(lane).0 * 10 + u32::from(of(lane).1))
            .collect()
    };
    assert_eq!(
        shuffle("bfly.b32 %a|%p1, %b, 5, 31"),
        want(|lane| (lane ^ 5, true))
    );
    assert_eq!(
        shuffle("up.b32 %a|%p1, %b, 3, 0"),
        want(|lane| if lane < 3 {
            (lane, false)
        } else {
            (lane - 3, true)
        })
    );
    // Segments of 8 lanes: clamp 31, mask 24 in bits 8 to 12.
    let down = |lane: u32| {
        if lane % 8 + 3 < 8 {
            (lane + 3, true)
        } else {
            (lane, false)
        }
    };
    assert_eq!(shuffle("down.b32 %a|%p1, %b, 3, 0x181f"), want(down));
    assert_eq!(
        shuffle("idx.b32 %a|%p1, %b, 9, 0x181f"),
        want(|lane| (lane / 8 * 8 + 1, true))
    );
}

#[test]
fn votes_reductions_and_elections_see_their_members() {
    let body = "setp.lt.u32 %p1, %t, 20; @!%p1 bra $end; setp.eq.u32 %p2, %t, 3;\n\
                vote.sync.any.pred %p3, %p2, 0xfffff; vote.sync.all.pred %p4, %p2, 0xfffff;\n\
                redux.sync.add.s32 %b, %t, 0xfffff; redux.sync.max.s32 %c, %t, 0xfffff;\n\
                elect.sync %d0|%p5, 0xfffff; activemask.b32 %d1; selp.b32 %d2, 1, 0, %p3; selp.b32 %d3, 2, 0, %p4;\n\
                selp.b32 %d4, 4, 0, %p5; add.u32 %a, %d2, %d3; add.u32 %a, %a, %d4; mad.lo.u32 %a, %b, 1000, %a;\n\
                mad.lo.u32 %a, %c, 10, %a; popc.b32 %d1, %d1; mad.lo.u32 %a, %d1, 1000000, %a; $end:";
    let got = lanes(body, &[]);
    assert_eq!(got[0], 20_190_195);
    assert_eq!(got[1..20], [20_190_191; 19]);
    assert_eq!(got[20..], [0; 12]);
}

/// Small numbers that f16 has exactly.
fn element(row: usize, column: usize) -> f32 {
    ((row * 7 + column * 3) % 11) as f32 - 5.0
}

#[test]
fn matrices_are_loaded_transposed_and_multiplied() {
    // A is 16 × 16, B 8 × 16 (its columns in rows); both are copied to shared memory and loaded from there.
    let mut input = vec![0_u32; 256];
    for row in 0..24 {
        for pair in 0..8 {
            let half = |column: usize| u32::from(f16::from_f32(element(row, column)).to_bits());
            input[row * 8 + pair] = half(2 * pair) | half(2 * pair + 1) << 16;
        }
    }
    let body = ".shared .align 16 .b8 tiles[1024];\n\
        mov.u32 %b, tiles; shl.b32 %c, %t, 2; add.u32 %b, %b, %c;\n\
        ld.global.u32 %d0, [%in]; st.shared.u32 [%b], %d0; ld.global.u32 %d0, [%in+128]; st.shared.u32 [%b+128], %d0;\n\
        ld.global.u32 %d0, [%in+256]; st.shared.u32 [%b+256], %d0; ld.global.u32 %d0, [%in+384];\n\
        st.shared.u32 [%b+384], %d0; ld.global.u32 %d0, [%in+512]; st.shared.u32 [%b+512], %d0;\n\
        ld.global.u32 %d0, [%in+640]; st.shared.u32 [%b+640], %d0; bar.warp.sync -1;\n\
        and.b32 %b, %t, 15; shl.b32 %b, %b, 5; shr.u32 %c, %t, 4; shl.b32 %c, %c, 4; add.u32 %b, %b, %c;\n\
        mov.u32 %c, tiles; add.u32 %b, %b, %c;\n\
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%d0, %d1, %d2, %d3}, [%b];\n\
        and.b32 %b, %t, 7; shl.b32 %b, %b, 5; shr.u32 %c, %t, 3; and.b32 %c, %c, 1; shl.b32 %c, %c, 4;\n\
        add.u32 %b, %b, %c; mov.u32 %c, tiles; add.u32 %b, %b, %c;\n\
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%d4, %d5}, [%b+512];\n\
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%d6, %d7}, [%b+512];\n\
        movmatrix.sync.aligned.m8n8.trans.b16 %d6, %d6; movmatrix.sync.aligned.m8n8.trans.b16 %d7, %d7;\n\
        setp.ne.u32 %p1, %d4, %d6; setp.ne.u32 %p2, %d5, %d7; or.pred %p1, %p1, %p2; @%p1 trap;\n\
        mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f00000000; mov.f32 %f3, %f2; mov.f32 %f4, %f2;\n\
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4}, {%d0, %d1, %d2, %d3}, {%d4, %d5},\n\
        {%f1, %f2, %f3, %f4};\n\
        mul.wide.u32 %w1, %t, 12; add.s64 %out, %out, %w1; st.global.v4.f32 [%out], {%f1, %f2, %f3, %f4};";
    let got = Snippet {
        input,
        num_outputs: 128,
        ..Snippet::new(body)
    }
    .run();
    for lane in 0..32 {
        for index in 0..4 {
            let (row, column) = (lane / 4 + 8 * (index / 2), 2 * (lane % 4) + index % 2);
            let product: f32 = (0..16)
                .map(|k| element(row, k) * element(16 + column, k))
                .sum();
            let want = product + if index == 0 { 1.0 } else { 0.0 };
            assert_eq!(
                f32::from_bits(got[4 * lane + index]),
                want,
                "row {row}, column {column}"
            );
        }
    }
}

#[test]
fn special_registers_tell_threads_apart() {
    let body = "mov.u32 %a, %laneid; mov.u32 %b, %warpid; mov.u32 %c, %nctaid.x; mov.u32 %d0, %ctaid.x;\n\
                mad.lo.u32 %a, %b, 100, %a; mad.lo.u32 %a, %c, 10000, %a; mad.lo.u32 %a, %d0, 100000, %a;\n\
                mov.u64 %w1, %globaltimer; mov.u32 %d1, %clock; mov.u32 %d3, %clock; setp.eq.u32 %p1, %d1, %d3;\n\
                @%p1 trap; st.global.u32 [%out], %a;";
    let got = Snippet {
        grid: 3,
        threads: 64,
        num_outputs: 192,
        ..Snippet::new(body)
    }
    .run();
    assert_eq!((got[0], got[33], got[191]), (30_000, 30_101, 230_131));
}
