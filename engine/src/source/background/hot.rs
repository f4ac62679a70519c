//! What the guest has written last goes before the rest: it is likely to touch it first.

use super::super::serving::Serving;
use afterimage_protocol::layout::{PageNumber, PageRange};

/// Runs that are looked at in one go, so that requests are not kept waiting.
const LOOKS: usize = 1024;

/// How far one stream has looked.
#[derive(Debug, Default)]
pub(super) struct Hot {
    level: Level,
    cursor: PageNumber,
}

/// How hot pages are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Level {
    /// Written in the last pass, and in the one before.
    #[default]
    Hottest,
    /// Written in the last pass.
    Hot,
    /// Nothing is left.
    Rest,
}

impl Hot {
    /// The next run to send, if there is one.
    pub(super) fn next(&mut self, serving: &Serving) -> Option<PageRange> {
        let written = serving.hot()?;
        for _ in 0..LOOKS {
            if self.level == Level::Rest {
                return None;
            }
            let Some(run) = written.latest.next_set(self.cursor, u64::MAX) else {
                self.level = if self.level == Level::Hottest { Level::Hot } else { Level::Rest };
                self.cursor = PageNumber(0);
                continue;
            };
            let hot = match self.level {
                Level::Hottest => written.before.first_set_in(run),
                _ => Some(run),
            };
            let open = hot.and_then(|hot| serving.book.first_unsent_in(hot));
            // What one look leaves out is looked at by the next.
            let looked = open.or(hot).unwrap_or(run);
            self.cursor = PageNumber(looked.start.0 + looked.count);
            if open.is_some() {
                return open;
            }
        }
        None
    }
}
