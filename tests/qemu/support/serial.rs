//! What the guest of `boot` says on its serial port, and whether it has lived on.

use std::io::Read;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use super::LIMIT;

/// What a guest says.
pub(crate) struct Serial {
    said: Arc<Mutex<Vec<u8>>>,
    news: Receiver<()>,
    reader: JoinHandle<()>,
}

impl Serial {
    /// What is read from there.
    pub(crate) fn of(mut stream: impl Read + Send + 'static) -> Self {
        let said = Arc::new(Mutex::new(Vec::new()));
        let (sender, news) = channel();
        let shared = Arc::clone(&said);
        let reader = thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut piece) {
                shared.lock().unwrap().extend(&piece[..length]);
                // The test may have heard enough.
                let _ = sender.send(());
            }
        });
        Self { said, news, reader }
    }

    /// What was said so far.
    pub(crate) fn so_far(&self) -> Vec<u8> {
        self.said.lock().unwrap().clone()
    }

    /// Waits until every vCPU has said that it has done so many more rounds.
    pub(crate) fn wait_rounds(&self, vcpus: usize, more: usize) {
        let rounds = || {
            let said = self.so_far();
            (0..vcpus).map(|vcpu| lines_of(&said, vcpu).count()).min().unwrap()
        };
        let (enough, until) = (rounds() + more, Instant::now() + LIMIT);
        while rounds() < enough {
            let left = until.saturating_duration_since(Instant::now());
            self.news.recv_timeout(left).unwrap_or_else(|_| {
                panic!("{} of {enough} rounds: {:?}", rounds(), tail(&self.so_far()))
            });
        }
    }

    pub(super) fn all(self) -> Vec<u8> {
        self.reader.join().unwrap();
        Arc::into_inner(self.said).unwrap().into_inner().unwrap()
    }
}

fn tail(said: &[u8]) -> String {
    String::from_utf8_lossy(&said[said.len().saturating_sub(200)..]).into_owned()
}

/// The whole lines of a vCPU: how many rounds, and how many wrong words.
fn lines_of(said: &[u8], vcpu: usize) -> impl Iterator<Item = (u32, u32)> {
    let letter = b'A' + vcpu as u8;
    let lines = said.split_inclusive(|byte| *byte == b'\n');
    let whole = lines.filter(move |line| line.ends_with(b"\n") && line.first() == Some(&letter));
    whole.map(|line| {
        let text = std::str::from_utf8(&line[1..line.len() - 1]).unwrap();
        let (rounds, wrong) = text.split_once(' ').unwrap();
        let number = |text| u32::from_str_radix(text, 16).unwrap();
        (number(rounds), number(wrong))
    })
}

/// What the guest has said at the source, and then at the destination: each vCPU must have
/// counted every round once, and found no wrong word; `more` of them at the destination.
pub(crate) fn check_lived_on(source: &[u8], destination: &[u8], vcpus: usize, more: u32) {
    let all = [source, destination].concat();
    for vcpu in 0..vcpus {
        let lines: Vec<_> = lines_of(&all, vcpu).collect();
        for (index, (rounds, wrong)) in lines.iter().enumerate() {
            assert_eq!(*rounds as usize, index + 1, "vCPU {vcpu} counts every round once");
            assert_eq!(*wrong, 0, "vCPU {vcpu} has read what it wrote, up to round {rounds}");
        }
        let here = lines_of(destination, vcpu).count();
        assert!(here >= more as usize, "vCPU {vcpu} did {here} rounds at the destination");
    }
}
