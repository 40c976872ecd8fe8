//! Backward passes against central differences of forward passes written again in f64.

use super::{
    Dropout, HeadGradient, Kernels, LinearPart, LowRank, Matrix, RopeArgs, SimdLevel, VarlenArgs,
};
use bytes::Bytes;
use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};

pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

pub(super) fn tensor(data: &[f32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(data, dims, &Device::Cpu).unwrap()
}

pub(super) fn random(dims: &[usize], seed: u32) -> Tensor {
    tensor(&values(dims.iter().product(), seed), dims)
}

pub(super) fn flat(tensor: &Tensor) -> Vec<f64> {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f64::from).collect()
}

pub(super) fn matrix(kernels: &Kernels, data: &[f32], [rows, cols]: [usize; 2]) -> Matrix {
    let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
    kernels
        .load_matrix(GgmlDType::F32, rows, cols, Bytes::from(bytes))
        .unwrap()
}

/// Runs the body with the kernels of every instruction set of this machine.
pub(super) fn on_each_level(body: impl Fn(&Kernels)) {
    for level in [SimdLevel::Scalar, SimdLevel::Avx2, SimdLevel::Avx512] {
        if level.is_supported() {
            body(&Kernels::cpu_with(2, level).unwrap());
        }
    }
}

/// Compares `got` with the gradient of Σ dy f(x) by central differences.
pub(super) fn assert_gradient(
    got: &Tensor,
    x: &Tensor,
    dy: &Tensor,
    f: impl Fn(&[f64]) -> Vec<f64>,
) {
    let (got, mut x, dy) = (flat(got), flat(x), flat(dy));
    assert_eq!(got.len(), x.len());
    let step = 1e-5;
    let value = |x: &[f64]| -> f64 { f(x).iter().zip(&dy).map(|(y, dy)| y * dy).sum() };
    for i in 0..x.len() {
        let middle = x[i];
        x[i] = middle + step;
        let above = value(&x);
        x[i] = middle - step;
        let below = value(&x);
        x[i] = middle;
        let want = (above - below) / (2.0 * step);
        let error = (got[i] - want).abs();
        assert!(
            error < 2e-5 * (1.0 + want.abs()),
            "{i}: {} for {want}",
            got[i]
        );
    }
}

pub(super) fn assert_close(got: &Tensor, want: &[f64]) {
    for (i, (got, want)) in flat(got).iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() < 2e-5 * (1.0 + want.abs()),
            "{i}: {got} for {want}"
        );
    }
}

fn norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let rows = x.chunks_exact(weight.len());
    rows.flat_map(|row| {
        let squares: f64 = row.iter().map(|x| x * x).sum();
        let rho = (squares / weight.len() as f64 + eps).powf(-0.5);
        row.iter()
            .zip(weight)
            .map(move |(x, w)| x * rho * w)
            .collect::<Vec<_>>()
    })
    .collect()
}

#[test]
fn rms_norm_backward_is_the_gradient_plus_what_passes_the_norm() {
    on_each_level(|kernels| {
        let (x, weight, dy) = (random(&[3, 37], 1), random(&[37], 2), random(&[3, 37], 3));
        let w = flat(&weight);
        let plain = kernels
            .rms_norm_backward(&x, &weight, 1e-6, &dy, None)
            .unwrap();
        assert_gradient(&plain, &x, &dy, |x| norm(x, &w, 1e-6));
        let residual = random(&[3, 37], 4);
        let both = kernels
            .rms_norm_backward(&x, &weight, 1e-6, &dy, Some(&residual))
            .unwrap();
        assert_close(&both, &flat(&(plain + residual).unwrap()));
    });
}

#[test]
fn silu_and_mul_backward_is_the_gradient() {
    on_each_level(|kernels| {
        let gate_up = random(&[3, 38], 5).affine(4.0, 0.0).unwrap();
        let dh = random(&[3, 19], 6);
        let got = kernels.silu_and_mul_backward(&gate_up, &dh).unwrap();
        assert_gradient(&got, &gate_up, &dh, |x| {
            let rows = x.chunks_exact(38);
            rows.flat_map(|row| {
                (0..19).map(move |i| row[i] / (1.0 + (-row[i]).exp()) * row[19 + i])
            })
            .collect()
        });
    });
}

struct Rope {
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
}

const HEADS: [usize; 3] = [4, 2, 6];
const POSITIONS: [u32; 4] = [0, 1, 5, 2];

impl Rope {
    fn new() -> Self {
        let angles = random(&[8, 3], 10);
        // A factor as YaRN's: the tables are no pure rotation.
        Self {
            q_norm: random(&[6], 11),
            k_norm: random(&[6], 12),
            cos: angles.cos().unwrap().affine(1.1, 0.0).unwrap(),
            sin: angles.sin().unwrap().affine(1.1, 0.0).unwrap(),
        }
    }

    fn args(&self, with_norm: bool) -> RopeArgs<'_> {
        RopeArgs {
            num_heads: HEADS[0],
            num_kv_heads: HEADS[1],
            head_dim: HEADS[2],
            qk_norm: with_norm.then_some((&self.q_norm, &self.k_norm)),
            eps: 1e-6,
            cos: &self.cos,
            sin: &self.sin,
            positions: &POSITIONS,
        }
    }

    fn forward(&self, qkv: &[f64], with_norm: bool) -> Vec<f64> {
        let (cos, sin) = (flat(&self.cos), flat(&self.sin));
        let norms = [flat(&self.q_norm), flat(&self.k_norm)];
        let mut out = Vec::new();
        for (row, position) in qkv.chunks_exact(48).zip(POSITIONS) {
            for (index, head) in row.chunks_exact(6).enumerate() {
                if index >= 6 {
                    out.extend_from_slice(head);
                    continue;
                }
                let head = match with_norm {
                    true => norm(head, &norms[usize::from(index >= 4)], 1e-6),
                    false => head.to_vec(),
                };
                let at = |i: usize| position as usize * 3 + i;
                let low = (0..3).map(|i| head[i] * cos[at(i)] - head[3 + i] * sin[at(i)]);
                let high = (0..3).map(|i| head[3 + i] * cos[at(i)] + head[i] * sin[at(i)]);
                out.extend(low.chain(high));
            }
        }
        out
    }
}

#[test]
fn rope_and_its_gradient_agree_with_f64_with_and_without_norms() {
    let kernels = Kernels::cpu(2).unwrap();
    let (rope, qkv, dy) = (Rope::new(), random(&[4, 48], 13), random(&[4, 48], 14));
    for with_norm in [false, true] {
        let args = rope.args(with_norm);
        let rotated = kernels.rope(&qkv, &args).unwrap();
        assert_close(&rotated, &rope.forward(&flat(&qkv), with_norm));
        let input = with_norm.then_some(&qkv);
        let got = kernels.rope_backward(input, &dy, &args).unwrap();
        assert_gradient(&got, &qkv, &dy, |x| rope.forward(x, with_norm));
    }
    assert!(kernels.rope_backward(None, &dy, &rope.args(true)).is_err());
}

fn attention(qkv: &[f64], args: &VarlenArgs<'_>) -> Vec<f64> {
    let (heads, kv_heads, dim) = (args.num_heads, args.num_kv_heads, args.head_dim);
    let width = (heads + 2 * kv_heads) * dim;
    let mut out = vec![0.0; qkv.len() / width * heads * dim];
    for bounds in args.cu_seqlens.windows(2) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        for head in 0..heads {
            let kv_head = head / (heads / kv_heads);
            let part = |row: usize, head: usize| &qkv[row * width + head * dim..][..dim];
            for query in start..end {
                let q = part(query, head);
                let scores: Vec<f64> = (start..=query)
                    .map(|key| {
                        let k = part(key, heads + kv_head);
                        let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        (dot * f64::from(args.scale)).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for (key, score) in (start..).zip(&scores) {
                    let v = part(key, heads + kv_heads + kv_head);
                    let out = &mut out[(query * heads + head) * dim..][..dim];
                    for (out, v) in out.iter_mut().zip(v) {
                        *out += score / sum * v;
                    }
                }
            }
        }
    }
    out
}

#[test]
fn packed_attention_and_its_gradient_agree_with_f64() {
    on_each_level(|kernels| {
        let cu_seqlens = [0, 1, 6, 6, 15];
        let args = VarlenArgs {
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 6,
            scale: 0.8,
            cu_seqlens: &cu_seqlens,
        };
        let (qkv, dy) = (random(&[15, 48], 20), random(&[15, 24], 21));
        let (out, lse) = kernels.varlen_attention(&qkv, &args).unwrap();
        assert_close(&out, &attention(&flat(&qkv), &args));
        let got = kernels
            .varlen_attention_backward(&qkv, &args, (&out, &lse), &dy)
            .unwrap();
        assert_gradient(&got, &qkv, &dy, |x| attention(x, &args));
    });
}

#[test]
fn attention_over_several_tiles_of_queries_agrees_with_f64() {
    let kernels = Kernels::cpu(2).unwrap();
    let cu_seqlens = [0, 150, 160];
    let args = VarlenArgs {
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 4,
        scale: 0.5,
        cu_seqlens: &cu_seqlens,
    };
    let qkv = random(&[160, 16], 22);
    let (out, lse) = kernels.varlen_attention(&qkv, &args).unwrap();
    assert_close(&out, &attention(&flat(&qkv), &args));
    // The gradient along one random direction.
    let (dy, direction) = (random(&[160, 8], 23), random(&[160, 16], 24));
    let got = kernels
        .varlen_attention_backward(&qkv, &args, (&out, &lse), &dy)
        .unwrap();
    let (x, direction, dy) = (flat(&qkv), flat(&direction), flat(&dy));
    let value = |step: f64| -> f64 {
        let moved: Vec<f64> = x
            .iter()
            .zip(&direction)
            .map(|(x, d)| x + step * d)
            .collect();
        attention(&moved, &args)
            .iter()
            .zip(&dy)
            .map(|(y, dy)| y * dy)
            .sum()
    };
    let want = (value(1e-5) - value(-1e-5)) / 2e-5;
    let got: f64 = flat(&got).iter().zip(&direction).map(|(g, d)| g * d).sum();
    assert!(
        (got - want).abs() < 1e-4 * (1.0 + want.abs()),
        "{got} for {want}"
    );
}

#[test]
fn cross_entropy_and_its_gradient_agree_with_f64() {
    on_each_level(|kernels| {
        let (hidden, head) = (
            random(&[5, 7], 30).affine(3.0, 0.0).unwrap(),
            values(83 * 7, 31),
        );
        let targets = [0, 82, 41, 41, 7];
        let forward = |x: &[f64]| -> Vec<f64> {
            let rows = x.chunks_exact(7).zip(targets);
            rows.map(|(x, target)| {
                let logits: Vec<f64> = head
                    .chunks_exact(7)
                    .map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
                    .collect();
                let sum: f64 = logits.iter().map(|z: &f64| z.exp()).sum();
                sum.ln() - logits[target as usize]
            })
            .collect()
        };
        let weight = matrix(kernels, &head, [83, 7]);
        let part = LinearPart {
            weight: &weight,
            bias: None,
            low_rank: None,
        };
        let wanted = || {
            Some(HeadGradient {
                scale: 0.25,
                weight: None,
            })
        };
        let output = kernels
            .cross_entropy(&hidden, &part, &targets, wanted())
            .unwrap();
        assert_close(&tensor(&output.losses, &[5]), &forward(&flat(&hidden)));
        let dy = tensor(&[0.25; 5], &[5]);
        assert_gradient(&output.d_hidden.unwrap(), &hidden, &dy, forward);
        let again = kernels
            .cross_entropy(&hidden, &part, &targets, None)
            .unwrap();
        assert!(again.losses == output.losses && again.d_hidden.is_none());
    });
}

#[test]
fn linears_side_by_side_with_low_rank_terms_agree_with_f64_forward_and_backward() {
    on_each_level(|kernels| {
        let (x, dy) = (random(&[5, 20], 40), random(&[5, 41], 41));
        let weights = [values(33 * 20, 42), values(8 * 20, 43)];
        let parts = [
            matrix(kernels, &weights[0], [33, 20]),
            matrix(kernels, &weights[1], [8, 20]),
        ];
        let bias = random(&[33], 44);
        // With x constant in it, u Bᵀ is an addend; backward takes du A instead.
        let (u, b) = (random(&[5, 3], 45), random(&[8, 3], 46));
        let (du, a) = (random(&[5, 3], 47), random(&[3, 20], 48));
        let b_t = b.t().unwrap();
        let forward = kernels
            .linear(
                &x,
                &[
                    LinearPart {
                        weight: &parts[0],
                        bias: Some(&bias),
                        low_rank: None,
                    },
                    LinearPart {
                        weight: &parts[1],
                        bias: None,
                        low_rank: Some(LowRank { x: &u, w: &b_t }),
                    },
                ],
            )
            .unwrap();
        let base = |x: &[f64]| -> Vec<f64> {
            x.chunks_exact(20)
                .flat_map(|x| {
                    weights.iter().flat_map(move |w| {
                        w.chunks_exact(20)
                            .map(move |w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
                    })
                })
                .collect()
        };
        let term = flat(&u.matmul(&b_t).unwrap());
        let mut want = base(&flat(&x));
        let bias = flat(&bias);
        for (i, want) in want.iter_mut().enumerate() {
            let (row, col) = (i / 41, i % 41);
            *want += if col < 33 {
                bias[col]
            } else {
                term[row * 8 + col - 33]
            };
        }
        assert_close(&forward, &want);

        let low_rank = Some(LowRank { x: &du, w: &a });
        let got = kernels
            .linear_backward(
                &dy,
                &[
                    LinearPart {
                        weight: &parts[0],
                        bias: None,
                        low_rank,
                    },
                    LinearPart {
                        weight: &parts[1],
                        bias: None,
                        low_rank: None,
                    },
                ],
            )
            .unwrap();
        let frozen = (got - du.matmul(&a).unwrap()).unwrap();
        assert_gradient(&frozen, &x, &dy, base);
    });
}

#[test]
fn products_read_transposes_and_column_ranges_in_place() {
    let kernels = Kernels::cpu(2).unwrap();
    let (a, b) = (random(&[9, 30], 50), random(&[9, 20], 51));
    let (left, right) = (a.narrow(1, 3, 17).unwrap(), b.narrow(1, 5, 4).unwrap());
    let got = kernels.product(&left.t().unwrap(), &right, 0.5).unwrap();
    let want = left
        .t()
        .unwrap()
        .contiguous()
        .unwrap()
        .matmul(&right.contiguous().unwrap());
    assert_close(&got, &flat(&(want.unwrap() * 0.5).unwrap()));
    assert!(kernels.product(&left, &right, 1.0).is_err());
}

#[test]
fn dropout_keeps_the_mean_and_repeats_its_mask_only_for_its_key() {
    let kernels = Kernels::cpu(2).unwrap();
    let x = Tensor::ones((300, 200), candle_core::DType::F32, &Device::Cpu).unwrap();
    let dropout = |key| Dropout {
        probability: 0.1,
        key,
    };
    let first = flat(&kernels.dropout(&x, dropout(1)).unwrap());
    let zeros = first.iter().filter(|x| **x == 0.0).count();
    // 60000 draws: the standard deviation is 73.
    assert!(zeros.abs_diff(6000) < 400, "{zeros} of 60000 dropped");
    assert!(
        first
            .iter()
            .all(|x| *x == 0.0 || (x - 1.0 / 0.9).abs() < 1e-6)
    );
    assert_eq!(first, flat(&kernels.dropout(&x, dropout(1)).unwrap()));
    for key in [2, 1 << 32] {
        let other = flat(&kernels.dropout(&x, dropout(key)).unwrap());
        let both = first
            .iter()
            .zip(&other)
            .filter(|(a, b)| **a == 0.0 && **b == 0.0)
            .count();
        assert!(both.abs_diff(600) < 150, "{both} dropped by both keys");
    }
    let sum = kernels.add_dropout(&x, &x, dropout(1)).unwrap();
    assert_close(&sum, &first.iter().map(|x| x + 1.0).collect::<Vec<_>>());
}

#[test]
fn scattered_rows_leave_zeros_between() {
    let kernels = Kernels::cpu(1).unwrap();
    let x = tensor(&[1.0, 2.0, 3.0, 4.0], &[2, 2]);
    let got = kernels.scatter_rows(&x, &[2, 0], 3).unwrap();
    assert_eq!(
        got.to_vec2::<f32>().unwrap(),
        [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    );
    assert!(kernels.scatter_rows(&x, &[3, 0], 3).is_err());
}
