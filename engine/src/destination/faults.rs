//! The fault thread: reads faults, asks for what is missing, and puts it in place.
//!
//! It is the only thread that reads the userfaultfd, so that events and what was asked for
//! are never looked at by two. It owns the request channel. Every page that somebody waits
//! for and that nobody is bringing is in `asked` until it is complete, or in `roomless` if it
//! came and could not be put in place; a new request channel asks again for all that is in
//! `asked`, and so does a timer, because an answer may have been lost with the channel that
//! carried it (I4).

mod image;
mod room;
mod silence;
mod waiting;

use super::arrivals::{Arrivals, Arrived};
use super::driver::Input;
use super::pages::{FaultAnswer, MissingPage};
use crate::inbox::{Inbox, Outlet};
use crate::patience::Patience;
use crate::polling::{AdaptivePolling, Idle};
use crate::sys::socket::Wait;
use crate::transport::Stream;
use afterimage_protocol::layout::{PageNumber, PageRange, PageSize};
use afterimage_protocol::wire::{Channel, DataFrame, Generation, HEADER_BYTES, Header};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub(super) use image::Image;
use room::Roomless;
use waiting::Held;

const INBOX: Token = Token(0);
const FAULTS: Token = Token(1);
const ANSWERS: Token = Token(2);
/// A request without an answer is sent again after this time.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// An install that was refused because of an unread event is tried again at least so often.
const EVENT_RETRY: Duration = Duration::from_micros(100);

/// What comes to the fault thread.
#[derive(Debug)]
pub(super) enum Order {
    /// A new request channel takes the place of the old one.
    Ask { stream: Stream, arrivals: Arrivals, generation: Generation, silence: Duration },
    /// What is asked for lies here too, perhaps.
    TakeFrom(Image),
    /// The source has given this connection up.
    GiveUp(Generation),
    /// Nobody brings these pages any more, and perhaps nobody waits for them.
    Want(PageRange),
    /// The source cannot read these pages, and the VMM handles memory that fails.
    Poison(PageRange),
    /// There is no request channel any more.
    Wait,
    /// The end.
    Stop,
}

/// The request channel, when there is one.
struct Line {
    stream: Stream,
    arrivals: Arrivals,
    generation: Generation,
    incoming: Vec<u8>,
    filled: usize,
    /// Whether the other side sends nothing more: the end is behind what can be read.
    has_end: bool,
    /// Since when something was asked for and nothing has been received.
    waits_since: Option<Instant>,
}

/// A page that was asked for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// When the first fault was read; `None` if nobody waits.
    since: Option<Instant>,
    last: Instant,
    /// When it was asked for first on this request channel.
    first: Instant,
}

/// Where there may be something to read.
#[derive(Clone, Copy, Debug)]
struct Look {
    faults: bool,
    answers: bool,
}

impl Look {
    const EVERYWHERE: Self = Self { faults: true, answers: true };
    const NOWHERE: Self = Self { faults: false, answers: false };

    const fn any(self) -> bool {
        self.faults || self.answers
    }
}

pub(super) struct FaultThread {
    arrived: Arc<Arrived>,
    poll: Poll,
    inbox: Inbox<Order>,
    driver: Outlet<Input>,
    polling: AdaptivePolling,
    line: Option<Line>,
    image: Option<Image>,
    asked: HashMap<PageNumber, Asked>,
    /// Of pages that came and could not be put in place.
    roomless: Roomless,
    held: Vec<Held>,
    /// Pages that are to fail.
    poisoned: Vec<PageRange>,
    /// There were such pages before.
    has_poison: bool,
    again: Vec<MissingPage>,
    /// There was no room for them.
    short_of_room: Vec<MissingPage>,
    /// The VMM has been told of that.
    lacks_room: bool,
    faults: Vec<MissingPage>,
    /// When faults were read last.
    read_at: Instant,
    outgoing: Vec<u8>,
    next_retry: Instant,
    patience: Patience,
}

impl FaultThread {
    /// A thread body and the way to give it orders.
    pub(super) fn new(
        arrived: Arc<Arrived>,
        polling: Duration,
        driver: Outlet<Input>,
    ) -> io::Result<(Self, Outlet<Order>)> {
        let poll = Poll::new()?;
        let (inbox, outlet) = Inbox::new(&poll, INBOX)?;
        let uffd = arrived.pages.memory().uffd().as_raw_fd();
        poll.registry().register(&mut SourceFd(&uffd), FAULTS, Interest::READABLE)?;
        let thread = Self {
            arrived,
            poll,
            inbox,
            driver,
            polling: AdaptivePolling::new(polling),
            line: None,
            image: None,
            asked: HashMap::new(),
            roomless: Roomless::default(),
            held: Vec::new(),
            poisoned: Vec::new(),
            has_poison: false,
            again: Vec::new(),
            short_of_room: Vec::new(),
            lacks_room: false,
            faults: Vec::new(),
            read_at: Instant::now(),
            outgoing: Vec::new(),
            next_retry: Instant::now() + RETRY_AFTER,
            patience: Patience::new(Duration::ZERO),
        };
        Ok((thread, outlet))
    }

    /// Serves until it is told to stop. If it cannot go on, faults stay unanswered.
    pub(super) fn run(mut self) {
        let served = self.serve().and_then(|()| self.arrived.pages.read_last_events());
        if let Err(error) = served {
            tracing::error!(%error, "faults are not answered any more");
            self.driver.send(Input::FaultsFailed(error));
        }
        self.arrived.pages.reading_ended();
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(8);
        // Edges tell of news; what was there before is found by looking.
        let mut look = Look::EVERYWHERE;
        loop {
            if self.take_orders() {
                return Ok(());
            }
            let mut again = Look::NOWHERE;
            if look.faults {
                again.faults = self.read_faults()?;
            }
            self.answer_faults();
            self.try_again();
            // Sent before answers are looked for: they take longer than anything here.
            self.flush();
            if look.answers {
                again.answers = self.take_answers();
            }
            self.retry_if_due();
            self.use_room();
            again.answers |= self.give_up_if_silent();
            if again.any() || !self.inbox.is_empty() {
                // Who has more to read must not keep the other waiting.
                look = if again.any() { Look::EVERYWHERE } else { Look::NOWHERE };
                continue;
            }
            if self.waits_for_events() {
                // An event must be read first, and whoever caused it go on; no edge tells
                // of that. A poll would wait for a whole millisecond.
                std::thread::sleep(EVENT_RETRY);
                look = Look::EVERYWHERE;
                continue;
            }
            look = match self.polling.idle() {
                Idle::Poll => {
                    self.polling.pause();
                    Look { faults: true, answers: !self.asked.is_empty() }
                }
                Idle::Block => self.block(&mut events)?,
            };
        }
    }

    /// Takes what has been ordered; `true` if it is to stop.
    fn take_orders(&mut self) -> bool {
        while let Some(order) = self.inbox.next() {
            self.polling.busy();
            match order {
                Order::Ask { stream, arrivals, generation, silence } => {
                    self.patience.begin_with(silence);
                    self.take_line(stream, arrivals, generation);
                }
                Order::TakeFrom(image) => self.take_from(image),
                Order::GiveUp(generation) => {
                    if self.line.as_ref().is_some_and(|line| line.generation == generation) {
                        self.lose_line(&io::Error::other("the source has given it up"));
                    }
                }
                Order::Want(pages) => self.want(pages),
                Order::Poison(pages) => {
                    self.has_poison = true;
                    self.poisoned.push(pages);
                }
                Order::Wait => self.drop_line(),
                Order::Stop => return true,
            }
        }
        false
    }

    /// Reads faults and discards; `true` if there may be more.
    fn read_faults(&mut self) -> io::Result<bool> {
        let read = self.arrived.pages.read_events(&mut self.faults)?;
        if read.events > 0 {
            self.polling.busy();
            self.read_at = Instant::now();
        }
        for discarded in read.discarded {
            self.arrived.acknowledge_complete(discarded);
        }
        // Who reads less than there was room for has read all; what comes then is an edge.
        Ok(read.may_be_more)
    }

    /// Waits for news, and says where it is.
    fn block(&mut self, events: &mut Events) -> io::Result<Look> {
        let timeout = self
            .has_to_retry()
            .then(|| self.gives_up_at().map_or(self.next_retry, |at| at.min(self.next_retry)))
            .map(|at| at.saturating_duration_since(Instant::now()));
        // mio tells of readiness once, at its edge. An edge that came while we polled is told
        // now; if what it told of has been read, the kernel does not tell it.
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok(Look::EVERYWHERE);
            }
            other => other?,
        }
        let mut look = Look::NOWHERE;
        for event in events.iter() {
            look.faults |= event.token() == FAULTS;
            if event.token() == ANSWERS {
                look.answers = true;
                // Told with what came before it, and not again.
                if let Some(line) = &mut self.line {
                    line.has_end |= event.is_read_closed() || event.is_error();
                }
            }
        }
        Ok(look)
    }

    fn answer_faults(&mut self) {
        let mut faults = std::mem::take(&mut self.faults);
        faults.append(&mut self.again);
        for fault in faults.drain(..) {
            match self.arrived.pages.answer(fault) {
                FaultAnswer::Answered => drop(self.asked.remove(&fault.page)),
                FaultAnswer::BeingWritten => {}
                FaultAnswer::EventPending => self.again.push(fault),
                FaultAnswer::Ask => self.take_or_ask(fault.page),
                FaultAnswer::NoRoom(error) => {
                    // Told once, until there is room again.
                    if !std::mem::replace(&mut self.lacks_room, true) {
                        drop(self.arrived.failed(error));
                    }
                    self.short_of_room.push(fault);
                }
            }
        }
        self.lacks_room = !self.short_of_room.is_empty();
        self.faults = faults;
    }

    fn ask(&mut self, page: PageNumber) {
        let now = Instant::now();
        if self.roomless.waits(page, now) {
            return;
        }
        self.waits_for_nothing_else();
        // Where another vCPU waits for the same page, it has been asked for already.
        match self.asked.entry(page) {
            Entry::Vacant(vacant) => {
                vacant.insert(Asked { since: Some(now), last: now, first: now });
                self.push_request(page);
            }
            Entry::Occupied(mut asked) => drop(asked.get_mut().since.get_or_insert(now)),
        }
    }

    fn push_request(&mut self, page: PageNumber) {
        if let Some(line) = &self.line {
            let frame = DataFrame::Request(PageRange::one(page));
            let mut header = frame.header(line.arrivals.stamp(line.generation));
            if line.arrivals.checksums {
                header = header.sealed([]);
            }
            self.outgoing.extend_from_slice(header.bytes());
            self.waits_for_answer();
        }
    }

    /// Sends what was asked for. The socket's buffer holds more requests than there can be
    /// vCPUs; if it is full nevertheless, the source is stuck, and the timer comes back.
    fn flush(&mut self) {
        let Some(line) = &self.line else {
            self.outgoing.clear();
            return;
        };
        while !self.outgoing.is_empty() {
            match line.stream.send_some(&self.outgoing) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.lose_line(&error);
                    return;
                }
            }
        }
    }

    fn take_line(&mut self, stream: Stream, arrivals: Arrivals, generation: Generation) {
        self.drop_line();
        let raw = stream.as_fd().as_raw_fd();
        let registered =
            self.poll.registry().register(&mut SourceFd(&raw), ANSWERS, Interest::READABLE);
        let largest = arrivals.pages.layout().regions().iter().map(|region| region.page_size);
        let page = largest.max().unwrap_or(PageSize::KIB_4).bytes() as usize;
        let incoming = vec![0; (page + HEADER_BYTES).max(128 << 10)];
        self.line = Some(Line {
            stream,
            arrivals,
            generation,
            incoming,
            filled: 0,
            has_end: false,
            waits_since: None,
        });
        if let Err(error) = registered {
            self.lose_line(&error);
            return;
        }
        let now = Instant::now();
        self.asked.values_mut().for_each(|asked| asked.first = now);
        let pages: Vec<_> = self.asked.keys().copied().collect();
        for page in pages {
            self.push_request(page);
        }
    }

    fn drop_line(&mut self) {
        self.outgoing.clear();
        if let Some(line) = self.line.take() {
            let raw = line.stream.as_fd().as_raw_fd();
            if let Err(error) = self.poll.registry().deregister(&mut SourceFd(&raw)) {
                tracing::debug!(%error, "the request channel was not registered");
            }
            line.stream.shut_down();
        }
    }

    fn lose_line(&mut self, error: &io::Error) {
        if let Some(line) = &self.line {
            tracing::info!(%error, "the request channel ended");
            let stamp = line.arrivals.stamp(line.generation);
            self.driver.send(Input::DataEnded { channel: Channel::Request(0), stamp });
        }
        self.drop_line();
    }

    /// Takes in what one look brings of the answers; `true` if there may be more. One look
    /// only: a source that floods must not keep the thread from faults and orders.
    fn take_answers(&mut self) -> bool {
        let Some(mut line) = self.line.take() else { return false };
        let room = line.incoming.len() - line.filled;
        let received = line.stream.receive(&mut line.incoming[line.filled..], Wait::Never);
        let has_heard = received.is_ok();
        let (may_be_more, result) = match received {
            Ok(got) => {
                self.polling.busy();
                line.filled += got;
                // Who gets less than there was room for has got all, but for the end. (A peer
                // that sends urgent data or descriptors here delays what it sent by a retry.)
                (got == room || line.has_end, self.take_frames(&mut line))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (false, Ok(())),
            Err(error) => (false, Err(error)),
        };
        self.line = Some(line);
        if has_heard {
            self.has_heard();
        }
        if let Err(error) = result {
            self.lose_line(&error);
        }
        may_be_more
    }

    fn take_frames(&mut self, line: &mut Line) -> io::Result<()> {
        let mut used = 0;
        while let Some((header, rest)) =
            line.incoming[used..line.filled].split_first_chunk::<HEADER_BYTES>()
        {
            let header = Header::from_bytes(*header);
            let frame = DataFrame::parse(&header, line.arrivals.pages.layout(), "request")
                .map_err(io::Error::other)?;
            if header.pass().is_some() {
                return Err(io::Error::other("early copies were not asked for"));
            }
            let length = header.length() as usize;
            if length > line.incoming.len() - HEADER_BYTES {
                return Err(io::Error::other("an answer of several pages was not asked for"));
            }
            if rest.len() < length {
                break;
            }
            let content = &rest[..length];
            if line.arrivals.checksums {
                header.verify([content]).map_err(io::Error::other)?;
            }
            let stamp = line.arrivals.stamp(line.generation);
            if stamp.admits(header.stamp()).map_err(io::Error::other)? {
                self.take_frame(frame, content)?;
            } else {
                self.arrived.counters.stale.fetch_add(1, Ordering::Relaxed);
            }
            used += HEADER_BYTES + length;
        }
        line.incoming.copy_within(used..line.filled, 0);
        line.filled -= used;
        Ok(())
    }

    fn take_frame(&mut self, frame: DataFrame, content: &[u8]) -> io::Result<()> {
        match frame {
            DataFrame::Content(pages, _) => {
                let page_bytes = content.len() / pages.count as usize;
                for (page, content) in pages.iter().zip(content.chunks_exact(page_bytes)) {
                    self.arrived.counters.bytes.fetch_add(page_bytes as u64, Ordering::Relaxed);
                    self.place(page, content)?;
                }
            }
            DataFrame::Zero(pages) => self.take_zeros(pages),
            // Asked for before anything is settled; it is asked for again then.
            DataFrame::Unreadable(_) if self.arrived.pages.is_taking_early() => {}
            DataFrame::Unreadable(pages) => {
                for page in pages.iter() {
                    self.asked.remove(&page);
                }
                self.arrived.unreadable(pages);
            }
            DataFrame::Request(_) => {
                return Err(io::Error::other("a source may not send requests"));
            }
        }
        Ok(())
    }
}
