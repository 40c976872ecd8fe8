//! Instructions that work on lanes: arithmetic, comparisons, conversions.

use super::{Snippet, binary, lanes};

fn bits(value: f32) -> u32 {
    value.to_bits()
}

#[test]
fn integer_arithmetic_wraps_and_divides_toward_zero() {
    let pairs = [
        (7, 2),
        (u32::MAX, 1),
        ((-7_i32) as u32, 2),
        (0x8000_0000, 3),
    ];
    assert_eq!(
        binary("add.s32 %a, %b, %c;", &pairs),
        [9, 0, (-5_i32) as u32, 0x8000_0003]
    );
    assert_eq!(
        binary("div.s32 %a, %b, %c;", &pairs),
        [3, u32::MAX, (-3_i32) as u32, (-715_827_882_i32) as u32]
    );
    assert_eq!(
        binary("rem.s32 %a, %b, %c;", &pairs),
        [1, 0, (-1_i32) as u32, (-2_i32) as u32]
    );
    assert_eq!(
        binary("div.u32 %a, %b, %c;", &pairs)[1..3],
        [u32::MAX, 0x7fff_fffc]
    );
    assert_eq!(
        binary("mul.hi.s32 %a, %b, %c;", &pairs),
        [0, u32::MAX, u32::MAX, (-2_i32) as u32]
    );
    assert_eq!(binary("mul.hi.u32 %a, %b, %c;", &pairs), [0, 0, 1, 1]);
    assert_eq!(binary("max.s32 %a, %b, %c;", &pairs), [7, 1, 2, 3]);
    assert_eq!(
        binary("min.s32 %a, %b, 5;", &pairs),
        [5, u32::MAX, (-7_i32) as u32, 0x8000_0000]
    );
}

#[test]
fn shifts_beyond_the_length_give_zeros_or_signs() {
    let pairs = [
        (0x8000_0001, 1),
        (0x8000_0001, 31),
        (0x8000_0001, 32),
        (0x8000_0001, 100),
    ];
    assert_eq!(
        binary("shl.b32 %a, %b, %c;", &pairs),
        [2, 0x8000_0000, 0, 0]
    );
    assert_eq!(
        binary("shr.u32 %a, %b, %c;", &pairs),
        [0x4000_0000, 1, 0, 0]
    );
    assert_eq!(
        binary("shr.s32 %a, %b, %c;", &pairs),
        [0xc000_0000, u32::MAX, u32::MAX, u32::MAX]
    );
    let wide =
        "cvt.u64.u32 %w1, %b; shl.b64 %w1, %w1, %c; shr.u64 %w1, %w1, 31; cvt.u32.u64 %a, %w1;";
    assert_eq!(binary(wide, &pairs), [2, 0x8000_0001, 2, 0]);
}

#[test]
fn bits_are_found_inserted_and_permuted() {
    let pairs = [
        (0x00f0_0000, 0x1234_5678),
        (0, 0),
        (0x8000_0000, 0xffff_ffff),
    ];
    assert_eq!(
        binary("bfind.shiftamt.u32 %a, %b;", &pairs),
        [8, u32::MAX, 0]
    );
    assert_eq!(binary("clz.b32 %a, %b;", &pairs), [8, 32, 0]);
    assert_eq!(binary("brev.b32 %a, %b;", &pairs), [0x0000_0f00, 0, 1]);
    assert_eq!(binary("popc.b32 %a, %c;", &pairs), [13, 0, 32]);
    assert_eq!(
        binary("bfi.b32 %a, %b, %c, 4, 8;", &pairs),
        [0x1234_5008, 0, 0xffff_f00f]
    );
    assert_eq!(
        binary("prmt.b32 %a, %b, %c, 0x7f04;", &pairs[..1]),
        [0x1200_0078]
    );
    assert_eq!(
        binary("lop3.b32 %a, %b, %c, %b, 0xc0;", &pairs),
        [0x0030_0000, 0, 0x8000_0000]
    );
}

#[test]
fn wide_products_and_carries_use_all_64_bits() {
    let body =
        "mul.wide.s32 %w1, %b, %c; add.s64 %w1, %w1, 1; shr.u64 %w1, %w1, 32; cvt.u32.u64 %a, %w1;";
    assert_eq!(
        binary(body, &[(u32::MAX, 5), (1 << 31, 1 << 31)]),
        [u32::MAX, 0x4000_0000]
    );
    let body = "mov.b64 %w1, {%b, %c}; mul.hi.s64 %w2, %w1, %w1; mov.b64 {%a, _}, %w2;";
    assert_eq!(
        binary(body, &[(0, 1), (0, 1 << 16), (0, u32::MAX)]),
        [1, 0, 1]
    );
    let body = "mov.b64 %w1, {%b, %c}; max.u64 %w2, %w1, 4294967296; cvt.u32.u64 %a, %w2;";
    assert_eq!(binary(body, &[(9, 0), (9, 1), (9, 2)]), [0, 9, 9]);
}

#[test]
fn floats_round_once_and_order_nan() {
    let nan = f32::NAN.to_bits();
    let pairs = [
        (bits(1.0), bits(2.0)),
        (nan, bits(2.0)),
        (bits(-0.0), bits(0.0)),
        (bits(1e-40), bits(1e-40)),
    ];
    let floats = |instruction: &str| {
        let body = format!("mov.b32 %f1, %b; mov.b32 %f2, %c; {instruction} mov.b32 %a, %f3;");
        binary(&body, &pairs)
    };
    assert_eq!(
        floats("max.f32 %f3, %f1, %f2;"),
        [bits(2.0), bits(2.0), 0, bits(1e-40)]
    );
    assert_eq!(floats("add.ftz.f32 %f3, %f1, %f2;")[3], 0);
    assert_eq!(floats("add.f32 %f3, %f1, %f2;")[3], 2 * bits(1e-40));
    assert_eq!(
        floats("fma.rn.f32 %f3, %f1, %f2, 0fBF800000;")[0],
        bits(1.0)
    );
    let compare = |relation: &str| {
        let body = format!(
            "mov.b32 %f1, %b; mov.b32 %f2, %c; setp.{relation}.f32 %p1, %f1, %f2; selp.u32 %a, 1, 0, %p1;"
        );
        binary(&body, &pairs)
    };
    assert_eq!(compare("lt"), [1, 0, 0, 0]);
    assert_eq!(compare("geu"), [0, 1, 1, 1]);
    assert_eq!(compare("neu"), [1, 1, 0, 0]);
    assert_eq!(compare("ne"), [1, 0, 0, 0]);
    assert_eq!(compare("nan"), [0, 1, 0, 0]);
}

#[test]
fn conversions_round_and_saturate() {
    let values = [2.5_f32, 3.5, -1.5, 5e9, f32::NAN];
    let pairs: Vec<(u32, u32)> = values.iter().map(|value| (value.to_bits(), 0)).collect();
    assert_eq!(
        binary("mov.b32 %f1, %b; cvt.rni.u32.f32 %a, %f1;", &pairs),
        [2, 4, 0, u32::MAX, 0]
    );
    assert_eq!(
        binary("mov.b32 %f1, %b; cvt.rzi.s32.f32 %a, %f1;", &pairs),
        [2, 3, u32::MAX, i32::MAX as u32, 0]
    );
    let body = "mov.b32 %f1, %b; cvt.rn.f16.f32 %h1, %f1; cvt.f32.f16 %f2, %h1; mov.b32 %a, %f2;";
    assert_eq!(
        binary(body, &pairs)[..4],
        [bits(2.5), bits(3.5), bits(-1.5), bits(f32::INFINITY)]
    );
    // Of two the first is the high half.
    let body = "mov.b32 %f1, %b; cvt.rn.bf16x2.f32 %a, %f1, 0f3F800000;";
    assert_eq!(binary(body, &pairs[..1]), [0x4020_3f80]);
    let body =
        "mov.b32 %f1, %b; cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, 0f3F800000; cvt.u32.u16 %a, %h1;";
    assert_eq!(binary(body, &pairs[..4]), [0x4238, 0x4638, 0xbc38, 0x7e38]);
    let body =
        "cvt.s64.s32 %w1, %b; cvt.s64.s32 %w2, %w1; shr.s64 %w2, %w2, 32; cvt.u32.u64 %a, %w2;";
    assert_eq!(binary(body, &[(0x8000_0000, 0), (5, 0)]), [u32::MAX, 0]);
}

#[test]
fn pairs_of_halves_are_multiplied_and_compared() {
    // 1.5 · 2 and -0.25 · 4; the smallest f16 times a half rounds to even, 0; 65504 · 2 is infinite.
    let operands = [(0xb400_3e00, 0x4400_4000), (0x7bff_0001, 0x4000_3800)];
    let product = "mul.f16x2 %a, %b, %c;";
    assert_eq!(binary(product, &operands), [0xbc00_4200, 0x7c00_0000]);
    assert_eq!(
        binary("abs.f16x2 %a, %b;", &[(0xb400_8000, 0)]),
        [0x3400_0000]
    );
    // Zeros of both signs are equal, NaN is not even itself.
    let equal = "set.eq.u32.f16x2 %a, %b, %c;";
    let operands = [(0x3c00_8000, 0x3c01_0000), (0x7e00_3c00, 0x7e00_3c00)];
    assert_eq!(binary(equal, &operands), [0x0000_ffff, 0x0000_ffff]);
    // Infinity and 1 beside 65504, NaN beside 1 and -0 beside 0.
    let operands = [(0x3c00_7c00, 0x7bff_7bff), (0x8000_7e00, 0x0000_3c00)];
    let [least, most] = ["min.NaN.f16x2 %a, %b, %c;", "max.NaN.f16x2 %a, %b, %c;"];
    assert_eq!(binary(least, &operands), [0x3c00_7bff, 0x8000_7fff]);
    assert_eq!(binary(most, &operands), [0x7bff_7c00, 0x0000_7fff]);
}

#[test]
fn doubles_keep_their_precision() {
    let body = "cvt.rn.f64.u32 %x1, %b; cvt.rn.f64.u32 %x2, %c; div.rn.f64 %x3, %x1, %x2;\n\
                mul.f64 %x3, %x3, 0d41F0000000000000; cvt.rzi.u64.f64 %w1, %x3; cvt.u32.u64 %a, %w1;";
    assert_eq!(binary(body, &[(1, 3), (2, 3)]), [0x5555_5555, 0xaaaa_aaaa]);
}

#[test]
fn predicates_combine_and_negate() {
    let body = "setp.lt.u32 %p1, %t, 8; setp.ge.u32 %p2, %t, 4; and.pred %p3, %p1, %p2; not.pred %p4, %p3;\n\
                xor.pred %p5, %p4, %p1; setp.eq.and.u32 %p6|%p7, %t, 5, !%p5; selp.b32 %d0, 1, 0, %p3;\n\
                selp.b32 %d1, 2, 0, %p5; selp.b32 %d2, 4, 0, %p6; selp.b32 %d3, 8, 0, %p7;\n\
                or.b32 %a, %d0, %d1; or.b32 %a, %a, %d2; or.b32 %a, %a, %d3;";
    let got = lanes(body, &[]);
    let want: Vec<u32> = (0..32_u32)
        .map(|lane| {
            let (below, from) = (lane < 8, lane >= 4);
            let both = below && from;
            let differs = both == below;
            u32::from(both)
                + 2 * u32::from(differs)
                + 4 * u32::from(lane == 5 && !differs)
                + 8 * u32::from(lane != 5 && !differs)
        })
        .collect();
    assert_eq!(got, want);
}

#[test]
fn unknown_instructions_are_named_with_their_line() {
    let error = Snippet::new("tex.2d.v4.f32.f32 %a, %b;")
        .try_run()
        .expect_err("unknown");
    assert!(
        error.contains("line 11") && error.contains("tex.2d"),
        "{error}"
    );
    let error = Snippet::new("add.s32 %a, %w1, 1;")
        .try_run()
        .expect_err("a wide register");
    assert!(error.contains("wanted a register of 32 bits"), "{error}");
}
