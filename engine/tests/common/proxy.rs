//! A proxy on loopback that knows which channel each of its connections is, and cuts them.

use super::{Pair, Random, Setup};
use afterimage::Address;
use afterimage_protocol::wire::{Channel, GREETING_PREFIX, Greeting};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cut {
    /// Both ends get a reset; what is under way is lost.
    Reset = 1,
    /// The connecting end is told that no more comes; the other way goes on a little.
    HalfClose = 2,
    /// What is sent vanishes for a while, then both ends get a reset.
    BlackHole = 3,
    /// What is sent vanishes for good, and nobody is told.
    Vanish = 4,
    /// A bit is turned round, and all else goes on.
    Corrupt = 5,
    /// A byte is left out, and all else goes on.
    Omit = 6,
    /// Ends, for both, somewhere in what is being sent.
    Truncate = 7,
    /// Nothing goes on until [`Proxy::resume`]; then all of it does.
    Stall = 8,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From whoever connected.
    Forth,
    Back,
}

impl Cut {
    pub fn any(random: &mut Random) -> Self {
        [Self::Reset, Self::HalfClose, Self::BlackHole][random.below(3) as usize]
    }
}

/// Bytes of a hello, which have passed before a connection is carried.
pub const GREETING_BYTES: u64 = 72;

struct Link {
    channel: Channel,
    cut: AtomicU8,
    /// Damaged this way.
    damaged_way: Mutex<Option<Way>>,
    is_damaged: AtomicBool,
    is_over: AtomicBool,
    /// It is reset once so many bytes have passed this way.
    allowance: Option<(Way, u64)>,
}

struct Shared {
    target: String,
    links: Mutex<Vec<Arc<Link>>>,
    stop: AtomicBool,
    bytes: AtomicU64,
    resets: AtomicU64,
    seen: Mutex<Vec<Channel>>,
    /// For the next control connections.
    allowances: Mutex<VecDeque<(Way, u64)>>,
    /// Background streams stand still once so many bytes have passed.
    limit: AtomicU64,
}

/// Its threads end with it.
pub struct Proxy {
    address: Address,
    local: std::net::SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    pub fn start(target: &Address) -> Self {
        let Address::Tcp(target) = target else { panic!("a TCP address") };
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let local = listener.local_addr().expect("a bound socket");
        let shared = Arc::new(Shared {
            target: target.clone(),
            links: Mutex::default(),
            stop: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            seen: Mutex::default(),
            allowances: Mutex::default(),
            limit: AtomicU64::new(u64::MAX),
        });
        let for_thread = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if for_thread.stop.load(Ordering::Acquire) {
                    return;
                }
                let shared = Arc::clone(&for_thread);
                // A connection that breaks is what the proxy is for.
                thread::spawn(move || drop(shared.carry(client)));
            }
        });
        Self { address: Address::Tcp(local.to_string()), local, shared }
    }

    /// A migration through a proxy, without huge pages.
    pub fn between(setup: &Setup) -> (Pair, Self) {
        let mut proxy = None;
        let detour = |address| proxy.insert(Self::start(&address)).address();
        let pair = Pair::start_with(setup, |_, _| (), detour);
        (pair.expect("no huge pages asked for"), proxy.expect("a detour"))
    }

    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// Bytes carried so far, both ways.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Lets background streams go on only until so many bytes have passed, so that what is
    /// done then comes in the middle of a migration, however fast that is.
    pub fn hold_at(&self, bytes: u64) {
        self.shared.limit.store(bytes, Ordering::Release);
    }

    /// Cuts the connections whose channel is wanted; returns how many there were.
    pub fn cut(&self, how: Cut, is_wanted: impl Fn(Channel) -> bool) -> usize {
        let mut links = self.shared.links.lock().expect("not poisoned");
        links.retain(|link| !link.is_over.load(Ordering::Acquire));
        let wanted = links.iter().filter(|link| is_wanted(link.channel));
        let open = wanted.filter(|link| {
            link.cut.compare_exchange(0, how as u8, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        });
        open.count()
    }

    /// Does damage to what goes one way, once, on the connections whose channel is wanted;
    /// returns how many there were. They are [settled](Self::is_settled) when a side has hung
    /// up over it.
    pub fn damage(&self, how: Cut, way: Way, is_wanted: impl Fn(Channel) -> bool) -> usize {
        for link in self.shared.links.lock().expect("not poisoned").iter() {
            *link.damaged_way.lock().expect("not poisoned") = Some(way);
        }
        self.cut(how, is_wanted)
    }

    /// Whether every connection that was cut has come to its end.
    pub fn is_settled(&self) -> bool {
        let links = self.shared.links.lock().expect("not poisoned");
        let mut cut = links.iter().filter(|link| link.cut.load(Ordering::Acquire) != 0);
        cut.all(|link| link.is_over.load(Ordering::Acquire))
    }

    /// What was [stalled](Cut::Stall) goes on.
    pub fn resume(&self) {
        for link in self.shared.links.lock().expect("not poisoned").iter() {
            let (stalled, well) = (Cut::Stall as u8, 0);
            // Others are left as they are.
            let _ = link.cut.compare_exchange(stalled, well, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// The next control connection is reset once so many bytes have passed one way.
    pub fn reset_next(&self, way: Way, bytes: u64) {
        self.shared.allowances.lock().expect("not poisoned").push_back((way, bytes));
    }

    /// How many connections [`reset_next`](Self::reset_next) has reset.
    pub fn resets(&self) -> u64 {
        self.shared.resets.load(Ordering::Acquire)
    }

    /// How many connections there have been of these channels.
    pub fn seen(&self, is_wanted: impl Fn(Channel) -> bool) -> usize {
        let seen = self.shared.seen.lock().expect("not poisoned");
        seen.iter().filter(|channel| is_wanted(**channel)).count()
    }

    /// How many connections are open.
    pub fn open(&self, is_wanted: impl Fn(Channel) -> bool) -> usize {
        let links = self.shared.links.lock().expect("not poisoned");
        let open = links.iter().filter(|link| !link.is_over.load(Ordering::Acquire));
        open.filter(|link| link.cut.load(Ordering::Acquire) == 0 && is_wanted(link.channel)).count()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for link in self.shared.links.lock().expect("not poisoned").iter() {
            link.cut.store(Cut::Reset as u8, Ordering::Release);
        }
        // The thread looks at `stop` once more.
        let _ = TcpStream::connect(self.local);
    }
}

impl Link {
    /// Does to a piece what is to be done to the connection once; how much of it is left.
    fn damage(&self, piece: &mut [u8], length: usize, way: Way) -> usize {
        let cut = self.cut.load(Ordering::Acquire);
        if *self.damaged_way.lock().expect("not poisoned") != Some(way) {
            return length;
        }
        let damages = [Cut::Corrupt, Cut::Omit, Cut::Truncate].map(|cut| cut as u8);
        if !damages.contains(&cut) || self.is_damaged.swap(true, Ordering::AcqRel) {
            return length;
        }
        if cut == Cut::Corrupt as u8 {
            piece[length / 2] ^= 0x10;
            return length;
        }
        // Less than any frame: nobody would miss a whole one.
        if cut == Cut::Omit as u8 { length - 1 } else { length / 2 }
    }
}

impl Shared {
    fn carry(self: &Arc<Self>, mut client: TcpStream) -> std::io::Result<()> {
        let mut prefix = [0; GREETING_PREFIX];
        client.read_exact(&mut prefix)?;
        let announced = Greeting::announced(&prefix).map_err(std::io::Error::other)?;
        let mut body = vec![0; announced.length()];
        client.read_exact(&mut body)?;
        let greeting = Greeting::decode(announced, &body).map_err(std::io::Error::other)?;
        let Greeting::Hello(hello) = greeting else { return Ok(()) };
        let mut server = TcpStream::connect(&self.target)?;
        self.seen.lock().expect("not poisoned").push(hello.channel);
        let mut allowance = None;
        if hello.channel == Channel::Control {
            allowance = self.allowances.lock().expect("not poisoned").pop_front();
        }
        server.write_all(&prefix)?;
        server.write_all(&body)?;
        for socket in [&client, &server] {
            socket.set_nodelay(true)?;
            // How soon a cut takes effect.
            socket.set_read_timeout(Some(Duration::from_millis(5)))?;
            socket.set_write_timeout(Some(Duration::from_millis(5)))?;
        }
        let link = Arc::new(Link {
            channel: hello.channel,
            cut: AtomicU8::new(0),
            damaged_way: Mutex::new(None),
            is_damaged: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            allowance,
        });
        self.links.lock().expect("not poisoned").push(Arc::clone(&link));
        let back = {
            let (shared, link) = (Arc::clone(self), Arc::clone(&link));
            let (from, to) = (server.try_clone()?, client.try_clone()?);
            thread::spawn(move || shared.pump(&link, from, to, Way::Back))
        };
        self.pump(&link, client.try_clone()?, server.try_clone()?, Way::Forth);
        // The other half ends at its next look.
        let _ = back.join();
        link.is_over.store(true, Ordering::Release);
        if link.cut.load(Ordering::Acquire) != 0 {
            for socket in [&client, &server] {
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                let option = nix::sys::socket::sockopt::Linger;
                nix::sys::socket::setsockopt(&socket.as_fd(), option, &linger)?;
            }
        }
        Ok(())
    }

    fn pump(&self, link: &Link, mut from: TcpStream, mut to: TcpStream, way: Way) {
        let mut buffer = vec![0; 64 << 10];
        let (mut grace, mut passed) = (20, 0);
        let greeted = if way == Way::Forth { GREETING_BYTES } else { 0 };
        let mut left = link.allowance.filter(|(at, _)| *at == way).map(|(_, all)| all - greeted);
        loop {
            match link.cut.load(Ordering::Acquire) {
                0 => {}
                cut if cut == Cut::HalfClose as u8 => {
                    if way == Way::Back {
                        let _ = to.shutdown(Shutdown::Write);
                        return;
                    }
                    grace -= 1;
                }
                cut if cut == Cut::BlackHole as u8 => grace -= 1,
                cut if cut == Cut::Stall as u8 && !self.stop.load(Ordering::Acquire) => {
                    thread::sleep(Duration::from_millis(1));
                    continue;
                }
                cut if cut == Cut::Reset as u8 || cut == Cut::Stall as u8 => return,
                _ => {}
            }
            if grace == 0 || link.is_over.load(Ordering::Acquire) {
                return;
            }
            if matches!(link.channel, Channel::Background(_))
                && self.bytes.load(Ordering::Relaxed) >= self.limit.load(Ordering::Acquire)
            {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            let got = match from.read(&mut buffer) {
                Ok(0) => {
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Ok(got) => got,
                Err(error) if is_timeout(&error) => continue,
                Err(_) => {
                    link.is_over.store(true, Ordering::Release);
                    return;
                }
            };
            let cut = link.cut.load(Ordering::Acquire);
            if cut == Cut::BlackHole as u8 || cut == Cut::Vanish as u8 {
                continue;
            }
            let passing = left.map_or(got, |left| got.min(left as usize));
            left = left.map(|left| left - passing as u64);
            // Greetings have no checksum.
            let is_greeted = way == Way::Forth || passed >= GREETING_BYTES;
            passed += got as u64;
            let passing = if is_greeted { link.damage(&mut buffer, passing, way) } else { passing };
            let mut rest = &buffer[..passing];
            while !rest.is_empty() {
                match to.write(rest) {
                    Ok(sent) => {
                        self.bytes.fetch_add(sent as u64, Ordering::Relaxed);
                        rest = &rest[sent..];
                    }
                    Err(error) if is_timeout(&error) => {
                        if link.cut.load(Ordering::Acquire) != 0 {
                            return;
                        }
                    }
                    Err(_) => {
                        link.is_over.store(true, Ordering::Release);
                        return;
                    }
                }
            }
            if link.cut.load(Ordering::Acquire) == Cut::Truncate as u8
                && link.is_damaged.load(Ordering::Acquire)
            {
                link.is_over.store(true, Ordering::Release);
                let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
                return;
            }
            if left == Some(0) {
                self.resets.fetch_add(1, Ordering::AcqRel);
                link.cut.store(Cut::Reset as u8, Ordering::Release);
                return;
            }
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}
