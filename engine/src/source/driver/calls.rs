//! What the VMM asks for, and the device state that it gives.

use super::super::{CallError, Endpoint, StateSection};
use super::Driver;
use afterimage_protocol::wire::{ControlFrame, MAX_SECTION_BYTES};
use std::sync::Arc;

/// What a VMM can ask of a running source.
#[derive(Debug)]
pub(crate) enum Call {
    Stopped,
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
                self.state = Some(Arc::new(sections));
                Ok(())
            }
            Call::Stopped => self.memory_is_final(),
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

    pub(super) fn send_state(&mut self) {
        let sections = self.state.clone().unwrap_or_default();
        let end = ControlFrame::StateEnd { sections: sections.len() as u32 };
        let pieces = (0..sections.len()).flat_map(move |index| {
            let sections = Arc::clone(&sections);
            // An empty section is one empty piece.
            let count = sections[index].bytes.len().div_ceil(MAX_SECTION_BYTES).max(1);
            (0..count).map(move |piece| {
                let section = &sections[index];
                let start = piece * MAX_SECTION_BYTES;
                let stop = section.bytes.len().min(start + MAX_SECTION_BYTES);
                ControlFrame::Section {
                    name: section.name.clone(),
                    version: section.version,
                    last: piece + 1 == count,
                    bytes: section.bytes[start..stop].to_vec(),
                }
            })
        });
        self.link.send_stream(pieces.chain(std::iter::once(end)));
    }
}
