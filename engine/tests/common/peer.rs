//! A peer that speaks the wire by hand, rightly or wrongly.

use super::PATIENCE;
use afterimage::{Address, GuestLayout, Incarnation, SessionId};
use afterimage_protocol::bitmap::{Bitmap, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::{
    Attach, Capabilities, Channel, ControlFrame, DataFrame, GREETING_PREFIX, Generation, Greeting,
    HEADER_BYTES, Header, Hello, Offer, Phase, Refusal, RefuseCode, Role, SessionKind, Stamp,
};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

/// A connection whose every byte the test decides.
pub struct Wire {
    /// Also a Unix socket: what tests do with it works with both.
    pub socket: TcpStream,
}

/// How a connection went on.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard<T> {
    Said(T),
    /// The end of the stream, or a reset.
    Gone,
}

impl<T: std::fmt::Debug> Heard<T> {
    pub fn said(self, what: &str) -> T {
        match self {
            Self::Said(value) => value,
            Self::Gone => panic!("{what}: the connection ended"),
        }
    }
}

impl Wire {
    pub fn connect(address: &Address) -> Self {
        let Address::Tcp(address) = address else { panic!("a TCP address") };
        Self::over(TcpStream::connect(address).expect("somebody listens"))
    }

    pub fn over(socket: TcpStream) -> Self {
        socket.set_nodelay(true).expect("a TCP socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket.set_write_timeout(Some(PATIENCE)).expect("a socket");
        Self { socket }
    }

    pub fn over_unix(socket: std::os::unix::net::UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Self { socket: std::os::fd::OwnedFd::from(socket).into() }
    }

    /// Sends bytes; whether they went. An engine that has hung up makes this fail.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        match self.socket.write_all(bytes) {
            Ok(()) => true,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("the engine does not read, in {PATIENCE:?}")
            }
            Err(_) => false,
        }
    }

    pub fn send_hello(&mut self, hello: Hello) -> bool {
        self.send(&Greeting::Hello(hello).encode())
    }

    pub fn receive(&mut self, length: usize) -> Heard<Vec<u8>> {
        let mut bytes = vec![0; length];
        match self.socket.read_exact(&mut bytes) {
            Ok(()) => Heard::Said(bytes),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("the engine neither says anything nor hangs up, in {PATIENCE:?}")
            }
            Err(_) => Heard::Gone,
        }
    }

    pub fn hear_greeting(&mut self) -> Heard<Greeting> {
        let Heard::Said(prefix) = self.receive(GREETING_PREFIX) else { return Heard::Gone };
        let prefix = prefix.try_into().expect("the prefix's length");
        let announced = Greeting::announced(&prefix).expect("the engine greets rightly");
        let Heard::Said(body) = self.receive(announced.length()) else { return Heard::Gone };
        Heard::Said(Greeting::decode(announced, &body).expect("the engine greets rightly"))
    }

    /// The peer's refusal; panics if it welcomes.
    pub fn hear_refusal(&mut self, what: &str) -> Refusal {
        match self.hear_greeting().said(what) {
            Greeting::Refuse(refusal) => refusal,
            Greeting::Hello(hello) => panic!("{what}: welcomed with {hello:?}"),
        }
    }

    pub fn hear_hello(&mut self, what: &str) -> Hello {
        match self.hear_greeting().said(what) {
            Greeting::Hello(hello) => hello,
            Greeting::Refuse(refusal) => panic!("{what}: {refusal:?}"),
        }
    }

    pub fn hear_control(&mut self) -> Heard<ControlFrame> {
        loop {
            let Heard::Said(header) = self.receive(HEADER_BYTES) else { return Heard::Gone };
            let header = Header::from_bytes(header.try_into().expect("a header's length"));
            let length = ControlFrame::payload_length(&header).expect("the engine speaks rightly");
            let Heard::Said(payload) = self.receive(length) else { return Heard::Gone };
            let frame = ControlFrame::decode(&header, &payload).expect("the engine speaks rightly");
            match frame.expect("the engine's frames are known") {
                ControlFrame::Heartbeat { .. } | ControlFrame::HeartbeatReply { .. } => {}
                frame => return Heard::Said(frame),
            }
        }
    }

    /// A frame of a data channel, with its content.
    pub fn hear_data(&mut self, layout: &GuestLayout) -> Heard<(DataFrame, Vec<u8>)> {
        let Heard::Said(header) = self.receive(HEADER_BYTES) else { return Heard::Gone };
        let header = Header::from_bytes(header.try_into().expect("a header's length"));
        let frame = DataFrame::parse(&header, layout, "data").expect("the engine speaks rightly");
        let Heard::Said(content) = self.receive(header.length() as usize) else {
            return Heard::Gone;
        };
        Heard::Said((frame, content))
    }

    /// How many bytes have reached the engine, in this process, that it has not read.
    pub fn unread_by_peer(&self) -> u64 {
        let port = |address: std::io::Result<std::net::SocketAddr>| {
            format!(":{:04X}", address.expect("a TCP socket").port())
        };
        let (ours, theirs) = (port(self.socket.local_addr()), port(self.socket.peer_addr()));
        let table = std::fs::read_to_string("/proc/self/net/tcp").expect("the kernel's table");
        let sockets = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let mut queues = sockets.filter_map(|fields| {
            let is_theirs =
                fields.len() > 4 && fields[1].ends_with(&theirs) && fields[2].ends_with(&ours);
            is_theirs.then(|| fields[4].split_once(':').expect("two queues").1.to_owned())
        });
        let unread = queues.next().expect("the engine's socket");
        u64::from_str_radix(&unread, 16).expect("a number")
    }

    /// Everything until the connection ends; panics if it does not.
    pub fn hear_end(&mut self, what: &str) -> Vec<ControlFrame> {
        let mut frames = Vec::new();
        loop {
            match self.hear_control() {
                Heard::Said(frame) => frames.push(frame),
                Heard::Gone => return frames,
            }
            assert!(frames.len() < 100_000, "{what}: no end");
        }
    }

    /// Reads until the connection ends, whatever comes.
    pub fn drain(&mut self) {
        let mut bin = [0; 4096];
        loop {
            match self.socket.read(&mut bin) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    panic!("the engine does not hang up, in {PATIENCE:?}")
                }
                Err(_) => return,
            }
        }
    }
}

pub fn hello_of(role: Role, channel: Channel) -> Hello {
    Hello {
        role,
        channel,
        stamp: Stamp::default(),
        capabilities: Capabilities::default(),
        session: SessionId::UNKNOWN,
        incarnation: Incarnation([7; 16]),
    }
}

/// A destination that the test plays, attached to a real source.
pub struct HandDestination {
    pub address: Address,
    pub control: Wire,
    pub hello: Hello,
    pub offer: Offer,
}

impl HandDestination {
    /// Says hello on a control connection, and hears the offer.
    pub fn greet(address: &Address, incarnation: Incarnation) -> Self {
        let mut control = Wire::connect(address);
        let mut hello = hello_of(Role::Destination, Channel::Control);
        hello.incarnation = incarnation;
        assert!(control.send_hello(hello));
        let theirs = control.hear_hello("a source greets a destination");
        (hello.session, hello.stamp) = (theirs.session, theirs.stamp);
        let ControlFrame::Offer(offer) = control.hear_control().said("a source offers") else {
            panic!("a source begins with its offer");
        };
        Self { address: address.clone(), control, hello, offer }
    }

    /// Attaches with nothing, and hears the begin.
    pub fn attach(address: &Address, incarnation: Incarnation) -> Self {
        let mut hand = Self::greet(address, incarnation);
        let layout = hand.offer.layout.clone();
        hand.say(&ControlFrame::Attach(Attach { phase: Phase::Fresh, layout: layout.clone() }));
        let range = layout.all_pages();
        let segment = Segment::encode(&Bitmap::new(range.count), range);
        hand.say(&ControlFrame::Received { range, segment, last: true });
        let begin = hand.control.hear_control().said("a source begins");
        assert_eq!(begin, ControlFrame::Begin);
        hand
    }

    pub fn say(&mut self, frame: &ControlFrame) -> bool {
        let bytes = frame.encode(self.hello.stamp, false);
        self.control.send(&bytes)
    }

    pub fn data_hello(&self, channel: Channel, generation: u32) -> Hello {
        let stamp = Stamp { epoch: self.hello.stamp.epoch, generation: Generation(generation) };
        Hello { channel, stamp, ..self.hello }
    }

    /// Opens a data channel.
    pub fn open(&self, channel: Channel, generation: u32) -> (Wire, Stamp) {
        let mut wire = Wire::connect(&self.address);
        let hello = self.data_hello(channel, generation);
        assert!(wire.send_hello(hello));
        wire.hear_hello("a source takes a data channel");
        (wire, hello.stamp)
    }
}

/// A source that the test plays, with a real destination.
pub struct HandSource {
    pub control: Wire,
    pub hello: Hello,
    pub theirs: Hello,
}

impl HandSource {
    /// Greets a destination that listens.
    pub fn greet(address: &Address, session: SessionId, epoch: u32) -> Self {
        let mut control = Wire::connect(address);
        let hello = source_hello(session, epoch);
        assert!(control.send_hello(hello));
        let theirs = control.hear_hello("a destination greets a source");
        Self { control, hello, theirs }
    }

    pub fn say(&mut self, frame: &ControlFrame) -> bool {
        let bytes = frame.encode(self.hello.stamp, false);
        self.control.send(&bytes)
    }

    /// Offers, hears what the destination has, begins.
    pub fn begin(&mut self, layout: &GuestLayout) {
        self.begin_with(offer_of(layout));
    }

    /// The same with this offer.
    pub fn begin_with(&mut self, offer: Offer) {
        self.say(&ControlFrame::Offer(offer));
        let attach = self.control.hear_control().said("a destination attaches");
        assert!(matches!(attach, ControlFrame::Attach(_)), "{attach:?}");
        loop {
            let frame = self.control.hear_control().said("a destination says what it has");
            let ControlFrame::Received { last, .. } = frame else { panic!("{frame:?}") };
            if last {
                break;
            }
        }
        self.say(&ControlFrame::Begin);
    }

    /// Opens a data channel.
    pub fn open(&self, address: &Address, channel: Channel, generation: u32) -> (Wire, Stamp) {
        let stamp = Stamp { epoch: self.hello.stamp.epoch, generation: Generation(generation) };
        let incarnation = self.theirs.incarnation;
        for _ in 0..1000 {
            let mut wire = Wire::connect(address);
            assert!(wire.send_hello(Hello { channel, stamp, incarnation, ..self.hello }));
            match wire.hear_greeting().said("an answer to a data channel") {
                Greeting::Hello(_) => return (wire, stamp),
                // It may not have read the begin yet, which came on another connection.
                Greeting::Refuse(refusal) if refusal.code == RefuseCode::Stale => {}
                Greeting::Refuse(refusal) => panic!("{refusal:?}"),
            }
        }
        panic!("a destination does not take {channel}");
    }
}

pub fn source_hello(session: SessionId, epoch: u32) -> Hello {
    let mut hello = hello_of(Role::Source, Channel::Control);
    hello.session = session;
    hello.incarnation = Incarnation::default();
    hello.stamp = stamp(epoch, 1);
    hello
}

pub fn offer_of(layout: &GuestLayout) -> Offer {
    Offer {
        kind: SessionKind::Migration,
        streams: 1,
        shards: 1,
        heartbeat_ms: 1000,
        silence_ms: 30_000,
        layout: layout.clone(),
    }
}

pub fn stamp(epoch: u32, generation: u32) -> Stamp {
    Stamp { epoch: afterimage_protocol::wire::Epoch(epoch), generation: Generation(generation) }
}

pub fn pages(start: u64, count: u64) -> PageRange {
    PageRange::new(PageNumber(start), count)
}

/// A frame that asks for pages.
pub fn request(range: PageRange, stamp: Stamp) -> Vec<u8> {
    DataFrame::Request(range).header(stamp).bytes().to_vec()
}

/// A frame with the content of pages of 4 KiB.
pub fn content(range: PageRange, stamp: Stamp, byte: u8) -> Vec<u8> {
    let length = range.count as usize * 4096;
    let mut bytes = DataFrame::Content(range, length as u32).header(stamp).bytes().to_vec();
    bytes.resize(HEADER_BYTES + length, byte);
    bytes
}
