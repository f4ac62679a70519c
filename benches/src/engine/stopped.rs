//! How soon a thread that waits for a source's events hears that memory is final, beside how soon
//! one that waits for an eventfd hears of that.
//!
//! Invariant: the waiting thread sleeps in the kernel before what it waits for is done.

use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{Events, Source, SourceEvent};
use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::gettid;

use super::source::LIMIT;
use crate::error::{BenchError, Doing};
use crate::outcome::{Figure, Outcome};
use crate::sys;

/// Bare wakes, of which the median is taken.
const WAKES: usize = 9;

/// Tells the source that its guest has stopped, and returns both times.
pub(super) fn measure(
    source: &Source,
    events: &Events<SourceEvent>,
) -> Result<Outcome, BenchError> {
    let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let bell = bell.doing("an eventfd")?;
    let (orders, taken) = bounded(0);
    let (sender, heard) = bounded(1);
    thread::scope(|scope| {
        let bell = &bell;
        let waiter = scope.spawn(move || wait(bell, events, &taken, &sender));
        let caller = Caller { orders, heard };
        let measured = caller.measure(bell, source);
        // The other thread ends when nobody orders any more.
        drop(caller);
        waiter.join().expect("waiting does not panic").and(measured)
    })
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Bell,
    Stopped,
}

/// What the waiting thread says: who it is, before it waits, and when it had what it waited for.
#[derive(Clone, Copy, Debug)]
enum Said {
    Waiting(nix::unistd::Pid),
    Heard(Instant),
}

struct Caller {
    orders: Sender<Order>,
    heard: Receiver<Said>,
}

impl Caller {
    fn measure(&self, bell: &EventFd, source: &Source) -> Result<Outcome, BenchError> {
        let mut wakes = Vec::with_capacity(WAKES);
        for _ in 0..WAKES {
            wakes.push(self.one(Order::Bell, || bell.write(1).map(drop).doing("an eventfd"))?);
        }
        wakes.sort_unstable();
        let stopped = self.one(Order::Stopped, || source.stopped().doing("stopping"))?;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        Ok(Outcome::default()
            .with(Figure::StoppedUs, us(stopped))
            .with(Figure::WakeUs, us(wakes[WAKES / 2])))
    }

    fn one(
        &self,
        order: Order,
        act: impl FnOnce() -> Result<(), BenchError>,
    ) -> Result<Duration, BenchError> {
        let gone = || BenchError::Failed("the thread that waits for events has ended".into());
        self.orders.send_timeout(order, LIMIT).map_err(|_| gone())?;
        let Ok(Said::Waiting(thread)) = self.heard.recv_timeout(LIMIT) else { return Err(gone()) };
        wait_asleep(thread)?;
        let before = Instant::now();
        act()?;
        let Ok(Said::Heard(at)) = self.heard.recv_timeout(LIMIT) else { return Err(gone()) };
        Ok(at - before)
    }
}

fn wait_asleep(thread: nix::unistd::Pid) -> Result<(), BenchError> {
    let started = Instant::now();
    while !sys::is_asleep(thread.as_raw()).doing("the state of a thread")? {
        if started.elapsed() > LIMIT {
            return Err(BenchError::Failed("a thread does not come to wait".into()));
        }
        thread::yield_now();
    }
    Ok(())
}

/// The thread that waits, as a VMM's loop of events does.
fn wait(
    bell: &EventFd,
    events: &Events<SourceEvent>,
    orders: &Receiver<Order>,
    say: &Sender<Said>,
) -> Result<(), BenchError> {
    let gone = |_| BenchError::Failed("nobody listens to a thread that waits".into());
    for order in orders {
        say.send(Said::Waiting(gettid())).map_err(gone)?;
        match order {
            Order::Bell => {
                readable(bell.as_fd())?;
                bell.read().doing("an eventfd")?;
            }
            Order::Stopped => loop {
                readable(events.as_fd())?;
                match events.try_next() {
                    Some(SourceEvent::Stopped) => break,
                    Some(SourceEvent::PersistFailed | SourceEvent::Reclaimed) => {
                        return Err(BenchError::Failed("the source gave up".into()));
                    }
                    _ => {}
                }
            },
        }
        say.send(Said::Heard(Instant::now())).map_err(gone)?;
    }
    Ok(())
}

fn readable(fd: BorrowedFd<'_>) -> Result<(), BenchError> {
    let limit = PollTimeout::try_from(LIMIT).doing("a limit")?;
    let mut waiting = [PollFd::new(fd, PollFlags::POLLIN)];
    match poll(&mut waiting, limit).doing("waiting for an event")? {
        0 => Err(BenchError::Failed("no event came in time".into())),
        _ => Ok(()),
    }
}
