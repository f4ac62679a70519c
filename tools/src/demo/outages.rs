//! What interrupts a migration: cuts and deaths, when each is due, and when it is over.
//!
//! Where memory is sent in passes, half of the cuts fall into these, and the others are spread over
//! the pages that are known to be left then.
//!
//! Invariant: each waits until enough pages have arrived, and until the one before is over; one
//! is over when a page has come over a connection that was made after it.

use std::collections::VecDeque;

use serde::Serialize;

use super::messages::{Progress, Stats};
use super::options::{Options, Role, Victim};
use super::precopy::PassesWanted;
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
    pub(super) during: Stage,
    pub(super) at_us: u64,
    /// What had arrived.
    pub(super) pages_complete: u64,
    /// When it was over; `None` if the migration was over before.
    pub(super) over_at_us: Option<u64>,
    /// What the guest did meanwhile, as far as it was told within that time.
    pub(super) operations: u64,
}

/// What a migration is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// Memory is sent while the guest runs at the source.
    Passes,
    /// The guest runs nowhere: nothing is due.
    Blackout,
    /// It runs at the destination, and what is left follows.
    #[default]
    Postcopy,
}

/// The outages of one migration.
#[derive(Debug, Default)]
pub(super) struct Outages {
    stage: Stage,
    /// Those of the passes, each with the share of the pages after which it is due.
    early: VecDeque<(f64, Blow)>,
    /// Those after the switchover.
    plan: VecDeque<(f64, Blow)>,
    past: Vec<Outage>,
    present: Option<Present>,
    page_bytes: u64,
    /// How many pages are to come in this stage, if that is not all of memory.
    expected: Option<u64>,
    /// How many have, in this stage.
    arrived: u64,
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
        let has_passes = options.passes != PassesWanted::None;
        let all: Vec<_> = (0..options.cuts).map(|number| Blow::Cut(kind_of_cut(number))).collect();
        let (early, late) = all.split_at(if has_passes { all.len().div_ceil(2) } else { 0 });
        let early = spread(early.iter().copied()).collect();
        let cuts = spread(late.iter().copied());
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
        let stage = if has_passes { Stage::Passes } else { Stage::Postcopy };
        let page_bytes = options.backing().page_bytes();
        // What the first pass sends: all that is not zero.
        let content = 1.0 - options.zero_fraction * (1.0 - options.worked_fraction);
        let expected = (options.memory.0 / page_bytes) as f64 * content;
        let expected = has_passes.then_some(expected as u64);
        let plan = plan.into();
        Self { stage, early, plan, page_bytes, expected, ..Self::default() }
    }

    /// The guest was stopped after its passes.
    pub(super) fn stopped(&mut self) {
        if self.stage == Stage::Passes {
            self.stage = Stage::Blackout;
        }
    }

    /// The guest runs at the destination, and `left` pages of it at least are still to come. What
    /// was not done in the passes is done now.
    pub(super) fn runs(&mut self, left: u64) {
        if self.stage == Stage::Postcopy {
            return;
        }
        self.stage = Stage::Postcopy;
        (self.expected, self.arrived) = (Some(left), 0);
        let blows: Vec<_> = self.early.drain(..).chain(self.plan.drain(..)).collect();
        self.plan = spread(blows.into_iter().map(|(_, blow)| blow)).collect();
        if let Some(present) = &mut self.present
            && let Some(with) = &mut present.attached_with
        {
            *with = 0;
        }
    }

    /// Takes in how far things are.
    pub(super) fn take(&mut self, progress: &Progress) {
        if let Some(stats) = &progress.stats {
            // What a process that was killed has said last may come late.
            self.complete = self.complete.max(stats.pages_complete);
            self.total = stats.pages_total;
            self.arrived = self.arrived.max(self.arrived_by(stats));
        }
        let has_all = self.has_all();
        let Some(present) = &mut self.present else { return };
        if progress.at_us < present.outage.at_us {
            return;
        }
        if let Some(operations) = progress.operations {
            let first = *present.operations.get_or_insert(operations);
            present.outage.operations = operations - first;
        }
        let has_come = |with: u64| self.arrived > with || has_all;
        if progress.stats.is_some() && present.attached_with.is_some_and(has_come) {
            present.outage.over_at_us = Some(progress.at_us);
            self.past.extend(self.present.take().map(|present| present.outage));
        }
    }

    /// A connection is there.
    pub(super) const fn attached(&mut self) {
        if let Some(present) = &mut self.present {
            present.attached_with = Some(self.arrived);
        }
    }

    /// What has come in this stage, in pages.
    fn arrived_by(&self, stats: &Stats) -> u64 {
        match self.stage {
            // Before the switchover nothing is complete.
            Stage::Passes | Stage::Blackout => stats.bytes_received / self.page_bytes,
            // What the passes have brought is found complete bit by bit, and is no page that came.
            Stage::Postcopy if self.expected.is_some() => {
                stats.pages_requested + stats.pages_background + stats.pages_zero
            }
            Stage::Postcopy => stats.pages_complete,
        }
    }

    fn has_all(&self) -> bool {
        self.complete == self.total
    }

    /// What is due next in this stage, and with how many pages.
    fn next(&self) -> Option<f64> {
        let plan = match self.stage {
            Stage::Passes => &self.early,
            Stage::Blackout => return None,
            Stage::Postcopy => &self.plan,
        };
        let expected = self.expected.unwrap_or(self.total);
        plan.front().map(|(share, _)| share * expected as f64)
    }

    /// How many pages may come before the next of them; `None` if any number may. While one is
    /// not over it takes a page to end it.
    pub(super) fn room(&self) -> Option<u64> {
        // Nobody knows where a stage ends: little may come until that was heard of, so that there
        // is something left for the next.
        if self.next().is_none() && !self.plan.is_empty() {
            let share = self.expected.unwrap_or(self.total) / (4 * self.plan.len() as u64);
            return Some(share.max(1) + SLACK);
        }
        let left = (self.next()?.ceil() as u64).saturating_sub(self.arrived);
        Some(left.max(1) + SLACK)
    }

    /// What is to be done now.
    pub(super) fn due(&mut self) -> Option<Blow> {
        if self.present.is_some() || self.has_all() || (self.arrived as f64) < self.next()? {
            return None;
        }
        let plan = if self.stage == Stage::Passes { &mut self.early } else { &mut self.plan };
        plan.pop_front().map(|(_, blow)| blow)
    }

    /// It was done.
    pub(super) const fn begin(&mut self, blow: Blow, at_us: u64) {
        let (pages_complete, during) = (self.complete, self.stage);
        let outage =
            Outage { blow, during, at_us, pages_complete, over_at_us: None, operations: 0 };
        self.present = Some(Present { outage, operations: None, attached_with: None });
    }

    /// All that there was.
    pub(super) fn into_past(mut self) -> Vec<Outage> {
        self.past.extend(self.present.take().map(|present| present.outage));
        self.past
    }
}

/// Evenly over all pages.
fn spread(blows: impl ExactSizeIterator<Item = Blow>) -> impl Iterator<Item = (f64, Blow)> {
    let count = blows.len() as f64;
    blows.enumerate().map(move |(index, blow)| ((index as f64 + 0.5) / count, blow))
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

    /// 1,024 pages, none of which is zero.
    const IN_PASSES: &str = "--memory 4M --passes 1 --zero-fraction 0 --cuts";

    fn received(pages: u64, complete: u64, requested: u64) -> Progress {
        let (pages_total, bytes_received) = (1024, pages * 4096);
        let stats =
            Stats { pages_total, bytes_received, pages_complete: complete, ..Stats::default() };
        let stats = Stats { pages_requested: requested, ..stats };
        Progress { at_us: pages, operations: None, stats: Some(stats) }
    }

    /// At what count each is due.
    fn due(outages: &mut Outages, counts: impl Iterator<Item = Progress>) -> Vec<u64> {
        let mut seen = Vec::new();
        for count in counts {
            outages.take(&count);
            while outages.due().is_some() {
                seen.push(count.at_us);
            }
        }
        seen
    }

    #[test]
    fn half_are_spread_over_the_passes_and_the_others_over_what_is_left() {
        let mut outages = outages(&format!("{IN_PASSES} 4"));
        let in_passes = due(&mut outages, (0..=2000).map(|pages| received(pages, 0, 0)));
        assert_eq!(in_passes, [256, 768]);
        assert!(outages.room().is_some(), "the switchover is not run past");
        outages.stopped();
        assert_eq!(outages.due(), None);
        outages.runs(100);
        // What the passes brought is complete, and is no page that has come since.
        let afterwards = (0..=100).map(|pages| received(pages, 924 + pages, pages));
        assert_eq!(due(&mut outages, afterwards), [25, 75]);
        assert_eq!(outages.room(), None);
    }

    #[test]
    fn what_the_passes_were_too_short_for_comes_afterwards() {
        let mut outages = outages(&format!("{IN_PASSES} 4"));
        assert_eq!(due(&mut outages, (0..=300).map(|pages| received(pages, 0, 0))), [256]);
        // It may be heard first that it runs, and then that it was stopped.
        outages.runs(600);
        outages.stopped();
        let afterwards = (0..=600).map(|pages| received(pages, 424 + pages, pages));
        assert_eq!(due(&mut outages, afterwards), [100, 300, 500]);
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
