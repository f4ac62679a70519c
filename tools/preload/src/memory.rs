//! Named memory from its mapping until every page has arrived.
//!
//! Invariant: what is registered is not mapped a second time, nor moved, as long as pages are
//! missing. Before the memory is handed over, whatever would break that ends the process; after
//! that its guest may run, and the call fails with `EBUSY`.

use crate::attachment::{self, Offer};
use crate::config::{self, Config, Purpose};
use crate::maps::{self, Mapped};
use crate::named::OpenFile;
use crate::refusal::{ConfigError, Refusal, Shown, Why};
use crate::system::{self, MapCall, MoveCall, NoSignals, last_error};
use crate::table::Table;
use crate::uffd::Userfaultfd;
use crate::{pinned, tracking};
use libc::{c_int, c_void};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

static MEMORY: Mutex<Memory> = Mutex::new(Memory { table: Table::new(), uffd: None });
/// Whoever mapped named memory first. A child that goes on without exec has another number, and
/// must not wait for a lock that a thread of its parent has held.
static OWNER: AtomicI32 = AtomicI32::new(0);
/// All of it is handed over, or can be tracked: the guest may run.
static MAY_RUN: AtomicBool = AtomicBool::new(false);
/// Every page is here, or was from the beginning.
static IS_COMPLETE: AtomicBool = AtomicBool::new(false);

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
    /// No guest memory, and harmless.
    Other,
}

/// Maps a file; `None` if it is nothing to this library, and the caller maps it.
pub(crate) fn map(call: &MapCall) -> Option<Result<*mut c_void, c_int>> {
    let config = config::get()?;
    if is_past(config) {
        return None;
    }
    let file = OpenFile::of(call.fd)?;
    let name = name_of(config, call, &file)?;
    let _signals = NoSignals::begin();
    let parent = owner();
    if parent != system::process() {
        let is_served = !IS_COMPLETE.load(Ordering::Acquire) && !is_for_tracking(config);
        let refusal = Refusal { name, why: Why::OfAChild { parent } };
        return is_served.then(|| Err(refuse(&refusal)));
    }
    let mut memory = lock();
    if IS_COMPLETE.load(Ordering::Acquire) {
        return tracking::map(&memory.table, call, &file, name);
    }
    Some(memory.map(config, call, &file, name))
}

/// Whether nothing is left to do with named memory.
fn is_past(config: &Config) -> bool {
    IS_COMPLETE.load(Ordering::Acquire) && config.tracking().is_none()
}

fn is_for_tracking(config: &Config) -> bool {
    matches!(config.purpose(), Ok(Purpose::Track(_)))
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

/// Whether memory may be moved by mremap: what is served or tracked may not.
pub(crate) fn may_move(call: &MoveCall) -> Result<(), c_int> {
    let start = call.address as u64;
    // With a length of 0 shared memory is mapped a second time.
    let end = start.saturating_add(call.length.max(1) as u64);
    match pinned::overlap(start, end) {
        Some(at) => Err(refuse(&Refusal { name: GUEST_MEMORY, why: Why::Moved { at } })),
        None => Ok(()),
    }
}

/// Every page is in place: the kernel answers all faults by itself from here on.
pub(crate) fn all_arrived() {
    let mut memory = lock();
    // A successor of page-client says it again, and somebody may track the memory by now.
    if IS_COMPLETE.swap(true, Ordering::AcqRel) {
        return;
    }
    pinned::clear();
    // Whoever has served it has unregistered it, and woken everybody.
    memory.uffd = None;
    match config::get().and_then(Config::tracking) {
        // The files are the VMM's alone again, which may want to be rid of them.
        None => memory.table.clear(),
        Some(socket) => {
            let begun = socket.map_err(|error| error.to_string()).and_then(tracking::begin);
            if let Err(line) = begun {
                system::say(&line);
            }
        }
    }
}

/// Works with what is mapped, which does not change meanwhile.
pub(crate) fn with_table<T>(work: impl FnOnce(&Table) -> T) -> T {
    work(&lock().table)
}

/// Where no name is known.
const GUEST_MEMORY: Shown = Shown(b"guest memory");

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
pub(crate) fn refuse(refusal: &Refusal) -> c_int {
    let is_child = matches!(refusal.why, Why::OfAChild { .. });
    if MAY_RUN.load(Ordering::Acquire) || is_child {
        system::say(refusal);
        return libc::EBUSY;
    }
    system::end(refusal)
}

impl Memory {
    fn map(
        &mut self,
        config: &Config,
        call: &MapCall,
        file: &OpenFile,
        name: Shown,
    ) -> Result<*mut c_void, c_int> {
        let purpose = config.purpose().unwrap_or_else(|error| system::end(&error));
        let admitted = self.admit(config, purpose, call, file);
        let admitted = admitted.map_err(|why| refuse(&Refusal { name, why }))?;
        let address = self.make(purpose, call, admitted)?;
        if let Admitted::New(_) = admitted {
            self.begin_if_whole(config, purpose, name);
        }
        Ok(address)
    }

    /// Whether a mapping of named memory can be served. Nothing is mapped yet: with `MAP_FIXED`
    /// it may take the place of something.
    fn admit(
        &mut self,
        config: &Config,
        purpose: Purpose,
        call: &MapCall,
        file: &OpenFile,
    ) -> Result<Admitted, Why> {
        let is_served = matches!(purpose, Purpose::Serve(_));
        if !call.is_shared() {
            return Err(Why::Private);
        }
        if !call.is_writable() {
            // Nobody writes there, and whatever is read there is as it should be.
            return if is_served { Err(Why::NotWritable) } else { Ok(Admitted::Other) };
        }
        let (pages, page) = file.pages()?;
        let piece = piece(call, file, page)?;
        if self.table.file(file.id).is_none() {
            let entry = self.table.entry_for(config, file)?;
            if is_served && file.bytes_held > 0 {
                return Err(Why::NotFresh { bytes: file.bytes_held });
            }
            self.table.add_file(entry, page, file)?;
        }
        if is_served {
            self.uffd()?.check(pages).map_err(Why::Uffd)?;
        }
        while let Some(there) = self.table.overlapping(&piece) {
            let is_fixed = call.flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) != 0;
            if is_in_place(&piece, &there) && is_fixed {
                return Ok(if is_served { Admitted::InPlace(piece) } else { Admitted::Other });
            }
            if maps::is_there(&there).map_err(|error| Why::Maps { error })? {
                let at = there.address;
                // Where it is tracked is looked for second mappings when that begins.
                return if is_served { Err(Why::Again { at }) } else { Ok(Admitted::Other) };
            }
            if is_served && MAY_RUN.load(Ordering::Acquire) {
                // Whoever brings its pages knows this address.
                return Err(Why::Elsewhere { at: there.address });
            }
            self.table.forget(&there);
        }
        self.table.has_room()?;
        Ok(Admitted::New(piece))
    }

    fn uffd(&mut self) -> Result<&Userfaultfd, Why> {
        match &mut self.uffd {
            Some(uffd) => Ok(uffd),
            none => Ok(none.insert(Userfaultfd::new().map_err(Why::Uffd)?)),
        }
    }

    /// Maps and registers it. Nobody else knows the address before this returns.
    fn make(
        &mut self,
        purpose: Purpose,
        call: &MapCall,
        admitted: Admitted,
    ) -> Result<*mut c_void, c_int> {
        let is_served = matches!(purpose, Purpose::Serve(_));
        // Populating would fill what is to arrive with zeros.
        let without = if is_served { libc::MAP_POPULATE } else { 0 };
        let call = MapCall { flags: call.flags & !without, ..*call };
        // SAFETY: the caller's promises, which it has made to mmap.
        let address = unsafe { call.make() };
        if address == libc::MAP_FAILED {
            return Err(last_error());
        }
        let (Admitted::New(piece) | Admitted::InPlace(piece)) = admitted else {
            return Ok(address);
        };
        let piece = Mapped { address: address as u64, ..piece };
        if is_served && let Err(why) = self.register(&piece) {
            // It may have taken the place of memory that was registered.
            system::end(&Refusal { name: GUEST_MEMORY, why });
        }
        if let Admitted::New(_) = admitted {
            self.table.add_region(piece);
        }
        if is_served {
            pinned::set(&self.table);
        }
        Ok(address)
    }

    fn register(&mut self, piece: &Mapped) -> Result<(), Why> {
        let Mapped { address, length, .. } = *piece;
        self.uffd()?.register(address, length).map_err(|error| Why::Register { length, error })?;
        system::keep_from_children(address, length).map_err(|error| Why::Advise { error })
    }

    /// Hands it over once all that is named is mapped, and waits until it was taken; or lets it
    /// be tracked.
    fn begin_if_whole(&mut self, config: &Config, purpose: Purpose, name: Shown) {
        let entries = config.entries().count();
        if MAY_RUN.load(Ordering::Acquire) || !self.table.is_whole(entries) {
            return;
        }
        if let Err(error) = self.table.forget_unmapped() {
            system::end(&Refusal { name, why: Why::Maps { error } });
        }
        if !self.table.is_whole(entries) {
            return;
        }
        let begun = match purpose {
            Purpose::Serve(socket) => {
                let offer = self.offer(config, socket).unwrap_or_else(|error| system::end(&error));
                attachment::hand_over(offer)
            }
            Purpose::Track(socket) => {
                IS_COMPLETE.store(true, Ordering::Release);
                tracking::begin(socket)
            }
        };
        if let Err(line) = begun {
            system::end(&line);
        }
        MAY_RUN.store(true, Ordering::Release);
    }

    fn offer(&self, config: &Config, socket: &'static [u8]) -> Result<Offer, ConfigError> {
        let guest = config.guest()?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::named::FileId;

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
