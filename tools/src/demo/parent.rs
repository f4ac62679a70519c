//! The parent: starts all sides, watches them, and tells the story.
//!
//! Invariant: when it returns, all processes have ended and been waited for.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::error::{DemoError, Status, one_line};
use super::machine::{self, Choice};
use super::messages::{Command, Message, Setup, deadline, now_us, write_line};
use super::options::{Options, Role, Transport};
use super::progress::Bars;
use super::report::{Failure, Report, RoleProcess, SCHEMA_VERSION, Story};
use crate::report_page;
use crate::sampling::ArrivalSample;

/// How much longer than a role the parent waits: the role knows better what is wrong.
const PATIENCE: Duration = Duration::from_secs(10);

/// Moves a guest as the options say, and reports.
pub(super) fn run(options: &Options) -> Status {
    let (mut report, samples) = match move_guest(options) {
        Ok(moved) => moved,
        Err(error) => return fail(options, &error),
    };
    let page = options.report.as_ref().map_or(Ok(()), |it| report.write_page(it, &samples));
    let text = if options.json { json(&report) } else { report.to_string() };
    // If nobody listens, the status still says how it went.
    let _ = io::stdout().write_all(text.as_bytes());
    if let Err(error) = &page {
        eprintln!("demo: {error}");
    }
    if !report.verified {
        eprintln!("demo: the memory at the destination is wrong: {}", report.verification());
        return Status::Wrong;
    }
    page.map_or_else(|error| error.status(), |()| Status::Verified)
}

fn fail(options: &Options, error: &DemoError) -> Status {
    let status = error.status();
    eprintln!("demo: {error}");
    if options.json {
        let failure = Failure {
            schema_version: SCHEMA_VERSION,
            verified: false,
            exit_status: status as u8,
            error: error.to_string(),
        };
        let _ = io::stdout().write_all(json(&failure).as_bytes());
    }
    status
}

fn json(what: &impl serde::Serialize) -> String {
    // Numbers, strings and lists of them: this cannot fail.
    serde_json::to_string(what).expect("plain data serialises") + "\n"
}

fn move_guest(options: &Options) -> Result<(Report, Vec<ArrivalSample>), DemoError> {
    options.check()?;
    if let Some(directory) = &options.report {
        report_page::prepare(directory)
            .map_err(|error| DemoError::Usage(format!("--report: {}", one_line(&error))))?;
    }
    let choice = machine::choose(options.guest)?;
    machine::check_memory(options)?;
    if let Some(note) = &choice.note {
        eprintln!("demo: {note}");
    }
    // Holds the sockets, and goes with all that is in it.
    let directory = (options.transport == Transport::Unix || options.handoff)
        .then(|| {
            let failed = |error| DemoError::failed("cannot make a directory for sockets", &error);
            tempfile::Builder::new().prefix("afterimage-demo-").tempdir().map_err(failed)
        })
        .transpose()?;
    let setup = setup(options, &choice, directory.as_ref());
    let mut bars = Bars::new(options.backing().page_bytes());
    let story = Watch::start(&setup).and_then(|watch| watch.until_the_end(&mut bars));
    bars.clear();
    let mut story = story?;
    let samples = story.take_samples();
    Ok((Report::of(&setup, story)?, samples))
}

fn setup(options: &Options, choice: &Choice, directory: Option<&TempDir>) -> Setup {
    let socket = |name: &str| directory.map(|directory| directory.path().join(name));
    let listen = match options.transport {
        Transport::Unix => socket("pages").map(|path| format!("unix:{}", path.display())),
        Transport::Tcp => None,
    };
    Setup {
        parent: std::process::id() as i32,
        memory_bytes: options.memory.0,
        vcpus: options.vcpus,
        workload: options.workload,
        backing: options.backing(),
        guest: choice.kind,
        user_faults_only: choice.user_faults_only,
        transport: options.transport,
        streams: options.streams,
        bandwidth: options.bandwidth,
        checksums: options.checksums,
        worked_fraction: options.worked_fraction,
        zero_fraction: options.zero_fraction,
        listen: listen.unwrap_or_else(|| "tcp:127.0.0.1:0".to_owned()),
        handoff: socket("handoff").filter(|_| options.handoff),
        takes_samples: options.report.is_some(),
        limit: options.limit(),
        corrupt_one_byte: options.corrupt_one_byte,
    }
}

/// A process that plays a role. Dropped, it ends.
struct Process {
    role: Role,
    child: Child,
    /// Closed when the process has nothing more to hear.
    commands: Option<ChildStdin>,
}

/// What a process has said, or that it will say nothing more.
type Said = (Role, Option<Result<Message, serde_json::Error>>);

impl Process {
    fn start(role: Role, setup: &Setup, said: Sender<Said>) -> Result<Self, DemoError> {
        let failed =
            |error| DemoError::failed(&format!("cannot start the {}", role.name()), &error);
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = std::process::Command::new(program)
            .args(["--role", role.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let commands = child.stdin.take();
        let output = child.stdout.take();
        let mut process = Self { role, child, commands };
        process.tell(setup)?;
        let output = output.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if said.send((role, Some(serde_json::from_str(&line)))).is_err() {
                    return;
                }
            }
            // If the parent has stopped listening, it has ended the process as well.
            let _ = said.send((role, None));
        });
        Ok(process)
    }

    /// Says something to the process.
    fn tell(&mut self, what: &impl serde::Serialize) -> Result<(), DemoError> {
        let commands = self.commands.as_mut().ok_or(io::ErrorKind::BrokenPipe);
        commands.map_err(io::Error::from).and_then(|commands| write_line(commands, what)).map_err(
            |error| DemoError::failed(&format!("the {} does not listen", self.role.name()), &error),
        )
    }

    /// Collects a process whose output has ended, which the kernel is taking apart.
    fn collect(&mut self) -> Result<ExitStatus, DemoError> {
        self.child.wait().map_err(|error| DemoError::failed("cannot wait for a process", &error))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All sides, and what they have said so far.
struct Watch {
    source: Process,
    /// Where the source hands its guest over.
    page_server: Option<Process>,
    destination: Process,
    is_destination_prepared: bool,
    said: Receiver<Said>,
    story: Story,
    limit: Duration,
    step: &'static str,
}

impl Watch {
    fn start(setup: &Setup) -> Result<Self, DemoError> {
        let (sender, said) = crossbeam_channel::unbounded();
        let start = |role| Process::start(role, setup, sender.clone());
        let source = start(Role::Source)?;
        let page_server = setup.handoff.as_ref().map(|_| start(Role::PageServer)).transpose()?;
        let destination = start(Role::Destination)?;
        let roles = [Some(&source), page_server.as_ref(), Some(&destination)];
        let name =
            |process: &Process| RoleProcess { role: process.role.name(), pid: process.child.id() };
        let roles = roles.into_iter().flatten().map(name).collect();
        Ok(Self {
            source,
            page_server,
            destination,
            is_destination_prepared: false,
            said,
            story: Story { roles, ..Story::default() },
            limit: setup.limit + PATIENCE,
            step: "the processes start",
        })
    }

    /// Listens until the destination has verified and all have ended.
    fn until_the_end(mut self, bars: &mut Bars) -> Result<Story, DemoError> {
        let mut until = deadline(self.limit);
        let mut pages = 0;
        bars.step(self.step);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let (role, said) = self.said.recv_timeout(left).map_err(|error| self.silence(error))?;
            let message = match said {
                None => {
                    if self.ended(role)? {
                        return Ok(self.story);
                    }
                    continue;
                }
                Some(message) => message.map_err(|error| {
                    DemoError::failed(&format!("the {} babbles", role.name()), &error)
                })?,
            };
            if let Message::Progress(progress) = message {
                bars.show(progress);
                let complete =
                    progress.pages_requested + progress.pages_background + progress.pages_zero;
                if complete == pages {
                    continue;
                }
                pages = complete;
            } else {
                self.take(role, message)?;
                bars.step(self.step);
            }
            until = deadline(self.limit);
        }
    }

    fn take(&mut self, role: Role, message: Message) -> Result<(), DemoError> {
        match message {
            Message::Step(step) => self.step = step.name(),
            Message::Listening(address) => {
                if self.page_server.is_none() {
                    self.destination.tell(&Command::Connect(address.clone()))?;
                }
                self.story.address = Some(address);
                self.hand_over_if_all_wait()?;
            }
            Message::Prepared => {
                self.is_destination_prepared = true;
                self.hand_over_if_all_wait()?;
            }
            Message::HandedOver { stopped, at_us, sha256 } => {
                self.story.stopped = Some(stopped);
                self.story.sha256_source = Some(sha256);
                self.story.handed_over_at_us = Some(at_us);
                self.bury_the_source()?;
            }
            Message::Stopped(stopped) => {
                self.story.stopped = Some(stopped);
                if self.story.running_at_us.is_none() {
                    self.step = "the vCPUs move";
                }
            }
            Message::Running { at_us } => {
                self.story.running_at_us = Some(at_us);
                self.step = "the guest runs at the destination, and its memory follows";
            }
            Message::AllArrived { at_us } => {
                self.story.all_arrived_at_us = Some(at_us);
                self.step = "every page is there; the process that served them ends";
            }
            Message::Served { sha256 } => self.story.sha256_source = Some(sha256),
            Message::Done(done) => self.story.done = Some(*done),
            Message::Failed(error) => return Err(error.of(&format!("at the {}", role.name()))),
            // Shown, and nothing to remember.
            Message::Progress(_) => {}
        }
        Ok(())
    }

    /// Lets the source hand its guest over, once nobody would have to be waited for.
    fn hand_over_if_all_wait(&mut self) -> Result<(), DemoError> {
        let is_awaited = self.page_server.is_some() && self.is_destination_prepared;
        if is_awaited && self.story.address.is_some() {
            self.source.tell(&Command::HandOver)?;
        }
        Ok(())
    }

    /// Ends the source, which has handed its guest over. The destination connects only
    /// after that, so that no page can be sent before.
    fn bury_the_source(&mut self) -> Result<(), DemoError> {
        let address = self.story.address.clone();
        let address = address.ok_or_else(|| {
            DemoError::Failed("the guest was handed over before anybody listened".to_owned())
        })?;
        self.source
            .child
            .kill()
            .map_err(|error| DemoError::failed("cannot kill the source", &error))?;
        let status = self.source.collect()?;
        if status.signal() != Some(Signal::SIGKILL as i32) {
            return Err(DemoError::Failed(format!(
                "the source was to be killed, and ended by {status}"
            )));
        }
        self.story.source_exit_at_us = Some(now_us());
        self.step = "the source's VMM is dead; the vCPUs move";
        self.destination.tell(&Command::Connect(address))
    }

    /// A process has ended. `true` if that was the last thing to wait for.
    fn ended(&mut self, role: Role) -> Result<bool, DemoError> {
        let is_dead = self.story.source_exit_at_us.is_some();
        let (process, is_done) = match (role, &mut self.page_server) {
            (Role::Source, Some(_)) if is_dead => return Ok(false),
            (Role::PageServer, Some(page_server)) => (page_server, is_dead),
            (Role::Source | Role::PageServer, _) => {
                (&mut self.source, self.story.sha256_source.is_some())
            }
            (Role::Destination, _) => (&mut self.destination, self.story.done.is_some()),
        };
        let pid = process.child.id();
        let status = process.collect()?;
        if !is_done || !status.success() {
            return Err(DemoError::Failed(format!(
                "the {} (process {pid}) ended too early, by {status}, while {}",
                role.name(),
                self.step
            )));
        }
        if role == Role::Destination {
            return Ok(self.story.has_source_ended());
        }
        match role {
            Role::PageServer => self.story.page_server_exit_at_us = Some(now_us()),
            _ => self.story.source_exit_at_us = Some(now_us()),
        }
        self.destination.tell(&Command::SourceExited)?;
        self.step = "the guest runs on, without the source";
        Ok(false)
    }

    fn silence(&self, error: RecvTimeoutError) -> DemoError {
        DemoError::Failed(match error {
            RecvTimeoutError::Timeout => format!(
                "nothing happened for {} s while {}; give more time with --timeout, or see more \
                 with RUST_LOG=debug",
                self.limit.as_secs(),
                self.step
            ),
            RecvTimeoutError::Disconnected => {
                format!("all processes ended while {}", self.step)
            }
        })
    }
}
