//! A request that kills whoever computes it.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Epochs, PLAIN, Row};
use crate::{
    client,
    faults::{
        load::Sizes,
        round::Round,
        setup::{Model, OwnShard, Setup},
    },
};

/// Positions that only a poisonous request reaches: the load's requests end before.
const DEADLY_POSITION: usize = 480;
const PROMPT: usize = 500;
/// The coordinator's default of `--max-replays`.
const MAX_REPLAYS: f64 = 3.0;

pub(super) static ROWS: &[Row] = &[Row {
    name: "request-poison",
    fault: "a request that kills all shards that compute it, over HTTP, then one over gRPC; both fail, nobody else",
    failpoints: true,
    setup: || {
        let deadly = ["--failpoint".to_owned(), format!("position:{DEADLY_POSITION}:abort")];
        let shard = OwnShard { always: deadly.to_vec(), ..OwnShard::default() };
        let setup = Setup::own(Model::Tiny, 1);
        Setup { own_shards: setup.own_shards.iter().map(|_| shard.clone()).collect(), ..setup }
    },
    sizes: Some(|model| Sizes { tokens: 240, ..Sizes::of(model) }),
    epochs: Epochs::Grow,
    inject: poison,
    ..PLAIN
}];

fn poison(round: &mut Round<'_>) -> Result<()> {
    round.wait_decode(5, 30)?;
    round.inject();
    let (http, grpc) = round.deployment.addresses()?;
    let prompt = round.numbers.tokens(PROMPT, 384);
    let completions = format!("{}/v1/completions", http[0]);

    let failovers = round.deployment.failovers();
    let answer = client::post(&completions, &json!({"prompt": prompt, "max_tokens": 4}))?;
    let code = answer.json()?["error"]["code"].clone();
    ensure!(answer.status == 500 && code == "request_poison", "over HTTP: {} {}", answer.status, answer.body);
    tried(round, failovers)?;

    let failovers = round.deployment.failovers();
    let answer = round.runtime.block_on(client::generate(&grpc[0], client::greedy(&prompt, 4)));
    let error = answer.err().context("the poisonous request was answered over gRPC")?;
    let status = error.downcast_ref::<tonic::Status>().context("no status over gRPC")?;
    let is_poison = status.code() == tonic::Code::Internal && status.message().contains("shards were lost");
    ensure!(is_poison, "over gRPC: {status:?}");
    tried(round, failovers)?;

    // The same without what kills.
    let harmless = &prompt[..DEADLY_POSITION - 100];
    let answer = client::post(&completions, &json!({"prompt": harmless, "max_tokens": 4, "ignore_eos": true}))?;
    ensure!(answer.status == 200, "a harmless request after the poison: {} {}", answer.status, answer.body);
    Ok(())
}

/// It was computed once, and again as often as it may be.
fn tried(round: &Round<'_>, before: f64) -> Result<()> {
    let losses = round.deployment.failovers() - before;
    ensure!(losses > MAX_REPLAYS, "it failed after {losses} losses of the group");
    Ok(())
}
