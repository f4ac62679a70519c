//! Handing guest memory over to page-client, and hearing it and its successors: the VMM's side of
//! the attachment protocol of docs/page-client.md, for a guest that another process drives.
//!
//! All of it is done by one thread, in which no signal handler runs.

use crate::connection::{Connection, RegionOfVmm};
use crate::memory;
use crate::refusal::Shown;
use crate::system;
use crate::table::Placed;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// What is handed over.
pub(crate) struct Offer {
    /// The path of page-client's socket.
    pub(crate) socket: &'static [u8],
    pub(crate) guest: &'static str,
    pub(crate) regions: Vec<Placed>,
    /// The userfaultfd, then the files.
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// The first bytes of a connection, and the version.
const PREFIX: &[u8] = b"AIMGATCH\x01\0\0\0";
/// Pauses between attempts to find a successor.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(500);
/// How long a successor is looked for when the guest needs nothing more of it.
const COURTESY: Duration = Duration::from_mins(1);
const STACK: usize = 256 << 10;

/// Hands memory over, and returns when page-client has taken it; the thread that did so goes on
/// listening. Must be called with all signals blocked, which that thread inherits.
///
/// # Errors
/// A line that says what is wrong and how to mend it.
pub(crate) fn hand_over(offer: Offer) -> Result<(), String> {
    let (sender, taken) = sync_channel(1);
    let thread = thread::Builder::new().name("afterimage".to_owned()).stack_size(STACK);
    thread.spawn(move || Client::of(&offer).run(offer, &sender)).map_err(|error| {
        format!("guest memory cannot be served: no thread is to be had: {error}")
    })?;
    taken.recv().unwrap_or_else(|_| Err("the thread that hands memory over has failed".to_owned()))
}

/// What a VMM says first.
#[derive(Serialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum Hello<'a> {
    /// Here is a guest; the userfaultfd and the files follow.
    Attach {
        name: &'a str,
        files: usize,
        regions: Vec<RegionOfVmm>,
        /// Another process restores its device state and lets it run.
        driven: bool,
    },
    /// The page-client that I had is gone.
    Return { name: &'a str },
}

/// What is said after that.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum Word {
    Attached,
    Refused {
        reason: String,
    },
    /// Said by this side: it has failed to attach.
    Withdrawn,
    /// Only to who restores it. Bytes follow that are not JSON.
    State,
    AllArrived,
    Finished,
    NotHere {
        reason: String,
    },
    Failed {
        reason: String,
    },
    /// For whoever drives the guest, or of a release to come.
    #[serde(other)]
    Other,
}

/// What follows from a word.
enum Next {
    Listen,
    /// Nothing more is said.
    Leave,
}

struct Client {
    socket: &'static [u8],
    guest: &'static str,
    /// The last refusal of a successor, which is said once.
    refusal: Option<String>,
    /// When every page had arrived.
    arrived: Option<Instant>,
    /// The guest does not run here: nobody will come after page-client.
    is_over: bool,
}

impl Client {
    const fn of(offer: &Offer) -> Self {
        Self {
            socket: offer.socket,
            guest: offer.guest,
            refusal: None,
            arrived: None,
            is_over: false,
        }
    }

    fn run(mut self, offer: Offer, taken: &SyncSender<Result<(), String>>) {
        let mut connection = match self.attach(&offer) {
            Ok(connection) => connection,
            // Whoever waits for it ends the process.
            Err(error) => return drop(taken.send(Err(error))),
        };
        // Page-client has its own.
        drop(offer);
        if taken.send(Ok(())).is_err() {
            return;
        }
        loop {
            match self.hear(&mut connection) {
                Ok(Next::Listen) => continue,
                Ok(Next::Leave) => return,
                Err(_) if self.is_over => return,
                Err(_) if self.arrived.is_none() => system::say(
                    &"page-client is gone; whoever touches a missing page waits for it to be \
                      started again",
                ),
                Err(_) => {}
            }
            // A child that was forked has the connection too.
            let _ = connection.socket().shutdown(Shutdown::Both);
            let Some(successor) = self.find_successor() else { return };
            connection = successor;
        }
    }

    fn attach(&self, offer: &Offer) -> Result<Connection, String> {
        let hello = Hello::Attach {
            name: self.guest,
            files: offer.descriptors.len() - 1,
            regions: offer.regions.iter().map(RegionOfVmm::from).collect(),
            driven: true,
        };
        let at = Shown(self.socket);
        let mut connection = Connection::open(self.socket).map_err(|error| {
            format!(
                "could not connect to unix:{at} ({error}): start page-client --attach unix:{at} \
                 first"
            )
        })?;
        let sent = connection
            .greet(PREFIX, &hello)
            .and_then(|()| connection.send_descriptors(&offer.descriptors));
        // Where this failed, page-client may have said why it has stopped listening.
        let heard = match (is_attached(&mut connection), sent) {
            (Ok(Ok(())), Ok(())) => return Ok(connection),
            (Ok(Err(reason)), _) => {
                format!("page-client at unix:{at} refuses the guest's memory: {reason}")
            }
            (Ok(Ok(())), Err(error)) | (Err(error), _) => format!(
                "page-client at unix:{at} has not taken the guest's memory ({error}): is it \
                 page-client that listens there, and does it go on?"
            ),
        };
        // Or it would serve memory that nobody comes back for. It may be gone.
        let _ = connection.send(&Word::Withdrawn);
        Err(heard)
    }

    fn hear(&mut self, connection: &mut Connection) -> io::Result<Next> {
        match connection.receive::<Word>()? {
            Word::AllArrived => {
                memory::all_arrived();
                self.arrived = Some(Instant::now());
            }
            Word::Finished => return Ok(Next::Leave),
            Word::NotHere { reason } => {
                system::say(&format_args!("the guest must not run here: {reason}"));
                // If it has run, its pages come until page-client hangs up.
                self.is_over = true;
            }
            Word::Failed { reason } | Word::Refused { reason } => {
                system::say(&format_args!("page-client says: {reason}"));
            }
            Word::State => {
                system::say(
                    &"page-client is of a release that knows no guest driven by another process: \
                      use matching releases",
                );
                return Ok(Next::Leave);
            }
            Word::Attached | Word::Withdrawn | Word::Other => {}
        }
        Ok(Next::Listen)
    }

    /// Connects until somebody is there again; `None` if nothing is needed of it any more.
    fn find_successor(&mut self) -> Option<Connection> {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.arrived.is_some_and(|since| since.elapsed() > COURTESY) {
                return None;
            }
            let begun = Instant::now();
            match self.return_to_it() {
                Ok(Ok(connection)) => {
                    if self.arrived.is_none() {
                        system::say(&"page-client is back");
                    }
                    return Some(connection);
                }
                Ok(Err(reason)) => {
                    if self.refusal.as_ref() != Some(&reason) {
                        let at = Shown(self.socket);
                        system::say(&format_args!(
                            "whoever is at unix:{at} in page-client's place refuses: {reason}"
                        ));
                        self.refusal = Some(reason);
                    }
                    pause = LAST_PAUSE;
                }
                // Not there yet.
                Err(_) => {}
            }
            thread::sleep(pause.saturating_sub(begun.elapsed()));
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    fn return_to_it(&self) -> io::Result<Result<Connection, String>> {
        let mut connection = Connection::open(self.socket)?;
        connection.greet(PREFIX, &Hello::Return { name: self.guest })?;
        let heard = is_attached(&mut connection)?;
        Ok(heard.map(|()| connection))
    }
}

/// Whether the memory is served, or why not. There is no limit to what is waited for after that.
fn is_attached(connection: &mut Connection) -> io::Result<Result<(), String>> {
    match connection.receive()? {
        Word::Attached => {}
        Word::Refused { reason } => return Ok(Err(reason)),
        other => return Ok(Err(format!("it says {other:?} out of turn"))),
    }
    connection.socket().set_read_timeout(None)?;
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_offered_as_the_protocol_has_it() {
        let placed = Placed {
            guest_address: 0,
            address: 8192,
            length: 4096,
            page: 4096,
            file: 1,
            offset: 7,
        };
        let regions = vec![RegionOfVmm::from(&placed)];
        let hello = Hello::Attach { name: "vm7", files: 2, regions, driven: true };
        assert_eq!(
            serde_json::to_string(&hello).unwrap(),
            r#"{"say":"attach","name":"vm7","files":2,"regions":[{"guest_address":0,"address":8192,"length":4096,"page_size":4096,"file":[1,7]}],"driven":true}"#
        );
        let back = serde_json::to_string(&Hello::Return { name: "vm7" }).unwrap();
        assert_eq!(back, r#"{"say":"return","name":"vm7"}"#);
    }

    #[test]
    fn words_of_releases_to_come_are_passed_over() {
        let hear = |text: &str| serde_json::from_str::<Word>(text).unwrap();
        assert!(matches!(hear(r#"{"say":"run"}"#), Word::Other));
        assert!(matches!(hear(r#"{"say":"something","with":[1]}"#), Word::Other));
        assert!(matches!(hear(r#"{"say":"state","sections":[]}"#), Word::State));
        assert!(matches!(hear(r#"{"say":"refused","reason":"x"}"#), Word::Refused { .. }));
    }
}
