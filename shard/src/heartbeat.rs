//! Signs of life between shard and coordinator.

use std::time::{Duration, Instant};

use phalanx_proto::v1::{Heartbeat, ShardMessage, shard_message::Message};

use crate::memory;

/// Heartbeats of the coordinator that may stay away before it counts as lost.
const MISSED_LIMIT: u32 = 20;

/// However short the interval: a coordinator on a busy machine is not lost before this.
const SHORTEST_SILENCE: Duration = Duration::from_secs(10);

/// Shortest interval that is kept, whatever the coordinator says.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// When to send heartbeats, and when the other side has been silent for too long.
#[derive(Debug, Clone)]
pub struct Pulse {
    interval: Duration,
    sequence: u64,
    heard: Instant,
}

impl Pulse {
    /// Of the interval that the coordinator asks for.
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self { interval: interval.max(SHORTEST_INTERVAL), sequence: 0, heard: now }
    }

    /// Time between heartbeats.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// Something came from the coordinator.
    pub fn hear(&mut self, now: Instant) {
        self.heard = now;
    }

    /// How long the coordinator has been silent, if that is too long.
    pub fn silence(&self, now: Instant) -> Option<Duration> {
        let silent = now.saturating_duration_since(self.heard);
        (silent > (self.interval * MISSED_LIMIT).max(SHORTEST_SILENCE)).then_some(silent)
    }

    /// The next heartbeat.
    pub fn beat(&mut self) -> ShardMessage {
        self.sequence += 1;
        let (sequence, resident_bytes) = (self.sequence, memory::resident_bytes());
        let beat = Heartbeat { sequence, resident_bytes, ..Heartbeat::default() };
        ShardMessage { message: Some(Message::Heartbeat(beat)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_noticed_after_the_limit() {
        let begun = Instant::now();
        let mut pulse = Pulse::new(Duration::from_secs(1), begun);
        assert_eq!(pulse.silence(begun + Duration::from_secs(20)), None);
        assert_eq!(pulse.silence(begun + Duration::from_secs(21)), Some(Duration::from_secs(21)));
        pulse.hear(begun + Duration::from_secs(21));
        assert_eq!(pulse.silence(begun + Duration::from_secs(41)), None);
    }

    #[test]
    fn short_intervals_have_patience() {
        let begun = Instant::now();
        let pulse = Pulse::new(Duration::ZERO, begun);
        assert_eq!(pulse.interval(), SHORTEST_INTERVAL);
        assert_eq!(pulse.silence(begun + Duration::from_secs(9)), None);
        assert!(pulse.silence(begun + Duration::from_secs(11)).is_some());
    }

    #[test]
    fn beats_are_numbered() {
        let mut pulse = Pulse::new(Duration::from_secs(1), Instant::now());
        pulse.beat();
        let Some(Message::Heartbeat(beat)) = pulse.beat().message else { panic!("not a heartbeat") };
        assert_eq!(beat.sequence, 2);
        assert!(beat.resident_bytes > 0);
    }
}
