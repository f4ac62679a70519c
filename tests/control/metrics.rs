//! The metrics, read by a strict checker of `OpenMetrics`.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

use afterimage::DestinationEvent;
use serde_json::json;

use crate::support::{LIMIT, PAGES, Server, Target, socket_argument};

/// Samples by name with labels, after everything that the format demands has been checked.
fn check(text: &str) -> HashMap<String, f64> {
    let body = text.strip_suffix("# EOF\n").expect("the last line is # EOF");
    let (mut kinds, mut helped, mut units) = (HashMap::new(), HashSet::new(), HashMap::new());
    let mut samples = HashMap::new();
    let (mut family, mut bucket) = (String::new(), (f64::NEG_INFINITY, 0.0));
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name) = (words.next().unwrap(), words.next().unwrap());
            let text = words.next().unwrap_or_default();
            assert!(name.starts_with("afterimage_"), "{line}");
            if name != family {
                assert!(!kinds.contains_key(name), "{name} comes in two pieces");
                name.clone_into(&mut family);
                bucket = (f64::NEG_INFINITY, 0.0);
            }
            let is_new = match what {
                "TYPE" => kinds.insert(name.to_owned(), text.to_owned()).is_none(),
                "HELP" => !text.is_empty() && helped.insert(name.to_owned()),
                "UNIT" => {
                    assert!(name.ends_with(&format!("_{text}")), "{line}");
                    units.insert(name.to_owned(), text.to_owned()).is_none()
                }
                other => panic!("{other} in {line}"),
            };
            assert!(is_new, "twice: {line}");
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line:?}"));
        let bare = name.split('{').next().unwrap();
        let suffixes: &[&str] = match kinds.get(&family).map(String::as_str) {
            Some("counter") => &["_total"],
            Some("gauge") => &[""],
            Some("info") => &["_info"],
            Some("histogram") => &["_bucket", "_sum", "_count"],
            other => panic!("{line}: {other:?} of {family}"),
        };
        let is_of_family = suffixes.iter().any(|suffix| bare == format!("{family}{suffix}"));
        assert!(is_of_family && helped.contains(&family), "{line} in {family}");
        if let Some((_, bound)) = name.split_once("_bucket{le=\"") {
            let bound: f64 = bound.strip_suffix("\"}").unwrap().parse().unwrap();
            assert!(bucket.0 < bound && bucket.1 <= value, "{line} after {bucket:?}");
            bucket = (bound, value);
            if bound.is_infinite() {
                assert_eq!(count(&samples, &format!("{family}_count")), value as u64, "{line}");
            }
        }
        assert!(samples.insert(name.to_owned(), value).is_none(), "twice: {line}");
    }
    for (family, kind) in &kinds {
        let last = format!("{family}_bucket{{le=\"+Inf\"}}");
        assert!(kind != "histogram" || samples.contains_key(&last), "{last} is missing");
    }
    samples
}

/// The status line and the body of an answer to `request`.
fn exchange(mut stream: impl Read + Write, request: &str) -> (String, String) {
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
    assert_eq!(length.parse(), Ok(body.len()));
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

/// A sample that is a whole number.
pub(crate) fn count(samples: &HashMap<String, f64>, name: &str) -> u64 {
    let value = samples.get(name).unwrap_or_else(|| panic!("no {name} in {samples:#?}"));
    assert!(value.fract().abs() < f64::EPSILON, "{name} {value}");
    *value as u64
}

/// What a process says at this socket.
pub(crate) fn samples(path: &Path) -> HashMap<String, f64> {
    check(&exchange(UnixStream::connect(path).unwrap(), GET).1)
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A port that nobody listens at: it was given to this process a moment ago.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_source_is_measured_in_base_units() {
    let port = port();
    let address = format!("tcp:127.0.0.1:{port}");
    let server = Server::start(&["--bandwidth", "on-request", "--metrics", &address]);
    let mut manager = server.begun();
    let scrape = || {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let (status, body) = exchange(stream, GET);
        assert_eq!(status, "HTTP/1.1 200 OK");
        check(&body)
    };
    let before = scrape();
    assert_eq!(count(&before, "afterimage_pages"), PAGES);
    assert_eq!(count(&before, "afterimage_pages_present"), 0);
    assert_eq!(count(&before, "afterimage_memory_bytes"), PAGES * 4096);
    assert_eq!(count(&before, "afterimage_link_up"), 0);
    assert!(before["afterimage_uptime_seconds"] > 0.0);
    manager.ok(json!({"do": "subscribe"}));
    let target = Target::connect(&server.address);
    target.until(|event| *event == DestinationEvent::Run);
    // The destination hears of it first.
    manager.event("running");
    manager.ok(json!({"do": "set", "bandwidth": "100M"}));
    let during = scrape();
    assert_eq!(count(&during, "afterimage_link_up"), 1);
    assert_eq!(count(&during, "afterimage_bandwidth_limit_bytes_per_second"), 100 << 20);
    let session = manager.query()["session"].as_str().unwrap().to_owned();
    let info = during.keys().find(|name| name.starts_with("afterimage_process_info")).unwrap();
    assert!(info.contains(&format!("session=\"{session}\"")), "{info}");
    assert!(during.contains_key("afterimage_sent_pages_total{kind=\"requested\"}"), "{during:?}");
    target.finish();
}

#[test]
fn other_requests_are_refused_and_end_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics.sock");
    let server = Server::start(&["--metrics", &socket_argument(&path)]);
    drop(server.begun());
    let ask = |request: &str| exchange(UnixStream::connect(&path).unwrap(), request).0;
    assert_eq!(ask("GET / HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
    assert_eq!(ask("POST /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
    assert_eq!(ask("rubbish\r\n\r\n"), "HTTP/1.1 400 Bad Request");
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(9000));
    assert_eq!(ask(&long), "HTTP/1.1 431 Request Header Fields Too Large");
    // Who connects and says nothing keeps nobody else from it.
    let silent = UnixStream::connect(&path).unwrap();
    assert_eq!(ask(GET), "HTTP/1.1 200 OK");
    drop(silent);
}
