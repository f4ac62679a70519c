//! Several trackers as one.

use super::{DirtyTracker, stop_dropped};
use crate::GuestAddress;
use std::io;

/// Reports what any of them reports: KVM's tracker for the vCPUs and a
/// [`DirtyBitmap`](super::DirtyBitmap) for devices, or one for each kind of memory.
#[derive(Debug)]
pub struct Trackers(Vec<Box<dyn DirtyTracker>>);

impl Trackers {
    /// All of these.
    #[must_use]
    pub fn new(trackers: Vec<Box<dyn DirtyTracker>>) -> Self {
        Self(trackers)
    }
}

impl DirtyTracker for Trackers {
    fn start(&mut self) -> io::Result<()> {
        for index in 0..self.0.len() {
            if let Err(error) = self.0[index].start() {
                self.0[..index].iter_mut().for_each(|it| stop_dropped(it.as_mut()));
                return Err(error);
            }
        }
        Ok(())
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|it| it.collect(written))
    }

    fn stop(&mut self) -> io::Result<()> {
        // Every one is stopped, whatever the others say.
        self.0.iter_mut().map(|it| it.stop()).fold(Ok(()), io::Result::and)
    }
}
