//! All endpoints over a scheduler that says what its script says.

mod anthropic;
mod batches;
mod caching;
mod chat;
mod completions;
mod endpoints;
mod errors;
pub(super) mod fake;
mod grammars;
mod guard;
mod ollama;
mod responses;
mod resuming;
mod security;
mod tgi;
mod thought_budgets;
mod tools;
