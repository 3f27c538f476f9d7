//! Owns requests: frontends, scheduler, groups, journal, policy. No tensor math.

pub mod admin;
pub mod batch;
pub mod batches;
pub mod certs;
pub mod cluster_cli;
pub mod config;
pub mod coverage;
pub mod frontend;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod grammars;
pub mod group;
pub mod guard;
pub mod journal;
pub mod kv;
pub mod leadership;
pub mod membership;
pub mod metrics;
pub mod model;
pub mod model_facts;
pub mod request;
pub mod routing;
pub mod run;
pub mod scheduler;
pub mod scores;
pub mod security;
pub mod sequence;
pub mod served_model;
pub mod shard_link;
pub mod spawn;
pub mod text;
pub mod trace;
