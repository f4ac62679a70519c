//! Early pieces as they arrive: who writes which page of one, and whether it counts in the end.

use super::super::claim::Claim;
use super::super::hold::{Place, pass};
use super::super::{InstallError, Pages, RegionFile, ZERO_STEP};
use crate::sys::fill::Fill;
use afterimage_protocol::layout::{PageNumber, PageRange, RegionRun};
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long an early copy waits before it looks again whether another receiver has given its
/// page back.
const CLAIM_WAIT: Duration = Duration::from_micros(50);

impl Pages {
    /// Claims what is to be written of an early piece inside one region: nothing if its pass is
    /// not the newest. Waits for other receivers that are writing some of it. `writes`: it is
    /// not zero. `told` is called with what is current already.
    pub(crate) fn claim_early(
        &self,
        piece: PageRange,
        pass: u16,
        writes: bool,
        mut told: impl FnMut(PageRange),
    ) -> Claim<'_> {
        loop {
            let gate = self.installing();
            if !self.early.takes(pass) {
                self.counters.duplicate.fetch_add(piece.count, Ordering::Relaxed);
                return Claim::early(self, piece, Vec::new(), pass);
            }
            let mut won = Vec::new();
            let mut open = 0;
            self.not_current_in(piece, |run| {
                open += run.count;
                open -= self.planes.claim(run, |mine| won.push(mine));
            });
            if open == 0 {
                if writes && self.file_of(&self.run_of(piece)).is_some() {
                    for &run in &won {
                        self.early.note_there(run);
                    }
                }
                self.here_in(piece, &won, &mut told);
                return Claim::early(self, piece, won, pass);
            }
            for run in won {
                self.planes.give_back(run);
            }
            drop(gate);
            std::thread::sleep(CLAIM_WAIT);
        }
    }

    /// Calls `found` with each run of a range that is neither complete nor current.
    fn not_current_in(&self, range: PageRange, mut found: impl FnMut(PageRange)) {
        let current = self.early.current();
        self.planes.incomplete_in(range, |open| {
            let end = open.start.0 + open.count;
            let mut rest = open;
            while let Some(run) = current.first_clear_in(rest) {
                found(run);
                let next = run.start.0 + run.count;
                rest = PageRange::new(PageNumber(next), end - next);
            }
        });
    }

    /// Calls `told` with what of a piece is not in `won`: it is here already.
    fn here_in(&self, piece: PageRange, won: &[PageRange], told: &mut impl FnMut(PageRange)) {
        let mut next = piece.start.0;
        let end = piece.start.0 + piece.count;
        let mut tell = |from: u64, to: u64| {
            if from < to {
                self.counters.duplicate.fetch_add(to - from, Ordering::Relaxed);
                told(PageRange::new(PageNumber(from), to - from));
            }
        };
        for run in won {
            tell(next, run.start.0);
            next = run.start.0 + run.count;
        }
        tell(next, end);
    }

    /// A claimed run of a file was written by an early piece. `told` is called with what counts.
    pub(in super::super) fn finish_early_alias(
        &self,
        run: &RegionRun,
        file: &RegionFile,
        number: u16,
        told: &mut impl FnMut(PageRange),
    ) {
        let gate = self.installing();
        let gone: Vec<_> = if gate.is_empty() {
            Vec::new()
        } else {
            run.pages.iter().filter(|page| gate.contains(*page)).collect()
        };
        if self.early.takes(number) {
            self.early.current().set(run.pages, |_| ());
            for page in &gone {
                self.early.current().clear_one(*page);
            }
            told(run.pages);
        }
        drop(gate);
        pass(Place::EarlyCounts);
        // Discarded meanwhile: they are complete and zero.
        for page in &gone {
            self.give_back_file_pages(PageRange::one(*page), file);
        }
        self.planes.give_back(run.pages);
        if !self.early.is_taking() {
            // Whoever met the claim looks again.
            self.wake(run);
        }
        self.note_alias_written(run.length);
    }

    /// Copies a claimed run of an early piece. `told` is called with what counts.
    pub(in super::super) fn finish_early_copy(
        &self,
        run: &RegionRun,
        content: &[u8],
        pass: u16,
        told: &mut impl FnMut(PageRange),
    ) -> Result<(), InstallError> {
        let page_bytes = self.page_bytes(run);
        let gate = self.installing();
        let mut parts = Vec::new();
        if self.early.takes(pass) {
            self.planes.incomplete_in(run.pages, |open| parts.push(open));
        }
        for part in parts {
            let part = self.run_of(part);
            let from = ((part.pages.start.0 - run.pages.start.0) * page_bytes) as usize;
            let content = &content[from..from + part.length as usize];
            self.copy_early(&part, content)?;
            self.early.current().set(part.pages, |_| ());
            told(part.pages);
        }
        self.planes.give_back(run.pages);
        drop(gate);
        Ok(())
    }

    /// Puts an early copy where an older one may lie.
    fn copy_early(&self, run: &RegionRun, content: &[u8]) -> Result<(), InstallError> {
        let no_memory = |error: &io::Error| InstallError::NoMemory {
            page: run.pages.start,
            errno: error.kind(),
        };
        self.empty_old(run.pages).map_err(|error| no_memory(&error))?;
        self.early.note_there(run.pages);
        let mut filled = self.fill(Fill::Early(content), run);
        if filled.stopped.is_none() && filled.present > 0 {
            // Somebody has written to guest memory that is still to come.
            self.zap(run).map_err(|error| no_memory(&error))?;
            filled = self.fill(Fill::Early(content), run);
        }
        match filled.stopped {
            Some(stopped) => {
                // What is left stays noted, if it cannot be emptied.
                let _ = self.empty_for_zero(run.pages);
                Err(self.install_error(run, filled.reached(), stopped))
            }
            None => Ok(()),
        }
    }

    /// Early copies that are zero: nothing is written, what lies there is emptied. `told` is
    /// called with what counts.
    pub(crate) fn zero_early(
        &self,
        pages: PageRange,
        pass: u16,
        mut told: impl FnMut(PageRange),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < pages.count {
            let count = ZERO_STEP.min(pages.count - done);
            let step = PageRange::new(PageNumber(pages.start.0 + done), count);
            done += count;
            for run in self.layout().split(step) {
                let mut claim = self.claim_early(run.pages, pass, false, &mut told);
                for won in claim.take() {
                    let emptied = self.zero_claimed(won, pass, &mut told);
                    self.give_back_zeros(won);
                    emptied?;
                }
            }
        }
        Ok(())
    }

    /// Gives claimed pages back that hold nothing, or an early copy that is zero.
    fn give_back_zeros(&self, won: PageRange) {
        let run = self.run_of(won);
        if let Some(file) = self.file_of(&run) {
            let gate = self.installing();
            let has_gone = !gate.is_empty();
            let gone: Vec<_> = won.iter().filter(|page| has_gone && gate.contains(*page)).collect();
            drop(gate);
            for page in gone {
                self.give_back_file_pages(PageRange::one(page), file);
            }
        }
        self.planes.give_back(won);
        if !self.early.is_taking() {
            self.wake(&run);
        }
    }

    fn zero_claimed(
        &self,
        won: PageRange,
        pass: u16,
        told: &mut impl FnMut(PageRange),
    ) -> io::Result<()> {
        let _gate = self.installing();
        if !self.early.takes(pass) {
            return Ok(());
        }
        self.empty_old(won)?;
        self.early.current().set(won, |_| ());
        told(won);
        Ok(())
    }
}
