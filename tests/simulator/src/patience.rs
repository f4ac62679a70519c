//! How long nothing may come of a connection before it is given up: `patience.rs` in the engine.

/// The silence agreed on, in steps.
const LEAST: u64 = 200;
/// However often it brings nothing, it is tried again after so many steps.
const MOST: u64 = 3000;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience(u64);

impl Default for Patience {
    fn default() -> Self {
        Self(LEAST)
    }
}

impl Patience {
    /// How many steps nothing may come.
    pub(crate) const fn lasts(self) -> u64 {
        self.0
    }

    /// Something came, after a pause.
    pub(crate) fn rewarded(&mut self, pause: u64) {
        self.0 = (self.0 / 2).max(pause * 4).clamp(LEAST, MOST);
    }

    /// Nothing came, and the connection was given up.
    pub(crate) fn exhausted(&mut self) {
        self.0 = (self.0 * 2).min(MOST);
    }
}
