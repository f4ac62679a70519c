//! What a peer may cost, whatever it sends. The tests measure this process, so they run one
//! at a time and in a binary of their own.

mod common;

use afterimage::Incarnation;
use afterimage_protocol::wire::{Channel, ControlFrame};
use common::peer::{HandDestination, Wire, pages, request};
use common::victim::Victim;
use std::net::Shutdown;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const STRANGER: Incarnation = Incarnation([9; 16]);

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_crowd_of_strangers_costs_little_and_keeps_nobody_out() {
    prologue!("a_crowd");
    let _alone = alone();
    let victim = Victim::start(|_| ());
    let before = common::resident_bytes();
    let mut crowd: Vec<_> = (0..200).map(|_| Wire::connect(&victim.address)).collect();
    for (index, wire) in crowd.iter_mut().enumerate() {
        if index % 2 == 0 {
            wire.send(b"AFTRIMG\n");
        }
    }
    let grown = common::resident_bytes().saturating_sub(before);
    assert!(grown < 24 * MIB, "{grown} bytes for 200 connections");
    victim.serves_properly();
    drop(crowd);
}

#[test]
fn a_peer_that_floods_and_never_reads_costs_little() {
    prologue!("a_peer_that_floods");
    let _alone = alone();
    let victim = Victim::start(|_| ());
    let mut hand = HandDestination::attach(&victim.address, STRANGER);
    let before = common::resident_bytes();
    let beats: Vec<u8> = (0..2000)
        .flat_map(|token| ControlFrame::Heartbeat { token }.encode(hand.hello.stamp, false))
        .collect();
    hand.control.socket.set_nonblocking(true).expect("a socket");
    let end = Instant::now() + Duration::from_millis(1500);
    let mut sent = 0;
    while Instant::now() < end {
        use std::io::Write;
        match hand.control.socket.write(&beats[sent % 32..]) {
            Ok(bytes) => sent += bytes,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::yield_now();
            }
            // It was given up.
            Err(_) => break,
        }
    }
    let grown = common::resident_bytes().saturating_sub(before);
    assert!(sent > 100_000, "the flood came through: {sent} bytes");
    assert!(grown < 48 * MIB, "{grown} bytes after {sent} bytes of heartbeats");
    drop(hand);
    victim.serves_properly();
}

#[test]
fn pages_asked_for_again_and_again_cost_little() {
    prologue!("pages_asked_for");
    let _alone = alone();
    let victim = Victim::start(|_| ());
    let mut hand = HandDestination::attach(&victim.address, STRANGER);
    victim.source.switch_over(vec![]).expect("may switch over");
    let (mut wire, at) = hand.open(Channel::Request(0), 1);
    let before = common::resident_bytes();
    let mut reader = Wire::over(wire.socket.try_clone().expect("a socket"));
    let drain = std::thread::spawn(move || reader.drain());
    // Every other page, so that no two make a run.
    let round: Vec<u8> = (0..512).flat_map(|page| request(pages(page * 2, 1), at)).collect();
    for token in 0..400 {
        assert!(wire.send(&round), "a request is answered, however often it comes");
        hand.say(&ControlFrame::Heartbeat { token });
    }
    common::wait_until(
        "the answers",
        || format!("{:?}", victim.source.stats()),
        || victim.source.stats().pages_requested == 400 * 512,
    );
    let grown = common::resident_bytes().saturating_sub(before);
    // 204,800 answers; sixteen bytes each would be 3.2 MB, and would go on growing.
    assert!(grown < 2 * MIB, "{grown} bytes");
    wire.socket.shutdown(Shutdown::Both).expect("a socket");
    drain.join().expect("a reader");
    drop(hand);
    victim.serves_properly();
}
