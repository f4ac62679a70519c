//! The measuring processes: this program again, told by lines of JSON what to measure.
//!
//! Invariant: a worker does one unit at a time, and answers each order with exactly one
//! outcome or error; a source says before that where it listens.

use std::io::{self, BufRead, Write};
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use crate::engine::echo::Echo;
use crate::engine::{self, Setup};
use crate::error::{BenchError, Doing};
use crate::floors::{self, fill, local_fault, ping_pong, place, remote_fault, stream};
use crate::memory::Memory;
use crate::network::Listener;
use crate::outcome::Outcome;
use crate::sys;
use crate::unit::{MemoryPlan, Residence, Unit};

/// What a worker is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Be the source of a unit, and listen there.
    Serve {
        /// What is measured.
        unit: Unit,
        /// An address of the engine's kind, with port 0 if any will do.
        listen: String,
    },
    /// Be the destination of a unit.
    Measure {
        /// What is measured.
        unit: Unit,
        /// Where the source listens, if there is one.
        source: Option<Listening>,
    },
}

/// Where a source is to be reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listening {
    /// For the unit itself.
    pub address: String,
    /// For round trips of the same link, if the unit needs them.
    pub echo: Option<String>,
}

/// What a worker says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The source of the unit listens here.
    Listening(Listening),
    /// The unit is done.
    Done(Box<Outcome>),
    /// The unit could not be done.
    Failed(BenchError),
}

/// Bytes of guest memory that a source keeps for units to come.
const MOST_KEPT: u64 = 7 << 30;

/// The most memory that a destination touches before a unit.
const MOST_WARMED: u64 = 3 << 30;

/// Does what standard input says until it ends; as a source with one byte spoilt, if that is
/// asked for.
///
/// # Errors
/// If whoever gives the orders does not keep to the protocol, or is gone.
pub fn run(corrupt_one_byte: bool) -> io::Result<()> {
    let mut memories = Memories { kept: Vec::new(), corrupt_one_byte };
    for line in io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Order::Serve { unit, listen } => serve(unit, &listen, &mut memories),
            Order::Measure { unit, source } => measure(unit, source.as_ref()),
        };
        say(&match answer {
            Ok(outcome) => Answer::Done(Box::new(outcome)),
            Err(error) => Answer::Failed(error),
        })?;
    }
    Ok(())
}

fn say(answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_string(answer)?;
    line.push('\n');
    let mut output = io::stdout().lock();
    output.write_all(line.as_bytes())?;
    output.flush()
}

fn listening(address: String, echo: Option<&Echo>) -> Result<(), BenchError> {
    let echo = echo.map(|echo| echo.address().to_owned());
    say(&Answer::Listening(Listening { address, echo })).doing("saying where the source listens")
}

fn serve(unit: Unit, listen: &str, memories: &mut Memories) -> Result<Outcome, BenchError> {
    if let Some(setup) = Setup::of(unit) {
        let memory = memories.get(setup.memory)?;
        let echo = matches!(unit, Unit::Recovery(_)).then(|| Echo::start(listen)).transpose()?;
        let say = |address| listening(address, echo.as_ref());
        let served = engine::source::serve(unit, memory, setup, listen, echo.as_ref(), say);
        if unit.uses_up_memory() {
            memories.drop_last();
        }
        return served;
    }
    let floor = floors::source_plan(unit);
    let plan = floor.ok_or_else(|| BenchError::Failed(format!("{unit} has no source")))?;
    let memory = memories.get(plan)?;
    let listener = Listener::bind(listen)?;
    listening(listener.address()?, None)?;
    match unit {
        Unit::PingPong(wait) => ping_pong::source(memory, wait, &listener),
        Unit::RemoteFault(plan) => remote_fault::source(memory, plan, &listener),
        Unit::Stream(..) => stream::source(memory, &listener),
        _ => place::source(memory, &listener),
    }
}

fn measure(unit: Unit, source: Option<&Listening>) -> Result<Outcome, BenchError> {
    sys::warm_up(unit.destination_bytes().min(MOST_WARMED));
    let listening = || source.ok_or_else(|| BenchError::Failed(format!("{unit} needs a source")));
    if let Some(setup) = Setup::of(unit) {
        return engine::destination::receive(unit, setup, listening()?);
    }
    let source = || listening().map(|it| it.address.as_str());
    match unit {
        Unit::PingPong(wait) => ping_pong::destination(wait, source()?),
        Unit::LocalFault(wait) => local_fault::run(wait),
        Unit::RemoteFault(plan) => remote_fault::destination(plan, source()?),
        Unit::Stream(into, bytes) => stream::destination(into, bytes, source()?),
        Unit::Fill(mechanism) => fill::run(mechanism),
        Unit::Place(mechanism, bytes) => place::destination(mechanism, bytes, source()?),
        Unit::WorkingSet(Residence { bytes, .. }) => engine::destination::resident(bytes),
        _ => Err(BenchError::Failed(format!("{unit} is not understood"))),
    }
}

/// Guest memory that is kept for the next round: to fill it takes longer than to move it.
#[derive(Debug)]
struct Memories {
    kept: Vec<Memory>,
    corrupt_one_byte: bool,
}

impl Memories {
    fn get(&mut self, plan: MemoryPlan) -> Result<&Memory, BenchError> {
        if let Some(index) = self.kept.iter().position(|memory| memory.plan() == plan) {
            let memory = self.kept.remove(index);
            self.kept.push(memory);
        } else {
            let content = |plan: &MemoryPlan| plan.content_pages() * crate::memory::PAGE;
            while !self.kept.is_empty()
                && self.kept.iter().map(|it| content(&it.plan())).sum::<u64>() + content(&plan)
                    > MOST_KEPT
            {
                self.kept.remove(0);
            }
            let memory = Memory::filled(plan)?;
            if self.corrupt_one_byte {
                memory.word(plan.content_end() / 2 / 4 * 4).fetch_xor(1, Ordering::Relaxed);
            }
            self.kept.push(memory);
        }
        Ok(self.kept.last().expect("just pushed"))
    }

    /// Keeps no more what was got last: its pages are gone, or have other content.
    fn drop_last(&mut self) {
        self.kept.pop();
    }
}
