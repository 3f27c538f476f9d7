//! The fault laboratory: a real cluster under a seeded load, one fault, and every stream compared token by token with
//! what it was without the fault.
//!
//! A [`rows::Row`] says what runs ([`setup::Setup`]) and what breaks; the [`lab`] starts it, takes the reference and runs
//! rounds; [`report`] makes the matrix of `tests/faults/README.md`.

pub mod compare;
pub mod deployment;
pub mod etcd;
pub mod lab;
pub mod load;
pub mod netns;
pub mod own_shards;
pub mod proxy;
pub mod report;
pub mod resources;
pub mod round;
pub mod rows;
pub mod setup;
pub mod starvation;
pub mod state_dir;
pub mod stream;
pub mod switch;
pub mod tools;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Longest that a cluster may take to become what it should be. Reached only by a failing round.
pub const PATIENCE: Duration = Duration::from_secs(150);

/// Polls until `condition` holds; an error after [`PATIENCE`].
pub fn eventually(what: &str, condition: impl FnMut() -> bool) -> Result<()> {
    within(PATIENCE, what, condition)
}

/// Polls until `condition` holds; an error after `limit`.
pub fn within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= deadline {
            bail!("waited {} s in vain until {what}", limit.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A port that is free now.
///
/// # Panics
/// If no port is free.
pub fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    socket.local_addr().expect("it is bound").port()
}
