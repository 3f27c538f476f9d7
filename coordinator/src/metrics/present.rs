//! Gauges of the present.

use metrics::{Gauge, Label};

/// A gauge that shows what it was set to while its owner lives, and afterwards that there is nothing: whoever led once does
/// not go on telling what was true then.
pub struct Present {
    gauge: Gauge,
    absent: f64,
}

impl Present {
    /// Shows 0 until it is set, and 0 again in the end.
    pub fn new(name: &'static str, labels: Vec<Label>) -> Self {
        Self::or(0.0, name, labels)
    }

    /// Shows `absent` until it is set, and again in the end.
    pub fn or(absent: f64, name: &'static str, labels: Vec<Label>) -> Self {
        let gauge = metrics::gauge!(name, labels);
        gauge.set(absent);
        Self { gauge, absent }
    }

    /// Shows a value.
    pub fn set(&self, value: f64) {
        self.gauge.set(value);
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.gauge.set(self.absent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::prometheus;

    #[test]
    fn a_gauge_ends_with_its_owner() {
        let recorder = prometheus::recorder().unwrap().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            let shown = |name: &str| {
                let text = handle.render();
                text.lines().find_map(|l| l.strip_prefix(name)).map(|value| value.trim().to_owned()).unwrap()
            };
            let (plain, lag) = (Present::new("plain", Vec::new()), Present::or(f64::NAN, "lag", Vec::new()));
            assert_eq!((shown("plain").as_str(), shown("lag").as_str()), ("0", "NaN"));
            plain.set(7.0);
            lag.set(2.0);
            assert_eq!((shown("plain").as_str(), shown("lag").as_str()), ("7", "2"));
            drop((plain, lag));
            assert_eq!((shown("plain").as_str(), shown("lag").as_str()), ("0", "NaN"));
        });
    }
}
