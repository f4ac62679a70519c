//! A network between two hosts that are one.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// A network of one listening address on loopback, which can be cut.
pub(crate) struct Network {
    pub(crate) address: String,
    links: Arc<Mutex<Vec<TcpStream>>>,
    is_open: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
}

impl Network {
    /// Whoever connects is led to the Unix socket `host`, as long as the network is open.
    pub(crate) fn to(host: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let links = Arc::new(Mutex::new(Vec::new()));
        let [is_open, is_over] = [true, false].map(|it| Arc::new(AtomicBool::new(it)));
        let network = Self { address, links, is_open, is_over };
        let (links, open, over) =
            (network.links.clone(), network.is_open.clone(), network.is_over.clone());
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Acquire) {
                    return;
                }
                let is_open = open.load(Ordering::Acquire);
                let Some(far) = is_open.then(|| UnixStream::connect(&host).ok()).flatten() else {
                    continue;
                };
                near.set_nodelay(true).unwrap();
                links.lock().unwrap().push(near.try_clone().unwrap());
                let (back, forth) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                thread::spawn(move || carry(forth, far, |it| it.shutdown(Shutdown::Both)));
                thread::spawn(move || carry(back, near, |it| it.shutdown(Shutdown::Both)));
            }
        });
        network
    }

    pub(crate) fn set_open(&self, is_open: bool) {
        self.is_open.store(is_open, Ordering::Release);
    }

    /// Breaks every connection of this moment; returns how many there were.
    pub(crate) fn cut(&self) -> usize {
        let links: Vec<_> = self.links.lock().unwrap().drain(..).collect();
        links.iter().filter(|link| link.shutdown(Shutdown::Both).is_ok()).count()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        self.cut();
        // So that the thread that accepts notices.
        let _ = TcpStream::connect(self.address.trim_start_matches("tcp:"));
    }
}

fn carry<To: Write>(mut from: impl Read, mut to: To, end: fn(&To) -> std::io::Result<()>) {
    let mut piece = vec![0; 256 << 10];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    // The other way may have ended it already.
    let _ = end(&to);
}
