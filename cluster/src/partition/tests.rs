use proptest::prelude::*;

use super::*;
use crate::model_config::{RopeConfig, RopeScaling};

fn config(heads: (usize, usize, usize), hidden: usize, ffn: usize, vocab: usize, n_layers: usize) -> ModelConfig {
    let (n_heads, n_kv_heads, head_dim) = heads;
    ModelConfig {
        architecture: "llama".to_owned(),
        name: "test".to_owned(),
        n_layers,
        hidden,
        ffn,
        n_heads,
        n_kv_heads,
        head_dim,
        vocab,
        context_length: 2048,
        norm_eps: 1e-5,
        rope: RopeConfig { theta: 1e4, dims: head_dim, interleaved: true, scaling: RopeScaling::None },
        tied_embeddings: true,
    }
}

fn smollm2() -> ModelConfig {
    config((9, 3, 64), 576, 1536, 49152, 30)
}

/// How much longer a row takes than if all that is dealt could be cut anywhere.
fn excess(config: &ModelConfig, plan: &PartitionPlan, weights: &[f64]) -> f64 {
    let hidden = config.hidden as f64;
    let attention = |r: &RankSlice| attention_cost(config, &Heads { query: r.q_heads.clone(), kv: r.kv_heads.clone() });
    let ffn = |r: &RankSlice| 3.0 * hidden * r.ffn.len() as f64;
    let vocab = |r: &RankSlice| hidden * r.vocab.len() as f64 / config.n_layers as f64;
    let slowest =
        |cost: &dyn Fn(&RankSlice) -> f64| plan.ranks.iter().zip(weights).map(|(r, w)| cost(r) / w).fold(0.0, f64::max);
    let whole = PartitionPlan::new(config, &[1.0]).expect("one rank").ranks[0].clone();
    let ideal = (attention(&whole) + ffn(&whole) + vocab(&whole)) / weights.iter().sum::<f64>();
    (slowest(&attention) + slowest(&ffn) + slowest(&vocab)) / ideal
}

fn plan(config: &ModelConfig, world_size: usize) -> PartitionPlan {
    PartitionPlan::new(config, &vec![1.0; world_size]).expect("not too many ranks")
}

#[test]
fn smollm2_at_1_to_4_ranks() {
    let config = smollm2();
    let expected: [&[[Range<usize>; 4]]; 4] = [
        &[[0..9, 0..3, 0..1536, 0..49152]],
        // The KV head in the middle is held twice: 5 query heads and 4 are quicker than 6 and 3.
        &[[0..5, 0..2, 0..768, 0..24_576], [5..9, 1..3, 768..1536, 24_576..49152]],
        &[
            [0..3, 0..1, 0..512, 0..16_384],
            [3..6, 1..2, 512..1024, 16_384..32_768],
            [6..9, 2..3, 1024..1536, 32_768..49152],
        ],
        &[],
    ];
    for (world_size, expected) in (1..=4).zip(expected) {
        let plan = plan(&config, world_size);
        assert_eq!(plan.ffn_slice_width, 128);
        let ratio = excess(&config, &plan, &vec![1.0; world_size]);
        println!("{world_size} ranks: {ratio:.4} of the ideal time: {:?}", plan.ranks);
        // 9 query heads can't be cut in two or four.
        let most = [1.0, 1.04, 1.0, 1.09][world_size - 1];
        assert!(ratio < most + 1e-9, "{world_size} ranks: {ratio}");
        for (rank, [q_heads, kv_heads, ffn, vocab]) in plan.ranks.iter().zip(expected) {
            let want = RankSlice {
                q_heads: q_heads.clone(),
                kv_heads: kv_heads.clone(),
                ffn: ffn.clone(),
                vocab: vocab.clone(),
            };
            assert_eq!(rank, &want, "{world_size} ranks");
        }
    }
    // More ranks than KV heads: the middle one of the three is read by three ranks, the last by two.
    let four = plan(&config, 4);
    let heads: Vec<_> = four.ranks.iter().map(|r| (r.q_heads.clone(), r.kv_heads.clone())).collect();
    assert_eq!(heads, [(0..3, 0..1), (3..5, 1..2), (5..7, 1..3), (7..9, 2..3)]);
}

#[test]
fn kv_heads_are_held_twice_where_it_pays() {
    let heads = |n_heads, n_kv_heads, world_size| {
        let plan = plan(&config((n_heads, n_kv_heads, 128), 4096, 14_336, 128_256, 32), world_size);
        plan.ranks.into_iter().map(|r| (r.q_heads.len(), r.kv_heads)).collect::<Vec<_>>()
    };
    // Even groups,
    assert_eq!(heads(32, 8, 2), [(16, 0..4), (16, 4..8)]);
    // and uneven ones: of 11, 11 and 10 query heads the middle rank would read four KV heads.
    assert_eq!(heads(32, 8, 3), [(12, 0..3), (12, 3..6), (8, 6..8)]);
    // Five groups at two ranks.
    assert_eq!(heads(40, 5, 2), [(20, 0..3), (20, 2..5)]);
}

#[test]
fn whoever_has_more_heads_has_no_fewer_columns() {
    for (config, world_size) in
        [(config((10, 5, 64), 640, 2048, 32_000, 12), 4), (config((32, 8, 128), 4096, 14_336, 128_256, 32), 3)]
    {
        let plan = plan(&config, world_size);
        let spread = |len: fn(&RankSlice) -> usize| {
            let lens = plan.ranks.iter().map(len);
            lens.clone().max().unwrap_or_default() - lens.min().unwrap_or_default()
        };
        assert!(spread(|r| r.q_heads.len()) > 0, "{plan:?}");
        assert!(spread(|r| r.ffn.len()) <= plan.ffn_slice_width, "{plan:?}");
        assert!(spread(|r| r.vocab.len()) <= VOCAB_UNIT, "{plan:?}");
    }
}

#[test]
fn slices_are_wide_but_many_and_whole_groups() {
    for (ffn, width) in [
        (1536, 128),
        (4864, 128),
        (8960, 256),
        (14_336, 256),
        (2048, 128),
        (768, 64),
        (512, 64),
        (256, 32),
        // Fewer than 8 slices, rather than a cut group.
        (128, 32),
        (32, 32),
        (208, 16),
        (100, 4),
        (7, 1),
        (1, 1),
    ] {
        assert_eq!(ffn_slice_width(ffn), width, "{ffn}");
    }
}

#[test]
fn faster_ranks_get_more() {
    let config = config((32, 8, 128), 4096, 14_336, 128_256, 32);
    let plan = PartitionPlan::new(&config, &[3.0, 1.0]).expect("two ranks");
    assert_eq!(plan.ranks[0].kv_heads, 0..6);
    assert!(excess(&config, &plan, &[3.0, 1.0]) < 1.01, "{plan:?}");
    // So slow that it gets no head.
    let plan = PartitionPlan::new(&config, &[100.0, 1.0]).expect("two ranks");
    assert_eq!((plan.ranks[1].q_heads.clone(), plan.ranks[1].kv_heads.clone()), (32..32, 8..8));
    assert!(!plan.ranks[1].vocab.is_empty(), "{plan:?}");
}

#[test]
fn impossible_worlds_are_refused() {
    let config = smollm2();
    assert_eq!(
        PartitionPlan::new(&config, &[1.0; 10]),
        Err(PartitionError::TooManyRanks { world_size: 10, n_heads: 9 })
    );
    for bad in [&[][..], &[1.0, 0.0], &[-1.0], &[f64::INFINITY]] {
        assert_eq!(PartitionPlan::new(&config, bad), Err(PartitionError::BadWeights(bad.to_vec())));
    }
    assert!(PartitionPlan::new(&config, &[f64::NAN]).is_err());
}

/// Ranges of all ranks follow each other from 0 to `end`.
fn assert_covers<'a>(ranges: impl Iterator<Item = &'a Range<usize>>, end: usize) {
    let last = ranges.fold(0, |start, range| {
        assert_eq!(range.start, start);
        assert!(range.end >= range.start);
        range.end
    });
    assert_eq!(last, end);
}

proptest! {
    #[test]
    fn plans_cover_the_model(
        n_kv_heads in 1usize..12,
        group in 1usize..9,
        head_dim in prop::sample::select(vec![16usize, 24, 64, 128]),
        hidden in 1usize..4096,
        ffn in 1usize..20_000,
        vocab in 1usize..70_000,
        n_layers in 1usize..80,
        weights in prop::collection::vec(1e-3f64..1e3, 1..20),
        equal in any::<bool>(),
    ) {
        let n_heads = n_kv_heads * group;
        let config = config((n_heads, n_kv_heads, head_dim), hidden, ffn, vocab, n_layers);
        let world_size = weights.len().min(n_heads);
        let weights = if equal { vec![0.7; world_size] } else { weights[..world_size].to_vec() };
        let plan = PartitionPlan::new(&config, &weights).expect("possible");
        prop_assert_eq!(&plan, &PartitionPlan::new(&config, &weights).expect("possible"));
        prop_assert_eq!(plan.ranks.len(), world_size);
        prop_assert_eq!(plan.ffn_slice_width, PartitionPlan::new(&config, &[1.0]).expect("possible").ffn_slice_width);
        assert_covers(plan.ranks.iter().map(|r| &r.q_heads), n_heads);
        assert_covers(plan.ranks.iter().map(|r| &r.ffn), ffn);
        assert_covers(plan.ranks.iter().map(|r| &r.vocab), vocab);
        for rank in &plan.ranks {
            prop_assert!(rank.ffn.start.is_multiple_of(plan.ffn_slice_width));
            prop_assert!(rank.vocab.start.is_multiple_of(VOCAB_UNIT));
            prop_assert_eq!(rank.q_heads.is_empty(), rank.kv_heads.is_empty());
            for head in rank.q_heads.clone() {
                prop_assert!(rank.kv_heads.contains(&(head / group)));
            }
            if !rank.q_heads.is_empty() {
                prop_assert_eq!(rank.kv_heads.start, rank.q_heads.start / group);
                prop_assert_eq!(rank.kv_heads.end, (rank.q_heads.end - 1) / group + 1);
            }
        }
        if world_size <= n_kv_heads {
            let most = plan.ranks.iter().map(|r| r.kv_heads.len()).max();
            let fastest = weights.iter().copied().fold(0.0, f64::max);
            let speeds: Vec<f64> = weights.iter().map(|w| w / fastest).collect();
            let fair = apportion(n_kv_heads, &speeds).into_iter().max();
            prop_assert!(most <= fair, "{most:?} KV heads, {fair:?} without holding any twice");
        }
        if equal {
            prop_assert!(plan.ranks.iter().all(|r| !r.q_heads.is_empty()));
        }
    }
}
