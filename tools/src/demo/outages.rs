//! What interrupts a migration: cuts and deaths, when each is due, and when it is over.
//!
//! Invariant: each waits until enough pages have arrived, and until the one before is over; one
//! is over when a page has come over a connection that was made after it.

use std::collections::VecDeque;

use super::messages::Progress;
use super::options::{Options, Role, Victim};
use super::proxy::Cut;

/// Pages that may come beside those for which there is room, so that nothing stands still for
/// headers, or for pages that came twice.
const SLACK: u64 = 1;

/// What is done to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blow {
    /// Every connection is cut.
    Cut(Cut),
    /// A process is killed and started again.
    Kill(Role),
}

/// A blow, and what came of it. Times are of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug)]
pub(super) struct Outage {
    pub(super) blow: Blow,
    pub(super) at_us: u64,
    /// What had arrived.
    pub(super) pages_complete: u64,
    /// When it was over; `None` if the migration was over before.
    pub(super) over_at_us: Option<u64>,
    /// What the guest did meanwhile, as far as it was told within that time.
    pub(super) operations: u64,
}

/// The outages of one migration.
#[derive(Debug, Default)]
pub(super) struct Outages {
    /// Each with the share of the pages after which it is due.
    plan: VecDeque<(f64, Blow)>,
    past: Vec<Outage>,
    present: Option<Present>,
    complete: u64,
    total: u64,
}

/// An outage that is not over.
#[derive(Debug)]
struct Present {
    outage: Outage,
    /// The guest's operations when they were first told of.
    operations: Option<u64>,
    /// What had arrived when a connection was there again.
    attached_with: Option<u64>,
}

impl Outages {
    /// All that the user wants, in the order in which it is due.
    pub(super) fn planned(options: &Options) -> Self {
        let cuts = options.cuts;
        let cuts = (0..cuts).map(|number| {
            let share = (f64::from(number) + 0.5) / f64::from(cuts);
            (share, Blow::Cut(kind_of_cut(number)))
        });
        // Not at the same time as each other.
        let victims = [
            (Victim::PageServer, Role::PageServer, 1.0 / 3.0),
            (Victim::PageClient, Role::PageClient, 2.0 / 3.0),
        ];
        let victims = victims.into_iter().filter(|(victim, ..)| options.kills(*victim));
        let kills = victims.flat_map(|(_, role, part)| {
            (0..options.kills).map(move |number| {
                ((f64::from(number) + part) / f64::from(options.kills), Blow::Kill(role))
            })
        });
        let mut plan: Vec<_> = cuts.chain(kills).collect();
        plan.sort_by(|one, other| one.0.total_cmp(&other.0));
        Self { plan: plan.into(), ..Self::default() }
    }

    /// Takes in how far things are.
    pub(super) fn take(&mut self, progress: &Progress) {
        if let Some(stats) = &progress.stats {
            // What a process that was killed has said last may come late.
            self.complete = self.complete.max(stats.pages_complete);
            self.total = stats.pages_total;
        }
        let Some(present) = &mut self.present else { return };
        if progress.at_us < present.outage.at_us {
            return;
        }
        if let Some(operations) = progress.operations {
            let first = *present.operations.get_or_insert(operations);
            present.outage.operations = operations - first;
        }
        let has_come = |with: u64| self.complete > with || self.complete == self.total;
        if progress.stats.is_some() && present.attached_with.is_some_and(has_come) {
            present.outage.over_at_us = Some(progress.at_us);
            self.past.extend(self.present.take().map(|present| present.outage));
        }
    }

    /// A connection is there.
    pub(super) const fn attached(&mut self) {
        if let Some(present) = &mut self.present {
            present.attached_with = Some(self.complete);
        }
    }

    /// How many pages may come before the next of them; `None` if any number may. While one is
    /// not over it takes a page to end it.
    pub(super) fn room(&self) -> Option<u64> {
        let (share, _) = self.plan.front()?;
        let left = (share * self.total as f64).ceil() as u64;
        let left = left.saturating_sub(self.complete);
        Some(left.max(1) + SLACK)
    }

    /// What is to be done now.
    pub(super) fn due(&mut self) -> Option<Blow> {
        if self.present.is_some() || self.complete == self.total {
            return None;
        }
        let (share, _) = self.plan.front()?;
        if (self.complete as f64) < share * self.total as f64 {
            return None;
        }
        self.plan.pop_front().map(|(_, blow)| blow)
    }

    /// It was done.
    pub(super) const fn begin(&mut self, blow: Blow, at_us: u64) {
        let pages_complete = self.complete;
        let outage = Outage { blow, at_us, pages_complete, over_at_us: None, operations: 0 };
        self.present = Some(Present { outage, operations: None, attached_with: None });
    }

    /// All that there was.
    pub(super) fn into_past(mut self) -> Vec<Outage> {
        self.past.extend(self.present.take().map(|present| present.outage));
        self.past
    }
}

/// Resets and ends by turns, and seldom silence, which takes the longest to notice.
const fn kind_of_cut(number: u32) -> Cut {
    match number {
        _ if number % 20 == 2 => Cut::Silent,
        _ if number.is_multiple_of(2) => Cut::Reset,
        _ => Cut::Closed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::messages::Stats;
    use clap::Parser;

    fn outages(arguments: &str) -> Outages {
        let command = ["demo"].into_iter().chain(arguments.split_whitespace());
        Outages::planned(&Options::try_parse_from(command).unwrap())
    }

    fn progress(at_us: u64, pages_complete: u64, operations: u64) -> Progress {
        let stats = Stats { pages_total: 1000, pages_complete, ..Stats::default() };
        Progress { at_us, operations: Some(operations), stats: Some(stats) }
    }

    #[test]
    fn each_is_due_after_its_share_of_the_pages() {
        let mut outages = outages("--cuts 10 --kill page-server,page-client --kills 2");
        let mut seen = Vec::new();
        for complete in 0..=1000 {
            outages.take(&progress(complete, complete, 0));
            while let Some(blow) = outages.due() {
                seen.push((complete, blow));
            }
        }
        assert_eq!(seen.len(), 14, "{seen:?}");
        let of = |blow: Blow| {
            let of = seen.iter().filter(|(_, it)| *it == blow);
            of.map(|(complete, _)| *complete).collect::<Vec<_>>()
        };
        assert_eq!(of(Blow::Kill(Role::PageServer)), [167, 667]);
        assert_eq!(of(Blow::Kill(Role::PageClient)), [334, 834]);
        assert_eq!(of(Blow::Cut(Cut::Silent)), [250]);
        assert_eq!(of(Blow::Cut(Cut::Reset)), [50, 450, 650, 850]);
        assert_eq!(of(Blow::Cut(Cut::Closed)), [150, 350, 550, 750, 950]);
    }

    #[test]
    fn one_is_over_with_the_first_page_of_a_new_connection() {
        let mut outages = outages("--cuts 4");
        outages.take(&progress(10, 500, 70));
        let blow = outages.due().unwrap();
        outages.begin(blow, 20);
        // Said before the cut, and heard after it.
        outages.take(&progress(19, 510, 75));
        outages.take(&progress(21, 520, 80));
        // Pages that were under way do not count.
        outages.take(&progress(25, 530, 85));
        outages.attached();
        outages.take(&progress(30, 530, 90));
        assert_eq!(outages.due(), None, "not two at a time");
        outages.take(&progress(35, 531, 95));
        assert!(outages.due().is_some());
        let past = outages.into_past();
        assert_eq!((past[0].at_us, past[0].over_at_us), (20, Some(35)));
        assert_eq!((past[0].pages_complete, past[0].operations), (500, 15));
    }

    #[test]
    fn one_that_outlasts_the_migration_has_no_end() {
        let mut outages = outages("--cuts 1");
        outages.take(&progress(10, 999, 0));
        let blow = outages.due().unwrap();
        outages.begin(blow, 20);
        outages.take(&progress(30, 1000, 0));
        assert_eq!(outages.due(), None);
        assert_eq!(outages.into_past()[0].over_at_us, None);
    }
}
