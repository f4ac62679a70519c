//! The threads of the vCPUs: they run guest code, handle its exits and stop at once.
//!
//! Invariant: no kick is lost. A stop first sets the flag, then `immediate_exit`, then
//! sends the signal: a thread that is about to enter the guest returns because of
//! `immediate_exit`, one that is inside because of the signal. It leaves only on EINTR
//! with the flag set, so KVM has completed the last exit before state is read.

use std::fmt::Write;
use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Once};
use std::thread::{self, JoinHandle};
use std::{mem, ptr};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_cpuid_entry2};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::DOORBELL;
use super::program::{DOORBELL_OPERATIONS, DOORBELL_WRONG_REGISTER, DOORBELL_WRONG_TAG};
use super::tracking::Written;
use crate::guest::{GuestError, Progress, mailbox};
use crate::ram::{GuestAddress, GuestRam};

/// A vCPU that does not run.
#[derive(Debug)]
pub(super) struct Vcpu {
    pub(super) id: u32,
    pub(super) fd: VcpuFd,
    /// The CPUID table that was set.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
}

/// What the exits of vCPUs are measured by and reported to.
#[derive(Clone, Debug)]
pub(super) struct Exits {
    pub(super) ram: Arc<GuestRam>,
    pub(super) progress: Arc<Progress>,
    pub(super) written: Written,
}

/// vCPUs that run.
#[derive(Debug)]
pub(super) struct Running {
    stop: Arc<AtomicBool>,
    threads: Vec<Thread>,
}

/// vCPUs after they ran.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) vcpus: Vec<Vcpu>,
    /// Why a vCPU cannot go on, if one cannot.
    pub(super) crash: Option<String>,
}

#[derive(Debug)]
struct Thread {
    handle: JoinHandle<(Vcpu, Result<(), String>)>,
    /// The byte of the vCPU's shared page that keeps it from entering the guest.
    immediate_exit: ImmediateExit,
}

#[derive(Debug)]
struct ImmediateExit(*mut u8);

// SAFETY: the pointer leads into a mapping of the process that no thread owns; it is
// written as an atomic only.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(&raw mut fd.get_kvm_run().immediate_exit)
    }

    /// Sets the byte. The vCPU's descriptor must not have been dropped.
    unsafe fn set(&self, value: u8) {
        // SAFETY: the mapping lives as long as the descriptor, which the caller vouches
        // for; the kernel only reads the byte.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}

/// Starts a thread for each vCPU. If one cannot be started, none runs in the end.
pub(super) fn start(vcpus: &mut Vec<Vcpu>, exits: &Exits) -> Result<Running, GuestError> {
    install_kick_handler();
    let mut running = Running { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
    for mut vcpu in mem::take(vcpus) {
        let id = vcpu.id;
        let immediate_exit = ImmediateExit::of(&mut vcpu.fd);
        // SAFETY: the descriptor is in `vcpu`.
        unsafe { immediate_exit.set(0) };
        let (exits, stop) = (exits.clone(), running.stop.clone());
        let handle = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                // A panic must not drop the descriptor: kicks reach into its mapping.
                let body = AssertUnwindSafe(|| run(&mut vcpu, &exits, &stop));
                let result = catch_unwind(body)
                    .unwrap_or_else(|_| Err(format!("vCPU {id}: its thread panicked")));
                if let Err(what) = &result {
                    exits.progress.fail(what.clone());
                }
                (vcpu, result)
            })
            .map_err(|source| GuestError::Thread { vcpu: id, source })?;
        running.threads.push(Thread { handle, immediate_exit });
    }
    Ok(running)
}

impl Running {
    /// Stops all vCPUs. Blocks while one waits for a page.
    pub(super) fn stop(mut self) -> Stopped {
        self.kick();
        let mut stopped = Stopped { vcpus: Vec::new(), crash: None };
        for thread in self.threads.drain(..) {
            match thread.handle.join() {
                Ok((vcpu, result)) => {
                    stopped.vcpus.push(vcpu);
                    stopped.crash = stopped.crash.or(result.err());
                }
                Err(_) => stopped.crash = Some("a vCPU thread panicked".into()),
            }
        }
        stopped
    }

    fn kick(&self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            // SAFETY: the descriptor is in the thread, and from its end until the join in
            // its result.
            unsafe { thread.immediate_exit.set(1) };
            // SAFETY: the thread has not been joined, so its id is valid.
            unsafe { libc::pthread_kill(thread.handle.as_pthread_t(), libc::SIGRTMIN()) };
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kick();
        for thread in self.threads.drain(..) {
            // What it returned is of no use any more.
            drop(thread.handle.join());
        }
    }
}

/// Runs a vCPU until it is stopped, or returns why it cannot go on.
fn run(vcpu: &mut Vcpu, exits: &Exits, stop: &AtomicBool) -> Result<(), String> {
    unblock_kicks();
    let id = vcpu.id;
    loop {
        let handled = match vcpu.fd.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => exits.write(id, address, data),
            Ok(VcpuExit::MmioRead(address, _)) => Err(exits.describe_access("read", address)),
            Ok(VcpuExit::Intr) => Ok(()),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => exits.written.reap(),
            Ok(VcpuExit::Shutdown) => Err("shut down: the guest took an exception".into()),
            Ok(exit) => Err(format!("unexpected exit {exit:?}")),
            Err(error) if error.errno() == libc::EINTR => {
                if stop.load(Ordering::SeqCst) {
                    return Ok(());
                }
                Ok(())
            }
            Err(error) if error.errno() == libc::EAGAIN => Ok(()),
            Err(error) => Err(format!("KVM_RUN: {error}")),
        };
        if let Err(mut what) = handled {
            if let Ok(regs) = vcpu.fd.get_regs() {
                // Writing to a string cannot fail.
                let _ = write!(what, " (rip {:#x})", regs.rip);
            }
            return Err(format!("vCPU {id}: {what}"));
        }
    }
}

impl Exits {
    /// Handles a write that KVM hands out: to the doorbell, or in error.
    fn write(&self, vcpu: u32, address: u64, data: &[u8]) -> Result<(), String> {
        let (Some(register), Ok(data)) = (address.checked_sub(DOORBELL), data.try_into()) else {
            return Err(self.describe_access("write", address));
        };
        let value = u64::from_le_bytes(data);
        match register {
            DOORBELL_OPERATIONS => {
                let note = mailbox::address(vcpu);
                // Only the thread of this vCPU writes it.
                let reports = self.ram.word(note);
                reports.store(reports.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                self.written.mark(note);
                self.progress.report(vcpu, value);
            }
            DOORBELL_WRONG_TAG => {
                let what = format!("vCPU {vcpu} read a wrong tag on page {value}");
                self.progress.fail(what);
            }
            DOORBELL_WRONG_REGISTER => {
                return Err(format!("a register lost its value and holds {value:#x}"));
            }
            _ => return Err(self.describe_access("write", address)),
        }
        Ok(())
    }

    fn describe_access(&self, access: &str, address: u64) -> String {
        if self.ram.contains(GuestAddress(address)) {
            format!("memory error: {access} of RAM at {address:#x} came out as MMIO")
        } else {
            format!("{access} at {address:#x}, where nothing is")
        }
    }
}

/// Gives the kick signal a handler that does nothing, so that it interrupts `KVM_RUN`.
fn install_kick_handler() {
    static ONCE: Once = Once::new();
    extern "C" fn ignore(_: libc::c_int) {}
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is valid: no flags, empty mask.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler does nothing, which is safe at any moment. The call fails
        // only for signals that do not exist.
        unsafe { libc::sigaction(libc::SIGRTMIN(), &raw const action, ptr::null_mut()) };
    });
}

/// Lets the kick signal reach the calling thread, whatever it inherited.
fn unblock_kicks() {
    // SAFETY: a zeroed set is then made a valid one; the calls fail only for signals
    // that do not exist.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
    }
}
