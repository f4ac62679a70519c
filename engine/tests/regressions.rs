//! What was once wrong, and shall not come back.

mod common;

use afterimage::{CallError, DestinationEvent, StateSection};
use common::{Content, Kind, Memory, Pair, Setup, Toucher};
use std::sync::Arc;
use std::time::Instant;

const MIB: u64 = 1 << 20;

fn section(name: &str, length: usize) -> StateSection {
    StateSection { name: name.into(), version: 1, bytes: vec![1; length] }
}

#[test]
fn a_section_that_cannot_travel_is_refused_before_anything_happens() {
    prologue!("a_section_that_cannot_travel");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    for name in [String::new(), "x".repeat(256)] {
        let state = StateSection { name, version: 1, bytes: vec![] };
        let error = pair.source.switch_over(vec![state]).unwrap_err();
        assert!(matches!(error, CallError::SectionName { .. }), "{error:?}");
    }
    // Nothing has happened: it can still be done rightly.
    pair.switch(&[section("right", 1)]);
    pair.finish();
    pair.check_content();
}

#[test]
fn a_destination_dropped_when_all_has_arrived_leaves_a_guest_that_reads_everything() {
    prologue!("a_destination_dropped");
    for round in 0..40 {
        let kind = if round % 2 == 0 { Kind::Anonymous } else { Kind::Memfd };
        let setup = Setup {
            kinds: vec![(kind, 4 * MIB)],
            content: Content::ZeroRuns,
            seed: round,
            ..Setup::default()
        };
        let pair = Pair::start(&setup).expect("no huge pages");
        pair.switch(&[]);
        let total = pair.new.pages();
        let deadline = Instant::now() + common::PATIENCE;
        // Not a millisecond later: the session thread must not have heard of it yet.
        while pair.destination.stats().pages_complete < total {
            assert!(Instant::now() < deadline, "not every page came\n{}", pair.dump());
        }
        let Pair { destination, at_destination, source, new, .. } = pair;
        drop(destination);
        assert!(!at_destination.until_end().contains(&DestinationEvent::Abandoned));
        let (seed, content) = (setup.seed, setup.content);
        let reader = {
            let new: Arc<Memory> = Arc::clone(&new);
            Toucher::start(move || new.check(seed, content))
        };
        reader.finish("reading after the destination is gone", || format!("round {round}"));
        drop(source);
    }
}
