//! Driving a source whose guest is stopped already.

use std::sync::{Arc, Mutex, PoisonError};

use afterimage::{Endpoint, Plaintext, Source};

use super::controlled::{Controlled, Counts, Parameters};
use super::options;
use super::words::{Change, Recovery, Refusal, Verb};
use crate::bandwidth::Bandwidth;

/// Whether the guest can be taken back on this side.
#[derive(Clone, Debug)]
pub(crate) enum GoingBack {
    /// It is where whoever has stopped it finds it.
    Possible,
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
    /// Why the guest cannot be switched over from here.
    pub(crate) switched: &'static str,
}

impl Controlled for SourceControl {
    fn counts(&self) -> Counts {
        Counts::Source(self.source.stats(), self.pages)
    }

    fn parameters(&self) -> Parameters {
        let bandwidth = *self.bandwidth.lock().unwrap_or_else(PoisonError::into_inner);
        Parameters { bandwidth: Some(bandwidth), streams: Some(self.streams) }
    }

    fn reason_against(&self, verb: Verb) -> Option<String> {
        match verb {
            Verb::Start => Some("it has started: connections are made or taken".to_owned()),
            Verb::Switchover => Some(self.switched.to_owned()),
            Verb::Continue => Some("nothing is held".to_owned()),
            Verb::Cancel | Verb::Fence => match self.going_back {
                GoingBack::Possible => None,
                GoingBack::Impossible(why) => Some(why.to_owned()),
            },
            Verb::Pause | Verb::Recover | Verb::Set => None,
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
        let bandwidth = bandwidth(change)?;
        self.source.set_background(bandwidth.into());
        *self.bandwidth.lock().unwrap_or_else(PoisonError::into_inner) = bandwidth;
        Ok(())
    }
}

impl SourceControl {
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
