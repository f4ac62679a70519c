//! Driving a source whose guest is stopped already.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use afterimage::{Agreed, Endpoint, Plaintext, Source};

use super::controlled::{Controlled, Counts, Parameters};
use super::options;
use super::words::{Change, Recovery, Refusal, Verb};
use crate::bandwidth::Bandwidth;

/// Whether the guest can be taken back on this side.
#[derive(Clone, Debug)]
pub(crate) enum GoingBack {
    /// It is where whoever has stopped it finds it.
    Possible,
    /// Only as long as the destination agrees; and why nobody may declare that dead.
    ByAgreement(&'static str),
    /// Why not.
    Impossible(&'static str),
}

/// A source, its parameters, and where its guest came from.
pub(crate) struct SourceControl {
    pub(crate) source: Arc<Source>,
    /// Of its memory, as long as no destination has told its own.
    pub(crate) pages: u64,
    pub(crate) plaintext: Plaintext,
    pub(crate) streams: u16,
    pub(crate) bandwidth: Mutex<Bandwidth>,
    pub(crate) going_back: GoingBack,
    pub(crate) switching: Switching,
    /// Begins when the engine holds the guest before it runs, if that is wanted.
    pub(crate) before_run: Option<Arc<Hold>>,
}

/// Who decides when the guest is switched over.
pub(crate) enum Switching {
    /// Nobody any more, and why.
    Over(&'static str),
    /// Its VMM, when it likes.
    Vmm,
    /// Its VMM, which waits for leave before.
    VmmWithLeave(Arc<Hold>),
}

/// A VMM that waits before it switches over, until it is told to go on.
#[derive(Debug, Default)]
pub(crate) struct Hold(Mutex<Held>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Held {
    #[default]
    NotYet,
    Waits,
    Over,
}

impl Hold {
    /// The VMM waits from now on.
    pub(crate) fn begin(&self) {
        *self.now() = Held::Waits;
    }

    fn waits(&self) -> bool {
        *self.now() == Held::Waits
    }

    /// Whether it may go on.
    pub(crate) fn is_over(&self) -> bool {
        *self.now() == Held::Over
    }

    fn release(&self) -> Result<(), Refusal> {
        let mut now = self.now();
        match *now {
            Held::Waits => {
                *now = Held::Over;
                Ok(())
            }
            Held::NotYet => Err(Refusal::not_now(
                "the guest is not held yet: wait for the event \"held\", which comes once a \
                 destination is attached",
            )),
            Held::Over => Err(Refusal::not_now("the guest was let go already")),
        }
    }

    fn now(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Controlled for SourceControl {
    fn counts(&self) -> Counts {
        Counts::Source(self.source.stats(), self.pages)
    }

    fn parameters(&self) -> Parameters {
        let bandwidth = *self.bandwidth.lock().unwrap_or_else(PoisonError::into_inner);
        Parameters { bandwidth: Some(bandwidth), streams: Some(self.streams) }
    }

    fn agreed(&self) -> Option<Agreed> {
        self.source.agreed()
    }

    fn reason_against(&self, verb: Verb) -> Option<String> {
        match verb {
            Verb::Start => Some("it has started: connections are made or taken".to_owned()),
            Verb::Continue if self.before_run.is_some() => None,
            Verb::Switchover | Verb::Continue => match &self.switching {
                Switching::Over(why) => Some((*why).to_owned()),
                Switching::VmmWithLeave(_) => None,
                Switching::Vmm => {
                    Some("nothing is held: the VMM switches over when it likes".to_owned())
                }
            },
            Verb::Cancel | Verb::Fence => match self.going_back {
                GoingBack::ByAgreement(why) if verb == Verb::Fence => Some(why.to_owned()),
                GoingBack::Possible | GoingBack::ByAgreement(_) => None,
                GoingBack::Impossible(why) => Some(why.to_owned()),
            },
            Verb::Pause | Verb::Recover | Verb::Set => None,
        }
    }

    fn switch_over(&self) -> Result<(), Refusal> {
        self.release(Verb::Switchover)
    }

    fn go_on(&self) -> Result<(), Refusal> {
        match &self.switching {
            Switching::VmmWithLeave(hold) if hold.waits() || self.before_run.is_none() => {
                hold.release()
            }
            _ => {
                self.may(Verb::Continue)?;
                // Only once it is held: who asks twice must not let go of what comes next.
                if let Some(hold) = &self.before_run {
                    hold.release()?;
                }
                Ok(self.source.proceed()?)
            }
        }
    }

    fn pause(&self) -> Result<(), Refusal> {
        Ok(self.source.pause()?)
    }

    fn endpoint(&self, at: &Recovery) -> Result<Option<Endpoint>, Refusal> {
        options::endpoint(at, self.plaintext)
    }

    fn recover(&self, at: Option<Endpoint>) -> Result<(), Refusal> {
        Ok(self.source.recover(at)?)
    }

    fn cancel(&self) -> Result<(), Refusal> {
        self.may(Verb::Cancel)?;
        Ok(self.source.reclaim()?)
    }

    fn fence(&self) -> Result<(), Refusal> {
        self.may(Verb::Fence)?;
        Ok(self.source.fence()?)
    }

    fn set(&self, change: &Change) -> Result<(), Refusal> {
        if let Some(before) = change.precopy_bandwidth {
            self.source.set_precopy_background(before.into());
            if change.bandwidth.is_none() {
                return Ok(());
            }
        }
        let bandwidth = bandwidth(change)?;
        self.source.set_background(bandwidth.into());
        *self.bandwidth.lock().unwrap_or_else(PoisonError::into_inner) = bandwidth;
        Ok(())
    }
}

impl SourceControl {
    fn release(&self, verb: Verb) -> Result<(), Refusal> {
        match &self.switching {
            Switching::VmmWithLeave(hold) => hold.release(),
            Switching::Over(_) | Switching::Vmm => self.may(verb),
        }
    }

    fn may(&self, verb: Verb) -> Result<(), Refusal> {
        self.reason_against(verb).map_or(Ok(()), |why| Err(Refusal::not_now(why)))
    }
}

/// The bandwidth that is to be set, which is all that can be.
pub(super) fn bandwidth(change: &Change) -> Result<Bandwidth, Refusal> {
    let nothing = "set: nothing to set: give \"bandwidth\", as \"100M\", \"unlimited\" or \
                   \"on-request\"";
    change.bandwidth.ok_or_else(|| Refusal::bad_request(nothing))
}
