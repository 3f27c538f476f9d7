//! Many requests from a file, their answers into another: `coordinator batch`, and what `/v1/batches` runs.
//!
//! [`mod@line`] reads lines as OpenAI's batches have them, [`outcome`] writes what became of them, [`journal`] is the file that they
//! are written to: it says after a crash which lines are done. [`runner`] asks for them, as many at once as [`pace`] allows,
//! through an [`ask::Ask`]: the endpoints of this process or another server. No request is read or answered in another way
//! than a client's.

pub mod ask;
pub mod cli;
pub mod input;
pub mod journal;
pub mod line;
pub mod outcome;
pub mod pace;
pub mod progress;
pub mod runner;
