//! How long a thread polls before it blocks.
//!
//! Waking a thread on an idle core costs more than all the rest of a fault. So threads on
//! the fault path poll for a bounded time first, as long as that pays: a few polls in vain,
//! and they block at once, until something comes again soon after they did.

use std::time::{Duration, Instant};

/// Polls in vain after which a thread stops polling.
const PATIENCE: u32 = 3;

/// Decides for one thread.
#[derive(Debug)]
pub(crate) struct AdaptivePolling {
    budget: Duration,
    in_vain: u32,
    waiting_since: Option<Instant>,
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
        Self { budget, in_vain: 0, waiting_since: None }
    }

    /// There is nothing to do.
    pub(crate) fn idle(&mut self) -> Idle {
        if self.budget.is_zero() {
            return Idle::Block;
        }
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if self.in_vain >= PATIENCE {
            return Idle::Block;
        }
        if since.elapsed() < self.budget {
            return Idle::Poll;
        }
        self.in_vain += 1;
        Idle::Block
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
}
