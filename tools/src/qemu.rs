//! `afterimage-qemu`: moves a guest between two QEMUs that know nothing of it; and QEMU, as it is
//! talked to from outside.
//!
//! Answers for what is said to QEMU and in which order; how memory moves is the engine's affair,
//! and the destination's memory page-client's. `send` is the source's side, `receive` the
//! destination's, and where one process is both, `companion` runs the second.
//!
//! Invariant: at most one of both QEMUs is ever told to run the guest. The destination's is told
//! so only when that is on record there; the source's only when the engine has given it back.

mod capability;
mod companion;
pub mod guest;
mod line;
mod machine;
pub(crate) mod options;
mod past;
mod precopy;
mod qmp;
mod ram;
mod receive;
mod report;
mod send;
mod state;

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use crate::control::{Control, ControlOptions, Identity};
use crate::logging;
use crate::page_server::Failure;
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;
use capability::Side;
use companion::Companion;
pub use line::{Deadline, Lines, Speaker, unix_now};
use machine::Machine;
use options::{Command, Options};
use past::Record;
pub use qmp::{Event, Qmp};
use receive::{Ended, Heard, Observer};
use report::{Journal, Outcome, Report, micros};

/// Runs the command with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    logging::start("warn");
    let name = match &options.command {
        Command::Send { .. } => "send",
        Command::Receive { .. } => "receive",
        Command::Migrate { .. } => "migrate",
    };
    let report = run(&options.command, name).unwrap_or_else(|failure| {
        eprintln!("afterimage-qemu: {failure}");
        Report::failed(name, &failure)
    });
    if options.json {
        println!("{}", report.to_json());
    }
    report.exit_code()
}

fn run(command: &Command, name: &'static str) -> Result<Report, Failure> {
    // First, so that every thread has its signals blocked.
    let waiter = Waiter::new().map_err(Failure::of("wait for signals"))?;
    let progress = Progress::new("afterimage-qemu");
    let journal = Journal::new(name);
    let (qmp, source, destination) = match command {
        Command::Receive { qmp, destination } => {
            return receive_alone(qmp, destination, waiter, progress, journal);
        }
        Command::Send { qmp, source } => (qmp, source, None),
        Command::Migrate { source_qmp, destination_qmp, source, destination } => {
            (source_qmp, source, Some((destination_qmp, destination)))
        }
    };
    let control = open(&source.control)?;
    let record = Record::open(source.state.as_deref())?;
    let machine = Machine::connect(qmp, Side::Source)?;
    let mut journal = journal;
    journal.qemu("source_qemu", machine.pid);
    let companion = match destination {
        None => None,
        Some((qmp, destination)) => {
            Some(Companion::start(qmp.clone(), destination.clone(), waiter.waker())?)
        }
    };
    let desk = control.desk();
    let parts = send::Parts { waiter, progress, journal, desk, record, machine, companion };
    let report = send::run(source, parts)?;
    control.close(report.outcome().name());
    Ok(report)
}

fn open(options: &ControlOptions) -> Result<Control, Failure> {
    Control::open(options, Identity { tool: "afterimage-qemu", role: "source" })
}

/// The destination's side in a process of its own.
fn receive_alone(
    qmp: &afterimage::Address,
    options: &options::DestinationOptions,
    waiter: Waiter,
    progress: Progress,
    journal: Journal,
) -> Result<Report, Failure> {
    let mut alone = Alone { waiter, progress, journal, is_here: false };
    let ended = receive::run(qmp, options, &mut alone)?;
    let Alone { progress, mut journal, is_here, .. } = alone;
    let (outcome, failure) = match ended {
        Ended::Finished => {
            progress.say("every page is in place, and the source knows it");
            (Outcome::Finished, None)
        }
        Ended::NotHere(reason) => {
            progress.say(&format!(
                "the guest does not run here: {reason}; end this QEMU, its memory is gone"
            ));
            (Outcome::NotMoved, Some(Failure::new(reason)))
        }
        Ended::Stopped => {
            let rest = if is_here {
                "the guest runs here, and page-client brings the rest of its memory"
            } else {
                "the guest does not run here yet; the same command line goes on"
            };
            progress.say(&format!("stopped by a signal: {rest}"));
            (Outcome::Stopped, None)
        }
    };
    journal.note("ended");
    Ok(journal.close(outcome, failure.as_ref(), None))
}

struct Alone {
    waiter: Waiter,
    progress: Progress,
    journal: Journal,
    is_here: bool,
}

impl Observer for Alone {
    fn hear(&mut self, heard: Heard) {
        let (event, line) = match heard {
            Heard::Armed(_) => ("armed", "waiting for the guest; QEMU and its memory are ready"),
            Heard::State(bytes) => {
                self.journal.times.state_bytes = Some(bytes as u64);
                ("state", "the device state is here")
            }
            Heard::Loaded(time) => {
                self.journal.times.load_us = Some(micros(time));
                ("loaded", "QEMU has loaded it")
            }
            Heard::Run => ("run", "the guest is this side's"),
            Heard::Resumed(Some(_)) => {
                self.is_here = true;
                ("resumed", "the guest runs here")
            }
            Heard::Resumed(None) => {
                self.is_here = true;
                ("resumed", "the guest is here, paused as it was")
            }
            Heard::AllArrived => ("all_arrived", "every page is in place"),
            Heard::Line(line) => return self.progress.say(&line),
        };
        self.journal.note(event);
        self.progress.say(line);
    }

    fn is_stopped(&mut self) -> Result<bool, Failure> {
        let signals = self.waiter.wait(Duration::ZERO).map_err(Failure::of("wait for signals"))?;
        Ok(signals > 0)
    }
}

/// Why a QEMU, or its guest, has not said what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// A system call of this side failed.
    #[error("cannot {operation}")]
    Io {
        /// What was tried, and with what.
        operation: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A QEMU ended before its time.
    #[error("{who} ended: {said}")]
    Ended {
        /// Which one.
        who: String,
        /// The end of what it printed.
        said: String,
    },
    /// Something did not come in time.
    #[error("{who}: no {awaited} after {} s; it printed: {said}", limit.as_secs())]
    Late {
        /// Who should have said it.
        who: String,
        /// What was waited for.
        awaited: String,
        /// For how long.
        limit: Duration,
        /// The end of what QEMU printed.
        said: String,
    },
    /// QEMU refused a command.
    #[error("{who} refused {command}: {reason}")]
    Refused {
        /// Which one.
        who: String,
        /// The command of QMP.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// An answer that was not understood.
    #[error("{who} said {line:?}, which is not {expected}")]
    Answer {
        /// Who said it.
        who: String,
        /// What it said.
        line: String,
        /// What it should have been.
        expected: String,
    },
}
