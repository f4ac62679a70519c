//! Tracing both processes: every system call of every thread of the engine is seen, and
//! threads are held where the order of things would else be chance's.
//!
//! Everything happens on one thread, the tracer: it makes the children, and the kernel tells
//! it alone of their stops.

use super::calls::{Call, Tally};
use super::common::children;
use super::roles::{Mark, Scenario, Who};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// Which threads are held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holds {
    /// The source's background stream does not begin.
    pub(crate) background: bool,
    /// The source does not answer before the destination's fault thread sleeps, as it does
    /// over any real network.
    pub(crate) answers: bool,
    /// No connection is closed, so that threads at the end of their work stay in the call
    /// in which they wait for more.
    pub(crate) endings: bool,
}

/// Why a thread is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    AtStep,
    Background,
    Answer,
    Ending,
}

struct Thread {
    side: Side,
    who: Option<Who>,
    /// The call that it is in.
    inside: Option<Call>,
    held: Option<Held>,
    tally: Tally,
}

/// Both processes of a scenario.
pub(crate) struct Tracer {
    threads: HashMap<Pid, Thread>,
    leaders: Vec<(Pid, Side)>,
    pub(crate) holds: Holds,
    window: Option<Instant>,
    port: Option<u16>,
    is_lacking: bool,
    /// Only the thread that made the children may trace them.
    _of_this_thread: PhantomData<*const ()>,
}

/// What was called while a window was open.
pub(crate) struct Seen {
    tallies: Vec<(Side, Who, Tally)>,
    pub(crate) time: Duration,
}

impl Seen {
    /// All threads of one kind together.
    pub(crate) fn of(&self, side: Side, who: Who) -> Tally {
        let mut sum = Tally::default();
        for (_, _, tally) in self.tallies.iter().filter(|(s, w, _)| (*s, *w) == (side, who)) {
            sum.add(tally);
        }
        sum
    }
}

impl Tracer {
    /// Starts both sides and lets them come as far as the destination's first step. `None`
    /// where the machine lacks the memory, which a child has said aloud.
    pub(crate) fn start(scenario: &Scenario) -> io::Result<Option<Self>> {
        let mut tracer = Self {
            threads: HashMap::new(),
            leaders: Vec::new(),
            holds: Holds { background: true, answers: true, endings: true },
            window: None,
            port: None,
            is_lacking: false,
            _of_this_thread: PhantomData,
        };
        tracer.spawn(Side::Source, "roles::child_source", &scenario.source_argument())?;
        tracer.until(|it| it.port.is_some() || it.is_lacking);
        if let Some(port) = tracer.port {
            let argument = scenario.destination_argument(port);
            tracer.spawn(Side::Destination, "roles::child_destination", &argument)?;
            tracer.until(|it| it.is_at_step() || it.is_lacking);
        }
        Ok((!tracer.is_lacking).then_some(tracer))
    }

    fn spawn(&mut self, side: Side, entry: &str, argument: &str) -> io::Result<()> {
        let mut command = children::command(entry, argument);
        command.stdout(Stdio::null());
        // SAFETY: one system call, which may be made between fork and exec.
        unsafe { command.pre_exec(|| ptrace::traceme().map_err(io::Error::from)) };
        let id = Pid::from_raw(command.spawn()?.id() as i32);
        // It stops when its program begins.
        waitpid(id, None)?;
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(id, options)?;
        self.leaders.push((id, side));
        self.threads.insert(id, Thread::new(side));
        ptrace::syscall(id, None)?;
        Ok(())
    }

    /// Lets the children run until something is so.
    pub(crate) fn until(&mut self, is_so: impl Fn(&Self) -> bool) {
        while !is_so(self) {
            self.next_stop();
        }
    }

    /// Whether the guest's thread stands at a step.
    pub(crate) fn is_at_step(&self) -> bool {
        self.threads.values().any(|thread| thread.held == Some(Held::AtStep))
    }

    /// Lets the guest's thread go on from its step to the next.
    pub(crate) fn step(&mut self) {
        self.release(|held| held == Held::AtStep);
        self.until(Self::is_at_step);
    }

    /// Whether all threads of a kind are in a call of this kind, or have ended.
    pub(crate) fn all_in(&self, side: Side, who: Who, call: Call) -> bool {
        let mut threads = self.threads.values().filter(|it| it.side == side && it.who == Some(who));
        threads.all(|thread| thread.held.is_none() && thread.inside == Some(call))
    }

    fn has(&self, side: Side, who: Who) -> bool {
        self.threads.values().any(|it| it.side == side && it.who == Some(who))
    }

    /// Lets the children run until every channel is open and nobody has anything to do
    /// about a fault.
    pub(crate) fn until_quiet(&mut self) {
        use Side::{Destination, Source};
        self.until(|it| {
            it.has(Source, Who::Request)
                && it.has(Source, Who::Background)
                && it.has(Destination, Who::Background)
                && it.all_in(Destination, Who::Fault, Call::Wait)
                && it.all_in(Source, Who::Request, Call::Receive)
                && it.all_in(Destination, Who::Background, Call::Receive)
        });
    }

    /// Counts from here.
    pub(crate) fn open_window(&mut self) {
        for thread in self.threads.values_mut() {
            thread.tally = Tally::default();
        }
        self.window = Some(Instant::now());
    }

    /// What a kind of thread has called since the window was opened.
    pub(crate) fn tally(&self, side: Side, who: Who) -> Tally {
        let mut sum = Tally::default();
        let threads = self.threads.values();
        for thread in threads.filter(|it| it.side == side && it.who == Some(who)) {
            sum.add(&thread.tally);
        }
        sum
    }

    /// Counts no more.
    pub(crate) fn close_window(&mut self) -> Seen {
        let opened = self.window.take().expect("a window");
        let tallies = self
            .threads
            .values()
            .filter_map(|thread| thread.who.map(|who| (thread.side, who, thread.tally.clone())));
        Seen { tallies: tallies.collect(), time: opened.elapsed() }
    }

    /// Lets everybody go on to the end, which must be a good one.
    pub(crate) fn finish(mut self) {
        self.holds = Holds { background: false, answers: false, endings: false };
        self.release(|_| true);
        while !self.leaders.is_empty() {
            self.next_stop();
            self.release(|_| true);
        }
    }

    fn next_stop(&mut self) {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        match waitpid(None, Some(flags)).expect("a child that runs") {
            WaitStatus::PtraceSyscall(id) => self.at_call(id),
            WaitStatus::PtraceEvent(id, ..) => go_on(id, None),
            // How a new thread begins.
            WaitStatus::Stopped(id, Signal::SIGSTOP) => {
                self.thread(id);
                go_on(id, None);
            }
            WaitStatus::Stopped(id, signal) => go_on(id, Some(signal)),
            WaitStatus::Exited(id, status) => self.ended(id, status == 0),
            WaitStatus::Signaled(id, ..) => self.ended(id, false),
            other => panic!("an unexpected state of a child: {other:?}"),
        }
        self.release_who_may();
    }

    fn ended(&mut self, id: Pid, well: bool) {
        self.threads.remove(&id);
        if let Some(at) = self.leaders.iter().position(|(leader, _)| *leader == id) {
            let (_, side) = self.leaders.remove(at);
            assert!(well, "the child that plays the {side:?} failed");
        }
    }

    /// A thread, which may not have been seen before.
    fn thread(&mut self, id: Pid) -> &mut Thread {
        let leaders = &self.leaders;
        self.threads.entry(id).or_insert_with(|| {
            let process = process_of(id);
            let (_, side) =
                leaders.iter().find(|(leader, _)| *leader == process).expect("a thread of a child");
            Thread::new(*side)
        })
    }

    fn at_call(&mut self, id: Pid) {
        // It may have been killed.
        let Ok(info) = ptrace::syscall_info(id) else { return };
        let holds = self.holds;
        let is_counted = self.window.is_some();
        let thread = self.thread(id);
        let mut held = None;
        let mut mark = None;
        if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
            // SAFETY: `op` says which part of the union is there.
            let entry = unsafe { info.u.entry };
            mark = Mark::heard(entry.nr, &entry.args);
            held = match mark {
                Some(Mark::Step) => Some(Held::AtStep),
                Some(Mark::Thread(Who::Background))
                    if thread.side == Side::Source && holds.background =>
                {
                    Some(Held::Background)
                }
                _ => None,
            };
            if mark.is_none() {
                let call = Call::of(entry.nr, &entry.args);
                held = (call == Call::Shutdown && holds.endings).then_some(Held::Ending);
                thread.inside = Some(call);
                if is_counted {
                    thread.tally.entered(call);
                }
            }
        } else if let Some(call) = thread.inside.take() {
            // SAFETY: as above.
            let value = unsafe { info.u.exit }.sval;
            if is_counted {
                thread.tally.returned(call, value);
            }
            let is_request = thread.who == Some(Who::Request)
                && matches!(call, Call::Receive | Call::ReceiveNow)
                && value > 0;
            if is_request && holds.answers {
                held = Some(Held::Answer);
            }
        }
        thread.held = held;
        match mark {
            Some(Mark::Thread(who)) => thread.who = Some(who),
            Some(Mark::Listening(port)) => self.port = Some(port),
            Some(Mark::Lacking) => self.is_lacking = true,
            Some(Mark::Step) | None => {}
        }
        if held.is_none() {
            go_on(id, None);
        }
    }

    fn release_who_may(&mut self) {
        let sleeps = self.all_in(Side::Destination, Who::Fault, Call::Wait);
        let holds = self.holds;
        self.release(|held| match held {
            Held::AtStep | Held::Ending => false,
            Held::Background => !holds.background,
            Held::Answer => !holds.answers || sleeps,
        });
    }

    fn release(&mut self, may: impl Fn(Held) -> bool) {
        for (id, thread) in &mut self.threads {
            if thread.held.is_some_and(&may) {
                thread.held = None;
                go_on(*id, None);
            }
        }
    }
}

impl Thread {
    fn new(side: Side) -> Self {
        Self { side, who: None, inside: None, held: None, tally: Tally::default() }
    }
}

fn go_on(id: Pid, signal: Option<Signal>) {
    // It may have been killed; its end is told next.
    let _ = ptrace::syscall(id, signal);
}

fn process_of(thread: Pid) -> Pid {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).expect("/proc");
    let id = status.lines().find_map(|line| line.strip_prefix("Tgid:")).expect("a field of status");
    Pid::from_raw(id.trim().parse().expect("a number"))
}
