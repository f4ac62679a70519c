//! A relay between both sides that counts what crosses it.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::error::{BenchError, Doing};
use crate::network::Socket;

/// Bytes passed on in one go.
const BUFFER: usize = 64 << 10;

/// Where to connect instead, and the count of bytes in both directions.
///
/// Its threads end with the connections that they serve.
pub(super) fn start(source: &str) -> Result<(String, Arc<AtomicU64>), BenchError> {
    let listener = TcpListener::bind("127.0.0.1:0").doing("listening for the relay")?;
    let address = listener.local_addr().doing("the address of the relay")?;
    let count = Arc::new(AtomicU64::new(0));
    let (source, counted) = (source.to_owned(), count.clone());
    thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            // What cannot be passed on ends; the engine says so.
            let Ok(far) = Socket::connect(&source) else { return };
            if join(near, far, &counted).is_err() {
                return;
            }
        }
    });
    Ok((format!("tcp:{address}"), count))
}

fn join(near: TcpStream, far: Socket, count: &Arc<AtomicU64>) -> std::io::Result<()> {
    near.set_nodelay(true)?;
    let near = Socket::Tcp(near);
    pass(near.duplicate()?, far.duplicate()?, count.clone());
    pass(far, near, count.clone());
    Ok(())
}

fn pass(mut from: Socket, to: Socket, count: Arc<AtomicU64>) {
    thread::spawn(move || {
        let mut buffer = vec![0; BUFFER];
        while let Ok(length @ 1..) = std::io::Read::read(&mut from, &mut buffer) {
            count.fetch_add(length as u64, Ordering::Relaxed);
            if to.send(&buffer[..length]).is_err() {
                break;
            }
        }
        to.end(Shutdown::Write);
    });
}
