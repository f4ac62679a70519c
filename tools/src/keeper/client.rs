//! A client's connection to a keeper.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};

use super::packet::{self, MAX_FILES};
use super::words::{Listed, Reply, Request, VERSION, Why};

/// How long a keeper may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a keeper did not do what it was asked. What it holds is as before, unless the error says
/// otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeeperError {
    /// Nobody listens there.
    #[error(
        "could not connect to the keeper at unix:{0}: start afterimage-keeper --listen unix:{0}",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection has failed: the keeper has ended, or has hung up. What was asked last
    /// may have been done or not.
    #[error("the keeper at unix:{} is gone (could not {operation})", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The connection has failed when all of a set had been sent.
    #[error(
        "the keeper at unix:{} is gone, and whether it has stored the guest is not known",
        path.display()
    )]
    InDoubt {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It says no.
    #[error("the keeper at unix:{} refuses: {reason}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// For programs.
        why: Why,
        /// In its words.
        reason: String,
    },
}

impl KeeperError {
    /// Whether the keeper refused for this reason.
    #[must_use]
    pub fn is(&self, expected: Why) -> bool {
        matches!(self, Self::Refused { why, .. } if *why == expected)
    }
}

/// A descriptor and what it is called in its set.
#[derive(Debug)]
pub struct NamedFile {
    /// Its name.
    pub name: String,
    /// A duplicate of one's own.
    pub file: OwnedFd,
}

/// A connection to a keeper. What this connection has claimed nobody else can claim until it
/// is dropped, or its process ends.
///
/// Every call waits for the keeper's answer, for 10 s at most. As a descriptor ([`AsFd`]) it
/// becomes readable when the keeper is gone: what it held is lost then, unless its clients
/// connect again and store it again.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    path: PathBuf,
}

impl Keeper {
    /// Connects to the keeper that listens on `path`. `name` says who this is, for its log.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn connect(path: &Path, name: &str) -> Result<Self, KeeperError> {
        let wrap = |source| KeeperError::Connect { path: path.to_owned(), source };
        let socket = packet::connect(path, PATIENCE).map_err(wrap)?;
        let mut keeper = Self { socket, path: path.to_owned() };
        let name = name.to_owned();
        keeper.ask(&Request::Hello { version: VERSION, name }, &[], "greet it")?;
        Ok(keeper)
    }

    /// Stores a set under a guest's name, whole or not at all, and claims it. It takes the
    /// place of one that this connection has claimed.
    ///
    /// # Errors
    /// [`KeeperError`], also if there is such a guest that this connection has not claimed.
    pub fn store(
        &mut self,
        guest: &str,
        files: &[(&str, BorrowedFd<'_>)],
    ) -> Result<(), KeeperError> {
        let what = "store a guest";
        for batch in files.chunks(MAX_FILES) {
            let (names, raw) = split(batch);
            self.ask(&Request::Put { guest: guest.to_owned(), names }, &raw, what)?;
        }
        let commit = Request::Commit { guest: guest.to_owned() };
        self.ask(&commit, &[], what).map_err(|error| match error {
            KeeperError::Gone { path, source, .. } => KeeperError::InDoubt { path, source },
            other => other,
        })
    }

    /// Adds descriptors to a guest's set; one of a name that is there is replaced. More than
    /// 64 are added in several steps.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn add(
        &mut self,
        guest: &str,
        files: &[(&str, BorrowedFd<'_>)],
    ) -> Result<(), KeeperError> {
        for batch in files.chunks(MAX_FILES) {
            let (names, raw) = split(batch);
            let request = Request::Add { guest: guest.to_owned(), names };
            self.ask(&request, &raw, "add descriptors")?;
        }
        Ok(())
    }

    /// Lets go of descriptors of a guest's set; names that are not there are no error.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn let_go(&mut self, guest: &str, names: &[&str]) -> Result<(), KeeperError> {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        self.ask(&Request::Drop { guest: guest.to_owned(), names }, &[], "let go of descriptors")
    }

    /// Claims a guest.
    ///
    /// # Errors
    /// [`KeeperError`]; [`Why::Claimed`] if another process has, [`Why::NotThere`] if there is
    /// no such guest.
    pub fn claim(&mut self, guest: &str) -> Result<(), KeeperError> {
        self.ask(&Request::Claim { guest: guest.to_owned() }, &[], "claim a guest")
    }

    /// Gives a claim back.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn release(&mut self, guest: &str) -> Result<(), KeeperError> {
        self.ask(&Request::Release { guest: guest.to_owned() }, &[], "give a claim back")
    }

    /// Gets duplicates of all descriptors of a guest that this connection has claimed.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn fetch(&mut self, guest: &str) -> Result<Vec<NamedFile>, KeeperError> {
        let what = "fetch a guest";
        let mut all = Vec::new();
        loop {
            let request = Request::Fetch { guest: guest.to_owned(), from: all.len() };
            let (reply, files) = self.exchange(&request, &[], what)?;
            match reply {
                Reply::Files { names, total } if names.len() == files.len() => {
                    let is_last = names.is_empty();
                    let named = names.into_iter().zip(files);
                    all.extend(named.map(|(name, file)| NamedFile { name, file }));
                    if is_last || all.len() >= total {
                        return Ok(all);
                    }
                }
                other => return Err(self.unexpected(other, what)),
            }
        }
    }

    /// Lets go of a guest that no other connection has claimed.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn remove(&mut self, guest: &str) -> Result<(), KeeperError> {
        self.ask(&Request::Remove { guest: guest.to_owned() }, &[], "remove a guest")
    }

    /// Which guests are held.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn list(&mut self) -> Result<Vec<Listed>, KeeperError> {
        let what = "list guests";
        match self.exchange(&Request::List, &[], what)?.0 {
            Reply::Guests { guests } => Ok(guests),
            other => Err(self.unexpected(other, what)),
        }
    }

    /// A request that is done or refused.
    fn ask(
        &mut self,
        request: &Request,
        files: &[BorrowedFd<'_>],
        what: &'static str,
    ) -> Result<(), KeeperError> {
        match self.exchange(request, files, what)?.0 {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(other, what)),
        }
    }

    fn exchange(
        &mut self,
        request: &Request,
        files: &[BorrowedFd<'_>],
        operation: &'static str,
    ) -> Result<(Reply, Vec<OwnedFd>), KeeperError> {
        let gone = |source| {
            // An answer that comes after all must not be taken for that to the next request. If
            // it cannot be shut down, the other side has done so.
            let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
            KeeperError::Gone { path: self.path.clone(), operation, source }
        };
        // One that has hung up may have said why before it did.
        let sent = packet::send(&self.socket, request, files);
        let answer = match packet::receive(&self.socket) {
            // Told first where it has not read what was sent; what it said lies behind that.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                packet::receive(&self.socket)
            }
            other => other,
        };
        let answer = answer.and_then(|packet| match packet {
            Some(packet) => Ok((serde_json::from_slice(&packet.bytes)?, packet.files)),
            None => Err(sent.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into())),
        });
        answer.map_err(gone)
    }

    fn unexpected(&self, reply: Reply, operation: &'static str) -> KeeperError {
        let path = self.path.clone();
        match reply {
            Reply::Refused { why, reason } => KeeperError::Refused { path, why, reason },
            other => {
                let source = io::Error::other(format!("it answers {other:?}"));
                KeeperError::Gone { path, operation, source }
            }
        }
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A set as it is stored.
pub(super) fn borrowed(set: &[NamedFile]) -> Vec<(&str, BorrowedFd<'_>)> {
    set.iter().map(|it| (it.name.as_str(), it.file.as_fd())).collect()
}

fn split<'f>(batch: &[(&str, BorrowedFd<'f>)]) -> (Vec<String>, Vec<BorrowedFd<'f>>) {
    batch.iter().map(|(name, file)| ((*name).to_owned(), *file)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    #[test]
    fn an_answer_that_comes_too_late_is_no_answer_to_the_next_request() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let mut keeper = Keeper { socket, path: PathBuf::from("nowhere") };
        packet::send(&other, &"nonsense", &[]).unwrap();
        assert!(matches!(keeper.claim("web1"), Err(KeeperError::Gone { .. })));
        // It cannot be sent where the connection is shut down.
        let _ = packet::send(&other, &Reply::Done, &[]);
        let removed = keeper.remove("web1");
        assert!(matches!(removed, Err(KeeperError::Gone { .. })), "{removed:?}");
    }
}
