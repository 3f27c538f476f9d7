//! Ranks that die while others have copies of their KV rows.

use anyhow::Result;

use super::{PLAIN, Row, shards::kill};
use crate::faults::{
    load::Sizes,
    round::Round,
    setup::{Model, Setup},
};

/// Memory for the KV pages of sixteen streams of 4,000 tokens, twice: those that run, and what the prefix cache keeps.
pub(super) const LARGE_KV: [&str; 2] = ["--kv-cache-memory", "2GiB"];
/// Steps that copies may be behind when the fault comes.
pub(super) const LAG: u64 = 16;
/// The same for a model whose steps take a millisecond or two: ranks gather the rows of 30 ms.
pub(super) const LAG_OF_SHORT_STEPS: u64 = 64;

/// SmolLM2 with a spare, prompts of so many tokens, SIGKILL of a rank in decode.
const SMOLLM2: Row = Row {
    short: false,
    setup: || Setup::local(Model::Smollm2, 1).with(&LARGE_KV),
    sizes: Some(|model| Sizes { tokens: 96, ..Sizes::of(model) }),
    mirrored: true,
    most_replayed: Some(0.2),
    inject: |round| kill_mirrored(round, LAG),
    ..PLAIN
};

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "shard-kill-mirrored",
        fault: "SIGKILL of a shard in decode, with a spare that has copies of its KV rows",
        // Far more context than a copy that lags could lack.
        long_prompts: Some(200),
        mirrored: true,
        most_replayed: Some(0.5),
        inject: |round| kill_mirrored(round, LAG_OF_SHORT_STEPS),
        ..PLAIN
    },
    Row {
        name: "shard-kill-buddy",
        fault: "SIGKILL of a shard in decode, without a spare: it is started again and fetches its KV rows from the next rank",
        setup: || Setup::local(Model::Tiny, 0).with(&["--kv-mirror", "buddy"]),
        long_prompts: Some(200),
        mirrored: true,
        most_replayed: Some(0.5),
        inject: |round| kill_mirrored(round, LAG_OF_SHORT_STEPS),
        ..PLAIN
    },
    Row {
        name: "shard-kill-mirrored-100",
        fault: "the same, 16 streams of about 100 tokens",
        long_prompts: Some(90),
        // A few steps are a larger part of so few tokens.
        most_replayed: Some(0.5),
        ..SMOLLM2
    },
    Row {
        name: "shard-kill-mirrored-1000",
        fault: "the same, 16 streams of about 1,000 tokens",
        long_prompts: Some(1000),
        ..SMOLLM2
    },
    Row {
        name: "shard-kill-mirrored-4000",
        fault: "the same, 16 streams of about 4,000 tokens",
        long_prompts: Some(4000),
        ..SMOLLM2
    },
    Row {
        name: "shard-kill-replay",
        fault: "SIGKILL of a shard in decode, the usual load of SmolLM2, without copies",
        setup: || Setup::local(Model::Smollm2, 1).with(&["--kv-mirror", "off"]),
        sizes: None,
        mirrored: false,
        most_replayed: None,
        inject: kill_begun,
        ..SMOLLM2
    },
    Row {
        name: "shard-kill-replay-1000",
        fault: "SIGKILL of a shard in decode, 16 streams of about 1,000 tokens, without copies",
        setup: || Setup::local(Model::Smollm2, 1).with(&LARGE_KV).with(&["--kv-mirror", "off"]),
        long_prompts: Some(1000),
        mirrored: false,
        most_replayed: None,
        inject: kill_begun,
        ..SMOLLM2
    },
];

fn kill_begun(round: &mut Round<'_>) -> Result<()> {
    round.wait_all_begun()?;
    round.wait_decode(10, 40)?;
    kill(round)
}

fn kill_mirrored(round: &mut Round<'_>, lag: u64) -> Result<()> {
    round.wait_all_begun()?;
    round.wait_decode(10, 40)?;
    round.wait_mirrored(lag)?;
    kill(round)
}
