//! What the report says of cuts and deaths.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Story, plural, time};
use crate::demo::options::{Options, Role};
use crate::demo::outages::{Blow, Outage, Stage};
use crate::demo::proxy::Cut;
use crate::report_page::Mark;

/// The keys that are there if the migration was to be interrupted.
#[derive(Debug, Serialize)]
pub(super) struct OutageReport {
    cuts_wanted: u32,
    cuts: u64,
    cuts_by_kind: BTreeMap<&'static str, u64>,
    kills: BTreeMap<&'static str, u64>,
    /// Whether the background was slowed down to make time for them.
    background_slowed: bool,
    recovery_us: Recoveries,
    operations_during_outages: u64,
    outages: Vec<OneOutage>,
}

/// How long it took until a page came again.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Recoveries {
    count: u64,
    mean: u64,
    p50: u64,
    p99: u64,
    max: u64,
}

/// One cut, or one death of a process that was started again.
#[derive(Debug, Serialize)]
struct OneOutage {
    #[serde(skip)]
    blow: Blow,
    kind: &'static str,
    /// What kind of cut, or who was killed.
    what: &'static str,
    during: Stage,
    /// Since the stop of the guest; before it in the passes.
    at_us: i64,
    pages_complete: u64,
    recovery_us: Option<u64>,
    /// Not told of at the source.
    guest_operations: Option<u64>,
}

const fn kind(blow: Blow) -> &'static str {
    match blow {
        Blow::Cut(_) => "cut",
        Blow::Kill(_) => "kill",
    }
}

const fn what(blow: Blow) -> &'static str {
    match blow {
        Blow::Cut(Cut::Reset) => "reset",
        Blow::Cut(Cut::Closed) => "closed",
        Blow::Cut(Cut::Silent) => "silent",
        Blow::Kill(role) => role.name(),
    }
}

impl OutageReport {
    /// `None` where nothing was to interrupt the migration.
    pub(super) fn of(options: &Options, story: &Story, stopped_at_us: u64) -> Option<Self> {
        if !options.has_outages() && options.kill.is_empty() {
            return None;
        }
        let outages: Vec<_> =
            story.outages.iter().map(|outage| OneOutage::of(outage, stopped_at_us)).collect();
        let (mut cuts_by_kind, mut kills) = (BTreeMap::new(), BTreeMap::new());
        for outage in &outages {
            let counts = match outage.blow {
                Blow::Cut(_) => &mut cuts_by_kind,
                Blow::Kill(_) => &mut kills,
            };
            *counts.entry(outage.what).or_insert(0) += 1;
        }
        if story.handed_over_at_us.is_some() {
            kills.insert(Role::Source.name(), 1);
        }
        let recoveries = outages.iter().filter_map(|outage| outage.recovery_us).collect();
        Some(Self {
            cuts_wanted: options.cuts,
            cuts: cuts_by_kind.values().sum(),
            cuts_by_kind,
            kills,
            background_slowed: options.is_slowed(),
            recovery_us: Recoveries::of(recoveries),
            operations_during_outages: outages.iter().filter_map(|it| it.guest_operations).sum(),
            outages,
        })
    }

    /// Lines of the report as text: name, value, what it is.
    pub(super) fn rows(&self) -> Vec<(&'static str, String, String)> {
        let mut rows = Vec::new();
        let list = |counts: &BTreeMap<&str, u64>| {
            let counts: Vec<_> =
                counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
            counts.join(", ")
        };
        if self.cuts_wanted > 0 {
            let mut what = list(&self.cuts_by_kind);
            let early = self.outages.iter().filter(|it| it.during == Stage::Passes).count();
            if early > 0 {
                what = format!("{what}; {early} while passes were sent");
            }
            if self.cuts < u64::from(self.cuts_wanted) {
                what = format!(
                    "of {}: all memory was there before the others; lower --bandwidth",
                    self.cuts_wanted
                );
            }
            rows.push(("cuts", self.cuts.to_string(), what));
        }
        if !self.kills.is_empty() {
            rows.push(("kills", self.kills.values().sum::<u64>().to_string(), list(&self.kills)));
        }
        let Recoveries { count, p50, p99, max, .. } = self.recovery_us;
        if count > 0 {
            let time = |micros: u64| time(micros as f64);
            let times =
                format!("half in {}, 99 % in {}, all in {}", time(p50), time(p99), time(max));
            let what = format!("{times}, from the cut to the next page");
            rows.push(("recoveries", count.to_string(), what));
            let done = self.operations_during_outages;
            let what = format!("operation{} of the guest in that time", plural(done));
            rows.push(("", done.to_string(), what));
        }
        if self.background_slowed {
            let what = "the background was slowed down to make time for that; see --bandwidth";
            rows.push(("", String::new(), what.to_owned()));
        }
        rows
    }

    /// Where each began on the axis of time: deaths by name, and cuts, of which there are many,
    /// without.
    pub(super) fn marks(&self) -> Vec<Mark> {
        let mark = |outage: &OneOutage| {
            let label = match outage.blow {
                Blow::Cut(_) => String::new(),
                Blow::Kill(_) => format!("{} killed", outage.what),
            };
            Mark { at_us: outage.at_us as f64, label }
        };
        let (mut marks, cuts): (Vec<_>, Vec<_>) =
            self.shown().map(mark).partition(|mark| !mark.label.is_empty());
        marks.extend(cuts);
        marks
    }

    /// Those on the axis of time, which begins with the stop.
    fn shown(&self) -> impl Iterator<Item = &OneOutage> {
        self.outages.iter().filter(|outage| outage.at_us >= 0)
    }

    /// What the marks are, to be added to what is said of them.
    pub(super) fn caption(&self) -> String {
        let is_cut = |outage: &&OneOutage| matches!(outage.blow, Blow::Cut(_));
        let (cuts, all) = (self.shown().filter(is_cut).count() as u64, self.shown().count() as u64);
        let kills = all - cuts;
        format!(
            " Lines mark the {cuts} cut{} of the network and the {kills} death{} of a process.",
            plural(cuts),
            plural(kills)
        )
    }
}

impl OneOutage {
    fn of(outage: &Outage, stopped_at_us: u64) -> Self {
        Self {
            blow: outage.blow,
            kind: kind(outage.blow),
            what: what(outage.blow),
            during: outage.during,
            at_us: outage.at_us as i64 - stopped_at_us as i64,
            pages_complete: outage.pages_complete,
            recovery_us: outage.over_at_us.map(|over| over.saturating_sub(outage.at_us)),
            guest_operations: (outage.during == Stage::Postcopy).then_some(outage.operations),
        }
    }
}

impl Recoveries {
    fn of(mut all: Vec<u64>) -> Self {
        all.sort_unstable();
        let Some(&max) = all.last() else { return Self::default() };
        let count = all.len() as u64;
        // The smallest that so many percent do not exceed.
        let percentile = |percent: u64| all[((count * percent).div_ceil(100) - 1) as usize];
        let mean = all.iter().sum::<u64>() / count;
        Self { count, mean, p50: percentile(50), p99: percentile(99), max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_there_is() {
        let of = |all: &[u64]| Recoveries::of(all.to_vec());
        assert_eq!(of(&[]).count, 0);
        let one = of(&[7]);
        assert_eq!((one.mean, one.p50, one.p99, one.max), (7, 7, 7, 7));
        let hundred = of(&(1..=100).rev().collect::<Vec<_>>());
        assert_eq!((hundred.p50, hundred.p99, hundred.max), (50, 99, 100));
    }
}
