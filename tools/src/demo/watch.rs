//! All processes of a migration, from their start to their end, and what befalls them.
//!
//! Invariant: nothing is waited for without a limit, and when a watch ends, so have all
//! processes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use nix::sys::signal::Signal;

use super::error::DemoError;
use super::messages::{Command, Message, Progress, Setup, Stats, deadline, now_us};
use super::options::Role;
use super::outages::{Blow, Outages};
use super::process::{Process, Said};
use super::progress::Bars;
use super::proxy::Proxy;
use super::report::{RoleProcess, Story};

/// How much longer than a role the parent waits: the role knows better what is wrong.
const PATIENCE: Duration = Duration::from_secs(10);

/// All sides, and what they have said so far.
pub(super) struct Watch {
    setup: Setup,
    source: Process,
    /// Where the source hands its guest over.
    page_server: Option<Process>,
    destination: Process,
    /// Who serves the destination.
    page_client: Option<Process>,
    keeper: Option<Process>,
    /// The network, if it is one that can be cut.
    proxy: Option<Proxy>,
    outages: Outages,
    room_made: RoomMade,
    reached: BTreeSet<Milestone>,
    sender: Sender<Said>,
    said: Receiver<Said>,
    interrupts: Receiver<Signal>,
    /// What was counted, by process.
    counted: BTreeMap<u32, Stats>,
    story: Story,
    limit: Duration,
    step: &'static str,
}

/// When room was made for the background, and how many bytes of it had passed then.
#[derive(Clone, Copy, Debug, Default)]
struct RoomMade {
    at_us: u64,
    passed: u64,
}

/// What others wait for, or the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Milestone {
    /// The destination can connect.
    Prepared,
    /// It can have its memory served by the page-client.
    ClientOpen,
    /// The source has been asked to hand over.
    AskedToHandOver,
    DestinationEnded,
    ClientEnded,
}

impl Watch {
    /// Starts all processes. `interrupts` says when to give up.
    pub(super) fn start(
        setup: Setup,
        proxy: Option<Proxy>,
        outages: Outages,
        interrupts: Receiver<Signal>,
    ) -> Result<Self, DemoError> {
        let (sender, said) = crossbeam_channel::unbounded();
        let limit = setup.limit + PATIENCE;
        let mut roles = Vec::new();
        let mut start = |role| {
            let process = Process::start(role, &setup, sender.clone())?;
            roles.push(process.name());
            Ok(process)
        };
        let keeper = setup.keeper.as_ref().map(|_| start(Role::Keeper)).transpose()?;
        if keeper.is_some() {
            wait_until_it_listens(&said, limit)?;
        }
        let source = start(Role::Source)?;
        let page_server = setup.handoff.as_ref().map(|_| start(Role::PageServer)).transpose()?;
        let destination = start(Role::Destination)?;
        Ok(Self {
            source,
            page_server,
            destination,
            page_client: None,
            keeper,
            proxy,
            outages,
            room_made: RoomMade::default(),
            reached: BTreeSet::new(),
            sender,
            said,
            interrupts,
            counted: BTreeMap::new(),
            story: Story { roles, ..Story::default() },
            limit,
            step: "the processes start",
            setup,
        })
    }

    /// Listens until the destination has verified and all have ended.
    pub(super) fn until_the_end(mut self, bars: &mut Bars) -> Result<Story, DemoError> {
        let mut until = deadline(self.limit);
        let mut pages = 0;
        bars.step(self.step);
        loop {
            let (who, said) = self.hear(until)?;
            let message = match said {
                None => {
                    if self.ended(who)? {
                        return Ok(self.finish());
                    }
                    continue;
                }
                Some(message) => message.map_err(|error| {
                    DemoError::failed(&format!("the {} babbles", who.role.name()), &error)
                })?,
            };
            let is_forward = match message {
                Message::Progress(progress) => {
                    bars.show(&progress);
                    let complete = progress.stats.as_ref().map_or(0, |it| it.pages_complete);
                    self.follow(who, *progress)?;
                    let before = pages;
                    pages = pages.max(complete);
                    pages > before
                }
                // Who connects over and over again gets nowhere.
                Message::Attached => {
                    self.story.connections += 1;
                    self.outages.attached();
                    false
                }
                Message::Pass(pass) => {
                    bars.pass(&pass);
                    self.story.passes.push(pass);
                    true
                }
                message => {
                    self.take(who.role, message)?;
                    bars.step(self.step);
                    true
                }
            };
            if is_forward {
                until = deadline(self.limit);
            }
        }
    }

    /// What is said next, by anybody.
    fn hear(&self, until: Instant) -> Result<Said, DemoError> {
        let left = until.saturating_duration_since(Instant::now());
        crossbeam_channel::select! {
            // There is always a sender: the one for processes that are started again.
            recv(self.said) -> said => said.map_err(|_| self.silence()),
            recv(self.interrupts) -> signal => Err(DemoError::Failed(match signal {
                Ok(signal) => format!("stopped by {signal} while {}", self.step),
                Err(_) => "signals cannot be waited for any more".to_owned(),
            })),
            default(left) => Err(self.silence()),
        }
    }

    /// Takes in how far things are, and does what is due then.
    fn follow(&mut self, who: RoleProcess, progress: Progress) -> Result<(), DemoError> {
        self.outages.take(&progress);
        let at_us = progress.stats.as_ref().map(|_| progress.at_us);
        if let Some(stats) = progress.stats {
            self.counted.insert(who.pid, stats);
        }
        // Without passes there is nothing to be held up before the guest runs.
        if (self.story.running_at_us.is_some() || self.setup.tells_of_passes)
            && let Some(blow) = self.outages.due()
        {
            self.strike(blow)?;
        }
        if let Some(at_us) = at_us {
            self.make_room(at_us);
        }
        Ok(())
    }

    /// Lets so much of the background come that nothing is missed however late this process is.
    fn make_room(&mut self, told_at_us: u64) {
        let Some(proxy) = &self.proxy else { return };
        // What has passed since then may or may not have been counted in.
        if told_at_us < self.room_made.at_us {
            return;
        }
        let page_bytes = self.setup.backing.page_bytes();
        let room = self.outages.room();
        let bytes = room.map_or(u64::MAX, |pages| pages.saturating_mul(page_bytes));
        proxy.allow(self.room_made.passed.saturating_add(bytes));
        self.room_made = RoomMade { at_us: now_us(), passed: proxy.passed() };
    }

    fn strike(&mut self, blow: Blow) -> Result<(), DemoError> {
        let at_us = now_us();
        let is_struck = match blow {
            // Nothing is cut where everybody has hung up, because the session is over.
            Blow::Cut(how) => self.proxy.as_ref().is_some_and(|proxy| proxy.cut(how) > 0),
            Blow::Kill(role) => self.kill_and_restart(role)?,
        };
        if is_struck {
            self.outages.begin(blow, at_us);
        }
        Ok(())
    }

    /// Whether there was somebody to kill: one that has done all of its work has ended.
    fn kill_and_restart(&mut self, role: Role) -> Result<bool, DemoError> {
        let process = match role {
            Role::PageServer => &mut self.page_server,
            _ => &mut self.page_client,
        };
        let Some(process) = process else { return Ok(false) };
        if role == Role::PageServer
            && let Some(proxy) = &self.proxy
        {
            // Its successor says where it listens.
            proxy.lead(None);
        }
        if !process.kill()? {
            return Ok(false);
        }
        *process = Process::start(role, &self.setup, self.sender.clone())?;
        self.story.roles.push(process.name());
        Ok(true)
    }

    fn take(&mut self, role: Role, message: Message) -> Result<(), DemoError> {
        match message {
            Message::Step(step) => self.step = step.name(),
            Message::Listening(address) => self.listens(role, address)?,
            Message::Prepared => {
                self.reached.insert(Milestone::Prepared);
                self.hand_over_if_all_wait()?;
            }
            Message::HandedOver { stopped, at_us, sha256 } => {
                self.story.stopped = Some(stopped);
                self.story.sha256_source = Some(sha256);
                self.story.handed_over_at_us = Some(at_us);
                self.bury_the_source()?;
            }
            Message::Stopped(stopped) => {
                self.outages.stopped();
                self.story.stopped = Some(stopped);
                self.outages_after_passes();
                if self.story.running_at_us.is_none() {
                    self.step = "the vCPUs move";
                }
            }
            Message::Running { at_us } => {
                self.story.running_at_us = Some(at_us);
                self.outages_after_passes();
                self.step = "the guest runs at the destination, and its memory follows";
            }
            Message::AllArrived { at_us } => {
                self.story.all_arrived_at_us = Some(at_us);
                self.step = "every page is there; the process that served them ends";
            }
            Message::Served { sha256 } => self.story.sha256_source = Some(sha256),
            Message::Done(done) => self.story.done = Some(*done),
            Message::Stayed(stayed) => {
                self.story.stayed = Some(*stayed);
                self.step = "the guest is at the source; the processes end";
                self.destination.tell(&Command::StaysAtSource)?;
            }
            Message::Failed(error) => return Err(error.of(&format!("at the {}", role.name()))),
            // Followed already.
            Message::Progress(_) | Message::Attached | Message::Pass(_) => {}
        }
        Ok(())
    }

    /// Plans what is left of the outages once both sides have told of the switchover, in whichever
    /// order.
    fn outages_after_passes(&mut self) {
        if self.story.stopped.is_some() && self.story.running_at_us.is_some() {
            // These were stale when it was stopped, whatever it wrote later.
            self.outages.runs(self.story.passes.last().map_or(0, |pass| pass.pages_written));
        }
    }

    /// Somebody can be connected to.
    fn listens(&mut self, role: Role, address: String) -> Result<(), DemoError> {
        match role {
            Role::PageClient => {
                self.reached.insert(Milestone::ClientOpen);
                if self.page_server.is_none() {
                    self.connect()?;
                }
            }
            Role::Source | Role::PageServer => {
                if let Some(proxy) = &self.proxy {
                    let target = address.parse();
                    let target =
                        target.map_err(|error| DemoError::failed("nobody can connect", &error))?;
                    proxy.lead(Some(target));
                }
                if self.story.address.is_none() {
                    self.story.address = Some(address);
                    self.open_the_way()?;
                }
            }
            Role::Destination | Role::Keeper => {}
        }
        self.hand_over_if_all_wait()
    }

    /// It is known where pages come from.
    fn open_the_way(&mut self) -> Result<(), DemoError> {
        let way = self.way();
        if let Some(client) = &mut self.setup.page_client {
            client.source = way;
            let process = Process::start(Role::PageClient, &self.setup, self.sender.clone())?;
            self.story.roles.push(process.name());
            self.page_client = Some(process);
        } else if self.page_server.is_none() {
            self.connect()?;
        }
        Ok(())
    }

    /// Where the destination's side connects.
    fn way(&self) -> String {
        let proxy = self.proxy.as_ref().map(|proxy| proxy.address().to_string());
        proxy.or_else(|| self.story.address.clone()).unwrap_or_default()
    }

    /// Lets the destination have its memory served.
    fn connect(&mut self) -> Result<(), DemoError> {
        if self.story.stayed.is_some() {
            return Ok(());
        }
        let command = match &self.setup.page_client {
            Some(client) => Command::Attach(client.attach.clone()),
            None => Command::Connect(self.way()),
        };
        self.destination.tell(&command)
    }

    /// Lets the source hand its guest over, once nobody would have to be waited for.
    fn hand_over_if_all_wait(&mut self) -> Result<(), DemoError> {
        let has = |milestone| self.reached.contains(&milestone);
        let is_client_open = has(Milestone::ClientOpen) || self.setup.page_client.is_none();
        let is_awaited = self.page_server.is_some() && has(Milestone::Prepared) && is_client_open;
        if is_awaited
            && self.story.address.is_some()
            && self.reached.insert(Milestone::AskedToHandOver)
        {
            self.source.tell(&Command::HandOver)?;
        }
        Ok(())
    }

    /// Ends the source, which has handed its guest over. The destination connects only
    /// after that, so that no page can be sent before.
    fn bury_the_source(&mut self) -> Result<(), DemoError> {
        if self.story.address.is_none() {
            let what = "the guest was handed over before anybody listened";
            return Err(DemoError::Failed(what.to_owned()));
        }
        if !self.source.kill()? {
            let what = "the source was to be killed, and ended by itself";
            return Err(DemoError::Failed(what.to_owned()));
        }
        self.story.source_exit_at_us = Some(now_us());
        self.step = "the source's VMM is dead; the vCPUs move";
        self.connect()
    }

    /// A process has ended. `true` if that was the last thing to wait for.
    fn ended(&mut self, who: RoleProcess) -> Result<bool, DemoError> {
        let is_dead = self.story.source_exit_at_us.is_some();
        let stayed = self.story.stayed.is_some();
        let (process, is_done) = match who.role {
            Role::Source if is_dead => return Ok(false),
            Role::Source => (Some(&mut self.source), stayed || self.story.sha256_source.is_some()),
            Role::PageServer => (self.page_server.as_mut(), is_dead),
            Role::PageClient => (self.page_client.as_mut(), true),
            Role::Keeper => (self.keeper.as_mut(), false),
            Role::Destination => (Some(&mut self.destination), stayed || self.story.done.is_some()),
        };
        // One that was killed has a successor.
        let Some(process) = process.filter(|process| process.name() == who) else {
            return Ok(false);
        };
        let status = process.collect()?;
        if !is_done || !status.success() {
            return Err(DemoError::Failed(format!(
                "the {} (process {}) ended too early, by {status}, while {}",
                who.role.name(),
                who.pid,
                self.step
            )));
        }
        match who.role {
            Role::Destination => drop(self.reached.insert(Milestone::DestinationEnded)),
            Role::PageClient => drop(self.reached.insert(Milestone::ClientEnded)),
            Role::PageServer => self.story.page_server_exit_at_us = Some(now_us()),
            _ => self.story.source_exit_at_us = Some(now_us()),
        }
        if matches!(who.role, Role::Source | Role::PageServer) && !stayed {
            self.destination.tell(&Command::SourceExited)?;
            self.step = "the guest runs on, without the source";
        }
        let has = |milestone| self.reached.contains(&milestone);
        let has_client_ended = has(Milestone::ClientEnded) || self.page_client.is_none();
        Ok(has(Milestone::DestinationEnded) && has_client_ended && self.story.has_source_ended())
    }

    /// The whole story.
    fn finish(self) -> Story {
        let stats = Stats::sum(self.counted.into_values());
        Story { stats, outages: self.outages.into_past(), ..self.story }
    }

    fn silence(&self) -> DemoError {
        DemoError::Failed(format!(
            "nothing happened for {} s while {}; give more time with --timeout, or see more with \
             RUST_LOG=debug",
            self.limit.as_secs(),
            self.step
        ))
    }
}

/// Waits for the keeper, which is the only one that speaks.
fn wait_until_it_listens(said: &Receiver<Said>, limit: Duration) -> Result<(), DemoError> {
    let heard = said.recv_timeout(limit);
    match heard.ok().and_then(|(_, message)| message) {
        Some(Ok(Message::Listening(_))) => Ok(()),
        Some(Ok(Message::Failed(error))) => Err(error.of("at the keeper")),
        _ => Err(DemoError::Failed("the keeper did not start".to_owned())),
    }
}
