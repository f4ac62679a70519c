//! At which guest addresses memory lies that is only given in order: the rule of
//! `page-server --memory`, and of the preload library, which includes this file.

/// RAM below 4 GiB ends here; the rest continues at [`HIGH_RAM_START`], as in a PC.
pub const LOW_RAM_END: u64 = 3 << 30;

/// Where RAM continues above the MMIO hole.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// Gives out guest addresses from 0 upwards.
#[derive(Clone, Debug)]
pub(crate) struct Placing {
    next: u64,
    /// Where there is no memory: from, up to.
    hole: Option<(u64, u64)>,
}

impl Placing {
    /// Leaves out what a PC has below 4 GiB for devices.
    pub(crate) const fn as_in_a_pc() -> Self {
        Self { next: 0, hole: Some((LOW_RAM_END, HIGH_RAM_START)) }
    }

    /// Leaves out nothing.
    pub(crate) const fn without_hole() -> Self {
        Self { next: 0, hole: None }
    }

    /// The place of a piece of memory: its guest address, and how much of the piece lies there.
    /// What is left lies beyond the hole, and is asked for next.
    pub(crate) fn place(&mut self, length: u64) -> (u64, u64) {
        let mut room = u64::MAX;
        if let Some((start, end)) = self.hole {
            if self.next == start {
                self.next = end;
            }
            if self.next < start {
                room = start - self.next;
            }
        }
        let (at, placed) = (self.next, length.min(room));
        self.next = at.saturating_add(placed);
        (at, placed)
    }
}
