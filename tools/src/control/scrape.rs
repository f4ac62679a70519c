//! One connection to the metrics: one request, one answer.

use std::time::{Duration, Instant};

use super::board::Board;
use super::connection::{Broken, Connection, Reading};
use crate::metrics;

/// How long a request and its answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// A request is a line and some headers.
const MAX_REQUEST: usize = 8 << 10;

#[derive(Debug)]
pub(super) struct Scrape {
    connection: Connection,
    until: Instant,
    is_answered: bool,
}

impl Scrape {
    pub(super) fn new(connection: Connection) -> Self {
        Self { connection, until: Instant::now() + PATIENCE, is_answered: false }
    }

    pub(super) const fn connection(&self) -> &Connection {
        &self.connection
    }

    /// When its time is over.
    pub(super) const fn until(&self) -> Instant {
        self.until
    }

    /// Reads, and answers once the whole request is there. Says whether there may be more.
    pub(super) fn hear(&mut self, board: &Board) -> Result<bool, Broken> {
        let reading = self.connection.read()?;
        if self.is_answered {
            // What comes behind the request is of no interest, nor is it kept.
            self.connection.forget();
            return Ok(reading == Reading::More);
        }
        let request = self.connection.unparsed();
        let is_whole = request.windows(4).any(|end| end == b"\r\n\r\n");
        if is_whole || request.len() > MAX_REQUEST {
            let answer = metrics::answer(request, || board.image());
            self.connection.forget();
            self.is_answered = true;
            self.connection.say(&answer)?;
        } else if reading == Reading::Ended {
            self.is_answered = true;
        }
        Ok(reading == Reading::More)
    }

    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        Ok(self.connection.flush()?)
    }

    pub(super) const fn is_done(&self) -> bool {
        self.is_answered && !self.connection.has_unsent()
    }
}
