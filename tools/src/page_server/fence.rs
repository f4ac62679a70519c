//! `--fence`: an operator declares the destination dead; and what is said to a destination that
//! comes back all the same.

use std::fs::File;
use std::sync::Arc;

use afterimage::{
    Endpoint, GuestAddress, Source, SourceEvent, SourceMemory, SourceOwnership, SourceRegion,
};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Parts;
use super::failure::Failure;
use super::holding::Kept;
use super::options::Options;
use super::progress::Progress;
use super::report::{Counts, Journal, Outcome, Report};
use super::survival::{Survival, failure};
use crate::handoff;
use crate::ram::PAGE_BYTES;

/// Records that the guest is this side's again.
pub(super) fn fence(
    options: &Options,
    progress: &Progress,
    mut journal: Journal,
) -> Result<Report, Failure> {
    let Some(path) = &options.state else { return Err(Failure::usage("give --state")) };
    // A server that lives has the file; it says so, and how to stop it.
    let mut survival = Survival::open(options)?;
    let file = survival.state_file().cloned().ok_or_else(|| Failure::usage("give --state"))?;
    survival.connect(options)?;
    let mut place = survival.place();
    let is_fenced = file.record().is_some_and(|it| it.ownership == SourceOwnership::Fenced);
    // Who goes back needs something to go back to. A second time a VMM may have it already.
    let kept = if is_fenced { None } else { survival.claim()? };
    let is_gone = !is_fenced && kept.is_none();
    if let Some(Kept { guest, giver: Some(giver) }) = &kept {
        // A VMM that still waits for its answer would resume its guest when the keeper lets go
        // of it, and another may run it by then.
        handoff::say_taken(giver, &guest.session.to_string())
            .map_err(Failure::of("tell the VMM that its guest was taken"))?;
        if let Some(holding) = &mut survival.holding {
            holding.settle(progress);
        }
    }
    if let Some(holding) = &survival.holding {
        if is_gone {
            return Err(Failure::new(format!(
                "not fenced: there is no {}, so the guest cannot be this side's again",
                holding.place()
            )));
        }
        place = Some(holding.place());
    }
    let record = file.fence().map_err(|error| failure(&error))?;
    journal.begin(&record.session.to_string(), 0);
    journal.note("fenced", None);
    let place = place.unwrap_or_else(|| "where it was served from".to_owned());
    progress.say(&format!(
        "session {} is fenced, in epoch {}: the guest is this side's again, as of the switchover; \
         its memory and device state: {place}",
        record.session, record.epoch.0
    ));
    progress.say(&format!(
        "start page-server again with --state {} where the destination may come back: it refuses it",
        path.display()
    ));
    journal.guest_at(place);
    Ok(journal.close(Outcome::Fenced, Counts::default(), Vec::new()))
}

/// Refuses destinations until a signal.
pub(super) fn refuse(
    survival: &Survival,
    endpoint: Endpoint,
    options: &Options,
    parts: Parts,
) -> Result<Report, Failure> {
    let Parts { mut waiter, progress, mut journal, desk } = parts;
    let Some(record) = survival.record() else { return Err(Failure::new("nothing is recorded")) };
    let mut source_options = super::source_options(options);
    (source_options.record, source_options.ledger) = (record, survival.ledger());
    let (source, events) = Source::start(no_memory()?, endpoint, source_options)
        .map_err(Failure::of("start refusing"))?;
    let session = record.session.to_string();
    journal.begin(&session, 0);
    desk.name(&session);
    progress.say(&format!(
        "session {} was fenced: a destination that comes back is refused; a signal ends this",
        record.session
    ));
    waiter.watch(&events).map_err(Failure::of("wait for the session"))?;
    while waiter.wait(progress.interval()).map_err(Failure::of("wait for the session"))? == 0 {
        while let Some(event) = events.try_next() {
            desk.note(&event);
            if event == SourceEvent::PersistFailed {
                progress.say("warning: the state file could not be written");
            }
        }
    }
    drop(source);
    Ok(journal.close(Outcome::Fenced, Counts::default(), Vec::new()))
}

/// A session has memory, even one in which nobody gets as far as that.
fn no_memory() -> Result<Arc<SourceMemory>, Failure> {
    let file = memfd_create(c"nothing", MFdFlags::MFD_CLOEXEC).map(File::from);
    let file = file.map_err(Failure::of("make a memfd"))?;
    file.set_len(PAGE_BYTES).map_err(Failure::of("make a memfd"))?;
    let region = SourceRegion::file(GuestAddress(0), file.into(), 0, PAGE_BYTES);
    let memory = region.and_then(|region| SourceMemory::new(vec![region]));
    Ok(Arc::new(memory.map_err(Failure::of("make a memfd"))?))
}
