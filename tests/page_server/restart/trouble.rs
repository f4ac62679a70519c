//! What cannot go on says why, in one line.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::thread;

use afterimage_tools::require;
use nix::sched::{CloneFlags, unshare};

use super::scene::{PAGES, Reader, Scene};
use crate::support::{Server, pattern};

/// The error of a server that ends at once.
fn error_of(server: Server) -> String {
    let (status, report, lines) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (1, Some("failed")), "{lines:#?}");
    let error = report["error"].as_str().unwrap().to_owned();
    assert!(!error.contains('\n') && lines.iter().any(|it| it.contains(&error)), "{lines:#?}");
    error
}

#[test]
fn two_servers_never_have_one_guest() {
    let scene = Scene::new();
    let _keeper = scene.keeper();
    let mut server = scene.serve_kept(&[]);
    server.line("can hand its guest over");
    scene.give(100).unwrap();
    let error = error_of(scene.serve_kept(&[]));
    assert!(error.contains("the session goes on there"), "{error}");
    // Nor with another state file.
    let (address, keeper, state) =
        (scene.unix("other.sock"), scene.unix("keeper.sock"), scene.text("other"));
    let other = || {
        let at = ["--keeper", &keeper, "--guest", "web1"];
        Server::start(&[&["--listen", &*address, "--state", &*state][..], &at].concat())
    };
    let error = error_of(other());
    assert!(error.contains("web1 is in use by process"), "{error}");
    drop(server);
    let error = error_of(other());
    assert!(error.contains("records nothing") && error.contains("that session"), "{error}");
    assert_eq!(scene.kept().len(), 1);
    let server = scene.serve_kept(&[]);
    Reader::start(&scene.address, 100).finish(100);
    assert_eq!(server.end().0, 0);
}

#[test]
fn a_guest_that_is_lost_is_said_to_be_lost() {
    let scene = Scene::new();
    let keeper = scene.keeper();
    let mut server = scene.serve_kept(&[]);
    server.line("can hand its guest over");
    scene.give(101).unwrap();
    // Both at once.
    drop((server, keeper));
    let error = error_of(scene.serve_kept(&[]));
    assert!(error.contains("start afterimage-keeper --listen"), "{error}");
    let _keeper = scene.keeper();
    let error = error_of(scene.serve_kept(&[]));
    assert!(error.contains("is lost") && error.contains("remove"), "{error}");
    // For another guest.
    fs::remove_file(scene.path("state")).unwrap();
    let mut server = scene.serve_kept(&[]);
    server.line("can hand its guest over");
}

#[test]
fn a_guest_whose_keeper_refuses_stays_the_vmms() {
    let scene = Scene::new();
    let _keeper = scene.keeper();
    let mut server = scene.serve_kept(&[]);
    server.line("can hand its guest over");
    // Somebody else has taken the name in the meantime.
    let mut other = afterimage_tools::keeper::Keeper::connect(&scene.path("keeper.sock"), "x");
    let file = super::scene::filled(1);
    let set = [("a", std::os::fd::AsFd::as_fd(&file))];
    other.as_mut().unwrap().store("web1", &set).unwrap();
    let error = scene.give(102).unwrap_err().to_string();
    assert!(error.contains("in use by process"), "{error}");
    let error = error_of(server);
    assert!(error.contains("the VMM keeps its guest"), "{error}");
}

#[test]
fn a_state_file_that_cannot_be_right_is_refused() {
    let scene = Scene::new();
    fs::write(scene.path("ram"), pattern(PAGES, 103)).unwrap();
    let ram = scene.text("ram");
    let serve = |memory: &str| scene.serve(&["--memory", memory]);
    let mut server = serve(&ram);
    Reader::start(&scene.address, 103).until_read(1);
    server.line("is given");
    drop(server);
    let error = error_of(serve(&format!("{ram},0,4096")));
    assert!(error.contains("is of memory with 1 regions"), "{error}");
    let whole = fs::read(scene.path("state")).unwrap();
    fs::write(scene.path("state"), &whole[..whole.len() / 2]).unwrap();
    let error = error_of(serve(&ram));
    assert!(error.contains("is damaged (it is cut short)"), "{error}");
}

fn mount(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("mount").args(arguments).output();
    let output = output.map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.success().then_some(()).ok_or(said)
}

/// Leaves no room.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
}

#[test]
fn a_full_disk_under_the_state_file_is_said_and_waited_for() {
    // A name space for this thread and the processes that it starts.
    let test = thread::spawn(|| {
        let scene = Scene::new();
        let disk = scene.path("disk");
        fs::create_dir(&disk).unwrap();
        let mounted = unshare(CloneFlags::CLONE_NEWNS).map_err(|error| error.to_string());
        let mounted = mounted.and_then(|()| {
            mount(&["--make-rprivate", "/"])?;
            mount(&["-t", "tmpfs", "-o", "size=64k", "small", disk.to_str().unwrap()])
        });
        if require::or_skip("mount", mounted).is_none() {
            return;
        }
        fs::write(scene.path("ram"), pattern(PAGES, 104)).unwrap();
        let (address, state, ram) =
            (scene.address.to_string(), scene.text("disk/state"), scene.text("ram"));
        let arguments = ["--listen", &address, "--state", &state, "--memory", &ram];
        let mut server = Server::start(&arguments);
        server.line("listening on");
        // All is recorded that there is to record before a destination comes; then there is no
        // room. What a record that was replaced gives back late is filled too.
        while !fs::read_to_string(&state).is_ok_and(|text| text.contains("note.guest_at=")) {
            thread::yield_now();
        }
        let fillers = [disk.join("filler"), disk.join("rest")];
        for filler in &fillers {
            fill(filler);
        }
        let reader = Reader::start(&scene.address, 104);
        let line = server.line("could not be written");
        assert!(line.contains("tried again"), "{line}");
        for filler in &fillers {
            fs::remove_file(filler).unwrap();
        }
        reader.finish(104);
        assert_eq!(server.end().0, 0);
    });
    test.join().unwrap();
}
