//! One client of the control socket: its requests, and what it is told.

use std::time::{Duration, Instant};

use super::board::Board;
use super::connection::{Broken, Connection, Line, Reading};
use super::words::{self, Call, MAX_LINE, Refusal, Request, Subscription};

/// Between events of progress, in milliseconds.
const PAUSES: std::ops::RangeInclusive<u64> = 50..=60_000;
/// Lines that are taken in one go, so that nobody is kept from the others.
const MOST_LINES: usize = 64;

#[derive(Debug)]
pub(super) struct Client {
    connection: Connection,
    subscribed: Option<Subscribed>,
    /// Requests under way elsewhere.
    waiting: usize,
    has_ended: bool,
}

#[derive(Debug)]
struct Subscribed {
    /// The last event that it knows of by the state that it was told.
    after: u64,
    progress: Option<Progress>,
}

#[derive(Clone, Copy, Debug)]
struct Progress {
    pause: Duration,
    due: Instant,
}

/// What is to be done elsewhere: a request with its number.
pub(super) type Ordered = (u64, Call);

impl Client {
    /// Greets.
    pub(super) fn new(connection: Connection, board: &Board) -> Result<Self, Broken> {
        let mut client = Self { connection, subscribed: None, waiting: 0, has_ended: false };
        client.say(&words::line(&board.greeting()))?;
        Ok(client)
    }

    pub(super) const fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Reads and answers some of what it asks; what must be done elsewhere goes to `order`,
    /// which may have no room. Says whether there may be more.
    pub(super) fn hear(
        &mut self,
        board: &Board,
        mut order: impl FnMut(Ordered) -> Result<(), Refusal>,
    ) -> Result<bool, Broken> {
        // What was read before comes first: more is taken in only once nothing is left of it.
        if self.answer_some(board, &mut order)? {
            return Ok(true);
        }
        let reading = self.connection.read()?;
        self.has_ended |= reading == Reading::Ended;
        let is_full = self.answer_some(board, &mut order)?;
        Ok(is_full || reading == Reading::More)
    }

    /// Says whether there may be more of what was read.
    fn answer_some(
        &mut self,
        board: &Board,
        order: &mut impl FnMut(Ordered) -> Result<(), Refusal>,
    ) -> Result<bool, Broken> {
        for _ in 0..MOST_LINES {
            match self.connection.line(MAX_LINE) {
                None => return Ok(false),
                Some(Line::Whole(line)) => self.take(&line, board, order)?,
                Some(Line::TooLong) => {
                    let what = format!("a request of more than {MAX_LINE} bytes");
                    self.say(&words::refuse(None, &Refusal::bad_request(what)))?;
                }
            }
        }
        Ok(true)
    }

    fn take(
        &mut self,
        line: &[u8],
        board: &Board,
        order: &mut impl FnMut(Ordered) -> Result<(), Refusal>,
    ) -> Result<(), Broken> {
        let (id, request) = match words::parse(line) {
            Ok(parsed) => parsed,
            Err((id, refusal)) => return self.say(&words::refuse(id, &refusal)),
        };
        match request {
            Request::Query => self.say(&words::answer(id, Ok(board.image().to_json()))),
            Request::Subscribe(subscription) => self.subscribe(id, subscription, board),
            Request::Call(call) => match order((id, call)) {
                Ok(()) => {
                    self.waiting += 1;
                    Ok(())
                }
                Err(refusal) => self.say(&words::refuse(Some(id), &refusal)),
            },
        }
    }

    /// Tells the state; every event after it follows.
    fn subscribe(&mut self, id: u64, with: Subscription, board: &Board) -> Result<(), Broken> {
        if let Some(pause) = with.progress_ms.filter(|it| !PAUSES.contains(it)) {
            let (least, most) = (PAUSES.start(), PAUSES.end());
            let what = format!("subscribe: progress_ms {pause} must be {least} to {most}");
            return self.say(&words::refuse(Some(id), &Refusal::bad_request(what)));
        }
        let image = board.image();
        let progress = with.progress_ms.map(Duration::from_millis);
        let progress = progress.map(|pause| Progress { pause, due: Instant::now() + pause });
        self.subscribed = Some(Subscribed { after: Board::sequence(&image), progress });
        self.say(&words::answer(id, Ok(image.to_json())))
    }

    /// An event with its number, as a line.
    pub(super) fn tell(&mut self, sequence: u64, line: &str) -> Result<(), Broken> {
        match &self.subscribed {
            Some(subscribed) if sequence > subscribed.after => self.say(line),
            _ => Ok(()),
        }
    }

    /// The answer to what was done elsewhere.
    pub(super) fn answer(&mut self, line: &str) -> Result<(), Broken> {
        self.waiting = self.waiting.saturating_sub(1);
        self.say(line)
    }

    /// When it is to be told how things stand.
    pub(super) fn due(&self) -> Option<Instant> {
        self.subscribed.as_ref()?.progress.map(|progress| progress.due)
    }

    /// Tells it how things stand if it is time.
    pub(super) fn progress(&mut self, now: Instant, board: &Board) -> Result<(), Broken> {
        let progress = self.subscribed.as_mut().and_then(|it| it.progress.as_mut());
        let Some(progress) = progress.filter(|it| it.due <= now) else { return Ok(()) };
        progress.due = now + progress.pause;
        self.say(&board.progress())
    }

    fn say(&mut self, line: &str) -> Result<(), Broken> {
        self.connection.say(line)
    }

    pub(super) fn flush(&mut self) -> Result<(), Broken> {
        Ok(self.connection.flush()?)
    }

    /// Whether it has hung up, and nothing is owed to it.
    pub(super) fn is_done(&self) -> bool {
        self.has_ended
            && !self.connection.unparsed().contains(&b'\n')
            && self.waiting == 0
            && self.subscribed.is_none()
            && !self.connection.has_unsent()
    }
}
