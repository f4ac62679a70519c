//! What cannot be served ends the process before it touches memory, with one clear line; once the
//! guest may run, the call fails instead.

use std::os::unix::net::UnixListener;

use afterimage_tools::require;

use crate::content::PAGE;
use crate::process::Process;
use crate::scene::Scene;

const STATUS: i32 = 125;

/// Tells a VMM to do these, the last of which ends it, with one line.
fn is_refused(mut vmm: Process, lines: &[&str], expected: &[&str]) {
    let (last, before) = lines.split_last().unwrap();
    for line in before {
        assert_eq!(vmm.ask(line), "ok", "{line}");
    }
    vmm.tell(last);
    let (status, said, complaints) = vmm.end();
    assert_eq!(status, STATUS, "{complaints:#?}");
    assert!(said.is_empty(), "it went on: {said:#?}");
    let [line] = complaints.as_slice() else { panic!("one line: {complaints:#?}") };
    assert!(line.starts_with("libafterimage_preload: "), "{line}");
    for text in expected {
        assert!(line.contains(text), "{text}: {line}");
    }
}

const OPEN: &str = "memfd f ram 65536";
const MAP: &str = "map m f 0 65536 shared";

#[test]
fn memory_that_is_mapped_in_another_way_is_refused() {
    if !require::userfaultfd() {
        return;
    }
    let scene = Scene::new();
    let refused = |lines: &[&str], expected: &[&str]| {
        is_refused(scene.vmm("memfd:ram"), lines, expected);
    };
    refused(&[OPEN, "map m f 0 65536 private"], &["ram is mapped privately", "share=on"]);
    refused(&[OPEN, "map m f 0 65536 read-only"], &["ram is mapped without the right"]);
    refused(&[OPEN, "map m f 0 69632 shared"], &["up to 0x11000", "has only 0x10000"]);
    refused(&["memfd f ram 65537", MAP], &["a multiple of them"]);
    refused(
        &[OPEN, "map m f 0 4096 shared", "map n f 0 8192 shared"],
        &["ram is mapped at 0x", "already"],
    );
    refused(
        &[OPEN, "map m f 0 4096 shared", "memfd g ram 4096", "map n g 0 4096 shared"],
        &["name it there once for each"],
    );
    refused(&[OPEN, "map m f 0 4096 shared", "move m"], &["not to be moved"]);
    refused(&[OPEN, "map m f 0 4096 shared", "copy m"], &["not to be moved"]);
}

#[test]
fn a_file_that_holds_something_is_refused_and_keeps_it() {
    let scene = Scene::new();
    let ram = scene.path("ram");
    std::fs::write(&ram, [7; 8192]).unwrap();
    let open = format!("open f {ram} 8192");
    is_refused(scene.vmm(&ram), &[&open, "map m f 0 8192 shared"], &["holds 8192 bytes already"]);
    assert_eq!(std::fs::read(&ram).unwrap(), [7; 8192]);
}

#[test]
fn a_file_on_a_disk_is_refused() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let found = nix::sys::statfs::statfs(directory.path()).unwrap();
    let is_disk = found.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC;
    let disk = if is_disk { Ok(()) } else { Err("the target directory is on tmpfs") };
    if require::or_skip("disk", disk).is_none() {
        return;
    }
    let ram = directory.path().join("ram").display().to_string();
    let open = format!("open f {ram} 8192");
    let scene = Scene::new();
    is_refused(scene.vmm(&ram), &[&open, "map m f 0 8192 shared"], &["put it on tmpfs"]);
}

#[test]
fn a_missing_right_is_named() {
    let scene = Scene::new();
    let Ok(may) = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd") else { return };
    let is_root = nix::unistd::geteuid().is_root();
    let right = if is_root && may.trim() == "0" { Ok(()) } else { Err("whoever runs it may") };
    if require::or_skip("unprivileged", right).is_none() {
        return;
    }
    let lines = [OPEN, "nobody", MAP];
    is_refused(scene.vmm("memfd:ram"), &lines, &["no right to a userfaultfd", "CAP_SYS_PTRACE"]);
}

#[test]
fn an_engine_that_is_not_there_or_is_something_else_is_named() {
    if !require::userfaultfd() {
        return;
    }
    let scene = Scene::new();
    let expected = ["could not connect to unix:", "start page-client --attach unix:"];
    is_refused(scene.vmm("memfd:ram"), &[OPEN, MAP], &expected);

    let listener = UnixListener::bind(scene.path("attach")).unwrap();
    let stranger = std::thread::spawn(move || drop(listener.accept()));
    let expected = ["has not taken the guest's memory", "is it page-client"];
    is_refused(scene.vmm("memfd:ram"), &[OPEN, MAP], &expected);
    stranger.join().unwrap();
}

#[test]
fn page_client_that_has_another_guest_refuses_and_says_so() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[16], &[]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:ram");
    assert_eq!([vmm.ask(OPEN), vmm.ask(MAP)], ["ok", "ok"]);
    let other = scene.vmm_with("memfd:ram", |command| {
        command.env("AFTERIMAGE_GUEST", "other");
    });
    is_refused(other, &[OPEN, MAP], &["refuses the guest's memory", "start another"]);
    let driving = scene.drive();
    assert_eq!(vmm.ask("check m 0 0 16"), "ok");
    scene.ends(&driving, &mut vmm);
}

#[test]
fn an_environment_that_is_wrong_is_named() {
    if !require::userfaultfd() {
        return;
    }
    let scene = Scene::new();
    for (variable, value, expected) in [
        ("AFTERIMAGE_MEMORY", "ram", "absolute path or memfd:NAME"),
        ("AFTERIMAGE_MEMORY", "memfd:ram;", "absolute path or memfd:NAME"),
        ("AFTERIMAGE_SOCKET", "tcp:127.0.0.1:1", "write unix:PATH"),
        ("AFTERIMAGE_SOCKET", "", "neither AFTERIMAGE_SOCKET nor AFTERIMAGE_TRACKING is set"),
        ("AFTERIMAGE_GUEST", "", "AFTERIMAGE_GUEST is not set"),
        ("AFTERIMAGE_HOLE", "isa", "write pc or none"),
    ] {
        let vmm = scene.vmm_with("memfd:ram", |command| {
            command.env(variable, value);
        });
        is_refused(vmm, &[OPEN, MAP], &[expected]);
    }
    let ram = scene.path("ram");
    let (open, twice) = (format!("open f {ram} 65536"), format!("{ram};{ram}"));
    is_refused(scene.vmm(&twice), &[&open, MAP], &["is named twice"]);
}

#[test]
fn a_guest_that_may_run_is_not_ended_but_the_call_fails() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[16], &["--bandwidth", "on-request"]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:ram");
    assert_eq!([vmm.ask(OPEN), vmm.ask(MAP)], ["ok", "ok"]);
    let driving = scene.drive();
    assert_eq!(vmm.ask(&format!("memfd g ram {PAGE}")), "ok");
    let busy = format!("errno {}", libc::EBUSY);
    let second = [
        ("map n f 0 4096 shared", "is mapped at"),
        ("map n f 0 4096 private", "is mapped privately"),
        ("map n f 0 4096 read-only", "without the right"),
        ("map n g 0 4096 shared", "name it there once for each"),
        ("move m", "not to be moved"),
        ("copy m", "not to be moved"),
    ];
    for (line, complaint) in second {
        assert_eq!(vmm.ask(line), busy, "{line}");
        vmm.complaint(complaint);
    }
    assert_eq!(vmm.ask("check m 0 0 16"), "ok");
    scene.ends(&driving, &mut vmm);
    // Nothing is missing any more.
    for (line, _) in second {
        assert_eq!(vmm.ask(line), "ok", "{line}");
    }
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn memory_that_is_mapped_elsewhere_when_it_was_handed_over_is_refused() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[16], &["--bandwidth", "on-request"]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:ram");
    assert_eq!([vmm.ask(OPEN), vmm.ask(MAP)], ["ok", "ok"]);
    let _driving = scene.drive();
    // Something else takes the place of what is unmapped.
    for line in ["check m 0 0 4", "unmap m", "memfd x x 65536", "map x x 0 65536 shared"] {
        assert_eq!(vmm.ask(line), "ok", "{line}");
    }
    // Nobody would bring the missing pages there.
    assert_eq!(vmm.ask(MAP), format!("errno {}", libc::EBUSY));
    vmm.complaint("when it was handed over");
    assert_eq!(vmm.end().0, 0);
}
