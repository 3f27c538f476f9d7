//! Thousands of seeded lives of a whole cluster: the real scheduler and the real group machine, shards that remember what
//! their pages hold, a store that fails, coordinators that die, and messages that take their time. See `failover/world.rs`
//! and `failover/faults.rs` for what happens, and `failover/clients.rs` for what must hold.
//!
//! A seed that fails is printed. `PHALANX_SIM_SEED=SEED cargo test --workspace --test failover_simulation` replays it alone,
//! with all its events.

mod failover;
mod fake;

use failover::{faults::Trouble, totals::Totals, world::World};

/// Runs the seeds, or the one that is asked for.
fn simulate(trouble: Trouble, seeds: std::ops::Range<u64>) -> Option<Totals> {
    let only = std::env::var("PHALANX_SIM_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let seeds = match only {
        Some(seed) if seeds.contains(&seed) => seed..seed + 1,
        Some(_) => return None,
        None => seeds,
    };
    let mut totals = Totals::default();
    for seed in seeds {
        let outcome = std::panic::catch_unwind(|| World::new(seed, trouble, only.is_some()).run());
        let Ok(one) = outcome else { panic!("PHALANX_SIM_SEED={seed} fails with {trouble:?}, see above") };
        totals.add(&one);
    }
    only.is_none().then_some(totals)
}

#[test]
fn clusters_without_trouble_answer() {
    let Some(totals) = simulate(Trouble::None, 0..500) else { return };
    assert!(totals.n_answered > 1_000 && totals.n_lost_groups == 0, "{totals:?}");
}

#[test]
fn no_stream_notices_what_happens_to_shards() {
    let Some(totals) = simulate(Trouble::Shards, 100_000..114_000) else { return };
    // The schedules would prove little if nothing of this happened.
    assert!(totals.n_lost_groups > 6_000 && totals.n_kept > 2_800 && totals.n_mirrored > 250, "{totals:?}");
    assert!(totals.n_fetched > 20, "{totals:?}");
    assert!(totals.n_answered > 28_000 && totals.n_cancelled > 3_500 && totals.n_switched > 3_500, "{totals:?}");
    assert!(totals.n_refused_epochs > 5_000 && totals.n_cut > 5_000 && totals.n_paused > 5_000, "{totals:?}");
    assert!(totals.n_smaller > 200 && totals.n_evicted > 55, "{totals:?}");
}

#[test]
fn no_stream_ends_with_its_coordinator() {
    let Some(totals) = simulate(Trouble::Coordinators, 200_000..206_000) else { return };
    assert!(totals.n_leaders > 7_000 && totals.n_resumed > 1_800 && totals.n_answered > 11_000, "{totals:?}");
    assert!(totals.n_inherited > 1_500 && totals.n_sealed_copies > 60, "{totals:?}");
}

#[test]
fn poison_fails_alone() {
    let Some(totals) = simulate(Trouble::Poison, 300_000..301_000) else { return };
    assert!(totals.n_poisoned == 1_000 && totals.n_answered > 1_700, "{totals:?}");
}
