//! Frames on request and background channels.

use super::{Header, Kind, Stamp, WireError};
use crate::layout::{GuestLayout, PageNumber, PageRange};

/// The most content in one frame, unless a single page is larger.
pub const MAX_CONTENT_BYTES: u64 = 4 << 20;
/// The most pages one request may ask for.
pub const MAX_REQUEST_PAGES: u32 = 64;
/// The most pages any one frame can name; a longer run of zero pages takes several.
pub const MAX_FRAME_PAGES: u64 = u32::MAX as u64;

/// What a header on a data channel says, checked against the layout. Content follows the
/// header and is as long as the pages it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFrame {
    /// Destination to source, on a request channel: these pages are waited for.
    Request(PageRange),
    /// Source to destination: the pages' content follows, within one region.
    Content(PageRange, u32),
    /// Source to destination: all these pages are zero. They may cross regions.
    Zero(PageRange),
    /// Source to destination: the source cannot read these pages.
    Unreadable(PageRange),
}

impl DataFrame {
    /// Its header. `pages` must be checked by the caller; a content frame's length is that
    /// of its pages.
    ///
    /// # Panics
    /// If it names more than [`MAX_FRAME_PAGES`].
    #[must_use]
    pub fn header(&self, stamp: Stamp) -> Header {
        let header = |kind, pages: PageRange| {
            assert!(pages.count <= MAX_FRAME_PAGES, "one frame cannot name pages {pages}");
            Header::new(kind, stamp, pages.start.0, pages.count as u32)
        };
        match *self {
            Self::Request(pages) => header(Kind::PageRequest, pages),
            Self::Content(pages, length) => header(Kind::PageContent, pages).with_length(length),
            Self::Zero(pages) => header(Kind::PageZero, pages),
            Self::Unreadable(pages) => header(Kind::PageUnreadable, pages),
        }
    }

    /// What a header says, on the channel with this name. Unknown frames are refused here
    /// even if they are marked optional: a frame that is new on a data channel needs a
    /// capability of both sides. The direction is left to the caller.
    ///
    /// # Errors
    /// A kind that does not belong on a data channel, pages that the layout does not have,
    /// content of the wrong length, too much of it, or over the border of a region.
    pub fn parse(
        header: &Header,
        layout: &GuestLayout,
        channel: &'static str,
    ) -> Result<Self, WireError> {
        let kind = header.kind().map_err(|kind| WireError::UnknownKind { kind })?;
        let number = kind as u16;
        let pages = PageRange::new(PageNumber(header.page()), u64::from(header.count()));
        let frame = match kind {
            Kind::PageRequest => Self::Request(pages),
            Kind::PageContent => Self::Content(pages, header.length()),
            Kind::PageZero => Self::Zero(pages),
            Kind::PageUnreadable => Self::Unreadable(pages),
            _ => return Err(WireError::Misplaced { kind: number, channel }),
        };
        if pages.is_empty() || !layout.contains(pages) {
            return Err(WireError::OutOfRange {
                kind: number,
                first: pages.start.0,
                count: pages.count,
                pages: layout.page_count(),
            });
        }
        if let Self::Content(pages, length) = frame {
            check_content(layout, pages, length)?;
        } else if header.length() != 0 {
            return Err(WireError::BadLength {
                kind: number,
                length: header.length().into(),
                expected: 0,
            });
        }
        if matches!(frame, Self::Request(_)) && header.count() > MAX_REQUEST_PAGES {
            return Err(WireError::BadValue {
                kind: number,
                field: "page count",
                value: pages.count,
            });
        }
        Ok(frame)
    }
}

fn check_content(layout: &GuestLayout, pages: PageRange, length: u32) -> Result<(), WireError> {
    let kind = Kind::PageContent as u16;
    let mut runs = layout.split(pages);
    let expected = runs.next().map_or(0, |run| run.length);
    if runs.next().is_some() {
        return Err(WireError::BadValue {
            kind,
            field: "pages of two regions from page",
            value: pages.start.0,
        });
    }
    if expected > MAX_CONTENT_BYTES && pages.count > 1 {
        return Err(WireError::TooLong { kind, length: expected, limit: MAX_CONTENT_BYTES });
    }
    if u64::from(length) != expected {
        return Err(WireError::BadLength { kind, length: length.into(), expected });
    }
    Ok(())
}
