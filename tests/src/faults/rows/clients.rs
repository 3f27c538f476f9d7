//! Clients that vanish.

use std::{thread, time::Duration};

use rustix::process::Signal;

use super::{Epochs, PLAIN, Row};
use crate::faults::{eventually, round::Round};

pub(super) static ROWS: &[Row] = &[
    Row {
        name: "clients-vanish",
        fault: "half of the clients close their connections in decode",
        epochs: Epochs::Same,
        inject: |round| {
            round.wait_decode(10, 40)?;
            vanish_half(round);
            eventually("their sequences are gone", || round.deployment.metric("sequences_running") <= 9.0)
        },
        ..PLAIN
    },
    Row {
        name: "clients-vanish-kill",
        fault: "half of the clients close their connections while the group forms again after a SIGKILL",
        inject: |round| {
            round.wait_decode(10, 40)?;
            let pid = round.rank_pid(None)?;
            round.signal(pid, Signal::KILL);
            thread::sleep(Duration::from_millis(round.numbers.below(100)));
            vanish_half(round);
            Ok(())
        },
        ..PLAIN
    },
];

fn vanish_half(round: &mut Round<'_>) {
    round.inject();
    for client in (0..16).step_by(2) {
        let other = usize::try_from(round.numbers.below(2)).unwrap_or(0);
        round.vanish(client + other);
    }
}
