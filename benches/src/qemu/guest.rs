//! The driver's end of the guest's second serial port.
//!
//! The workload (`benches/qemu/guest/workload.rs`) says what the lines mean; its version
//! is compared, because the initrd may be older than this code.

use std::time::Duration;

use afterimage_tools::qemu::{Deadline, Lines, unix_now};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::QemuError;

/// What the workload of `benches/qemu/guest` speaks.
const VERSION: u32 = 1;

/// Boot and filling, emulated, on a machine that may be busy.
const FILLING: Duration = Duration::from_mins(5);
const ANSWER: Duration = Duration::from_mins(1);

/// What the guest says once its memory is filled.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Filled {
    #[serde(rename = "filled")]
    version: u32,
    pub(super) gap_ns: u64,
    pub(super) clocksource: String,
    pub(super) kernel: String,
}

/// A touch that took long.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Gap {
    /// When it began, since the mark.
    pub(super) at_us: u64,
    pub(super) took_ns: u64,
    /// How long before that its page had last been touched.
    pub(super) age_us: u64,
}

impl Gap {
    pub(super) fn end_us(self) -> u64 {
        self.at_us + self.took_ns / 1000
    }
}

/// The guest's figures since its last mark, by its own clock.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct GuestReport {
    pub(super) elapsed_us: u64,
    pub(super) operations: u64,
    /// Touches that read a wrong word, since the boot.
    pub(super) wrong: u64,
    pub(super) slot_us: u64,
    pub(super) slots: Vec<u32>,
    pub(super) gaps_lost: u64,
    pub(super) gaps: Vec<Gap>,
}

/// All words of all pages, compared.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Verified {
    #[serde(rename = "verified")]
    pub(super) pages: u64,
    pub(super) wrong: u64,
}

/// The instant from which the guest's figures count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Marked {
    /// By the host's wall clock, since 1970.
    pub(super) host: Duration,
    /// By the guest's clock, since the workload began.
    pub(super) guest_us: u64,
}

impl Marked {
    /// By how much the guest's clock fell behind the host's since another mark.
    pub(super) fn behind_us(self, before: Self) -> i64 {
        let host = self.host.saturating_sub(before.host).as_micros() as i64;
        host - self.guest_us.saturating_sub(before.guest_us) as i64
    }
}

#[derive(Debug)]
pub(super) struct Guest {
    lines: Lines,
}

impl Guest {
    pub(super) fn new(lines: Lines) -> Self {
        Self { lines }
    }

    pub(super) fn wait_filled(&mut self) -> Result<Filled, QemuError> {
        let line = self.lines.next("word that its memory is filled", Deadline::after(FILLING))?;
        let expected = "this version's greeting: run benches/qemu/get again";
        let filled: Option<Filled> = serde_json::from_str(&line).ok();
        filled
            .filter(|filled| filled.version == VERSION)
            .ok_or_else(|| self.lines.misunderstood(&line, expected).into())
    }

    /// Lets the guest's figures begin anew.
    pub(super) fn mark(&mut self) -> Result<Marked, QemuError> {
        #[derive(Deserialize)]
        struct Answer {
            marked_us: u64,
        }
        let Answer { marked_us } = self.ask("mark")?;
        // The guest takes its time just before it answers; the way back is short.
        Ok(Marked { host: unix_now(), guest_us: marked_us })
    }

    pub(super) fn report(&mut self) -> Result<GuestReport, QemuError> {
        self.ask("report")
    }

    /// Has every page compared; the workload stands still meanwhile.
    pub(super) fn verify(&mut self) -> Result<Verified, QemuError> {
        self.ask("verify")
    }

    fn ask<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, QemuError> {
        self.lines.send(command)?;
        let line = self.lines.next(&format!("answer to {command:?}"), Deadline::after(ANSWER))?;
        let expected = format!("an answer to {command:?}");
        serde_json::from_str(&line).map_err(|_| self.lines.misunderstood(&line, &expected).into())
    }
}
