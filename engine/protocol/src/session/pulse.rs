//! Heartbeats: when to say something, and when the other side has been silent too long.

use std::time::Duration;

/// What is due on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    /// Say that this side is still there.
    Beat,
    /// The other side has not been heard for so long.
    Dead(Duration),
}

/// Watches one connection. Times are since any fixed origin.
#[derive(Clone, Copy, Debug)]
pub struct Pulse {
    interval: Duration,
    silence: Duration,
    heard: Duration,
    said: Duration,
    token: u64,
}

impl Pulse {
    /// A connection that came up at `now`: a heartbeat each `interval`, dead after `silence`.
    #[must_use]
    pub const fn new(interval: Duration, silence: Duration, now: Duration) -> Self {
        Self { interval, silence, heard: now, said: now, token: 0 }
    }

    pub(super) fn heard(&mut self, now: Duration) {
        self.heard = self.heard.max(now);
    }

    pub(super) fn next_token(&mut self) -> u64 {
        self.token += 1;
        self.token
    }

    pub(super) fn due(&mut self, now: Duration) -> Due {
        let silent = now.saturating_sub(self.heard);
        if silent >= self.silence {
            return Due::Dead(silent);
        }
        if now.saturating_sub(self.said) >= self.interval {
            self.said = now;
            return Due::Beat;
        }
        Due::Nothing
    }

    /// How often this side speaks if it has nothing to say.
    #[must_use]
    pub const fn interval(&self) -> Duration {
        self.interval
    }

    /// How long the other side may say nothing.
    #[must_use]
    pub const fn silence(&self) -> Duration {
        self.silence
    }

    /// When something will be due next, if nothing is heard until then.
    #[must_use]
    pub fn next(&self) -> Duration {
        (self.said + self.interval).min(self.heard + self.silence)
    }
}
