//! Waiting for permits, where nobody looks by himself within the time of a test: whoever is
//! not woken waits for ever.

use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

const FOREVER: Duration = Duration::from_hours(1);
const PATIENCE: Duration = Duration::from_secs(40);
const MOST: u64 = 256 << 10;

fn limited(bytes_per_second: u64) -> Background {
    Background::Limited { bytes_per_second: NonZeroU64::new(bytes_per_second).unwrap() }
}

/// Streams that ask again and again, until they are told to stop.
struct Streams {
    pace: Arc<Pace>,
    is_over: Arc<AtomicBool>,
    /// A message for each permit, and its bytes; the end when all have stopped.
    permits: Receiver<u64>,
    /// A message when a stream has begun to ask.
    asked: Receiver<()>,
}

impl Streams {
    fn start(count: usize, background: Background) -> Self {
        let pace = Arc::new(Pace::default());
        pace.set(background);
        let is_over = Arc::new(AtomicBool::new(false));
        let ((permitted, permits), (asking, asked)) = (channel(), channel());
        for _ in 0..count {
            let (pace, is_over) = (Arc::clone(&pace), Arc::clone(&is_over));
            let (permitted, asking) = (permitted.clone(), asking.clone());
            thread::spawn(move || {
                let is_over = || {
                    let _ = asking.send(());
                    is_over.load(Ordering::Acquire)
                };
                while let Some(permit) = pace.permit(MOST, FOREVER, is_over, || false) {
                    let _ = permitted.send(permit.bytes);
                }
            });
        }
        Self { pace, is_over, permits, asked }
    }

    fn wait(&self, permits: usize) {
        for _ in 0..permits {
            self.permits.recv_timeout(PATIENCE).expect("a permit");
        }
    }

    fn stop(self) {
        self.is_over.store(true, Ordering::Release);
        self.pace.wake();
        while self.permits.recv_timeout(PATIENCE)
            != Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
        {}
    }
}

#[test]
fn streams_that_hold_go_on_when_the_rate_is_changed() {
    for background in [Background::Unlimited, limited(100 << 20)] {
        for streams in [1, 8] {
            let streams = Streams::start(streams, Background::OnRequest);
            streams.asked.recv().unwrap();
            assert!(streams.permits.try_recv().is_err(), "nothing leaves");
            streams.pace.set(background);
            streams.wait(20);
            streams.stop();
        }
    }
}

#[test]
fn streams_that_wait_for_long_go_on_at_a_faster_rate() {
    for streams in [1, 8] {
        let streams = Streams::start(streams, limited(1));
        streams.wait(1);
        streams.pace.set(limited(100 << 20));
        streams.wait(20);
        streams.stop();
    }
}

#[test]
fn streams_that_hold_or_wait_stop_when_they_are_woken() {
    for background in [Background::OnRequest, limited(1)] {
        for _ in 0..50 {
            let streams = Streams::start(4, background);
            streams.asked.recv().unwrap();
            streams.stop();
        }
    }
}

#[test]
fn whoever_goes_leaves_the_watch_to_another() {
    // Every stream must get on, which needs each to be woken by one that went.
    let pace = Arc::new(Pace::default());
    pace.set(limited(50 << 20));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let pace = Arc::clone(&pace);
            thread::spawn(move || {
                for _ in 0..20 {
                    let permit = pace.permit(MOST, FOREVER, || false, || false).unwrap();
                    pace.leaves(&permit, 4096);
                }
            })
        })
        .collect();
    let deadline = Instant::now() + PATIENCE;
    while !threads.iter().all(thread::JoinHandle::is_finished) {
        assert!(Instant::now() < deadline, "a stream was forgotten");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_stream_whose_connection_has_ended_leaves_the_watch_to_another() {
    let pace = Arc::new(Pace::default());
    pace.set(limited(1));
    pace.permit(MOST, FOREVER, || false, || false).unwrap();
    // It looks while the next page is more than an hour away.
    let ended = pace.permit(MOST, Duration::from_millis(1), || false, || true);
    assert!(ended.is_none());
    assert!(!pace.lock().is_watched);
}

#[test]
fn a_permit_of_zeros_costs_nothing() {
    let pace = Pace::default();
    pace.set(limited(1));
    for _ in 0..1000 {
        let permit = pace.permit(MOST, FOREVER, || false, || false).unwrap();
        pace.leaves(&permit, 0);
    }
}

#[test]
fn a_permit_of_an_older_rate_changes_nothing() {
    let pace = Pace::default();
    let permit = pace.permit(MOST, FOREVER, || false, || false).unwrap();
    pace.set(limited(1));
    pace.leaves(&permit, MOST);
    assert!(pace.lock().bucket.unwrap().wait(pace.now()).is_zero());
}

#[test]
fn pieces_are_a_millisecond_long_and_at_least_a_page() {
    for (rate, bytes) in [(1, 4096), (1_000_000, 4096), (10_000_000, 8_192), (u64::MAX, MOST)] {
        let pace = Pace::default();
        pace.set(limited(rate));
        let permit = pace.permit(MOST, FOREVER, || false, || false).unwrap();
        assert_eq!(permit.bytes, bytes, "at {rate} bytes a second");
    }
}
