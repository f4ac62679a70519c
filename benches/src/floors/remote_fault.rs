//! Floor 3, `L`: event, request, answer, COPY, wake; alone or beside a background stream.
//!
//! The load is as kind to faults as so simple a loop can be: it keeps little unsent in the
//! kernel, and its sender lets requests go first.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::ping_pong::{answer, ask};
use super::{anonymous, next_fault, register};
use crate::error::{BenchError, Doing};
use crate::guest;
use crate::memory::{self, Memory, PAGE};
use crate::network::{Listener, Socket};
use crate::outcome::{Figure, Meter, Outcome};
use crate::sys::Uffd;
use crate::unit::{FaultPlan, Load, Wait};

/// Bytes of background that are announced and placed in one go.
const CHUNK: u64 = 256 << 10;
/// Bytes between two looks for requests.
const STEP: usize = 64 << 10;

/// Answers requests and, if there is to be a load, streams all memory once.
///
/// # Errors
/// If a connection breaks.
pub fn source(
    memory: &Memory,
    plan: FaultPlan,
    listener: &Listener,
) -> Result<Outcome, BenchError> {
    let requests = listener.accept()?;
    let urgent = AtomicU32::new(0);
    thread::scope(|scope| {
        let urgent = &urgent;
        let background = match plan.load {
            Load::Idle => None,
            load => {
                let socket = listener.accept()?;
                Some(scope.spawn(move || stream(memory, load, &socket, urgent)))
            }
        };
        let before = || {
            urgent.fetch_add(1, Ordering::AcqRel);
        };
        let after = || {
            urgent.fetch_sub(1, Ordering::AcqRel);
        };
        answer(memory, plan.wait, &requests, before, after)?;
        background.map_or(Ok(()), |thread| thread.join().expect("streaming does not panic"))
    })?;
    Ok(Outcome::default())
}

fn stream(
    memory: &Memory,
    load: Load,
    socket: &Socket,
    urgent: &AtomicU32,
) -> Result<(), BenchError> {
    socket.keep_short()?;
    let started = Instant::now();
    for offset in (0..memory.plan().bytes).step_by(CHUNK as usize) {
        if let Load::Limited(rate) = load {
            let due = Duration::from_secs_f64(offset as f64 / rate as f64);
            thread::sleep(due.saturating_sub(started.elapsed()));
        }
        socket.send(&offset.to_le_bytes()).doing("sending in background")?;
        for step in (0..CHUNK).step_by(STEP) {
            while urgent.load(Ordering::Acquire) > 0 {
                thread::yield_now();
            }
            // SAFETY: a floor's source is not written while it serves.
            let bytes = unsafe { memory::bytes(memory, offset + step, STEP) }?;
            socket.send(bytes).doing("sending in background")?;
        }
    }
    Ok(())
}

/// Faults until the load ends or, without one, on every page.
///
/// # Errors
/// If a connection breaks, without userfaultfd, or if a page is not what it must be.
pub fn destination(plan: FaultPlan, address: &str) -> Result<Outcome, BenchError> {
    let requests = Socket::connect(address)?;
    let memory = Memory::empty(anonymous(plan.bytes))?;
    let uffd = Uffd::new(0).doing("userfaultfd")?;
    register(&uffd, &memory, false)?;
    // The load goes elsewhere, so that every page of `memory` is a fault.
    let sink = (plan.load != Load::Idle).then(|| Memory::empty(anonymous(plan.bytes)));
    let sink = sink.transpose()?;
    let background = sink.as_ref().map(|_| Socket::connect(address)).transpose()?;
    if let Some(sink) = &sink {
        register(&uffd, sink, false)?;
    }
    let done = AtomicBool::new(false);
    let is_over = AtomicBool::new(false);
    let (latencies, seconds) = thread::scope(|scope| {
        let handler = scope.spawn(|| handle(&uffd, &memory, &requests, plan.wait, &is_over));
        let receiver = sink.as_ref().zip(background.as_ref()).map(|(sink, socket)| {
            let (uffd, done) = (&uffd, &done);
            scope.spawn(move || {
                let meter = Meter::start();
                let received = receive(uffd, sink, socket);
                done.store(true, Ordering::Release);
                received.map(|()| meter.read())
            })
        });
        let pages = memory::shuffled(plan.bytes / PAGE).into_iter();
        let pages = pages.map(|page| memory.address(page));
        // SAFETY: the handler serves this memory until it is over.
        let latencies = unsafe { guest::touch(pages, plan.think, &done) }?;
        let reading =
            receiver.map(|it| it.join().expect("receiving does not panic")).transpose()?;
        is_over.store(true, Ordering::Release);
        requests.shut_down();
        handler.join().expect("the handler does not panic")?;
        Ok::<_, BenchError>((latencies, reading))
    })?;
    sink.as_ref().map_or(Ok(()), Memory::verify)?;
    // The rest is not there, and nobody would serve it any more.
    memory.verify_present()?;
    let outcome = Outcome::of(latencies);
    Ok(match seconds {
        Some(reading) => outcome.metered(reading).with(Figure::BackgroundBytes, plan.bytes as f64),
        None => outcome,
    })
}

fn handle(
    uffd: &Uffd,
    memory: &Memory,
    requests: &Socket,
    wait: Wait,
    is_over: &AtomicBool,
) -> Result<(), BenchError> {
    let start = memory.address(0) as u64;
    let mut content = [0; PAGE as usize];
    while let Some(address) = next_fault(uffd, wait, is_over)? {
        let page = address & !(PAGE - 1);
        ask(requests, page - start, &mut content, wait)?;
        uffd.copy(page, &content).doing("UFFDIO_COPY")?;
    }
    Ok(())
}

fn receive(uffd: &Uffd, sink: &Memory, socket: &Socket) -> Result<(), BenchError> {
    let mut staging = vec![1; CHUNK as usize];
    let mut offset = [0; 8];
    while socket.receive(&mut offset, Wait::Blocking).doing("receiving in background")? {
        socket.receive(&mut staging, Wait::Blocking).doing("receiving in background")?;
        let offset = u64::from_le_bytes(offset);
        uffd.copy(sink.address(offset / PAGE) as u64, &staging).doing("UFFDIO_COPY")?;
    }
    Ok(())
}
