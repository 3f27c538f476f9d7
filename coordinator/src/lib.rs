//! Owns requests: frontends, scheduler, groups, journal, policy. No tensor math.

pub mod metrics;
pub mod request;
pub mod scheduler;
pub mod served_model;
