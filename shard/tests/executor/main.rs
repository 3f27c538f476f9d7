//! The executor on tiny random models: right against formulas, and the same bits however the work is cut. The whole shard
//! under a coordinator that a test plays.

mod epochs;
mod forward;
mod invariance;
mod leaders;
mod link;
mod loading;
mod mirrored;
mod oracle;
mod plans;
mod played;
mod tiny;
