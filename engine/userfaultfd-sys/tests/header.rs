//! Compares this crate with the system's own `linux/userfaultfd.h`, by a C compiler.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::mem::{align_of, offset_of, size_of};
use std::path::Path;
use std::process::Command;

use userfaultfd_sys::*;

const HEADER: &str = "/usr/include/linux/userfaultfd.h";

/// Expected values by the C expression that must yield them. A macro is left out of
/// the program where the header is too old to define it.
#[derive(Default)]
struct Expected {
    macros: BTreeMap<&'static str, u64>,
    layout: BTreeMap<String, u64>,
}

macro_rules! macros {
    ($expected:ident: $($name:ident)*) => {
        $($expected.macros.insert(stringify!($name), u64::from($name));)*
    };
}

/// Sizes and offsets of the structs that C knows by the same name.
macro_rules! layout {
    ($expected:ident: $($type:ident { $($field:ident)* })*) => {
        $(
            let name = concat!("struct ", stringify!($type));
            $expected.layout.insert(format!("sizeof({name})"), size_of::<$type>() as u64);
            $expected.layout.insert(format!("__alignof__({name})"), align_of::<$type>() as u64);
            $(
                let field = stringify!($field);
                $expected.layout.insert(
                    format!("__builtin_offsetof({name}, {field})"),
                    offset_of!($type, $field) as u64,
                );
                $expected.layout.insert(
                    format!("sizeof((({name} *)0)->{field})"),
                    size_of_field(|all: $type| all.$field),
                );
            )*
        )*
    };
}

/// Fields of the details of an event, whose structs have no name in C.
macro_rules! details {
    ($expected:ident: $($member:ident = $type:ident { $($field:ident)* })*) => {
        $($(
            let path = concat!("arg.", stringify!($member), ".", stringify!($field));
            $expected.layout.insert(
                format!("__builtin_offsetof(struct uffd_msg, {path})"),
                (offset_of!(uffd_msg, arg) + offset_of!($type, $field)) as u64,
            );
            $expected.layout.insert(
                format!("sizeof(((struct uffd_msg *)0)->{path})"),
                size_of_field(|all: $type| all.$field),
            );
        )*)*
    };
}

#[test]
fn agrees_with_the_header_of_the_system() {
    if !Path::new(HEADER).exists() {
        skipped(&format!("{HEADER} is not installed"));
        return;
    }
    let expected = expected();
    let found = compile_and_run(&program(&expected));

    let mut compared = 0;
    for (name, value) in &expected.macros {
        match found.get(*name) {
            Some(in_header) => {
                assert_eq!(in_header, value, "{name}");
                compared += 1;
            }
            None => skipped(&format!("{HEADER} does not define {name}")),
        }
    }
    for (expression, value) in &expected.layout {
        assert_eq!(found.get(expression), Some(value), "{expression}");
        compared += 1;
    }
    println!("{compared} values agree with {HEADER}");

    // These grow with the kernel; ours must be a part of what the header has.
    for (name, ours) in [
        ("UFFD_API_FEATURES", UFFD_API_FEATURES),
        ("UFFD_API_RANGE_IOCTLS", UFFD_API_RANGE_IOCTLS),
        ("UFFD_API_RANGE_IOCTLS_BASIC", UFFD_API_RANGE_IOCTLS_BASIC),
    ] {
        let in_header = found.get(name).copied().unwrap_or_default();
        assert_eq!(ours & !in_header, 0, "{name}: the header has {in_header:#x}");
    }
}

/// Says so past the test harness, which would keep it to itself.
fn skipped(what: &str) {
    let _ = writeln!(io::stderr(), "SKIPPED: {what}");
}

fn expected() -> Expected {
    let mut expected = Expected::default();
    macros! { expected:
        UFFD_USER_MODE_ONLY USERFAULTFD_IOC UFFD_API UFFDIO UFFD_API_IOCTLS
        _UFFDIO_REGISTER _UFFDIO_UNREGISTER _UFFDIO_WAKE _UFFDIO_COPY _UFFDIO_ZEROPAGE
        _UFFDIO_WRITEPROTECT _UFFDIO_CONTINUE _UFFDIO_API
        UFFDIO_API UFFDIO_REGISTER UFFDIO_UNREGISTER UFFDIO_WAKE UFFDIO_COPY UFFDIO_ZEROPAGE
        UFFD_EVENT_PAGEFAULT UFFD_EVENT_FORK UFFD_EVENT_REMAP UFFD_EVENT_REMOVE UFFD_EVENT_UNMAP
        UFFD_PAGEFAULT_FLAG_WRITE UFFD_PAGEFAULT_FLAG_WP UFFD_PAGEFAULT_FLAG_MINOR
        UFFD_FEATURE_PAGEFAULT_FLAG_WP UFFD_FEATURE_EVENT_FORK UFFD_FEATURE_EVENT_REMAP
        UFFD_FEATURE_EVENT_REMOVE UFFD_FEATURE_MISSING_HUGETLBFS UFFD_FEATURE_MISSING_SHMEM
        UFFD_FEATURE_EVENT_UNMAP UFFD_FEATURE_SIGBUS UFFD_FEATURE_THREAD_ID
        UFFD_FEATURE_MINOR_HUGETLBFS UFFD_FEATURE_MINOR_SHMEM
        UFFDIO_REGISTER_MODE_MISSING UFFDIO_REGISTER_MODE_WP
        UFFDIO_COPY_MODE_DONTWAKE UFFDIO_COPY_MODE_WP UFFDIO_ZEROPAGE_MODE_DONTWAKE
    }
    #[cfg(feature = "linux5_7")]
    macros! { expected:
        UFFDIO_WRITEPROTECT UFFDIO_WRITEPROTECT_MODE_WP UFFDIO_WRITEPROTECT_MODE_DONTWAKE
    }
    #[cfg(feature = "linux5_13")]
    macros! { expected:
        UFFDIO_CONTINUE UFFDIO_REGISTER_MODE_MINOR UFFDIO_CONTINUE_MODE_DONTWAKE
    }
    layout! { expected:
        uffdio_api { api features ioctls }
        uffdio_range { start len }
        uffdio_register { range mode ioctls }
        uffdio_copy { dst src len mode copy }
        uffdio_zeropage { range mode zeropage }
        uffdio_writeprotect { range mode }
        uffdio_continue { range mode mapped }
        uffd_msg { event reserved1 reserved2 reserved3 arg }
    }
    details! { expected:
        pagefault = uffd_msg_pagefault { flags address feat }
        fork = uffd_msg_fork { ufd }
        remap = uffd_msg_remap { from to len }
        remove = uffd_msg_remove { start end }
        reserved = uffd_msg_reserved { reserved1 reserved2 reserved3 }
    }
    expected
}

/// Takes a way to the field, so that its type need not be said.
fn size_of_field<T, F>(_: impl FnOnce(T) -> F) -> u64 {
    size_of::<F>() as u64
}

/// A C program that prints `expression=value` for everything expected.
fn program(expected: &Expected) -> String {
    let mut text = String::from(
        "#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\n\
         int main(void) {\n",
    );
    let grows = ["UFFD_API_FEATURES", "UFFD_API_RANGE_IOCTLS", "UFFD_API_RANGE_IOCTLS_BASIC"];
    for name in expected.macros.keys().copied().chain(grows) {
        let _ = writeln!(text, "#ifdef {name}");
        let _ = writeln!(text, r#"printf("%s=%llu\n", "{name}", (unsigned long long)({name}));"#);
        let _ = writeln!(text, "#endif");
    }
    for expression in expected.layout.keys() {
        let _ = writeln!(
            text,
            r#"printf("%s=%llu\n", "{expression}", (unsigned long long)({expression}));"#
        );
    }
    text.push_str("return 0;\n}\n");
    text
}

fn compile_and_run(text: &str) -> BTreeMap<String, u64> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let source = directory.path().join("header.c");
    let binary = directory.path().join("header");
    std::fs::write(&source, text).expect("writing the C program");
    // The linker of Rust is this compiler, so it is there.
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let status = Command::new(&compiler)
        .arg("-o")
        .args([&binary, &source])
        .status()
        .unwrap_or_else(|error| panic!("running {}: {error}", compiler.display()));
    assert!(status.success(), "{} failed on:\n{text}", compiler.display());
    let output = Command::new(&binary).output().expect("running the C program");
    assert!(output.status.success());
    String::from_utf8(output.stdout)
        .expect("text")
        .lines()
        .map(|line| {
            let (name, value) = line.rsplit_once('=').expect("name=value");
            (name.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}
