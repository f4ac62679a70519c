//! A process that is told how the guest fares: the VMM, which has its memory, or the driver,
//! which restores and starts it. It may go and come back.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use afterimage::StateSection;

use super::adapter::Adapter;
use super::door::Door;
use crate::attachment::Word;
use crate::page_server::progress::Progress;

/// How long a process may take to take in a word.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Party {
    /// In what is said.
    name: &'static str,
    adapter: Arc<dyn Adapter>,
    socket: Option<UnixStream>,
    /// Of the last connection, among all of this process, from 1.
    number: u64,
}

impl Party {
    pub(super) const fn new(name: &'static str, adapter: Arc<dyn Adapter>) -> Self {
        Self { name, adapter, socket: None, number: 0 }
    }

    /// Takes a connection, which is heard as `number`, in the place of any before.
    pub(super) fn take(&mut self, socket: UnixStream, number: u64, door: &Door, say: &Progress) {
        self.hang_up();
        self.number = number;
        let hearing = socket.set_write_timeout(Some(PATIENCE)).and_then(|()| socket.try_clone());
        let heard =
            hearing.and_then(|hearing| door.listen(number, hearing, Arc::clone(&self.adapter)));
        self.socket = Some(socket);
        if let Err(error) = heard {
            self.give_up(&error, say);
        }
    }

    /// Of the last connection; 0 before the first.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    /// Whether what is heard as `number` comes from here: also what was said before it hung up.
    pub(super) const fn is(&self, number: u64) -> bool {
        self.number == number
    }

    /// Says something; `false` if nobody is connected.
    pub(super) fn tell(&mut self, word: &Word, say: &Progress) -> bool {
        self.send(say, |adapter, socket| adapter.tell(socket, word))
    }

    /// Hands device state over; `false` if nobody is connected.
    pub(super) fn tell_state(&mut self, state: &[StateSection], say: &Progress) -> bool {
        self.send(say, |adapter, socket| adapter.tell_state(socket, state))
    }

    fn send(
        &mut self,
        say: &Progress,
        send: impl FnOnce(&dyn Adapter, &UnixStream) -> io::Result<()>,
    ) -> bool {
        let Some(socket) = &self.socket else { return false };
        if let Err(error) = send(&*self.adapter, socket) {
            self.give_up(&error, say);
        }
        self.socket.is_some()
    }

    /// Hangs up, so that it notices, and comes back.
    fn give_up(&mut self, error: &io::Error, say: &Progress) {
        say.say(&format!("{} does not listen ({error}); it may come back", self.name));
        self.hang_up();
    }

    pub(super) fn hang_up(&mut self) {
        if let Some(socket) = self.socket.take() {
            // Another handle of it waits to read; it may have ended already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
