//! The control connection of either side's session thread, and when to make another.

use crate::inbox::{Inbox, Outlet};
use crate::transport::{
    Acceptor, ControlConnection, ControlError, Dialed, Dialer, Received, Stream,
};
use afterimage_protocol::session::Pulse;
use afterimage_protocol::wire::{Channel, ControlFrame, Epoch, Hello, Refusal, RefuseCode, Stamp};
use mio::{Events, Poll, Token};
use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::io;
use std::iter::once;
use std::time::{Duration, Instant};

/// The token of the session thread's inbox.
pub(crate) const INBOX: Token = Token(0);
const CONTROL: Token = Token(1);
/// The first time from one attempt to connect to the next; it doubles up to the last. Whoever
/// waits in a fault when the link comes back waits for the next attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_millis(250);
/// The same where the peer refuses, and for data channels: the link is there, and something else
/// is wrong.
const LAST_PAUSE_WITH_PEER: Duration = Duration::from_secs(1);

/// A data channel that held for so long was no failure.
const HELD: Duration = Duration::from_secs(1);

/// Frames of one round, so that a peer that floods cannot keep the thread from its clock.
const ROUND: usize = 256;
/// Bytes of frames that are made ahead of the socket.
const AHEAD: usize = 1 << 20;
/// A peer that lets so much wait unread is given up.
const MAX_QUEUED: usize = 16 << 20;

/// The token of heartbeats that the session does not know of.
const RECORDING: u64 = 0;

/// When this side has to say that it is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Beat {
    due: Duration,
    interval: Duration,
}

impl Beat {
    /// Where the session's pulse is.
    pub(crate) fn after(pulse: &Pulse) -> Self {
        Self { due: pulse.next(), interval: pulse.interval() }
    }
}

/// Frames that are made as they go out.
pub(crate) type FrameStream = Box<dyn Iterator<Item = ControlFrame> + Send>;

/// Where connections come from.
#[derive(Debug)]
pub(crate) enum Line {
    /// Peers make them.
    Listens {
        /// Held for its thread.
        _acceptor: Acceptor,
    },
    /// Peers make them, and somebody else listens for several sessions.
    Fed,
    /// This side makes them.
    Dials(Dialer),
}

/// Waits for the session thread, and carries its frames.
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each learned once")]
pub(crate) struct SessionLink {
    poll: Poll,
    events: Events,
    line: Line,
    connection: Option<ControlConnection>,
    /// Frames that are made as they go out, one stream after the other.
    streams: VecDeque<FrameStream>,
    /// Some of these must go before whatever is sent next.
    is_ordered: bool,
    /// Frames may be there that were not taken in the last round.
    has_more: bool,
    checksums: bool,
    origin: Instant,
    pause: Duration,
    /// When the last attempt began.
    dialed_at: Option<Instant>,
    redial_at: Option<Instant>,
    /// By hand: no connection is made or taken.
    is_paused: bool,
    /// Data channels that are to be made again.
    pub(crate) data: Redials,
    pub(crate) stale: u64,
}

impl SessionLink {
    pub(crate) fn new(poll: Poll, line: Line) -> Self {
        Self {
            poll,
            events: Events::with_capacity(8),
            line,
            connection: None,
            streams: VecDeque::new(),
            is_ordered: false,
            has_more: false,
            checksums: false,
            origin: Instant::now(),
            pause: FIRST_PAUSE,
            dialed_at: None,
            redial_at: None,
            is_paused: false,
            data: Redials::default(),
            stale: 0,
        }
    }

    /// Time since the link was made, the origin of the session's times.
    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Whether this side makes the connections.
    pub(crate) const fn dials(&self) -> bool {
        matches!(self.line, Line::Dials(_))
    }

    /// Makes a connection, if this side does.
    pub(crate) fn dial(&mut self, hello: Hello) {
        if let Line::Dials(dialer) = &self.line {
            if hello.channel == Channel::Control {
                self.dialed_at = Some(Instant::now());
            }
            dialer.dial(hello);
        }
    }

    /// Whether this outcome of [`dial`](Self::dial) is still waited for.
    pub(crate) fn wants(&self, outcome: &Dialed) -> bool {
        matches!(&self.line, Line::Dials(dialer) if dialer.wants(outcome))
    }

    /// After a pause that grows with each failure.
    pub(crate) fn redial_later(&mut self) {
        self.redial_within(LAST_PAUSE);
    }

    /// The same where the peer is there and refuses: nobody waits for a link, and the pause may
    /// grow longer.
    pub(crate) fn redial_refused(&mut self) {
        self.redial_within(LAST_PAUSE_WITH_PEER);
    }

    fn redial_within(&mut self, most: Duration) {
        if self.dials() && self.redial_at.is_none() && !self.is_paused {
            let now = Instant::now();
            let pause = self.pause.min(most);
            // An attempt that nobody answered has taken its time already. But never at once: the
            // session may have more to say about what has just broken.
            let since = self.dialed_at.unwrap_or(now);
            self.redial_at = Some((since + pause).max(now + FIRST_PAUSE));
            self.pause = (pause * 2).min(most);
        }
    }

    /// Nothing is connected to until [`resume`](Self::resume); what is under way is called off.
    pub(crate) fn pause(&mut self) {
        (self.is_paused, self.redial_at) = (true, None);
        self.data = Redials::default();
        if let Line::Dials(dialer) = &self.line {
            dialer.forget();
        }
    }

    /// Whether nothing shall be connected to, nor accepted.
    pub(crate) const fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Goes on, on another line if one is given: the old one is given up. A connection is made
    /// at once, if this side does.
    pub(crate) fn resume(&mut self, line: Option<Line>) {
        if let Some(line) = line {
            self.line = line;
        }
        (self.is_paused, self.pause) = (false, FIRST_PAUSE);
        self.redial_at = self.dials().then(Instant::now);
    }

    /// Whether there is a greeted control connection.
    pub(crate) const fn has_connection(&self) -> bool {
        self.connection.is_some()
    }

    /// The sides have agreed: if this connection breaks, the next is made soon.
    pub(crate) fn agreed(&mut self) {
        self.pause = FIRST_PAUSE;
    }

    /// Whether the pause is over; says so once.
    pub(crate) fn redial_is_due(&mut self) -> bool {
        let is_due = self.redial_at.is_some_and(|at| at <= Instant::now());
        if is_due {
            self.redial_at = None;
        }
        is_due
    }

    /// When to go on at the latest: at once where something lies in the inbox, because its
    /// edge may have been taken by [`stay_alive`](Self::stay_alive).
    pub(crate) fn unless_waiting<T>(tick: Option<Duration>, inbox: &Inbox<T>) -> Option<Duration> {
        if inbox.is_empty() { tick } else { Some(Duration::ZERO) }
    }

    /// Waits until something comes, or until `tick` on the link's clock.
    pub(crate) fn wait(&mut self, tick: Option<Duration>) -> io::Result<()> {
        let tick = tick.map(|at| at.saturating_sub(self.now()));
        let redial = self.redial_at.into_iter().chain(self.data.next()).min();
        let redial = redial.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = match (tick, redial) {
            _ if self.has_more => Some(Duration::ZERO),
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            other => other,
        }
    }

    /// While a record is written and the session may not be called: says that this side is
    /// there when that is due, and waits for news, or until it is due again, or for `most`.
    /// Nothing is read: what came meanwhile is read before anybody judges the silence.
    pub(crate) fn stay_alive(
        &mut self,
        beat: &mut Option<Beat>,
        most: Option<Duration>,
    ) -> io::Result<()> {
        let now = self.now();
        if let Some(beat) = beat.as_mut().filter(|beat| beat.due <= now) {
            beat.due = now + beat.interval;
            self.send(&ControlFrame::Heartbeat { token: RECORDING });
        }
        // A peer that does not read is given up afterwards.
        let _ = self.flush();
        // Whatever wakes this wait was meant for the next one too.
        self.has_more = true;
        let due = beat.as_ref().map(|beat| beat.due.saturating_sub(now));
        let timeout = due.into_iter().chain(most).min();
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            other => other,
        }
    }

    /// A greeted control connection takes the place of whatever was there.
    pub(crate) fn connected(
        &mut self,
        stream: Stream,
        stamp: Stamp,
        checksums: bool,
        silence: Duration,
    ) -> io::Result<()> {
        self.disconnect();
        stream.watch(silence)?;
        let registry = self.poll.registry();
        self.connection =
            Some(ControlConnection::new(stream, stamp, checksums, registry, CONTROL)?);
        self.checksums = checksums;
        Ok(())
    }

    /// What the sides have agreed on: the kernel may end the connection after this silence.
    pub(crate) fn watch(&self, silence: Duration) {
        if let Some(connection) = &self.connection
            && let Err(error) = connection.watch(silence)
        {
            // It may have broken already.
            tracing::debug!(%error, "the control connection cannot be watched");
        }
    }

    /// Whether frames of this connection carry checksums.
    pub(crate) const fn checksums(&self) -> bool {
        self.checksums
    }

    /// Whether frames that may as well wait can be queued.
    pub(crate) fn has_room(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.queued() < AHEAD)
    }

    /// Whether anything has come since this was asked last, be it a part of a frame.
    pub(crate) fn take_heard(&mut self) -> bool {
        self.connection.as_mut().is_some_and(ControlConnection::take_heard)
    }

    /// Queues a frame, if there is a connection.
    pub(crate) fn send(&mut self, frame: &ControlFrame) {
        match &mut self.connection {
            None => {}
            Some(_) if self.is_ordered => self.streams.push_back(Box::new(once(frame.clone()))),
            Some(connection) => connection.push(frame),
        }
    }

    /// Sends frames, each made when there is room for it. They may be mixed with others.
    pub(crate) fn send_stream(
        &mut self,
        frames: impl Iterator<Item = ControlFrame> + Send + 'static,
    ) {
        self.streams.push_back(Box::new(frames));
    }

    /// The same; whatever is sent afterwards goes out after them.
    pub(crate) fn send_first(
        &mut self,
        frames: impl Iterator<Item = ControlFrame> + Send + 'static,
    ) {
        self.is_ordered = true;
        self.send_stream(frames);
    }

    /// Sends what goes.
    ///
    /// # Errors
    /// The peer does not read. A connection that broke is read to its end first.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        loop {
            while connection.queued() < AHEAD
                && let Some(frames) = self.streams.front_mut()
            {
                match frames.next() {
                    Some(frame) => connection.push(&frame),
                    None => drop(self.streams.pop_front()),
                }
            }
            self.is_ordered &= !self.streams.is_empty();
            if let Err(error) = connection.flush(self.poll.registry(), CONTROL) {
                // What the peer said before it went may still lie here, perhaps its bye.
                tracing::info!(%error, "nothing more goes out on the control connection");
                connection.mute();
                self.streams.clear();
                (self.is_ordered, self.has_more) = (false, true);
                return Ok(());
            }
            if connection.queued() > 0 || self.streams.is_empty() {
                break;
            }
        }
        if connection.queued() > MAX_QUEUED {
            return Err(io::Error::other("the peer does not read its control channel"));
        }
        Ok(())
    }

    /// The frames of one round, at most.
    pub(crate) fn round(&mut self) -> impl Iterator<Item = ()> + use<> {
        self.has_more = true;
        std::iter::repeat_n((), ROUND)
    }

    /// The next frame, if one is there and was not dropped.
    ///
    /// # Errors
    /// The connection is at its end; if the peer broke the protocol, with what to tell it.
    pub(crate) fn receive(&mut self) -> Result<Option<ControlFrame>, Option<Refusal>> {
        let Some(connection) = &mut self.connection else {
            self.has_more = false;
            return Ok(None);
        };
        match connection.receive() {
            Ok(Received::Frame(frame)) => Ok(Some(frame)),
            // The round ends here, so that a flood of such frames cannot keep the thread.
            Ok(Received::Stale) => {
                self.stale += 1;
                Ok(None)
            }
            Ok(Received::Unknown) => Ok(None),
            Ok(Received::Nothing) if connection.is_mute() => Err(None),
            Ok(Received::Nothing) => {
                self.has_more = false;
                Ok(None)
            }
            Err(ControlError::Io(error)) => {
                tracing::info!(%error, "the control connection ended");
                Err(None)
            }
            Err(ControlError::Wire(error)) => {
                Err(Some(Refusal::new(RefuseCode::Protocol, error.to_string())))
            }
        }
    }

    /// Ends the connection, if there is one.
    pub(crate) fn disconnect(&mut self) {
        self.streams.clear();
        (self.is_ordered, self.has_more) = (false, false);
        if let Some(connection) = self.connection.take() {
            connection.close(self.poll.registry());
        }
    }
}

/// Data channels that have broken, each until it is time to make it again: at once where it
/// has held for a while, else after a pause that grows. Something may be wrong at an end that
/// connecting does not mend.
#[derive(Debug, Default)]
pub(crate) struct Redials {
    slots: BTreeMap<Channel, Redial>,
}

#[derive(Debug)]
struct Redial {
    opened: Instant,
    pause: Duration,
    due: Option<(Instant, Epoch)>,
}

impl Redials {
    /// A channel has been opened.
    pub(crate) fn opened(&mut self, channel: Channel) {
        let now = Instant::now();
        let fresh = Redial { opened: now, pause: Duration::ZERO, due: None };
        let slot = self.slots.entry(channel).or_insert(fresh);
        (slot.opened, slot.due) = (now, None);
    }

    /// A channel has ended, and shall be opened again if the epoch is still the same then.
    pub(crate) fn ended(&mut self, channel: Channel, epoch: Epoch) {
        let now = Instant::now();
        let fresh = Redial { opened: now, pause: Duration::ZERO, due: None };
        let slot = self.slots.entry(channel).or_insert(fresh);
        if now.duration_since(slot.opened) >= HELD {
            slot.pause = Duration::ZERO;
        }
        slot.due = Some((now + slot.pause, epoch));
        slot.pause = (slot.pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE_WITH_PEER);
    }

    /// The next channel that it is time to open.
    pub(crate) fn due(&mut self) -> Option<(Channel, Epoch)> {
        let now = Instant::now();
        self.slots.iter_mut().find_map(|(channel, slot)| {
            let (_, epoch) = slot.due.take_if(|(at, _)| *at <= now)?;
            Some((*channel, epoch))
        })
    }

    fn next(&self) -> Option<Instant> {
        self.slots.values().filter_map(|slot| slot.due).map(|(at, _)| at).min()
    }
}

/// Turns what an acceptor hears into messages for one session thread.
pub(crate) fn forward<T: Send + 'static>(
    outlet: Outlet<T>,
    wrap: impl Fn(crate::transport::Accepted) -> T + Send + 'static,
) -> impl FnMut(crate::transport::Accepted) + Send + 'static {
    move |accepted| {
        outlet.send(wrap(accepted));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Address, Plaintext};

    /// Of a link that dials, though nothing is dialed here.
    fn link() -> SessionLink {
        let address = Address::Tcp("127.0.0.1:1".to_owned());
        let hook = crate::threads::ThreadHook::default();
        let dialer = Dialer::start(address, Plaintext::LoopbackOnly, &hook, drop).unwrap();
        SessionLink::new(Poll::new().unwrap(), Line::Dials(dialer))
    }

    /// How long after the last attempt `began` the next one is due.
    fn next(link: &mut SessionLink, redial: fn(&mut SessionLink), began: Instant) -> Duration {
        link.dialed_at = Some(began);
        redial(link);
        link.redial_at.take().unwrap().duration_since(began)
    }

    #[test]
    fn pauses_double_to_250_ms_without_a_link_and_to_a_second_with_a_peer_that_refuses() {
        // In the future, so that no test machine is too slow.
        let began = Instant::now() + Duration::from_mins(10);
        let mut link = link();
        for ms in [20, 40, 80, 160, 250, 250] {
            let pause = next(&mut link, SessionLink::redial_later, began);
            assert_eq!(pause, Duration::from_millis(ms));
        }
        for ms in [250, 500, 1000, 1000] {
            let pause = next(&mut link, SessionLink::redial_refused, began);
            assert_eq!(pause, Duration::from_millis(ms));
        }
        let pause = next(&mut link, SessionLink::redial_later, began);
        assert_eq!(pause, Duration::from_millis(250), "the link is lost after a refusal");
        link.agreed();
        assert_eq!(next(&mut link, SessionLink::redial_later, began), FIRST_PAUSE);
    }

    #[test]
    fn an_attempt_that_took_its_time_is_followed_soon_but_not_at_once() {
        let mut link = link();
        let before = Instant::now();
        for _ in 0..10 {
            link.dialed_at = before.checked_sub(Duration::from_secs(1));
            link.redial_later();
            let at = link.redial_at.take().unwrap();
            assert!(before + FIRST_PAUSE <= at && at <= Instant::now() + FIRST_PAUSE);
        }
    }
}
