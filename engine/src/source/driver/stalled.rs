//! Background channels of which nothing comes: given up one by one, while the session goes on.
//!
//! A large page on a slow link takes longer than anybody's patience: so where nothing is
//! acknowledged, bytes that the peer's kernel has taken are progress too. Invariant: a channel
//! on which either moves is not given up; what was under way on one that is given up is handed
//! out again, and only acknowledgements that had come before anybody looked are missed by
//! nobody.

use super::Driver;
use crate::patience::Patience;
use afterimage_protocol::layout::GuestLayout;
use afterimage_protocol::wire::{Channel, ControlFrame, Generation, Stamp};
use std::time::{Duration, Instant};

/// Bytes that may be anywhere between the source and what is acknowledged, beside the page that
/// is arriving: in buffers of both sides and of whoever stands between them.
const BETWEEN_BYTES: u64 = 64 << 20;

/// Whether bytes move on a channel while nothing is acknowledged on it.
#[derive(Debug, Default)]
pub(super) struct Movement(Option<Moved>);

#[derive(Debug)]
struct Moved {
    /// The wait that this belongs to: it began then.
    since: Instant,
    /// When somebody looked last.
    looked: Instant,
    /// When more bytes had been taken last.
    at: Instant,
    /// How many had been taken then, and at the first look.
    bytes: u64,
    first: u64,
}

impl Movement {
    /// When something moved last, of what has been waited for since `since`. Bytes are counted
    /// by `taken`: now and then, and before anybody loses patience; and only up to `most`,
    /// because whoever swallows more gives nothing back.
    fn last(
        &mut self,
        since: Instant,
        looked: Instant,
        limits: Limits,
        taken: impl FnOnce() -> Option<u64>,
    ) -> Instant {
        let present = self.0.take_if(|moved| moved.since == since);
        let (at, last_look) = present.as_ref().map_or((since, since), |it| (it.at, it.looked));
        if looked.saturating_duration_since(last_look) < limits.pause
            && looked.saturating_duration_since(at) < limits.patience
        {
            self.0 = present;
            return at;
        }
        let Some(bytes) = taken() else { return since };
        let fresh = Moved { since, looked, at: looked, bytes, first: bytes };
        let mut moved = present.unwrap_or(fresh);
        if bytes > moved.bytes && bytes - moved.first <= limits.most {
            moved.at = looked;
        }
        (moved.bytes, moved.looked) = (bytes, looked);
        self.0.insert(moved).at
    }
}

/// How closely bytes are watched.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Between two looks.
    pause: Duration,
    /// How long nothing may move.
    patience: Duration,
    /// Bytes that may move without an acknowledgement.
    most: u64,
}

/// More than this does not lie between what is sent and what is acknowledged.
fn most_between(layout: &GuestLayout) -> u64 {
    let pages = layout.regions().iter().map(|region| region.page_size.bytes());
    BETWEEN_BYTES + 2 * pages.max().unwrap_or(0)
}

impl Driver {
    /// Gives up each background channel on which something was under way and nothing of it had
    /// been acknowledged, nor bytes taken, for too long when the control channel was read, which
    /// was after `looked`.
    pub(super) fn give_up_stalled(&mut self, looked: Instant) {
        let silence = self.options.silence;
        let most = self.serving.as_ref().map_or(0, |serving| most_between(&serving.layout));
        for (channel, data) in &mut self.data {
            if !matches!(channel, Channel::Background(_)) || data.is_given_up {
                continue;
            }
            let patience = self.patience.entry(*channel).or_insert_with(|| Patience::new(silence));
            if let Some(pause) = data.underway.take_pause() {
                patience.rewarded(pause);
            }
            let moved = data.underway.waits_since().map(|since| {
                let taken = || data.stream.bytes_taken();
                let limits = Limits { pause: silence / 4, patience: patience.lasts(), most };
                data.movement.last(since, looked, limits, taken)
            });
            let waited = moved.map(|moved| looked.saturating_duration_since(moved));
            if waited.is_some_and(|waited| waited >= patience.lasts()) {
                tracing::warn!(%channel, ?waited, "nothing moves; the channel is replaced");
                patience.exhausted();
                data.is_given_up = true;
                data.stream.shut_down();
            }
        }
    }

    /// A channel has ended, or could not be served: another one is made.
    pub(super) fn replace(&mut self, channel: Channel, stamp: Stamp) {
        if self.link.dials() {
            self.link.data.ended(channel, stamp.epoch);
        } else {
            // The destination may not have noticed.
            let generation = stamp.generation;
            self.link.send(&ControlFrame::Renew { channel, generation });
        }
    }

    /// The destination has given a channel up.
    pub(super) fn renew(&self, channel: Channel, generation: Generation) {
        if let Some(data) = self.data.get(&channel)
            && data.generation == generation
        {
            tracing::info!(%channel, "the destination has given a data channel up");
            data.stream.shut_down();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const LIMITS: Limits = Limits { pause: SECOND, patience: Duration::from_secs(4), most: 1000 };

    #[test]
    fn bytes_are_progress_until_more_has_gone_than_can_be_under_way() {
        let (mut movement, since) = (Movement::default(), Instant::now());
        let mut look = |seconds, bytes| {
            let at = movement.last(since, since + SECOND * seconds, LIMITS, || Some(bytes));
            at.duration_since(since).as_secs()
        };
        assert_eq!(look(0, 5), 0, "too early to ask");
        assert_eq!(look(1, 10), 1, "the first look");
        assert_eq!(look(2, 10), 1);
        assert_eq!(look(3, 1009), 3);
        assert_eq!(look(4, 1010), 4);
        assert_eq!(look(5, 1011), 4, "swallowed");
        assert_eq!(look(6, 2000), 4);
    }

    #[test]
    fn nobody_loses_patience_by_an_old_look() {
        let (mut movement, since) = (Movement::default(), Instant::now());
        let late = since + 9 * SECOND;
        assert_eq!(movement.last(since, late, LIMITS, || Some(7)), late, "the first look");
        let limits = Limits { pause: 60 * SECOND, ..LIMITS };
        let nobody = || -> Option<u64> { panic!("too early") };
        assert_eq!(movement.last(since, late + SECOND, limits, nobody), late);
        let end = late + 4 * SECOND;
        assert_eq!(movement.last(since, end, limits, || Some(8)), end, "it moved meanwhile");
    }

    #[test]
    fn an_acknowledgement_begins_a_new_wait_and_who_cannot_count_has_only_those() {
        let (mut movement, since) = (Movement::default(), Instant::now());
        movement.last(since, since + SECOND, LIMITS, || Some(7));
        movement.last(since, since + 2 * SECOND, LIMITS, || Some(1007));
        let later = since + 3 * SECOND;
        assert_eq!(movement.last(later, later, LIMITS, || Some(1100)), later);
        let (first, end) = (later + SECOND, later + 2 * SECOND);
        assert_eq!(movement.last(later, first, LIMITS, || Some(1200)), first);
        assert_eq!(movement.last(later, end, LIMITS, || Some(2200)), end, "counted anew");
        assert_eq!(movement.last(later, end + SECOND, LIMITS, || None), later);
    }
}
