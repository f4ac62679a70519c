//! The Linux guest of the tests and of the bench, as it is spoken with: the other end of its
//! second serial port.
//!
//! Its workload (`tests/qemu/guest/workload.rs`) says what the lines mean; the version is
//! compared, because the initrd may be older than this code.

use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Deadline, Lines, QmpError, unix_now};

/// What the workload of `tests/qemu/guest` speaks.
const VERSION: u32 = 2;

/// Boot and filling, emulated, on a machine that may be busy.
const FILLING: Duration = Duration::from_mins(5);
const ANSWER: Duration = Duration::from_mins(1);

/// What the guest says once its memory is filled.
#[derive(Clone, Debug, Deserialize)]
#[non_exhaustive]
pub struct Filled {
    #[serde(rename = "filled")]
    version: u32,
    /// Threads that work, each on pages of its own: one for each vCPU.
    pub workers: usize,
    /// Pages of the working set.
    pub pages: u64,
    /// From which on a touch is noted one by one, in nanoseconds.
    pub gap_ns: u64,
    /// The guest's clock.
    pub clocksource: String,
    /// The version of its kernel.
    pub kernel: String,
}

/// A touch that took long.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Gap {
    /// When it began, since the mark.
    pub at_us: u64,
    /// How long it took.
    pub took_ns: u64,
    /// How long before that its page had last been touched.
    pub age_us: u64,
}

impl Gap {
    /// When it ended, since the mark.
    #[must_use]
    pub const fn end_us(self) -> u64 {
        self.at_us + self.took_ns / 1000
    }
}

/// The guest's figures since its last mark, by its own clock.
#[derive(Clone, Debug, Deserialize)]
pub struct GuestReport {
    /// Since the mark.
    pub elapsed_us: u64,
    /// Touches since the mark.
    pub operations: u64,
    /// Touches that read a wrong word, since the boot.
    pub wrong: u64,
    /// How long a slot is.
    pub slot_us: u64,
    /// Touches in each slot since the mark.
    pub slots: Vec<u32>,
    /// Touches that took long, for which there was no room.
    pub gaps_lost: u64,
    /// Touches that took long.
    pub gaps: Vec<Gap>,
}

/// All words of all pages, compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Verified {
    /// How many pages were compared.
    #[serde(rename = "verified")]
    pub pages: u64,
    /// How many of them have a wrong word.
    pub wrong: u64,
}

/// The instant from which the guest's figures count.
#[derive(Clone, Copy, Debug)]
pub struct Marked {
    /// By the host's wall clock, since 1970.
    pub host: Duration,
    /// By the guest's clock, since the workload began.
    pub guest_us: u64,
}

impl Marked {
    /// By how much the guest's clock fell behind the host's since another mark, in microseconds.
    #[must_use]
    pub fn behind_us(self, before: Self) -> i64 {
        let host = self.host.saturating_sub(before.host).as_micros() as i64;
        host - self.guest_us.saturating_sub(before.guest_us) as i64
    }
}

/// A guest, where it runs now.
#[derive(Debug)]
pub struct Guest {
    lines: Lines,
}

impl Guest {
    /// The one at the other end of these.
    #[must_use]
    pub const fn new(lines: Lines) -> Self {
        Self { lines }
    }

    /// Waits until it has booted and filled its memory, for up to five minutes.
    ///
    /// # Errors
    /// [`QmpError`] if it ends, says nothing, or is of another version.
    pub fn wait_filled(&mut self) -> Result<Filled, QmpError> {
        let line = self.lines.next("word that its memory is filled", Deadline::after(FILLING))?;
        let expected = "this version's greeting: bring the guest again, by tests/qemu/guest/get \
                        for the tests, by benches/qemu/get for the bench";
        let filled: Option<Filled> = serde_json::from_str(&line).ok();
        filled
            .filter(|filled| filled.version == VERSION)
            .ok_or_else(|| self.lines.misunderstood(&line, expected))
    }

    /// Lets the guest's figures begin anew.
    ///
    /// # Errors
    /// [`QmpError`] if it does not answer, as for all that it is asked.
    pub fn mark(&mut self) -> Result<Marked, QmpError> {
        #[derive(Deserialize)]
        struct Answer {
            marked_us: u64,
        }
        let Answer { marked_us } = self.ask("mark")?;
        // The guest takes its time just before it answers; the way back is short.
        Ok(Marked { host: unix_now(), guest_us: marked_us })
    }

    /// Its figures since the mark.
    ///
    /// # Errors
    /// As [`mark`](Self::mark).
    pub fn report(&mut self) -> Result<GuestReport, QmpError> {
        self.ask("report")
    }

    /// Has every page compared; the workload stands still meanwhile.
    ///
    /// # Errors
    /// As [`mark`](Self::mark).
    pub fn verify(&mut self) -> Result<Verified, QmpError> {
        self.ask("verify")
    }

    fn ask<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, QmpError> {
        self.lines.send(command)?;
        let line = self.lines.next(&format!("answer to {command:?}"), Deadline::after(ANSWER))?;
        let expected = format!("an answer to {command:?}");
        serde_json::from_str(&line).map_err(|_| self.lines.misunderstood(&line, &expected))
    }
}
