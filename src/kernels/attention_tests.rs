//! Rotary embedding, the paged cache and attention against plain loops, at every SIMD level.

use super::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// A model's attention and one sequence of it.
#[derive(Clone, Copy)]
struct Case {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    dtype: DType,
    is_normed: bool,
}

const CASES: [Case; 6] = [
    Case::new(9, 3, 64, 16, DType::F32, false),
    Case::new(14, 2, 64, 32, DType::F16, false),
    Case::new(8, 4, 128, 16, DType::F32, true),
    Case::new(4, 4, 8, 16, DType::F32, true),
    Case::new(5, 1, 16, 48, DType::F16, false),
    Case::new(6, 2, 84, 16, DType::F32, false),
];

/// The same with caches of E4M3.
fn fp8_cases() -> [Case; 6] {
    CASES.map(|case| Case {
        dtype: DType::F8E4M3,
        ..case
    })
}

impl Case {
    const fn new(
        num_heads: usize,
        num_kv_heads: usize,
        head_dim: usize,
        block_size: usize,
        dtype: DType,
        is_normed: bool,
    ) -> Self {
        Self {
            num_heads,
            num_kv_heads,
            head_dim,
            block_size,
            dtype,
            is_normed,
        }
    }

    fn width(self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}

fn random(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn tensor(data: &[f32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(data, dims, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn levels() -> Vec<Kernels> {
    [SimdLevel::Scalar, SimdLevel::Avx2, SimdLevel::Avx512]
        .into_iter()
        .filter(|level| level.is_supported())
        .map(|level| Kernels::cpu_with(2, level).unwrap())
        .collect()
}

/// Random sequences with their rotary tables, norms and a shuffled block table each.
struct World {
    case: Case,
    /// `[len, width]` a sequence.
    qkv: Vec<Vec<f32>>,
    tables: Vec<Vec<u32>>,
    norms: [Vec<f32>; 2],
    cos: Vec<f32>,
    sin: Vec<f32>,
    max_positions: usize,
}

/// Tokens `start..end` of sequence `sequence`.
type Piece = (usize, usize, usize);

impl World {
    fn new(case: Case, lens: &[usize], seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let max_positions = lens.iter().copied().max().unwrap();
        let half = case.head_dim / 2;
        let angles = (0..max_positions * half).map(|index| {
            let (position, i) = ((index / half) as f32, (index % half) as f32);
            position / 10000f32.powf(i / half as f32)
        });
        let angles: Vec<f32> = angles.collect();
        let num_blocks = |len: &usize| len.div_ceil(case.block_size);
        let mut free: Vec<u32> = (0..lens.iter().map(num_blocks).sum::<usize>() as u32).collect();
        free.shuffle(&mut rng);
        let tables = lens
            .iter()
            .map(|len| free.split_off(free.len() - num_blocks(len)));
        Self {
            case,
            tables: tables.collect(),
            qkv: lens
                .iter()
                .map(|len| random(&mut rng, len * case.width()))
                .collect(),
            norms: [
                random(&mut rng, case.head_dim),
                random(&mut rng, case.head_dim),
            ],
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
            max_positions,
        }
    }

    fn new_cache(&self, kernels: &Kernels) -> KvBlocks {
        let Case {
            num_kv_heads,
            head_dim,
            block_size,
            dtype,
            ..
        } = self.case;
        let num_blocks = self.tables.iter().map(Vec::len).sum();
        kernels
            .new_kv_cache(1, [num_blocks, block_size, num_kv_heads, head_dim], dtype)
            .unwrap()
            .remove(0)
    }

    /// Returns the batch of some pieces, and their rows of `qkv`.
    fn batch(&self, pieces: &[Piece]) -> (AttentionBatch, Tensor) {
        let (block_size, width) = (self.case.block_size, self.case.width());
        let mut batch = AttentionBatch {
            cu_seqlens_q: vec![0],
            cu_blocks: vec![0],
            ..AttentionBatch::default()
        };
        let mut qkv = Vec::new();
        for &(sequence, start, end) in pieces {
            let table = &self.tables[sequence];
            qkv.extend_from_slice(&self.qkv[sequence][start * width..end * width]);
            for position in start..end {
                batch.positions.push(position as u32);
                let slot = table[position / block_size] as usize * block_size;
                batch
                    .slot_mapping
                    .push((slot + position % block_size) as u32);
            }
            batch.cu_seqlens_q.push(batch.positions.len() as u32);
            batch.context_lens.push(end as u32);
            batch.block_tables.extend_from_slice(table);
            batch.cu_blocks.push(batch.block_tables.len() as u32);
        }
        let qkv = tensor(&qkv, &[batch.positions.len(), width]);
        (batch, qkv)
    }

    /// Fills the cache with some pieces and returns their queries.
    fn rope(&self, kernels: &Kernels, kv: &mut KvBlocks, pieces: &[Piece]) -> Tensor {
        let Case {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = self.case;
        let (batch, qkv) = self.batch(pieces);
        let half = head_dim / 2;
        let (cos, sin) = (
            tensor(&self.cos, &[self.max_positions, half]),
            tensor(&self.sin, &[self.max_positions, half]),
        );
        let norms = self.norms.each_ref().map(|norm| tensor(norm, &[head_dim]));
        let args = RopeAndCache {
            num_heads,
            num_kv_heads,
            head_dim,
            q_norm: self.case.is_normed.then_some(&norms[0]),
            k_norm: self.case.is_normed.then_some(&norms[1]),
            eps: 1e-6,
            cos: &cos,
            sin: &sin,
            batch: &batch,
        };
        kernels.rope_and_cache(&qkv, &args, kv).unwrap()
    }

    /// Returns what the pieces' queries see in the cache.
    fn attend(&self, kernels: &Kernels, q: &Tensor, kv: &KvBlocks, pieces: &[Piece]) -> Vec<f32> {
        let Case {
            num_heads,
            head_dim,
            ..
        } = self.case;
        let (batch, _) = self.batch(pieces);
        let scale = 1.0 / (head_dim as f32).sqrt() * 3.0;
        values(
            &kernels
                .paged_attention(q, kv, &batch, num_heads, scale)
                .unwrap(),
        )
    }

    /// Runs one step of some pieces and returns each piece's output rows.
    fn step(&self, kernels: &Kernels, kv: &mut KvBlocks, pieces: &[Piece]) -> Vec<Vec<f32>> {
        let q = self.rope(kernels, kv, pieces);
        let out = self.attend(kernels, &q, kv, pieces);
        let mut rows = out.chunks_exact(self.case.num_heads * self.case.head_dim);
        pieces
            .iter()
            .map(|(_, start, end)| rows.by_ref().take(end - start).flatten().copied().collect())
            .collect()
    }

    /// A rotated head of a token in `f64`, normed where the case is.
    fn rotated(&self, head: &[f32], position: usize, norm: Option<&[f32]>) -> Vec<f64> {
        let (dim, half) = (head.len(), head.len() / 2);
        let mut x: Vec<f64> = head.iter().map(|&x| f64::from(x)).collect();
        if let Some(norm) = norm {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / dim as f64;
            let scale = 1.0 / (mean + 1e-6).sqrt();
            x.iter_mut()
                .zip(norm)
                .for_each(|(x, &w)| *x *= scale * f64::from(w));
        }
        let angle = |i: usize| {
            let at = position * half + i % half;
            (f64::from(self.cos[at]), f64::from(self.sin[at]))
        };
        let rotate = |i: usize| {
            let (cos, sin) = angle(i);
            let other = if i < half { -x[i + half] } else { x[i - half] };
            x[i] * cos + other * sin
        };
        (0..dim).map(rotate).collect()
    }

    /// The output of one token in `f64`.
    fn naive(&self, sequence: usize, position: usize) -> Vec<f64> {
        let Case {
            num_heads,
            num_kv_heads,
            head_dim,
            is_normed,
            ..
        } = self.case;
        let head = |token: usize, head: usize| {
            let start = token * self.case.width() + head * head_dim;
            &self.qkv[sequence][start..start + head_dim]
        };
        let norm = |which: usize| is_normed.then_some(&*self.norms[which]);
        let scale = 3.0 / (head_dim as f64).sqrt();
        let mut out = Vec::new();
        for h in 0..num_heads {
            let kv_head = h / (num_heads / num_kv_heads);
            let q = self.rotated(head(position, h), position, norm(0));
            let weights: Vec<f64> = (0..=position)
                .map(|token| {
                    let k = self.rotated(head(token, num_heads + kv_head), token, norm(1));
                    (q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * scale).exp()
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            out.extend((0..head_dim).map(|dim| {
                let value = |token| f64::from(head(token, num_heads + num_kv_heads + kv_head)[dim]);
                let weighted = weights
                    .iter()
                    .enumerate()
                    .map(|(token, w)| w * value(token));
                weighted.sum::<f64>() / sum
            }));
        }
        out
    }
}

#[test]
fn attention_equals_plain_loops_in_a_mixed_batch() {
    for kernels in levels() {
        for (seed, case) in CASES.into_iter().enumerate() {
            let world = World::new(case, &[150, 1, 70, 16], seed as u64);
            let mut kv = world.new_cache(&kernels);
            // A prefill in two chunks beside whole prefills, then decodes.
            let first = world.step(&kernels, &mut kv, &[(0, 0, 100), (1, 0, 1), (3, 0, 15)]);
            let second = world.step(&kernels, &mut kv, &[(3, 15, 16), (0, 100, 149), (2, 0, 70)]);
            let third = world.step(&kernels, &mut kv, &[(0, 149, 150)]);
            let width = case.num_heads * case.head_dim;
            let tolerance = if case.dtype == DType::F16 { 4e-3 } else { 1e-5 };
            for (output, sequence, start) in [
                (&first[0], 0, 0),
                (&first[1], 1, 0),
                (&first[2], 3, 0),
                (&second[0], 3, 15),
                (&second[1], 0, 100),
                (&second[2], 2, 0),
                (&third[0], 0, 149),
            ] {
                for (row, got) in output.chunks_exact(width).enumerate().step_by(7) {
                    let want = world.naive(sequence, start + row);
                    for (index, (&got, want)) in got.iter().zip(want).enumerate() {
                        let error = (f64::from(got) - want).abs();
                        assert!(error < tolerance, "row {row} at {index}: {got} for {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_query_has_the_same_bits_however_its_prompt_is_cut() {
    for kernels in levels() {
        for (seed, case) in CASES.into_iter().chain(fp8_cases()).enumerate() {
            let world = World::new(case, &[600, 300], 10 + seed as u64);
            let mut kv = world.new_cache(&kernels);
            let whole = world.step(&kernels, &mut kv, &[(0, 0, 600), (1, 0, 300)]);
            let mut kv = world.new_cache(&kernels);
            let mut pieces = Vec::new();
            for (start, end) in [(0, 7), (7, 256), (256, 257), (257, 599), (599, 600)] {
                pieces.extend(world.step(&kernels, &mut kv, &[(0, start, end)]).remove(0));
            }
            assert_eq!(pieces, whole[0]);
        }
    }
}

/// So that whatever is right of an `f32` cache is right of this one.
#[test]
fn an_fp8_cache_attends_as_an_f32_one_that_holds_the_rounded_values() {
    for kernels in levels() {
        for (seed, case) in fp8_cases().into_iter().enumerate() {
            let world = World::new(case, &[300, 17], 30 + seed as u64);
            let of_f32 = World {
                case: Case {
                    dtype: DType::F32,
                    ..case
                },
                ..World::new(case, &[300, 17], 30 + seed as u64)
            };
            let (mut kv, mut plain) = (world.new_cache(&kernels), of_f32.new_cache(&kernels));
            let pieces = [(0, 0, 300), (1, 0, 17)];
            let q = world.rope(&kernels, &mut kv, &pieces);
            assert_eq!(
                values(&of_f32.rope(&kernels, &mut plain, &pieces)),
                values(&q)
            );
            let got = world.attend(&kernels, &q, &kv, &pieces);
            assert_ne!(of_f32.attend(&kernels, &q, &plain, &pieces), got);
            if let KvData::Cpu(plain) = &mut plain.0 {
                plain.round_to_e4m3();
            }
            assert_eq!(of_f32.attend(&kernels, &q, &plain, &pieces), got);
        }
    }
}

#[test]
fn bad_slots_positions_and_blocks_are_refused() {
    let kernels = Kernels::cpu(1).unwrap();
    let mut kv = kernels
        .new_kv_cache(1, [2, 16, 1, 4], DType::F32)
        .unwrap()
        .remove(0);
    let table = tensor(&[0.5; 20], &[10, 2]);
    let qkv = tensor(&[0.5; 24], &[2, 12]);
    let rope = |kv: &mut KvBlocks, positions: &[u32], slot_mapping: &[u32]| {
        let batch = AttentionBatch {
            positions: positions.to_vec(),
            slot_mapping: slot_mapping.to_vec(),
            ..AttentionBatch::default()
        };
        let args = RopeAndCache {
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 4,
            q_norm: None,
            k_norm: None,
            eps: 1e-6,
            cos: &table,
            sin: &table,
            batch: &batch,
        };
        kernels.rope_and_cache(&qkv, &args, kv)
    };
    assert!(
        rope(&mut kv, &[0, 10], &[0, 1]).is_err(),
        "position beyond the table"
    );
    assert!(
        rope(&mut kv, &[0, 1], &[0, 32]).is_err(),
        "slot beyond the cache"
    );
    assert!(rope(&mut kv, &[0, 1], &[3, 3]).is_err(), "slot twice");
    let q = rope(&mut kv, &[0, 1], &[0, 1]).unwrap();
    let batch = AttentionBatch {
        cu_seqlens_q: vec![0, 2],
        context_lens: vec![2],
        block_tables: vec![0],
        cu_blocks: vec![0, 1],
        positions: vec![0, 1],
        slot_mapping: vec![0, 1],
        staged: None,
    };
    let attend = |batch: &AttentionBatch| kernels.paged_attention(&q, &kv, batch, 1, 1.0);
    assert!(attend(&batch).is_ok());
    let bad_block = AttentionBatch {
        block_tables: vec![2],
        ..batch.clone()
    };
    assert!(attend(&bad_block).is_err());
    let bad_position = AttentionBatch {
        positions: vec![0, 2],
        ..batch.clone()
    };
    assert!(attend(&bad_position).is_err());
    let short_table = AttentionBatch {
        context_lens: vec![17],
        ..batch
    };
    assert!(attend(&short_table).is_err());
    assert!(kernels.new_kv_cache(1, [2, 8, 1, 4], DType::F32).is_err());
}
