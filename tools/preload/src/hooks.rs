//! The functions of the C library that this one takes the place of.
//!
//! They make the system calls themselves: there is nothing to look up, so that they work before
//! any constructor has run, and cannot call themselves.

use crate::system::{Errno, MapCall, MoveCall};
use crate::{config, memory};
use libc::{c_int, c_void, off_t, size_t};

/// As in the C library.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let call = MapCall { address, length, protection, flags, fd, offset };
    if call.has_file() && config::is_in_use() {
        let errno = Errno::keep();
        match memory::map(&call) {
            // SAFETY: the caller's promises are those of the system call.
            None => errno.after(|| unsafe { call.make() }),
            Some(answer) => errno.answer(answer),
        }
    } else {
        // SAFETY: as above.
        unsafe { call.make() }
    }
}

/// The same under the name that it has for files of any size.
///
/// # Safety
/// As in the C library.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller's promises.
    unsafe { mmap(address, length, protection, flags, fd, offset) }
}

/// As in the C library, but that memory that is registered stays where it is.
///
/// # Safety
/// As in the C library. There its last argument is variadic; the calling conventions of the
/// architectures that this is built for pass it in the same register.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mremap(
    address: *mut c_void,
    length: size_t,
    new_length: size_t,
    flags: c_int,
    new_address: *mut c_void,
) -> *mut c_void {
    let call = MoveCall { address, length, new_length, flags, new_address };
    if config::is_in_use() {
        let errno = Errno::keep();
        match memory::may_move(&call) {
            // SAFETY: the caller's promises are those of the system call.
            Ok(()) => errno.after(|| unsafe { call.make() }),
            Err(refused) => errno.answer(Err(refused)),
        }
    } else {
        // SAFETY: as above.
        unsafe { call.make() }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("how this architecture passes offsets and variadic arguments was not looked at");
