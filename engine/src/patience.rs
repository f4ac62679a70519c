//! How long nothing may come of a connection before it is given up.
//!
//! Begins with the silence agreed on, doubles each time that giving up brought nothing, and
//! falls back with progress; but it stays at four times the longest pause between two signs of
//! progress, so that a slow link is not given up over and over.

use std::time::Duration;

/// However often it brings nothing, it is tried again after this time, unless the silence
/// agreed on is longer.
const MOST: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    least: Duration,
    present: Duration,
}

impl Patience {
    pub(crate) const fn new(silence: Duration) -> Self {
        Self { least: silence, present: silence }
    }

    /// The sides have agreed on another silence.
    pub(crate) fn begin_with(&mut self, silence: Duration) {
        self.least = silence;
        self.present = self.present.max(silence);
    }

    /// How long nothing may come.
    pub(crate) const fn lasts(&self) -> Duration {
        self.present
    }

    /// Something came, after a pause.
    pub(crate) fn rewarded(&mut self, pause: Duration) {
        let wanted = (self.present / 2).max(pause * 4);
        self.present = wanted.clamp(self.least, MOST.max(self.least));
    }

    /// Nothing came, and the connection was given up.
    pub(crate) fn exhausted(&mut self) {
        self.present = (self.present * 2).min(MOST.max(self.least));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_doubles_to_thirty_seconds_and_falls_back_with_progress() {
        let second = Duration::from_secs(1);
        let mut patience = Patience::new(second);
        for seconds in [2, 4, 8, 16, 30, 30] {
            patience.exhausted();
            assert_eq!(patience.lasts(), second * seconds);
        }
        for _ in 0..10 {
            patience.rewarded(Duration::from_millis(1));
        }
        assert_eq!(patience.lasts(), second);
    }

    #[test]
    fn a_slow_link_is_waited_for() {
        let mut patience = Patience::new(Duration::from_secs(1));
        for _ in 0..10 {
            patience.rewarded(Duration::from_secs(2));
            assert_eq!(patience.lasts(), Duration::from_secs(8));
        }
        patience.rewarded(Duration::from_secs(20));
        assert_eq!(patience.lasts(), Duration::from_secs(30));
    }

    #[test]
    fn patience_is_never_shorter_than_the_silence() {
        let minute = Duration::from_mins(1);
        let mut patience = Patience::new(minute);
        patience.exhausted();
        patience.rewarded(Duration::ZERO);
        assert_eq!(patience.lasts(), minute);
    }
}
