//! A file system that is soon full.

use nix::sched::{CloneFlags, unshare};
use std::path::Path;
use std::process::Command;

/// Runs `test` in a directory on a tmpfs of this size that only its thread sees.
pub fn on_a_small_disk(size: &str, test: impl FnOnce(&Path) + Send + 'static) {
    let size = format!("size={size}");
    let small = std::thread::spawn(move || {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().to_str().expect("text");
        let mounted =
            unshare(CloneFlags::CLONE_NEWNS).map_err(|error| error.to_string()).and_then(|()| {
                mount(&["--make-rprivate", "/"])?;
                mount(&["-t", "tmpfs", "-o", &size, "small", path])
            });
        match mounted {
            Ok(()) => test(directory.path()),
            Err(why) => super::skip("mount", &why),
        }
    });
    small.join().expect("the test passes");
}

/// In the name space of this thread, which its children share.
fn mount(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("mount").args(arguments).output();
    let output = output.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.success().then_some(()).ok_or(said)
}
