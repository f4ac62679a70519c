//! Passes before the guest is stopped: what the source's QEMU writes, by the library that it was
//! started with.

use afterimage::{Address, GuestLayout, Precopy};

use super::machine::Machine;
use super::options::{PassesWanted, SourceOptions};
use crate::page_server::Failure;
use crate::page_server::failure::chain;
use crate::tracking::VmmTracker;

/// What the engine needs for the passes that are wanted; `None` for none.
pub(super) fn begin(
    options: &SourceOptions,
    machine: &Machine,
    layout: &GuestLayout,
) -> Result<Option<Precopy>, Failure> {
    let Some(passes) = options.passes.passes() else { return Ok(None) };
    let path = match &options.tracking {
        Some(Address::Unix(path)) => path,
        Some(other) => {
            return Err(Failure::usage(format!(
                "--tracking {other} is no Unix socket: give that of AFTERIMAGE_TRACKING"
            )));
        }
        None => return Err(lacks_tracking(options.passes)),
    };
    let tracker = VmmTracker::connect(path).map_err(|error| Failure::new(chain(&error)))?;
    let process = tracker.process();
    if machine.pid.is_some_and(|pid| pid as u32 != process) {
        return Err(Failure::new(format!(
            "--tracking unix:{} is of process {process}, and the source's QEMU is process {}: give \
             the AFTERIMAGE_TRACKING of that one",
            path.display(),
            machine.pid.unwrap_or_default()
        )));
    }
    let served: Vec<_> =
        layout.regions().iter().map(|region| (region.guest_address, region.length)).collect();
    let mut regions = tracker.regions().to_vec();
    regions.sort_unstable();
    if regions != served {
        return Err(Failure::new(format!(
            "the source's QEMU lets {} regions of its memory be tracked, and {} others are to be \
             moved: name all memory backends in AFTERIMAGE_MEMORY, in the order of their names, and \
             give --hole as AFTERIMAGE_HOLE",
            regions.len(),
            served.len()
        )));
    }
    let mut precopy = Precopy::new(Box::new(tracker));
    precopy.passes = passes;
    Ok(Some(precopy))
}

fn lacks_tracking(passes: PassesWanted) -> Failure {
    Failure::usage(format!(
        "--passes {passes} needs --tracking: start the source's QEMU with libafterimage_preload.so \
         and AFTERIMAGE_TRACKING=unix:PATH, and name that here"
    ))
}
