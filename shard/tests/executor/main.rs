//! The executor on tiny random models: right against formulas, and the same bits however the work is cut.

mod forward;
mod invariance;
mod link;
mod loading;
mod mirrored;
mod oracle;
mod plans;
mod tiny;
