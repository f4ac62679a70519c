//! What a session costs in which nothing happens: heartbeats, and who looks for news.

use super::calls::Call;
use super::common::{Content, Kind};
use super::roles::{Scenario, Who};
use super::trace::Side;
use super::{HEADER, MIB, report, trace};
use crate::prologue;
use std::time::Duration;

const HEARTBEAT: Duration = Duration::from_millis(50);
/// Frames of one side that are waited for: heartbeats, and replies to those of the other.
const FRAMES: u64 = 16;
/// Bytes of one run in an acknowledgement.
const ACK_RUN: u64 = 16;
/// How often a destination wakes to see whether there is something to acknowledge.
const ACK_PAUSE: Duration = Duration::from_millis(20);
/// Frames on their way when counting begins or ends, of a beat and a reply each.
const ON_THE_WAY: u64 = 4;

#[test]
fn an_idle_session_costs_heartbeats_and_nothing_else() {
    prologue!("an_idle_session");
    let kind = Kind::Anonymous;
    let scenario = Scenario {
        kind,
        content: Content::Dense,
        bytes: 8 * MIB,
        touched: 1,
        heartbeat: HEARTBEAT,
    };
    let Some(mut tracer) = trace(&scenario) else { return };
    // After a fault the request channel is in use for certain. Its acknowledgement, the only
    // frame with a payload, goes out before counting begins.
    tracer.until_quiet();
    tracer.open_window();
    tracer.step();
    tracer.until(|it| it.tally(Side::Destination, Who::Control).sent() % HEADER == ACK_RUN);
    tracer.until_quiet();
    tracer.open_window();
    tracer.until(|it| it.tally(Side::Source, Who::Control).sent() >= FRAMES * HEADER);
    let seen = tracer.close_window();
    for (side, who) in [
        (Side::Source, Who::Request),
        (Side::Source, Who::Background),
        (Side::Source, Who::Acceptor),
        (Side::Destination, Who::Fault),
        (Side::Destination, Who::Background),
    ] {
        assert_eq!(seen.of(side, who).total(), 0, "{side:?}, {who:?}: {:?}", seen.of(side, who));
    }
    let times = |pause: Duration| (seen.time.as_micros() / pause.as_micros()) as u64;
    let beats = times(HEARTBEAT);
    for side in [Side::Source, Side::Destination] {
        let control = seen.of(side, Who::Control);
        let frames = control.sent() / HEADER;
        report(&format!("{side:?}: calls"), control.total(), beats, "heartbeat");
        assert_eq!(control.sent(), frames * HEADER, "a frame is a header: {control:?}");
        // Each side beats, and replies to each beat of the other.
        let most = 2 * beats + ON_THE_WAY;
        assert!(frames <= most, "{side:?}: {frames} frames in {beats} heartbeats: {control:?}");
        // It wakes to say something, to hear something, and a destination for its
        // acknowledgements. Then it waits, looks, and says or hears at most once.
        let looks = if side == Side::Destination { times(ACK_PAUSE) } else { 0 };
        let wakes = looks + 2 * most;
        assert!(control.of(Call::Wait).calls <= wakes, "{wakes} wakes allowed: {control:?}");
        let most = 3 * wakes + ON_THE_WAY;
        assert!(control.total() <= most, "{most} calls allowed: {control:?}");
    }
    tracer.finish();
}
