use phalanx_proto::v1::LogitBias;
use proptest::prelude::*;

use super::*;

fn sampling(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> Sampling {
    let params = SamplingParams { temperature, top_k, top_p, min_p, seed: 7, ..SamplingParams::default() };
    Sampling::try_from(&params).expect("in range")
}

/// The definition: everything sorted, with the standard library's exponential.
fn reference(sampling: &Sampling, output_idx: u64, logits: &[f32]) -> u32 {
    let mut kept: Vec<_> = select::candidates(logits).collect();
    kept.sort_by(Candidate::order);
    if sampling.is_greedy() {
        return kept[0].token_id;
    }
    let max = f64::from(kept[0].logit);
    let mut kept: Vec<(u32, f64)> = kept
        .iter()
        .map(|token| (token.token_id, ((f64::from(token.logit) - max) / f64::from(sampling.temperature)).exp()))
        .filter(|(_, weight)| *weight >= f64::from(sampling.min_p))
        .collect();
    kept.truncate(sampling.top_k.unwrap_or(usize::MAX));
    let goal = f64::from(sampling.top_p) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let n_kept = 1 + kept
        .iter()
        .take_while(|(_, weight)| {
            sum += weight;
            sum < goal
        })
        .count();
    kept.truncate(n_kept);
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let goal = rng::uniform(sampling.seed, output_idx, 0) * total;
    let mut sum = 0.0;
    for (token_id, weight) in &kept {
        sum += weight;
        if goal < sum {
            return *token_id;
        }
    }
    kept[kept.len() - 1].0
}

/// A row like a model's: most logits in a heap, a few above it; quantized, so that there are ties.
fn row(vocab_size: usize, salt: u64) -> Vec<f32> {
    let draw = |idx: usize, which| rng::uniform(salt, idx as u64, which);
    (0..vocab_size)
        .map(|idx| {
            let heap = (0..6).map(|which| draw(idx, which)).sum::<f64>() * 4.0 - 12.0;
            let tail = if draw(idx, 6) < 0.002 { draw(idx, 7) * 14.0 } else { 0.0 };
            ((heap + tail) * 64.0).round() as f32 / 64.0
        })
        .collect()
}

#[test]
fn large_rows_give_what_sorting_them_gives() {
    let full = row(20_000, 1);
    // As a grammar leaves rows: one with few tokens, one with most.
    let without = |share: f64| -> Vec<f32> {
        let keeps = |idx: usize| rng::uniform(2, idx as u64, 0) >= share;
        full.iter().enumerate().map(|(idx, logit)| if keeps(idx) { *logit } else { f32::NEG_INFINITY }).collect()
    };
    for logits in [without(0.999), without(0.6), without(0.1), full.clone()] {
        large_row_gives_what_sorting_it_gives(&logits);
    }
}

fn large_row_gives_what_sorting_it_gives(logits: &[f32]) {
    let mut scratch = Scratch::default();
    for (temperature, top_k, top_p, min_p) in [
        (1.0, 0, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (0.7, 0, 0.5, 0.0),
        (100.0, 0, 0.95, 0.0),
        (0.01, 0, 0.95, 0.0),
        (1.0, 50, 1.0, 0.0),
        (1.5, 50, 0.9, 0.0),
        (1.0, 5000, 0.99, 0.0),
        (1.0, 5000, 1.0, 0.01),
        (1.0, 0, 0.8, 0.05),
        (1.0, 0, 1.0, 1.0),
        (2.0, 1_000_000, 1.0, 0.0),
    ] {
        let sampling = sampling(temperature, top_k, top_p, min_p);
        for output_idx in 0..60 {
            let got = choose(&sampling, output_idx, logits, &mut scratch).expect("there are candidates");
            assert_eq!(got, reference(&sampling, output_idx, logits), "{sampling:?} at {output_idx}");
        }
    }
}

#[test]
fn frequencies_are_the_probabilities() {
    // Odds 1 : 2 : 3 : 4, so the temperature of 1/2 squares them.
    let logits = [1.0_f32, 2.0, 3.0, 4.0].map(f32::ln);
    for (temperature, top_p, min_p, weights) in [
        (1.0, 1.0, 0.0, [1.0, 2.0, 3.0, 4.0]),
        (0.5, 1.0, 0.0, [1.0, 4.0, 9.0, 16.0]),
        (1.0, 0.65, 0.0, [0.0, 0.0, 3.0, 4.0]),
        (1.0, 0.75, 0.0, [0.0, 2.0, 3.0, 4.0]),
        (1.0, 1.0, 0.4, [0.0, 2.0, 3.0, 4.0]),
        // Top-p is of what min-p leaves: 7 of 9 is not enough.
        (1.0, 0.8, 0.4, [0.0, 2.0, 3.0, 4.0]),
    ] {
        let sampling = sampling(temperature, 0, top_p, min_p);
        let n = 20_000;
        let mut counts = [0_u32; 4];
        let mut scratch = Scratch::default();
        for output_idx in 0..n {
            counts[choose(&sampling, output_idx, &logits, &mut scratch).expect("there are candidates") as usize] += 1;
        }
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.into_iter().zip(weights) {
            let want = weight / total;
            // Five standard deviations; none where the probability is 0.
            let bound = 5.0 * (want * (1.0 - want) / n as f64).sqrt();
            assert!((f64::from(count) / n as f64 - want).abs() <= bound, "{sampling:?}: {counts:?}");
        }
    }
}

#[test]
fn draws_depend_on_seed_and_place_only() {
    let logits = row(1000, 3);
    let at = |seed, output_idx, scratch: &mut Scratch| {
        let sampling = Sampling { seed, ..sampling(1.0, 0, 0.95, 0.0) };
        choose(&sampling, output_idx, &logits, scratch).expect("there are candidates")
    };
    let mut reused = Scratch::default();
    let tokens = |seed, scratch: &mut Scratch| (0..50).map(|idx| at(seed, idx, scratch)).collect::<Vec<_>>();
    let first = tokens(1, &mut reused);
    assert_ne!(first, tokens(2, &mut reused));
    let backwards: Vec<_> = (0..50).rev().map(|idx| at(1, idx, &mut Scratch::default())).collect();
    assert!(first.iter().eq(backwards.iter().rev()));
}

#[test]
fn the_counter_is_the_length_of_the_output() {
    let logits = row(1000, 4);
    let sampling = sampling(1.0, 0, 1.0, 0.0);
    let mut scratch = Scratch::default();
    for n in 0..20 {
        let counts = TokenCounts::new(&[5; 9], &vec![6; n]);
        let got = sample(&sampling, &counts, &mut logits.clone(), &mut scratch).expect("there are candidates");
        assert_eq!(got, reference(&sampling, n as u64, &logits));
    }
}

#[test]
fn penalties_come_before_the_greedy_choice() {
    let params = SamplingParams {
        logit_bias: vec![LogitBias { token_id: 2, bias: 5.0 }],
        min_tokens: 1,
        suppressed_token_ids: vec![2],
        ..SamplingParams::default()
    };
    let sampling = Sampling::try_from(&params).expect("in range");
    assert!(sampling.is_greedy() && !sampling.keeps_logits() && Sampling::greedy().keeps_logits());
    let mut scratch = Scratch::default();
    let mut at =
        |output: &[u32]| sample(&sampling, &TokenCounts::new(&[], output), &mut [0.0, 1.0, 0.5, 1.0], &mut scratch);
    assert_eq!(at(&[]), Ok(1), "token 2 is held back, and 1 comes before 3");
    assert_eq!(at(&[1]), Ok(2));
}

#[test]
fn odd_logits_are_survived() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let mut scratch = Scratch::default();
    for sampling in [
        Sampling::greedy(),
        sampling(1.0, 0, 1.0, 0.0),
        sampling(1e-4, 0, 0.9, 0.0),
        sampling(100.0, 3, 1.0, 0.5),
        sampling(1.0, 1, 1.0, 0.0),
    ] {
        for output_idx in 0..50 {
            let mut at = |logits: &[f32]| choose(&sampling, output_idx, logits, &mut scratch);
            assert_eq!(at(&[]), Err(SamplingError::NoCandidate { vocab_size: 0 }));
            assert_eq!(at(&[nan, -inf]), Err(SamplingError::NoCandidate { vocab_size: 2 }));
            assert_eq!(at(&[nan, -inf, -3e38, nan]), Ok(2));
            assert_eq!(at(&[3e38, inf, nan, -3e38]), Ok(1));
            assert!(matches!(at(&[nan, inf, 0.0, inf]), Ok(1 | 3)));
            assert!(matches!(at(&[3e38, -3e38, nan, 3e38]), Ok(0..=3)));
        }
    }
}

#[test]
fn parameters_out_of_range_are_named() {
    type Change = fn(&mut SamplingParams);
    let changes: [(&str, Change); 9] = [
        ("temperature", |params| params.temperature = -0.1),
        ("temperature", |params| params.temperature = f32::NAN),
        ("top_p", |params| params.top_p = 1.5),
        ("top_p", |params| params.top_p = -0.5),
        ("min_p", |params| params.min_p = 1.1),
        ("repetition_penalty", |params| params.repetition_penalty = -1.0),
        ("presence_penalty", |params| params.presence_penalty = 2.5),
        ("frequency_penalty", |params| params.frequency_penalty = f32::INFINITY),
        ("logit_bias", |params| params.logit_bias = vec![LogitBias { token_id: 1, bias: f32::NAN }]),
    ];
    for (want, change) in changes {
        let mut params = SamplingParams::default();
        assert_eq!(Sampling::try_from(&params), Ok(Sampling::greedy()));
        change(&mut params);
        match Sampling::try_from(&params) {
            Err(SamplingError::Parameter { name, .. }) => assert_eq!(name, want),
            other => panic!("{want}: {other:?}"),
        }
    }
}

proptest! {
    #[test]
    fn any_row_gives_what_sorting_it_gives(
        mut logits in proptest::collection::vec((-80_i32..40).prop_map(|eighth| eighth as f32 / 8.0), 1..3000),
        n_left_of_ten in 1_usize..=10,
        temperature in 0.05_f32..5.0,
        top_k in 0_u32..2500,
        top_p in 0.01_f32..=1.0,
        min_p in prop_oneof![Just(0.0_f32), 0.0_f32..0.3],
        output_idx in any::<u64>(),
    ) {
        let sampling = sampling(temperature, top_k, top_p, min_p);
        let taken_away = logits.iter_mut().enumerate().filter(|(idx, _)| idx * 7 % 10 >= n_left_of_ten);
        taken_away.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
        let got = choose(&sampling, output_idx, &logits, &mut Scratch::default());
        prop_assert_eq!(got, Ok(reference(&sampling, output_idx, &logits)));
    }

    #[test]
    fn keeping_one_token_is_greedy(
        logits in proptest::collection::vec((-8_i32..8).prop_map(|half| half as f32 / 2.0), 1..200),
        temperature in 0.05_f32..5.0,
        output_idx in any::<u64>(),
    ) {
        let greedy = choose(&Sampling::greedy(), output_idx, &logits, &mut Scratch::default());
        for one in [sampling(temperature, 1, 1.0, 0.0), sampling(temperature, 0, 1e-6, 0.0)] {
            prop_assert_eq!(&choose(&one, output_idx, &logits, &mut Scratch::default()), &greedy);
        }
    }
}
