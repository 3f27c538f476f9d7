//! How far copies of KV rows are behind the steps, for the metric: from what shards say with their signs of life.

use std::collections::BTreeMap;

use phalanx_cluster::id::{Epoch, ShardId};
use phalanx_proto::v1::Heartbeat;

/// Steps of the present formation, and what each mirror has of them.
#[derive(Debug, Default)]
pub struct MirrorLag {
    /// The last step with a result, and of which epoch.
    last: (u64, u64),
    /// The same of what mirrors have.
    mirrored: BTreeMap<ShardId, (u64, u64)>,
}

impl MirrorLag {
    /// A step has a result.
    pub fn stepped(&mut self, epoch: u64, step: u64) {
        self.last = self.last.max((epoch, step));
    }

    /// A sign of life.
    pub fn beat(&mut self, shard: &ShardId, beat: &Heartbeat) {
        if beat.mirrored_epoch == 0 {
            self.mirrored.remove(shard);
        } else {
            self.mirrored.insert(shard.clone(), (beat.mirrored_epoch, beat.mirrored_step));
        }
    }

    /// Steps of the epoch whose rows one of these mirrors lacks, as far as is known; `None` without mirrors, or while one
    /// has not everything from before the epoch.
    pub fn steps<'a>(&self, epoch: Epoch, mirrors: impl IntoIterator<Item = &'a ShardId>) -> Option<u64> {
        let last = if self.last.0 == epoch.raw() { self.last.1 } else { 0 };
        let lag = |shard| match self.mirrored.get(shard) {
            Some((of, step)) if *of == epoch.raw() => Some(last.saturating_sub(*step)),
            _ => None,
        };
        let lags = mirrors.into_iter().map(lag).collect::<Option<Vec<u64>>>()?;
        lags.into_iter().max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_that_of_the_mirror_that_lags_most() {
        let [a, b] = ["a", "b"].map(|name| ShardId(name.to_owned()));
        let epoch = Epoch::from_raw(4);
        let mut lag = MirrorLag::default();
        let beat = |lag: &mut MirrorLag, shard: &ShardId, mirrored_epoch, mirrored_step| {
            lag.beat(shard, &Heartbeat { mirrored_epoch, mirrored_step, ..Heartbeat::default() });
        };
        assert_eq!(lag.steps(epoch, []), None);
        assert_eq!(lag.steps(epoch, [&a]), None);
        lag.stepped(3, 90);
        beat(&mut lag, &a, 4, 0);
        assert_eq!(lag.steps(epoch, [&a]), Some(0), "no step yet");
        lag.stepped(4, 7);
        lag.stepped(4, 6);
        beat(&mut lag, &a, 4, 5);
        assert_eq!(lag.steps(epoch, [&a]), Some(2));
        assert_eq!(lag.steps(epoch, [&a, &b]), None);
        beat(&mut lag, &b, 4, 3);
        assert_eq!(lag.steps(epoch, [&a, &b]), Some(4));
        beat(&mut lag, &b, 0, 0);
        assert_eq!(lag.steps(epoch, [&a, &b]), None);
        beat(&mut lag, &a, 3, 90);
        assert_eq!(lag.steps(epoch, [&a]), None, "of another epoch");
    }
}
