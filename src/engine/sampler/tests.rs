//! The sampler against definitions that sort the whole vocabulary in double precision.

use super::super::request::SamplingParams;
use super::*;

const VOCAB_SIZE: usize = 500;

/// A row of logits between -12 and 12, some of them equal.
fn random_row(seed: u64, len: usize) -> Vec<f32> {
    (0..len as u64)
        .map(|index| {
            let coarse = philox::uniform(seed, 2 * index) < 0.1;
            let logit = (philox::uniform(seed, 2 * index + 1) * 24.0 - 12.0) as f32;
            if coarse { logit.round() } else { logit }
        })
        .collect()
}

fn sampler(params: &SamplingParams) -> SequenceSampler {
    SequenceSampler::new(params, params.seed.unwrap_or(0), &[], VOCAB_SIZE)
}

fn sample_once(params: &SamplingParams, logits: &[f32]) -> Result<Sampled, SampleError> {
    SequenceSampler::new(params, 0, &[], logits.len()).sample(&mut logits.to_vec(), 0)
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

/// Softmax of the tokens that are kept; the others have probability 0.
fn probabilities(logits: &[f64], kept: &[bool]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = logits.iter().zip(kept);
    let weights: Vec<f64> = weights
        .map(|(logit, &kept)| if kept { (logit - max).exp() } else { 0.0 })
        .collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// Drops all but the tokens of smallest key that reach `mass`, and those equal to the last.
fn keep_mass(keys: &[f64], probabilities: &[f64], mass: f64, kept: &mut [bool]) {
    let mut order: Vec<usize> = (0..keys.len()).filter(|&id| kept[id]).collect();
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
    let mut sum = 0.0;
    let last = order.iter().find(|&&id| {
        sum += probabilities[id];
        sum >= mass
    });
    if let Some(&last) = last {
        for id in 0..keys.len() {
            kept[id] &= keys[id] <= keys[last];
        }
    }
}

/// The filters by their definitions.
fn naive_kept(params: &SamplingParams, row: &[f32]) -> Vec<u32> {
    let temperature = params.temperature.max(0.01);
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // The quotient is rounded as in the sampler, so that equal logits stay equal.
    let logits: Vec<f64> = row
        .iter()
        .map(|logit| f64::from((logit - max) / temperature))
        .collect();
    let mut kept = vec![true; logits.len()];
    let all = probabilities(&logits, &kept);
    let best = all.iter().copied().fold(0.0, f64::max);
    for id in 0..kept.len() {
        kept[id] = all[id] >= f64::from(params.min_p) * best && logits[id] > -87.0;
    }
    if params.top_k > 0 && (params.top_k as usize) < logits.len() {
        let mut sorted = logits.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for id in 0..kept.len() {
            kept[id] &= logits[id] >= sorted[params.top_k as usize - 1];
        }
    }
    if params.top_p < 1.0 {
        let keys: Vec<f64> = logits.iter().map(|logit| -logit).collect();
        let mass = f64::from(params.top_p);
        keep_mass(&keys, &probabilities(&logits, &kept), mass, &mut kept);
    }
    if params.typical_p < 1.0 {
        let p = probabilities(&logits, &kept);
        let surprise = p.iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln());
        let entropy: f64 = surprise.sum();
        let keys: Vec<f64> = p.iter().map(|p| (-p.ln() - entropy).abs()).collect();
        keep_mass(&keys, &p, f64::from(params.typical_p), &mut kept);
    }
    (0u32..)
        .zip(kept)
        .filter(|&(_, k)| k)
        .map(|(id, _)| id)
        .collect()
}

#[test]
fn filters_keep_what_their_definitions_keep() {
    let temperatures = [1.0, 0.7, 1.8, 0.005, 0.2];
    let top_ks = [0, 1, 3, 40, 499, 500, 1000];
    let top_ps = [1.0, 0.95, 0.5, 0.05, 1e-6, 0.999];
    let min_ps = [0.0, 0.0, 0.05, 0.5, 1.0];
    let typical_ps = [1.0, 1.0, 0.9, 0.3];
    for case in 0..3_000 {
        let choice =
            |salt: u64, len: usize| (philox::uniform(u64::MAX - salt, case) * len as f64) as usize;
        let params = SamplingParams {
            temperature: temperatures[choice(0, temperatures.len())],
            top_k: top_ks[choice(1, top_ks.len())],
            top_p: top_ps[choice(2, top_ps.len())],
            min_p: min_ps[choice(3, min_ps.len())],
            typical_p: typical_ps[choice(4, typical_ps.len())],
            ..SamplingParams::default()
        };
        let row = random_row(case, VOCAB_SIZE);
        let max = select::max(&row);
        let temperature = params.temperature.max(MIN_TEMPERATURE);
        let relative = row.iter().map(|logit| (logit - max) / temperature);
        let mut filtered: Vec<f32> = relative.collect();
        sampler(&params).filter(&mut filtered);
        let has_weight = |(_, logit): &(u32, f32)| *logit > -87.0;
        let kept = (0u32..).zip(filtered).filter(has_weight);
        let kept: Vec<u32> = kept.map(|(id, _)| id).collect();
        assert_eq!(kept, naive_kept(&params, &row), "{case}: {params:?}");
    }
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = [0.0f32, 1.0, 2.0, 3.0, -1.0, 2.5, f32::NEG_INFINITY, 0.5];
    let params = SamplingParams {
        temperature: 1.3,
        top_k: 6,
        ..SamplingParams::default()
    };
    let wide: Vec<f64> = logits.iter().map(|&l| f64::from(l) / 1.3).collect();
    let kept: Vec<bool> = logits.iter().map(|&l| l >= 0.0).collect();
    let want = probabilities(&wide, &kept);
    let num_draws = 50_000;
    let mut counts = [0u32; 8];
    let mut sampler = SequenceSampler::new(&params, 2026, &[], 8);
    for index in 0..num_draws {
        let sampled = sampler.sample(&mut logits.clone(), index).unwrap();
        counts[sampled.token_id as usize] += 1;
    }
    let mut chi_square = 0.0;
    for (id, &count) in counts.iter().enumerate() {
        if !kept[id] {
            assert_eq!(count, 0, "token {id} was filtered out");
            continue;
        }
        let expected = want[id] * num_draws as f64;
        chi_square += (f64::from(count) - expected).powi(2) / expected;
    }
    // Five degrees of freedom; 20.5 is exceeded by chance once in a thousand seeds.
    assert!(chi_square < 20.5, "{chi_square}, counts {counts:?}");
}

#[test]
fn draw_depends_on_seed_and_index_alone() {
    let params = SamplingParams::default();
    let row = random_row(3, VOCAB_SIZE);
    let draw = |sampler: &mut SequenceSampler, index| {
        sampler.sample(&mut row.clone(), index).unwrap().token_id
    };
    let mut first = SequenceSampler::new(&params, 7, &[], VOCAB_SIZE);
    let tokens: Vec<u32> = (0..50).map(|index| draw(&mut first, index)).collect();
    let mut backwards = SequenceSampler::new(&params, 7, &[1, 2], VOCAB_SIZE);
    for index in (0..50).rev() {
        assert_eq!(draw(&mut backwards, index), tokens[index]);
    }
    let mut other = SequenceSampler::new(&params, 8, &[], VOCAB_SIZE);
    let others: Vec<u32> = (0..50).map(|index| draw(&mut other, index)).collect();
    assert_ne!(others, tokens);
}

#[test]
fn picks_are_those_of_the_documented_rule() {
    let row = random_row(11, VOCAB_SIZE);
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = row.iter().map(|l| f64::from(l - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    for index in 0..200 {
        let target = philox::uniform(5, index) * total;
        let mut sum = 0.0;
        let want = weights.iter().position(|weight| {
            sum += weight;
            sum > target
        });
        let params = SamplingParams::default();
        let mut sampler = SequenceSampler::new(&params, 5, &[], VOCAB_SIZE);
        let got = sampler.sample(&mut row.clone(), index as usize).unwrap();
        assert_eq!(Some(got.token_id as usize), want);
    }
}

#[test]
fn greedy_takes_the_lowest_of_equal_tokens() {
    let mut row = random_row(1, 100);
    row[40] = 20.0;
    row[77] = 20.0;
    for temperature in [0.0, 9e-6] {
        let params = SamplingParams {
            temperature,
            ..SamplingParams::default()
        };
        assert_eq!(sample_once(&params, &row).unwrap().token_id, 40);
    }
}

#[test]
fn small_temperature_is_raised_and_does_not_overflow() {
    let params = SamplingParams {
        temperature: 1e-4,
        ..SamplingParams::default()
    };
    let mut row = vec![0.0f32; 100];
    row[7] = 3e38;
    assert_eq!(sample_once(&params, &row).unwrap().token_id, 7);
}

#[test]
fn logit_bias_and_padding_are_respected() {
    let mut params = greedy();
    params.logit_bias = vec![(3, 50.0), (900, 100.0)];
    let mut row = random_row(2, VOCAB_SIZE + 12);
    row[VOCAB_SIZE + 4] = 99.0;
    let mut sampler = sampler(&params);
    assert_eq!(sampler.sample(&mut row, 0).unwrap().token_id, 3);
}

#[test]
fn ending_tokens_wait_for_min_tokens() {
    let mut row = vec![0.0f32; 8];
    (row[1], row[2], row[3]) = (5.0, 4.0, 3.0);
    let mut params = SamplingParams {
        min_tokens: 2,
        eos_token_ids: vec![1, 1000],
        stop_token_ids: vec![2],
        ..greedy()
    };
    let tokens = |params: &SamplingParams| {
        let mut sampler = SequenceSampler::new(params, 0, &[], 8);
        [0, 1, 2].map(|index| sampler.sample(&mut row.clone(), index).unwrap().token_id)
    };
    assert_eq!(tokens(&params), [3, 3, 1]);
    params.ignore_eos = true;
    assert_eq!(tokens(&params), [1, 1, 1], "an ignored end does not end");
    params.stop_token_ids = (0..8).collect();
    assert_eq!(sample_once(&params, &row), Err(SampleError::NothingLeft));
}

#[test]
fn penalties_follow_their_formulas() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        ..greedy()
    };
    let mut sampler = SequenceSampler::new(&params, 0, &[0, 1, 999], 6);
    let row = [3.0f32, -1.0, 2.0, -2.0, 1.0, 0.0];
    let mut processed = row;
    sampler.process(&mut processed, 0);
    assert_eq!(processed, [1.5, -2.0, 2.0, -2.0, 1.0, 0.0]);
    for (index, want) in [(0, 2), (1, 0), (2, 4), (3, 0)] {
        let sampled = sampler.sample(&mut row.clone(), index).unwrap();
        assert_eq!(sampled.token_id, want, "draw {index}");
    }
    let mut processed = row;
    sampler.process(&mut processed, 0);
    // 0 twice, 2 and 4 once, 1 in the prompt only.
    assert_eq!(processed, [0.25, -2.0, 0.25, -2.0, -0.25, 0.0]);
}

#[test]
fn output_alone_counts_for_presence_and_frequency() {
    let params = SamplingParams {
        presence_penalty: 2.0,
        ..greedy()
    };
    let mut sampler = SequenceSampler::new(&params, 0, &[0, 0], 3);
    let row = [3.0f32, 2.0, 0.0];
    let tokens = [0, 1, 2].map(|i| sampler.sample(&mut row.clone(), i).unwrap().token_id);
    assert_eq!(tokens, [0, 1, 0]);
}

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let mut params = greedy();
    params.logprobs = Some(3);
    params.logit_bias = vec![(5, 100.0)];
    let row = random_row(4, VOCAB_SIZE);
    let logprobs = sample_once(&params, &row).unwrap().logprobs.unwrap();
    let wide: Vec<f64> = row.iter().map(|&logit| f64::from(logit)).collect();
    let want = probabilities(&wide, &[true; VOCAB_SIZE]);
    let mut order: Vec<usize> = (0..VOCAB_SIZE).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    assert_eq!(logprobs.token_id, 5);
    assert!((f64::from(logprobs.logprob) - want[5].ln()).abs() < 2e-6);
    let rank = row.iter().filter(|&&logit| logit >= row[5]).count();
    assert_eq!(logprobs.rank, rank);
    for (&(id, logprob), &want_id) in logprobs.top.iter().zip(&order) {
        assert_eq!(id as usize, want_id);
        assert!((f64::from(logprob) - want[want_id].ln()).abs() < 2e-6);
    }
    assert_eq!(logprobs.top.len(), 3);
}

#[test]
fn equal_logprobs_are_ordered_by_id_and_share_the_last_rank() {
    let logprobs = token_logprobs(&[1.0, 2.0, 1.0, 2.0, 0.0], 0, 3).unwrap();
    let ids: Vec<u32> = logprobs.top.iter().map(|&(id, _)| id).collect();
    assert_eq!(ids, [1, 3, 0]);
    assert_eq!(logprobs.rank, 4);
    let all = token_logprobs(&[1.0, 2.0], 0, 99).unwrap();
    assert_eq!(all.top.len(), 2);
    assert!(token_logprobs(&[1.0], 0, 0).unwrap().top.is_empty());
    let unknown = SampleError::UnknownToken {
        token_id: 2,
        vocab_size: 2,
    };
    assert_eq!(token_logprobs(&[1.0, 2.0], 2, 1), Err(unknown));
}

#[test]
fn overflow_is_an_error_that_names_a_remedy() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut row = random_row(5, VOCAB_SIZE);
        row[123] = bad;
        for params in [greedy(), SamplingParams::default()] {
            let error = sample_once(&params, &row).unwrap_err();
            assert!(matches!(
                error,
                SampleError::NotFinite { token_id: 123, .. }
            ));
            assert!(error.to_string().contains("--dtype bfloat16"));
        }
        assert!(token_logprobs(&row, 0, 5).is_err());
    }
    let nothing = [f32::NEG_INFINITY; 40];
    assert_eq!(
        sample_once(&greedy(), &nothing),
        Err(SampleError::NothingLeft)
    );
    assert!(token_logprobs(&[f32::NAN; 200], 0, 2).is_err());
}

#[test]
fn extreme_parameters_still_draw() {
    let row = random_row(6, VOCAB_SIZE);
    let params = SamplingParams {
        temperature: 2.0,
        top_p: f32::MIN_POSITIVE,
        typical_p: f32::MIN_POSITIVE,
        min_p: 1.0,
        repetition_penalty: f32::MIN_POSITIVE,
        ..SamplingParams::default()
    };
    let prompt: Vec<u32> = (0..VOCAB_SIZE as u32).collect();
    let mut sampler = SequenceSampler::new(&params, 0, &prompt, VOCAB_SIZE);
    for index in 0..20 {
        assert!(sampler.sample(&mut row.clone(), index).is_ok());
    }
}
