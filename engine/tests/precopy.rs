//! Precopy of a guest that writes all the time: whatever is cut or called at whichever instant,
//! the destination has in the end what the source had when it stopped.

mod common;

use afterimage::dirty::{DirtyBitmap, DirtyTracker};
use afterimage::{
    Background, Checksums, DestinationEvent, DiscardNotice, GuestAddress, Passes, Precopy,
    SourceEvent, SourceOptions, StateDelivery, StateSection, SwitchoverCause,
};
use afterimage_protocol::wire::Channel;
use common::memory::PAGE;
use common::proxy::{Cut, Proxy, Way};
use common::{Content, Kind, Moving, Pair, Random, Setup, precopy, tracker_of};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, channel};
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A tracker that says what was written only when the test lets it.
#[derive(Debug)]
struct Gated {
    dirty: Arc<DirtyBitmap>,
    asked: Sender<()>,
    may: Receiver<()>,
}

impl DirtyTracker for Gated {
    fn start(&mut self) -> io::Result<()> {
        self.dirty.start()
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        // Whoever has no gate to keep has gone.
        if self.asked.send(()).is_ok() {
            let _ = self.may.recv();
        }
        self.dirty.collect(written)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.dirty.stop()
    }
}

fn kinds() -> [Vec<(Kind, u64)>; 4] {
    [
        vec![(Kind::Anonymous, 4 * MIB)],
        vec![(Kind::Memfd, 4 * MIB)],
        vec![(Kind::Huge, 8 * MIB)],
        vec![(Kind::Huge, 4 * MIB), (Kind::Memfd, MIB), (Kind::Anonymous, 2 * MIB)],
    ]
}

/// Guests touch some of their memory for the first time while it is sent.
fn any_content(random: &mut Random) -> Content {
    let all = [Content::Dense, Content::Sparse, Content::Scattered, Content::Empty];
    all[random.below(4) as usize]
}

#[test]
fn every_kind_of_memory_arrives_after_any_number_of_passes() {
    prologue!("every_kind_of_memory_precopied");
    let mut random = Random::seeded("precopy_kinds");
    for kinds in kinds() {
        for passes in [Passes::Count(1), Passes::Count(3), Passes::Automatic] {
            for checksums in [Checksums::Off, Checksums::On] {
                let streams = 1 + random.below(4) as u16;
                let (kinds, content) = (kinds.clone(), any_content(&mut random));
                let setup = Setup { kinds, content, streams, checksums, ..Setup::default() };
                let Some(mut moving) = Moving::start(&setup, passes, &mut random, |_| (), None)
                else {
                    continue;
                };
                moving.wait_due();
                moving.switch_and_check();
                let stats = moving.pair.destination.stats();
                assert!(stats.pages_precopy > 0, "{}", moving.pair.dump());
            }
        }
    }
}

#[test]
fn a_guest_may_be_stopped_at_any_instant() {
    prologue!("a_guest_may_be_stopped_at_any_instant");
    let mut random = Random::seeded("precopy_instants");
    for round in 0..24_u64 {
        let kinds = kinds()[(round % 2) as usize].clone();
        let content = any_content(&mut random);
        let setup = Setup { kinds, streams: 2, content, ..Setup::default() };
        let passes = [Passes::Automatic, Passes::Count(100)][(round / 2 % 2) as usize];
        let mut moving =
            Moving::start(&setup, passes, &mut random, |_| (), None).expect("no huge pages");
        // Some writes later, whatever the passes are at.
        let writes = random.below(20_000);
        let written = Arc::clone(&moving.writers.written);
        common::wait_until("writes", String::new, || written.load(Ordering::Relaxed) >= writes);
        moving.switch_and_check();
    }
}

#[test]
fn cut_links_lose_no_write() {
    prologue!("cut_links_lose_no_write");
    let mut random = Random::seeded("precopy_cuts");
    for round in 0..8_u64 {
        let kinds = kinds()[(round % 2) as usize].clone();
        let setup = Setup { kinds, streams: 2, ..Setup::default() };
        let mut proxy = None;
        let passes = Passes::Count(1000);
        let mut moving =
            Moving::start(&setup, passes, &mut random, |_| (), Some(&mut proxy)).expect("started");
        let proxy = proxy.expect("on the way");
        for _ in 0..3 {
            moving.wait_pass();
            // All channels at once, or one of them.
            let all = random.below(2) == 0;
            let slot = random.below(2) as u16;
            proxy.cut(Cut::any(&mut random), |channel| all || channel == Channel::Background(slot));
        }
        moving.wait_pass();
        moving.switch_and_check();
    }
}

#[test]
fn a_cancelled_migration_leaves_the_guest_and_nothing_else() {
    prologue!("a_cancelled_migration_leaves_the_guest");
    let mut random = Random::seeded("precopy_cancel");
    for round in 0..6 {
        let setup = Setup { kinds: kinds()[round % 2].clone(), ..Setup::default() };
        let moving = Moving::start(&setup, Passes::Count(1000), &mut random, |_| (), None)
            .expect("no huge pages");
        if round > 1 {
            moving.wait_pass();
        }
        moving.pair.source.reclaim().expect("nothing is given yet");
        moving.pair.wait_source(&SourceEvent::Reclaimed);
        assert!(
            moving.pair.source.reclaim().is_err() && moving.pair.source.stopped().is_err(),
            "it is over"
        );
        let written = moving.writers.written.load(Ordering::Relaxed);
        common::wait_until("the guest runs on", String::new, || {
            moving.writers.written.load(Ordering::Relaxed) > written + 100
        });
    }
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_due_and_moves() {
    prologue!("a_guest_that_writes_faster");
    let mut random = Random::seeded("precopy_fast");
    let rate = Background::Limited { bytes_per_second: (4 * MIB).try_into().expect("not zero") };
    let limited = |source: &mut SourceOptions| source.precopy_background = Some(rate);
    let setup = Setup { kinds: vec![(Kind::Anonymous, 2 * MIB)], ..Setup::default() };
    let mut moving =
        Moving::start(&setup, Passes::Automatic, &mut random, limited, None).expect("started");
    let cause = moving.wait_due();
    assert!(
        matches!(cause, SwitchoverCause::NotShrinking | SwitchoverCause::TimeIsUp),
        "{cause:?}"
    );
    moving.switch_and_check();
}

#[test]
fn a_guest_that_converges_runs_only_with_all_of_its_memory() {
    prologue!("a_guest_that_converges");
    let mut random = Random::seeded("precopy_converges");
    let setup = Setup { kinds: vec![(Kind::Memfd, 4 * MIB)], ..Setup::default() };
    let mut moving =
        Moving::start(&setup, Passes::Converged, &mut random, |_| (), None).expect("started");
    moving.wait_pass();
    moving.writers.stop();
    assert_eq!(moving.wait_due(), SwitchoverCause::Converged);
    // A few more, which are still to come when it is stopped.
    moving.pair.switch(&[]);
    assert_eq!(moving.pair.source.stats().pages_acknowledged, moving.pair.new.pages());
    assert_eq!(moving.pair.destination.stats().fault_latency.count, 0);
    moving.pair.finish();
    moving.pair.new.check_same(&moving.pair.old);
}

#[test]
fn a_side_that_cannot_do_precopy_is_told_of_and_the_guest_moves() {
    prologue!("a_side_that_cannot_do_precopy");
    let mut random = Random::seeded("precopy_lack");
    // Anonymous memory whose discards are told by events.
    let setup = Setup { discards: DiscardNotice::Events, ..Setup::default() };
    let mut moving =
        Moving::start(&setup, Passes::Automatic, &mut random, |_| (), None).expect("started");
    assert_eq!(moving.wait_due(), SwitchoverCause::NoPrecopy);
    moving.switch_and_check();
    assert_eq!(moving.pair.destination.stats().pages_precopy, 0);
    for agreed in [moving.pair.source.agreed(), moving.pair.destination.agreed()] {
        assert!(!agreed.expect("they were connected").precopy);
    }
}

/// Says what was written only once it may.
#[derive(Debug)]
struct Slow {
    tracker: Arc<DirtyBitmap>,
    waits: Arc<AtomicBool>,
    may_go_on: mpsc::Receiver<()>,
}

impl DirtyTracker for Slow {
    fn start(&mut self) -> io::Result<()> {
        self.tracker.start()
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        if self.waits.load(Ordering::Acquire) {
            self.may_go_on.recv_timeout(common::PATIENCE).expect("nobody lets it go on");
        }
        self.tracker.collect(written)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.tracker.stop()
    }
}

#[test]
fn that_the_guest_has_stopped_is_told_before_it_is_known_what_it_wrote() {
    prologue!("that_the_guest_has_stopped_is_told");
    let mut random = Random::seeded("precopy_slow_tracker");
    let setup = Setup::default();
    let waits = Arc::new(AtomicBool::new(false));
    let (go_on, may_go_on) = mpsc::channel();
    let slow = Arc::clone(&waits);
    let watched = |source: &mut SourceOptions, dirty: &Arc<DirtyBitmap>| {
        let tracker = Slow { tracker: Arc::clone(dirty), waits: slow, may_go_on };
        let mut precopy = Precopy::new(Box::new(tracker));
        precopy.passes = Passes::Count(1);
        source.precopy = Some(precopy);
    };
    let mut moving =
        Moving::start_with(&setup, Passes::Count(1), &mut random, watched, None).expect("started");
    moving.wait_due();
    moving.writers.stop();
    waits.store(true, Ordering::Release);
    std::thread::scope(|scope| {
        let stopped = scope.spawn(|| moving.pair.source.stopped());
        moving.pair.wait_source(&SourceEvent::Stopped);
        go_on.send(()).expect("the tracker is asked");
        stopped.join().expect("no panic").expect("may stop");
    });
    waits.store(false, Ordering::Release);
    moving.switch_and_check();
}

#[test]
fn a_held_guest_waits_for_its_manager() {
    prologue!("a_held_guest_waits");
    let mut random = Random::seeded("precopy_hold");
    let setup = Setup::default();
    let mut moving =
        Moving::start(&setup, Passes::Count(1), &mut random, |source| source.hold = true, None)
            .expect("started");
    moving.wait_due();
    moving.writers.stop();
    moving.pair.source.stopped().expect("may stop");
    moving.pair.wait_source(&SourceEvent::Stopped);
    moving.pair.wait_destination(&DestinationEvent::SourceStopped);
    moving.pair.prepare(&[]);
    moving.pair.wait_source(&SourceEvent::Held);
    assert!(!moving.pair.at_destination.rest().contains(&DestinationEvent::Run));
    moving.pair.source.proceed().expect("it is held");
    assert!(moving.pair.source.proceed().is_err(), "only once");
    moving.pair.wait_destination(&DestinationEvent::Run);
    moving.pair.finish();
    moving.pair.new.check_same(&moving.pair.old);
}

#[test]
fn what_was_told_in_vain_is_told_again() {
    prologue!("what_was_told_in_vain");
    let setup = Setup { kinds: vec![(Kind::Memfd, MIB)], ..Setup::default() };
    let ((asked, is_asked), (let_go, may)) = (channel(), channel());
    let (mut tracker, mut proxy) = (None, None);
    let pair = Pair::start_on(
        &setup,
        |old, source, destination| {
            let dirty = tracker_of(old, &setup);
            let gated = Gated { dirty: Arc::clone(&dirty), asked, may };
            let mut precopy = Precopy::new(Box::new(gated));
            precopy.passes = Passes::Count(2);
            source.precopy = Some(precopy);
            source.silence = Duration::from_millis(800);
            destination.silence = source.silence;
            tracker = Some(dirty);
        },
        |address| proxy.insert(Proxy::start(&address)).address(),
    );
    let (pair, dirty) = (pair.expect("no huge pages"), tracker.expect("made at the start"));
    let proxy = proxy.expect("on the way");
    is_asked.recv().expect("the first pass is over");
    // Written after they were sent: the destination has them, and they are stale.
    for page in 3..9 {
        pair.old.word(page, 5).store(page, Ordering::Relaxed);
        dirty.mark(pair.old.guest_address(page), PAGE);
    }
    // What is told now does not arrive.
    let is_control = |channel| channel == Channel::Control;
    assert_eq!(proxy.damage(Cut::Vanish, Way::Back, is_control), 1);
    drop(is_asked);
    drop(let_go);
    pair.wait_destination(&DestinationEvent::Disconnected);
    pair.at_source.wait(
        "the time to switch over",
        || pair.dump(),
        |event| matches!(event, SourceEvent::SwitchoverDue(_)),
    );
    pair.switch(&[]);
    pair.finish();
    pair.new.check_same(&pair.old);
    pair.check_counts();
}

/// A first and only pass of which a part is under way and held up, when the guest has written to
/// every second page: some of what is under way is out of date, and some is not.
fn held_in_mid_pass(setup: &Setup) -> (Pair, Proxy) {
    let mut proxy = None;
    let mut tracker = None;
    let pair = Pair::start_on(
        setup,
        |old, source, _| {
            let dirty = tracker_of(old, setup);
            source.precopy = Some(precopy(&dirty, Passes::Count(1)));
            tracker = Some(dirty);
        },
        |address| {
            let proxy = proxy.insert(Proxy::start(&address));
            // The pass does not end.
            proxy.hold_at(MIB);
            proxy.address()
        },
    );
    let (pair, proxy) = (pair.expect("no huge pages"), proxy.expect("on the way"));
    common::wait_until("half a pass", || pair.dump(), || proxy.bytes() >= MIB);
    let dirty = tracker.expect("made at the start");
    for page in (0..pair.old.small_pages()).step_by(2) {
        pair.old.word(page, 7).store(page, Ordering::Relaxed);
        dirty.mark(pair.old.guest_address(page), PAGE);
    }
    (pair, proxy)
}

#[test]
fn what_is_under_way_at_the_switchover_comes_again() {
    prologue!("what_is_under_way_at_the_switchover");
    for kinds in &kinds()[..2] {
        let setup = Setup { kinds: kinds.clone(), ..Setup::default() };
        let (pair, proxy) = held_in_mid_pass(&setup);
        pair.prepare(&[]);
        pair.wait_destination(&DestinationEvent::Run);
        proxy.hold_at(u64::MAX);
        pair.finish();
        pair.new.check_same(&pair.old);
        pair.check_counts();
        assert_eq!(proxy.seen(|channel| channel == Channel::Background(0)), 1, "none was replaced");
    }
}

#[test]
fn the_destination_knows_what_the_last_pass_has_found_before_it_is_time_to_stop() {
    prologue!("what_the_last_pass_has_found");
    let setup = Setup { kinds: vec![(Kind::Anonymous, 4 * MIB)], ..Setup::default() };
    let (pair, proxy) = held_in_mid_pass(&setup);
    proxy.hold_at(u64::MAX);
    pair.at_source.wait(
        "the time to switch over",
        || pair.dump(),
        |event| matches!(event, SourceEvent::SwitchoverDue(_)),
    );
    // What is out of date was taken away, in the time of a guest that still runs, and nothing of
    // another pass comes in its place.
    assert_eq!(pair.new.resident_bytes(), 2 * MIB);
    pair.switch(&[]);
    pair.finish();
    pair.new.check_same(&pair.old);
    pair.check_counts();
}

#[test]
fn pages_that_cannot_be_read_keep_no_pass_from_its_end() {
    prologue!("pages_that_cannot_be_read_in_a_pass");
    let setup = Setup { kinds: vec![(Kind::Memfd, MIB)], ..Setup::default() };
    let pair = Pair::start_on(
        &setup,
        |old, source, _| {
            source.precopy_background = Some(Background::OnRequest);
            source.precopy = Some(precopy(&tracker_of(old, &setup), Passes::Count(3)));
        },
        |address| address,
    );
    let pair = pair.expect("no huge pages");
    let file = std::fs::OpenOptions::new().write(true).open(pair.old.path_of(0)).expect("a file");
    file.set_len(MIB / 2).expect("cut short");
    pair.source.set_precopy_background(Background::Unlimited);
    pair.at_source.wait(
        "the end of a pass",
        || pair.dump(),
        |event| matches!(event, SourceEvent::PassEnded(_)),
    );
    pair.switch(&[]);
    let half = MIB / PAGE / 2;
    common::wait_until(
        "the rest",
        || pair.dump(),
        || {
            pair.destination.stats().pages_complete == half
                && pair.destination.stats().pages_unreadable == half
        },
    );
    pair.new.check_pages(setup.seed, setup.content, 0, half);
}

#[test]
fn device_state_may_be_restored_while_it_comes() {
    prologue!("device_state_may_be_restored");
    let setup = Setup::default();
    let pair = Pair::start_with(
        &setup,
        |_, destination| destination.state = StateDelivery::BySection,
        |address| address,
    )
    .expect("no huge pages");
    let section = |number: u8| StateSection {
        name: format!("cpu{number}"),
        version: number.into(),
        bytes: vec![number; 600_000],
    };
    assert!(pair.source.send_section(section(0)).is_err(), "the guest still runs");
    pair.source.stopped().expect("may stop");
    for number in 0..3 {
        pair.source.send_section(section(number)).expect("may be sent");
        pair.wait_destination(&DestinationEvent::Section(section(number)));
    }
    assert!(pair.destination.ready().is_err(), "not all of it is there");
    pair.source.switch_over(vec![section(3)]).expect("may switch over");
    pair.wait_destination(&DestinationEvent::Section(section(3)));
    pair.wait_destination(&DestinationEvent::State(Vec::new()));
    assert!(pair.source.send_section(section(4)).is_err(), "that was all");
    pair.destination.ready().expect("may be ready");
    pair.wait_destination(&DestinationEvent::Run);
    pair.finish();
    pair.check_content();
}

#[test]
fn a_guest_that_is_stopped_while_the_link_is_down_moves_as_it_was_then() {
    prologue!("a_guest_that_is_stopped_while_the_link_is_down");
    let mut random = Random::seeded("precopy_paused");
    for kinds in &kinds()[..2] {
        let setup = Setup { kinds: kinds.clone(), streams: 2, ..Setup::default() };
        for passes in [Passes::Count(1), Passes::Converged] {
            let mut moving =
                Moving::start(&setup, passes, &mut random, |_| (), None).expect("started");
            moving.wait_pass();
            moving.pair.source.pause().expect("may pause");
            moving.writers.stop();
            moving.pair.source.stopped().expect("may stop");
            moving.pair.source.recover(None).expect("may recover");
            moving.switch_and_check();
        }
    }
}

#[test]
fn pages_that_were_touched_for_the_first_time_in_a_pass_arrive() {
    prologue!("pages_touched_first_in_a_pass");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        for content in [Content::Scattered, Content::Sparse, Content::Empty] {
            for passes in [1, 2] {
                let setup = Setup { kinds: vec![(kind, 4 * MIB)], content, ..Setup::default() };
                touch_first_in_a_pass(&setup, passes);
            }
        }
    }
}

/// The guest writes to holes while the first of some passes ends, or right after.
fn touch_first_in_a_pass(setup: &Setup, passes: u32) {
    let mut tracker = None;
    let pair = Pair::start_on(
        setup,
        |old, source, _| {
            let dirty = tracker_of(old, setup);
            source.precopy = Some(precopy(&dirty, Passes::Count(passes)));
            // Content up to the end: the last look of a stream goes as far.
            let last = old.small_pages() - 1;
            old.word(last, 0).store(last, Ordering::Relaxed);
            tracker = Some(dirty);
        },
        |address| address,
    );
    let (pair, dirty) = (pair.expect("no huge pages"), tracker.expect("made at the start"));
    pair.at_source.wait(
        "the first pass",
        || pair.dump(),
        |event| matches!(event, SourceEvent::PassEnded(_)),
    );
    // Not the first page, which a stream looks at anew.
    for page in 1..pair.old.small_pages() - 8 {
        pair.old.word(page, page % 512).store(page, Ordering::Relaxed);
        dirty.mark(pair.old.guest_address(page), PAGE);
    }
    pair.switch(&[]);
    pair.finish();
    pair.new.check_same(&pair.old);
    pair.check_counts();
}
