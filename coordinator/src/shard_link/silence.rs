//! Whether a shard is silent, or hears nothing from here: half of a connection may be cut.

use std::time::Duration;

use phalanx_proto::v1::{ShardMessage, shard_message::Message};
use tokio::time::Instant;

/// Signs of life of one shard.
#[derive(Debug)]
pub struct Silence {
    limit: Duration,
    interval: Duration,
    heard: Instant,
    last_tick: Instant,
    /// Of the last heartbeat that was sent.
    sequence: u64,
    /// The greatest that the shard has heard,
    echoed: u64,
    /// and when it said so first.
    echoed_at: Instant,
}

impl Silence {
    /// A stream was opened now. Heartbeats are sent at every `interval`; silence for longer than `limit` is a loss.
    pub fn new(limit: Duration, interval: Duration, now: Instant) -> Self {
        Self { limit, interval, heard: now, last_tick: now, sequence: 0, echoed: 0, echoed_at: now }
    }

    /// A message came.
    pub fn heard(&mut self, message: &ShardMessage, now: Instant) {
        self.heard = now;
        if let Some(Message::Heartbeat(beat)) = &message.message
            && beat.heard_sequence > self.echoed
        {
            self.echoed = beat.heard_sequence;
            self.echoed_at = now;
        }
    }

    /// An interval has passed: the sequence of the heartbeat that is to be sent now.
    ///
    /// # Errors
    /// If the shard counts as silent or deaf; says why.
    pub fn tick(&mut self, now: Instant) -> Result<u64, String> {
        // Who was held up itself can't tell who was silent.
        let held_up = now.duration_since(self.last_tick) > 2 * self.interval;
        self.last_tick = now;
        if held_up {
            self.heard = self.heard.max(now - self.interval);
            self.echoed_at = self.echoed_at.max(now - self.interval);
        } else if now.duration_since(self.heard) > self.limit {
            return Err(format!("it was silent for {} ms", now.duration_since(self.heard).as_millis()));
        } else if self.echoed > 0 && now.duration_since(self.echoed_at) > self.limit {
            let deaf = now.duration_since(self.echoed_at).as_millis();
            return Err(format!("it was silent about our heartbeats for {deaf} ms: it hears nothing from here"));
        }
        self.sequence += 1;
        Ok(self.sequence)
    }
}

#[cfg(test)]
mod tests {
    use phalanx_proto::v1::Heartbeat;

    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    fn beat(heard_sequence: u64) -> ShardMessage {
        ShardMessage { message: Some(Message::Heartbeat(Heartbeat { heard_sequence, ..Heartbeat::default() })) }
    }

    /// Ticks ten times; before each the shard says what `says` makes of the number.
    fn ten_ticks(silence: &mut Silence, start: Instant, says: impl Fn(u64) -> Option<ShardMessage>) -> Option<String> {
        (1..=10u32).find_map(|n| {
            let now = start + n * TICK;
            if let Some(message) = says(u64::from(n)) {
                silence.heard(&message, now);
            }
            silence.tick(now).err()
        })
    }

    #[test]
    fn silence_and_deafness_are_losses() {
        let start = Instant::now();
        let new = || Silence::new(5 * TICK, TICK, start);
        assert_eq!(ten_ticks(&mut new(), start, |n| Some(beat(n))), None);
        assert_eq!(ten_ticks(&mut new(), start, |_| Some(beat(0))), None, "an older shard echoes nothing");
        assert!(ten_ticks(&mut new(), start, |_| None).unwrap().contains("silent for 600 ms"));
        assert!(ten_ticks(&mut new(), start, |n| Some(beat(n.min(2)))).unwrap().contains("hears nothing"));
    }

    #[test]
    fn who_was_held_up_itself_calls_nobody_silent() {
        let start = Instant::now();
        let mut silence = Silence::new(5 * TICK, TICK, start);
        assert_eq!(silence.tick(start + TICK), Ok(1));
        assert_eq!(silence.tick(start + 50 * TICK), Ok(2));
        assert!(ten_ticks(&mut silence, start + 50 * TICK, |_| None).is_some());
    }
}
