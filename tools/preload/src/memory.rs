//! Named memory from its mapping until every page has arrived.
//!
//! Invariant: what is registered is not mapped a second time, nor moved, as long as pages are
//! missing. Before the memory is handed over, whatever would break that ends the process; after
//! that its guest may run, and the call fails with `EBUSY`.

use crate::attachment::{self, Offer};
use crate::config::{self, Config, Entry};
use crate::maps::{self, Mapped};
use crate::named::OpenFile;
use crate::refusal::{ConfigError, Refusal, Shown, Why};
use crate::system::{self, MapCall, MoveCall, NoSignals, last_error};
use crate::table::{MAX_REGIONS, Table};
use crate::uffd::Userfaultfd;
use libc::{c_int, c_void};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

static MEMORY: Mutex<Memory> = Mutex::new(Memory { table: Table::new(), uffd: None });
/// Whoever mapped named memory first. A child that goes on without exec has another number, and
/// must not wait for a lock that a thread of its parent has held.
static OWNER: AtomicI32 = AtomicI32::new(0);
/// page-client has it all, and the guest may run.
static IS_SERVED: AtomicBool = AtomicBool::new(false);
/// Every page has arrived: nothing is left to do.
static HAS_ARRIVED: AtomicBool = AtomicBool::new(false);
/// What is registered, for those who may not take the lock: an allocator that is called while it
/// is held moves memory of its own.
static REGISTERED: [Registered; MAX_REGIONS] = [const { Registered::none() }; MAX_REGIONS];

struct Memory {
    table: Table,
    uffd: Option<Userfaultfd>,
}

/// A mapping of named memory that is about to be made.
#[derive(Clone, Copy)]
enum Admitted {
    /// One more.
    New(Mapped),
    /// One that is there is replaced by the same, as QEMU does with pages that have failed.
    InPlace(Mapped),
}

/// Maps a file; `None` if it is nothing to this library, and the caller maps it.
pub(crate) fn map(call: &MapCall) -> Option<Result<*mut c_void, c_int>> {
    if HAS_ARRIVED.load(Ordering::Acquire) {
        return None;
    }
    let config = config::get()?;
    let file = OpenFile::of(call.fd)?;
    let name = name_of(config, call, &file)?;
    let _signals = NoSignals::begin();
    let parent = owner();
    if parent != system::process() {
        return Some(Err(refuse(&Refusal { name, why: Why::OfAChild { parent } })));
    }
    let mut memory = lock();
    if HAS_ARRIVED.load(Ordering::Acquire) {
        return None;
    }
    let refusal = |why| Refusal { name, why };
    let mapped = match memory.admit(config, call, &file) {
        Ok(admitted) => memory.make(call, admitted).map_err(|why| why.map(refusal)),
        Err(why) => Err(Failure::Refused(refusal(why))),
    };
    Some(match mapped {
        Ok(address) => {
            memory.hand_over_if_whole(config, name);
            Ok(address)
        }
        Err(Failure::Failed(error)) => Err(error),
        Err(Failure::Refused(refusal)) => Err(refuse(&refusal)),
    })
}

/// The name under which this file is named, if it is.
fn name_of(config: &Config, call: &MapCall, file: &OpenFile) -> Option<Shown> {
    let mut name = None;
    for entry in config.entries() {
        let entry = match entry {
            Ok(entry) => entry,
            // Whether it is named cannot be told; private mappings are no guest memory.
            Err(error) if call.is_shared() => system::end(&error),
            Err(_) => return None,
        };
        match file.is_named_by(entry) {
            Ok(true) => name = name.or(Some(entry.shown())),
            Ok(false) => {}
            Err(why) => system::end(&Refusal { name: entry.shown(), why }),
        }
    }
    name
}

/// Whether memory may be moved by mremap: what is registered may not.
pub(crate) fn may_move(call: &MoveCall) -> Result<(), c_int> {
    if HAS_ARRIVED.load(Ordering::Acquire) {
        return Ok(());
    }
    let start = call.address as u64;
    // With a length of 0 shared memory is mapped a second time.
    let end = start.saturating_add(call.length.max(1) as u64);
    match REGISTERED.iter().find_map(|it| it.overlap(start, end)) {
        Some(at) => Err(refuse(&Refusal { name: Shown(b"guest memory"), why: Why::Moved { at } })),
        None => Ok(()),
    }
}

/// Every page is in place: the kernel answers all faults by itself from here on.
pub(crate) fn all_arrived() {
    let mut memory = lock();
    HAS_ARRIVED.store(true, Ordering::Release);
    // Whoever has served it has unregistered it, and woken everybody.
    memory.uffd = None;
}

fn lock() -> MutexGuard<'static, Memory> {
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which process the memory belongs to.
fn owner() -> c_int {
    let this = system::process();
    match OWNER.compare_exchange(0, this, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => this,
        Err(before) => before,
    }
}

/// What becomes of a call that would show somebody zeros instead of guest memory: its error.
fn refuse(refusal: &Refusal) -> c_int {
    let is_child = matches!(refusal.why, Why::OfAChild { .. });
    if IS_SERVED.load(Ordering::Acquire) || is_child {
        system::say(refusal);
        return libc::EBUSY;
    }
    system::end(refusal)
}

/// Why a mapping was not made.
enum Failure<T> {
    /// The system has refused it.
    Failed(c_int),
    /// It would not be served.
    Refused(T),
}

impl Failure<Why> {
    fn map(self, refusal: impl FnOnce(Why) -> Refusal) -> Failure<Refusal> {
        match self {
            Self::Failed(error) => Failure::Failed(error),
            Self::Refused(why) => Failure::Refused(refusal(why)),
        }
    }
}

impl Memory {
    /// Whether a mapping of named memory can be served. Nothing is mapped yet: with `MAP_FIXED`
    /// it may take the place of something.
    fn admit(&mut self, config: &Config, call: &MapCall, file: &OpenFile) -> Result<Admitted, Why> {
        if !call.is_shared() {
            return Err(Why::Private);
        }
        let both = libc::PROT_READ | libc::PROT_WRITE;
        if call.protection & both != both {
            return Err(Why::NotWritable);
        }
        let (pages, page) = file.pages()?;
        let piece = piece(call, file, page)?;
        if self.table.file(file.id).is_none() {
            let entry = self.entry_for(config, file)?;
            if file.bytes_held > 0 {
                return Err(Why::NotFresh { bytes: file.bytes_held });
            }
            self.table.add_file(entry, page, file)?;
        }
        self.uffd()?.check(pages).map_err(Why::Uffd)?;
        while let Some(there) = self.table.overlapping(&piece) {
            if is_in_place(&piece, &there) && call.flags & libc::MAP_FIXED != 0 {
                return Ok(Admitted::InPlace(piece));
            }
            if maps::is_there(&there).map_err(|error| Why::Maps { error })? {
                return Err(Why::Again { at: there.address });
            }
            self.forget(&there);
        }
        self.table.has_room()?;
        Ok(Admitted::New(piece))
    }

    /// Which of the names a file goes by that is mapped for the first time. Several memfds may
    /// have the same name, and are taken in the order in which they are mapped.
    fn entry_for(&self, config: &Config, file: &OpenFile) -> Result<usize, Why> {
        let mut found = None;
        for (number, entry) in config.entries().enumerate() {
            let Ok(entry) = entry else { continue };
            if !file.is_named_by(entry)? {
                continue;
            }
            match found {
                Some(_) if matches!(entry, Entry::Path(_)) => return Err(Why::NamedTwice),
                None if !self.table.has_file_of(number) => found = Some(number),
                _ => {}
            }
        }
        found.ok_or(Why::MoreOfThatName)
    }

    fn uffd(&mut self) -> Result<&Userfaultfd, Why> {
        match &mut self.uffd {
            Some(uffd) => Ok(uffd),
            none => Ok(none.insert(Userfaultfd::new().map_err(Why::Uffd)?)),
        }
    }

    /// Maps and registers it. Nobody else knows the address before this returns.
    fn make(&mut self, call: &MapCall, admitted: Admitted) -> Result<*mut c_void, Failure<Why>> {
        // Populating would fill what is to arrive with zeros.
        let call = MapCall { flags: call.flags & !libc::MAP_POPULATE, ..*call };
        // SAFETY: the caller's promises, which it has made to mmap.
        let address = unsafe { call.make() };
        if address == libc::MAP_FAILED {
            return Err(Failure::Failed(last_error()));
        }
        let (Admitted::New(piece) | Admitted::InPlace(piece)) = admitted;
        let piece = Mapped { address: address as u64, ..piece };
        if let Err(why) = self.register(&piece) {
            // It may have taken the place of memory that was registered.
            system::end(&Refusal { name: Shown(b"guest memory"), why });
        }
        if let Admitted::New(_) = admitted {
            self.table.add_region(piece);
            self.publish();
        }
        Ok(address)
    }

    fn register(&mut self, piece: &Mapped) -> Result<(), Why> {
        let Mapped { address, length, .. } = *piece;
        self.uffd()?.register(address, length).map_err(|error| Why::Register { length, error })?;
        system::keep_from_children(address, length).map_err(|error| Why::Advise { error })
    }

    fn forget(&mut self, region: &Mapped) {
        self.table.forget(region);
        self.publish();
    }

    fn publish(&self) {
        let mut places = REGISTERED.iter();
        for (place, region) in places.by_ref().zip(self.table.regions()) {
            place.set(region.address, region.address + region.length);
        }
        places.for_each(|place| place.set(0, 0));
    }

    /// Hands it over once all that is named is mapped, and waits until it was taken.
    fn hand_over_if_whole(&mut self, config: &Config, name: Shown) {
        let entries = config.entries().count();
        if IS_SERVED.load(Ordering::Acquire) || !self.table.is_whole(entries) {
            return;
        }
        if let Err(error) = self.table.forget_unmapped() {
            system::end(&Refusal { name, why: Why::Maps { error } });
        }
        self.publish();
        if !self.table.is_whole(entries) {
            return;
        }
        let offer = self.offer(config).unwrap_or_else(|error| system::end(&error));
        if let Err(line) = attachment::hand_over(offer) {
            system::end(&line);
        }
        IS_SERVED.store(true, Ordering::Release);
    }

    fn offer(&self, config: &Config) -> Result<Offer, ConfigError> {
        let (socket, guest) = (config.socket()?, config.guest()?);
        let regions = self.table.layout(config.hole()?);
        let uffd = self.uffd.as_ref().expect("what is mapped was registered").as_fd();
        let descriptors = std::iter::once(uffd).chain(self.table.files());
        let descriptors = descriptors.map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>();
        let descriptors = descriptors.map_err(|_| ConfigError::NoDescriptors)?;
        Ok(Offer { socket, guest, regions, descriptors })
    }
}

/// The piece of the file that a call maps; its address is known only if that is fixed.
fn piece(call: &MapCall, file: &OpenFile, page: u64) -> Result<Mapped, Why> {
    let offset = call.offset as u64;
    let length = (call.length as u64).checked_next_multiple_of(page).unwrap_or(u64::MAX);
    if length == 0 || !offset.is_multiple_of(page) || !file.size.is_multiple_of(page) {
        return Err(Why::Unaligned { offset, length: file.size, page });
    }
    let end = offset.saturating_add(length);
    if end > file.size {
        return Err(Why::BeyondTheEnd { end, size: file.size });
    }
    Ok(Mapped { file: file.id, offset, address: call.address as u64, length })
}

/// Whether a piece takes the place of the same piece.
fn is_in_place(piece: &Mapped, there: &Mapped) -> bool {
    piece.address.wrapping_sub(there.address) == piece.offset.wrapping_sub(there.offset)
        && piece.offset >= there.offset
        && piece.offset + piece.length <= there.offset + there.length
}

/// A range of addresses; empty if there is none.
struct Registered {
    start: AtomicU64,
    end: AtomicU64,
}

impl Registered {
    const fn none() -> Self {
        Self { start: AtomicU64::new(0), end: AtomicU64::new(0) }
    }

    fn set(&self, start: u64, end: u64) {
        // Empty in between, for who looks at the same time.
        self.end.store(0, Ordering::SeqCst);
        self.start.store(start, Ordering::SeqCst);
        self.end.store(end, Ordering::SeqCst);
    }

    /// Where it begins, if it has a part of this range.
    fn overlap(&self, start: u64, end: u64) -> Option<u64> {
        let (from, to) = (self.start.load(Ordering::SeqCst), self.end.load(Ordering::SeqCst));
        (from < end && start < to).then_some(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::named::FileId;

    #[test]
    fn a_range_overlaps_what_it_shares_a_byte_with() {
        let registered = Registered::none();
        assert_eq!(registered.overlap(0, u64::MAX), None);
        registered.set(4096, 8192);
        assert_eq!(registered.overlap(8191, 8192), Some(4096));
        assert_eq!(registered.overlap(0, 4097), Some(4096));
        assert_eq!(registered.overlap(8192, 9000), None);
        assert_eq!(registered.overlap(0, 4096), None);
    }

    #[test]
    fn a_piece_is_in_its_place_where_address_and_offset_are_the_same() {
        let file = FileId { device: 1, inode: 2 };
        let there = Mapped { file, offset: 4096, address: 1 << 20, length: 65536 };
        let part = Mapped { offset: 8192, address: (1 << 20) + 4096, length: 4096, ..there };
        assert!(is_in_place(&there, &there) && is_in_place(&part, &there));
        assert!(!is_in_place(&Mapped { address: 0, ..part }, &there));
        assert!(!is_in_place(&Mapped { length: 65536, ..part }, &there));
        assert!(!is_in_place(&Mapped { offset: 0, address: (1 << 20) - 4096, ..part }, &there));
    }
}
