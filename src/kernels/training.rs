//! The operations of training: products in every form, low-rank terms, and backward passes.
//!
//! Each is a pure function of tensors, so that the same calls can run on another device. A
//! backward pass takes what the forward pass took or returned, and the gradient of its output,
//! and returns the gradient of its input.

use super::check::{self, F32Matrix, F32View};
use super::cpu::{self, NormGradient, Rotation, Varlen, VarlenSaved};
use super::{Kernels, Matrix, MatrixData, norm_weight};
use candle_core::{Result, Tensor, bail};

/// One linear of several that read the same input, with a term of low rank.
#[derive(Clone, Copy)]
pub struct LinearPart<'a> {
    /// `[out, in]`, dense.
    pub weight: &'a Matrix,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
    /// Added to the output.
    pub low_rank: Option<LowRank<'a>>,
}

/// `x * w`: an intermediate of few columns times a factor of an adapter.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// `[m, rank]`.
    pub x: &'a Tensor,
    /// `[rank, n]`, a transpose of a contiguous tensor or contiguous.
    pub w: &'a Tensor,
}

/// How the heads of `qkv` are normed and rotated.
#[derive(Clone, Copy)]
pub struct RopeArgs<'a> {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Norm weights `[head_dim]` of queries and keys (Qwen3).
    pub qk_norm: Option<(&'a Tensor, &'a Tensor)>,
    /// Epsilon of both norms.
    pub eps: f32,
    /// Cosines `[max_positions, head_dim / 2]`.
    pub cos: &'a Tensor,
    /// Sines `[max_positions, head_dim / 2]`.
    pub sin: &'a Tensor,
    /// Position of each token.
    pub positions: &'a [u32],
}

/// Packed sequences and the shape of their attention.
#[derive(Clone, Copy)]
pub struct VarlenArgs<'a> {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Where each sequence begins, and the number of tokens.
    pub cu_seqlens: &'a [u32],
}

/// Which elements of a tensor are dropped: a function of the key and the element's index alone,
/// so that a recomputation drops the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of zero, in 0..1; what stays is divided by `1 - probability`.
    pub probability: f32,
    /// Names the mask.
    pub key: u64,
}

impl Kernels {
    /// Returns `scale * a * b` for `a: [m, k]` and `b: [k, n]`, each with rows or columns that
    /// are contiguous: transposes and ranges of columns need no copy.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn product(&self, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
        let (a, b) = (F32Matrix::new("a", a)?, F32Matrix::new("b", b)?);
        if a.dims()[1] != b.dims()[0] {
            bail!("a product of {:?} and {:?}", a.dims(), b.dims());
        }
        let dims = [a.dims()[0], b.dims()[1]];
        self.tensor(cpu::product_of(self.get(), &a, &b, scale), dims)
    }

    /// Returns dense weights as they are and block formats as `f32`, for the products below.
    #[must_use]
    pub fn widen(&self, matrix: Matrix) -> Matrix {
        Matrix(match matrix.0 {
            MatrixData::Cpu(matrix) => MatrixData::Cpu(matrix.widened()),
            gpu @ MatrixData::Gpu(_) => gpu,
        })
    }

    /// Returns `x Wᵀ + bias + low-rank term` of each part, side by side: `[m, Σ out]`.
    ///
    /// # Errors
    /// When shapes or dtypes disagree or a weight is in a block format.
    pub fn linear(&self, x: &Tensor, parts: &[LinearPart<'_>]) -> Result<Tensor> {
        let inputs = F32Matrix::new("x", x)?;
        let [num_rows, cols] = inputs.dims();
        let width = parts.iter().map(|part| part.weight.rows()).sum();
        let mut out = cpu::ProductSum::new([num_rows, width]);
        for part in parts {
            let rows = check_weight(part.weight, cols)?;
            let bias = part
                .bias
                .map(|bias| F32View::shaped("bias", bias, &[rows]))
                .transpose()?;
            let bias = bias.as_ref().map(F32View::get);
            let term = low_rank(part, [num_rows, rows])?;
            let term = term.as_ref().map(|(x, w)| (x, w));
            out.write_linear(self.get(), &inputs, part.weight.cpu()?, bias, term);
        }
        self.tensor(out.finish(), [num_rows, width])
    }

    /// Returns the gradient of [`Kernels::linear`]'s input, `[m, in]`: the sum over parts of
    /// `dy W` and the part's low-rank term, with `dy: [m, Σ out]`. Biases are not read.
    ///
    /// # Errors
    /// When shapes or dtypes disagree or a weight is in a block format.
    pub fn linear_backward(&self, dy: &Tensor, parts: &[LinearPart<'_>]) -> Result<Tensor> {
        let (num_rows, width) = dy.dims2()?;
        let cols = parts.first().map_or(0, |part| part.weight.cols());
        let total: usize = parts.iter().map(|part| part.weight.rows()).sum();
        if total != width {
            bail!("a gradient of {width} columns for {total} outputs");
        }
        let mut out = cpu::ProductSum::new([num_rows, cols]);
        let mut col = 0;
        for part in parts {
            let rows = check_weight(part.weight, cols)?;
            let part_dy = dy.narrow(1, col, rows)?;
            let part_dy = F32Matrix::new("dy", &part_dy)?;
            let term = low_rank(part, [num_rows, cols])?;
            let term = term.as_ref().map(|(x, w)| (x, w));
            out.add_weight(self.get(), &part_dy, part.weight.cpu()?, term);
            col += rows;
        }
        self.tensor(out.finish(), [num_rows, cols])
    }

    /// Returns the gradient of [`Kernels::rms_norm`]'s input `x` from that of its output, plus
    /// `residual`, the gradient that reaches `x` past the norm.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
        dy: &Tensor,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let width = weight.elem_count();
        let num_rows = check::rows_of("x", x, width)?;
        let residual = residual
            .map(|residual| F32View::shaped("residual", residual, x.dims()))
            .transpose()?;
        let dy = F32View::shaped("dy", dy, x.dims())?;
        let (x, weight) = (F32View::new("x", x)?, norm_weight(weight, width)?);
        let norm = NormGradient {
            x: x.get(),
            weight: weight.get(),
            eps,
            dy: dy.get(),
            residual: residual.as_ref().map(F32View::get),
        };
        self.tensor(cpu::rms_norm_backward(self.get(), &norm), [num_rows, width])
    }

    /// Returns the gradient of [`Kernels::silu_and_mul`]'s input, `[m, 2 i]`.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn silu_and_mul_backward(&self, gate_up: &Tensor, dh: &Tensor) -> Result<Tensor> {
        let (num_rows, width) = dh.dims2()?;
        let gate_up = F32View::shaped("gate_up", gate_up, &[num_rows, 2 * width])?;
        let dh = F32View::new("dh", dh)?;
        let out = cpu::silu_and_mul_backward(self.get(), gate_up.get(), dh.get(), width);
        self.tensor(out, [num_rows, 2 * width])
    }

    /// Returns `qkv: [m, (num_heads + 2 num_kv_heads) head_dim]` with queries and keys normed,
    /// where norms are given, and rotated (half-split form).
    ///
    /// # Errors
    /// When shapes or dtypes disagree or a position has no row in the tables.
    pub fn rope(&self, qkv: &Tensor, args: &RopeArgs<'_>) -> Result<Tensor> {
        self.with_rotation(qkv, args, |rotation| {
            Ok(cpu::rotate_heads(
                self.get(),
                F32View::new("qkv", qkv)?.get(),
                rotation,
            ))
        })
    }

    /// Returns the gradient of [`Kernels::rope`]'s input from that of its output. `qkv`, the
    /// input, is needed only where norms are given.
    ///
    /// # Errors
    /// As [`Kernels::rope`], and when a norm lacks `qkv`.
    pub fn rope_backward(
        &self,
        qkv: Option<&Tensor>,
        d_rotated: &Tensor,
        args: &RopeArgs<'_>,
    ) -> Result<Tensor> {
        if args.qk_norm.is_some() && qkv.is_none() {
            bail!("the backward pass of a norm needs its input");
        }
        let qkv = qkv
            .map(|qkv| F32View::shaped("qkv", qkv, d_rotated.dims()))
            .transpose()?;
        self.with_rotation(d_rotated, args, |rotation| {
            let d_rotated = F32View::new("d_rotated", d_rotated)?;
            let qkv = qkv.as_ref().map(F32View::get);
            Ok(cpu::rotate_heads_backward(
                self.get(),
                qkv,
                d_rotated.get(),
                rotation,
            ))
        })
    }

    fn with_rotation(
        &self,
        qkv: &Tensor,
        args: &RopeArgs<'_>,
        run: impl FnOnce(&Rotation<'_>) -> Result<Vec<f32>>,
    ) -> Result<Tensor> {
        let RopeArgs {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *args;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let num_rows = check::rows_of("qkv", qkv, width)?;
        let (max_positions, half) = args.cos.dims2()?;
        if 2 * half != head_dim {
            bail!("cos must have {} columns, got {half}", head_dim / 2);
        }
        check::has_len("positions", args.positions.len(), num_rows)?;
        check::all_below("position", args.positions, max_positions)?;
        let cos = F32View::new("cos", args.cos)?;
        let sin = F32View::shaped("sin", args.sin, args.cos.dims())?;
        let norms = match args.qk_norm {
            Some((q, k)) => Some((norm_weight(q, head_dim)?, norm_weight(k, head_dim)?)),
            None => None,
        };
        let out = run(&Rotation {
            num_heads,
            num_kv_heads,
            head_dim,
            qk_norm: norms.as_ref().map(|(q, k)| (q.get(), k.get())),
            eps: args.eps,
            cos: cos.get(),
            sin: sin.get(),
            positions: args.positions,
        })?;
        self.tensor(out, [num_rows, width])
    }

    /// Returns causal attention over packed sequences, `[m, num_heads * head_dim]`, and the
    /// log-sum-exp of each query's scores, `[m, num_heads]`, for
    /// `qkv: [m, (num_heads + 2 num_kv_heads) head_dim]`.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn varlen_attention(
        &self,
        qkv: &Tensor,
        args: &VarlenArgs<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let num_tokens = check_varlen(qkv, args)?;
        let qkv = F32View::new("qkv", qkv)?;
        let (out, lse) = cpu::varlen_attention(self.get(), &varlen(qkv.get(), args));
        Ok((
            self.tensor(out, [num_tokens, args.num_heads * args.head_dim])?,
            self.tensor(lse, [num_tokens, args.num_heads])?,
        ))
    }

    /// Returns the gradient of [`Kernels::varlen_attention`]'s `qkv` from what it took and
    /// returned and from the gradient of its output.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn varlen_attention_backward(
        &self,
        qkv: &Tensor,
        args: &VarlenArgs<'_>,
        (out, lse): (&Tensor, &Tensor),
        d_out: &Tensor,
    ) -> Result<Tensor> {
        let num_tokens = check_varlen(qkv, args)?;
        let out_dims = [num_tokens, args.num_heads * args.head_dim];
        let (out, lse) = (
            F32View::shaped("out", out, &out_dims)?,
            F32View::shaped("lse", lse, &[num_tokens, args.num_heads])?,
        );
        let d_out = F32View::shaped("d_out", d_out, &out_dims)?;
        let saved = VarlenSaved {
            out: out.get(),
            lse: lse.get(),
        };
        let dims = [num_tokens, qkv.dims()[1]];
        let qkv = F32View::new("qkv", qkv)?;
        let inputs = varlen(qkv.get(), args);
        let d_qkv = cpu::varlen_attention_backward(self.get(), &inputs, &saved, d_out.get());
        self.tensor(d_qkv, dims)
    }

    /// Returns `x` with elements dropped.
    ///
    /// # Errors
    /// When `x` is not `f32` and contiguous.
    pub fn dropout(&self, x: &Tensor, dropout: Dropout) -> Result<Tensor> {
        let out = cpu::dropout(self.get(), F32View::new("x", x)?.get(), None, dropout);
        Tensor::from_vec(out, x.dims(), &self.device)
    }

    /// Returns `sum + dropout(x)`, with the mask that [`Kernels::dropout`] uses.
    ///
    /// # Errors
    /// When shapes or dtypes disagree.
    pub fn add_dropout(&self, sum: &Tensor, x: &Tensor, dropout: Dropout) -> Result<Tensor> {
        let sum = F32View::shaped("sum", sum, x.dims())?;
        let sum = Some(sum.get());
        let out = cpu::dropout(self.get(), F32View::new("x", x)?.get(), sum, dropout);
        Tensor::from_vec(out, x.dims(), &self.device)
    }

    /// Returns `x: [rows, width]` with its rows put at `places` of `num_rows` rows of zeros.
    ///
    /// # Errors
    /// When a place does not exist or their number differs.
    pub fn scatter_rows(&self, x: &Tensor, places: &[u32], num_rows: usize) -> Result<Tensor> {
        let (num_places, width) = x.dims2()?;
        check::has_len("places", places.len(), num_places)?;
        check::all_below("place", places, num_rows)?;
        let mut out = vec![0f32; num_rows * width];
        let x = F32View::new("x", x)?;
        for (row, &place) in x.get().chunks_exact(width).zip(places) {
            let start = place as usize * width;
            out[start..start + width].copy_from_slice(row);
        }
        self.tensor(out, [num_rows, width])
    }
}

pub(super) fn check_weight(weight: &Matrix, cols: usize) -> Result<usize> {
    if weight.cols() != cols {
        bail!("a weight of {} columns for inputs of {cols}", weight.cols());
    }
    if !weight.cpu()?.is_dense() {
        bail!("training multiplies dense weights; widen block formats first");
    }
    Ok(weight.rows())
}

pub(super) fn low_rank<'a>(
    part: &LinearPart<'a>,
    [num_rows, num_cols]: [usize; 2],
) -> Result<Option<(F32Matrix<'a>, F32Matrix<'a>)>> {
    let Some(term) = &part.low_rank else {
        return Ok(None);
    };
    let (x, w) = (F32Matrix::new("x", term.x)?, F32Matrix::new("w", term.w)?);
    let rank = x.dims()[1];
    if x.dims() != [num_rows, rank] || w.dims() != [rank, num_cols] {
        let (x, w) = (x.dims(), w.dims());
        bail!("a low-rank term of {x:?} and {w:?} for [{num_rows}, {num_cols}]");
    }
    Ok(Some((x, w)))
}

fn check_varlen(qkv: &Tensor, args: &VarlenArgs<'_>) -> Result<usize> {
    let VarlenArgs {
        num_heads,
        num_kv_heads,
        head_dim,
        cu_seqlens,
        ..
    } = *args;
    if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        bail!("{num_heads} heads cannot share {num_kv_heads} kv heads");
    }
    let num_tokens = check::rows_of("qkv", qkv, (num_heads + 2 * num_kv_heads) * head_dim)?;
    if cu_seqlens.is_empty() {
        bail!("cu_seqlens must begin with 0");
    }
    check::is_offsets("cu_seqlens", cu_seqlens, cu_seqlens.len() - 1, num_tokens)?;
    Ok(num_tokens)
}

fn varlen<'a>(qkv: &'a [f32], args: &VarlenArgs<'a>) -> Varlen<'a> {
    Varlen {
        qkv,
        num_heads: args.num_heads,
        num_kv_heads: args.num_kv_heads,
        head_dim: args.head_dim,
        scale: args.scale,
        cu_seqlens: args.cu_seqlens,
    }
}
