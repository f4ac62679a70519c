//! The fault thread: asks a source that answers late, twice or never.

use super::*;
use std::collections::BTreeMap;

/// An unanswered request is made again after this long.
const RETRY: Duration = Duration::from_millis(3);

struct Source {
    /// Answers under way: when they arrive.
    answers: Vec<(Instant, u64)>,
    /// Requests: when they were made last.
    asked: BTreeMap<u64, Instant>,
}

impl World {
    pub(super) fn serve(&self, random: &mut Random) {
        dawdle(random);
        let pages = &self.guest.pages;
        let mut source = Source { answers: Vec::new(), asked: BTreeMap::new() };
        let mut faults = Vec::new();
        while !self.is_stopping() {
            pages.read_events(&mut faults).unwrap();
            faults.retain(|&fault| match pages.answer(fault) {
                FaultAnswer::Answered | FaultAnswer::BeingWritten => false,
                FaultAnswer::EventPending => true,
                FaultAnswer::Ask => {
                    self.ask(fault.page.0, &mut source, random);
                    false
                }
                FaultAnswer::NoRoom(error) => panic!("{error}"),
            });
            let now = Instant::now();
            let (due, later) = source.answers.drain(..).partition(|answer| answer.0 <= now);
            source.answers = later;
            for (_, page) in due {
                self.install(page, &mut source);
            }
            let old: Vec<u64> = source
                .asked
                .iter()
                .filter(|&(_, &since)| since + RETRY < now)
                .map(|(&page, _)| page)
                .collect();
            for page in old {
                source.asked.remove(&page);
                self.ask(page, &mut source, random);
            }
            std::thread::yield_now();
        }
    }

    fn ask(&self, page: u64, source: &mut Source, random: &mut Random) {
        let now = Instant::now();
        if source.asked.contains_key(&page) {
            return;
        }
        source.asked.insert(page, now);
        self.asked.store(page, Ordering::Relaxed);
        let copies = match random.below(16) {
            0 => 0,
            1 => 2,
            _ => 1,
        };
        for _ in 0..copies {
            source.answers.push((now + Duration::from_micros(random.below(300)), page));
        }
    }

    fn install(&self, page: u64, source: &mut Source) {
        if self.is_zero_at_source(page) {
            self.guest.pages.zero_urgent(range(page, 1));
        } else {
            let urgent = self.guest.pages.urgent(PageNumber(page), &self.source_page(page));
            match urgent.unwrap() {
                Urgent::Installed => self.note_placed(page),
                Urgent::Late | Urgent::BeingWritten | Urgent::Discarded => {}
                Urgent::EventPending => {
                    source.answers.push((Instant::now(), page));
                    return;
                }
            }
        }
        source.asked.remove(&page);
    }
}
