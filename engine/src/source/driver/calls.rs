//! What the VMM asks for, and the device state that it gives.

use super::super::{CallError, Endpoint, NotNow, StateSection};
use super::Driver;
use afterimage_protocol::wire::{ControlFrame, MAX_SECTION_BYTES};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a VMM can ask of a running source.
#[derive(Debug)]
pub(crate) enum Call {
    Stopped,
    Section(StateSection),
    SwitchOver(Vec<StateSection>),
    Hold,
    Proceed,
    Reclaim,
    Fence,
    Pause,
    Recover(Option<Endpoint>),
}

impl Driver {
    pub(super) fn call(&mut self, call: Call) -> Result<(), CallError> {
        match call {
            Call::SwitchOver(sections) => {
                if !self.session.is_frozen() {
                    self.memory_is_final()?;
                }
                self.session.bring_state()?;
                self.state.add(sections, true);
                Ok(())
            }
            Call::Stopped => self.memory_is_final(),
            Call::Section(section) => self.take_section(section),
            Call::Hold => {
                self.is_held = true;
                self.session.hold();
                Ok(())
            }
            Call::Proceed => self.proceed(),
            Call::Reclaim => Ok(self.session.reclaim()?),
            Call::Fence => Ok(self.session.fence()?),
            Call::Pause => self.pause(),
            Call::Recover(endpoint) => self.recover(endpoint),
        }
    }

    fn take_section(&mut self, section: StateSection) -> Result<(), CallError> {
        let call = "send device state";
        if self.session.is_over() || self.state.lock().is_complete {
            return Err(NotNow { call, reason: "all of it has been given" }.into());
        }
        if !self.session.is_frozen() {
            return Err(NotNow { call, reason: "the guest was not said to be stopped" }.into());
        }
        self.state.add(vec![section], false);
        self.send_sections();
        Ok(())
    }

    /// The session says that all of it is there; a snapshot has none.
    pub(super) fn send_all_state(&mut self) {
        self.state.add(Vec::new(), true);
        self.send_state();
    }

    /// Sends what was not sent on this connection.
    fn send_state(&mut self) {
        self.state.begin_on(self.attachments);
        let state = self.state.clone();
        self.link.send_stream(std::iter::from_fn(move || state.next_frame()));
    }

    /// A destination is there, and some sections may be.
    pub(super) fn send_sections(&mut self) {
        if self.session.takes_sections() {
            self.send_state();
        }
    }
}

/// Device state on its way out: whole sections, and how far they are sent.
#[derive(Clone, Debug, Default)]
pub(super) struct StateOut(Arc<Mutex<Inside>>);

#[derive(Debug, Default)]
struct Inside {
    sections: Vec<StateSection>,
    is_complete: bool,
    /// Which attachment of a destination it is sent to.
    attachment: u64,
    /// The section to send next, and its first byte.
    next: (usize, usize),
    is_over: bool,
}

impl StateOut {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, mut sections: Vec<StateSection>, is_complete: bool) {
        let mut inside = self.lock();
        inside.sections.append(&mut sections);
        inside.is_complete |= is_complete;
    }

    /// The guest runs elsewhere, or here again.
    pub(super) fn forget(&self) {
        let mut inside = self.lock();
        (inside.sections, inside.next) = (Vec::new(), (0, 0));
    }

    fn begin_on(&self, attachment: u64) {
        let mut inside = self.lock();
        if inside.attachment != attachment {
            (inside.attachment, inside.next, inside.is_over) = (attachment, (0, 0), false);
        }
    }

    fn next_frame(&self) -> Option<ControlFrame> {
        let mut inside = self.lock();
        let Inside { sections, is_complete, next: (index, at), is_over, .. } = &mut *inside;
        let Some(section) = sections.get(*index) else {
            if *is_over || !*is_complete {
                return None;
            }
            *is_over = true;
            return Some(ControlFrame::StateEnd { sections: sections.len() as u32 });
        };
        let stop = section.bytes.len().min(*at + MAX_SECTION_BYTES);
        let bytes = section.bytes[*at..stop].to_vec();
        let last = stop == section.bytes.len();
        (*index, *at) = if last { (*index + 1, 0) } else { (*index, stop) };
        let (name, version) = (section.name.clone(), section.version);
        Some(ControlFrame::Section { name, version, last, bytes })
    }
}
