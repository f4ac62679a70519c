//! Why pages cannot be freed in a session.

use afterimage_protocol::layout::GuestAddress;
use afterimage_protocol::wire::SessionId;
use std::io;

/// Why a session that is to free pages, or has freed some, cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// A snapshot is served to others too, and gives nothing away.
    #[error("a snapshot cannot free pages, others need them: serve it with Release::Keep")]
    Snapshot,
    /// The record says that pages were freed, and no ledger says which.
    #[error(
        "the record says that pages were freed, and the session is started with Release::Keep: \
         give the ledger that says which"
    )]
    NoLedger,
    /// The record says that pages were freed, and the ledger knows of nothing.
    #[error(
        "the record says that pages were freed, and the ledger is new: give the ledger that the \
         session had before, or freed pages would be sent as zeros"
    )]
    Forgotten,
    /// The ledger knows of freed pages, and the record says that there are none.
    #[error(
        "the ledger says that {noted} pages of 4 KiB were freed, the record that none were: give \
         the record that was written last"
    )]
    NoRecord {
        /// How many.
        noted: u64,
    },
    /// The ledger is another session's.
    #[error("the ledger belongs to session {theirs}, this is {ours}: give an empty file")]
    OtherSession {
        /// The ledger's.
        theirs: SessionId,
        /// This one.
        ours: SessionId,
    },
    /// The ledger was made for other memory.
    #[error(
        "the ledger is for {theirs} pages of 4 KiB, the guest has {ours}: give the memory that \
         the session had before"
    )]
    OtherMemory {
        /// What the ledger covers.
        theirs: u64,
        /// What the guest has.
        ours: u64,
    },
    /// The file has something else in it, or another version of a ledger.
    #[error("the ledger's file is no ledger of version 1: give an empty file")]
    NotALedger,
    /// A region whose pages cannot be freed.
    #[error(
        "pages of the region at guest address {guest_address} cannot be freed: its file must be \
         open for writing, not sealed, and on a file system that can punch holes"
    )]
    Memory {
        /// Which region.
        guest_address: GuestAddress,
        /// What the system said.
        source: io::Error,
    },
    /// Two regions share memory: freeing a page of one would free one of the other.
    #[error(
        "the regions at guest addresses {first} and {second} share memory: pages of either \
         cannot be freed without the other's"
    )]
    Shared {
        /// One region.
        first: GuestAddress,
        /// The other.
        second: GuestAddress,
    },
    /// The system refuses something.
    #[error("the release ledger cannot be used: give a file that is open for reading and writing")]
    Io(#[from] io::Error),
}
