//! How long a thread polls before it blocks.
//!
//! Waking a thread on an idle core costs more than all the rest of a fault. So threads on
//! the fault path poll for a bounded time first, as long as that pays: a few polls in vain,
//! and they block at once, until something comes again soon after they did.
//!
//! Where somebody else wants the core, polling does not pay at all: the core is awake
//! anyway, and whoever yields it is put behind the other (since Linux 6.18 by its whole
//! slice). A thread that blocks and is woken there goes first. So a yield that took long ends
//! polling for a while: the longer it took, the longer.

use std::time::{Duration, Instant};

/// Polls in vain after which a thread stops polling.
const PATIENCE: u32 = 3;
/// A yield of the core that took longer gave it to somebody who wanted it for more than a few
/// faults and answers.
const SHORT_YIELD: Duration = Duration::from_micros(100);
/// How long a thread does not poll where somebody else wants its core: so many times what the
/// yield took. A piece of limited background is over soon, and the core idle again.
const CONTENDED_TIMES: u32 = 8;
/// But no longer.
const CONTENDED_FOR: Duration = Duration::from_millis(5);

/// Decides for one thread.
#[derive(Debug)]
pub(crate) struct AdaptivePolling {
    budget: Duration,
    in_vain: u32,
    waiting_since: Option<Instant>,
    contended_until: Option<Instant>,
}

/// What to do while there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    Poll,
    Block,
}

impl AdaptivePolling {
    /// Polls for at most `budget`; zero never polls.
    pub(crate) const fn new(budget: Duration) -> Self {
        Self { budget, in_vain: 0, waiting_since: None, contended_until: None }
    }

    /// There is nothing to do.
    pub(crate) fn idle(&mut self) -> Idle {
        if self.budget.is_zero() {
            return Idle::Block;
        }
        self.idle_at(Instant::now())
    }

    fn idle_at(&mut self, now: Instant) -> Idle {
        let since = *self.waiting_since.get_or_insert(now);
        if self.contended_until.is_some_and(|until| now < until) || self.in_vain >= PATIENCE {
            return Idle::Block;
        }
        if now.duration_since(since) < self.budget {
            return Idle::Poll;
        }
        self.in_vain += 1;
        Idle::Block
    }

    /// Lets others have the core between two polls.
    pub(crate) fn pause(&mut self) {
        let before = Instant::now();
        std::thread::yield_now();
        self.paused(before, Instant::now());
    }

    fn paused(&mut self, before: Instant, after: Instant) {
        let took = after.duration_since(before);
        if took > SHORT_YIELD {
            self.contended_until = Some(after + (took * CONTENDED_TIMES).min(CONTENDED_FOR));
        }
    }

    /// Something came.
    pub(crate) fn busy(&mut self) {
        if let Some(since) = self.waiting_since.take()
            && self.in_vain > 0
            && since.elapsed() < self.budget * 4
        {
            self.in_vain = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_budget_never_polls() {
        let mut polling = AdaptivePolling::new(Duration::ZERO);
        assert_eq!(polling.idle(), Idle::Block);
    }

    #[test]
    fn polling_in_vain_stops_and_resumes_when_it_would_have_paid() {
        let mut polling = AdaptivePolling::new(Duration::from_micros(1));
        for _ in 0..PATIENCE {
            while polling.idle() == Idle::Poll {}
            polling.waiting_since = None;
        }
        assert_eq!(polling.idle(), Idle::Block);
        polling.budget = Duration::from_secs(100);
        polling.busy();
        assert_eq!(polling.idle(), Idle::Poll);
    }

    #[test]
    fn where_the_core_is_wanted_nobody_polls_for_a_while() {
        let mut polling = AdaptivePolling::new(Duration::from_secs(1));
        let now = Instant::now();
        polling.paused(now, now + SHORT_YIELD);
        assert_eq!(polling.idle_at(now), Idle::Poll);
        let slightly = SHORT_YIELD + Duration::from_micros(1);
        for (took, contended) in [
            (slightly, CONTENDED_TIMES * slightly),
            (CONTENDED_FOR / CONTENDED_TIMES, CONTENDED_FOR),
            (CONTENDED_FOR, CONTENDED_FOR),
        ] {
            let after = now + took;
            polling.paused(now, after);
            assert_eq!(polling.idle_at(after), Idle::Block);
            assert_eq!(polling.idle_at(after + contended * 9 / 10), Idle::Block);
            assert_eq!(polling.idle_at(after + contended), Idle::Poll);
        }
    }
}
