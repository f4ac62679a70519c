//! Named memory is served, and every byte of it is that of the source.

use std::process::{Command, Stdio};

use afterimage_tools::require;

use crate::content::{self, PAGE};
use crate::process::{Process, library};
use crate::scene::Scene;

/// Asks, and takes no other answer than `ok`.
fn does(vmm: &mut Process, lines: &[&str]) {
    for line in lines {
        assert_eq!(vmm.ask(line), "ok", "{line}");
    }
}

#[test]
fn memory_in_a_file_is_served() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[2048], &["--bandwidth", "4M"]);
    scene.open_client();
    let ram = scene.path("ram");
    let mut vmm = scene.vmm(&ram);
    let bytes = 2048 * PAGE;
    does(&mut vmm, &[&format!("open f {ram} {bytes}"), &format!("map m f 0 {bytes} reserved")]);
    // Registered for missing and minor faults, and not for children.
    let flags = vmm.ask("smaps m");
    let has = |flag| flags.split(' ').any(|it| it == flag);
    assert!(has("um") && has("ui") && has("dc"), "{flags}");
    let driving = scene.drive();
    assert_eq!([vmm.ask("userfaultfds"), vmm.ask("descriptors f")], ["1", "2"]);
    // Faults of the kernel, of threads, and of nobody.
    does(&mut vmm, &["send m 2047 0", "send m 17 0", "start m 0 0 2048", "start m 1024 1024 1024"]);
    assert_eq!(vmm.ask("fork m f"), "the child ended with 0");
    vmm.complaint("is the memory of process");
    does(&mut vmm, &["wait", "check m 0 0 2048"]);
    scene.ends(&driving, &mut vmm);
    let flags = vmm.ask("smaps m");
    let has = |flag| flags.split(' ').any(|it| it == flag);
    assert!(!has("um") && !has("ui"), "{flags}");
    assert_eq!([vmm.ask("userfaultfds"), vmm.ask("descriptors f")], ["0", "1"]);
    does(&mut vmm, &["check m 0 0 2048"]);
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn several_memories_are_served_in_the_order_of_their_names() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[64, 128, 32, 32], &[]);
    scene.open_client();
    let ram = scene.path("ram");
    let mut vmm = scene.vmm(&format!("memfd:low:ram;{ram};memfd:same;memfd:same"));
    let of = |pages: u64| pages * PAGE;
    does(
        &mut vmm,
        &[
            &format!("open b {ram} {}", of(128)),
            &format!("memfd a low:ram {}", of(64)),
            &format!("memfd x another {}", of(64)),
            &format!("memfd c same {}", of(32)),
            &format!("memfd d same {}", of(32)),
            // What is not named is mapped in between.
            &format!("map x x 0 {} shared", of(64)),
            "write x 3",
            // Not in the order of the names, and one in two mappings.
            &format!("map b2 b {} {} shared", of(64), of(64)),
            &format!("map b1 b 0 {} populate", of(64)),
        ],
    );
    assert_eq!(vmm.ask("held b"), "0", "nothing is populated");
    does(
        &mut vmm,
        &[
            // The VMM need not keep the file.
            "close b",
            &format!("map c c 0 {} shared", of(32)),
            &format!("map d d 0 {} shared", of(32)),
        ],
    );
    assert_eq!(vmm.ask("threads").matches("afterimage").count(), 0, "one is missing");
    // Which pages lie in two regions is known to page-server by its command line.
    scene.server = None;
    let image = |number: u64| scene.path(&format!("image{number}"));
    let mut arguments = Vec::new();
    for piece in [
        image(0),
        format!("{},0,{}", image(1), of(64)),
        format!("{},{},{}", image(1), of(64), of(64)),
        image(2),
        image(3),
    ] {
        arguments.extend(["--memory".to_owned(), piece]);
    }
    scene.serve_as(&arguments);
    does(&mut vmm, &[&format!("map a a 0 {} shared", of(64))]);
    let driving = scene.drive();
    let checks = ["check a 0 0 64", "check b1 0 64 64", "check b2 0 128 64"];
    does(&mut vmm, &checks);
    does(&mut vmm, &["check c 0 192 32", "check d 0 224 32"]);
    assert_eq!(vmm.ask("read x 3"), "0x5a");
    scene.ends(&driving, &mut vmm);
    does(&mut vmm, &checks);
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn memory_in_huge_pages_is_served() {
    let Some(_pages) = require::hugetlb(8) else { return };
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[2048], &[]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:ram");
    let bytes = 2048 * PAGE;
    does(&mut vmm, &[&format!("huge f ram {bytes}"), &format!("map m f 0 {bytes} shared")]);
    let driving = scene.drive();
    does(&mut vmm, &["send m 2000 0", "check m 0 0 2048"]);
    scene.ends(&driving, &mut vmm);
    does(&mut vmm, &["check m 0 0 2048"]);
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn memory_beyond_3_gib_lies_where_page_server_has_it() {
    if !require::userfaultfd() {
        return;
    }
    let low = (3 << 30) / PAGE;
    for hole in ["pc", "none"] {
        let mut scene = Scene::new();
        let image = scene.path("image");
        // What lies before the edge, and after it.
        content::write(image.as_ref(), low - 32, 0, 64);
        scene.serve_as(&["--memory".to_owned(), image, "--hole".to_owned(), hole.to_owned()]);
        scene.open_client();
        let mut vmm = scene.vmm_with("memfd:ram", |command| {
            command.env("AFTERIMAGE_HOLE", hole);
        });
        let bytes = (low + 32) * PAGE;
        does(&mut vmm, &[&format!("memfd f ram {bytes}"), &format!("map m f 0 {bytes} shared")]);
        let driving = scene.drive();
        does(&mut vmm, &[&format!("check m {} 0 64", low - 32)]);
        assert_eq!(vmm.ask("read m 12345"), "0x0");
        scene.ends(&driving, &mut vmm);
        does(&mut vmm, &[&format!("check m {} 0 64", low - 32)]);
        assert_eq!(vmm.end().0, 0);
    }
}

#[test]
fn a_guest_goes_on_when_page_client_was_killed() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[4096], &["--bandwidth", "2M"]);
    scene.open_kept_client();
    let ram = scene.path("ram");
    let mut vmm = scene.vmm(&ram);
    let bytes = 4096 * PAGE;
    does(&mut vmm, &[&format!("open f {ram} {bytes}"), &format!("map m f 0 {bytes} shared")]);
    let _driving = scene.drive();
    for death in 0..4_u64 {
        let first = death * 512;
        does(&mut vmm, &[&format!("check m {first} {first} 128")]);
        scene.client.as_mut().unwrap().kill();
        vmm.complaint("page-client is gone");
        let next = first + 256;
        // It waits for its pages meanwhile.
        does(&mut vmm, &[&format!("start m {next} {next} 128")]);
        scene.start_client();
        vmm.complaint("page-client is back");
        does(&mut vmm, &["wait"]);
    }
    does(&mut vmm, &["check m 0 0 4096"]);
    scene.both_end();
    does(&mut vmm, &["check m 0 0 4096"]);
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn memory_that_is_mapped_anew_before_all_is_there_is_served_where_it_is() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    // What is not registered would be zeros.
    scene.serve(&[64, 64], &["--bandwidth", "on-request"]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:a;memfd:b");
    let bytes = 64 * PAGE;
    does(
        &mut vmm,
        &[
            &format!("memfd a a {bytes}"),
            &format!("memfd b b {bytes}"),
            &format!("map a a 0 {bytes} shared"),
            // Others take the place of what was unmapped.
            "unmap a",
            &format!("memfd x x {bytes}"),
            &format!("map x x 0 {bytes} shared"),
            "write x 1",
            &format!("map a a 0 {bytes} shared"),
            // A page of it in its own place.
            &format!("map a a {} {PAGE} in-place", 7 * PAGE),
            &format!("map b b 0 {bytes} shared"),
            // And when it was handed over.
            &format!("map b b {} {PAGE} in-place", 9 * PAGE),
        ],
    );
    let driving = scene.drive();
    does(&mut vmm, &["check a 0 0 64", "check b 0 64 64"]);
    assert_eq!(vmm.ask("read x 1"), "0x5a");
    scene.ends(&driving, &mut vmm);
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn what_the_guest_discards_stays_discarded() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[64], &["--bandwidth", "on-request"]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:ram");
    let bytes = 64 * PAGE;
    does(&mut vmm, &[&format!("memfd f ram {bytes}"), &format!("map m f 0 {bytes} shared")]);
    let driving = scene.drive();
    does(&mut vmm, &["check m 1 1 1", "discard m 1", "discard m 2"]);
    assert_eq!([vmm.ask("read m 1"), vmm.ask("read m 2")], ["0x0", "0x0"]);
    does(&mut vmm, &["check m 0 0 1", "check m 3 3 61"]);
    scene.ends(&driving, &mut vmm);
    assert_eq!([vmm.ask("read m 1"), vmm.ask("read m 2")], ["0x0", "0x0"]);
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn other_memory_of_a_vmm_is_as_without_the_library() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[512], &["--bandwidth", "on-request"]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:ram");
    let before = vmm.ask("others");
    let bytes = 512 * PAGE;
    does(&mut vmm, &[&format!("memfd f ram {bytes}"), &format!("map m f 0 {bytes} shared")]);
    let driving = scene.drive();
    // While a thread waits for pages, and another listens.
    does(&mut vmm, &["start m 0 0 512"]);
    assert_eq!(vmm.ask("others"), before);
    // A program that it starts inherits the environment, and attaches nothing.
    assert_eq!(vmm.ask("exec"), r#"exit status: 0 """#);
    does(&mut vmm, &["wait"]);
    scene.ends(&driving, &mut vmm);
    assert_eq!(vmm.ask("others"), before);
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn memory_that_threads_map_together_is_served() {
    if !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[32, 32, 32, 32], &[]);
    scene.open_client();
    let mut vmm = scene.vmm("memfd:a;memfd:b;memfd:c;memfd:d");
    let names = ["a", "b", "c", "d"];
    let bytes = 32 * PAGE;
    let made = names.map(|name| format!("memfd {name} {name} {bytes}"));
    does(&mut vmm, &made.each_ref().map(String::as_str));
    does(&mut vmm, &["together d b a c"]);
    let driving = scene.drive();
    let checks = ["check d 0 96 32", "check a 0 0 32", "check c 0 64 32", "check b 0 32 32"];
    does(&mut vmm, &checks);
    scene.ends(&driving, &mut vmm);
    does(&mut vmm, &checks);
    assert_eq!(vmm.end().0, 0);
}

/// A library whose constructor runs before those of this one.
const EARLY: &str = r#"
    #define _GNU_SOURCE
    #include <sys/mman.h>
    #include <unistd.h>
    __attribute__((constructor)) static void early(void) {
        int fd = memfd_create("ram", 0);
        if (ftruncate(fd, 65536)) _exit(1);
        char *memory = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED || write(1, memory + 4096, 4096) != 4096) _exit(2);
        /* Until it is told to end. */
        _exit(read(0, memory, 1));
    }
"#;

#[test]
fn memory_that_is_mapped_before_any_constructor_has_run_is_served() {
    let compiler = Command::new("cc").arg("--version").output();
    if require::or_skip("cc", compiler).is_none() || !require::userfaultfd() {
        return;
    }
    let mut scene = Scene::new();
    let (source, early) = (scene.path("early.c"), scene.path("early.so"));
    std::fs::write(&source, EARLY).unwrap();
    let mut compiler = Command::new("cc");
    let made = compiler.args(["-shared", "-fPIC", "-o", &early, &source]).status().unwrap();
    assert!(made.success());
    scene.serve(&[16], &[]);
    scene.open_client();
    let mut command = Command::new("true");
    // The last one is initialised first.
    command.env("LD_PRELOAD", format!("{} {early}", library().display()));
    scene.name(&mut command, "memfd:ram");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let driving = scene.drive();
    scene.arrives(&driving);
    // Its input ends here.
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    content::check_bytes(&output.stdout, 1);
}
