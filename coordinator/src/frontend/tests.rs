//! All endpoints over a scheduler that says what its script says.

mod chat;
mod completions;
mod endpoints;
mod errors;
pub(super) mod fake;
mod security;
