//! The gradients of a trained head, and sums over columns and rows, against f64.

use super::training_tests::{
    assert_close, assert_gradient, flat, matrix, on_each_level, random, tensor, values,
};
use super::{HeadGradient, Kernels, LinearPart, LowRank};

/// Logits h Wᵀ + x w and their losses, with the inputs side by side: h, W, x, w.
fn head_losses(values: &[f64], [rows, size, vocab, rank]: [usize; 4], targets: &[u32]) -> Vec<f64> {
    let (hidden, rest) = values.split_at(rows * size);
    let (weight, rest) = rest.split_at(vocab * size);
    let (x, w) = rest.split_at(rows * rank);
    let logit = |row: usize, id: usize| -> f64 {
        let main = (0..size).map(|i| hidden[row * size + i] * weight[id * size + i]);
        let term = (0..rank).map(|i| x[row * rank + i] * w[i * vocab + id]);
        main.chain(term).sum()
    };
    let loss = |(row, target): (usize, &u32)| {
        let sum: f64 = (0..vocab).map(|id| logit(row, id).exp()).sum();
        sum.ln() - logit(row, *target as usize)
    };
    targets.iter().enumerate().map(loss).collect()
}

#[test]
fn every_gradient_of_a_trained_head_agrees_with_f64() {
    let sizes = [5, 7, 33, 3];
    let [rows, size, vocab, rank] = sizes;
    let targets = [0u32, 32, 4, 4, 18];
    on_each_level(|kernels| {
        let (hidden, weight) = (values(rows * size, 60), values(vocab * size, 61));
        let (x, w) = (values(rows * rank, 62), values(rank * vocab, 63));
        let matrix = matrix(kernels, &weight, [vocab, size]);
        let (x_tensor, w_tensor) = (tensor(&x, &[rows, rank]), tensor(&w, &[rank, vocab]));
        let part = LinearPart {
            weight: &matrix,
            bias: None,
            low_rank: Some(LowRank {
                x: &x_tensor,
                w: &w_tensor,
            }),
        };
        let mut d_weight = vec![1f32; vocab * size];
        let wanted = HeadGradient {
            scale: 0.25,
            weight: Some(&mut d_weight),
        };
        let hidden_tensor = tensor(&hidden, &[rows, size]);
        let output = kernels
            .cross_entropy(&hidden_tensor, &part, &targets, Some(wanted))
            .unwrap();
        let (d_x, d_w) = output.d_low_rank.unwrap();
        // What was in the gradient's place stays in the sum.
        d_weight.iter_mut().for_each(|value| *value -= 1.0);
        let got = [
            output.d_hidden.unwrap(),
            tensor(&d_weight, &[vocab, size]),
            d_x,
            d_w.t().unwrap().contiguous().unwrap(),
        ];
        let got: Vec<f32> = (got.iter())
            .flat_map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .collect();
        let inputs = [hidden, weight, x, w].concat();
        let len = inputs.len();
        let losses = |values: &[f64]| head_losses(values, sizes, &targets);
        let want = losses(&inputs.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
        assert_close(&tensor(&output.losses, &[rows]), &want);
        let dy = tensor(&[0.25; 5], &[rows]);
        assert_gradient(&tensor(&got, &[len]), &tensor(&inputs, &[len]), &dy, losses);
    });
}

#[test]
fn factors_and_sums_of_columns_and_norms_of_rows_agree_with_f64() {
    on_each_level(|kernels| {
        let (x, sum) = (random(&[9, 83], 70), random(&[9, 83], 71));
        let (factors, bias) = (values(83, 72), values(83, 73));
        let got = kernels
            .scale_columns(&x, &factors, Some(&bias), Some(&sum))
            .unwrap();
        let want = flat(&x).into_iter().zip(flat(&sum)).enumerate();
        let want = want.map(|(i, (x, sum))| {
            let (factor, bias) = (f64::from(factors[i % 83]), f64::from(bias[i % 83]));
            x * factor + bias + sum
        });
        assert_close(&got, &want.collect::<Vec<_>>());

        let dots = kernels.column_dots(&x, Some(&sum)).unwrap();
        let sums = kernels.column_dots(&x, None).unwrap();
        let (x, y) = (flat(&x), flat(&sum));
        let column = |col: usize, f: &dyn Fn(usize) -> f64| -> f64 {
            (0..9).map(|row| f(row * 83 + col)).sum()
        };
        let want: Vec<f64> = (0..83).map(|col| column(col, &|i| x[i] * y[i])).collect();
        assert_close(&tensor(&dots, &[83]), &want);
        let want: Vec<f64> = (0..83).map(|col| column(col, &|i| x[i])).collect();
        assert_close(&tensor(&sums, &[83]), &want);

        let weight = values(33 * 20, 74);
        let (a, b) = (random(&[3, 20], 75), random(&[33, 3], 76));
        let matrix = matrix(kernels, &weight, [33, 20]);
        let norms = kernels.row_norms(&matrix, Some((&a, &b)), 0.5).unwrap();
        let delta = flat(&b.matmul(&a).unwrap());
        let norm = |row: usize| -> f64 {
            let sum =
                (0..20).map(|col| f64::from(weight[row * 20 + col]) + 0.5 * delta[row * 20 + col]);
            sum.map(|w| w * w).sum::<f64>().sqrt()
        };
        assert_close(
            &tensor(&norms, &[33]),
            &(0..33).map(norm).collect::<Vec<_>>(),
        );
        let plain = kernels.row_norms(&matrix, None, 0.0).unwrap();
        let norm = |row: usize| -> f64 {
            let row = weight[row * 20..][..20].iter();
            row.map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt()
        };
        assert_close(
            &tensor(&plain, &[33]),
            &(0..33).map(norm).collect::<Vec<_>>(),
        );
    });
}

#[test]
fn a_shared_matrix_reads_the_floats_where_they_lie() {
    let kernels = Kernels::cpu(1).unwrap();
    let floats = std::sync::Arc::new(values(100, 80));
    let matrix = kernels.share_matrix(&floats, 7, [8, 4]).unwrap();
    let got = kernels.embedding(&[7, 0], &matrix, 0).unwrap();
    let got: Vec<f32> = got.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(got, [&floats[35..39], &floats[7..11]].concat());
    assert!(kernels.share_matrix(&floats, 69, [8, 4]).is_err());
}
