//! Two measuring processes and the network between them.
//!
//! Invariant: when a [`Pair`] is gone, so are its processes and its network.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::cli;
use crate::error::{BenchError, Doing};
use crate::namespaces::Namespaces;
use crate::outcome::Outcome;
use crate::unit::Unit;
use crate::worker::{Answer, Order};

/// How long one unit may take; far more than any does.
const LIMIT: Duration = Duration::from_mins(10);

/// How both processes are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Network {
    /// TCP over the loopback interface.
    Tcp,
    /// A Unix socket.
    Unix,
    /// TCP between two network namespaces, as fast as it goes or at so many bits a second.
    Veth(Option<u64>),
}

/// What both sides of a unit measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// At the source; empty if there is none.
    pub source: Outcome,
    /// At the destination.
    pub destination: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

/// Two measuring processes, started when they are needed.
#[derive(Debug)]
pub struct Pair {
    network: Network,
    corrupt_one_byte: bool,
    workers: Option<Workers>,
}

impl Pair {
    /// Nothing runs yet. The source's memory may be spoilt, to see that it is found.
    #[must_use]
    pub const fn new(network: Network, corrupt_one_byte: bool) -> Self {
        Self { network, corrupt_one_byte, workers: None }
    }

    /// Measures a unit once.
    ///
    /// # Errors
    /// If it cannot be measured. The processes are started anew then, unless it is only the
    /// machine that lacks something.
    pub fn measure(&mut self, unit: Unit) -> Result<Measured, BenchError> {
        let mut workers = match self.workers.take() {
            Some(workers) => workers,
            None => Workers::start(self.network, self.corrupt_one_byte)?,
        };
        let measured = workers.measure(unit)?;
        // A destination may have to be given up with most of its memory missing.
        if unit.is_given_up() {
            workers.destination = workers.start_side(Side::Destination)?;
        }
        self.workers = Some(workers);
        Ok(measured)
    }
}

#[derive(Debug)]
struct Workers {
    source: Worker,
    destination: Worker,
    answers: Receiver<(Side, Option<Answer>)>,
    sender: Sender<(Side, Option<Answer>)>,
    listen: String,
    namespaces: Option<Namespaces>,
    _directory: TempDir,
}

impl Workers {
    fn start(network: Network, corrupt_one_byte: bool) -> Result<Self, BenchError> {
        let directory = tempfile::Builder::new().prefix("postcopy-bench-").tempdir();
        let directory = directory.doing("a directory for sockets")?;
        let namespaces = match network {
            Network::Veth(rate) => Some(Namespaces::create(rate)?),
            Network::Tcp | Network::Unix => None,
        };
        let listen = match (network, &namespaces) {
            (Network::Unix, _) => format!("unix:{}", directory.path().join("source").display()),
            (_, Some(namespaces)) => format!("tcp:{}:0", namespaces.source_address()),
            (_, None) => "tcp:127.0.0.1:0".to_owned(),
        };
        let (sender, answers) = channel();
        let start = |side| Worker::start(side, corrupt_one_byte, namespaces.as_ref(), &sender);
        let (source, destination) = (start(Side::Source)?, start(Side::Destination)?);
        Ok(Self { source, destination, answers, sender, listen, namespaces, _directory: directory })
    }

    fn start_side(&self, side: Side) -> Result<Worker, BenchError> {
        Worker::start(side, false, self.namespaces.as_ref(), &self.sender)
    }

    fn measure(&mut self, unit: Unit) -> Result<Measured, BenchError> {
        let mut source = None;
        let mut destination = None;
        if unit.has_source() {
            self.source.tell(&Order::Serve { unit, listen: self.listen.clone() })?;
        } else {
            source = Some(Outcome::default());
            self.destination.tell(&Order::Measure { unit, source: None })?;
        }
        loop {
            if let (Some(source), Some(destination)) = (&mut source, &mut destination) {
                let (source, destination) = (std::mem::take(source), std::mem::take(destination));
                return Ok(Measured { source, destination });
            }
            let (side, answer) = self.next(unit)?;
            match answer {
                Some(Answer::Listening(source)) => {
                    self.destination.tell(&Order::Measure { unit, source: Some(source) })?;
                }
                Some(Answer::Done(outcome)) if side == Side::Source => source = Some(*outcome),
                Some(Answer::Done(outcome)) => destination = Some(*outcome),
                Some(Answer::Failed(error)) => return Err(error),
                None => {
                    let text = format!("{unit}: the {side} ended without a word");
                    return Err(BenchError::Failed(text));
                }
            }
        }
    }

    fn next(&self, unit: Unit) -> Result<(Side, Option<Answer>), BenchError> {
        self.answers.recv_timeout(LIMIT).map_err(|error| {
            let why = match error {
                RecvTimeoutError::Timeout => "took too long",
                RecvTimeoutError::Disconnected => "lost its processes",
            };
            BenchError::Failed(format!("{unit} {why}"))
        })
    }
}

#[derive(Debug)]
struct Worker {
    side: Side,
    child: Child,
    orders: Option<ChildStdin>,
}

impl Worker {
    fn start(
        side: Side,
        corrupt_one_byte: bool,
        namespaces: Option<&Namespaces>,
        answers: &Sender<(Side, Option<Answer>)>,
    ) -> Result<Self, BenchError> {
        let doing = format!("starting the {side}");
        let program = std::env::current_exe().doing(&doing)?;
        let mut command = match namespaces {
            None => Command::new(program),
            Some(namespaces) if side == Side::Source => namespaces.in_source(&program),
            Some(namespaces) => namespaces.in_destination(&program),
        };
        command.arg(cli::WORKER);
        if corrupt_one_byte && side == Side::Source {
            command.arg(cli::CORRUPT);
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().doing(&doing)?;
        let orders = child.stdin.take();
        let output = child.stdout.take();
        let answers = answers.clone();
        thread::spawn(move || {
            let lines = output.into_iter().flat_map(|output| BufReader::new(output).lines());
            for line in lines.map_while(Result::ok) {
                let answer = serde_json::from_str(&line).unwrap_or_else(|error| {
                    Answer::Failed(BenchError::Failed(format!("the {side} babbles: {error}")))
                });
                // Nobody listens any more when the pair is gone.
                let _ = answers.send((side, Some(answer)));
            }
            let _ = answers.send((side, None));
        });
        Ok(Self { side, child, orders })
    }

    fn tell(&mut self, order: &Order) -> Result<(), BenchError> {
        let mut line = serde_json::to_string(order).doing("an order")?;
        line.push('\n');
        let orders = self.orders.as_mut().ok_or(std::io::ErrorKind::BrokenPipe);
        orders
            .map_err(std::io::Error::from)
            .and_then(|orders| orders.write_all(line.as_bytes()))
            .doing(&format!("telling the {}", self.side))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp => f.write_str("TCP over loopback"),
            Self::Unix => f.write_str("a Unix socket"),
            Self::Veth(None) => f.write_str("TCP between network namespaces"),
            Self::Veth(Some(rate)) => {
                write!(f, "TCP between network namespaces at {} Mbit/s", rate / 1_000_000)
            }
        }
    }
}
