//! The thread that does what clients ask for and what may wait for the session.

use crossbeam_channel::Receiver;
use serde_json::{Value, json};

use super::board::{Board, News, Outlet};
use super::capabilities;
use super::happening::Happening;
use super::words::{self, Call, Plain, Recovery, Refusal};

/// Requests that may be under way, of all clients together.
pub(super) const MOST_JOBS: usize = 64;

/// A client's request.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) client: usize,
    pub(super) id: u64,
    pub(super) call: Call,
}

/// Says that all was answered, also if that is so because a call has panicked.
struct AtTheEnd<'a>(&'a Outlet);

impl Drop for AtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.tell(News::AllAnswered);
    }
}

/// Does one after the other until nobody can ask any more.
pub(super) fn run(board: &Board, work: &Receiver<Job>, outlet: &Outlet) {
    let _end = AtTheEnd(outlet);
    for Job { client, id, call } in work {
        tracing::info!(?call, "asked at the control socket");
        let line = words::answer(id, carry_out(board, &call));
        outlet.tell(News::Answered { client, line });
    }
}

fn carry_out(board: &Board, call: &Call) -> Result<Value, Refusal> {
    let done = match call {
        Call::Capabilities => return Ok(capabilities::tell(board)),
        Call::Recover(at) => recover(board, at),
        Call::Set(change) => {
            board.ask_in_order(|it| it.set(change), |it| Happening::parameters(&it.parameters()))
        }
        Call::Plain(verb) => board.ask(|it| match verb {
            Plain::Start => it.start(),
            Plain::Switchover => it.switch_over(),
            Plain::Continue => it.go_on(),
            Plain::Pause => it.pause(),
            Plain::Cancel => it.cancel(),
            Plain::Fence => it.fence(),
        }),
    };
    done.map(|()| json!({}))
}

fn recover(board: &Board, at: &Recovery) -> Result<(), Refusal> {
    // Looking up a name may take long, and nothing happens by it.
    let endpoint = board.ask(|it| it.endpoint(at))?;
    board.ask_in_order(|it| it.recover(endpoint), |_| Happening::recovering())
}
