//! How much may leave when: a token bucket that is told the time.
//!
//! It is kept as one instant, at which the bucket is neither in debt nor in credit: sending
//! moves it forward by the time that the bytes are worth, and it never lags behind by more
//! than [`CREDIT`] (the generic cell rate algorithm, ITU-T I.371).

use std::num::NonZeroU64;
use std::time::Duration;

/// What could not leave in time may leave so much later. Streams that wake late would lower
/// the rate otherwise; more than this, and a second could carry 5 % too much.
pub(super) const CREDIT: Duration = Duration::from_millis(25);

const NANOS: u128 = 1_000_000_000;

/// Allows bytes at a rate. Times count from any fixed moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bucket {
    rate: NonZeroU64,
    even_at: Duration,
}

impl Bucket {
    /// Nothing is owed and nothing saved up at `now`.
    pub(super) const fn new(bytes_per_second: NonZeroU64, now: Duration) -> Self {
        Self { rate: bytes_per_second, even_at: now }
    }

    /// How long nothing may leave.
    pub(super) const fn wait(&self, now: Duration) -> Duration {
        self.even_at.saturating_sub(now)
    }

    /// These bytes leave now: may be called where there is nothing to wait for, and with any
    /// number; what is too much is waited for next time.
    pub(super) fn take(&mut self, now: Duration, bytes: u64) {
        let earliest = now.saturating_sub(CREDIT);
        self.even_at = self.even_at.max(earliest).saturating_add(self.worth(bytes));
    }

    /// Other bytes than were taken have left.
    pub(super) fn correct(&mut self, taken: u64, left: u64) {
        self.even_at = if left >= taken {
            self.even_at.saturating_add(self.worth(left - taken))
        } else {
            self.even_at.saturating_sub(self.worth(taken - left))
        };
    }

    /// Another rate from now on. What is owed is owed at the faster of both, so that a new
    /// rate does not begin with a wait that belongs to the old one.
    pub(super) fn change(&mut self, bytes_per_second: NonZeroU64, now: Duration) {
        let owed = self.wait(now).as_nanos();
        let (old, new) = (u128::from(self.rate.get()), u128::from(bytes_per_second.get()));
        // A wait of up to 2^64 s, in nanoseconds, times a rate of up to 2^64.
        let at_new = owed.saturating_mul(old) / new;
        self.even_at = now.saturating_add(duration(owed.min(at_new)));
        self.rate = bytes_per_second;
    }

    /// The time in which so many bytes may leave, not less.
    fn worth(&self, bytes: u64) -> Duration {
        duration((u128::from(bytes) * NANOS).div_ceil(u128::from(self.rate.get())))
    }
}

fn duration(nanos: u128) -> Duration {
    let seconds = u64::try_from(nanos / NANOS).unwrap_or(u64::MAX);
    Duration::new(seconds, (nanos % NANOS) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;
    const SECOND: Duration = Duration::from_secs(1);

    fn rate(bytes: u64) -> NonZeroU64 {
        NonZeroU64::new(bytes).unwrap()
    }

    /// Sends chunks as early as is allowed, each wake later than asked for by `late`; returns
    /// the bytes that left before `until`.
    fn send(
        bucket: &mut Bucket,
        from: Duration,
        until: Duration,
        chunk: u64,
        late: Duration,
    ) -> u64 {
        let (mut now, mut sent) = (from, 0);
        loop {
            let wait = bucket.wait(now);
            if !wait.is_zero() {
                now += wait + late;
            }
            if now >= until {
                return sent;
            }
            bucket.take(now, chunk);
            sent += chunk;
        }
    }

    #[test]
    fn a_second_carries_what_the_rate_says() {
        for bytes in [MB, 10 * MB, 100 * MB, 1000 * MB, 20_000 * MB] {
            for chunk in [4096, 64 << 10, 256 << 10] {
                let mut bucket = Bucket::new(rate(bytes), SECOND);
                let sent = send(&mut bucket, SECOND, 2 * SECOND, chunk, Duration::ZERO);
                // Times are rounded up to whole nanoseconds.
                let least = bytes - bytes / 500;
                assert!((least..=bytes + chunk).contains(&sent), "{sent} at {bytes} by {chunk}");
            }
        }
    }

    #[test]
    fn waking_late_lowers_nothing_while_it_is_within_the_credit() {
        for bytes in [10 * MB, 1000 * MB] {
            let chunk = bytes / 1000;
            let late = CREDIT / 2;
            let mut bucket = Bucket::new(rate(bytes), SECOND);
            let sent = send(&mut bucket, SECOND, 2 * SECOND, chunk, late);
            // The last wake came too late.
            let least = bytes - bytes / 50;
            assert!((least..=bytes + chunk).contains(&sent), "{sent} at {bytes}");
        }
    }

    #[test]
    fn what_was_not_used_is_forgotten_after_the_credit() {
        let bytes = 100 * MB;
        let mut bucket = Bucket::new(rate(bytes), Duration::ZERO);
        // Nobody wanted anything for an hour.
        let from = 3600 * SECOND;
        let sent = send(&mut bucket, from, from + SECOND, 4096, Duration::ZERO);
        assert!((bytes + bytes / 50..=bytes + bytes / 40 + 4096).contains(&sent), "{sent}");
    }

    #[test]
    fn what_has_not_left_is_given_back_and_what_is_more_is_owed() {
        let mut bucket = Bucket::new(rate(MB), SECOND);
        bucket.take(SECOND, 5000);
        assert_eq!(bucket.wait(SECOND), Duration::from_millis(5));
        bucket.correct(5000, 0);
        assert_eq!(bucket.wait(SECOND), Duration::ZERO);
        bucket.take(SECOND, 5000);
        bucket.correct(5000, 2 * MB);
        assert_eq!(bucket.wait(SECOND), 2 * SECOND);
    }

    #[test]
    fn a_new_rate_does_not_wait_for_the_old_one() {
        let mut bucket = Bucket::new(rate(1), SECOND);
        bucket.take(SECOND, 4096);
        assert_eq!(bucket.wait(SECOND), 4096 * SECOND);
        bucket.change(rate(4096 * MB), SECOND);
        assert_eq!(bucket.wait(SECOND), Duration::from_micros(1));
        // Slower: what left at the old rate is not charged at the new one.
        bucket.take(SECOND, 4096 * 1000);
        bucket.change(rate(1), SECOND);
        assert_eq!(bucket.wait(SECOND), Duration::from_micros(1001));
    }

    #[test]
    fn changing_the_rate_again_and_again_lets_nothing_through() {
        let mut bucket = Bucket::new(rate(MB), SECOND);
        bucket.take(SECOND, 5000);
        for step in 1..=1000 {
            bucket.change(rate(MB), SECOND + Duration::from_micros(step));
        }
        let now = SECOND + Duration::from_millis(1);
        assert_eq!(bucket.wait(now), Duration::from_millis(4));
    }

    #[test]
    fn extremes_do_not_overflow() {
        for bytes in [1, u64::MAX] {
            let mut bucket = Bucket::new(rate(bytes), SECOND);
            for _ in 0..3 {
                bucket.take(SECOND, u64::MAX);
                bucket.correct(0, u64::MAX);
                bucket.change(rate(u64::MAX), SECOND);
                bucket.change(rate(1), SECOND);
            }
            bucket.correct(u64::MAX, 0);
            assert!(bucket.wait(Duration::MAX).is_zero());
        }
    }
}
