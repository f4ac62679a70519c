//! The metrics of this process, in the text format of `OpenMetrics`, over a little HTTP.
//!
//! Answers for names, units and what is in an answer; who asks is the affair of
//! [`control`](crate::control), whose thread also serves this.

use std::fmt;
use std::sync::Mutex;
use std::sync::PoisonError;

use afterimage::{DestinationStats, FaultLatency, SourceStats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::bandwidth::Bandwidth;
use crate::control::{Counts, Image, Link};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

/// The answer to an HTTP request, whole; the connection ends with it.
pub(crate) fn answer(request: &[u8], image: impl FnOnce() -> Image) -> String {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let is_http = version.is_some_and(|it| it.starts_with(b"HTTP/1.")) && words.next().is_none();
    let is_whole = request.windows(4).any(|end| end == b"\r\n\r\n");
    let path = target.and_then(|it| it.split(|byte| *byte == b'?').next());
    match (method, path) {
        _ if !is_http => respond("400 Bad Request", "this is not HTTP/1.1\n", PLAIN),
        _ if !is_whole => {
            respond("431 Request Header Fields Too Large", "too long a request\n", PLAIN)
        }
        (Some(b"GET"), Some(b"/metrics")) => match encode(image()) {
            Ok(text) => respond("200 OK", &text, OPEN_METRICS),
            Err(fmt::Error) => respond("500 Internal Server Error", "not encoded\n", PLAIN),
        },
        (Some(b"GET"), _) => respond("404 Not Found", "there is /metrics, and no more\n", PLAIN),
        _ => respond("405 Method Not Allowed", "there is GET, and no more\n", PLAIN),
    }
}

fn respond(status: &str, body: &str, kind: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: \
         close\r\n\r\n{body}"
    )
}

fn encode(image: Image) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("afterimage");
    registry.register_collector(Box::new(Moment(Mutex::new(image))));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

/// The metrics of one moment. A collector must be `Sync`, and an image need not be.
#[derive(Debug)]
struct Moment(Mutex<Image>);

impl Collector for Moment {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let image = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut page = Page(encoder);
        page.session(&image)?;
        match &image.counts {
            None => Ok(()),
            Some(counts) => page.counts(counts),
        }
    }
}

struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn session(&mut self, image: &Image) -> fmt::Result {
        let labels = [
            ("tool", image.identity.tool),
            ("version", env!("CARGO_PKG_VERSION")),
            ("role", image.identity.role),
            ("session", image.session().unwrap_or_default()),
        ];
        let mut info = self.0.encode_descriptor(
            "process",
            "This process, and its session",
            None,
            MetricType::Info,
        )?;
        info.encode_info(&labels)?;
        let uptime = image.at_us() as f64 / 1e6;
        self.gauge("uptime", "Since the start of this process", Some(&Unit::Seconds), uptime)?;
        let link = if image.link() == Link::Up { 1.0 } else { 0.0 };
        self.gauge("link_up", "Whether the peer is connected", None, link)?;
        let paused = if image.link() == Link::Paused { 1.0 } else { 0.0 };
        self.gauge("paused", "Whether connections wait for recover", None, paused)?;
        self.labelled("phase", "How far the migration is", MetricType::Gauge, |mut at| {
            at.encode_family(&[("phase", image.phase().name())])?.encode_gauge(&1_i64)
        })?;
        let bytes = image.memory_bytes() as f64;
        self.gauge("memory", "Guest memory", Some(&Unit::Bytes), bytes)?;
        match image.parameters.bandwidth {
            Some(Bandwidth::Limited(bytes)) => self.gauge(
                "bandwidth_limit_bytes_per_second",
                "What may leave in a second that nobody has asked for",
                None,
                bytes.get() as f64,
            ),
            _ => Ok(()),
        }
    }

    fn counts(&mut self, counts: &Counts) -> fmt::Result {
        let (total, present) = counts.pages();
        self.gauge("pages", "Pages of the guest", None, total as f64)?;
        let help = "Pages of the guest that the destination has";
        self.gauge("pages_present", help, None, present as f64)?;
        match counts {
            Counts::Source(stats, _) => self.source(stats),
            Counts::Snapshot(all, _) => {
                let help = "Destinations that are or were connected";
                self.gauge("destinations", help, None, all.len() as f64)?;
                self.source(&sum(all.iter().map(|(_, stats)| stats)))
            }
            Counts::Destination(stats) => self.destination(stats),
        }
    }

    fn source(&mut self, stats: &SourceStats) -> fmt::Result {
        self.by_kind(
            "sent_pages",
            "Pages sent",
            [
                ("requested", stats.pages_requested),
                ("background", stats.pages_background),
                ("zero", stats.pages_zero),
            ],
        )?;
        let help = "Pages that could not be read when they were to be sent";
        self.counter("unreadable_pages", help, stats.pages_unreadable)?;
        self.counter("released_pages", "Pages of 4 KiB freed here", stats.pages_released)?;
        self.both(stats.frames_stale, stats.recoveries)
    }

    fn destination(&mut self, stats: &DestinationStats) -> fmt::Result {
        self.by_kind(
            "placed_pages",
            "Pages put in place",
            [
                ("requested", stats.pages_requested),
                ("background", stats.pages_background),
                ("zero", stats.pages_zero),
            ],
        )?;
        let help = "Pages that the guest gave up before they arrived";
        self.counter("discarded_pages", help, stats.pages_discarded)?;
        let help = "Pages that came although another copy was first";
        self.counter("duplicate_pages", help, stats.pages_duplicate)?;
        let help = "Pages that the source could not read";
        self.counter("unreadable_pages", help, stats.pages_unreadable)?;
        let help = "Content of pages received";
        self.counter_in("received", help, Some(&Unit::Bytes), stats.bytes_received)?;
        let help = "Requests sent again because no answer came in time";
        self.counter("retried_requests", help, stats.requests_retried)?;
        self.both(stats.frames_stale, stats.recoveries)?;
        self.latency(&stats.fault_latency)
    }

    fn both(&mut self, stale: u64, recoveries: u64) -> fmt::Result {
        self.counter("stale_frames", "Frames of older connections, dropped", stale)?;
        self.counter("recoveries", "How often the peer was attached again", recoveries)
    }

    fn latency(&mut self, latency: &FaultLatency) -> fmt::Result {
        let help = "How long the guest waited for a page, from the reading of the fault on";
        let mut at = self.0.encode_descriptor(
            "fault_latency",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        let bound = |bucket: usize| (1_u64 << (bucket + 1)) as f64 / 1e6;
        let buckets = latency.buckets.iter().enumerate().map(|(at, count)| (bound(at), *count));
        let buckets: Vec<_> = buckets.chain([(f64::INFINITY, 0)]).collect();
        let total = latency.total.as_secs_f64();
        at.encode_histogram::<NoLabelSet>(total, latency.count, &buckets, None)
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> fmt::Result {
        self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?.encode_gauge(&value)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counter_in(name, help, None, value)
    }

    fn counter_in(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        value: u64,
    ) -> fmt::Result {
        let mut at = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        at.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    fn by_kind(&mut self, name: &str, help: &str, kinds: [(&str, u64); 3]) -> fmt::Result {
        self.labelled(name, help, MetricType::Counter, |mut at| {
            kinds.into_iter().try_for_each(|(kind, count)| {
                let labels = [("kind", kind)];
                at.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)
            })
        })
    }

    fn labelled(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        encode: impl FnOnce(MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        encode(self.0.encode_descriptor(name, help, None, kind)?)
    }
}

fn sum<'a>(all: impl Iterator<Item = &'a SourceStats>) -> SourceStats {
    all.fold(SourceStats::default(), |mut sum, it| {
        sum.pages_requested += it.pages_requested;
        sum.pages_background += it.pages_background;
        sum.pages_zero += it.pages_zero;
        sum.pages_unreadable += it.pages_unreadable;
        sum.pages_released += it.pages_released;
        sum.frames_stale += it.frames_stale;
        sum.recoveries += it.recoveries;
        sum
    })
}
