//! The machine that the figures are of.

use std::fs;

use serde::Serialize;

/// What a reader must know to compare figures.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// The processor's model.
    pub processor: String,
    /// How many of them this process may use.
    pub processors: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Whether transparent huge pages are used: `always`, `madvise`, `never`.
    pub huge_pages: String,
    /// What else the machine did when the run began: the load average of one minute.
    pub load_before: f64,
    /// The same when it ended.
    pub load_after: f64,
    /// How the processes were connected.
    pub network: String,
}

impl Machine {
    /// Looks at it.
    #[must_use]
    pub fn look(network: String) -> Self {
        let release = nix::sys::utsname::uname();
        let release = release.map(|it| it.release().to_string_lossy().into_owned());
        Self {
            kernel: release.unwrap_or_default(),
            processor: field("/proc/cpuinfo", "model name"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: field("/proc/meminfo", "MemTotal")
                .trim_end_matches(" kB")
                .parse::<u64>()
                .unwrap_or(0)
                * 1024,
            huge_pages: chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
            load_before: load(),
            load_after: 0.0,
            network,
        }
    }

    /// Looks at what else it does once more.
    pub fn look_again(&mut self) {
        self.load_after = load();
    }
}

/// Bytes of memory that can be had now.
#[must_use]
pub fn available_bytes() -> u64 {
    let text = field("/proc/meminfo", "MemAvailable");
    text.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

fn field(path: &str, key: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.split_once(':'));
    line.map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

fn chosen(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map(|(word, _)| word.to_owned()).unwrap_or_default()
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0.0)
}
